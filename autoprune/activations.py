"""Criteria (criteria.py) that look at what the layers that read a group's units are given, by running the model.

What counts is what is read, after any nonlinearity, pooling or flattening that stands between. A group whose units no
layer reads that can be looked at is ranked by l1.

Letters: U units of a group, I inputs of a layer, O its outputs, Q inputs of a layer that one unit has (channels x
kernel positions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.borrowing import arguments, evaluating
from autoprune.core import Slice
from autoprune.criteria import Groups, Scores, Together, check_given, l1, some
from autoprune.reconstruct import grams
from autoprune.units import Labels

STEPS, LEAST = 20, 1e-3  # of the path: penalties, and the last of them as a fraction of the first
SWEEPS, PRECISION = 50, 1e-6  # over all units at one penalty, at most; a change, of the penalty, that is none


def apoz(
    model: nn.Module,
    groups: Groups,
    *,
    batches: Iterable[Any],
    reduce: str = "mean",
    normalise: str = "mean",
    **given: object,
) -> tuple[Scores, ...]:
    """The share of a unit's activations that are not zero (1 - APoZ; Hu et al., 2016, arXiv 1607.03250, equation 1).

    Counted where linear layers and convolutions of one group read the unit, each of them one opinion. Without a ReLU
    hardly anything is zero and all units are alike.
    """
    check_given(given)
    together = Together(reduce, normalise)
    pieces = {p.tensor: p for own in groups for p in own if p.role == "in"}
    counts = {name: _Count(axis) for name, p in pieces.items() if (axis := _channels(model, p)) is not None}
    device = next((p.device for p in model.parameters()), None)
    with torch.no_grad(), evaluating(model), ExitStack() as hooks:
        for name, count in counts.items():
            hooks.enter_context(_watching(model.get_submodule(name.rpartition(".")[0]), count))
        for inputs, _ in some(batches, "apoz", groups):
            model(*arguments(inputs, device))
    scores = []
    for own in groups:
        seen = [(counts[p.tensor], p.positions) for p in own if p.role == "in" and p.tensor in counts]
        parts = [count.shares()[positions].mean(axis=1) for count, positions in seen if count.places]
        scores.append(_or_l1(parts, model, own, together))
    return tuple(scores)


def reconstruction(
    model: nn.Module,
    groups: Groups,
    *,
    batches: Iterable[Any],
    seed: int = 0,
    reduce: str = "mean",
    normalise: str = "mean",
    **given: object,
) -> tuple[Scores, ...]:
    """The penalty at which LASSO, as it falls, first takes the unit to rebuild what a layer gets from the group.

    He, Zhang and Sun, ICCV 2017, arXiv 1707.06168, section 3.1, step (i): argmin |Y - sum of b_u Z_u|^2 / 2 +
    penalty |b|_1, Z_u being what the layer makes of unit u alone, Y their sum, on sampled places. They raise the
    penalty until as few units are left as wanted; the order of the path serves every number at once, and the penalty,
    of the largest, is the score. Step (ii), least squares on the units that stay, is `reconstruct` of
    evaluator.recovery. Each layer that reads the group and that reconstruct.py can refit is one opinion.
    """
    check_given(given)
    together = Together(reduce, normalise)
    seen = grams(model, groups, some(batches, "reconstruction", groups), seed=seed)
    scores = []
    for own in groups:
        read = [(*seen[p.tensor], p.positions) for p in own if p.role == "in" and p.dim == 1 and p.tensor in seen]
        products = [_products(weight, gram, positions) for weight, gram, positions in read]
        parts = [entering(product) for product in products if product.any()]
        scores.append(_or_l1(parts, model, own, together))
    return tuple(scores)


def entering(products: Scores) -> Scores:
    """The penalty, of the largest, at which each unit [U] enters the path of min |Y - sum of b_u Z_u|^2 / 2 + penalty
    |b|_1 where Y is the sum of all Z; products [U, U] are of the Z with each other.

    By coordinate descent from one penalty to the next, to first order between two.
    """
    left = products.sum(axis=1)  # of each Z with what is not yet rebuilt
    order = np.argsort(-np.abs(left), kind="stable")  # which follows the units
    most = above = float(np.abs(left).max())
    taken, entries = np.zeros(len(left)), np.zeros(len(left))
    for penalty in most * np.geomspace(1, LEAST, STEPS + 1)[1:]:
        before = np.abs(left)
        taken, left = _descended(products, taken, left, penalty, order)
        fresh = (taken != 0) & (entries == 0)
        entries[fresh] = np.clip(before[fresh], penalty, above)
        above = penalty
    never = entries == 0
    entries[never] = np.minimum(np.abs(left[never]), above)
    return entries / max(most, 1e-300)


def _descended(products: Scores, taken: Scores, left: Scores, penalty: float, order: Labels) -> tuple[Scores, Scores]:
    """The solution at this penalty, and what it leaves, from those at the one before."""
    taken, left, own = taken.copy(), left.copy(), np.diagonal(products)
    order = np.asarray(order)[own[order] > 0]
    for _ in range(SWEEPS):
        largest = 0.0
        may_move = (taken[order] != 0) | (np.abs(left[order]) > penalty)
        for unit in order[may_move].tolist():
            towards = left[unit] + own[unit] * taken[unit]
            step = math.copysign(max(abs(towards) - penalty, 0.0), towards) / own[unit] - taken[unit]
            if step:
                taken[unit] += step
                left -= step * products[unit]
                largest = max(largest, abs(step) * own[unit])
        if largest <= PRECISION * penalty:
            break
    return taken, left


def _products(weight: Tensor, gram: Tensor, positions: Labels) -> Scores:
    """Of what a layer makes of each unit alone, with each other, summed over samples and outputs: [U, U], from the Gram
    matrix [I, I] of its inputs; weight [O, I...], positions [U, P]."""
    units, kernel = len(positions), math.prod(weight.shape[2:])
    owned = positions[:, :, None] * kernel + np.arange(kernel)  # columns of the flattened weight
    columns = torch.from_numpy(owned.ravel()).to(weight.device)
    ours = weight.flatten(1)[:, columns].double()
    products = gram[columns][:, columns].double() * (ours.T @ ours)
    found = products.view(units, owned[0].size, units, owned[0].size).sum(dim=(1, 3))
    return np.asarray(found.cpu().numpy(), dtype=np.float64)


def _or_l1(parts: Sequence[Scores], model: nn.Module, pieces: Sequence[Slice], together: Together) -> Scores:
    return together(parts) if parts else l1(model, [pieces], **vars(together))[0]


class _Count:
    """Of each input [I] of a layer how often it was not zero, in how many places; its channels lie along `axis`."""

    def __init__(self, axis: int) -> None:
        self.axis, self.places = axis, 0
        self._alive: Scores = np.zeros(1)

    def add(self, inputs: Tensor) -> None:
        alive = (inputs != 0).movedim(self.axis, 0).flatten(1)
        self._alive = self._alive + alive.sum(dim=1).double().cpu().numpy()
        self.places += alive.shape[1]

    def shares(self) -> Scores:
        return self._alive / self.places


def _channels(model: nn.Module, piece: Slice) -> int | None:
    """Along which dimension of what it is given a layer reads this slice's units; None where that is not known."""
    layer, name = model.get_submodule(piece.tensor.rpartition(".")[0]), piece.tensor.rpartition(".")[2]
    if name == "weight" and isinstance(layer, nn.Linear) and piece.dim == 1:
        return -1
    if name == "weight" and isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1:
        return -1 - len(layer.kernel_size) if piece.dim == (0 if layer.transposed else 1) else None
    return None


@contextmanager
def _watching(layer: nn.Module, count: _Count) -> Iterator[None]:
    """While this is open, what the layer is given is counted."""

    def hook(module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        inputs = given[0] if given else named.get("input")
        if isinstance(inputs, Tensor) and inputs.dim() >= -count.axis and inputs.numel():
            count.add(inputs)

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
