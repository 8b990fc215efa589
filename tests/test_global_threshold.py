"""One threshold of importance for all groups: against every threshold tried by hand, and against layer collapse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

import autoprune
from autoprune import components
from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    Group,
    InputError,
    Measurement,
    PruningSpace,
    Strategy,
    Term,
    Trial,
)
from autoprune.criteria import l1
from autoprune.evaluate import Scoring
from autoprune.meters.table import CountedCost
from autoprune.recover import FineTune
from autoprune.space import trace
from autoprune.strategies.global_threshold import GlobalThreshold, thresholds
from autoprune.strategies.uniform import Uniform
from autoprune.testing import World

Scores = Sequence[NDArray[np.float64]]
NORMS: dict[str, Callable[[NDArray[np.float64]], float]] = {
    "mean": lambda s: float(s.sum()) / len(s),
    "max": lambda s: max(s.tolist()),
    "sum": lambda s: math.fsum(s),
    "l2": lambda s: math.sqrt(math.fsum(x * x for x in s)),
    "none": lambda s: 1.0,
}


def made_up(scores: Scores, levels: int | None = None) -> tuple[PruningSpace, CountedCost]:
    """Groups of these scores in a chain; levels at every unit, or so many of them at random."""
    rng, groups = np.random.default_rng(0), []
    for i, own in enumerate(scores):
        n = len(own)
        gone = range(n) if levels is None else sorted({0, *rng.choice(n, levels - 1).tolist()})
        groups.append(Group(name=f"g{i}", size=n, levels=tuple(k / n for k in gone)))
    space = PruningSpace(tuple(groups))
    terms = [Term(1.0 + i, (1.0, {i: 1.0}), (1.0, {i + 1: 1.0})) for i in range(len(groups) - 1)]
    return space.ranked(scores), CountedCost("macs", "MACs", space, (tuple(terms),))


def half(cost: CountedCost, fraction: float = 0.5) -> Budget:
    return Budget("macs", fraction * cost.predict(cost.space.dense()), "MACs")


def first_asked(space: PruningSpace, cost: CountedCost, fraction: float, **settings: object) -> tuple[float, ...]:
    (candidate,) = GlobalThreshold(space, [half(cost, fraction)], {"macs": cost}, **settings).ask()  # type: ignore[arg-type]
    assert candidate.measure
    return candidate.ratios


def by_hand(
    space: PruningSpace, cost: CountedCost, scores: Scores, limit: float, normalise: str, floor: float
) -> tuple[float, ...] | None:
    """Every threshold in turn, what lies at it or below counted unit by unit."""
    scaled = [own / NORMS[normalise](own) for own in scores]
    for threshold in [-1.0, *sorted(np.concatenate(scaled).tolist())]:
        ratios = []
        for group, own in zip(space.groups, scaled, strict=True):
            most = group.size - math.ceil(round(floor * group.size, 9))
            below = min(sum(score <= threshold for score in own), most)
            ratios.append(max(r for r in group.levels if group.size - group.kept(r) <= below))
        if cost.predict(ratios) <= limit:
            return tuple(ratios)
    return None


@pytest.mark.parametrize("normalise", NORMS)
@pytest.mark.parametrize(("floor", "levels"), [(0.0, None), (0.1, None), (0.3, 6), (0.0, 4)])
def test_the_ratios_are_those_of_the_least_threshold_that_keeps_the_budget(
    normalise: str, floor: float, levels: int | None
) -> None:
    rng, found = np.random.default_rng(1), 0
    for fraction in (0.9, 0.6, 0.4):
        scores = [rng.gamma(0.7, 10 ** rng.uniform(-2, 2), size) for size in (8, 30, 16, 50, 12)]
        space, cost = made_up(scores, levels)
        expected = by_hand(space, cost, scores, half(cost, fraction).limit, normalise, floor)
        if expected is not None:
            found += 1
            assert first_asked(space, cost, fraction, normalise=normalise, floor=floor) == expected
    assert found, "no threshold was put to the test"


def test_normalised_scores_do_not_depend_on_a_layers_scale() -> None:
    rng = np.random.default_rng(2)
    scores = [rng.random(20) for _ in range(4)]
    scaled = [own * scale for own, scale in zip(scores, (1, 1e3, 1e-3, 7), strict=True)]
    for normalise in NORMS:
        same = first_asked(*made_up(scores), 0.5, normalise=normalise, floor=0)
        assert (first_asked(*made_up(scaled), 0.5, normalise=normalise, floor=0) == same) == (normalise != "none")


def test_a_layer_of_tiny_scores_collapses_but_for_the_floor() -> None:
    rng = np.random.default_rng(3)
    scores = [rng.random(20), 1e-6 * rng.random(20), rng.random(20), rng.random(20)]
    space, cost = made_up(scores)
    collapsed = first_asked(space, cost, 0.5, normalise="none", floor=0)
    assert space.kept(collapsed)[1] == 1
    saved = first_asked(space, cost, 0.5, normalise="none", floor=0.25)
    assert space.kept(saved)[1] == 5
    others = [(a, b) for g, (a, b) in enumerate(zip(collapsed, saved, strict=True)) if g != 1]
    assert all(a <= b for a, b in others), "the threshold is higher for the others"
    assert any(a < b for a, b in others)
    assert cost.predict(saved) <= half(cost).limit


@pytest.mark.parametrize(("floor", "kept"), [(0.07, (1, 2, 7, 1)), (0.15, (2, 3, 15, 1)), (0.0, (1, 1, 1, 1))])
def test_the_floor_is_kept_to_the_unit(floor: float, kept: tuple[int, ...]) -> None:
    """0.07 x 100 is a hair more than 7 in floating point, but 7 of 100 are 0.07."""
    scores = [np.arange(1.0, size + 1) for size in (10, 20, 100, 3)]
    space, cost = made_up(scores)
    least = cost.predict([(g.size - n) / g.size for g, n in zip(space.groups, kept, strict=True)])
    limit = Budget("macs", least, "MACs")
    strategy = GlobalThreshold(space, [limit], {"macs": cost}, normalise="none", floor=floor)
    assert space.kept(strategy.ask()[0].ratios) == kept
    strategy.tell([told(strategy.ask()[0], cost, least)])
    assert not strategy.findings
    assert not strategy.ask()


def test_floors_give_where_they_leave_the_budget_no_room() -> None:
    rng = np.random.default_rng(4)
    scores = [rng.random(20), 0.1 * rng.random(20), rng.random(20)]
    space, cost = made_up(scores)
    at_floors = cost.predict([0.5] * 3)
    limit = 0.9 * at_floors
    strategy = GlobalThreshold(space, [Budget("macs", limit, "MACs")], {"macs": cost}, normalise="none", floor=0.5)
    (candidate,) = strategy.ask()
    assert cost.predict(candidate.ratios) <= limit
    assert candidate.ratios[0] == candidate.ratios[2] == 0.5, "whatever is above the floors goes first"
    assert candidate.ratios[1] > 0.5, "and then the least important"
    strategy.tell([told(candidate, cost, limit)])
    assert [(f.group, f.what) for f in strategy.findings] == [("g1", "below the floor")]


def told(candidate: Candidate, cost: CostModel, limit: float, factor: float = 1.0) -> Trial:
    counted = Measurement.exact(factor * cost.predict(candidate.ratios), "MACs", "counted")
    return Trial(number=0, candidate=candidate, score=0.5, loss=1.0, costs={"macs": counted})


@pytest.mark.parametrize("strategy", [GlobalThreshold, Uniform])
def test_a_budget_out_of_reach_ends_with_the_smallest_network_measured_once(strategy: Callable[..., Strategy]) -> None:
    world = World(4, limit=1e-4)
    trials = world.play(strategy(world.space, world.budgets, world.costs))
    assert [t.candidate.ratios for t in trials] == [tuple(g.levels[-1] for g in world.space.groups)]


@pytest.mark.parametrize("strategy", [GlobalThreshold, Uniform])
def test_after_a_miss_the_next_smaller_network_that_should_do_is_measured(strategy: Callable[..., Strategy]) -> None:
    """A network counts a fifth more than is predicted, which the first measurement tells."""
    world = World(7, bias=0.2)
    (aimed,) = strategy(world.space, world.budgets, world.costs).ask()
    limit = world.costs["macs"].predict(aimed.ratios)
    world.budgets = (Budget("macs", limit, "MACs"),)
    missed, met = world.play(strategy(world.space, world.budgets, world.costs))
    assert missed.candidate.ratios == aimed.ratios
    assert missed.costs["macs"].value > limit >= met.costs["macs"].value
    assert all(a <= b for a, b in zip(missed.candidate.ratios, met.candidate.ratios, strict=True))
    (known,) = strategy(world.space, [Budget("macs", limit / 1.2, "MACs")], world.costs).ask()
    assert met.candidate.ratios == known.ratios


class Stubborn:
    """A cost model that no measurement teaches anything."""

    name, unit = "macs", "MACs"

    def __init__(self, cost: CountedCost) -> None:
        self.predict, self.tables = cost.predict, cost.tables

    def calibrated(self, trials: Sequence[Trial]) -> Stubborn:
        return self


@pytest.mark.parametrize("strategy", [GlobalThreshold, Uniform])
def test_what_missed_a_budget_is_not_measured_again(strategy: Callable[..., Strategy]) -> None:
    world = World(8, bias=1.0)
    cost = Stubborn(world.costs["macs"])  # type: ignore[arg-type]
    trials = world.play(strategy(world.space, world.budgets, {"macs": cost}, attempts=5))
    values = [t.costs["macs"].value for t in trials]
    assert len(values) > 2
    assert all(a > b for a, b in itertools.pairwise(values))


def test_a_failed_recovery_is_followed_by_the_next_lesser_one() -> None:
    world = World(9)
    world.fails = lambda ratios: True
    trials = world.play(GlobalThreshold(world.space, world.budgets, world.costs, floor=0))
    assert [t.candidate.recovery for t in trials] == ["short", "probe", "none"]
    assert len({t.candidate.ratios for t in trials}) == 1


def test_equal_scores_are_one_ratio_for_all() -> None:
    """As of batch normalisations that were never trained: no group is to go before another."""
    space, cost = made_up([np.ones(20) for _ in range(4)])
    uniform = Uniform(space, [half(cost)], {"macs": cost})
    assert first_asked(space, cost, 0.5, floor=0) == uniform.ask()[0].ratios
    dead, cost = made_up([np.zeros(20) for _ in range(4)])
    assert first_asked(dead, cost, 0.5, floor=0) == uniform.ask()[0].ratios


def test_it_beats_one_ratio_where_scores_tell_the_loss() -> None:
    wins = 0
    for seed in range(10):
        world = World(seed)
        ends = [
            world.play(s)[-1].loss
            for s in (
                GlobalThreshold(world.space, world.budgets, world.costs, normalise="none"),
                Uniform(world.space, world.budgets, world.costs),
            )
        ]
        wins += ends[0] < ends[1]
    assert wins >= 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalise": "median"}, "global: normalise must be one of mean, max, sum, l2, none, got normalise=median"),
        ({"floor": 1.0}, "global: floor must be a number from 0 to below 1, got floor=1.0"),
        ({"floor": -0.1}, "floor must be a number from 0 to below 1, got floor=-0.1"),
        ({"floor": "low"}, "floor must be a number from 0 to below 1, got floor=low"),
        ({"floor": math.nan}, "floor must be a number from 0 to below 1, got floor=nan"),
        ({"attempts": 0}, "global: attempts >= 1 must hold, got attempts=0"),
        ({"recovery": "long"}, "recovery must be one of short, probe, none, got 'long'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GlobalThreshold(PruningSpace(()), (), {}, **settings)  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_refused() -> None:
    block = Group(name="layer1.0", size=1, levels=(0.0, 1.0), kind="block")
    with pytest.raises(InputError, match=r"a block has no units to compare.*got 'layer1.0': leave block out"):
        GlobalThreshold(PruningSpace((block,)), (), {})
    space, cost = made_up([np.array([1.0, np.inf]), np.ones(2)])
    with pytest.raises(InputError, match="the importance of every unit must be finite, the criterion's of g0 is not"):
        first_asked(space, cost, 0.5)
    with pytest.raises(ValueError, match="does not hold the importance"):
        first_asked(PruningSpace(space.groups), cost, 0.5)


def test_a_space_with_other_levels_has_the_same_importance() -> None:
    space, cost = made_up([np.array([3.0, 1.0, 2.0, 4.0]), np.array([9.0, 8.0])])
    assert space.importance == ((1.0, 2.0, 3.0, 4.0), (8.0, 9.0))
    coarse = space.with_levels({"g0": (0.0, 0.5)})
    assert coarse.importance == space.importance
    assert first_asked(coarse, cost, 0.7, normalise="none", floor=0) == (0.5, 0.0)
    marked = PruningSpace(space.groups, thresholds=((0.0, 0.0),))
    assert marked.ranked([np.ones(4), np.ones(2)]) == marked


def test_a_search_takes_what_its_criterion_gives() -> None:
    task = tiny.make_task()
    result = autoprune.search(
        task,
        budget="flops_50pct",
        strategy=components.spec("strategy", "global") | {"recovery": "probe"},
        criterion=components.spec("criterion", "l1") | {"normalise": "none"},
        scoring=Scoring(images=100, recalibration=1),
        final=FineTune(epochs=0.1, teach=0.0),
    )
    assert result.met
    assert len(result.trials) == 1
    traced = trace(task.model, task.inputs)
    scores = l1(task.model, traced.slices, normalise="none")
    cost = CountedCost("macs", "MACs", traced.space, (traced.macs,)).anchored(result.dense["macs"].value)
    limit = result.budgets[0].limit
    assert by_hand(traced.space, cost, scores, limit, "mean", 0.1) == result.ratios
    space = traced.space.ranked(l1(task.model, traced.slices))
    none, mean = (list(thresholds(space, normalise=each, floor=0.1)) for each in ("none", "mean"))
    assert none == mean, "the criterion divides by the mean itself"
