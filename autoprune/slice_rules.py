"""How operations pass on what units own of a tensor: where units go, whether what is left of an output is as it was.

Along some dimensions of a tensor each position goes with a unit, a number, 0 for none: its axes. What an operation does
for each position by itself (a convolution for the rows of its weight, what is elementwise, pooling, a normalisation by
channel) hands its operands' axes on: without a unit the output has lost those positions, and the others are as they
were. Any other output depends on the units. A rule takes (the axes of a tensor, the operation's name, its arguments by
name, its outputs) and returns the axes of each output, and the units that the outputs depend on otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from autoprune.units import Labels

Axes = Mapping[int, Labels]  # by dimension
Passed = tuple[list[Axes], list[Labels]]
Rule = Callable[[Callable[[Tensor], Axes], str, dict[str, Any], list[Tensor]], Passed]


def passed(axes: Callable[[Tensor], Axes], func: Any, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """Of an operation, by its rule; without one, its outputs have no axes and depend on all units."""
    name = func._schema.name.removeprefix("aten::")
    name = name.removesuffix("_") if torch.Tag.inplace in func.tags else name
    rule = None if FORBIDDEN & set(func.tags) else _rule(name, func.tags)
    if rule is None:
        return [{} for _ in outputs], [axis for x in _tensors(given.values()) for axis in axes(x).values()]
    return rule(axes, name, given, outputs)


def elementwise(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """Operands meet position by position, broadcast."""
    shape, found, mixed = outputs[0].shape, dict[int, Labels](), list[Labels]()
    for d in range(len(shape)):
        met = []
        for x in _tensors(given.values()):
            own = d - len(shape) + x.dim()
            if own >= 0 and x.shape[own] == shape[d]:
                met.append(_axis(axes(x), own, x))
            elif own >= 0:
                mixed += [axes(x)[own]] if own in axes(x) else []
        _meet(found, mixed, d, met)
    return [found for _ in outputs], mixed


def normalised(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """By channel, over all else, as a batch normalisation does while it takes statistics."""
    x, found, mixed = given["input"], dict[int, Labels](), list[Labels]()
    of = [given.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
    _meet(found, mixed, 1, [_axis(axes(x), 1, x), *(_axis(axes(y), 0, y) for y in of if isinstance(y, Tensor))])
    mixed += [axis for d, axis in axes(x).items() if d != 1]
    statistics = {0: found[1]} if found else {}
    return [found, *(statistics if len(y) else {} for y in outputs[1:])], mixed


def convolved(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """The channels of the output are the rows of the weight."""
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given["groups"]
    of, found, mixed = axes(weight), dict[int, Labels](), list[Labels]()
    rows, columns = (np.tile(_axis(of, 1, weight), groups), 0) if given["transposed"] else (_axis(of, 0, weight), 1)
    met = [rows] if bias is None else [rows, _axis(axes(bias), 0, bias)]
    if groups == x.shape[1] and weight.shape[1] == 1 and not given["transposed"]:  # depthwise
        met.append(np.repeat(_axis(axes(x), 1, x), outputs[0].shape[1] // groups))
        mixed += [axis for d, axis in axes(x).items() if d != 1]
    else:
        mixed += axes(x).values()
    _meet(found, mixed, 1, met)
    mixed += [axis for d, axis in of.items() if d == columns or d > 1]
    return [found], mixed


def multiplied(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """[M, K] x [K, N], or [..., K] x [N, K] transposed, and what is added."""
    if name == "linear":
        left, right, added, last = given["input"], given["weight"], given.get("bias"), 0
    else:
        left, right, last = given["mat1" if name == "addmm" else "self"], given["mat2"], 1
        added = given["self"] if name == "addmm" else None
    n = outputs[0].dim() - 1
    found: dict[int, Labels] = {d: axis for d, axis in axes(left).items() if d != left.dim() - 1}
    mixed = [axis for d, axis in axes(left).items() if d == left.dim() - 1]
    mixed += [axis for d, axis in axes(right).items() if d != last]
    met = [_axis(axes(right), last, right)]
    if added is not None:
        mixed += [axis for d, axis in axes(added).items() if d != added.dim() - 1]
        met.append(_axis(axes(added), added.dim() - 1, added))
    _meet(found, mixed, n, met)
    return [found], mixed


def pooled(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """Pooling and resampling mix the trailing 1, 2 or 3 dimensions named in the operation's name."""
    x = _tensors(given.values())[0]
    kept = x.dim() - next(int(digit) for digit in name if digit in "123")
    return _but(axes(x), range(kept, x.dim()), outputs)


def reduced(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """Sums and means mix the dimensions that go."""
    x, dims = given["self"], given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    dims = [d % x.dim() for d in dims] if x.dim() else []
    (found, *_), mixed = _but(axes(x), dims, outputs)
    if not given.get("keepdim"):
        found = {d - sum(other < d for other in dims): axis for d, axis in found.items()}
    return [found for _ in outputs], mixed


def along(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """What mixes or takes parts of one dimension."""
    x = given["self"]
    dim = given.get("dim", 0) % x.dim()
    (found, *_), mixed = _but(axes(x), [dim], outputs)
    if name in ("select", "unbind"):
        found = {d - (d > dim): axis for d, axis in found.items()}
    return [found for _ in outputs], mixed


def joined(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """Tensors laid end to end: so are their axes."""
    parts, found, mixed = given["tensors"], dict[int, Labels](), list[Labels]()
    parts = [x for x in parts if x.dim() == outputs[0].dim()]  # an empty one may have any
    dim = given.get("dim", 0) % outputs[0].dim()
    for d in range(outputs[0].dim()):
        each = [_axis(axes(x), d, x) for x in parts]
        _meet(found, mixed, d, [np.concatenate(each)] if d == dim else each)
    return [found], mixed


def padded(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """What is added along a dimension has no unit, and the model's Python says how much it is."""
    x, pad = given["self"], given["pad"]
    return _but(axes(x), [x.dim() - 1 - i // 2 for i, size in enumerate(pad) if size], outputs)


def arranged(axes: Callable[[Tensor], Axes], name: str, given: dict[str, Any], outputs: list[Tensor]) -> Passed:
    """Layout operations, done to the units as they are: each must come to lie along one dimension."""
    x, (out, *_), found, mixed = given["self"], outputs, dict[int, Labels](), list[Labels]()
    if name in COPIES:
        return [axes(x)], []
    rest = {k: v for k, v in given.items() if k not in ("self", "dtype")}
    for dim, axis in axes(x).items():
        units = torch.from_numpy(axis).view([-1 if d == dim else 1 for d in range(x.dim())]).expand(x.shape)
        after = units.reshape(out.shape) if name in RESHAPED else getattr(torch.ops.aten, name)(units, **rest)
        along = [d for d in range(after.dim()) if after.shape[d] > 1 and bool((after != after.narrow(d, 0, 1)).any())]
        if len(along) == 1 and along[0] not in found:
            (d,) = along
            found[d] = after[tuple(slice(None) if other == d else 0 for other in range(after.dim()))].numpy()
        else:
            mixed.append(axis)
    return [found], mixed


COPIES = frozenset("alias detach clone contiguous _to_copy lift_fresh".split())
RESHAPED = frozenset("view _unsafe_view reshape _reshape_alias".split())
FORBIDDEN = {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view}  # draws go by the number of elements
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(COPIES | RESHAPED | set("t transpose permute unsqueeze squeeze expand".split()), arranged),
    **dict.fromkeys("hardswish hardsigmoid hardtanh leaky_relu elu threshold _prelu_kernel".split(), elementwise),
    **dict.fromkeys(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm".split(),
        normalised,
    ),
    **dict.fromkeys("mm addmm linear".split(), multiplied),
    **dict.fromkeys("mean sum amax amin".split(), reduced),
    **dict.fromkeys("select slice split split_with_sizes unbind _softmax _log_softmax".split(), along),
    "convolution": convolved,
    "cat": joined,
    "constant_pad_nd": padded,
}
POOLED = ("max_pool", "avg_pool", "adaptive_", "_adaptive_", "upsample_", "reflection_pad", "replication_pad")


def _rule(name: str, tags: Iterable[torch.Tag]) -> Rule | None:
    if name.startswith(POOLED):
        return None if name.endswith("backward") else pooled
    return RULES.get(name, elementwise if torch.Tag.pointwise in tags else None)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)]


def _axis(axes: Axes, dim: int, x: Tensor) -> Labels:
    return axes[dim] if dim in axes else np.zeros(x.shape[dim], dtype=np.int64)


def _meet(found: dict[int, Labels], mixed: list[Labels], dim: int, axes: Sequence[Labels]) -> None:
    """Note the axis that all of these are, or that they are not one."""
    if all(np.array_equal(axes[0], axis) for axis in axes[1:]):
        if axes and axes[0].any():
            found[dim] = axes[0]
    else:
        mixed += axes


def _but(axes: Axes, dims: Iterable[int], outputs: Sequence[Tensor]) -> Passed:
    """All axes but those of these dimensions pass."""
    lost = set(dims)
    found = {d: axis for d, axis in axes.items() if d not in lost}
    return [found for _ in outputs], [axis for d, axis in axes.items() if d in lost]
