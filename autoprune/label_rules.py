"""How labels pass through operations that are no contraction: layout, elementwise, normalisation, reduction.

A rule takes (recording, operation, its name, its arguments by name, its output) and returns the output's labels, one
tensor or a list where the output is several; None stands for no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.recording import Recording, compact, shrunk, small, tensors, varies
from autoprune.units import Labels


def layout(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> Any:
    """Apply the operation itself to the labels; dtype, device and memory format are not theirs."""
    rest = {k: v for k, v in given.items() if k not in ("self", "dtype", "device", "memory_format", "layout")}
    if name in ("_to_copy", "contiguous", "lift_fresh", "clone"):
        return rec.label(given["self"])
    return func(rec.label(given["self"]), **{k: v for k, v in rest.items() if k != "non_blocking"})


def alike(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> Tensor:
    return rec.label(given["self"])


def reshape(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    label = rec.label(given["self"])
    shaped = label.reshape(out.shape)
    for before, after in _blocks(tuple(label.shape), tuple(out.shape)):
        if len([d for d in after if out.shape[d] > 1]) > 1 and not _same_sizes(label, before, out, after):
            _split_block(rec, f"aten.{name}", shaped, after)
            shaped = rec.resolved(shaped)
        elif len([d for d in before if label.shape[d] > 1]) > 1 and any(varies(label, d) for d in before):
            rec.site(label, 1, [out.shape[d] for d in after])  # whose product may be kept in an attribute
    return shaped if label.numel() and shaped.data_ptr() == label.data_ptr() else compact(shaped)


def as_strided(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor | None:
    """Only strides of size-1 dimensions differ (pooling to 1 x 1 in channels_last): nothing has moved."""
    x = given["self"]
    if x.shape == out.shape and all(a == b for n, a, b in zip(x.shape, x.stride(), out.stride(), strict=True) if n > 1):
        return rec.label(x)
    rec.keep([x], f"aten.{name}")
    return None


def _split_block(rec: Recording, operation: str, label: Tensor, dims: list[int]) -> None:
    """One labelled dimension became several: all but one keep their size in the model's Python, so along that
    one whole slices are units. Readings: each dimension in turn, those that leave most units first, but the last
    dimension of all after the others: features are split into heads before what each head holds."""
    if not any(varies(label, d) for d in dims):
        return
    flat = small(label, *dims).movedim(dims, tuple(range(len(dims))))
    options = []
    for j, d in enumerate(dims):
        if label.shape[d] > 1:
            rows = flat.movedim(j, 0).reshape(label.shape[d], -1, int(np.prod(flat.shape[len(dims) :])))
            rows_np = rows.permute(0, 2, 1).reshape(-1, rows.shape[1]).numpy()
            options.append((rec.units.merges(rows_np[:, :1], rows_np), d, rows_np))
    options.sort(key=lambda option: (option[1] == label.dim() - 1, *option[:2]))
    sizes = tuple(label.shape[d] for d in dims)
    chosen = rec.site(label, len(options) + 1, sizes)
    if chosen == len(options):
        rec.keep_label(label, operation)
    elif options[chosen][0]:
        rec.units.unite_within(options[chosen][2], operation)


def cat(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    parts = [rec.label(t) for t in given["tensors"] if t.numel()]
    dim = given.get("dim", 0) % out.dim()
    across = [p for p in parts if any(varies(p, d) for d in range(p.dim()) if d != dim)]
    for part in parts[1:] if across else []:
        rec.units.unite(*_pair(parts[0].select(dim, 0), part.select(dim, 0)), f"aten.{name}")
    return _joined(parts, lambda few: torch.cat(few, dim), dim)


def stack(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    parts = [rec.label(t) for t in given["tensors"]]
    for part in parts[1:]:
        rec.units.unite(*_pair(parts[0], part), f"aten.{name}")
    return torch.stack([part.contiguous() for part in parts], given.get("dim", 0))


def _pair(left: Tensor, right: Tensor) -> tuple[Labels, Labels]:
    """Two labels of one shape, without the dimensions that neither differs along."""
    here = [d for d in range(left.dim()) if left.stride(d) or right.stride(d)]
    return shrunk(left, here).numpy(), shrunk(right, here).numpy()


def _joined(parts: Sequence[Tensor], join: Callable[[list[Tensor]], Tensor], dim: int) -> Tensor:
    """What joins labels along a dimension, done on what is left without the dimensions that none differs along."""
    here = [d for d in range(parts[0].dim()) if d == dim or any(part.stride(d) for part in parts)]
    few = join([shrunk(part, here) for part in parts])
    return few.expand([few.shape[d] if d in here else n for d, n in enumerate(parts[0].shape)])


def constant_pad_nd(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    """Padding along a dimension that the units do not vary on belongs to them; elsewhere to none."""
    label, pad = rec.label(given["self"]), given["pad"]
    whole = torch.constant_pad_nd(label, pad, 0)
    for i in range(len(pad) // 2):
        d = label.dim() - 1 - i
        if (pad[2 * i] or pad[2 * i + 1]) and not varies(label, d):
            whole = whole.amax(d, keepdim=True).expand(whole.shape)
    return compact(whole)


def split(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> Any:
    label, dim = rec.label(given["self"]), given.get("dim", 0)
    sizes = [part.shape[dim] for part in out]
    parts = list(torch.split(label, sizes, dim))
    return _parts(rec, f"aten.{name}", label, dim % label.dim(), parts, len(set(sizes)) == 1 and len(sizes) > 1)


def slice_(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Any:
    label, dim, step = rec.label(given["self"]), given.get("dim", 0), given.get("step", 1)
    dim, size = dim % label.dim(), out.shape[given.get("dim", 0)]
    if size < label.shape[dim] and varies(label, dim):
        start = range(label.shape[dim])[slice(given.get("start"), None)].start
        even = step == 1 and label.shape[dim] % size == 0 and start % size == 0
        if step == 1:
            return _parts(rec, f"aten.{name}", label, dim, [label.narrow(dim, start, size)], even)[0]
        rec.keep_label(label, f"aten.{name} with a step")
    return func(label, **{k: v for k, v in given.items() if k != "self"})


def _parts(rec: Recording, operation: str, label: Tensor, dim: int, parts: list[Tensor], even: bool) -> list[Tensor]:
    """A labelled dimension is cut into parts. Readings: even parts were computed from the whole, and stay even:
    position i of every part is one unit; each part is free; the sizes of all but the last, or of all but the first, are
    fixed in the model's Python (of a slice: its own), so that no unit is in them. Returns the labels of the parts."""
    if not varies(label, dim):
        return parts
    last = len(parts) - 1
    fixed = [{0}] if last == 0 else [set(range(last)), set(range(1, last + 1))]
    chosen = rec.site(label, even + 1 + len(fixed) + 1, [part.shape[dim] for part in parts], parts) - even
    if chosen == -1:
        rec.unite_modulo(label, dim, parts[0].shape[dim], operation)
    elif chosen > len(fixed):
        rec.keep_label(label, operation)
    elif chosen > 0:
        for i in fixed[chosen - 1]:
            rec.keep_label(parts[i], operation)
            parts[i] = torch.zeros_like(small(parts[i])).expand(parts[i].shape)
    return parts


def select(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    label = rec.label(given["self"])
    if varies(label, given["dim"]):
        rec.keep_label(label, f"aten.{name} of one unit by its number")
    return label.select(given["dim"], given["index"])


def index_select(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    """Of a dimension without units it picks what it likes."""
    label, dim = rec.label(given["self"]), given["dim"]
    if varies(label, dim):
        rec.keep_label(label, f"aten.{name} of units by their number")
        return torch.zeros(out.shape, dtype=torch.int64)
    return label.narrow(dim, 0, 1).expand(out.shape) if label.shape[dim] else label


def gather(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    """As index_select, at places that may differ along every other dimension."""
    label, dim, shape = rec.label(given["self"]), given["dim"], out.shape
    others = [d for d in range(label.dim()) if d != dim % label.dim()]
    if varies(label, dim) or any(label.shape[d] != shape[d] and varies(label, d) for d in others):
        rec.keep_label(label, f"aten.{name} of units by their number")
        return torch.zeros(shape, dtype=torch.int64)
    return label[
        tuple(slice(0, 1) if d not in others or label.shape[d] != shape[d] else slice(None) for d in range(label.dim()))
    ].expand(shape)


def roll(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Any:
    label = rec.label(given["self"])
    if any(varies(label, d) for d in given.get("dims") or range(label.dim())):
        rec.keep_label(label, f"aten.{name} over units")
    return func(label, **{k: v for k, v in given.items() if k != "self"})


def pixel_shuffle(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    label, factor = rec.label(given["self"]), given["upscale_factor"]
    blocks = label.movedim(-3, 0).reshape(-1, factor**2, int(label[..., 0, :, :].numel()))
    rec.units.unite_within(blocks.permute(0, 2, 1).reshape(-1, factor**2).numpy(), f"aten.{name}")
    return compact(torch.pixel_shuffle(label, factor))


def channel_shuffle(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    label = rec.label(given["self"])
    rec.unite_modulo(label, 1, label.shape[1] // given["groups"], f"aten.{name}")
    return compact(torch.channel_shuffle(label.contiguous(), given["groups"]))


def glu(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    label, dim = rec.label(given["self"]), given.get("dim", -1)
    rec.unite_modulo(label, dim % label.dim(), out.shape[dim], f"aten.{name}")
    return label.narrow(dim, 0, out.shape[dim])


def copy(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Tensor) -> Tensor:
    return rec.label(given["src"]).expand(out.shape)


def pointwise(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> Tensor:
    shape = tuple(tensors(out)[0].shape)
    operands = [t for t in tensors(list(given.values())) if t.dim() <= len(shape)]
    active = [rec.label(t) for t in operands if t not in rec.sources and t not in rec.computed]
    met = rec.meet(active, shape, f"aten.{name}")
    for operand in operands:
        rec.meet_parameter(operand, met, f"aten.{name}")
    return met


def batch_norm(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> list[Tensor]:
    label = rec.label(given["input"])
    channels = rec.channel_units(label, 1, f"aten.{name}")
    _tied(rec, name, given, channels)
    training = bool(given.get("training", given.get("use_input_stats", False)))
    affine = isinstance(given.get("weight"), Tensor)
    rec.count(label, (4 if training else 1) + affine)
    return [label]


def layer_norm(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> list[Tensor]:
    label = rec.label(given["input"])
    if any(varies(label, -1 - i) for i in range(len(given["normalized_shape"]))):
        rec.keep_label(label, f"aten.{name}, which mixes the units")
    rec.count(label, 4 + isinstance(given.get("weight"), Tensor))
    return [label]


def native_group_norm(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> list[Tensor]:
    """What is averaged over together is one unit, if the module that holds the number of groups lets it fall."""
    label, groups, operation = rec.label(given["input"]), given["group"], f"aten.{name}, which mixes the units"
    channels = rec.channel_units(label, 1, operation)
    if groups == 1 or rec.site(label, 2, (groups,)) == 1:
        rec.keep_label(label, operation)
    rec.units.unite_within(channels.reshape(groups, -1), operation)
    _tied(rec, name, given, channels)
    rec.count(label, 4 + isinstance(given.get("weight"), Tensor))
    statistics = torch.from_numpy(channels.reshape(groups, -1)[:, 0].copy())
    return [label, *(statistics.expand(part.shape) for part in tensors(out)[1:])]


def _tied(rec: Recording, name: str, given: dict[str, Any], channels: Labels) -> None:
    """The scales, offsets and statistics of a normalisation go with its channels."""
    for tensor in (given.get(k) for k in ("weight", "bias", "running_mean", "running_var")):
        if isinstance(tensor, Tensor) and tensor in rec.sources:
            rec.tie(*rec.source(tensor), torch.from_numpy(channels), f"aten.{name}")
        elif isinstance(tensor, Tensor):
            rec.units.keep_whole(channels, f"aten.{name} with a computed parameter")


def reduce(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> list[Tensor]:
    tensor = given["self"]
    dims = given.get("dim")
    if dims == [-1, -2] and given.get("keepdim"):  # how adaptive average pooling to 1 x 1 arrives here
        rec.count(rec.label(tensor), 1)
    dims = [dims] if isinstance(dims, int) else list(dims or range(tensor.dim()))
    dims = [d % max(tensor.dim(), 1) for d in dims]
    label = rec.label(tensor)
    if name == "sum" and _only_along(label, dims) and rec.site(label, 2, ()) == 0:
        label = torch.zeros_like(small(label)).expand(label.shape)  # what is gone adds nothing, if it was zero
    label = rec.unite_along(label, dims, f"aten.{name}")
    return [label.reshape(part.shape) for part in tensors(out)]


def _only_along(label: Tensor, dims: Sequence[int]) -> bool:
    """Whether the labels differ along these dimensions and no other."""
    found = [d for d in range(label.dim()) if varies(label, d)]
    return bool(found) and set(found) <= set(dims)


def along(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> list[Tensor]:
    label = rec.label(given["self"])
    rec.unite_along(label, [given.get("dim", -1) % label.dim()], f"aten.{name}")
    return [label for _ in tensors(out)]


def spatial(rec: Recording, func: Any, name: str, given: dict[str, Any], out: Any) -> list[Tensor]:
    """Pooling and resampling: the trailing 1, 2 or 3 dimensions named in the operation's name are mixed."""
    label = rec.label(tensors(list(given.values()))[0])
    count = next(int(digit) for digit in name if digit in "123")
    if "adaptive_avg" in name:
        rec.count(label, 1)
    label = rec.unite_along(label, list(range(label.dim() - count, label.dim())), f"aten.{name}")
    parts = [label.expand(part.shape) for part in tensors(out)]
    if name.startswith("upsample_"):
        rec.count(parts[0], 4 if "bilinear" in name else 1)
    return parts


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Pair the dimensions of two shapes of one size into the finest blocks with equal products."""
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = ([i], [j]) if i < len(before) and j < len(after) else ([], [])
        if not left:
            return
        a, b = before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, left, i = a * before[i], [*left, i], i + 1
            else:
                b, right, j = b * after[j], [*right, j], j + 1
        yield left, right


def _same_sizes(label: Tensor, before: list[int], out: Tensor, after: list[int]) -> bool:
    return [label.shape[d] for d in before if label.shape[d] > 1] == [out.shape[d] for d in after if out.shape[d] > 1]
