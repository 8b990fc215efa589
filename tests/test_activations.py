"""What layers read, as a criterion: against numbers computed another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from zoo import ZOO

from autoprune import activations, criteria, reconstruct
from autoprune.activations import apoz, entering, reconstruction
from autoprune.borrowing import seeded
from autoprune.space import Space, trace


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(*shape: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(noise(*shape, seed=n), torch.zeros(shape[0])) for n in range(count)]


def seeded_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name].build().eval()


def test_apoz_is_the_share_that_is_zero_where_units_are_read() -> None:
    """Of a network in a row; its second convolution is read through pooling and a flatten."""
    model = seeded_model("vgg")
    assert isinstance(model, nn.Sequential)
    shown = batches(4, 3, 16, 16)
    traced = trace(model, ZOO["vgg"].inputs(2))
    found = apoz(model, traced.slices, batches=shown, normalise="none")
    x = torch.cat([images for images, _ in shown])
    read = {}
    with torch.no_grad():
        for name, layer in model.named_children():
            read[name] = x.numpy()
            x = layer(x)
    for group, scores in zip(traced.space.groups, found, strict=True):
        reader = {"0": "3", "3": "7", "7": "10"}[group.name]
        each = read[reader].reshape(8, group.size, -1)
        wanted = [sum(v != 0 for v in each[:, u].ravel()) / each[:, u].size for u in range(group.size)]
        assert np.allclose(scores, wanted)
        assert min(wanted) < max(wanted)


def test_apoz_of_a_residual_stream_is_of_all_who_read_it() -> None:
    model = seeded_model("resnet")
    traced, shown = trace(model, ZOO["resnet"].inputs(2)), batches(4, 3, 16, 16)
    seen: dict[str, list[Any]] = {}
    for reader in ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"):

        def keep(module: nn.Module, given: tuple[Tensor, ...], reader: str = reader) -> None:
            seen.setdefault(reader, []).append((given[0] > 0).double().mean((0, 2, 3)).numpy())

        model.get_submodule(reader).register_forward_pre_hook(keep)
    (found, *_) = apoz(model, traced.slices, batches=shown, normalise="none")
    assert np.allclose(found, np.mean([np.mean(parts, axis=0) for parts in seen.values()], axis=0))


def test_nothing_is_zero_after_a_smooth_activation() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    (found,) = apoz(model, trace(model, (noise(2, 4),)).slices, batches=batches(8, 4))
    assert np.array_equal(found, np.ones(6))


class Bare(nn.Module):
    """One layer is given its input by name, the weight of another is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.named, self.bare = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.named(input=torch.relu(self.first(x))))
        return nn.functional.linear(x, self.bare.weight, self.bare.bias)


@pytest.mark.parametrize("criterion", [apoz, reconstruction])
def test_units_that_no_layer_is_seen_to_read_are_ranked_by_l1(criterion: Any) -> None:
    torch.manual_seed(0)
    model = Bare()
    groups, shown = trace(model, (noise(2, 6),)).slices, batches(16, 6)
    seen, unseen = criterion(model, groups, batches=shown, normalise="max")
    plain = criteria.l1(model, groups, normalise="max")
    assert np.array_equal(unseen, plain[1])
    assert not np.allclose(seen, plain[0], rtol=0.01)
    weights = trace(model, (noise(2, 6),), Space(grain=("weight",))).slices
    masked = criterion(model, weights, batches=shown)
    assert all(np.array_equal(a, b) for a, b in zip(masked, criteria.l1(model, weights), strict=True))


@pytest.mark.parametrize("criterion", [apoz, reconstruction])
@pytest.mark.parametrize("name", ["grouped", "densenet", "unet", "auto_encoder", "squeeze_excite", "lstm", "tied"])
def test_any_network_has_a_finite_score_a_unit(criterion: Any, name: str) -> None:
    model = seeded_model(name)
    inputs = ZOO[name].inputs(2)
    traced = trace(model, inputs)
    found = criterion(model, traced.slices, batches=[(inputs, None)])
    assert [len(scores) for scores in found] == [group.size for group in traced.space.groups]
    assert all(np.isfinite(scores).all() for scores in found)


# ---------------------------------------------------------------------------------------------------- reconstruction


def path(samples: NDArray[np.float64], penalties: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which columns [N, U] the LASSO for their sum takes at each penalty, by plain proximal gradient from zero."""
    target, step = samples.sum(1), 1 / np.linalg.norm(samples, 2) ** 2
    taken = []
    for penalty in penalties:
        b = np.zeros(samples.shape[1])
        for _ in range(20_000):
            b = b - step * samples.T @ (samples @ b - target)
            b = np.sign(b) * np.maximum(np.abs(b) - step * penalty, 0)
        taken.append(b != 0)
    return np.array(taken)


def test_units_enter_where_a_plain_solver_of_lasso_takes_them() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(60, 7)) @ (np.eye(7) + 0.4 * rng.normal(size=(7, 7))) * rng.uniform(0.2, 2, 7)
    products = samples.T @ samples
    entries = entering(products)
    assert entries.max() == 1
    most = np.abs(products.sum(1)).max()
    for unit, entry in enumerate(entries):  # taken a step of the path below where it enters, and not a step above
        lower, upper = path(samples, most * entry * np.array([0.7, 1.42]))[:, unit]
        assert lower
        assert not upper
    assert len(set(np.round(entries, 6))) == 7


def test_units_of_which_none_tells_of_another_enter_in_the_order_of_what_they_give() -> None:
    given = np.array([3.0, 0.5, 0.0, 1e-5, 2.0])
    assert np.allclose(entering(np.diag(given)), given / 3)
    assert np.array_equal(entering(np.zeros((3, 3))), np.zeros(3))


def test_what_others_give_too_is_taken_last() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(100, 4)) * [1, 1, 1, 0.1]
    samples[:, 3] += 0.7 * samples[:, :2].sum(1)  # as much as any, but nearly the sum of two
    assert entering(samples.T @ samples).argmax() == 3
    samples[:, 2] *= 3
    samples[:, 0] = samples[:, 2] / 3 + 0.01 * rng.normal(size=100)
    assert entering(samples.T @ samples)[[0, 1]].argmin() == 0


@pytest.mark.parametrize("name", ["plain", "vgg", "densenet", "mobilenetv2"])
def test_products_are_those_of_what_a_layer_makes_of_each_unit_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruct, "POSITIONS", 16 * 16)  # all
    model, shown = seeded_model(name), batches(3, 3, 16, 16)
    groups = trace(model, ZOO[name].inputs(2)).slices
    grams = reconstruct.grams(model, groups, shown)
    read: dict[str, list[Tensor]] = {tensor: [] for tensor in grams}
    for tensor, seen in read.items():
        layer = model.get_submodule(tensor.rpartition(".")[0])
        layer.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
    with torch.no_grad():
        for images, _ in shown:
            model(images)
        checked = 0
        for piece in (p for pieces in groups for p in pieces if p.role == "in" and p.tensor in grams):
            layer, inputs = model.get_submodule(piece.tensor.rpartition(".")[0]), torch.cat(read[piece.tensor])
            nothing = layer(torch.zeros_like(inputs))
            alone = []
            for own in piece.positions:
                mask = torch.zeros_like(inputs)
                mask[:, own] = 1
                alone.append((layer(inputs * mask) - nothing).flatten().double())
            wanted = torch.stack(alone) @ torch.stack(alone).T
            found = activations._products(*grams[piece.tensor], piece.positions)
            assert np.allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-4 * float(wanted.max()))
            checked += 1
        assert checked >= 2


def test_reconstruction_ranks_by_what_its_readers_get_not_by_weights() -> None:
    """A unit that is large and always off, one that nothing reads, and one that is small and read with all weight."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad(), seeded(0):
        first, last = model.get_parameter("0.weight"), model.get_parameter("2.weight")
        nn.init.normal_(first)
        nn.init.normal_(last)
        first[0], model.get_parameter("0.bias")[0] = 9, -1000
        last[:, 1] = 0
        first[2] *= 0.1
        last[:, 2] *= 100
    groups, shown = trace(model, (noise(2, 4),)).slices, batches(50, 4)
    (found,) = reconstruction(model, groups, batches=shown)
    assert sorted(np.argsort(found)[:2]) == [0, 1]
    assert np.array_equal(found[:2], [0, 0])
    assert found.argmax() == 2
    assert criteria.l1(model, groups)[0].argmax() == 0


def test_the_seed_draws_the_places_that_are_sampled() -> None:
    model, shown = seeded_model("plain"), batches(3, 3, 16, 16)
    groups = trace(model, ZOO["plain"].inputs(2)).slices
    first, again, other = (reconstruction(model, groups, batches=shown, seed=s)[0] for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
