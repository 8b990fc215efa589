"""Proof of groups: on random weights, cutting units must equal setting their parameters to zero.

Run in double precision where the model can, on two draws of units and two batch sizes. Groups are proven together; only
when that fails each is tried alone, and sizes that the model keeps in integer attributes are sought.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.borrowing import arguments, seeded
from autoprune.grouping import labels_of
from autoprune.recording import Recording
from autoprune.traced import SizeAttribute, TracedModel, tensors_of
from autoprune.units import Labels

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}  # of the largest output
DIFFERS = "cutting differs from masking"
DRAWS = 2  # of random widths of all groups together
SUBSETS = 4  # of the blocks that are left out together to prove them


@dataclass(frozen=True)
class Outcome:
    """The proven model, or the groups that failed with the reason of each; hopeless: those that no other reading of the
    sizes in the model's Python would save."""

    proven: TracedModel | None
    groups: Mapping[int, str]
    hopeless: frozenset[int] = frozenset()


def failing(
    probe: nn.Module, inputs: tuple[Tensor, ...], traced: TracedModel, recording: Recording, seed: int
) -> Outcome:
    """Prove all groups together, at half and at random widths, on two draws of units and two batch sizes; on failure
    each group alone. Then that the cut model runs in training, and that the output depends on every group at all."""
    everything = [i for i, g in enumerate(traced.space.groups) if g.kind != "block"]
    if not everything:
        return Outcome(traced, {})
    rng = np.random.default_rng(seed)
    sizes = [group.size for group in traced.space.groups]
    for widths in (None, *({g: int(rng.integers(1, sizes[g] + 1)) for g in everything} for _ in range(DRAWS))):
        if _check(probe, inputs, traced, everything, seed, widths) is None:
            continue
        failures = _apart(probe, inputs, traced, everything, seed, widths)
        if widths:  # what only passes in proportion to another
            whole = traced
            failures |= _alone(everything, lambda g: _check(probe, inputs, whole, [g], seed))  # noqa: B023
        traced, mended = _mended(probe, inputs, recording, traced, list(failures), seed)
        failures = {g: why for g, why in failures.items() if g not in mended}
        why = None if failures else _check(probe, inputs, traced, everything, seed, widths)
        if failures or why is not None:
            return Outcome(None, failures or dict.fromkeys(everything, why or ""))
    if why := _untrainable(probe, inputs, traced, everything):
        alone = _alone(everything, lambda g: _untrainable(probe, inputs, traced, [g]))
        return Outcome(None, alone or dict.fromkeys(everything, why), frozenset(everything))
    if hidden := _hidden(probe, inputs, traced, everything, seed):
        return Outcome(None, dict.fromkeys(hidden, "the output does not show it"), frozenset(hidden))
    return Outcome(traced, {})


def _alone(groups: Sequence[int], judged: Callable[[int], str | None]) -> dict[int, str]:
    """What is wrong with each group alone."""
    return {g: why for g in groups if (why := judged(g)) is not None}


def _apart(
    probe: nn.Module,
    inputs: tuple[Tensor, ...],
    traced: TracedModel,
    groups: Sequence[int],
    seed: int,
    widths: Mapping[int, int] | None,
) -> dict[int, str]:
    """The groups that fail alone, and why, found by halving those that fail together."""
    why = _check(probe, inputs, traced, groups, seed, widths)
    if why is None:
        return {}
    if len(groups) == 1:
        return {groups[0]: why}
    middle = len(groups) // 2
    left, right = groups[:middle], groups[middle:]
    return {g: why for part in (left, right) for g, why in _apart(probe, inputs, traced, part, seed, widths).items()}


def _untrainable(
    probe: nn.Module, inputs: tuple[Tensor, ...], traced: TracedModel, groups: Sequence[int]
) -> str | None:
    """What goes wrong in training mode once half of these groups is cut; None where the whole model fails there too."""
    kept = [np.arange(g.size) for g in traced.space.groups]
    for g in groups:
        kept[g] = kept[g][: max(1, len(kept[g]) // 2)]
    with torch.no_grad():
        try:
            copy.deepcopy(probe).train()(*arguments(inputs))
        except Exception:  # noqa: BLE001, the model is foreign code
            return None
        try:
            traced.cut(probe, kept).train()(*arguments(inputs))
        except Exception as error:  # noqa: BLE001
            return f"the cut model does not run in training: {_first_line(error)}"
    return None


def _hidden(
    probe: nn.Module, inputs: tuple[Tensor, ...], traced: TracedModel, groups: Sequence[int], seed: int
) -> list[int]:
    """The groups that the output does not depend on, as of an empty, whole or thresholded one: nothing is proven of
    them. Told by gradients of the output, and where one group has none by masking it."""
    parameters = dict(probe.named_parameters())
    frozen = [p for p in parameters.values() if not p.requires_grad and p.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with torch.enable_grad(), seeded(seed):
            leaves = [x for x in tree_leaves(probe(*arguments(inputs))) if isinstance(x, Tensor) and x.requires_grad]
            if not leaves:
                gradients: dict[str, Tensor | None] = {}
            else:
                total = sum(
                    (x.nan_to_num(0, 0, 0) * torch.randn(x.shape, generator=generator).to(x)).sum() for x in leaves
                )
                found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)  # type: ignore[arg-type]
                gradients = dict(zip(parameters, found, strict=True))
    except Exception:  # noqa: BLE001, the model is foreign code
        return []  # it cannot be told so
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)

    def shown(group: int) -> bool:
        return any(
            (gradient := gradients.get(piece.tensor)) is not None
            and bool((gradient.index_select(piece.dim, torch.from_numpy(piece.positions.ravel())) != 0).any())
            for piece in traced.slices[group]
        )

    dark = [g for g in groups if not shown(g)]
    if len(dark) == len(groups):
        return dark
    return [g for g in dark if not _changes(probe, inputs, traced, g, seed)]


def _changes(probe: nn.Module, inputs: tuple[Tensor, ...], traced: TracedModel, group: int, seed: int) -> bool:
    """Whether masking all but one unit of a group changes the output."""
    kept = [np.arange(g.size) for g in traced.space.groups]
    kept[group] = kept[group][:1]
    whole = _run(probe, inputs, seed)
    with _masked(probe, traced, kept):
        return _difference(whole, _run(probe, inputs, seed)) is not None


def _mended(
    probe: nn.Module,
    inputs: tuple[Tensor, ...],
    recording: Recording,
    traced: TracedModel,
    groups: Sequence[int],
    seed: int,
) -> tuple[TracedModel, Collection[int]]:
    """The model with the attributes that let some of these groups pass, and which they are. What one group needed is
    tried first for the next; where all that may be tied to it breaks it, all but those of one kind are tried."""
    mended, needed = set(), frozenset[tuple[str, str]]()
    left = list(groups)
    while left:
        links = {g: _link_attributes(probe, recording, traced, g) for g in left}
        kinds = sorted({_kind(probe, link) for link in links[left[0]]})
        tried = [(left, needed)] if needed else []
        for chosen, allowed in [*tried, *(([left[0]], kept) for kept in _subsets(kinds))]:
            added = {link for g in chosen for link in links[g] if _kind(probe, link) in allowed}
            with_links = replace(traced, attributes=tuple(sorted({*traced.attributes, *added}, key=_place)))
            if added and _check(probe, inputs, with_links, chosen, seed) is None:
                traced = with_links if allowed == needed else _fewest_links(probe, inputs, with_links, chosen[0], seed)
                needed |= {_kind(probe, link) for link in traced.attributes if link.group == chosen[0]}
                mended |= set(chosen)
                break
        left = [g for g in left[1:] if g not in mended]
    return traced, mended


def _subsets(kinds: Sequence[tuple[str, str]]) -> list[frozenset[tuple[str, str]]]:
    """All of them, and all but each."""
    return [frozenset(kinds), *(frozenset(kinds) - {one} for one in kinds if len(kinds) > 1)]


def _check(
    probe: nn.Module,
    inputs: tuple[Tensor, ...],
    traced: TracedModel,
    groups: Sequence[int],
    seed: int,
    widths: Mapping[int, int] | None = None,
) -> str | None:
    """None if cutting random units of these groups equals masking them; otherwise what went wrong.

    widths: how many units of each group stay, half of them if absent.
    """
    rng = np.random.default_rng(seed)
    for batch in (len(inputs[0]), len(inputs[0]) + 1):
        kept = [np.arange(g.size) for g in traced.space.groups]
        for g in groups:
            size = traced.space.groups[g].size
            kept[g] = np.sort(rng.choice(size, widths[g] if widths else max(1, size // 2), replace=False))
        examples = tuple(torch.cat([x, x[: batch - len(x)]]) for x in inputs)
        try:
            smaller = _run(traced.cut(probe, kept, sharing=True), examples, seed)
            with _masked(probe, traced, kept):
                larger = _run(probe, examples, seed)
        except Exception as error:  # noqa: BLE001, the model is foreign code
            return f"the cut model does not run: {_first_line(error)}"
        if why := _difference(smaller, larger):
            return why
    return None


def _run(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> list[object]:
    """What a model returns, as leaves, any draws being those of the seed."""
    with torch.no_grad(), seeded(seed):
        return tree_leaves(model(*arguments(inputs)))


def _difference(ours: Sequence[object], theirs: Sequence[object]) -> str | None:
    """How two models' outputs differ, as lists of leaves; None if they do not."""
    if len(ours) != len(theirs):
        return f"cutting changes how much is returned from {len(theirs)} to {len(ours)}"
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape:
            return f"cutting changes the output's shape from {list(b.shape)} to {list(a.shape)}"
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return f"{DIFFERS} in what is returned as {b.dtype}"
            continue
        apart = (a - b).abs()[~((a == b) & ~b.isfinite())]  # of two infinities alike nothing is left
        difference = float(apart.max()) / max(_largest(b), 1e-12) if apart.numel() else 0.0
        if not difference <= TOLERANCE.get(b.dtype, 1e-5):
            return f"{DIFFERS} by {difference:.1e} of the largest output"
    return None


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@contextmanager
def _masked(model: nn.Module, traced: TracedModel, kept: Sequence[Labels]) -> Iterator[None]:
    """Inside, every parameter slice of the removed units is zero, and all that blocks left out hold; afterwards it is
    back."""
    tensors = dict(tensors_of(model))
    out = tuple(f"{block}." for block in traced.left_out(kept))
    whole = [(tensor, tensor.clone()) for name, tensor in tensors.items() if name.startswith(out)] if out else []
    gone = {(tensor, dim): where for tensor, dims in traced.removed(kept).items() for dim, where in dims.items()}
    earlier = []
    with torch.no_grad():
        for (name, dim), positions in gone.items():
            index = torch.from_numpy(positions)
            earlier.append((tensors[name], dim, index, tensors[name].index_select(dim, index)))
            tensors[name].index_fill_(dim, index, 0.0)
        for tensor, _ in whole:
            tensor.zero_()
        try:
            yield
        finally:
            for tensor, values in whole:
                tensor.copy_(values)
            for tensor, dim, index, values in reversed(earlier):
                tensor.index_copy_(dim, index, values)


def _link_attributes(
    probe: nn.Module, recording: Recording, traced: TracedModel, group: int
) -> Collection[SizeAttribute]:
    """Integer attributes that hold a size tied to this group's width: of the modules at its sites, and of those whose
    parameters make it; and lists of the sizes of a site's parts."""
    size = traced.space.groups[group].size
    owned = {recording.units.find(int(label)) for label in labels_of(recording, traced, group)}

    def concerns(labels: Labels) -> bool:
        return bool({recording.units.find(int(label)) for label in labels if label} & owned)

    links = set()
    for site in recording.sites.values():
        if not concerns(site.labels):
            continue
        for module in site.modules:
            for attribute, value in vars(probe.get_submodule(module)).items():
                if type(value) is int and value in site.sizes and value % size == 0 and value > 1:
                    links.add(SizeAttribute(module, attribute, group, value // size))
                elif site.parts and type(value) in (list, tuple) and tuple(value) == site.sizes:
                    for i, part in enumerate(site.parts):
                        if concerns(part) and value[i] % size == 0:
                            links.add(SizeAttribute(module, attribute, group, value[i] // size, i))
    shapes = {name: tensor.shape for name, tensor in tensors_of(probe)}
    for piece in (piece for piece in traced.slices[group] if piece.role != "in"):
        whole, module = shapes[piece.tensor][piece.dim], piece.tensor.rpartition(".")[0]
        for attribute, value in vars(probe.get_submodule(module)).items():
            if type(value) is int and value == whole == piece.positions.size:
                links.add(SizeAttribute(module, attribute, group, value // size))
    return links


def _place(link: SizeAttribute) -> tuple[str, str, int, int]:
    return link.module, link.attribute, link.group, -1 if link.place is None else link.place


def _kind(probe: nn.Module, link: SizeAttribute) -> tuple[str, str]:
    return type(probe.get_submodule(link.module)).__name__, link.attribute


def _fewest_links(
    probe: nn.Module, inputs: tuple[Tensor, ...], traced: TracedModel, group: int, seed: int
) -> TracedModel:
    """Without the attributes that only happen to hold the same number: those that the proof does not need."""
    for link in [link for link in traced.attributes if link.group == group]:
        fewer = replace(traced, attributes=tuple(other for other in traced.attributes if other != link))
        if _check(probe, inputs, fewer, [group], seed) is None:
            traced = fewer
    return traced


def deepest(
    probe: nn.Module, inputs: tuple[Tensor, ...], traced: TracedModel, levels: Mapping[str, Sequence[float]], seed: int
) -> dict[str, tuple[float, ...]]:
    """The levels of each group down to the deepest at which its proof holds. A block's 1.0 is proven here: alone, with
    others and with all, as one may need what another does."""
    found = {name: tuple(ratios) for name, ratios in levels.items()}
    groups = range(len(traced.space.groups))
    blocks, rng = [i for i in groups if traced.space.groups[i].kind == "block"], np.random.default_rng(seed)

    def holds(which: Sequence[int]) -> bool:
        widths = {i: round(g.size * (1 - found[g.name][-1])) for i, g in enumerate(traced.space.groups)}
        return _check(probe, inputs, traced, which, seed, widths) is None

    some = [[i for i in blocks if rng.random() < 0.5] for _ in range(SUBSETS if len(blocks) > 2 else 0)]
    for chosen in [*([i] for i in blocks), *some]:
        if chosen and not holds(chosen):
            found |= {traced.space.groups[i].name: (0.0,) for i in chosen}
    if holds(groups):
        return found
    for g in groups:
        name = traced.space.groups[g].name
        while len(found[name]) > 1 and not holds([g]):
            found[name] = found[name][:-1]
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
