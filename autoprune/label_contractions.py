"""How labels end and begin at contractions: convolutions and matrix products with a parameter.

Letters: N examples, K contracted, M rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.recording import Recording, compact, small, tensors, varies
from autoprune.units import Labels


def convolution(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor | None:
    x, weight, groups, transposed = given["input"], given["weight"], given["groups"], given["transposed"]
    label = rec.label(x)
    dims = _weight_dims(rec, weight, (1, 0) if transposed else (0, 1))
    if dims is None:
        rec.keep([x], f"aten.{name} with a weight computed from other tensors")
        return None
    source, (out_dim, in_dim) = rec.sources[weight][0], dims
    rec.made.add((source, out_dim))
    channels = rec.channel_units(label, 1, f"aten.{name}")
    positions = (x if transposed else out).select(1, 0).numel() / rec.examples
    height, width = int(out.shape[2]), int(np.prod(out.shape[3:]))
    stride, kernel = int(given["stride"][0]), int(weight.shape[2])
    rec.used(source, positions, stride=stride, kernel=kernel, height=height, width=width)
    if groups > 1 and groups == x.shape[1] and weight.shape[1] == 1 and not transposed:
        produced = np.repeat(channels, out.shape[1] // groups)
        rec.own(source, out_dim, produced, f"aten.{name}")
        rec.depthwise.add(source)
    else:
        grouped = channels.reshape(groups, -1)
        for row in grouped[1:]:
            rec.units.unite(grouped[0], row, f"aten.{name} in groups")
        ends = channels if transposed else grouped[0]
        rec.own(source, in_dim, ends, f"aten.{name}")
        produced = _produced(rec, source, out_dim, out.shape[1] // groups, groups if transposed else 1)
        if groups > 1 and not transposed:
            produced = _produced_in_groups(rec, source, out_dim, out.shape[1], groups)
    _bias(rec, given.get("bias"), produced)
    return torch.from_numpy(produced).view(1, -1, *[1] * (out.dim() - 2)).expand(out.shape)


def _produced(rec: Recording, source: str, dim: int, count: int, repeats: int) -> Labels:
    """Labels on a weight's output dimension: fresh ones, or those of its first use when it is shared."""
    if (source, dim) not in rec.slots:
        rec.slots[source, dim] = rec.units.fresh(count)
    return np.tile(rec.slots[source, dim], repeats)


def _produced_in_groups(rec: Recording, source: str, dim: int, count: int, groups: int) -> Labels:
    slots = rec.slots
    if len(slots.get((source, dim), ())) != count:
        slots[source, dim] = np.tile(rec.units.fresh(count // groups), groups)
    return slots[source, dim]


def _bias(rec: Recording, bias: Tensor | None, produced: Labels) -> None:
    if bias is None:
        return
    if bias in rec.sources:
        source, index = rec.source(bias)
        rec.tie(source, index, torch.from_numpy(produced), "a bias")
    else:
        rec.units.keep_whole(produced, "a bias computed from other tensors")


def addmm(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor | None:
    return _matrix_product(rec, name, given["mat1"], given["mat2"], given["self"])


def mm(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor | None:
    return _matrix_product(rec, name, given["self"], given["mat2"], None)


def linear(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor | None:
    x, weight = given["input"], given["weight"]
    transposed = weight.t()
    if weight in rec.sources:
        rec.sources[transposed] = _turned(rec, weight)
    flat = x.reshape(-1, x.shape[-1])
    rec.labels[flat] = compact(rec.label(x).reshape(flat.shape))
    label = _matrix_product(rec, name, flat, transposed, given.get("bias"))
    return None if label is None else label.reshape(out.shape)


def _matrix_product(rec: Recording, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """[M, K] x [K, N]; the weight is a whole parameter, seen through any transposition."""
    if x in rec.sources and weight not in rec.sources:  # weight @ x is (x.T @ weight.T).T
        flipped = weight.t()
        rec.labels[flipped] = rec.label(weight).t()
        turned = x.t()
        rec.sources[turned] = _turned(rec, x)
        label = _matrix_product(rec, name, flipped, turned, None)
        return None if label is None else label.t()
    dims = _weight_dims(rec, weight, (1, 0))
    if dims is None:
        rec.keep([x, weight], f"aten.{name} of two activations")
        return None
    source, (out_dim, in_dim) = rec.sources[weight][0], dims
    rec.made.add((source, out_dim))
    label = rec.label(x)
    rec.used(source, x.shape[0] / rec.examples)
    if varies(label, 0) and not varies(label, 1):  # the rows are units (a token mixer)
        if not rec.units.all_whole(small(label).numpy()):
            return label[:, :1].expand(-1, weight.shape[1])  # which pass through
        label = torch.zeros(1, 1, dtype=torch.int64).expand(label.shape)  # or are lost, and the columns can be units
    ends = rec.channel_units(label, 1, f"aten.{name}")
    rec.own(source, in_dim, ends, f"aten.{name}")
    produced = _produced(rec, source, out_dim, weight.shape[1], 1)
    _bias(rec, bias, produced)
    return torch.from_numpy(produced).expand(x.shape[0], -1)


def bmm(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor | None:
    """[B, M, K] x [B, K, N] of two activations, or of one and a parameter without units."""
    x, y = given["self"], given["mat2"]
    if any(t in rec.sources or t in rec.computed for t in (x, y)):
        rec.keep([x, y], f"aten.{name} with a parameter")
        return None
    left, right = rec.label(x), rec.label(y)
    rec.count(left, right.shape[2]) if varies(left, 2) else rec.count(right, left.shape[1])
    left, right = _contracted(rec, left, right, f"aten.{name}")
    if varies(left, 0) and varies(right, 0):  # units that are multiplied each for itself
        rec.heads.append(np.unique(small(left).numpy()))
    return rec.meet([left, right], tuple(out.shape), f"aten.{name}")


def baddbmm(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor | None:
    label = bmm(rec, func, name, {"self": given["batch1"], "mat2": given["batch2"]}, out)
    rec.keep([given["self"]], f"aten.{name}")
    return label


def _contracted(rec: Recording, left: Tensor, right: Tensor, operation: str) -> tuple[Tensor, Tensor]:
    """Labels [B, M, K] and [B, K, N] of two factors -> [B, M, 1] and [B, 1, N]: what differs along K goes from both,
    and what is united so has no say in the product."""
    if not varies(left, 2) and not varies(right, 1):
        return left[:, :, :1], right[:, :1]
    ends = rec.unite_along(left, [1], operation).transpose(1, 2), rec.unite_along(right, [2], operation)
    rec.meet(ends, tuple(ends[0].shape), operation)
    return torch.zeros_like(left[:, :1, :1]), torch.zeros_like(right[:, :1, :1])


def attention(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> list[Tensor]:
    """Scaled dot-product attention of [B, H, T, D]: a dimension of the queries goes with that of the keys, and a head
    with all it has in all three."""
    operation, mask = f"aten.{name}", given.get("attn_mask", given.get("attn_bias"))
    query, key, value = (rec.label(given[k]) for k in ("query", "key", "value"))
    heads = query.shape[1]
    key, value = (
        rec.unite_along(label, [2], operation).repeat_interleave(heads // label.shape[1], 1) for label in (key, value)
    )
    asked = rec.meet([rec.unite_along(query, [2], operation), key], tuple(key.shape), operation)
    whole = rec.unite_along(asked, [3], operation) if varies(asked, 1) else torch.zeros_like(asked[..., :1])
    if given.get("scale") is None and varies(asked, 3):  # which is the root of this dimension then
        asked = rec.unite_along(asked, [3], operation)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        rec.meet_parameter(mask, whole.expand(-1, -1, *mask.shape[2:]), operation)
        if mask not in rec.sources and mask not in rec.computed:
            rec.meet([whole, rec.unite_along(rec.label(mask), [2, 3], operation)], tuple(whole.shape), operation)
    if small(whole).any():
        rec.heads.append(np.unique(small(whole).numpy()))
        value = rec.meet([value, whole.expand(value.shape)], tuple(value.shape), operation)
    first, *others = tensors(out)
    rec.count(query, given["key"].shape[2])
    rec.count(rec.label(given["value"]), query.shape[2])
    sums = [whole[..., 0].expand(other.shape) for other in others[:1] if other.dim() == 3]  # of exponentials, [B, H, T]
    return [value.expand(first.shape), *sums]


def embedding(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor | None:
    """Rows of a table: its columns are units."""
    weight = given["weight"]
    rec.keep([given["indices"]], f"aten.{name} of units")
    if weight not in rec.sources or rec.order(weight) != (0, 1):
        return None
    source = rec.sources[weight][0]
    rec.made.add((source, 1))
    return torch.from_numpy(_produced(rec, source, 1, weight.shape[1], 1)).expand(out.shape)


def _turned(rec: Recording, weight: Tensor) -> tuple[str, Any]:
    """What a matrix shows of its parameter, transposed."""
    order = rec.order(weight)
    return rec.sources[weight][0], rec.source(weight)[1].t() if order is None else order[::-1]


def _weight_dims(rec: Recording, weight: Tensor, dims: tuple[int, int]) -> tuple[int, int] | None:
    """Which dimensions of the parameter the weight's (output, input) dimensions are; None if it is no whole one."""
    if weight not in rec.sources:
        return None
    if (order := rec.order(weight)) is not None:
        return order[dims[0]], order[dims[1]]
    source, index = rec.source(weight)
    shape = rec.shapes[source]
    if index.numel() != int(np.prod(shape)):
        return None
    found = []
    for dim in dims:
        line = index[tuple(slice(None) if d == dim else 0 for d in range(index.dim()))].numpy()
        moving = [d for d, c in enumerate(np.unravel_index(line, shape)) if len(np.unique(c)) > 1]
        alike = [d for d in range(len(shape)) if shape[d] == index.shape[dim] and d not in found]
        match = moving if index.shape[dim] > 1 else alike[:1]
        if len(match) != 1:
            return None
        found.append(match[0])
    return found[0], found[1]
