"""Sparsity learning: what a training with a regularizer does to a model, and what it leaves alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

import autoprune
from autoprune import Task, training
from autoprune.borrowing import seeded
from autoprune.core import InputError, Slice
from autoprune.recover import FineTune, finetune
from autoprune.space import Space
from autoprune.tasks.resnet import ResNet

PLAN = FineTune(epochs=6, lr_fraction=1, teach=0)


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Which side of a line? Two of eight numbers tell."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(64 * count, 8, generator=draw)
    return list(zip(x.split(64), (x[:, 0] + x[:, 1] > 0).long().split(64), strict=True))


def network(norm: bool = True) -> nn.Sequential:
    with seeded(0):
        layers = [nn.Linear(8, 32), *([nn.BatchNorm1d(32)] if norm else []), nn.ReLU(), nn.Linear(32, 2)]
        return nn.Sequential(*layers)


def task(model: nn.Module, **others: Any) -> Task:
    values: dict[str, Any] = {
        "name": "lines",
        "model": model,
        "inputs": (batches(1, 3)[0][0][:2],),
        "train": batches(20, 0),
        "search": batches(2, 1),
        "test": batches(4, 2),
        "loss": F.cross_entropy,
        "metric": MulticlassAccuracy(2, average="micro"),
        "lr": 0.1,
    }
    return Task(**values | others)


def regularizer(name: str, strength: float) -> dict[str, Any]:
    return {"_target_": f"autoprune.regularizers.{name}", "strength": strength}


def states_are_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def unit_sizes(model: nn.Module, name: str) -> Tensor:
    parameter = model.get_parameter("1.weight" if name == "bn_l1" else "0.weight").detach()
    return parameter.abs() if name == "bn_l1" else parameter.norm(dim=1)


@pytest.mark.parametrize(("name", "strength"), [("bn_l1", 0.02), ("group_lasso", 0.005)])
def test_training_silences_units_that_plain_training_keeps(name: str, strength: float) -> None:
    model = network(norm=name == "bn_l1")
    sparse, plain = (autoprune.train(task(model), regularizer=regularizer(name, s), plan=PLAN) for s in (strength, 0))
    small, kept = (unit_sizes(t.model, name).sort().values for t in (sparse, plain))
    assert small[:16].sum() < 0.05 * kept[:16].sum()
    assert small[-1] > 0.5 * kept[-1]
    (group,) = sparse.groups.values()
    assert group.units == 32
    assert group.before == 0
    assert group.after == int((unit_sizes(sparse.model, name) <= 0.01 * small[-1]).sum()) >= 8
    assert sparse.share("after") == group.after / 32
    assert sparse.test_before < 0.8
    assert sparse.test_after > 0.9


def test_strength_zero_is_training_without_a_regularizer_bit_for_bit() -> None:
    model = network()
    trained = training.train(task(model), regularizer=regularizer("bn_l1", 0), plan=PLAN, seed=3)
    plain = copy.deepcopy(model)
    with seeded(3):
        finetune(plain, task(model).train, PLAN, loss=F.cross_entropy, lr=0.1)
    assert states_are_equal(trained.model, plain)
    other = training.train(task(model), regularizer=regularizer("bn_l1", 1e-4), plan=PLAN, seed=3)
    assert not states_are_equal(other.model, plain)


def test_the_users_model_and_the_global_generators_are_left_alone() -> None:
    model = network()
    before, modes = copy.deepcopy(model), [m.training for m in model.modules()]
    state = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    trained = training.train(task(model), plan=PLAN)
    assert not states_are_equal(trained.model, model)
    assert states_are_equal(model, before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert (random.getstate(), repr(np.random.get_state())) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])
    again = training.train(task(model), plan=PLAN)
    assert states_are_equal(trained.model, again.model)


def test_what_is_frozen_stays_and_what_is_frozen_as_a_whole_is_trained() -> None:
    model = network()
    model[0].requires_grad_(False)
    trained = training.train(task(model), regularizer=regularizer("bn_l1", 0.02), plan=PLAN)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(trained.model.get_parameter(name), model.get_parameter(name))
    assert trained.share("after") > 0
    whole = network().requires_grad_(False)
    assert training.train(task(whole), regularizer=regularizer("bn_l1", 0.02), plan=PLAN).share("after") > 0
    model = network()
    model[1].requires_grad_(False)
    with pytest.raises(InputError, match="bn_l1 depends on no parameter that is trained"):
        training.train(task(model))


class Named(nn.Module):
    """Two inputs by name, a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(), nn.Linear(2, 1)

    def forward(self, *, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"value": self.head(self.body(torch.cat([left, right], 1)))}


class SumError(MeanSquaredError):
    """Takes the dictionaries apart."""

    def update(self, output: Any, target: Any) -> None:
        super().update(output["value"], target["sum"])


class Learning(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
        return (self.scale * (output["value"] - target["sum"])).square().mean()


def test_dictionaries_and_a_loss_of_ones_own() -> None:
    with seeded(1):
        model, loss = Named(), Learning()

    def split(count: int, seed: int) -> list[Any]:
        return [
            ({"right": x[:, 4:], "left": x[:, :4]}, {"sum": x[:, :2].sum(1, keepdim=True)})
            for x, _ in batches(count, seed)
        ]

    given = task(
        model,
        inputs={"left": torch.randn(2, 4), "right": torch.randn(2, 4)},
        train=split(20, 0),
        search=split(2, 1),
        test=split(4, 2),
        loss=loss,
        metric=SumError(),
        lr=0.05,
    )
    trained = training.train(given, regularizer=regularizer("bn_l1", 0.1), plan=PLAN)
    assert trained.test_after < 0.5 * trained.test_before
    assert {n: g.units for n, g in trained.groups.items()} == {"body.0": 32, "body.3": 2}
    assert trained.share("after") > 0.1
    inputs, _ = given.test[0]  # type: ignore[index]
    assert trained.model(**inputs)["value"].shape == (64, 1)
    assert type(trained.model) is Named
    assert loss.scale.item() == 1


def raises(model: nn.Module, groups: Any) -> Tensor:
    raise RuntimeError("no")


def a_vector(model: nn.Module, groups: Any) -> Tensor:
    return model.get_parameter("1.weight")


def no_gradient(model: nn.Module, groups: Any) -> Tensor:
    return model.get_parameter("1.weight").detach().sum()


def upward(model: nn.Module, groups: Any, *, by: float) -> Tensor:
    (pieces,) = groups
    assert {p.tensor for p in pieces} >= {"0.weight", "1.weight", "3.weight"}
    return -by * model.get_parameter("1.weight").sum()


def test_a_regularizer_of_ones_own() -> None:
    more = training.train(task(network()), regularizer={"_target_": f"{__name__}.upward", "by": 0.1}, plan=PLAN)
    less = training.train(task(network()), regularizer=regularizer("bn_l1", 0), plan=PLAN)
    assert (more.model.get_parameter("1.weight") > less.model.get_parameter("1.weight") + 0.1).all()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("bn_l3", "unknown regularizer 'bn_l3': it must be one of bn_l1, group_lasso"),
        ({"_target_": "autoprune.regularizers.bn_l1", "sternth": 1}, "it takes strength"),
        ({"_target_": f"{__name__}.raises"}, "raised RuntimeError: no (test_training.py:"),
        ({"_target_": f"{__name__}.a_vector"}, "must return a finite scalar tensor"),
        ({"_target_": f"{__name__}.no_gradient"}, "depends on no parameter that is trained"),
        (regularizer("bn_l1", 1e37), "a lower regularizer.strength or training.lr_fraction may help"),
    ],
)
def test_a_wrong_regularizer_is_refused(values: Any, says: str) -> None:
    with pytest.raises(InputError) as refused:
        training.train(task(network()), regularizer=values, plan=PLAN)
    assert says in str(refused.value)


def test_a_model_in_which_it_finds_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="no prunable unit of this model passes through a batch normalisation"):
        training.train(task(network(norm=False)))


def test_single_weights_fall_silent_too() -> None:
    model = network(norm=False)
    given: dict[str, Any] = {"plan": PLAN, "space": Space(grain=("weight",))}
    trained = training.train(task(model), regularizer=regularizer("group_lasso", 0.005), **given)
    assert {n: g.units for n, g in trained.groups.items()} == {"0": 256, "2": 64}
    plain = training.train(task(model), regularizer=regularizer("group_lasso", 0), **given)
    assert trained.share("after") > 0.4 > 0.1 > plain.share("after")


def test_blocks_alone_are_refused() -> None:
    model = ResNet(depth=8, width=4, channels=1)
    image = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    blocks = [(image, torch.arange(2))]
    given = task(model, inputs=(image,), train=blocks, search=blocks, test=blocks, metric=MulticlassAccuracy(10))
    with pytest.raises(InputError, match="a block has no units to be silenced one by one"):
        training.train(given, space=Space(grain=("block",)))


def test_statistics_of_other_data_are_made_up_for_first() -> None:
    model = training.train(task(network()), regularizer=regularizer("bn_l1", 0), plan=PLAN).model
    foreign = copy.deepcopy(model)
    mean, deviation = foreign.get_buffer("1.running_mean"), foreign.get_buffer("1.running_var").sqrt()
    with torch.no_grad():
        foreign.get_parameter("1.bias").add_(foreign.get_parameter("1.weight") * 5 / deviation)
        mean.add_(5)
    trained = training.train(task(foreign), plan=FineTune(epochs=0)).model
    x, _ = batches(1, 4)[0]
    assert torch.allclose(foreign(x), model(x), atol=1e-3)
    assert torch.allclose(trained(x), model(x), atol=1e-3)
    assert torch.allclose(trained.get_buffer("1.running_mean"), mean - 5, atol=0.3)


def test_near_zero_is_by_scale_or_by_filter_whichever_is_smaller() -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.BatchNorm1d(4))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[1.0], [-100.0], [50.0], [60.0]]))
        model.get_parameter("1.weight").copy_(torch.tensor([2.0, 2.0, -0.01, 0.03]))
    units = np.arange(4)[:, None]
    pieces = [Slice("0.weight", 0, "out", units), Slice("1.weight", 0, "with", units)]
    assert training.near_zero(model, [pieces]) == [2]  # the first by its filter, the third by its scale
    nn.init.zeros_(model.get_parameter("0.weight"))
    assert training.near_zero(model, [pieces]) == [4]
