"""What every criterion owes, and fakes that break one rule each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoprune.borrowing import seeded
from autoprune.core import (
    Slice,
)
from autoprune.criteria import Criterion
from autoprune.testing.worlds import random_state


class CriterionContract:
    """What every criterion owes: one finite score a unit, the same twice, following its unit, the model untouched."""

    def make(self) -> Criterion:
        """Your criterion."""
        raise AssertionError("override make()")

    #: whether scores follow their unit when units are reordered; a random criterion's do not
    equivariant = True

    def _scores(self, model: nn.Module, scale: float = 1.0) -> tuple[NDArray[np.float64], ...]:
        noise = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
        batches = [(scale * inputs, torch.arange(8) % 3) for inputs in noise]
        return self.make()(model, _GROUPS, batches=batches, loss=nn.functional.cross_entropy, seed=0)

    def test_one_finite_score_a_unit(self) -> None:
        (scores,) = self._scores(two_layers())
        assert scores.shape == (6,)
        assert np.isfinite(scores).all()

    def test_dead_units_are_finite_too(self) -> None:
        model = two_layers()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert np.isfinite(self._scores(model)[0]).all()

    def test_constant_inputs_are_finite_too(self) -> None:
        assert np.isfinite(self._scores(two_layers(), scale=0.0)[0]).all()

    def test_same_twice_and_nothing_touched(self) -> None:
        model = two_layers()
        before, state, mode = copy.deepcopy(model.state_dict()), random_state(), model.training
        first, second = self._scores(model), self._scores(model)
        assert np.array_equal(first[0], second[0])
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert random_state() == state
        assert model.training == mode
        assert all(p.grad is None for p in model.parameters())

    def test_scores_follow_their_units(self) -> None:
        if not self.equivariant:
            return
        order = [3, 0, 5, 1, 4, 2]
        (plain,), (moved,) = self._scores(two_layers()), self._scores(two_layers(order))
        assert np.allclose(moved, plain[order], rtol=1e-4)


_GROUPS = (
    (
        Slice("0.weight", 0, "out", np.arange(6)[:, None]),
        Slice("0.bias", 0, "with", np.arange(6)[:, None]),
        Slice("1.weight", 0, "with", np.arange(6)[:, None]),
        Slice("1.bias", 0, "with", np.arange(6)[:, None]),
        Slice("1.running_mean", 0, "with", np.arange(6)[:, None]),
        Slice("1.running_var", 0, "with", np.arange(6)[:, None]),
        Slice("3.weight", 1, "in", np.arange(6)[:, None]),
    ),
)


def two_layers(order: Sequence[int] = range(6)) -> nn.Sequential:
    """Linear, batch norm, ReLU, linear with fixed weights, its six hidden units in this order."""
    with seeded(0):
        norm = nn.BatchNorm1d(6)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "3.weight":
                tensor.copy_(tensor[:, list(order)])
            elif not name.startswith("3") and tensor.dim():
                tensor.copy_(tensor[list(order)])
    return model


def nan_for_dead_units(model: nn.Module, groups: Any, **_: Any) -> tuple[NDArray[np.float64], ...]:
    """Fake criterion: divides by the sum."""
    weight = dict(model.named_parameters())["0.weight"].detach().abs().sum(1).double().numpy()
    with np.errstate(invalid="ignore"):
        return (weight / weight.sum(),)


def nan_for_constant_inputs(
    model: nn.Module, groups: Any, *, batches: Any, **_: Any
) -> tuple[NDArray[np.float64], ...]:
    """Fake criterion: divides by how much the inputs vary."""
    with torch.no_grad():
        made = torch.cat([model.get_submodule("0")(inputs) for inputs, _ in batches])
    return ((made.std(0) / torch.cat([inputs for inputs, _ in batches]).std()).double().numpy(),)


def one_too_few(model: nn.Module, groups: Any, **_: Any) -> tuple[NDArray[np.float64], ...]:
    """Fake criterion: forgets the last unit."""
    return (np.arange(5.0),)


def by_position(model: nn.Module, groups: Any, **_: Any) -> tuple[NDArray[np.float64], ...]:
    """Fake criterion: the unit's number."""
    return (np.arange(6.0),)


def moves_weights(model: nn.Module, groups: Any, **_: Any) -> tuple[NDArray[np.float64], ...]:
    """Fake criterion: changes the model it looks at."""
    with torch.no_grad():
        weight = dict(model.named_parameters())["0.weight"].mul_(0.5)
    return (weight.detach().abs().sum(1).double().numpy(),)
