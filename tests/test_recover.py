from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.borrowing import seeded
from autoprune.core import InputError
from autoprune.recover import FineTune, Teacher, anchored, finetune, recalibrate


def data(n: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, generator=draw) * 3 + 5, torch.arange(16) % 2) for _ in range(n)]


def test_recalibration_gives_the_average_statistics_of_the_batches() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Linear(3, 2)).eval()
    weights = copy.deepcopy(model[1].state_dict())
    recalibrate(model, data())
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, torch.stack([x.mean(0) for x, _ in data()]).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, torch.stack([x.var(0) for x, _ in data()]).mean(0), atol=1e-4)
    assert norm.momentum == 0.1
    assert not model.training
    assert all(torch.equal(weights[k], v) for k, v in model[1].state_dict().items())


def normalising(affine: bool = True) -> nn.Module:
    """A network with statistics that its inputs do not have."""
    norm, linear = nn.BatchNorm1d(3, affine=affine), nn.Linear(3, 2)
    with torch.no_grad():
        if affine:
            norm.weight.copy_(torch.tensor([1.0, -2.0, 0.0]))
            norm.bias.copy_(torch.tensor([0.5, 0.0, 3.0]))
        linear.weight.copy_(torch.tensor([[5.0, 0.1, 0.2], [-5.0, 0.0, 0.0]]))
        linear.bias.zero_()
    return nn.Sequential(norm, linear).eval()


def test_statistics_of_other_data_are_replaced_and_made_up_for() -> None:
    x = data()[0][0]
    model = normalising()
    batches = [(x, model(x).argmax(1))]
    before = copy.deepcopy(model.state_dict())
    other = anchored(model, batches, F.cross_entropy)
    assert other is not model
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    new = data()[1][0]
    assert torch.allclose(other(new), model(new), rtol=1e-4, atol=1e-4)
    assert torch.allclose(other.get_buffer("0.running_mean"), x.mean(0))
    assert torch.allclose(other.get_buffer("0.running_var"), x.var(0))
    recalibrate(other, batches)
    assert torch.allclose(other(new), model(new), rtol=1e-4, atol=1e-4), "new statistics change nothing"
    recalibrate(model, batches)
    assert not torch.allclose(other(new), model(new), atol=1.0), "as they do in the model"


def test_statistics_of_the_data_and_networks_without_any_are_left_alone() -> None:
    x = data()[0][0]
    own = normalising()
    recalibrate(own, [(x, None)])
    for model in (own, nn.Linear(3, 2)):
        assert anchored(model, [(x, model(x).argmax(1))], F.cross_entropy) is model
    model = normalising(affine=False)
    other = anchored(model, [(x, model(x).argmax(1))], F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_recalibration_without_normalisation_changes_nothing() -> None:
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, data())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def trained(plan: FineTune, seed: int = 0, teacher: nn.Module | Teacher | None = None) -> nn.Module:
    with seeded(5):
        model = nn.Linear(3, 2)
    with seeded(seed):
        finetune(model, data(), plan, loss=F.cross_entropy, lr=1.0, teacher=teacher)
    return model


def test_fine_tuning_lowers_the_loss_and_counts_its_steps() -> None:
    with seeded(5):
        before = F.cross_entropy(nn.Linear(3, 2)(data()[0][0]), data()[0][1])
    steps: list[tuple[int, int]] = []
    with seeded(5):
        model = nn.Linear(3, 2)
    plan = FineTune(epochs=2.5, teach=0)
    finetune(model, data(), plan, loss=F.cross_entropy, lr=0.5, on_step=lambda *s: steps.append(s))
    assert steps == [(i, 10) for i in range(1, 11)]
    assert F.cross_entropy(model(data()[0][0]), data()[0][1]) < before


@pytest.mark.parametrize(
    ("momentum", "steps", "used"),
    [(0.01, 20, 0.1), (0.01, 400, 0.025), (0.3, 20, 0.3), (None, 20, 0.1), (0.0, 20, 0.0)],
)
def test_running_statistics_keep_up_with_a_short_fine_tune(momentum: float | None, steps: int, used: float) -> None:
    norm = nn.BatchNorm1d(3, momentum=momentum)
    seen: list[float | None] = []
    norm.register_forward_pre_hook(lambda *_: seen.append(norm.momentum))
    finetune(nn.Sequential(norm, nn.Linear(3, 2)), data(), FineTune(epochs=steps / 4), loss=F.cross_entropy, lr=0.1)
    assert seen == [pytest.approx(used)] * steps
    assert norm.momentum == momentum


def test_a_teacher_changes_what_is_learnt_and_is_not_changed() -> None:
    with seeded(9):
        teacher = nn.Linear(3, 2)
    before = copy.deepcopy(teacher.state_dict())
    alone, taught = trained(FineTune(epochs=1, teach=0.9)), trained(FineTune(epochs=1, teach=0.9), teacher=teacher)
    assert not torch.equal(alone.get_parameter("weight"), taught.get_parameter("weight"))
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


class Counted(nn.Linear):
    calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(inputs)


@pytest.mark.parametrize(("remembered", "calls"), [(0, 8), (2 * 16 * 2 * 4, 6), (10**6, 4)])
def test_a_teacher_remembers_what_it_said_and_says_the_same(remembered: int, calls: int) -> None:
    with seeded(9):
        model = Counted(3, 2)
    Counted.calls = 0
    teacher = Teacher(model, remembered=remembered)
    plan = FineTune(epochs=1, teach=0.9)
    taught = [trained(plan, teacher=teacher), trained(plan, teacher=teacher)]
    assert Counted.calls == calls  # of 4 batches a fine-tune, each answer 16 x 2 floats
    fresh = trained(plan, teacher=model)
    assert all(torch.equal(each.get_parameter("weight"), fresh.get_parameter("weight")) for each in taught)


def test_a_diverging_fine_tune_says_so() -> None:
    with pytest.raises(FloatingPointError, match="the loss became"):
        finetune(
            nn.Linear(3, 2),
            data(),
            FineTune(epochs=9, lr_fraction=1, teach=0),
            loss=lambda o, t: o.sum() * 1e38,
            lr=1e30,
        )


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"epochs": 1, "lr_fraction": 0}, {"epochs": 1, "teach": 1.5}])
def test_a_wrong_plan_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must hold, got"):
        FineTune(**wrong)


def test_seeding_repeats_and_restores() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    python, numpy, torch_state = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    with seeded(4):
        first = draw()
    with seeded(4):
        second = draw()
    assert first == second
    assert random.getstate() == python
    assert repr(np.random.get_state()) == numpy
    assert torch.equal(torch.get_rng_state(), torch_state)
