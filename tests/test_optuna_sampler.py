from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from autoprune.core import Budget, CostModel, InputError, PruningSpace, Strategy
from autoprune.strategies.optuna_sampler import OptunaSampler
from autoprune.testing import StrategyContract, World, answer


class TestTpeInsideTheBudget(StrategyContract):
    def make(
        self, space: PruningSpace, budgets: Sequence[Budget], costs: Mapping[str, CostModel], *, seed: int
    ) -> Strategy:
        return OptunaSampler(space, budgets, costs, seed=seed, episodes=60, objective="score")


class TestNsga2(StrategyContract):
    def make(
        self, space: PruningSpace, budgets: Sequence[Budget], costs: Mapping[str, CostModel], *, seed: int
    ) -> Strategy:
        options = {"population_size": 10}
        return OptunaSampler(
            space, budgets, costs, seed=seed, episodes=120, sampler="NSGAIISampler", options=options, batch=10
        )


def played(world: World, **settings: Any) -> list[float]:
    """What every candidate takes of the limit."""
    strategy = OptunaSampler(world.space, world.budgets, world.costs, **settings)
    trials = [t for t in world.play(strategy) if t.candidate.recovery == "probe"]
    return [t.costs["macs"].value / world.budgets[0].limit for t in trials]


def test_a_front_is_drawn_on_both_sides_of_the_budget() -> None:
    uses = played(World(0), episodes=60)
    assert min(uses) < 0.7
    assert max(uses) > 1.1


def test_by_score_alone_every_candidate_is_inside() -> None:
    assert max(played(World(0), episodes=60, objective="score")) <= 1


@pytest.mark.slow
def test_it_learns_from_what_it_is_told() -> None:
    """Better than the same number of its own random draws."""
    learnt, drawn = (
        sum(answer(World(seed).play(_strategy(World(seed), sampler))).loss for seed in range(5))
        for sampler in ("TPESampler", "RandomSampler")
    )
    assert learnt < drawn


def _strategy(world: World, sampler: str) -> OptunaSampler:
    return OptunaSampler(
        world.space, world.budgets, world.costs, sampler=sampler, episodes=100, objective="score", finalists=1
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "Best"}, "there is no sampler 'Best': strategy.sampler must be one of .*TPESampler"),
        ({"sampler": "BaseSampler2"}, "there is no sampler"),
        ({"options": {"colour": 3}}, "TPESampler does not take strategy.options={'colour': 3}"),
        ({"objective": "speed"}, "optuna: objective must be pareto or score, got objective=speed"),
        ({"episodes": 0}, "optuna: episodes >= 1 must hold, got episodes=0"),
        ({"batch": 0}, "optuna: batch >= 1 must hold, got batch=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    world = World(0)
    with pytest.raises(InputError, match=message):
        OptunaSampler(world.space, world.budgets, world.costs, **settings)
