"""From a model to its pruning space: trace the units, group them, prove every group.

`trace` follows unit labels through one forward pass (tracing.py), gathers the units that are cut the same way into
groups (grouping.py), and proves each group on the spot (proof.py). Where the proof fails, the places where the model's
Python chose sizes are read another way; what cannot be proven is refused by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import is_pruned
from torch.utils._pytree import tree_leaves

from autoprune.blocks import skippable
from autoprune.borrowing import arguments, seeded
from autoprune.core import InputError, Refusal, check_rules
from autoprune.grouping import gather, labels_of
from autoprune.keywords import positional
from autoprune.masks import MASK_GRAINS, masked
from autoprune.probe import in_double, randomise, settle
from autoprune.proof import DIFFERS, deepest, failing
from autoprune.recording import Place, Recording
from autoprune.traced import TracedModel
from autoprune.tracing import record

WIDTH_GRAINS = ("channel", "head", "block")
MAX_ATTEMPTS = 12
DOUBLE = 1e9  # MACs of a pass that is made in double precision


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is pruned, and which ratios a group may take.

    grain: of "channel" (every width: channels, neurons, attention heads, hidden units), "head" (attention heads alone)
    and "block" (residual blocks that can be left out) one or several; or one of "weight" and "n_m", which mask single
    weights (masks.py). levels: at most so many ratios a group, 0.0 included. round_to: widths kept are multiples of it
    (groups narrower than twice that are left in steps of one). max_ratio: no group loses more than this fraction. m: of
    "n_m".

    Raises:
        InputError: a setting is out of its range, or the grains do not go together.
    """

    grain: Sequence[str] = ("channel",)
    levels: int = 16
    round_to: int = 1
    max_ratio: float = 0.9
    m: int = 4

    def __post_init__(self) -> None:
        known = (*WIDTH_GRAINS, *MASK_GRAINS)
        together = len(self.grain) == 1 or not set(self.grain) & set(MASK_GRAINS)
        rules = {
            f"grain must be one or several of {', '.join(known)}": bool(self.grain) and set(self.grain) <= set(known),
            f"grain {' and '.join(MASK_GRAINS)} each stand alone:": together,
            "levels >= 2": self.levels >= 2,
            "round_to >= 1": self.round_to >= 1,
            "max_ratio must lie between 0 and 1": 0 < self.max_ratio < 1,
            "m >= 2": self.m >= 2,
        }
        check_rules("space", rules, {**vars(self), "grain": ", ".join(self.grain)})


def trace(
    model: nn.Module, inputs: tuple[Tensor, ...] | Mapping[str, Tensor], space: Space = Space(), *, seed: int = 0
) -> TracedModel:
    """What can be pruned of a model called as model(*inputs), or as model(**inputs) where they have names, each group
    proven. The model is not touched.

    Raises:
        InputError: the model does not run on its inputs, or nothing in it can be pruned.
    """
    traced = explored(model, inputs, space, seed=seed)
    if not traced.space.groups:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in traced.space.refused[:5])
        raise InputError(f"nothing in this model can be pruned: {reasons or 'it has no convolution or linear layer'}")
    return traced


def explored(
    model: nn.Module, inputs: tuple[Tensor, ...] | Mapping[str, Tensor], space: Space = Space(), *, seed: int = 0
) -> TracedModel:
    """As `trace`, which see; a model of which nothing can be pruned has no groups."""
    if isinstance(inputs, Mapping):
        model, inputs = positional(model, tuple(inputs)), tuple(inputs.values())
    inputs = tuple(x[:2].to("cpu") for x in inputs)
    with seeded(seed):
        probe = _probe(model, inputs)
        if masks := [grain for grain in MASK_GRAINS if grain in space.grain]:
            own = copy.deepcopy(model).to("cpu").eval()
            return masked(own, inputs, masks[0], levels=space.levels, max_ratio=space.max_ratio, m=space.m)
        exact, exact_inputs = in_double(probe, inputs) if _cheap(probe, inputs) else (probe, inputs)
        widths: dict[str, Any] = {"grain": tuple(space.grain), "blocks": []}
        if "block" in space.grain:
            widths["blocks"] = skippable(exact, exact_inputs)
        traced = _proven(probe, inputs, exact, exact_inputs, seed, widths)
        if exact is probe and any(DIFFERS in refusal.reason for refusal in traced.space.refused):
            exact, exact_inputs = in_double(probe, inputs)  # it may be rounding alone
            traced = _proven(probe, inputs, exact, exact_inputs, seed, widths)
        choices = {g.name: g.levels if g.kind == "block" else _levels(g.size, space) for g in traced.space.groups}
        before, choices = choices, deepest(exact, exact_inputs, traced, choices, seed)
        failed = {name for name, levels in choices.items() if len(levels) == 1 < len(before[name])}
        if failed:
            blocks = failed & set(widths["blocks"])
            widths["blocks"] = [block for block in widths["blocks"] if block not in failed]
            refused = dict.fromkeys(failed - blocks, "none of its levels could be proven")
            traced = _proven(probe, inputs, exact, exact_inputs, seed, widths, refused)
            out = (Refusal(block, "leaving this block out differs from silencing it") for block in sorted(blocks))
            traced = replace(traced, space=replace(traced.space, refused=(*traced.space.refused, *out)))
    return replace(traced, space=traced.space.with_levels(choices))


def _probe(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """A copy of the model with random weights, after one run to see that it runs and what it returns."""
    if is_pruned(model):
        raise InputError("the model holds masks of torch.nn.utils.prune: make them permanent with prune.remove first")
    try:
        probe = copy.deepcopy(model).to("cpu").eval()
        with torch.no_grad():
            outputs = probe(*arguments(inputs))
    except Exception as error:
        raise InputError(f"the model does not run on task.inputs: {type(error).__name__}: {error}") from error
    leaves = tree_leaves(outputs)
    strange = [x for x in leaves if not isinstance(x, Tensor | bool | int | float | str | None)]
    if strange or not any(isinstance(x, Tensor) for x in leaves):
        kind = type(strange[0] if strange else outputs).__name__
        raise InputError(f"the model returns {kind}, which cannot be compared: return tensors, tuples, lists or dicts")
    randomise(probe, np.random.default_rng(0))
    settle(probe, inputs, np.random.default_rng(1))
    return probe


def _cheap(probe: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the many passes of a proof may well be made in double precision."""
    recording = record(probe, arguments(inputs), {})
    macs = sum(c.positions * math.prod(recording.shapes[c.weight]) for c in recording.contractions)
    return macs * recording.examples <= DOUBLE


def _levels(size: int, space: Space) -> tuple[float, ...]:
    """Ratios whose kept widths are evenly spread multiples of round_to, from the whole down to 1 - max_ratio."""
    step, count = space.round_to if size >= 2 * space.round_to else 1, space.levels
    floor = max(1, math.ceil(size * (1 - space.max_ratio) / step) * step)
    widths = [w for w in range(size, floor - 1, -1) if w == size or w % step == 0]
    if len(widths) > count:
        widths = [widths[round(i * (len(widths) - 1) / (count - 1))] for i in range(count)]
    return tuple((size - w) / size for w in widths)


def _proven(
    probe: nn.Module,
    inputs: tuple[Tensor, ...],
    exact: nn.Module,
    exact_inputs: tuple[Tensor, ...],
    seed: int,
    widths: Mapping[str, Any],
    known: Mapping[str, str] = MappingProxyType({}),
) -> TracedModel:
    """Trace, prove all groups together, and where that fails find the group and read its sites another way. widths:
    keywords of `gather`; known: groups that are refused, and why."""
    readings: dict[Place, int] = {}
    refused = dict(known)
    for attempt in range(MAX_ATTEMPTS):
        recording = record(probe, arguments(inputs), readings)
        for _ in range(MAX_ATTEMPTS):
            if not _read_again(recording, readings):
                break
            recording = record(probe, arguments(inputs), readings)
        traced = gather(probe, recording, len(inputs[0]), refused, **widths)
        outcome = failing(exact, exact_inputs, traced, recording, seed)
        if outcome.proven is not None:
            return outcome.proven
        for group, why in outcome.groups.items():
            if (
                group in outcome.hopeless
                or not _next_reading(recording, traced, group, readings)
                or attempt >= MAX_ATTEMPTS - 2
            ):
                refused[traced.space.groups[group].name] = why
    unproven = {g.name: "it could not be proven" for g in traced.space.groups}
    return gather(probe, recording, len(inputs[0]), unproven, **widths)


def _read_again(recording: Recording, readings: dict[Place, int]) -> bool:
    """Where all units of a site became one, or were kept whole, by what came after, its sizes may be read another way:
    advance the last such site of each set of units. False if there is none."""
    units, last = recording.units, {}
    for place, site in recording.sites.items():
        labels = site.labels[site.labels > 0]
        roots = np.unique(units.roots(labels)).tolist()
        lost = len(roots) == 1 < len(labels) or all(units.why_whole(root) is not None for root in roots)
        if lost and readings.get(place, 0) < site.readings - 2:
            last[tuple(roots)] = place
    for place in last.values():
        readings[place] = readings.get(place, 0) + 1
    return bool(last)


def _next_reading(recording: Recording, traced: TracedModel, group: int, readings: dict[Place, int]) -> bool:
    """Advance the reading of every site that concerns this group; False if there is none left but keeping it whole."""
    units = recording.units
    owned = {units.find(int(label)) for label in labels_of(recording, traced, group)}
    advanced = False
    for place, site in recording.sites.items():
        concerned = {units.find(int(label)) for label in site.labels if label} & owned
        if concerned and readings.get(place, 0) < site.readings - 1:
            readings[place] = readings.get(place, 0) + 1
            advanced = True
    return advanced
