"""Each criterion against numbers computed another way."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autoprune import criteria
from autoprune.core import Slice
from autoprune.space import trace

LAYER = (Slice("0.weight", 0, "out", np.arange(3)[:, None]), Slice("2.weight", 1, "in", np.arange(3)[:, None]))


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.5, 0.0]]))  # type: ignore[operator]
        model[2].weight.copy_(torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]]))  # type: ignore[operator]
    return model


def test_l1_and_l2_are_the_norms_of_the_filters_over_their_mean() -> None:
    (first,) = criteria.l1(network(), [LAYER])
    assert np.allclose(first, np.array([3, 7, 0.5]) / 3.5)
    (second,) = criteria.l2(network(), [LAYER])
    norms = np.array([np.sqrt(5), 5.0, 0.5])
    assert np.allclose(second, norms / norms.mean())


def test_coupled_layers_speak_equally_loud() -> None:
    """Scaling one of the layers that make a group does not change the ranking."""
    model = nn.ModuleList([nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)])
    pieces = [Slice(f"{i}.weight", 0, "out", np.arange(3)[:, None]) for i in (0, 1)]
    (before,) = criteria.l1(model, [pieces])
    with torch.no_grad():
        model.get_parameter("1.weight").mul_(1000)
    (after,) = criteria.l1(model, [pieces])
    assert np.allclose(before, after)


def test_bn_scale_is_gamma_and_l1_where_there_is_none() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3)
    )
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([-2.0, 1.0, 3.0]))
    groups = trace(model, (torch.randn(1, 1, 8, 8),)).slices
    normed, plain = criteria.bn_scale(model, groups)
    assert np.allclose(normed, np.array([2, 1, 3]) / 2)
    assert np.allclose(plain, criteria.l1(model, groups)[1])


def test_taylor_is_the_squared_gradient_times_weight_per_batch() -> None:
    model = network()
    batches = [(torch.randn(5, 2, generator=torch.Generator().manual_seed(i)), torch.arange(5) % 2) for i in (0, 1)]
    (scores,) = criteria.taylor(model, [LAYER], batches=batches, loss=F.cross_entropy)
    expected = np.zeros(3)
    for x, y in batches:
        gate = torch.ones(3, requires_grad=True)  # the derivative by a gate on the unit's output is sum of g * w
        F.cross_entropy(model[2](F.relu(model[0](x) * gate)), y).backward()
        assert gate.grad is not None
        expected += gate.grad.numpy() ** 2
    assert np.allclose(scores, expected, rtol=1e-4)


def test_random_depends_on_the_seed_alone() -> None:
    assert np.array_equal(
        criteria.random(network(), [LAYER], seed=1)[0], criteria.random(network(), [LAYER], seed=1)[0]
    )
    assert not np.array_equal(
        criteria.random(network(), [LAYER], seed=1)[0], criteria.random(network(), [LAYER], seed=2)[0]
    )
