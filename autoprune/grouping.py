"""From labels to groups: units cut the same way, what they cost by width, and what was refused and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autoprune.core import Group, Kinds, Layer, PruningSpace, Refusal, Slice, Term, Width
from autoprune.recording import Recording
from autoprune.traced import TracedModel, fingerprint, owner, tensors_of, widths
from autoprune.units import Labels

Floats = NDArray[np.float64]
ONE: Width = (1.0, {})


def gather(
    model: nn.Module,
    recording: Recording,
    examples: int,
    refused: Mapping[str, str],
    *,
    grain: Sequence[str] = ("channel",),
    blocks: Sequence[str] = (),
) -> TracedModel:
    """Units with one signature of (tensor, dimension, positions) form a group; the rest is refused with its reason.

    grain: which widths are cut, as of autoprune.space.Space. blocks: modules that can be left out, each a group behind
    these.
    """
    slots = [_Slot(t, d, *_owners(recording.units.roots(labels))) for (t, d), labels in recording.slots.items()]
    groups: list[Group] = []
    slices: list[tuple[Slice, ...]] = []
    refusals: list[Refusal] = []
    group_of = np.full(recording.units.count + 1, -1)
    named = Counter(blocks)
    alike = _alike(slots, recording.units.count)
    heads = recording.units.roots(np.concatenate([*recording.heads, np.empty(0, dtype=np.int64)]))
    heads = heads[heads > 0]
    owned = [slot.owns(np.array([roots[0] for roots in alike], dtype=np.int64)) for slot in slots]
    for number, roots in enumerate(alike):
        own = [slot for slot, owns in zip(slots, owned, strict=True) if owns[number]]
        made_by = [slot.tensor for slot in own if (slot.tensor, slot.dim) in recording.made]
        base = owner((made_by or [own[0].tensor])[0])
        named[base] += 1
        name = base if named[base] == 1 else f"{base}#{named[base]}"  # a layer whose units fall into several groups
        kind: Kinds = "head" if np.isin(roots, heads).any() else "channel"
        why = refused.get(name) or _why_whole(recording, roots.tolist())
        if not {kind, "channel"} & set(grain):
            why = why or f"space={'+'.join(grain)} leaves it whole"
        if why := why or (None if made_by else "no layer of the model makes these units"):
            refusals.append(Refusal(name, why))
            continue
        ordered = roots[np.argsort(own[0].positions(roots)[:, 0], kind="stable")]
        group_of[ordered] = len(groups)
        cuts = [Slice(s.tensor, s.dim, _role(s.tensor, s.dim, recording.made), s.positions(ordered)) for s in own]
        slices.append(tuple(cuts))
        members = tuple(dict.fromkeys(owner(t) for t in made_by))
        groups.append(Group(name=name, size=len(ordered), levels=(0.0,), members=members, kind=kind))
    groups += [Group(name=name, size=1, levels=(0.0, 1.0), members=(name,), kind="block") for name in blocks]
    slices += [()] * len(blocks)
    space = PruningSpace(tuple(groups), tuple(dict.fromkeys(refusals)))
    return replace(_priced(model, recording, examples, space, slices, group_of), grain=tuple(grain))


@dataclass(frozen=True)
class _Slot:
    """A parameter's dimension: the units that own it, ascending [U], and the sorted positions of each."""

    tensor: str
    dim: int
    units: Labels
    starts: Labels
    order: Labels

    @property
    def counts(self) -> Labels:
        return np.diff(self.starts)

    def owns(self, units: Labels) -> NDArray[np.bool_]:
        """Of each unit [U], whether it is among the owners."""
        if not len(self.units):
            return np.zeros(len(units), dtype=bool)
        at = np.searchsorted(self.units, units).clip(max=len(self.units) - 1)
        return np.asarray(self.units[at] == units)

    def positions(self, units: Labels) -> Labels:
        """Of units that own equally many, [U, P]."""
        at = np.searchsorted(self.units, units)
        return self.order[self.starts[at][:, None] + np.arange(self.counts[at[0]])]


def _owners(roots: Labels) -> tuple[Labels, Labels, Labels]:
    """The unit at each position -> the units, where each one's positions start in the last, and these, sorted."""
    order = np.argsort(roots, kind="stable")
    order = order[np.count_nonzero(roots == 0) :]
    units, starts = np.unique(roots[order], return_index=True)
    return units, np.append(starts, len(order)), order


def _alike(slots: Sequence[_Slot], count: int) -> list[Labels]:
    """Units that own equally many positions of the same slots, in the order in which the slots first show them."""
    signature, last = np.zeros(count + 1, dtype=np.int64), 0  # of what was seen so far, a number for each
    first = np.full(count + 1, len(slots))
    for number, slot in enumerate(slots):
        if len(slot.units) == 0:
            continue
        first[slot.units] = np.minimum(first[slot.units], number)
        seen = signature[slot.units] * (slot.counts.max() + 1) + slot.counts
        signature[slot.units] = last + 1 + np.unique(seen, return_inverse=True)[1]
        last = int(signature[slot.units].max())
    owning = np.flatnonzero(first < len(slots))
    owning = owning[np.lexsort((owning, first[owning]))]
    _, where, inverse = np.unique(signature[owning], return_index=True, return_inverse=True)
    parts = np.split(owning[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse))[:-1])
    return [parts[i] for i in np.argsort(where)]


def _role(tensor: str, dim: int, made: Collection[tuple[str, int]]) -> Literal["out", "in", "with"]:
    if (tensor, dim) in made:
        return "out"
    return "in" if any(tensor == name for name, _ in made) else "with"


def _why_whole(recording: Recording, roots: Sequence[int]) -> str | None:
    for root in roots:
        if (reason := recording.units.why_whole(root)) is not None:
            return reason
    if len(roots) < 2:
        return recording.units.united_by(roots[0]) or "it has a single unit"
    return None


# -------------------------------------------------------------------------------------------------------------- costs


def _priced(
    model: nn.Module,
    recording: Recording,
    examples: int,
    space: PruningSpace,
    slices: Sequence[tuple[Slice, ...]],
    group_of: Labels,
) -> TracedModel:
    """The traced model: with the layers of each group, and the terms that give MACs, parameters and bytes by width."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model)}
    shares = widths(slices, shapes)

    def elements(tensor: str, scale: float, module: str) -> Term:
        cut_dims = sorted(shares.get(tensor, {}))[:2]
        rest = math.prod(n for d, n in enumerate(shapes[tensor]) if d not in cut_dims)
        left, right = ([shares[tensor][d] for d in cut_dims] + [ONE, ONE])[:2]
        return Term(scale * rest, left, right, space.block_of(module))

    sizes = np.array([g.size for g in space.groups])

    def by_group(labels: Labels, counts: Labels) -> tuple[float, dict[int, float]]:
        owners = group_of[recording.units.roots(labels)] + 1
        totals = np.bincount(owners, weights=counts, minlength=len(sizes) + 1)
        found = np.flatnonzero(totals[1:])
        return float(totals[0]), dict(zip(found.tolist(), (totals[1:][found] / sizes[found]).tolist(), strict=True))

    macs = [elements(c.weight, c.positions, c.module) for c in recording.contractions]
    for labels, counts, each, module in recording.elementwise:
        gate = space.block_of(module)
        macs.append(Term(each / examples, by_group(labels, counts), ONE, gate))
    params = [elements(name, 1.0, name) for name, _ in model.named_parameters()]
    weights = [elements(name, tensor.element_size(), name) for name, tensor in tensors_of(model)]
    places = [space.block_of(module) for module in recording.places]
    gates = (None, *(i for i, g in enumerate(space.groups) if g.kind == "block"))
    made = [
        _rows(*by_group(labels, counts), len(space.groups), gates.index(place), len(gates)) * (size / examples)
        for (labels, counts, size), place in zip(recording.storages, places, strict=True)
    ]
    groups = [replace(g, layers=_layers(shapes, recording, slices[i], g)) for i, g in enumerate(space.groups)]
    return TracedModel(
        space=replace(space, groups=tuple(groups)),
        slices=tuple(slices),
        attributes=(),
        depthwise=frozenset(recording.depthwise),
        macs=tuple(macs),
        params=tuple(params),
        weights=tuple(weights),
        activations=tuple(_linear(rows, gates) for rows in _peaks(recording.lifetimes, made)),
        traffic=_linear(sum(made, np.zeros((len(gates), len(groups) + 1))), gates),
        fingerprint=fingerprint(model),
    )


def _layers(
    shapes: Mapping[str, tuple[int, ...]], recording: Recording, pieces: Sequence[Slice], group: Group
) -> tuple[Layer, ...]:
    """The layers that make this group's units; of a block those in it."""
    owned = {p.tensor for p in pieces}
    layers: dict[str, Layer] = {}
    for c in recording.contractions:
        name = owner(c.weight)
        within = f"{c.module}.".startswith(f"{group.name}.")
        if within if group.kind == "block" else c.weight in owned and name in group.members:
            shape, known = shapes[c.weight], layers[name].macs if name in layers else 0.0
            layers[name] = Layer(
                name=name,
                units_in=shape[1],
                units_out=shape[0],
                kernel=c.kernel,
                stride=c.stride,
                height=c.height,
                width=c.width,
                macs=known + c.positions * math.prod(shape),
            )
    return tuple(layers.values())


def _peaks(lifetimes: Sequence[tuple[bool, int]], made: Sequence[Floats]) -> list[Floats]:
    """The instants that no other exceeds in every coefficient: the peak is the largest of them at any width."""
    now, instants = np.zeros_like(made[0]) if made else np.zeros(0), []
    for born, ordinal in lifetimes:
        now = now + made[ordinal] * (1 if born else -1)
        if born:
            instants.append(now)
    best: list[Floats] = []
    for instant in sorted(instants, key=lambda v: -v.sum()):
        if not any((kept >= instant - 1e-9).all() for kept in best):
            best.append(instant)
    return best


def _rows(fixed: float, of: Mapping[int, float], groups: int, gate: int, gates: int) -> Floats:
    """[gates, 1 + G]: in the row of its gate what is fixed, and what each unit of each group adds."""
    found = np.zeros((gates, groups + 1))
    found[gate, 0] = fixed
    found[gate, [g + 1 for g in of]] = list(of.values())
    return found


def _linear(rows: Floats, gates: Sequence[int | None]) -> tuple[Term, ...]:
    """The same as terms."""
    return tuple(
        Term(1.0, (float(row[0]), {g: float(row[g + 1]) for g in np.flatnonzero(row[1:]).tolist()}), ONE, gate)
        for row, gate in zip(rows, gates, strict=True)
        if row.any()
    )


def labels_of(recording: Recording, traced: TracedModel, group: int) -> Labels:
    """The raw labels of a group's units."""
    piece = traced.slices[group][0]
    return recording.slots[piece.tensor, piece.dim][piece.positions.ravel()]
