"""Each regularizer against numbers computed another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, reordered

from autoprune import components, regularizers
from autoprune.core import FLAT, InputError, Slice
from autoprune.space import trace
from autoprune.traced import tensors_of

ALL = components.names("regularizer")


def gradients(value: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters, allow_unused=True), strict=True))


def test_bn_l1_is_the_sum_of_the_scales_of_units_that_can_go_and_its_gradient_their_signs() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3),
        nn.BatchNorm2d(2),
    )  # fmt: skip
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([-2.0, 0.5, 0.0, 3.0]))
        model.get_parameter("6.weight").fill_(100)  # of the output, which stays whole
    value = regularizers.bn_l1(model, trace(model, (torch.randn(1, 1, 9, 9),)).slices, strength=0.1)
    assert value.item() == pytest.approx(0.55)
    found = gradients(value, model)
    scales = found.pop("1.weight")
    assert scales is not None
    assert torch.allclose(scales, torch.tensor([-0.1, 0.1, 0.0, 0.1]))
    assert not any(gradient is not None and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "densenet"])
def test_bn_l1_holds_every_scale_that_some_unit_owns_once(name: str) -> None:
    """The same from the dimensions that cutting all units of all groups would take away."""
    model = ZOO[name].build()
    with torch.no_grad():
        norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        for norm in norms.values():
            norm.weight.normal_()
    traced = trace(model, ZOO[name].inputs(2))
    removed = traced.removed([np.zeros(0, dtype=np.int64)] * len(traced.slices))
    wanted = sum(
        norm.weight[torch.from_numpy(removed[f"{n}.weight"][0])].abs().sum().item()
        for n, norm in norms.items()
        if f"{n}.weight" in removed
    )
    assert regularizers.bn_l1(model, traced.slices, strength=0.5).item() == pytest.approx(0.5 * wanted, rel=1e-5)


def coupled() -> tuple[nn.Module, tuple[Slice, ...]]:
    """Two layers, [3, 2] and [3, 1, 2], that make the same three units; all weights of the last are zero."""
    model = nn.ModuleList([nn.Linear(2, 3), nn.Conv1d(1, 3, 2)])
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[3.0, 0.0], [1.0, -1.0], [0.0, 0.0]]))
        model.get_parameter("1.weight").copy_(torch.tensor([[[0.0, 4.0]], [[1.0, 1.0]], [[0.0, 0.0]]]))
    units = np.arange(3)[:, None]
    return model, (
        Slice("0.weight", 0, "out", units), Slice("0.bias", 0, "with", units), Slice("1.weight", 0, "out", units)
    )  # fmt: skip


def test_group_lasso_takes_coupled_layers_together_and_has_no_gradient_at_zero() -> None:
    model, pieces = coupled()
    value = regularizers.group_lasso(model, [pieces], strength=0.5)
    assert value.item() == pytest.approx(0.5 * 2 * (5 + 2))  # norms 5, 2 and 0 of four weights each
    found = gradients(value, model)
    assert found["0.weight"] is not None
    assert found["1.weight"] is not None
    assert torch.allclose(found["0.weight"], torch.tensor([[0.6, 0.0], [0.5, -0.5], [0.0, 0.0]]))
    assert torch.allclose(found["1.weight"], torch.tensor([[[0.0, 0.8]], [[0.5, 0.5]], [[0.0, 0.0]]]))
    assert found["0.bias"] is None


def test_group_lasso_of_several_positions_a_unit_and_of_single_weights() -> None:
    model, _ = coupled()
    pair = Slice("0.weight", 1, "out", np.array([[1, 0]]))  # one unit of both columns
    assert regularizers.group_lasso(model, [(pair,)], strength=1).item() == pytest.approx((6 * 11) ** 0.5)
    single = Slice("0.weight", FLAT, "out", np.arange(6)[:, None])
    assert regularizers.group_lasso(model, [(single,)], strength=1).item() == pytest.approx(5)


@pytest.mark.parametrize("network", ["resnet", "mobilenetv2", "grouped", "unet"])
@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_follow_channels_that_are_reordered(name: str, network: str) -> None:
    torch.manual_seed(0)
    model, moved = ZOO[network].build(), ZOO[network].build()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.normal_()
    slices = trace(model, ZOO[network].inputs(2)).slices
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(pieces[0].positions)) for pieces in slices]
    moved.load_state_dict(model.state_dict() | reordered(dict(tensors_of(model)), slices, orders))
    function = components.bind(components.spec("regularizer", name), "regularizer", None, ())
    before, after = function(model, slices), function(moved, slices)
    assert before.item() == pytest.approx(after.item(), rel=1e-5)
    plain, permuted = (
        {k: g for k, g in gradients(v, m).items() if g is not None} for v, m in ((before, model), (after, moved))
    )
    assert plain.keys() == permuted.keys()
    assert any(g.any() for g in plain.values())
    for key, gradient in reordered(plain, slices, orders).items():
        assert torch.allclose(gradient, permuted[key], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "much", True])
def test_a_wrong_strength_is_refused(name: str, wrong: Any) -> None:
    model, pieces = coupled()
    with pytest.raises(InputError, match="regularizer: strength must be a number of 0 or more, got strength="):
        getattr(regularizers, name)(model, [pieces], strength=wrong)


def test_a_model_without_such_scales_is_refused_by_bn_l1() -> None:
    model = ZOO["vgg"].build()
    with pytest.raises(InputError, match="no prunable unit of this model passes through a batch normalisation with"):
        regularizers.bn_l1(model, trace(model, ZOO["vgg"].inputs(2)).slices)
