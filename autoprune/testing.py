"""Published contracts: subclass one, give it your component, and pytest runs it.

    class TestMyStrategy(autoprune.testing.StrategyContract):
        def make(self, space, budgets, costs, *, seed):
            return MyStrategy(space, budgets, costs, seed=seed)

Every contract ships with fakes that break one rule each; a contract that does not reject its fakes is worth nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.borrowing import seeded
from autoprune.checks import check_task
from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    Group,
    Measurement,
    Meter,
    PruningSpace,
    Slice,
    Strategy,
    Task,
    Term,
    Trial,
)
from autoprune.criteria import Criterion
from autoprune.loop import search
from autoprune.meters.table import CountedCost
from autoprune.strategies.sensitivity import Sensitivity
from autoprune.strategies.uniform import Uniform

# ---------------------------------------------------------------------------------------------------- synthetic worlds


class World:
    """A made-up network whose losses and costs are formulas, so that a whole search takes milliseconds.

    A chain of G groups: the cost is the sum of products of neighbouring widths, the loss a sum of powers of the ratios
    whose weights spread over two decades, plus a small interaction of neighbours. The counted cost exceeds the
    predicted one by `bias`, so that a strategy must measure and calibrate.
    """

    def __init__(self, seed: int, *, groups: int = 8, levels: int = 8, limit: float = 0.5, bias: float = 0.03) -> None:
        rng = np.random.default_rng(seed)
        sizes = [int(n) for n in rng.choice([16, 32, 64], groups)]
        self.space = PruningSpace(
            tuple(
                Group(name=f"g{i}", size=n, levels=tuple((n - w) / n for w in np.linspace(n, n // 8, levels).round()))
                for i, n in enumerate(sizes)
            )
        )
        chain = [Term(float(rng.uniform(5, 20)), (0.0, {i: 1.0}), (0.0, {i + 1: 1.0})) for i in range(groups - 1)]
        ends = Term(30.0, (0.0, {0: 1.0}), (1.0, {}))
        cost = CountedCost("macs", "MACs", self.space, ((ends, *chain),))
        self.costs: dict[str, CostModel] = {"macs": cost}
        self.budgets = (Budget("macs", limit * cost.predict(self.space.dense()) * (1 + bias), "MACs"),)
        self._weights = 10 ** rng.uniform(-2, 0, groups)
        self._powers = rng.uniform(1.5, 4, groups)
        self._bias = bias
        self.fails: Callable[[Sequence[float]], bool] = lambda ratios: False

    def loss(self, ratios: Sequence[float]) -> float:
        """The true loss of a candidate."""
        r = np.asarray(ratios)
        return float(0.3 + self._weights @ r**self._powers + 0.05 * (r[1:] * r[:-1]).sum())

    def evaluate(self, batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        """Candidates to trials, as an Evaluator does."""
        for number, candidate in batch:
            self.space.check(candidate.ratios)
            if self.fails(candidate.ratios):
                yield Trial(number=number, candidate=candidate, error="RuntimeError: this region fails")
                continue
            predicted = self.costs["macs"].predict(candidate.ratios)
            kind = "counted" if candidate.measure else "predicted"
            value = predicted * (1 + self._bias) if candidate.measure else predicted
            cost = Measurement.exact(value, "MACs", kind)  # type: ignore[arg-type]
            loss = self.loss(candidate.ratios)
            yield Trial(
                number=number,
                candidate=candidate,
                score=1 - loss,
                score_low=1 - loss,
                score_high=1 - loss,
                loss=loss,
                costs={"macs": cost},
                feasible=self.budgets[0].met(cost),
            )

    def play(self, strategy: Strategy, history: Sequence[Trial] = ()) -> tuple[Trial, ...]:
        """A whole search."""
        return search(strategy, self.evaluate, lambda trial: None, history=history)


def answer(trials: Sequence[Trial]) -> Trial:
    """The best feasible trial. Raises AssertionError if there is none."""
    feasible = [t for t in trials if t.feasible and not t.error]
    assert feasible, "no trial is inside the budget by measurement"
    return max(feasible, key=lambda t: t.score)


# -------------------------------------------------------------------------------------------------------- strategies


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
        for seed in range(5):
            for limit in (0.3, 0.5, 0.8):
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

    def test_global_random_state_is_untouched(self) -> None:
        before = _random_state()
        self._play(World(6))
        assert _random_state() == before


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


class NoBetterThanUniform(Uniform):
    """Fake: uniform passed off as a search."""


class TakesFailuresForFree(Sensitivity):
    """Fake: a failed candidate counts as one that costs nothing."""

    def tell(self, trials: Sequence[Trial]) -> None:
        super().tell([dataclasses.replace(t, error=None, loss=0.0) if t.error else t for t in trials])


# ----------------------------------------------------------------------------------------------------------- criteria


class CriterionContract:
    """What every criterion owes: one finite score a unit, the same twice, following its unit, the model untouched."""

    def make(self) -> Criterion:
        """Your criterion."""
        raise AssertionError("override make()")

    #: whether scores follow their unit when units are reordered; a random criterion's do not
    equivariant = True

    def _scores(self, model: nn.Module) -> tuple[NDArray[np.float64], ...]:
        batches = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in (0, 1)]
        return self.make()(model, _GROUPS, batches=batches, loss=nn.functional.cross_entropy, seed=0)

    def test_one_finite_score_a_unit(self) -> None:
        (scores,) = self._scores(_two_layers())
        assert scores.shape == (6,)
        assert np.isfinite(scores).all()

    def test_dead_units_are_finite_too(self) -> None:
        model = _two_layers()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert np.isfinite(self._scores(model)[0]).all()

    def test_same_twice_and_nothing_touched(self) -> None:
        model = _two_layers()
        before, state, mode = copy.deepcopy(model.state_dict()), _random_state(), model.training
        first, second = self._scores(model), self._scores(model)
        assert np.array_equal(first[0], second[0])
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert _random_state() == state
        assert model.training == mode
        assert all(p.grad is None for p in model.parameters())

    def test_scores_follow_their_units(self) -> None:
        if not self.equivariant:
            return
        order = [3, 0, 5, 1, 4, 2]
        (plain,), (moved,) = self._scores(_two_layers()), self._scores(_two_layers(order))
        assert np.allclose(moved, plain[order], rtol=1e-4)


_GROUPS = (
    (
        Slice("0.weight", 0, "out", np.arange(6)[:, None]),
        Slice("0.bias", 0, "with", np.arange(6)[:, None]),
        Slice("1.weight", 0, "with", np.arange(6)[:, None]),
        Slice("1.bias", 0, "with", np.arange(6)[:, None]),
        Slice("1.running_mean", 0, "with", np.arange(6)[:, None]),
        Slice("1.running_var", 0, "with", np.arange(6)[:, None]),
        Slice("3.weight", 1, "in", np.arange(6)[:, None]),
    ),
)


def _two_layers(order: Sequence[int] = range(6)) -> nn.Sequential:
    """Linear, batch norm, ReLU, linear with fixed weights, its six hidden units in this order."""
    with seeded(0):
        norm = nn.BatchNorm1d(6)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "3.weight":
                tensor.copy_(tensor[:, list(order)])
            elif not name.startswith("3") and tensor.dim():
                tensor.copy_(tensor[list(order)])
    return model


def nan_for_dead_units(model: nn.Module, groups: Any, **_: Any) -> tuple[NDArray[np.float64], ...]:
    """Fake criterion: divides by the sum."""
    weight = dict(model.named_parameters())["0.weight"].detach().abs().sum(1).double().numpy()
    with np.errstate(invalid="ignore"):
        return (weight / weight.sum(),)


def by_position(model: nn.Module, groups: Any, **_: Any) -> tuple[NDArray[np.float64], ...]:
    """Fake criterion: the unit's number."""
    return (np.arange(6.0),)


def moves_weights(model: nn.Module, groups: Any, **_: Any) -> tuple[NDArray[np.float64], ...]:
    """Fake criterion: changes the model it looks at."""
    with torch.no_grad():
        weight = dict(model.named_parameters())["0.weight"].mul_(0.5)
    return (weight.detach().abs().sum(1).double().numpy(),)


# ------------------------------------------------------------------------------------------------------------- meters


class MeterContract:
    """What every meter owes: a value with unit and interval, less for a smaller network, the model untouched."""

    def make(self) -> Meter:
        """Your meter."""
        raise AssertionError("override make()")

    def _measure(self, width: int) -> Measurement:
        with seeded(0):
            model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 4))
        return self.make().measure(model, (torch.zeros(1, 3, 8, 8),))

    def test_a_value_with_its_unit_and_interval(self) -> None:
        meter, found = self.make(), self._measure(8)
        assert found.unit == meter.unit
        assert found.unit
        assert math.isfinite(found.value)
        assert 0 < found.low <= found.value <= found.high
        assert found.samples >= 1
        assert found.kind != "predicted"

    def test_a_smaller_network_costs_less(self) -> None:
        small, large = self._measure(4), self._measure(64)
        assert small.high < large.low

    def test_nothing_is_touched(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
        model[1].eval()  # as one who trains with frozen statistics
        modes = [m.training for m in model.modules()]
        before, state = copy.deepcopy(model.state_dict()), _random_state()
        self.make().measure(model, (torch.ones(2, 1, 5, 5),))
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert [m.training for m in model.modules()] == modes
        assert _random_state() == state


class ForgetsTheUnit:
    """Fake meter: parameters without a unit."""

    name, unit = "params", ""

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        return Measurement.exact(float(sum(p.numel() for p in model.parameters())), "", "counted")


class AlwaysTheSame:
    """Fake meter: a constant."""

    name, unit = "macs", "MACs"

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        return Measurement.exact(1e6, "MACs", "counted")


class TrainsWhileMeasuring:
    """Fake meter: runs the model in training mode, which moves its statistics."""

    name, unit = "params", "parameters"

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        model.train()
        model(*inputs)
        return Measurement.exact(float(sum(p.numel() for p in model.parameters())), "parameters", "counted")


# -------------------------------------------------------------------------------------------------------------- tasks


class TaskContract:
    """What every task owes: it scores, repeats under a seed, and holds its search split out of training."""

    def make(self) -> Task:
        """Your task."""
        raise AssertionError("override make()")

    def test_it_can_be_searched(self) -> None:
        check_task(self.make())

    def test_batches_repeat_under_a_seed(self) -> None:
        task = self.make()

        def first() -> list[Tensor]:
            with seeded(3):
                return [leaf for leaf in tree_leaves(next(iter(task.train))) if isinstance(leaf, Tensor)]

        assert all(torch.equal(a, b) for a, b in zip(first(), first(), strict=True))

    def test_search_images_are_in_no_other_split(self) -> None:
        task = self.make()
        held = _hashes(task.search)
        assert len(held) > 0
        assert not held & _hashes(task.train), "the search split shares images with the training split"
        assert not held & _hashes(task.test), "the search split shares images with the test split"


def _hashes(batches: Iterable[Any]) -> set[bytes]:
    """A hash of each example; augmented training images are compared as they are stored, where the split says so."""
    stored = getattr(batches, "images", None)
    rows = [stored] if stored is not None else [tree_leaves(inputs)[0] for inputs, _ in batches]
    return {hashlib.sha256(x.contiguous().numpy().tobytes()).digest() for part in rows for x in part}


def leaking_task() -> Task:
    """Fake task: its search split is its training split."""
    from torchmetrics.classification import MulticlassAccuracy

    data = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]
    return Task(
        name="leaking",
        model=_two_layers(),
        inputs=(data[0][0][:1],),
        train=data,
        search=data,
        test=data,
        loss=nn.functional.cross_entropy,
        metric=MulticlassAccuracy(3),
        lr=0.1,
    )


def _random_state() -> tuple[str, str, str]:
    """The global generators, as something to compare."""
    torch_state = hashlib.sha256(torch.random.get_rng_state().numpy().tobytes()).hexdigest()
    return repr(random.getstate()), repr(np.random.get_state()), torch_state
