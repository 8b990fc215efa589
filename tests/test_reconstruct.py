from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from autoprune import reconstruct
from autoprune.reconstruct import Reconstruction, solved, windows
from autoprune.space import trace


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def others(columns: Tensor, size: int = 8) -> Tensor:
    return torch.tensor([c for c in range(size) if c not in columns.tolist()])


def batches(*shape: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(noise(*shape, seed=n), torch.zeros(shape[0])) for n in range(count)]


def seeded_model(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 9, 11)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
        (nn.Linear(4, 6), (2, 4)),
        (nn.Linear(4, 6), (2, 5, 4)),
    ],
)
def test_windows_times_the_weight_is_what_the_layer_gives(layer: nn.Module, shape: Sequence[int]) -> None:
    given = noise(*shape)
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    ours = windows(layer, given).flatten(3) @ weight.flatten(1).T + bias
    theirs = layer(given)
    theirs = theirs if isinstance(layer, nn.Linear) else theirs.flatten(2).transpose(1, 2)
    assert torch.allclose(ours.flatten(), theirs.flatten(), atol=1e-5)


def test_the_weights_are_those_of_least_squares_on_the_samples() -> None:
    samples, weight, columns = noise(200, 8).double(), noise(5, 8, seed=1).double(), torch.tensor([0, 3, 4, 6])
    best = torch.linalg.lstsq(samples[:, columns], samples @ weight.T).solution.T
    assert torch.allclose(solved(samples.T @ samples, weight, columns, others(columns)), best, atol=1e-3)


def test_weights_on_inputs_that_are_always_zero_stay() -> None:
    samples, weight = noise(200, 8).double(), noise(5, 8, seed=1).double()
    samples[:, :4] = 0
    for kept in (torch.tensor([0, 1]), torch.tensor([0, 5])):
        found = solved(samples.T @ samples, weight, kept, others(kept))
        assert torch.equal(found[:, kept < 4], weight[:, kept[kept < 4]])
        assert not torch.isclose(found[:, kept >= 4], weight[:, kept[kept >= 4]]).any()
    assert torch.equal(solved(torch.zeros(8, 8).double(), weight, kept, others(kept)), weight[:, kept])


def test_with_few_samples_a_network_is_still_not_worse() -> None:
    model = seeded_model(ZOO["resnet"].build)
    (shown, _), (unseen, _) = (noise(1, 3, 16, 16), 0), (noise(64, 3, 16, 16, seed=5), 0)
    traced = trace(model, (noise(2, 3, 16, 16),))
    kept = [np.arange(g.size // 2) for g in traced.space.groups]
    plain, refitted = traced.cut(model, kept).eval(), traced.cut(model, kept).eval()
    Reconstruction(model, traced, [(shown, torch.zeros(1))]).apply(refitted, kept)
    with torch.no_grad():
        wanted = model(unseen)
        assert not torch.equal(refitted(unseen), plain(unseen))
        assert (refitted(unseen) - wanted).norm() < 1.05 * (plain(unseen) - wanted).norm()


class Unusual(nn.Module):
    """One layer given its input by name, one whose weight is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.named, self.bare = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.named(input=x))
        return nn.functional.linear(x, self.bare.weight, self.bare.bias)


def test_a_layer_given_its_input_by_name_is_refitted_and_one_never_called_is_left() -> None:
    model = seeded_model(Unusual)
    given = [(noise(64, 6), torch.zeros(64))]
    traced = trace(model, (given[0][0][:2],))
    kept = [np.arange(g.size // 2) for g in traced.space.groups]
    plain, refitted = traced.cut(model, kept), traced.cut(model, kept)
    Reconstruction(model, traced, given).apply(refitted, kept)
    assert not torch.equal(refitted.get_parameter("named.weight"), plain.get_parameter("named.weight"))
    assert torch.equal(refitted.get_parameter("bare.weight"), plain.get_parameter("bare.weight"))


class Signal(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(84, 5)
        )


TWINS = [
    (ZOO["plain"].build, "0.0", (16, 3, 16, 16)),
    (ZOO["vgg"].build, "0", (16, 3, 16, 16)),
    (ZOO["vgg"].build, "3", (16, 3, 16, 16)),  # read through a flatten
    (ZOO["mlp"].build, "1", None),
    (Signal, "0", (16, 3, 16)),
]


@pytest.mark.parametrize(("build", "twinned", "shape"), TWINS)
def test_units_that_others_repeat_are_pruned_for_nothing(
    build: Callable[[], nn.Module], twinned: str, shape: tuple[int, ...] | None
) -> None:
    """The lower half of a layer's units is made a copy of the upper half: what reads both can do without."""
    model = seeded_model(build)
    layer = model.get_submodule(twinned)
    half = layer.get_parameter("weight").shape[0] // 2
    with torch.no_grad():
        for name in ("weight", "bias"):
            if (value := getattr(layer, name)) is not None:
                value[half:] = value[:half]
    given = batches(*(shape or (16, 3, 16, 16)))
    traced = trace(model, (given[0][0][:2],))
    kept = [np.arange(g.size // 2 if g.name == twinned else g.size) for g in traced.space.groups]
    smaller = traced.cut(model, kept).eval()
    with torch.no_grad():
        wanted, before = model(given[0][0]), smaller(given[0][0])
        Reconstruction(model, traced, given).apply(smaller, kept)
        after = smaller(given[0][0])
    assert not torch.allclose(before, wanted, atol=1e-2)
    assert torch.allclose(after, wanted, atol=2e-3)


@pytest.mark.parametrize("name", ["plain", "vgg", "resnet", "mobilenetv2", "densenet", "c2f", "squeeze_excite", "unet"])
def test_what_reads_no_pruned_unit_stays_and_what_does_comes_closer(name: str) -> None:
    model = seeded_model(ZOO[name].build)
    given = batches(16, 3, 16, 16)
    traced = trace(model, (given[0][0][:2],))
    rebuild, stock = Reconstruction(model, traced, given), (nn.Linear, nn.Conv1d, nn.Conv2d)
    for pruned, group in enumerate(traced.space.groups):
        kept = [np.arange(g.size // 2 if place == pruned else g.size) for place, g in enumerate(traced.space.groups)]
        plain, refitted = traced.cut(model, kept).eval(), traced.cut(model, kept).eval()
        rebuild.apply(refitted, kept)
        before, after = dict(plain.named_parameters()), dict(refitted.named_parameters())
        readers = {
            name
            for name, dims in traced.removed(kept).items()
            if 1 in dims
            and isinstance(layer := model.get_submodule(name.rpartition(".")[0]), stock)
            and getattr(layer, "groups", 1) == 1
        }
        assert {name for name in before if not torch.equal(before[name], after[name])} == readers
        with torch.no_grad():
            wanted, raw, better = (net(given[0][0]) for net in (model, plain, refitted))
        if readers:
            assert (better - wanted).norm() < (raw - wanted).norm(), group.name
        else:
            assert torch.equal(raw, better)


def test_a_network_that_is_not_pruned_is_not_changed() -> None:
    model = seeded_model(ZOO["resnet"].build)
    given = batches(4, 3, 16, 16)
    traced = trace(model, (given[0][0][:2],))
    kept = [np.arange(g.size) for g in traced.space.groups]
    same = traced.cut(model, kept)
    Reconstruction(model, traced, given).apply(same, kept)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))


def test_the_same_seed_samples_the_same_places_and_no_hook_is_left() -> None:
    model = seeded_model(ZOO["vgg"].build)
    given = batches(4, 3, 16, 16)
    traced = trace(model, (given[0][0][:2],))
    kept = [np.arange(g.size // 2) for g in traced.space.groups]

    def rebuilt(seed: int) -> Tensor:
        smaller = traced.cut(model, kept)
        Reconstruction(model, traced, given, seed=seed).apply(smaller, kept)
        return smaller.get_parameter("3.weight")

    assert torch.equal(rebuilt(0), rebuilt(0))
    assert not torch.equal(rebuilt(0), rebuilt(1))
    assert not any(module._forward_pre_hooks for module in model.modules())


class Scaled(nn.Linear):
    """A layer that makes something else of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = nn.functional.linear(x, 2 * self.weight, self.bias)
        return found


class Odd(nn.Module):
    """A layer without a batch, and a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scaled = nn.Linear(6, 8), nn.Linear(8, 10), Scaled(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        token = self.second(torch.relu(self.first(x[0])))
        hidden: Tensor = self.scaled(torch.relu(self.second(torch.relu(self.first(x)))) + token)
        return hidden


def test_unusual_models_do_not_fail() -> None:
    model = seeded_model(Odd)
    given = [(noise(64, 6), torch.zeros(64))]
    traced = trace(seeded_model(Odd), (given[0][0][:2],))
    kept = [np.arange(g.size // 2) for g in traced.space.groups]
    plain, refitted = traced.cut(model, kept), traced.cut(model, kept)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rebuild = Reconstruction(model, traced, given)
    rebuild.apply(refitted, kept)
    assert all(p.isfinite().all() for p in refitted.parameters())
    assert torch.equal(refitted.get_parameter("scaled.weight"), plain.get_parameter("scaled.weight"))


class Tied(nn.Sequential):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self[2].weight = self[0].weight


@pytest.mark.parametrize(
    "second",
    [
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 8, 3, padding=1),
    ],
    ids=["grouped", "padded same", "reflected", "transposed"],
)
def test_a_layer_that_is_computed_otherwise_is_left_as_it_is_cut(second: nn.Module) -> None:
    assert refitted_around(second) == {"4.weight"}


def refitted_around(second: nn.Module) -> set[str]:
    """The weights that reconstruction changes of a layer between two others, half of every group being cut."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), second, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    given = batches(8, 3, 8, 8)
    traced = trace(model, (given[0][0][:2],))
    kept = [np.arange(g.size // 2) for g in traced.space.groups]
    plain, smaller = dict(traced.cut(model, kept).named_parameters()), traced.cut(model, kept)
    Reconstruction(model, traced, given).apply(smaller, kept)
    refitted = dict(smaller.named_parameters())
    return {name for name, weight in plain.items() if not torch.equal(weight, refitted[name])}


class OwnForward(nn.Conv2d):
    """As networks brought over from TensorFlow have it: padded by hand, then what its weight says."""

    by = 0

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, self.by, 0, self.by))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


@pytest.mark.parametrize("by", [0, 2])
def test_a_forward_of_its_own_is_refitted_where_it_gives_the_same(by: int) -> None:
    second = OwnForward(8, 8, 1 + by)
    second.by = by
    assert ("2.weight" in refitted_around(second)) == (by == 0)


def test_a_layer_of_too_many_inputs_and_a_tied_one_are_not_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reconstruct._refits(Tied(), "2.weight")
    assert reconstruct._refits(nn.Sequential(nn.Linear(8, 8)), "0.weight")
    monkeypatch.setattr(reconstruct, "MOST", 7)
    assert not reconstruct._refits(nn.Sequential(nn.Linear(8, 8)), "0.weight")
