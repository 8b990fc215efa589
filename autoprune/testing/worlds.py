"""A made-up network whose whole search takes milliseconds, and what every contract looks at besides."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    Group,
    Measurement,
    PruningSpace,
    Strategy,
    Term,
    Trial,
)
from autoprune.loop import search
from autoprune.meters.table import CountedCost

if TYPE_CHECKING:
    from autoprune.core import Floats


class World:
    """A made-up network whose losses and costs are formulas, so that a whole search takes milliseconds.

    A chain of G groups: the cost is the sum of products of neighbouring widths, the loss a sum of powers of the ratios
    whose weights spread over two decades, plus a small interaction of neighbours. The counted cost exceeds the
    predicted one by `bias`, so that a strategy must measure and calibrate. A unit's importance is what its group's loss
    rises by when it goes after those that matter less.
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
        self.weights = 10 ** rng.uniform(-2, 0, groups)
        self.powers = rng.uniform(1.5, 4, groups)
        self.space = self.space.ranked([self._importance(g) for g in range(groups)])
        self.bias = bias
        self.fails: Callable[[Sequence[float]], bool] = lambda ratios: False

    def _importance(self, group: int) -> Floats:
        """Of each unit of a group, [U]."""
        rising = self.weights[group] * np.linspace(0, 1, self.space.groups[group].size + 1) ** self.powers[group]
        return np.diff(rising)

    def loss(self, ratios: Sequence[float]) -> float:
        """The true loss of a candidate."""
        r = np.asarray(ratios)
        return float(0.3 + self.weights @ r**self.powers + 0.05 * (r[1:] * r[:-1]).sum())

    def evaluate(self, batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        """Candidates to trials, as an Evaluator does."""
        for number, candidate in batch:
            self.space.check(candidate.ratios)
            if self.fails(candidate.ratios):
                yield Trial(number=number, candidate=candidate, error="RuntimeError: this region fails")
                continue
            predicted = self.costs["macs"].predict(candidate.ratios)
            kind = "counted" if candidate.measure else "predicted"
            value = predicted * (1 + self.bias) if candidate.measure else predicted
            cost = Measurement.exact(value, "MACs", kind)  # type: ignore[arg-type]
            loss = self.loss(candidate.ratios)
            yield Trial(
                number=number,
                candidate=candidate,
                score=1 - loss,
                score_low=1 - loss,
                score_high=1 - loss,
                loss=loss,
                parts=(((1 - loss) / 2, loss / 2),) * 2,
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


def random_state() -> tuple[str, str, str]:
    """The global generators, as something to compare."""
    torch_state = hashlib.sha256(torch.random.get_rng_state().numpy().tobytes()).hexdigest()
    return repr(random.getstate()), repr(np.random.get_state()), torch_state
