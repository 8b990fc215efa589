"""Which modules' outputs depend on which groups, found in one recorded pass: what need not be computed again for a
network that differs from another in some groups alone.

Every tensor that an operation makes depends on the groups of the tensors that it reads, a parameter on the groups that
cut it; what is made inside a module whose attributes a group sets, or that it leaves out, depends on that group too.
Dependence is kept by storage, so that views and writing in place are followed. Where a value becomes a number of
Python's, or decides a shape, all that comes later depends on it. A module whose inside is read from without, or that a
hook listens to, is never reused. What only the width of a tensor decides is not seen: whoever relies on this compares
outputs (shared_prefix.py).

An output may depend on a group by what it loses alone: without a unit it has no row of that layer, and the others are
as they were (slice_rules.py). Then it is what the other network gave, cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from autoprune.dispatch import Watching
from autoprune.handing import Positions
from autoprune.slice_rules import Axes, passed
from autoprune.traced import TracedModel, owner, tensors_of
from autoprune.units import Labels

ESCAPES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # of operations whose values go to Python
READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}  # the same, past the operations
GROUP = 32  # bits of a unit's number among all groups' that lie below its group's


@dataclass(eq=False)
class _Call:
    """What one module did. groups: a bit for each that its output depends on. values: for each that it depends on by
    more than what it loses along the axes of the tensors that it returned, None where it returned anything else.
    writes: to what was there before it. opaque: whether more than tensors that it returned got out. written: whether
    its output was changed in place later on. readers: the modules that ran, outermost first, where an operation read
    its output."""

    began: int
    calls: int = 1
    groups: int = 0
    values: int = 0
    axes: list[Axes] | None = field(default_factory=list)
    writes: bool = False
    opaque: bool = False
    written: bool = False
    readers: set[tuple[str, ...]] = field(default_factory=set)
    bytes: int = 0


class Dependence:
    """See the module's docstring. The model is left as it was.

    Raises:
        whatever the model raises on these inputs.
    """

    def __init__(self, traced: TracedModel, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._owned = _owned(traced, model)
        watch = _Watch(_cutting(traced), self._owned, model)
        heard = {name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
        hooks = []
        for name, module in model.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name)))
                hooks.append(
                    module.register_forward_hook(lambda *a, name=name: watch.leave(name, a[-1]), always_call=True)
                )
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter, watch, _Reads(watch):
                output = model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        watch.returned(output)
        self._calls, self._normed = watch.calls, watch.normed
        for name in heard:
            for each in (*_above(name), name):
                if each in self._calls:
                    self._calls[each].opaque = True
        counted = counter.get_flop_counts().items()
        self._flops = {name.partition(".")[2]: sum(each.values()) for name, each in counted if name != "Global"}

    def reusable(self, changed: Collection[int], losing: Collection[int] = ()) -> dict[str, bool]:
        """The outermost modules whose outputs do not depend on the groups that changed, or on those that are `losing`
        units only by what is lost along their axes; and whether anything that is then still computed reads their
        output."""
        bits, lost = (sum(1 << g for g in set(groups)) for groups in (changed, losing))
        free = {
            n
            for n, c in self._calls.items()
            if not (c.writes or c.opaque or c.calls > 1)
            and not bits & c.groups & ~(0 if c.axes is None else lost & ~c.values)
        }
        outermost = {name for name in free if not any(parent in free for parent in _above(name))}
        return {n: any(outermost.isdisjoint(stack) for stack in self._calls[n].readers) for n in outermost}

    def left(self, module: str, kept: Sequence[Labels], common: Sequence[Labels]) -> list[Positions]:
        """Of each tensor that the module returns, what is left of it where, of the units that are common, these are
        kept."""
        axes = self._calls[module].axes
        assert axes is not None
        return [_left(each, kept, common) for each in axes]

    def left_of(self, tensor: str, kept: Sequence[Labels], common: Sequence[Labels]) -> Positions:
        """The same of a parameter or buffer."""
        return _left(self._owned.get(tensor, {}), kept, common)

    def written(self, module: str) -> bool:
        """Whether the module's output is changed in place after it returned."""
        return self._calls[module].written

    def bytes(self, module: str) -> int:
        """Of the module's output for the inputs that were recorded."""
        return self._calls[module].bytes

    def normalised(self, norm: str) -> list[tuple[str, ...]]:
        """The modules that ran, outermost first, each time that this normalisation's statistics were used."""
        return self._normed[norm]

    def share(self, modules: Collection[str]) -> float:
        """The fraction of the dense network's FLOPs that lie inside these modules, of which none is inside another."""
        inside = sum(self._flops.get(name, 0) for name in modules)
        return float(inside / max(self._flops.get("", 0), 1))


def _above(module: str) -> list[str]:
    """The names of the modules that this one is inside of, outermost first, but for the model itself."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _cutting(traced: TracedModel) -> dict[str, int]:
    """The groups, as bits, that a tensor or the inside of a module depends on."""
    bits: dict[str, int] = defaultdict(int)
    for g, (group, pieces) in enumerate(zip(traced.space.groups, traced.slices, strict=True)):
        for piece in pieces:
            bits[piece.tensor] |= 1 << g
        if group.kind == "block":
            bits[group.name] |= 1 << g
    for link in traced.attributes:
        bits[link.module] |= 1 << link.group
    return bits


def _owned(traced: TracedModel, model: nn.Module) -> dict[str, dict[int, Labels]]:
    """The axes of each tensor that gets smaller where units go, a unit's number being its group's and its own."""
    shapes = {name: tensor.shape for name, tensor in tensors_of(model)}
    found: dict[str, dict[int, Labels]] = defaultdict(dict)
    for g, pieces in enumerate(traced.slices if traced.narrows else ()):
        for piece in pieces:
            axis = found[piece.tensor].setdefault(piece.dim, np.zeros(shapes[piece.tensor][piece.dim], dtype=np.int64))
            axis[piece.positions] = (g << GROUP) + np.arange(1, len(piece.positions) + 1)[:, None]
    return found


def _left(axes: Axes, kept: Sequence[Labels], common: Sequence[Labels]) -> Positions:
    found = {}
    for dim, axis in axes.items():
        ours, theirs = _staying(axis, kept), _staying(axis, common)
        if len(ours) < len(theirs):
            found[dim] = torch.from_numpy(np.flatnonzero(np.isin(theirs, ours)))
    return found


def _staying(axis: Labels, kept: Sequence[Labels]) -> Labels:
    """The units of an axis, by position, that are kept, and where there are none."""
    units = [(g << GROUP) + 1 + units for g, units in enumerate(kept)]
    return axis[np.isin(axis, np.concatenate([np.zeros(1, dtype=np.int64), *units]))]


def _groups_of(axes: Iterable[Labels]) -> int:
    """The groups, as bits, of the units of some axes."""
    bits = 0
    for axis in axes:
        for g in np.unique(axis[axis != 0] >> GROUP).tolist():
            bits |= 1 << g
    return bits


class _Watch(Watching):
    def __init__(self, cutting: Mapping[str, int], owned: Mapping[str, Axes], model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cutting = cutting
        self.calls: dict[str, _Call] = {}
        self.stack: list[str] = []
        self.outer = cutting.get("", 0)  # what everything that is made from now on depends on
        self.groups: dict[int, int] = {}  # of a storage
        self.values: dict[int, int] = {}  # those that more than its size depends on
        self.axes = WeakTensorKeyDictionary()
        self.born: dict[int, int] = {}
        self.made_by: dict[int, list[_Call]] = defaultdict(list)  # storage -> whose output it is
        self.alive: list[Any] = []  # no storage's number is given twice
        self.inside: dict[int, tuple[str, ...]] = {}  # storage -> the modules that made it
        self.normed: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        self.norms: dict[int, str] = {}  # storage of a running mean -> whose it is
        for name, tensor in tensors_of(model):
            self._groups(tensor)
            self.groups[self._storage(tensor)] |= cutting.get(name, 0)
            self.axes[tensor] = owned.get(name, {})
            if name.endswith("running_mean"):
                self.norms[self._storage(tensor)] = owner(name)

    def _storage(self, tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _groups(self, tensor: Tensor) -> int:
        key = self._storage(tensor)
        if key not in self.groups:
            self.alive.append(tensor.untyped_storage())
            self.groups[key], self.values[key] = 0, 0
            self.born[key], self.inside[key] = len(self.alive), tuple(self.stack)
        return self.groups[key]

    def _axes(self, tensor: Tensor) -> Axes:
        axes: Axes = self.axes.get(tensor, {})
        fit = all(d < tensor.dim() and len(axis) == tensor.shape[d] for d, axis in axes.items())
        return axes if fit else {}

    def _values(self, tensor: Tensor) -> int:
        """The groups that a tensor depends on by more than what it loses along its axes."""
        groups = self._groups(tensor)
        return self.values[self._storage(tensor)] | groups & ~_groups_of(self._axes(tensor).values())

    def enter(self, name: str) -> None:
        if name in self.calls:
            self.calls[name].calls += 1
        else:
            self.calls[name] = _Call(began=len(self.alive))
        self.stack.append(name)

    def leave(self, name: str, output: Any) -> None:
        self.stack.pop()
        call = self.calls[name]
        call.groups |= self.cutting.get(name, 0) | self.outer
        call.values |= self.cutting.get(name, 0) | self.outer
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                call.groups |= self._groups(leaf)
                call.values |= self._values(leaf)
                if call.axes is not None:
                    call.axes.append(self._axes(leaf))
                call.bytes += leaf.nbytes
                self.made_by[self._storage(leaf)].append(call)
            else:  # an object may hold anything
                call.axes = None
                call.opaque |= not isinstance(leaf, bool | int | float | str | None)

    def returned(self, output: Any) -> None:
        """The model's own output is read, whatever comes after."""
        for tensor in _tensors(output):
            for call in self.made_by[self._storage(tensor)]:
                call.readers.add(())

    def escaped(self, tensor: Tensor) -> None:
        """Its values go to Python."""
        self.outer |= self._groups(tensor)
        self._read(self._storage(tensor), tuple(self.stack))

    def _read(self, key: int, stack: tuple[str, ...]) -> None:
        makers = self.made_by.get(key, [])
        for call in makers:
            call.readers.add(stack)
        for module in self.inside[key]:
            if module not in stack and self.calls[module] not in makers:
                self.calls[module].opaque = True
        if key in self.norms:
            self.normed[self.norms[key]].append(stack)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        groups, values, stack = self.outer, self.outer, tuple(self.stack)
        for module in stack:
            groups |= self.cutting.get(module, 0)
            values |= self.cutting.get(module, 0)
        for tensor in given:
            groups |= self._groups(tensor)
            values |= self._values(tensor)
            self._read(self._storage(tensor), stack)
        output = func(*args, **(kwargs or {}))
        if not ESCAPES.isdisjoint(func.tags):
            self.outer |= groups
        made, written = _tensors(output), _written(func, args, kwargs or {})
        named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        axes, mixed = passed(self._axes, func, named, made)
        values |= _groups_of(mixed)
        for tensor in written:
            key = self._storage(tensor)
            for call in self.made_by.get(key, ()):
                call.written = True
            for module in stack:
                self.calls[module].writes |= self.born[key] <= self.calls[module].began
        for tensor, own in zip(made, axes, strict=True):
            if not any(tensor is other for other in written):
                self.axes[tensor] = own
        for tensor in (*made, *written):
            self._groups(tensor)
            self.groups[self._storage(tensor)] |= groups
            self.values[self._storage(tensor)] |= values
        return output


class _Reads(TorchFunctionMode):
    """Tells a watch of values that are read past the operations."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.watch.escaped(args[0])
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes in place."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            found += _tensors(value)
    return found


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
