"""The fitted cost model finds stairs, its tables agree with it, and its levels are worth having."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from autoprune.core import Candidate, Group, Measurement, PruningSpace, Trial, Width, width_of
from autoprune.meters.fitted import FittedCost, Sample, Shape, _spread, better, features, fit, stair_levels, step_of
from autoprune.meters.profile import _drawn

SIZES = (16, 32, 64, 48)
SPACE = PruningSpace(
    tuple(
        Group(name=f"g{i}", size=n, levels=tuple((n - w) / n for w in range(n, n // 8, -n // 16)))
        for i, n in enumerate(SIZES)
    )
)
# a chain, a layer that reads and makes one group, a concatenation, and concatenations on both sides
SIDES: dict[str, tuple[Width, Width]] = {
    "chain": ((0.0, {1: 1.0}), (0.0, {0: 1.0})),
    "alike": ((0.0, {1: 1.0}), (0.0, {0: 1.0})),
    "stream": ((0.0, {2: 1.0}), (0.0, {2: 1.0})),
    "concat": ((0.0, {3: 1.0}), (8.0, {0: 1.0, 1: 1.0})),
    "norm": ((0.0, {2: 1.0}), (1.0, {})),
    "wide": ((0.0, {0: 1.0, 3: 1.0}), (0.0, {1: 1.0, 2: 1.0})),
}
SHAPES = {
    name: Shape("norm" if name == "norm" else "conv", "conv" if name in ("chain", "alike") else name, sides, 1.0)
    for name, sides in SIDES.items()
}


def truth(name: str, kept: tuple[int, ...] | list[int]) -> float:
    """Kernels on blocks of 16 outputs, slower for widths that are no multiple of 8."""
    out, into = (width_of(side, kept) for side in SIDES[name])
    return 0.05 + 1e-3 * 16 * math.ceil(out / 16) * into * (1.1 if into % 8 else 1.0)


def sample(kept: list[int], noise: float = 1.0) -> Sample:
    layers = {name: noise * truth(name, kept) for name in SIDES}
    return Sample(tuple(kept), sum(layers.values()) + noise * (0.3 + 0.01 * kept[3]), layers)


@pytest.fixture(scope="module")
def cost() -> FittedCost:
    rng = np.random.default_rng(0)
    networks = [list(SIZES), *_drawn(SPACE, 60, 0)]
    samples = [sample(kept, float(np.exp(rng.normal(0, 0.02)))) for kept in networks]
    return fit(samples, SHAPES, SPACE, name="latency_ms", unit="ms", by="layers")


def test_unseen_networks_are_predicted(cost: FittedCost) -> None:
    errors = [abs(cost.at_widths(kept) / sample(kept).total - 1) for kept in _drawn(SPACE, 100, 7)]
    assert np.median(errors) <= 0.01
    assert np.quantile(errors, 0.9) <= 0.03


def test_networks_alone_are_enough() -> None:
    """A fused runtime times no layer: totals of 60 networks, 2 % noise, predict others to 5 %."""
    rng = np.random.default_rng(0)
    networks = [list(SIZES), *_drawn(SPACE, 60, 0)]
    samples = [dataclasses.replace(sample(k, float(np.exp(rng.normal(0, 0.02)))), layers={}) for k in networks]
    assert better(samples, SHAPES, SPACE) == "network"
    found = fit(samples, SHAPES, SPACE, name="latency_ms", unit="ms", by="network")
    errors = [abs(found.at_widths(kept) / sample(kept).total - 1) for kept in _drawn(SPACE, 100, 7)]
    assert np.median(errors) <= 0.05
    assert np.quantile(errors, 0.9) <= 0.1


def test_layers_of_one_operator_tell_of_each_other() -> None:
    """Eight shapes of one operator, 20 networks: what they share predicts others far better than each shape alone."""
    space = PruningSpace(tuple(Group(name=f"g{i}", size=32, levels=(0.0, 0.5, 0.75)) for i in range(9)))

    def shapes(operators: list[str]) -> dict[str, Shape]:
        """Layer i makes group i + 1 from group i, on images half as large as the layer before it."""
        sides = [((0.0, {i + 1: 1.0}), (0.0, {i: 1.0})) for i in range(8)]
        return {f"l{i}": Shape(operator, f"{i}", sides[i], 2.0**-i) for i, operator in enumerate(operators)}

    def network(kept: list[int]) -> Sample:
        padded = [16 * math.ceil(width / 16) for width in kept]
        ragged = [width * (width % 4 != 0) for width in kept]
        layers = (padded[i + 1] * padded[i] + kept[i + 1] * ragged[i] for i in range(8))
        return Sample(tuple(kept), sum(2.0**-i * ms for i, ms in enumerate(layers)), {})

    def errors(operators: list[str]) -> float:
        samples = [network(kept) for kept in [[32] * 9, *_drawn(space, 20, 0)]]
        found = fit(samples, shapes(operators), space, name="latency_ms", unit="ms", by="network")
        return float(np.median([abs(found.at_widths(k) / network(k).total - 1) for k in _drawn(space, 100, 7)]))

    together, alone = errors(["conv"] * 8), errors([f"conv {i}" for i in range(8)])
    assert together <= 0.02
    assert together < alone / 2


def test_layers_are_believed_where_they_tell_more() -> None:
    """Layers that are nothing alike, read exactly, their networks with 20 % noise: what the layers took predicts
    better. Networks alone do where layers are read badly. On nine draws of ten: errors are told from the readings."""
    unlike = {name: dataclasses.replace(shape, operator=name) for name, shape in SHAPES.items()}

    def found(seed: int, network: float, layer: float) -> str:
        rng = np.random.default_rng(seed)
        samples = [sample(kept) for kept in [list(SIZES), *_drawn(SPACE, 30, seed)]]
        read = [
            dataclasses.replace(
                s,
                total=s.total * float(np.exp(noise)),
                layers={name: ms * float(np.exp(rng.normal(0, layer))) for name, ms in s.layers.items()},
            )
            for s, noise in zip(samples, rng.normal(0, network, len(samples)), strict=True)
        ]
        return better(read, unlike, SPACE)

    assert [found(seed, 0.2, 0.0) for seed in range(10)].count("layers") >= 9
    assert [found(seed, 0.0, 0.5) for seed in range(10)].count("network") >= 9


def test_layers_of_one_kind_share_what_was_learnt(cost: FittedCost) -> None:
    chain, alike = (next(layer for layer in cost.layers if layer.name == name) for name in ("chain", "alike"))
    assert np.array_equal(chain.coefficients, alike.coefficients)
    assert all((layer.coefficients >= 0).all() for layer in cost.layers)


def tabulated(cost: FittedCost, levels: list[int]) -> float:
    (form,) = cost.tables()
    total = form.constant + sum(row[i] for row, i in zip(form.unary, levels, strict=True))
    return float(total + sum(t[levels[a], levels[b]] for (a, b), t in form.pairs.items()))


def test_tables_equal_the_prediction_where_layers_touch_two_groups(cost: FittedCost) -> None:
    plain = dataclasses.replace(cost, layers=tuple(x for x in cost.layers if x.name not in ("concat", "wide")))
    rng = np.random.default_rng(0)
    for _ in range(20):
        levels = [int(rng.integers(len(g.levels))) for g in SPACE.groups]
        ratios = [g.levels[i] for g, i in zip(SPACE.groups, levels, strict=True)]
        assert tabulated(plain, levels) == pytest.approx(plain.predict(ratios), rel=1e-9)


def test_other_layers_are_exact_where_they_are_linearised(cost: FittedCost) -> None:
    for levels in ([0, 0, 0, 0], [3, 5, 2, 7]):
        ratios = tuple(g.levels[i] for g, i in zip(SPACE.groups, levels, strict=True))
        here = dataclasses.replace(cost, around=SPACE.kept(ratios))
        assert tabulated(here, levels) == pytest.approx(cost.predict(ratios), rel=1e-9)


def measured(ratios: tuple[float, ...], value: float, *, decided: bool = True) -> Trial:
    found = Measurement(value=value, unit="ms", low=0.9 * value, high=1.1 * value, kind="measured", decided=decided)
    return Trial(number=0, candidate=Candidate(ratios=ratios, measure=True), costs={"latency_ms": found})


def test_calibration_predicts_the_upper_end_of_the_last_measurement(cost: FittedCost) -> None:
    ratios = tuple(g.levels[4] for g in SPACE.groups)
    after = cost.calibrated([measured(SPACE.dense(), 99.0), measured(ratios, 7.0)])
    assert after.predict(ratios) == pytest.approx(7.7)
    assert after.around == SPACE.kept(ratios)
    assert cost.calibrated([measured(ratios, 7.0, decided=False)]) is cost


def test_anchoring_predicts_the_dense_network(cost: FittedCost) -> None:
    assert cost.anchored(30.0).predict(SPACE.dense()) == pytest.approx(30.0)


def test_levels_lie_on_the_steps(cost: FittedCost) -> None:
    """A group that only stairs read keeps nothing but the edges; no level costs as much as a wider one."""
    stairs = dataclasses.replace(cost, layers=tuple(x for x in cost.layers if x.name == "norm"), base=(0.0,) * 5)
    assert [SPACE.groups[2].kept(r) for r in stair_levels(stairs, SPACE, 16)["g2"]] == [64, 48, 32, 16]
    levels = stair_levels(cost, SPACE, 5)
    assert all(len(rows) <= 5 and rows[0] == 0.0 for rows in levels.values())
    SPACE.with_levels(levels)
    assert "g0" not in stair_levels(stairs, SPACE, 16), "what costs nothing keeps its levels"


def test_levels_that_are_too_many_keep_whole_blocks() -> None:
    worth = {width: 0.1 + 0.9 * width / 64 for width in range(64, 5, -1)}
    assert _spread(worth, 9) == [64, 56, 48, 40, 32, 24, 16, 8, 6]
    assert set(range(8, 65, 8)) < set(found := _spread(worth, 14))
    assert len(found) == 14
    assert max(np.diff(sorted(found))) <= 8
    assert _spread(worth, 2) == [64, 6]


@pytest.mark.parametrize(
    ("widths", "step"),
    [
        ([64, 48, 32, 16, 6], 16),
        ([64, 56, 48, 40, 24, 6], 8),
        ([64, 56, 48, 32, 20, 12, 6], 4),
        ([64, 61, 50, 33, 7, 6], 1),
        ([64, 32, 6], 32),
        ([16, 2], 1),
    ],
)
def test_the_step_is_told(widths: list[int], step: int) -> None:
    assert step_of(widths) == step


def test_widths_kept_respect_rounding(cost: FittedCost) -> None:
    levels = stair_levels(cost, SPACE, 16, round_to=8)
    for group in SPACE.groups:
        inner = [group.kept(r) for r in levels[group.name]][1:-1]
        assert all(w % 8 == 0 for w in inner)


def test_features_step_where_blocks_end() -> None:
    seventeen = features(17, 32)
    assert (seventeen["up to 8"], seventeen["up to 16"], seventeen["up to 32"]) == (24, 32, 32)
    assert (seventeen["ragged 4"], seventeen["ragged 16 x width"], seventeen["narrow"]) == (1, 17, 0)
    assert not any(value for name, value in features(16, 32).items() if "ragged" in name)
    assert features(12, 32)["narrow x width"] == 12
    assert [features(width, 32)["wide ragged 4 x width"] for width in (9, 18, 20)] == [0, 18, 0]
    assert features(3, 3) == {"1": 1, "width": 3}
