"""What one traced forward pass knows of its units: which label each element carries, and what owns which unit.

An activation has an integer label tensor of its shape, 0 for no unit; a parameter, or a view of one, has the flat index
of each of its elements. The rules (label_rules.py, label_contractions.py) read and extend this as operations pass by.

Letters: C channels or slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from autoprune.units import Labels, Units


@dataclass(frozen=True)
class Contraction:
    """One use of a weight: its MACs an example are `positions` x the elements of the weight. module: that ran then."""

    weight: str
    module: str
    positions: float
    stride: int
    kernel: int
    height: int
    width: int


@dataclass
class Site:
    """A place where the model's Python chose sizes: how it may be read, and which units it concerns; parts: those of
    each size, where something is cut into parts."""

    labels: Labels
    readings: int
    modules: tuple[str, ...]
    sizes: tuple[int, ...]
    parts: tuple[Labels, ...]


Place = tuple[int, int]  # of a site: the operation's number, and which of its sites


class Recording:
    """See the module's docstring. Label arrays are raw: resolve them with `units.roots`.

    slots: for a parameter's dimension, the label of each position. elementwise: labels, how many elements carry each,
    how often fvcore counts each, and the module that ran. storages: labels, elements and element size of each tensor
    made; lifetimes: in order, which of them was born (True) or died; places: the innermost module that each is inside
    of all its life. heads: labels of units that are attention heads. sites: see Site. depthwise: weights of depthwise
    convolutions. made: parameters and the dimension along which an operation makes units with them.
    """

    def __init__(self, model: nn.Module, examples: int, readings: Mapping[Place, int]) -> None:
        self.examples, self.readings = examples, readings
        self.units = Units()
        self.slots: dict[tuple[str, int], Labels] = {}
        self.contractions: list[Contraction] = []
        self.elementwise: list[tuple[Labels, Labels, float, str]] = []
        self.heads: list[Labels] = []
        self.places: list[str] = []
        self.storages: list[tuple[Labels, Labels, int]] = []
        self.lifetimes: list[tuple[bool, int]] = []
        self.sites: dict[Place, Site] = {}
        self.operations = 0  # so far
        self.inside = 0  # so many modules that are followed as one operation
        self.remember: Callable[[Tensor], None] = lambda tensor: None  # told of each tensor that is made
        self.depthwise: set[str] = set()
        self.made: set[tuple[str, int]] = set()
        self.stack: list[str] = []  # names of the modules that are running
        self.labels = WeakTensorKeyDictionary()
        self.sources = WeakTensorKeyDictionary()  # a parameter or a view of one -> see `source`
        self.computed = WeakTensorKeyDictionary()  # tensors computed from parameters alone
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor not in self.sources:
                self.shapes[name] = tuple(tensor.shape)
                self.sources[tensor] = (name, tuple(range(tensor.dim())))

    def source(self, tensor: Tensor) -> tuple[str, Tensor]:
        """The parameter that this one is or shows, by name, and the flat index in it of each element."""
        name, index = self.sources[tensor]
        if isinstance(index, tuple):  # the whole parameter, its dimensions in this order
            shape = self.shapes[name]
            index = torch.arange(tensor.numel(), dtype=torch.int32).view(shape).permute(index)
            self.sources[tensor] = (name, index)
        return name, index

    def order(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Which dimensions of its parameter this one's are, where it is the whole of one as it was made."""
        index = self.sources[tensor][1]
        return index if isinstance(index, tuple) else None

    def label(self, tensor: Tensor) -> Tensor:
        """The label tensor of an activation, zeros if it was never seen."""
        if tensor not in self.labels:
            self.labels[tensor] = torch.zeros(tensor.shape, dtype=torch.int64)
        return self.labels[tensor]  # type: ignore[no-any-return]

    def made_now(self, tensor: Tensor, label: Tensor) -> None:
        """A module that was followed as one operation returned this."""
        self.labels[tensor] = label
        self.remember(tensor)

    def keep(self, tensors: Sequence[Tensor], reason: str) -> None:
        for tensor in tensors:
            if tensor not in self.sources and tensor not in self.computed:
                self.keep_label(self.label(tensor), reason)

    def keep_label(self, label: Tensor, reason: str) -> None:
        self.units.keep_whole(small(label).numpy(), reason)

    def resolved(self, label: Tensor) -> Tensor:
        """The label with units that became one told as one."""
        return torch.from_numpy(self.units.roots(small(label).numpy())).expand(label.shape)

    def site(self, labels: Tensor, readings: int, sizes: Sequence[int], parts: Sequence[Tensor] = ()) -> int:
        """The reading to take here. The last of a site's readings is always "keep these units whole"."""
        of_this = sum(operation == self.operations for operation, _ in self.sites)
        place = self.operations, of_this
        whole, *each = (np.unique(small(some).numpy()) for some in (labels, *parts))
        self.sites[place] = Site(whole, readings, tuple(self.stack), tuple(sizes), tuple(each))
        return min(self.readings.get(place, 0), readings - 1)

    def tie(self, source: str, index: Tensor, label: Tensor, operation: str) -> None:
        """A parameter meets labels elementwise: its dimension along which the labels differ belongs to them."""
        shape = self.shapes[source]
        across = [d for d in range(index.dim()) if varies(label, d)]
        if not any(index.stride(d) and index.shape[d] > 1 for d in across):
            return  # the same for every unit
        here = [d for d in range(index.dim()) if index.stride(d) or d in across]
        index, label = shrunk(index, here), shrunk(label, here)
        coordinates = np.unravel_index(index.numpy().ravel(), shape)
        labels = label.numpy().ravel()
        sizes = [d for d in range(len(shape)) if shape[d] > 1]
        if not sizes:
            return
        for d in sizes:
            pairs = np.unique(np.stack([coordinates[d], labels]), axis=1)
            if pairs.shape[1] == shape[d]:  # one label a coordinate
                if len(np.unique(pairs[1])) > 1:
                    self.own(source, d, pairs[1], operation)
                return
        self.units.keep_whole(labels, f"{operation} with {source}")

    def own(self, source: str, dim: int, labels: Labels, operation: str) -> None:
        """The parameter's slices along `dim` belong to these units, as well as to those of an earlier use."""
        earlier = self.slots.setdefault((source, dim), labels)
        if earlier is not labels:
            self.units.unite(earlier, labels, f"the shared parameter {source}")
            self.slots[source, dim] = np.where(earlier != 0, earlier, labels)

    def meet(self, labels: Sequence[Tensor], shape: tuple[int, ...], operation: str) -> Tensor:
        """What results where labels meet elementwise, broadcast to a shape: those that meet are united, and kept whole
        where one of the tensors has a size of its own and no units."""
        whole = [label.expand(shape) for label in labels]
        varying = [d for d in range(len(shape)) if any(varies(label, d) for label in whole)]
        few = [shrunk(label, varying) for label in whole]
        met = torch.zeros([n if d in varying else 1 for d, n in enumerate(shape)], dtype=torch.int64)
        for label in few:
            both = (met != 0) & (label != 0) & (met != label)
            if both.any():
                self.units.unite(met[both].numpy(), label[both].numpy(), operation)
            met = torch.where(met != 0, met, label)
        for given, label in zip(labels, few, strict=True):
            own = (1,) * (len(shape) - given.dim()) + tuple(given.shape)
            if any(own[d] > 1 for d in varying):
                alone = met[(label == 0) & (met != 0)]
                self.units.keep_whole(alone.numpy(), f"{operation} with a tensor whose size cannot change")
        return met.expand(shape)

    def meet_parameter(self, tensor: Tensor, met: Tensor, operation: str) -> None:
        """A parameter, or what was computed from some, takes part elementwise in a tensor of this label."""
        if tensor.numel() < 2 or not small(met).any():
            return
        if tensor in self.computed:
            self.keep_label(met, f"{operation} with a tensor computed from parameters")
        elif tensor in self.sources:
            source, index = self.source(tensor)
            self.tie(source, index.expand(met.shape), met, operation)

    def channel_units(self, label: Tensor, dim: int, operation: str) -> Labels:
        """One label for each slice along `dim` [C]; all units that meet in one slice are united."""
        rows = small(label, dim).movedim(dim, 0).reshape(label.shape[dim], -1).numpy()
        return self.units.unite_within(rows, operation)

    def unite_modulo(self, label: Tensor, dim: int, size: int, operation: str) -> None:
        label = small(label, dim)
        first = label.narrow(dim, 0, size).numpy()
        for part in label.split(size, dim)[1:]:
            self.units.unite(first, part.numpy(), operation)

    def unite_along(self, label: Tensor, dims: Sequence[int], operation: str) -> Tensor:
        """Units that meet when `dims` are mixed become one; returns the label with those dims of size 1."""
        rest = [d for d in range(label.dim()) if d not in dims]
        if any(varies(label, d) for d in dims):
            few = small(label)
            rows = few.permute([*rest, *dims]).reshape(int(np.prod([few.shape[d] for d in rest])), -1)
            self.units.unite_within(rows.numpy(), operation)
        sizes = [1 if d in dims else n for d, n in enumerate(label.shape)]
        few = small(label)
        for d in dims:
            few = few.amax(d, keepdim=True)
        return few.expand(sizes)

    def count(self, label: Tensor, each: float) -> None:
        """Operations that fvcore counts so many times an element."""
        self.elementwise.append((*counted(label), each, self.running))

    @property
    def running(self) -> str:
        """The innermost module that runs, "" for the model itself."""
        return self.stack[-1] if self.stack else ""

    def used(
        self, weight: str, positions: float, *, stride: int = 1, kernel: int = 1, height: int = 1, width: int = 1
    ) -> None:
        """Note a contraction with a weight."""
        self.contractions.append(Contraction(weight, self.running, positions, stride, kernel, height, width))


def tensors(values: Any) -> list[Tensor]:
    """All tensors in a nest, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def varies(label: Tensor, dim: int) -> bool:
    """Whether the labels differ along this dimension."""
    if label.numel() == 0 or label.shape[dim] < 2 or label.stride(dim) == 0:
        return False
    label = small(label)
    return bool((label != label.narrow(dim, 0, 1)).any())


def small(label: Tensor, *but: int) -> Tensor:
    """The label with each dimension that is expanded, so that nothing differs along it, cut to size 1, but for some."""
    but = tuple(d % label.dim() for d in but)
    return shrunk(label, [d for d in range(label.dim()) if label.stride(d) or d in but])


def compact(label: Tensor) -> Tensor:
    """The same label, expanded along every dimension that nothing differs along."""
    return shrunk(label, [d for d in range(label.dim()) if varies(label, d)]).expand(label.shape)


def shrunk(label: Tensor, varying: Sequence[int]) -> Tensor:
    """The label with every other dimension cut to size 1."""
    for d in range(label.dim()):
        if d not in varying:
            label = label.narrow(d, 0, min(1, label.shape[d]))
    return label


def counted(label: Tensor) -> tuple[Labels, Labels]:
    """The distinct labels and how many elements carry each."""
    small = shrunk(label, [d for d in range(label.dim()) if varies(label, d)])
    labels, counts = np.unique(small.numpy(), return_counts=True)
    return labels, counts * (label.numel() // max(small.numel(), 1))
