"""Sparsity before the search: what is added to the loss so that training silences whole units. One function each.

A regularizer takes (model, groups) and its settings and returns a scalar with its gradient, anew at each step of the
training; groups holds the slices that each group owns. What it adds is `strength` x a sum over the units of all groups.

Letters: U units of a group, F weights that make one unit.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoprune.core import InputError, check_rules, is_number
from autoprune.criteria import Groups, filters, is_scale

RANKED_BY = {"bn_l1": "bn_scale", "group_lasso": "l2"}  # the criterion that tells which units it has silenced


class Regularizer(Protocol):
    """See the module's docstring."""

    def __call__(self, model: nn.Module, groups: Groups, **settings: Any) -> Tensor: ...


def bn_l1(model: nn.Module, groups: Groups, *, strength: float = 0.005) -> Tensor:
    """strength x sum of |gamma| over the scales of the batch normalisations that prunable units pass through.

    Network slimming: Liu et al., ICCV 2017, arXiv 1708.06519, equation 1, for the scales of units that can go alone. It
    is a penalty in the loss; its gradient, strength x sign(gamma) and 0 at 0, is the subgradient that the authors' code
    adds to gamma's.

    Raises:
        InputError: no prunable unit has such a scale.
    """
    _check_strength(strength)
    tensors = dict(model.named_parameters())
    scales = [
        filters(tensors[p.tensor], p)
        for pieces in groups
        for p in pieces
        if p.role == "with" and p.tensor in tensors and is_scale(model, p.tensor)
    ]
    if not scales:
        raise InputError(
            "regularizer=bn_l1: no prunable unit of this model passes through a batch normalisation with a scale; "
            "regularizer=group_lasso needs none"
        )
    return strength * torch.stack([gamma.abs().sum() for gamma in scales]).sum()


def group_lasso(model: nn.Module, groups: Groups, *, strength: float = 0.0003) -> Tensor:
    """strength x sum over units of sqrt(F) x ||the F weights that make the unit||_2, those of coupled layers together.

    Structured sparsity learning: Wen et al., NIPS 2016, arXiv 1608.03665, equation 1, with a group for each prunable
    unit and the sqrt(F) of the first group lasso (Yuan and Lin, J. R. Stat. Soc. B 68, 2006), so that units of many
    weights are held back as much as those of few. The gradient at zero is zero: what is silent may stay so. Where a
    batch normalisation follows, the length of a filter does not matter to the output; bn_l1 is made for those.
    """
    _check_strength(strength)
    tensors = dict(model.named_parameters())
    norms = []
    for pieces in groups:
        own = torch.cat([filters(tensors[p.tensor], p) for p in pieces if p.role == "out"], dim=1)  # [U, F]
        norms.append(math.sqrt(own.shape[1]) * torch.linalg.vector_norm(own, dim=1).sum())
    return strength * torch.stack(norms).sum()


def _check_strength(strength: object) -> None:
    kept = is_number(strength) and strength >= 0  # type: ignore[operator]
    check_rules("regularizer", {"strength must be a number of 0 or more": kept}, {"strength": strength})
