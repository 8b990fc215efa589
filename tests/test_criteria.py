"""Each criterion against numbers computed another way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, reordered

from autoprune import components, criteria, curvature, reconstruct
from autoprune.core import FLAT, InputError, Slice
from autoprune.keywords import unnamed
from autoprune.space import trace
from autoprune.traced import tensors_of

LAYER = (Slice("0.weight", 0, "out", np.arange(3)[:, None]), Slice("2.weight", 1, "in", np.arange(3)[:, None]))


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.5, 0.0]]))  # type: ignore[operator]
        model[2].weight.copy_(torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]]))  # type: ignore[operator]
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO[name].build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model


def filters(model: nn.Module, piece: Slice) -> list[Any]:
    """The weights of each unit, one by one."""
    weight = model.get_parameter(piece.tensor).detach().double().numpy()
    return [np.concatenate([np.take(weight, i, axis=piece.dim).ravel() for i in own]) for own in piece.positions]


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
    unscaled = criteria.bn_scale(model, groups, normalise="none")[1]
    assert np.array_equal(unscaled, criteria.l1(model, groups, normalise="none")[1])


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


@pytest.mark.parametrize("name", ["resnet", "grouped", "unet"])
def test_lp_fpgm_and_lamp_are_what_loops_over_the_filters_give(name: str) -> None:
    model = seeded_model(name)
    for pieces in trace(model, ZOO[name].inputs(2)).slices:
        wanted: dict[str, list[Any]] = {"lp": [], "fpgm": [], "lamp": []}
        for own in (filters(model, piece) for piece in pieces if piece.role == "out"):
            squares = [float((f * f).sum()) for f in own]
            wanted["lp"].append([sum(abs(w) ** 3 for w in f) ** (1 / 3) for f in own])
            wanted["fpgm"].append([sum(np.linalg.norm(f - g) for g in own) for f in own])
            wanted["lamp"].append([s / sum(t for t in squares if t >= s) for s in squares])
        found = {
            "lp": criteria.lp(model, [pieces], p=3.0),
            "fpgm": criteria.fpgm(model, [pieces]),
            "lamp": criteria.lamp(model, [pieces]),
        }
        for criterion, layers in wanted.items():
            mean = np.mean([np.array(layer) / np.mean(layer) for layer in layers], axis=0)
            assert np.allclose(found[criterion][0], mean, rtol=1e-5), criterion


def test_lp_of_one_and_two_are_l1_and_l2_and_no_p_overflows() -> None:
    assert np.allclose(criteria.lp(network(), [LAYER], p=1)[0], criteria.l1(network(), [LAYER])[0])
    assert np.allclose(criteria.lp(network(), [LAYER], p=2)[0], criteria.l2(network(), [LAYER])[0])
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1e30)
    (found,) = criteria.lp(model, [LAYER], p=100, normalise="max")
    assert np.allclose(found, np.array([2, 4, 0.5]) / 4, rtol=0.01)  # nearly the largest weight of each
    assert np.isfinite(criteria.lp(model, [LAYER], p=0.1)[0]).all()


def test_fpgm_in_parts_and_of_single_weights_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    (whole,) = criteria.fpgm(model, [LAYER])
    monkeypatch.setattr(criteria, "PAIRS", 4)
    assert np.array_equal(criteria.fpgm(model, [LAYER])[0], whole)
    single = Slice("0.weight", FLAT, "out", np.arange(6)[:, None])
    values = [1.0, -2.0, 3.0, 4.0, 0.5, 0.0]
    sums = [sum(abs(v - w) for w in values) for v in values]
    assert np.allclose(criteria.fpgm(model, [(single,)], normalise="none")[0], sums)


def test_a_filter_that_others_can_stand_for_goes_first_by_fpgm_whatever_its_norm() -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[9.0, 9.0], [8.0, 9.0], [10.0, 9.0], [0.1, 0.0]]))
    piece = Slice("0.weight", 0, "out", np.arange(4)[:, None])
    assert criteria.fpgm(model, [(piece,)])[0].argmin() == 0
    assert criteria.l2(model, [(piece,)])[0].argmin() == 3


def test_equal_filters_have_equal_lamp() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0], [2.0, 0.0]]))
    (found,) = criteria.lamp(model, [LAYER], normalise="none")
    assert np.allclose(found, [2 / 8, 2 / 8, 1])


def test_hessian_is_half_the_mean_squared_gradient_times_the_squared_weight() -> None:
    """In closed form for a linear layer and half the squared error: the gradient of w_ij is (y_i - t_i) x_j."""
    model = nn.Sequential(nn.Linear(2, 3))
    pieces = (Slice("0.weight", 0, "out", np.arange(3)[:, None]), Slice("0.bias", 0, "with", np.arange(3)[:, None]))
    x, t = noise(10, 2), noise(10, 3, seed=1)
    weight, bias = (p.detach().numpy() for p in model.parameters())
    error = x.numpy() @ weight.T + bias - t.numpy()
    wanted = ((error[:, :, None] * x.numpy()[:, None, :]) ** 2).mean(0) * weight**2 / 2
    total = wanted.sum(1) + (error**2).mean(0) * bias**2 / 2

    def halved(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum() / (2 * len(output))

    def scores(batches: Iterable[Any], **settings: Any) -> Any:
        return curvature.hessian(model, [pieces], batches=batches, loss=halved, **settings)[0]

    assert np.allclose(scores([(x, t)]), total, rtol=1e-4)
    assert np.allclose(scores([(x[:3], t[:3]), (x[3:], t[3:])]), total, rtol=1e-4)
    assert np.allclose(scores([(x, t)], examples=4), scores([(x[:4], t[:4])]))
    assert not np.allclose(scores([(x, t)], examples=4), total, rtol=1e-2)


def test_hessian_of_a_network_is_what_per_sample_gradients_give() -> None:
    model = seeded_model("resnet")
    traced = trace(model, ZOO["resnet"].inputs(2))
    x, y = noise(6, 3, 16, 16), torch.arange(6) % 3
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (image[None],))
        return F.cross_entropy(output, label[None])

    each = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, x, y)
    found = curvature.hessian(model, traced.slices, batches=[(x, y)], loss=F.cross_entropy)
    for scores, pieces in zip(found, traced.slices, strict=True):
        made = [p.tensor for p in pieces if p.role == "out"]
        wanted = sum((each[name].square().mean(0) * parameters[name].square() / 2).flatten(1).sum(1) for name in made)
        assert np.allclose(scores, wanted.numpy(), rtol=1e-3)


def test_random_depends_on_the_seed_alone() -> None:
    assert np.array_equal(
        criteria.random(network(), [LAYER], seed=1)[0], criteria.random(network(), [LAYER], seed=1)[0]
    )
    assert not np.array_equal(
        criteria.random(network(), [LAYER], seed=1)[0], criteria.random(network(), [LAYER], seed=2)[0]
    )


# ------------------------------------------------------------------------------------------------- of all of them

ALL = components.names("criterion")
SEEING = ["taylor", "hessian", "apoz", "reconstruction"]
TOGETHER = [name for name in ALL if name != "random"]
IMAGES = [(noise(6, 3, 16, 16, seed=n), torch.arange(6) % 3) for n in (0, 1)]


def ranked(name: str, model: nn.Module, groups: criteria.Groups, batches: Any = IMAGES, **settings: Any) -> Any:
    given: dict[str, Any] = {"batches": batches, "loss": F.cross_entropy, "seed": 0}
    values = components.spec("criterion", name) | settings
    return components.bind(values, "criterion", None, (), batches=(), loss=None, seed=0)(model, groups, **given)


def opinions(name: str, model: nn.Module, pieces: Sequence[Slice]) -> list[tuple[Slice, ...]]:
    """The parts of a group that a criterion takes for one layer each."""
    makers = tuple(p for p in pieces if p.role == "out")
    if name in ("apoz", "reconstruction"):
        return [(*makers, p) for p in pieces if p.role == "in"]
    layers = {p.tensor.rpartition(".")[0]: () for p in pieces if p.role != "in"}
    found = [tuple(p for p in pieces if p.tensor.rpartition(".")[0] == layer and p.role != "in") for layer in layers]
    normed = name in ("bn_scale", "taylor")
    return [own for own in found if any(p.role == "out" for p in own) != normed]


REDUCED: dict[str, Callable[[Any], Any]] = {
    "mean": lambda parts: sum(parts) / len(parts),
    "max": lambda parts: np.array([max(own) for own in zip(*parts, strict=True)]),
    "sum": sum,
    "first": lambda parts: parts[0],
}
SCALED: dict[str, Callable[[Any], float]] = {
    "mean": lambda part: float(sum(part) / len(part)),
    "max": max,
    "sum": sum,
    "none": lambda part: 1.0,
}


@pytest.mark.parametrize("name", TOGETHER)
def test_reduce_and_normalise_change_coupled_layers_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruct, "POSITIONS", 16 * 16)  # all: which ones are drawn depends on what else is ranked
    model = seeded_model("resnet")
    groups = trace(model, ZOO["resnet"].inputs(2)).slices
    apart = [
        [ranked(name, model, [own], reduce="first", normalise="none")[0] for own in opinions(name, model, pieces)]
        for pieces in groups
    ]
    assert {len(parts) > 1 for parts in apart} == {True, False}
    for normalise, scale in SCALED.items():
        found = {reduce: ranked(name, model, groups, reduce=reduce, normalise=normalise) for reduce in REDUCED}
        for g, parts in enumerate(apart):
            for reduce, reduction in REDUCED.items():
                wanted = reduction([part / scale(part) for part in parts])
                assert np.allclose(found[reduce][g], wanted, rtol=1e-9, atol=0)
            alike = all(np.array_equal(found[reduce][g], found["mean"][g]) for reduce in REDUCED)
            assert alike == (len(parts) == 1)


def test_taylor_of_all_layers_jointly_is_not_the_sum_of_each() -> None:
    model = seeded_model("resnet")
    groups = trace(model, ZOO["resnet"].inputs(2)).slices
    joint, apart = ranked("taylor", model, groups), ranked("taylor", model, groups, reduce="sum")
    same = [np.array_equal(a, b) for a, b in zip(joint, apart, strict=True)]
    assert same == [len(opinions("taylor", model, pieces)) == 1 for pieces in groups]


@pytest.mark.parametrize("network", ["resnet", "vgg", "mobilenetv2", "grouped", "unet"])
def test_scores_follow_channels_that_are_reordered(network: str) -> None:
    model, moved = seeded_model(network), seeded_model(network)
    traced = trace(model, ZOO[network].inputs(2))
    rng, tensors = np.random.default_rng(0), dict(tensors_of(moved))
    orders = [rng.permutation(len(pieces[0].positions)) for pieces in traced.slices]
    with torch.no_grad():
        for name, tensor in reordered(tensors, traced.slices, orders).items():
            tensors[name].copy_(tensor)
        assert torch.allclose(model(IMAGES[0][0]), moved(IMAGES[0][0]), atol=1e-4)
    target = model(IMAGES[0][0]).shape[1:]
    batches = [(x, noise(len(x), *target)) for x, _ in IMAGES]
    for name in TOGETHER:
        function = components.bind(components.spec("criterion", name), "criterion", None, (), batches=(), loss=None)
        plain, after = (function(m, traced.slices, batches=batches, loss=F.mse_loss, seed=0) for m in (model, moved))
        for order, a, b in zip(orders, plain, after, strict=True):
            assert np.allclose(a[order], b, rtol=1e-3, atol=1e-5 * a.max()), name


@pytest.mark.parametrize("name", ALL)
def test_dead_channels_are_last_and_these_and_constant_images_have_finite_scores(name: str) -> None:
    model = seeded_model("resnet")
    groups = trace(model, ZOO["resnet"].inputs(2)).slices
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for p in (p for pieces in groups for p in pieces if p.role != "in" and p.tensor in parameters):
            parameters[p.tensor][p.positions[0]] = 0
    for images in ([x for x, _ in IMAGES], [torch.zeros(6, 3, 16, 16)], [torch.full((6, 3, 16, 16), 3.0)]):
        scores = ranked(name, model, groups, [(x, torch.arange(6) % 3) for x in images])
        assert all(np.isfinite(own).all() for own in scores)
        assert name in ("random", "fpgm") or all(own[0] == own.min() for own in scores)


class ByName(nn.Module):
    """Called with two keyword arguments; its output is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.relu(self.left(x) + self.right(y)))}


def weighted(output: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    return (F.cross_entropy(output["logits"], target["label"], reduction="none") * target["weight"]).mean()


@pytest.mark.parametrize("name", ALL)
def test_batches_and_targets_may_be_dictionaries_and_the_loss_the_users_own(name: str) -> None:
    torch.manual_seed(0)
    given, example = ByName(), {"x": noise(2, 4), "y": noise(2, 5)}
    targets = [{"label": torch.arange(8) % 3, "weight": noise(8, seed=n).abs()} for n in (0, 1)]
    pairs = [(noise(8, 4, seed=n), noise(8, 5, seed=n + 2)) for n in (0, 1)]
    by_name = [({"y": y, "x": x}, target) for (x, y), target in zip(pairs, targets, strict=True)]
    model, inputs, (batches,) = unnamed(given, example, by_name)
    groups = trace(model, inputs).slices
    function = components.bind(components.spec("criterion", name), "criterion", None, (), batches=(), loss=None)
    scores = function(model, groups, batches=batches, loss=weighted, seed=0)
    tuples = list(zip(pairs, targets, strict=True))
    plainly = function(given, groups, batches=tuples, loss=weighted, seed=0)
    assert len(scores) == 1
    assert np.array_equal(scores[0], plainly[0])
    assert scores[0].std() > 0
    tripled = function(model, groups, batches=batches, loss=lambda o, t: 3 * weighted(o, t), seed=0)
    assert np.allclose(tripled[0], (9 if name in ("taylor", "hessian") else 1) * scores[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("lp", {"p": 0}, "criterion: p must be a number from 0.1 to 100, got p=0"),
        ("lp", {"p": "much"}, "criterion: p must be a number from 0.1 to 100, got p=much"),
        ("hessian", {"examples": 0}, "criterion: examples must be a whole number of 1 or more, got examples=0"),
        ("taylor", {"reduce": "median"}, "criterion.reduce must be one of joint, mean, max, sum, first, got 'median'"),
        *[(n, {"normalise": 3}, "criterion.normalise must be one of mean, max, sum, none, got '3'") for n in TOGETHER],
        *[
            (n, {"reduce": "median"}, "criterion.reduce must be one of mean, max, sum, first, got 'median'")
            for n in TOGETHER
            if n != "taylor"
        ],
        *[(n, {"redcue": "max"}, "redcue") for n in ALL],
        *[(n, {"batches": []}, f"criterion={n} needs one training batch or more, got none: eval") for n in SEEING],
    ],
)
def test_settings_that_are_none_are_refused(name: str, settings: dict[str, Any], says: str) -> None:
    batches = settings.pop("batches", [(noise(5, 2), torch.arange(5) % 2)])
    with pytest.raises(InputError) as refused:
        ranked(name, network(), [LAYER], batches, **settings)
    assert says in str(refused.value)


def test_hessian_refuses_batches_that_cannot_be_taken_apart() -> None:
    boxes = noise(7, 4)
    with pytest.raises(InputError, match=r"batch of 5 must have 5 rows, got one of shape \(7, 4\); criterion=taylor"):
        ranked("hessian", network(), [LAYER], [(noise(5, 2), {"boxes": boxes})])
