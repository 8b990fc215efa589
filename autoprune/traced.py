"""A traced model: its pruning space, and the precomputed indices that cut it.

Letters: G groups, U units of one group, P positions of one unit along a parameter's dimension.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.core import PruningSpace, Slice, Term, Width
from autoprune.units import Labels

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}  # stacked in one weight of nn.RNNBase, by its mode
HOOKS = {name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict)}
ATOMS = {int, float, complex, bool, str, bytes, type, NoneType, FunctionType, BuiltinFunctionType}  # never copied


@dataclass(frozen=True)
class SizeAttribute:
    """An integer attribute of a module that caches a group's width: per_unit x the units kept. place: of the integer
    in an attribute that is a list or a tuple of them."""

    module: str
    attribute: str
    group: int
    per_unit: int
    place: int | None = None


class LeftOut(nn.Module):
    """What stands where a residual block was: it hands its input on."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return x


@dataclass(frozen=True)
class TracedModel:
    """A model's pruning space with the indices that cut it. Holds no weights.

    macs: terms of the MACs an example; params: of the parameter count; weights: of the bytes of parameters and buffers;
    activations: for each instant that can be the peak, terms of the bytes then alive an example; traffic: terms of the
    bytes an example of every tensor that the pass makes. grain: as of autoprune.space.Space.
    """

    narrows: ClassVar[bool] = True  # whether what is cut makes tensors smaller

    space: PruningSpace
    slices: tuple[tuple[Slice, ...], ...]
    attributes: tuple[SizeAttribute, ...]
    depthwise: frozenset[str]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
    weights: tuple[Term, ...]
    activations: tuple[tuple[Term, ...], ...]
    traffic: tuple[Term, ...]
    fingerprint: str
    grain: tuple[str, ...] = ("channel",)

    def cut(self, model: nn.Module, kept: Sequence[Labels], *, sharing: bool = False) -> nn.Module:
        """A smaller copy of the model that keeps these units: kept[g] holds ascending unit numbers of group g.

        Only what is kept is copied. The model's structure is copied with its tensors replaced, so nothing is shared
        but, with `sharing`, the parameters that lose nothing.
        """
        removed, tensors = self.removed(kept), {}
        for name, tensor in tensors_of(model):
            data = tensor.detach()
            dims = removed.get(name, {})
            for dim in sorted(dims):  # whole rows first, so that least is copied
                gone = dims[dim]
                data = data.index_select(dim, _others(gone, data.shape[dim]).to(data.device))
            shared = sharing and isinstance(tensor, nn.Parameter)
            tensors[name] = data.clone() if data.data_ptr() == tensor.data_ptr() and not shared else data
        smaller = with_tensors(model, tensors)
        self._set_sizes(smaller, [len(units) for units in kept])
        for block in self.left_out(kept):
            parent, _, name = block.rpartition(".")
            setattr(smaller.get_submodule(parent), name, LeftOut())
        return smaller

    def left_out(self, kept: Sequence[Labels]) -> list[str]:
        """The blocks that go when these units are kept, by name."""
        return [
            g.name for g, units in zip(self.space.groups, kept, strict=True) if g.kind == "block" and not len(units)
        ]

    def spread(self, model: nn.Module, smaller: Mapping[str, Tensor], kept: Sequence[Labels]) -> nn.Module:
        """The inverse of `cut`: a copy of the dense model that holds the tensors of a network that was cut to `kept`
        at the positions they were cut from, and zeros elsewhere. So it computes what the smaller network does.

        smaller: the names and values of `tensors_of` the smaller network.
        """
        removed, tensors = self.removed(kept), {}
        out = tuple(f"{block}." for block in self.left_out(kept))
        for name, tensor in tensors_of(model):
            if name.startswith(out):  # of a block that was left out, which adds nothing where all in it is zero
                tensors[name] = torch.zeros_like(tensor)
                continue
            data = smaller[name].detach().to(tensor.device, copy=True)
            for dim, gone in removed.get(name, {}).items():
                whole = data.new_zeros([*data.shape[:dim], tensor.shape[dim], *data.shape[dim + 1 :]])
                data = whole.index_copy_(dim, _others(gone, tensor.shape[dim]).to(data.device), data)
            tensors[name] = data
        return with_tensors(model, tensors)

    def removed(self, kept: Sequence[Labels]) -> dict[str, dict[int, Labels]]:
        """Tensor -> dimension -> positions that go when these units are kept."""
        removed: dict[str, dict[int, Labels]] = defaultdict(dict)
        for group, slices, units in zip(self.space.groups, self.slices, kept, strict=True):
            if len(units) == group.size:
                continue
            gone = _rest(units, group.size)
            for piece in slices:
                dims, where = removed[piece.tensor], piece.positions[gone].ravel()
                dims[piece.dim] = np.concatenate([dims[piece.dim], where]) if piece.dim in dims else where
        return removed

    @torch.no_grad()
    def silence(self, model: nn.Module, kept: Sequence[Labels]) -> None:
        """Zero, in place, all parameters that go when these units are kept, and all that a block holds which goes: the
        model then computes what the cut one would."""
        removed, out = self.removed(kept), tuple(f"{block}." for block in self.left_out(kept))
        for name, tensor in tensors_of(model):
            if name.startswith(out):
                tensor.zero_()
            elif isinstance(tensor, nn.Parameter):
                for dim, gone in removed.get(name, {}).items():
                    tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)

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
            elif isinstance(module, nn.RNNBase):
                rows, module.input_size = module.get_parameter("weight_ih_l0").shape
                module.hidden_size = rows // GATES[module.mode]
                module.proj_size = len(module.get_parameter("weight_hr_l0")) if module.proj_size else 0
            elif isinstance(module, nn.GroupNorm) and module.affine:
                module.num_channels = len(module.weight)
            elif isinstance(module, nn.PReLU):
                module.num_parameters = len(module.weight)
        for link in self.attributes:
            module, size = model.get_submodule(link.module), link.per_unit * kept[link.group]
            if link.place is not None:
                listed = getattr(module, link.attribute)
                size = type(listed)(size if i == link.place else n for i, n in enumerate(listed))
            setattr(module, link.attribute, size)


def widths(slices: Sequence[Sequence[Slice]], shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Width]]:
    """Tensor -> dimension -> how wide it is by the units kept, for every dimension that some group cuts."""
    found: dict[str, dict[int, Width]] = defaultdict(dict)
    for g, pieces in enumerate(slices):
        for piece in pieces:
            fixed, of = found[piece.tensor].get(piece.dim, (float(shapes[piece.tensor][piece.dim]), {}))
            each = float(piece.positions.shape[1])
            found[piece.tensor][piece.dim] = (fixed - piece.positions.size, {**of, g: each})
    return found


def _others(positions: Labels, size: int) -> Tensor:
    """All positions along a dimension but these, ascending."""
    return torch.from_numpy(_rest(positions, size))


def _rest(numbers: Labels, size: int) -> Labels:
    """0 to size - 1 but these, ascending."""
    rest = np.ones(size, dtype=bool)
    rest[numbers] = False
    return np.flatnonzero(rest)


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model's structure with these tensors for its own, parameters being as trainable as they were."""
    memo: dict[int, object] = {}
    for name, tensor in tensors_of(model):
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(tensors[name], tensor.requires_grad) if is_parameter else tensors[name]
    return _copied(model, memo)  # type: ignore[no-any-return]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """What copy.deepcopy gives of a module, or of what it holds, without its detours for what modules hold most."""
    kind: Any = type(value)
    if kind in ATOMS or (kind is tuple and ATOMS.issuperset(map(type, value))):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is set and ATOMS.issuperset(map(type, value)):
        memo[id(value)] = set(value)
    elif kind in (dict, OrderedDict):
        made = memo[id(value)] = kind()
        for key, each in value.items():
            made[_copied(key, memo)] = _copied(each, memo)
    elif isinstance(value, nn.Module) and "__deepcopy__" not in value.__dict__ and _ordinary(kind):
        made, state = kind.__new__(kind), value.__getstate__()
        memo[id(value)] = made
        for name, each in state.items():
            if type(each) not in ATOMS:
                none = name in HOOKS and type(each) is OrderedDict and not each
                state[name] = OrderedDict() if none else _copied(each, memo)
        made.__setstate__(state)
    else:
        return copy.deepcopy(value, memo)
    return memo[id(value)]


@functools.cache
def _ordinary(kind: type[nn.Module]) -> bool:
    """Whether copy.deepcopy takes a module of this class for its state, and nothing else."""
    own = kind.__getstate__ is nn.Module.__getstate__ and kind.__reduce_ex__ is object.__reduce_ex__
    others = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
    return own and kind.__reduce__ is object.__reduce__ and not any(hasattr(kind, name) for name in others)


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def all_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, which has several where it is tied, by its id."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)].append(name)
    return found


def owner(tensor: str) -> str:
    """The module that holds a parameter, by name; the parameter itself where that is the whole model."""
    return tensor.rpartition(".")[0] or tensor


def _join(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def fingerprint(model: nn.Module) -> str:
    """sha256 of the names and shapes of parameters and buffers: the architecture, whatever its weights."""
    shapes = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
