"""What every strategy owes, and fakes that break one rule each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    Measurement,
    PruningSpace,
    Strategy,
    Term,
    Trial,
)
from autoprune.loop import search
from autoprune.meters.table import CountedCost
from autoprune.strategies.sensitivity import Sensitivity
from autoprune.strategies.uniform import Uniform
from autoprune.testing.worlds import World, answer, random_state


class StrategyContract:
    """What every strategy owes. Set `baseline = True` to be excused from beating uniform."""

    baseline = False

    def make(
        self, space: PruningSpace, budgets: Sequence[Budget], costs: Mapping[str, CostModel], *, seed: int
    ) -> Strategy:
        """Your strategy."""
        raise AssertionError("override make()")

    def _play(self, world: World, seed: int = 0, history: Sequence[Trial] = ()) -> tuple[Trial, ...]:
        return world.play(self.make(world.space, world.budgets, world.costs, seed=seed), history)

    def test_candidates_lie_in_the_space(self) -> None:
        world = World(0)
        for trial in self._play(world):
            world.space.check(trial.candidate.ratios)

    def test_same_seed_same_conversation(self) -> None:
        first, second = self._play(World(1), 7), self._play(World(1), 7)
        assert [t.candidate for t in first] == [t.candidate for t in second]

    def test_replay_from_any_cut_gives_the_same_future(self) -> None:
        whole = self._play(World(2))
        for cut in sorted({0, 1, len(whole) // 2, len(whole) - 1}):
            again = self._play(World(2), history=whole[:cut])
            assert [t.candidate for t in again] == [t.candidate for t in whole], f"differs after a cut at {cut}"

    def test_the_budget_is_reached(self) -> None:
        for seed in range(3):
            for limit in (0.3, 0.8):  # 0.5 is the world's own, in the other tests
                found = answer(self._play(World(seed, limit=limit)))
                assert found.feasible

    def test_two_budgets_are_reached(self) -> None:
        world = World(3)
        params = CountedCost(
            "params", "parameters", world.space, (tuple(Term(1.0, (0.0, {g: 1.0}), (1.0, {})) for g in range(8)),)
        )
        world.costs["params"] = params
        tight = Budget("params", 0.4 * params.predict(world.space.dense()), "parameters")
        strategy = self.make(world.space, (*world.budgets, tight), world.costs, seed=0)

        def evaluate(batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
            for trial in world.evaluate(batch):
                kind = "counted" if trial.candidate.measure else "predicted"
                value = Measurement.exact(params.predict(trial.candidate.ratios), "parameters", kind)  # type: ignore[arg-type]
                costs = {**trial.costs, "params": value}
                inside = trial.feasible if trial.feasible is None else trial.feasible and tight.slack(value) >= 0
                yield dataclasses.replace(trial, costs=costs, feasible=inside)

        found = answer(search(strategy, evaluate, lambda trial: None))
        assert found.costs["params"].value <= tight.limit

    def test_an_unreachable_budget_ends_with_the_closest(self) -> None:
        world = World(4, limit=1e-4)
        trials = self._play(world)
        measured = [t.costs["macs"].value for t in trials if t.candidate.measure]
        smallest = world.costs["macs"].predict([g.levels[-1] for g in world.space.groups])
        assert measured, "nothing was measured"
        assert min(measured) <= 1.05 * smallest, "the closest result is not the smallest network"

    def test_beats_uniform_on_nine_of_ten_seeds(self) -> None:
        if self.baseline:
            return
        wins = 0
        for seed in range(10):
            world = World(seed)
            uniform = Uniform(world.space, world.budgets, world.costs)
            wins += answer(self._play(world, seed)).loss < answer(world.play(uniform)).loss
        assert wins >= 9, f"beats uniform on {wins} of 10 seeds"

    def test_failed_regions_are_left(self) -> None:
        if self.baseline:
            return
        world = World(5)
        world.fails = lambda ratios: ratios[0] > 0.3
        found = answer(self._play(world))
        assert found.candidate.ratios[0] <= 0.3

    def test_parents_are_earlier_trials_that_succeeded(self) -> None:
        world = World(5)
        world.fails = lambda ratios: ratios[0] > 0.3
        trials = self._play(world)
        for trial in trials:
            if trial.candidate.parent is not None:
                assert 0 <= trial.candidate.parent < trial.number, "the parent is not an earlier trial"
                parent = trials[trial.candidate.parent]
                assert parent.error is None, "the parent failed"
                nested = zip(trial.candidate.ratios, parent.candidate.ratios, strict=True)
                assert all(ours >= theirs for ours, theirs in nested), "units are kept that the parent has lost"

    def test_global_random_state_is_untouched(self) -> None:
        before = random_state()
        self._play(World(6))
        assert random_state() == before


class AsksOutside:
    """Fake: a ratio that is no level."""

    def __init__(self, space: PruningSpace, *_: Any, seed: int = 0) -> None:
        self.batch = [Candidate(ratios=(0.123,) * len(space.groups), measure=True)]

    def ask(self) -> Sequence[Candidate]:
        return self.batch

    def tell(self, trials: Sequence[Trial]) -> None:
        self.batch = []


class DrawsGlobally:
    """Fake: random levels from numpy's global generator, so neither repeatable nor within the budget."""

    def __init__(self, space: PruningSpace, *_: Any, seed: int = 0) -> None:
        self.space, self.left = space, 3

    def ask(self) -> Sequence[Candidate]:
        if not self.left:
            return []
        ratios = tuple(float(np.random.choice(g.levels)) for g in self.space.groups)
        return [Candidate(ratios=ratios, measure=True)]

    def tell(self, trials: Sequence[Trial]) -> None:
        self.left -= 1


class TrustsPredictions(Uniform):
    """Fake: never measures its answer."""

    def ask(self) -> Sequence[Candidate]:
        return [dataclasses.replace(candidate, measure=False) for candidate in super().ask()]


class HoldsTheFirstBudget(Uniform):
    """Fake: looks at one budget only."""

    def __init__(self, space: PruningSpace, budgets: Sequence[Budget], *given: Any, **named: Any) -> None:
        super().__init__(space, budgets[:1], *given, **named)


class NoBetterThanUniform(Uniform):
    """Fake: uniform passed off as a search."""


class IsItsOwnParent(Uniform):
    """Fake: starts from a network that is not there yet."""

    def ask(self) -> Sequence[Candidate]:
        return [dataclasses.replace(candidate, parent=0) for candidate in super().ask()]


class TakesFailuresForFree(Sensitivity):
    """Fake: a failed candidate counts as one that costs nothing."""

    def tell(self, trials: Sequence[Trial]) -> None:
        told = []
        for t in trials:  # a measured one would need costs
            free = t.error and not t.candidate.measure
            told.append(dataclasses.replace(t, error=None, loss=0.0) if free else t)
        super().tell(told)
