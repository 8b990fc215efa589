"""A traced model: its pruning space, and the precomputed indices that cut it.

Letters: G groups, U units of one group, P positions of one unit along a parameter's dimension.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core import PruningSpace, Slice, Term, Width
from autoprune.units import Labels


@dataclass(frozen=True)
class SizeAttribute:
    """An integer attribute of a module that caches a group's width: per_unit x the units kept."""

    module: str
    attribute: str
    group: int
    per_unit: int


@dataclass(frozen=True)
class TracedModel:
    """A model's pruning space with the indices that cut it. Holds no weights.

    macs: terms of the MACs an example; params: terms of the parameter count; activations: for each instant that can
    be the peak, terms of the bytes then alive an example.
    """

    space: PruningSpace
    slices: tuple[tuple[Slice, ...], ...]
    attributes: tuple[SizeAttribute, ...]
    depthwise: frozenset[str]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
    activations: tuple[tuple[Term, ...], ...]
    fingerprint: str

    def cut(self, model: nn.Module, kept: Sequence[Labels]) -> nn.Module:
        """A smaller copy of the model that keeps these units: kept[g] holds ascending unit numbers of group g.

        Only what is kept is copied. The model's structure is copied with its tensors replaced, so nothing is shared.
        """
        keep: dict[str, dict[int, Labels]] = defaultdict(dict)
        for group, slices, units in zip(self.space.groups, self.slices, kept, strict=True):
            if len(units) == group.size:
                continue
            gone = np.setdiff1d(np.arange(group.size), units)
            for piece in slices:
                removed = keep[piece.tensor].get(piece.dim, np.empty(0, dtype=np.int64))
                keep[piece.tensor][piece.dim] = np.concatenate([removed, piece.positions[gone].ravel()])
        memo: dict[int, object] = {}
        for name, tensor in tensors_of(model):
            data = tensor.detach()
            for dim, removed in keep.get(name, {}).items():
                rest = np.setdiff1d(np.arange(data.shape[dim]), removed)
                data = data.index_select(dim, torch.from_numpy(rest).to(data.device))
            data = data.clone() if data.data_ptr() == tensor.data_ptr() else data
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
        smaller = copy.deepcopy(model, memo)
        self._set_sizes(smaller, [len(units) for units in kept])
        return smaller

    def weight_widths(self, model: nn.Module) -> dict[str, tuple[Width, Width]]:
        """Parameter -> the widths of its first two dimensions by the units kept; (1.0, {}) for one it lacks."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        cut = widths(self.slices, {name: tuple(t.shape) for name, t in tensors_of(model)})

        def width(name: str, dim: int) -> Width:
            if dim >= len(shapes[name]):
                return 1.0, {}
            return cut.get(name, {}).get(dim, (float(shapes[name][dim]), {}))

        return {name: (width(name, 0), width(name, 1)) for name in shapes}

    def _set_sizes(self, model: nn.Module, kept: Sequence[int]) -> None:
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.modules.conv._ConvNd) and isinstance(weight, Tensor):
                if _join(name, "weight") in self.depthwise:
                    module.groups = weight.shape[0] // (module.out_channels // module.groups)
                module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
                if module.transposed:
                    module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
            elif isinstance(module, nn.Linear) and isinstance(weight, Tensor):
                module.out_features, module.in_features = weight.shape
            elif isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
                module.num_features = len(module.weight)
            elif isinstance(module, nn.PReLU):
                module.num_parameters = len(module.weight)
        for link in self.attributes:
            setattr(model.get_submodule(link.module), link.attribute, link.per_unit * kept[link.group])


def widths(slices: Sequence[Sequence[Slice]], shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Width]]:
    """Tensor -> dimension -> how wide it is by the units kept, for every dimension that some group cuts."""
    found: dict[str, dict[int, Width]] = defaultdict(dict)
    for g, pieces in enumerate(slices):
        for piece in pieces:
            fixed, of = found[piece.tensor].get(piece.dim, (float(shapes[piece.tensor][piece.dim]), {}))
            each = float(piece.positions.shape[1])
            found[piece.tensor][piece.dim] = (fixed - piece.positions.size, {**of, g: each})
    return found


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def owner(tensor: str) -> str:
    """The module that holds a parameter, by name; the parameter itself where that is the whole model."""
    return tensor.rpartition(".")[0] or tensor


def _join(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def fingerprint(model: nn.Module) -> str:
    """sha256 of the names and shapes of parameters and buffers: the architecture, whatever its weights."""
    shapes = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
