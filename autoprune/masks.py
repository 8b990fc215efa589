"""Grains that make no tensor smaller: single weights, and n of every m, as masks of torch.nn.utils.prune.

A group is the weight of one convolution or linear layer. Of "weight" each element is a unit; of "n_m" unit r is, of
every m elements in a row along the input dimension, the r-th largest: keeping n units keeps the n largest of every m
(Mishra et al., arXiv 2104.08378). What is removed is masked, and stays so in any training: the parameter is
`weight_orig`, the mask a buffer `weight_mask`, the weight their product at every pass.

Letters: G groups, W elements of a weight, U units of one group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from autoprune.borrowing import arguments
from autoprune.core import FLAT, Group, Kinds, Layer, PruningSpace, Refusal, Slice, Term
from autoprune.recording import Contraction
from autoprune.traced import TracedModel, all_names, fingerprint, owner, tensors_of, with_tensors
from autoprune.tracing import record
from autoprune.units import Labels

MASK_GRAINS: tuple[Kinds, ...] = ("weight", "n_m")
ORIGINAL, MASK = "_orig", "_mask"  # what torch.nn.utils.prune adds to the name of a tensor that it masks


@dataclass(frozen=True)
class MaskedModel(TracedModel):
    """A model of which single elements of weights can be removed; see the module's docstring."""

    narrows = False

    def cut(self, model: nn.Module, kept: Sequence[Labels], *, sharing: bool = False) -> nn.Module:
        """A copy of the model in which all units but these are masked."""
        masked = with_tensors(model, {name: tensor.detach().clone() for name, tensor in tensors_of(model)})
        for name, gone in self._gone(kept).items():
            weight = masked.get_parameter(name)
            module, _, own = name.rpartition(".")
            with torch.no_grad():  # else the weight could not be copied
                prune.custom_from_mask(masked.get_submodule(module), own, _mask(weight, gone))
        return masked

    @torch.no_grad()
    def silence(self, model: nn.Module, kept: Sequence[Labels]) -> None:
        """Zero, in place, all elements that go when these units are kept."""
        for name, gone in self._gone(kept).items():
            weight = model.get_parameter(name)
            weight.mul_(_mask(weight, gone))

    def spread(self, model: nn.Module, smaller: Mapping[str, Tensor], kept: Sequence[Labels]) -> nn.Module:
        """A copy of the dense model that computes what a masked network does, zeros standing where it was masked."""
        tensors = {}
        for name, tensor in tensors_of(model):
            whole = smaller[name] if name in smaller else smaller[name + ORIGINAL] * smaller[name + MASK]
            tensors[name] = whole.detach().to(tensor.device, copy=True)
        return with_tensors(model, tensors)

    def _gone(self, kept: Sequence[Labels]) -> dict[str, Labels]:
        """Tensor -> flat positions that are masked when these units are kept."""
        return {
            piece.tensor: piece.positions[np.setdiff1d(np.arange(group.size), units)].ravel()
            for group, (piece,), units in zip(self.space.groups, self.slices, kept, strict=True)
            if len(units) < group.size
        }


def _mask(weight: Tensor, gone: Labels) -> Tensor:
    """Of the weight's shape, 0 at these flat positions and 1 elsewhere."""
    mask = torch.ones(weight.numel(), dtype=weight.dtype, device=weight.device)
    mask[torch.from_numpy(gone).to(mask.device)] = 0
    return mask.view(weight.shape)


def masked(
    model: nn.Module, inputs: tuple[Tensor, ...], grain: Kinds, *, levels: int, max_ratio: float, m: int
) -> MaskedModel:
    """The weights of every convolution and linear layer that runs, each a group.

    levels: of "weight", how many thresholds: at threshold k of them the k / (levels - 1) x max_ratio of all weights
    that are smallest in magnitude are gone, and what that leaves of a group is one of its levels. So one threshold for
    all groups is global magnitude pruning. m: of "n_m"; its levels are 1/m, 2/m ... as far as max_ratio allows.
    """
    found, refused = _found(model, inputs, grain, m)
    sizes = [len(weight.units) for weight in found]
    thresholds: tuple[tuple[float, ...], ...] = ()
    if grain == "weight":
        shares = _thresholds([weight.values.abs().flatten() for weight in found], levels, max_ratio)
        ratios = [tuple(sorted({0.0, *(row[g] for row in shares)})) for g in range(len(found))]
        thresholds = tuple(row for row in shares if found)
    else:
        ratios = [tuple(k / m for k in range(m) if k / m <= max_ratio) for _ in found]
    groups = (
        Group(name=w.layer.name, size=n, levels=own, layers=(w.layer,), members=(w.layer.name,), kind=grain)
        for w, n, own in zip(found, sizes, ratios, strict=True)
    )
    return MaskedModel(
        space=PruningSpace(tuple(groups), refused, thresholds),
        slices=tuple((Slice(weight.tensor, FLAT, "out", weight.units),) for weight in found),
        attributes=(),
        depthwise=frozenset(),
        macs=tuple(_kept(g, w.layer.macs / n) for g, (w, n) in enumerate(zip(found, sizes, strict=True))),
        params=tuple(_kept(g, w.values.numel() / n) for g, (w, n) in enumerate(zip(found, sizes, strict=True))),
        weights=(),
        activations=(),
        traffic=(),
        fingerprint=fingerprint(model),
        grain=(grain,),
    )


@dataclass(frozen=True)
class _Weight:
    """One that can be masked, and the flat positions of its units [U, P]."""

    tensor: str
    values: Tensor
    units: Labels
    layer: Layer


def _found(
    model: nn.Module, inputs: tuple[Tensor, ...], grain: str, m: int
) -> tuple[list[_Weight], tuple[Refusal, ...]]:
    """The weights that can be masked, in the order in which they run, and the layers that cannot."""
    uses: dict[str, list[Contraction]] = defaultdict(list)
    names = all_names(model)
    for use in record(model, arguments(inputs), {}).contractions:
        uses[use.weight].append(use)
    found, refused = [], []
    for name, its in uses.items():
        module, values = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).detach().cpu()
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            refused.append(Refusal(owner(name), f"a weight of {type(module).__name__} is not masked"))
        elif transposed and grain == "n_m":
            refused.append(Refusal(owner(name), "a transposed convolution reads along another dimension"))
        elif len(names[id(model.get_parameter(name))]) > 1:
            refused.append(Refusal(owner(name), "its weight is another layer's too"))
        elif {use.module for use in its} != {owner(name)}:
            refused.append(Refusal(owner(name), "its weight is read without its own forward, past a mask"))
        elif grain == "n_m" and values.shape[1] % m:
            refused.append(Refusal(owner(name), f"its input dimension, {values.shape[1]}, is no multiple of m={m}"))
        else:
            found.append(_Weight(name, values, _units(values, grain, m), _layer(name, values, its)))
    return found, tuple(dict.fromkeys(refused))


def _kept(group: int, each: float) -> Term:
    """What the units kept of a group cost, `each` of them."""
    return Term(each, (0.0, {group: 1.0}), (1.0, {}))


def _units(weight: Tensor, grain: str, m: int) -> Labels:
    """Flat positions of each unit [U, P]."""
    positions = torch.arange(weight.numel())
    if grain == "weight":
        return positions[:, None].numpy()
    rows = weight.abs().movedim(1, -1).reshape(-1, m)
    ranked = rows.sort(dim=1, descending=True, stable=True).indices
    return positions.view_as(weight).movedim(1, -1).reshape(-1, m).gather(1, ranked).T.contiguous().numpy()


def _thresholds(magnitudes: Sequence[Tensor], levels: int, max_ratio: float) -> tuple[tuple[float, ...], ...]:
    """Of each threshold the fraction of every group [G] that lies below it, its largest never; see `masked`."""
    sizes = np.array([len(part) for part in magnitudes], dtype=np.int64)
    group = np.repeat(np.arange(len(magnitudes)), sizes)
    order = group[np.argsort(torch.cat(list(magnitudes)).double().numpy(), kind="stable")] if len(group) else group
    counts = [round(k / (levels - 1) * max_ratio * len(order)) for k in range(levels)]
    below = [np.minimum(np.bincount(order[:count], minlength=len(sizes)), sizes - 1) for count in counts]
    return tuple(tuple((gone / sizes).tolist()) for gone in below)


def _layer(name: str, weight: Tensor, uses: Sequence[Contraction]) -> Layer:
    return Layer(
        name=owner(name),
        units_in=weight.shape[1],
        units_out=weight.shape[0],
        kernel=uses[0].kernel,
        stride=uses[0].stride,
        height=uses[0].height,
        width=uses[0].width,
        macs=sum(use.positions for use in uses) * weight.numel(),
    )
