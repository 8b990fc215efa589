"""From labels to groups: units cut the same way, what they cost by width, and what was refused and why."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autoprune.core import Group, Layer, PruningSpace, Refusal, Slice, Term, Width
from autoprune.recording import Recording
from autoprune.traced import TracedModel, fingerprint, owner, tensors_of, widths
from autoprune.units import Labels

Floats = NDArray[np.float64]
ONE: Width = (1.0, {})


def gather(model: nn.Module, recording: Recording, examples: int, refused: Mapping[str, str]) -> TracedModel:
    """Units with one signature of (tensor, dimension, positions) form a group; the rest is refused with its reason."""
    units = recording.units
    owned: dict[int, list[tuple[str, int, Labels]]] = defaultdict(list)
    for (tensor, dim), labels in recording.slots.items():
        roots = units.roots(labels)
        order = np.argsort(roots, kind="stable")
        found, starts = np.unique(roots[order], return_index=True)
        for root, positions in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
            if root:
                owned[root].append((tensor, dim, np.sort(positions)))
    signatures: dict[tuple[tuple[str, int, int], ...], list[int]] = defaultdict(list)
    for root, pieces in owned.items():
        signatures[tuple((t, d, len(p)) for t, d, p in pieces)].append(root)

    made_along = recording.out_dims
    groups: list[Group] = []
    slices: list[tuple[Slice, ...]] = []
    refusals: list[Refusal] = []
    group_of: dict[int, int] = {}
    named: Counter[str] = Counter()
    for signature, unordered in signatures.items():
        made_by = [t for t, d, _ in signature if made_along.get(t) == d]
        base = owner((made_by or [signature[0][0]])[0])
        named[base] += 1
        name = base if named[base] == 1 else f"{base}#{named[base]}"  # a layer whose units fall into several groups
        why = refused.get(name) or _why_whole(recording, unordered)
        if why is None and not made_by:
            why = "no layer of the model makes these units"
        if why is not None:
            refusals.append(Refusal(name, why))
            continue
        ordered = sorted(unordered, key=lambda root: owned[root][0][2].tolist())
        for root in ordered:
            group_of[root] = len(groups)
        cuts = [
            Slice(t, d, _role(t, d, made_along), np.stack([owned[root][i][2] for root in ordered]))
            for i, (t, d, _) in enumerate(signature)
        ]
        slices.append(tuple(cuts))
        members = tuple(dict.fromkeys(owner(t) for t in made_by))
        groups.append(Group(name=name, size=len(ordered), levels=(0.0,), members=members))
    space = PruningSpace(tuple(groups), tuple(dict.fromkeys(refusals)))
    traced = TracedModel(
        space=space,
        slices=tuple(slices),
        attributes=(),
        depthwise=frozenset(recording.depthwise),
        macs=(),
        params=(),
        weights=(),
        activations=(),
        traffic=(),
        fingerprint=fingerprint(model),
    )
    return _with_costs(model, recording, examples, traced, group_of)


def _role(tensor: str, dim: int, made_along: Mapping[str, int]) -> Literal["out", "in", "with"]:
    if tensor not in made_along:
        return "with"
    return "out" if dim == made_along[tensor] else "in"


def _why_whole(recording: Recording, roots: Sequence[int]) -> str | None:
    for root in roots:
        if (reason := recording.units.why_whole(root)) is not None:
            return reason
    if len(roots) < 2:
        return recording.units.united_by(roots[0]) or "it has a single unit"
    return None


# -------------------------------------------------------------------------------------------------------------- costs


def _with_costs(
    model: nn.Module, recording: Recording, examples: int, traced: TracedModel, group_of: Mapping[int, int]
) -> TracedModel:
    """Fill in the layers of each group and the terms that give MACs, parameters and bytes by width."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model)}
    shares = widths(traced.slices, shapes)

    def elements(tensor: str, scale: float) -> Term:
        cut_dims = sorted(shares.get(tensor, {}))[:2]
        rest = math.prod(n for d, n in enumerate(shapes[tensor]) if d not in cut_dims)
        sides = ([shares[tensor][d] for d in cut_dims] + [ONE, ONE])[:2]
        return Term(scale * rest, *sides)

    def by_group(labels: Labels, counts: Labels) -> tuple[float, dict[int, float]]:
        totals = Counter[int]()
        for root, count in zip(recording.units.roots(labels).tolist(), counts.tolist(), strict=True):
            totals[group_of.get(root, -1)] += count
        sizes = traced.space.groups
        return float(totals.pop(-1, 0)), {g: n / sizes[g].size for g, n in totals.items()}

    macs = [elements(c.weight, c.positions) for c in recording.contractions]
    macs += [Term(each / examples, by_group(*counted), ONE) for *counted, each in recording.elementwise]
    params = [elements(name, 1.0) for name, _ in model.named_parameters()]
    weights = [elements(name, tensor.element_size()) for name, tensor in tensors_of(model)]
    made = [
        _vector(*by_group(labels, counts), len(traced.space.groups)) * (size / examples)
        for labels, counts, size in recording.storages
    ]
    groups = [
        replace(g, layers=_layers(shapes, recording, traced.slices[i], g)) for i, g in enumerate(traced.space.groups)
    ]
    return replace(
        traced,
        space=PruningSpace(tuple(groups), traced.space.refused),
        macs=tuple(macs),
        params=tuple(params),
        weights=tuple(weights),
        activations=_peaks(recording.lifetimes, made, len(groups)),
        traffic=(_linear(sum(made, np.zeros(len(groups) + 1))),),
    )


def _layers(
    shapes: Mapping[str, tuple[int, ...]], recording: Recording, pieces: Sequence[Slice], group: Group
) -> tuple[Layer, ...]:
    """The layers that make this group's units."""
    owned = {p.tensor for p in pieces}
    layers = {}
    for c in recording.contractions:
        name = owner(c.weight)
        if c.weight in owned and name in group.members:
            shape = shapes[c.weight]
            layers[name] = Layer(
                name=name,
                units_in=shape[1],
                units_out=shape[0],
                kernel=c.kernel,
                stride=c.stride,
                height=c.height,
                width=c.width,
                macs=c.positions * math.prod(shape),
            )
    return tuple(layers.values())


def _peaks(lifetimes: Sequence[tuple[bool, int]], made: Sequence[Floats], count: int) -> tuple[tuple[Term, ...], ...]:
    """The instants that no other exceeds in every coefficient: the peak is the largest of them at any width."""
    now, instants = np.zeros(count + 1), []
    for born, ordinal in lifetimes:
        now = now + made[ordinal] * (1 if born else -1)
        if born:
            instants.append(now)
    best: list[Floats] = []
    for instant in sorted(instants, key=lambda v: -v.sum()):
        if not any((kept >= instant - 1e-9).all() for kept in best):
            best.append(instant)
    return tuple((_linear(v),) for v in best)


def _vector(fixed: float, of: Mapping[int, float], count: int) -> Floats:
    """[1 + G]: what is fixed, and what each unit of each group adds."""
    found = np.zeros(count + 1)
    found[0] = fixed
    found[[g + 1 for g in of]] = list(of.values())
    return found


def _linear(vector: Floats) -> Term:
    """The same as a term."""
    return Term(1.0, (float(vector[0]), {g: float(vector[g + 1]) for g in np.flatnonzero(vector[1:]).tolist()}), ONE)


def labels_of(recording: Recording, traced: TracedModel, group: int) -> Labels:
    """The raw labels of a group's units."""
    piece = traced.slices[group][0]
    return recording.slots[piece.tensor, piece.dim][piece.positions.ravel()]
