"""The baseline: the same ratio for every group, or one threshold of importance for all, the smallest that keeps the
budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from autoprune.allocate import InfeasibleError, evenly, globally
from autoprune.core import (
    RECOVERIES,
    Budget,
    Candidate,
    CostModel,
    InputError,
    PruningSpace,
    Recovery,
    Trial,
    all_met,
    check_recovery,
    check_rules,
)


class Uniform:
    """One candidate: every group at the level nearest above one common ratio; or, by "threshold", what one threshold of
    importance over all groups together leaves (global magnitude pruning, where single weights are pruned).

    A measured cost above its limit calibrates the cost model and the next larger ratio is tried, at most `attempts`
    times. recovery: what the answer gets before it is scored; where that fails, the next lesser one is tried.
    """

    def __init__(
        self,
        space: PruningSpace,
        budgets: Sequence[Budget],
        costs: Mapping[str, CostModel],
        *,
        seed: int = 0,
        attempts: int = 4,
        recovery: Recovery = "short",
        by: Literal["ratio", "threshold"] = "ratio",
    ) -> None:
        rules = {"attempts >= 1": attempts >= 1, "by must be ratio or threshold": by in ("ratio", "threshold")}
        check_rules("uniform", rules, {"attempts": attempts, "by": by})
        check_recovery(recovery)
        if by == "threshold" and space.groups and not space.thresholds:
            raise InputError("uniform: by=threshold compares the units of all groups, which space=weight alone lets it")
        self._one = globally if by == "threshold" else evenly
        self.space, self.budgets, self.costs = space, tuple(budgets), dict(costs)
        self.attempts = attempts
        self._recoveries = list(RECOVERIES[RECOVERIES.index(recovery) :])
        self._finished = False

    def ask(self) -> Sequence[Candidate]:
        if self._finished or self.attempts == 0:
            return []
        self.attempts -= 1
        return [Candidate(ratios=self._smallest(), recovery=self._recoveries[0], measure=True)]

    def tell(self, trials: Sequence[Trial]) -> None:
        (trial,) = trials
        if trial.error:
            self._recoveries.pop(0)
            self._finished = not self._recoveries
        else:
            self._finished = all_met(self.budgets, trial.costs) is not False  # None: the measurement was disturbed
        self.costs = {name: cost.calibrated(trials) for name, cost in self.costs.items()}

    def _smallest(self) -> tuple[float, ...]:
        """The least common ratio or threshold that is predicted to keep every budget, or the smallest network."""
        try:
            return self.space.ratios(self._one(self.space, self._keeps))
        except InfeasibleError:
            return self.space.ratios([len(g.levels) - 1 for g in self.space.groups])

    def _keeps(self, levels: Sequence[int]) -> bool:
        return all(self.costs[b.cost].predict(self.space.ratios(levels)) <= b.limit for b in self.budgets)
