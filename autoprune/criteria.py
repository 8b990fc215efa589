"""Importance of units: which ones of a group go first at a given ratio. Small functions, one a criterion.

Each takes (model, groups, batches, loss, seed) and returns one array [U] a group, higher is more important; groups
holds the slices that each group owns. Scores are compared inside a group only. A group whose units are made by several
layers (a residual stream) takes the mean over them, each layer's scores being divided by their mean first, so that no
layer speaks louder for its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.borrowing import arguments, evaluating
from autoprune.core import FLAT, Slice

Scores = NDArray[np.float64]
Groups = Sequence[Sequence[Slice]]


class Criterion(Protocol):
    """See the module's docstring; a criterion uses of the arguments what it needs."""

    def __call__(
        self, model: nn.Module, groups: Groups, *, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor], seed: int
    ) -> tuple[Scores, ...]: ...


def l1(model: nn.Module, groups: Groups, **_: object) -> tuple[Scores, ...]:
    """Sum of absolute weights of the filter that makes the unit (Li et al., ICLR 2017, arXiv 1608.08710)."""
    return _norm(model, groups, 1)


def l2(model: nn.Module, groups: Groups, **_: object) -> tuple[Scores, ...]:
    """Euclidean norm of the filter that makes the unit."""
    return _norm(model, groups, 2)


def bn_scale(model: nn.Module, groups: Groups, **_: object) -> tuple[Scores, ...]:
    """|gamma| of the unit's batch normalisations (network slimming; Liu et al., ICCV 2017, arXiv 1708.06519).

    Units that pass through no normalisation with a scale are ranked by l1.
    """
    tensors = dict(model.named_parameters())
    scores = []
    for pieces in groups:
        scales = [p for p in pieces if p.role == "with" and p.tensor in tensors and _is_scale(model, p.tensor)]
        parts = [_per_unit(tensors[p.tensor].detach().abs(), p) for p in scales]
        scores.append(_mean_of_layers(parts) if parts else _norm(model, [pieces], 1)[0])
    return tuple(scores)


def taylor(
    model: nn.Module, groups: Groups, *, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor], seed: int = 0
) -> tuple[Scores, ...]:
    """First-order change of the loss if the unit were zero, (sum of gradient x value)^2 summed over mini-batches.

    Molchanov et al., CVPR 2019, arXiv 1906.10771, equation 8, on the scale and shift of the unit's normalisations as
    they advise, and on the filter and bias that make it where there are none. The model is run in evaluation mode.
    """
    tensors = dict(model.named_parameters())
    chosen = [_taylor_pieces(model, pieces, tensors) for pieces in groups]
    parameters = {p.tensor: tensors[p.tensor] for pieces in chosen for p in pieces}
    totals = [np.zeros(len(pieces[0].positions)) for pieces in groups]
    frozen = [p for p in parameters.values() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        for inputs, target in batches:
            with torch.enable_grad(), evaluating(model):
                gradients = torch.autograd.grad(
                    loss(model(*arguments(inputs)), target),
                    list(parameters.values()),
                    allow_unused=True,
                    materialize_grads=True,
                )
            products = {name: (g * w).detach() for (name, w), g in zip(parameters.items(), gradients, strict=True)}
            for total, pieces in zip(totals, chosen, strict=True):
                total += np.square(sum(_per_unit(products[p.tensor], p) for p in pieces))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return tuple(totals)


def random(model: nn.Module, groups: Groups, *, seed: int = 0, **_: object) -> tuple[Scores, ...]:
    """Any order is as good as another: the baseline. Uniform draws from `seed`."""
    rng = np.random.default_rng(seed)
    return tuple(rng.random(len(pieces[0].positions)) for pieces in groups)


def _norm(model: nn.Module, groups: Groups, order: int) -> tuple[Scores, ...]:
    tensors = dict(model.named_parameters())
    scores = []
    for pieces in groups:
        parts = [
            _per_unit(tensors[p.tensor].detach().abs() ** order, p) ** (1 / order) for p in pieces if p.role == "out"
        ]
        scores.append(_mean_of_layers(parts))
    return tuple(scores)


def _per_unit(values: Tensor, piece: Slice) -> Scores:
    """Sum of the values that each unit owns along the slice's dimension, [U]."""
    if piece.dim == FLAT:
        return np.asarray(values.flatten().double().cpu().numpy()[piece.positions].sum(axis=1), dtype=np.float64)
    along = values.movedim(piece.dim, 0).reshape(values.shape[piece.dim], -1).double().sum(1).cpu().numpy()
    return np.asarray(along[piece.positions].sum(axis=1), dtype=np.float64)


def _mean_of_layers(parts: Sequence[Scores]) -> Scores:
    return np.asarray(np.mean([part / max(float(part.mean()), 1e-30) for part in parts], axis=0), dtype=np.float64)


def _is_scale(model: nn.Module, tensor: str) -> bool:
    module, _, name = tensor.rpartition(".")
    return name == "weight" and isinstance(model.get_submodule(module), nn.modules.batchnorm._NormBase)


def _taylor_pieces(model: nn.Module, pieces: Sequence[Slice], tensors: dict[str, nn.Parameter]) -> list[Slice]:
    scales = {p.tensor.rpartition(".")[0] for p in pieces if p.tensor in tensors and _is_scale(model, p.tensor)}
    shifts = [p for p in pieces if p.tensor.rpartition(".")[0] in scales and p.tensor in tensors and p.role == "with"]
    makers = {p.tensor.rpartition(".")[0] for p in pieces if p.role == "out"}
    made = [p for p in pieces if p.role != "in" and p.tensor in tensors and p.tensor.rpartition(".")[0] in makers]
    return shifts or made
