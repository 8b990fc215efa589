"""A criterion (criteria.py) of second order: optimal brain damage.

LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989: where the gradient is zero and the Hessian
diagonal, setting a weight w to zero changes the loss by h w^2 / 2. Deviation: h is not of the Hessian but of the
empirical Fisher information, the exact mean over examples of the squared gradient of each one's loss. It needs one
derivative only, is never negative, draws nothing, and follows the units when these are reordered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.borrowing import arguments
from autoprune.core import InputError, check_rules
from autoprune.criteria import Groups, Scores, Together, by_layer, gradients, made, per_unit, some, trainable


def hessian(
    model: nn.Module,
    groups: Groups,
    *,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    seed: int = 0,
    examples: int = 128,
    reduce: str = "sum",
    normalise: str = "none",
) -> tuple[Scores, ...]:
    """Second-order change of the loss if the unit were zero: the sum of h w^2 / 2 over its filter and bias.

    examples: the first of the batches, at most, that h is the mean of. Changes of the loss add up, so the default is
    their sum over layers. The model is run in evaluation mode.

    Raises:
        InputError: a batch that cannot be taken apart into examples.
    """
    together = Together(reduce, normalise)
    check_rules(
        "criterion",
        {"examples must be a whole number of 1 or more": type(examples) is int and examples >= 1},
        {"examples": examples},
    )
    tensors = dict(model.named_parameters())
    layers = [by_layer(made(pieces, tensors)) for pieces in groups]
    parameters = {p.tensor: tensors[p.tensor] for own in layers for layer in own for p in layer}
    squares = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in parameters.items()}
    count = 0
    with trainable(parameters.values()):
        for given, target in islice(_one_by_one(some(batches, "hessian", groups)), examples):
            for name, gradient in gradients(model, parameters, given, target, loss).items():
                squares[name] += gradient.double().square()
            count += 1
    halves = {name: squares[name] / max(2 * count, 1) * w.detach().double().square() for name, w in parameters.items()}
    scores = []
    for own in layers:
        parts = [np.sum([per_unit(halves[p.tensor], p) for p in layer], axis=0) for layer in own]
        scores.append(together(parts))
    return tuple(scores)


def _one_by_one(batches: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each example of these batches as a batch of its own."""
    for inputs, target in batches:
        given = arguments(inputs)
        count = next((len(x) for x in tree_leaves(given) if isinstance(x, Tensor) and x.dim()), 0)
        for number in range(count):
            ours, theirs = tree_map(partial(_row, number, count), (given, target))
            yield arguments(ours), theirs


def _row(number: int, count: int, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if len(value) != count:
        raise InputError(
            f"criterion=hessian takes the loss of each example: every tensor of a batch of {count} must have {count} "
            f"rows, got one of shape {tuple(value.shape)}; criterion=taylor takes batches whole"
        )
    return value[number : number + 1]
