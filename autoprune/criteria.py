"""Importance of units: which ones of a group go first at a given ratio. Small functions, one a criterion.

Each takes (model, groups, batches, loss, seed) and returns one array [U] a group, higher is more important; groups
holds the slices that each group owns. Scores are compared inside a group only. Where several layers speak of the same
units (those that write to a residual stream), `reduce` and `normalise` say how their scores become one; see Together.
`hessian` is in curvature.py, and those that look at what layers read in activations.py.

Letters: U units of a group, F weights of one unit's filter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.borrowing import arguments, evaluating
from autoprune.core import FLAT, InputError, Slice, check_rules, is_number

Scores = NDArray[np.float64]
Groups = Sequence[Sequence[Slice]]
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": np.mean,
    "max": np.max,
    "sum": np.sum,
    "first": lambda parts, axis: parts[axis],
}
SCALES: dict[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "sum": np.sum, "none": lambda part: 1.0}
PAIRS = 2**24  # distances that are held at once


class Criterion(Protocol):
    """See the module's docstring; a criterion uses of the arguments what it needs."""

    def __call__(
        self, model: nn.Module, groups: Groups, *, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor], seed: int
    ) -> tuple[Scores, ...]: ...


@dataclass(frozen=True)
class Together:
    """How the scores [U] that several layers give the same units become one.

    normalise: what each layer's scores are divided by first, so that none speaks louder for its scale: their "mean",
    their "max", their "sum", or "none". reduce: of the layers, the "mean", "max" or "sum", or the "first" that the
    model defines.
    """

    reduce: str = "mean"
    normalise: str = "mean"

    def __post_init__(self) -> None:
        check_choice("reduce", self.reduce, REDUCTIONS)
        check_choice("normalise", self.normalise, SCALES)

    def __call__(self, parts: Sequence[Scores]) -> Scores:
        scaled = [part / max(float(SCALES[self.normalise](part)), 1e-30) for part in parts]
        return np.asarray(REDUCTIONS[self.reduce](scaled, axis=0), dtype=np.float64)


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises InputError unless a criterion's setting is one of these."""
    if value not in tuple(known):
        raise InputError(f"criterion.{name} must be one of {', '.join(known)}, got '{value}'")


def check_given(given: Iterable[str]) -> None:
    """Raises InputError for a keyword that criteria are not called with: a setting that there is not."""
    if unknown := sorted(set(given) - {"batches", "loss", "seed"}):
        raise InputError(f"criterion has no setting '{unknown[0]}': conf/criterion has those that each one takes")


def l1(
    model: nn.Module, groups: Groups, *, reduce: str = "mean", normalise: str = "mean", **given: object
) -> tuple[Scores, ...]:
    """Sum of absolute weights of the filter that makes the unit (Li et al., ICLR 2017, arXiv 1608.08710)."""
    check_given(given)
    return _norm(model, groups, 1, Together(reduce, normalise))


def l2(
    model: nn.Module, groups: Groups, *, reduce: str = "mean", normalise: str = "mean", **given: object
) -> tuple[Scores, ...]:
    """Euclidean norm of the filter that makes the unit."""
    check_given(given)
    return _norm(model, groups, 2, Together(reduce, normalise))


def lp(
    model: nn.Module,
    groups: Groups,
    *,
    p: float = 1.5,
    reduce: str = "mean",
    normalise: str = "mean",
    **given: object,
) -> tuple[Scores, ...]:
    """(sum of |w|^p)^(1/p) over the filter that makes the unit: few large weights count the more the larger p is."""
    check_given(given)
    check_rules("criterion", {"p must be a number from 0.1 to 100": is_number(p) and 0.1 <= p <= 100}, {"p": p})

    def norm(values: Tensor, piece: Slice) -> Scores:
        magnitudes = np.abs(_filters(values, piece))
        largest = max(float(magnitudes.max()), 1e-30)  # of powers of what is at most 1 none overflows
        return np.asarray(largest * np.sum((magnitudes / largest) ** p, axis=1) ** (1 / p), dtype=np.float64)

    return _by_filters(model, groups, norm, Together(reduce, normalise))


def fpgm(
    model: nn.Module, groups: Groups, *, reduce: str = "mean", normalise: str = "mean", **given: object
) -> tuple[Scores, ...]:
    """Sum of the distances from the unit's filter to all others of its layer (He et al., CVPR 2019, arXiv 1811.00250).

    The filter with the least is nearest to the geometric median, and others can stand for it best.
    """
    check_given(given)
    return _by_filters(
        model, groups, lambda values, piece: _distances(_filters(values, piece)), Together(reduce, normalise)
    )


def lamp(
    model: nn.Module, groups: Groups, *, reduce: str = "mean", normalise: str = "mean", **given: object
) -> tuple[Scores, ...]:
    """Squared norm of the unit's filter over the sum of those, of its layer, that are not smaller.

    Lee et al., ICLR 2021, arXiv 2010.07611, whose score is of single weights; of equal ones, which they take in turn,
    each counts all. In one layer the order is that of l2: what differs is how coupled layers are weighed.
    """
    check_given(given)

    def score(values: Tensor, piece: Slice) -> Scores:
        squares = per_unit(values.double().square(), piece)
        ascending = np.sort(squares)
        not_smaller = np.cumsum(ascending[::-1])[::-1][np.searchsorted(ascending, squares)]
        return np.asarray(squares / np.maximum(not_smaller, 1e-300), dtype=np.float64)

    return _by_filters(model, groups, score, Together(reduce, normalise))


def bn_scale(
    model: nn.Module, groups: Groups, *, reduce: str = "mean", normalise: str = "mean", **given: object
) -> tuple[Scores, ...]:
    """|gamma| of the unit's batch normalisations (network slimming; Liu et al., ICCV 2017, arXiv 1708.06519).

    Units that pass through no normalisation with a scale are ranked by l1.
    """
    check_given(given)
    together, tensors = Together(reduce, normalise), dict(model.named_parameters())
    scores = []
    for pieces in groups:
        scales = [p for p in pieces if p.role == "with" and p.tensor in tensors and is_scale(model, p.tensor)]
        parts = [per_unit(tensors[p.tensor].detach().abs(), p) for p in scales]
        scores.append(together(parts) if parts else _norm(model, [pieces], 1, together)[0])
    return tuple(scores)


def taylor(
    model: nn.Module,
    groups: Groups,
    *,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    seed: int = 0,
    reduce: str = "joint",
    normalise: str = "none",
) -> tuple[Scores, ...]:
    """First-order change of the loss if the unit were zero, (sum of gradient x value)^2 summed over mini-batches.

    Molchanov et al., CVPR 2019, arXiv 1906.10771, equation 8, on the scale and shift of the unit's normalisations as
    they advise, and on the filter and bias that make it where there are none. The model is run in evaluation mode.
    reduce: "joint" adds the changes of all layers before the square, as the unit goes from all of them at once; the
    others are of each layer's own.
    """
    check_choice("reduce", reduce, ("joint", *REDUCTIONS))
    together = Together("first" if reduce == "joint" else reduce, normalise)
    tensors = dict(model.named_parameters())
    chosen = [_taylor_pieces(model, pieces, tensors) for pieces in groups]
    layers = [[pieces] if reduce == "joint" else by_layer(pieces) for pieces in chosen]
    parameters = {p.tensor: tensors[p.tensor] for pieces in chosen for p in pieces}
    totals = [[np.zeros(len(layer[0].positions)) for layer in own] for own in layers]
    with trainable(parameters.values()):
        for inputs, target in some(batches, "taylor", groups):
            slopes = gradients(model, parameters, arguments(inputs), target, loss)
            products = {name: (slopes[name] * w).detach() for name, w in parameters.items()}
            for own, parts in zip(layers, totals, strict=True):
                for layer, total in zip(own, parts, strict=True):
                    total += np.square(sum(per_unit(products[p.tensor], p) for p in layer))
    return tuple(together(parts) for parts in totals)


def random(model: nn.Module, groups: Groups, *, seed: int = 0, **given: object) -> tuple[Scores, ...]:
    """Any order is as good as another: the baseline. Uniform draws from `seed`."""
    check_given(given)
    rng = np.random.default_rng(seed)
    return tuple(rng.random(len(pieces[0].positions)) for pieces in groups)


def some(batches: Iterable[Any], criterion: str, groups: Groups) -> list[Any]:
    """The batches that a criterion looks at.

    Raises:
        InputError: there are groups to rank and no batch.
    """
    found = list(batches)
    if len(groups) and not found:
        raise InputError(
            f"criterion={criterion} needs one training batch or more, got none: evaluator.recalibration is how many a "
            "search shows it, batches= what RatioTable.prune does"
        )
    return found


def _norm(model: nn.Module, groups: Groups, order: int, together: Together) -> tuple[Scores, ...]:
    def norm(values: Tensor, piece: Slice) -> Scores:
        return np.asarray(per_unit(values.abs() ** order, piece) ** (1 / order), dtype=np.float64)

    return _by_filters(model, groups, norm, together)


def _by_filters(
    model: nn.Module, groups: Groups, score: Callable[[Tensor, Slice], Scores], together: Together
) -> tuple[Scores, ...]:
    """Each group's scores from those of each weight that makes its units."""
    tensors = dict(model.named_parameters())
    return tuple(
        together([score(tensors[p.tensor].detach(), p) for p in pieces if p.role == "out"]) for pieces in groups
    )


def filters(values: Tensor, piece: Slice) -> Tensor:
    """What each unit owns of a tensor, [U, F], with its gradient."""
    dim = 0 if piece.dim == FLAT else piece.dim
    rows = (values.flatten() if piece.dim == FLAT else values).movedim(dim, 0)
    positions = torch.from_numpy(piece.positions.ravel()).to(values.device)
    return rows.index_select(0, positions).reshape(len(piece.positions), -1)


def _filters(values: Tensor, piece: Slice) -> Scores:
    found: Scores = filters(values, piece).double().cpu().numpy()
    return found


def _distances(rows: Scores) -> Scores:
    """Sum of the Euclidean distances from each row [U, F] to all others, [U]."""
    if rows.shape[1] == 1:  # single weights, of which there may be millions
        order = np.argsort(rows[:, 0], kind="stable")
        ascending, found = rows[order, 0], np.empty(len(rows))
        below, rank = np.cumsum(ascending) - ascending, np.arange(len(rows))
        found[order] = ascending * (2 * rank - len(rows)) + ascending.sum() - 2 * below
        return np.maximum(found, 0)
    squares = np.square(rows).sum(1)
    at_once = max(PAIRS // len(rows), 1)
    parts = [
        np.sqrt(np.maximum(squares[i : i + at_once, None] + squares - 2 * rows[i : i + at_once] @ rows.T, 0)).sum(1)
        for i in range(0, len(rows), at_once)
    ]
    return np.concatenate(parts)


def per_unit(values: Tensor, piece: Slice) -> Scores:
    """Sum of the values that each unit owns along the slice's dimension, [U]."""
    if piece.dim == FLAT:
        return np.asarray(values.flatten().double().cpu().numpy()[piece.positions].sum(axis=1), dtype=np.float64)
    along = values.movedim(piece.dim, 0).reshape(values.shape[piece.dim], -1).double().sum(1).cpu().numpy()
    return np.asarray(along[piece.positions].sum(axis=1), dtype=np.float64)


def is_scale(model: nn.Module, tensor: str) -> bool:
    """Whether a parameter is the scale of a batch or instance normalisation."""
    module, _, name = tensor.rpartition(".")
    return name == "weight" and isinstance(model.get_submodule(module), nn.modules.batchnorm._NormBase)


def _taylor_pieces(model: nn.Module, pieces: Sequence[Slice], tensors: dict[str, nn.Parameter]) -> list[Slice]:
    scales = {p.tensor.rpartition(".")[0] for p in pieces if p.tensor in tensors and is_scale(model, p.tensor)}
    shifts = [p for p in pieces if p.tensor.rpartition(".")[0] in scales and p.tensor in tensors and p.role == "with"]
    return shifts or made(pieces, tensors)


def made(pieces: Sequence[Slice], tensors: Mapping[str, nn.Parameter]) -> list[Slice]:
    """The filters and biases of the layers that make a group's units."""
    makers = {p.tensor.rpartition(".")[0] for p in pieces if p.role == "out"}
    return [p for p in pieces if p.role != "in" and p.tensor in tensors and p.tensor.rpartition(".")[0] in makers]


def by_layer(pieces: Sequence[Slice]) -> list[list[Slice]]:
    """The slices of each layer together, layers in the model's order."""
    found: dict[str, list[Slice]] = defaultdict(list)
    for piece in pieces:
        found[piece.tensor.rpartition(".")[0]].append(piece)
    return list(found.values())


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, these have gradients; afterwards those that had none have none again."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    given: tuple[Any, ...],
    target: Any,
    loss: Callable[[Any, Any], Tensor],
) -> dict[str, Tensor]:
    """Of the loss on one batch, by each parameter, the model being in evaluation mode."""
    with torch.enable_grad(), evaluating(model):
        gradients = torch.autograd.grad(
            loss(model(*given), target), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(parameters, gradients, strict=True))
