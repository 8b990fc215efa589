"""Modules that hand back what another network's gave, and whether two outputs are one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

TOLERANCE = 1e-5  # of the largest output

Positions = Mapping[int, Tensor]  # by dimension, where only some are left
Outputs = dict[str, Callable[[], Any]]  # by module: makes what it hands back


@contextmanager
def handing_back(model: nn.Module, outputs: Mapping[str, Callable[[], Any]]) -> Iterator[None]:
    """Inside, these modules hand back these outputs instead of running."""
    modules = [(model.get_submodule(name), output) for name, output in outputs.items()]
    own = [module.__dict__.get("forward") for module, _ in modules]
    for module, output in modules:
        module.forward = partial(_handed, output)
    try:
        yield
    finally:
        for (module, _), forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _handed(output: Callable[[], Any], *_: Any, **__: Any) -> Any:
    return output()


def cloned(output: Any) -> Callable[[], Any]:
    """Makes a copy of this output, as it is now."""
    return partial(tree_map, _clone, tree_map(_clone, output))


def narrowed(output: Any, positions: Sequence[Positions]) -> Any:
    """What is left of this output at these positions of each of its tensors."""
    return _each(output, positions, _taken)


def _taken(tensor: Tensor, dim: int, where: Tensor) -> Tensor:
    """index_select that leaves the dimensions in the order in which they lie in memory."""
    order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
    taken = tensor.permute(order).index_select(order.index(dim), where.to(tensor.device))
    return taken.permute([order.index(d) for d in range(tensor.dim())])


def shortened(output: Any, positions: Sequence[Positions]) -> Any:
    """One of that shape, whatever its values."""
    return _each(output, positions, lambda tensor, dim, where: tensor.narrow(dim, 0, len(where)))


def _each(output: Any, positions: Sequence[Positions], take: Callable[[Tensor, int, Tensor], Tensor]) -> Any:
    leaves, form = tree_flatten(output)
    of = iter(positions)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            for dim, where in next(of).items():
                leaves[i] = take(leaves[i], dim, where)
    return tree_unflatten(leaves, form)


def hollow(output: Any) -> Callable[[], Any]:
    """Makes one of the same shapes, without room for values."""
    return partial(tree_map, _hollow, tree_map(_hollow, output))


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _hollow(value: Any) -> Any:
    return value.new_zeros(()).expand(value.shape) if isinstance(value, Tensor) else value


def alike(ours: Any, theirs: Any) -> bool:
    """Whether two outputs are one, floats to within TOLERANCE."""
    pairs = list(zip(tree_leaves(ours), tree_leaves(theirs), strict=True))
    return all(_close(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two outputs are one, to the bit and in memory."""
    pairs = list(zip(tree_leaves(ours), tree_leaves(theirs), strict=True))
    return all(
        a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in pairs
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    scale = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True)
