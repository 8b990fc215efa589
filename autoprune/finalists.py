"""How a search over many candidates ends: the best few are recovered briefly, and the best of those is measured.

For strategies that score whole candidates (amc, random, optuna). A limit that the measurement misses calibrates its
cost model; what was scored is then bounded by the calibrated costs, and the best few are chosen anew.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

from autoprune.bound import Bound, Levels
from autoprune.core import (
    RECOVERIES,
    Budget,
    Candidate,
    CostModel,
    PruningSpace,
    Recovery,
    Trial,
    all_met,
    check_recovery,
    check_rules,
)

Conversation = Generator[list[Candidate], Sequence[Trial], None]


@dataclass(kw_only=True)
class Ending:
    """The end of one search: at most `finalists` candidates get their recovery at a time, and at most `attempts` are
    measured. strategy: whose settings these are, for the error.

    Raises:
        InputError: finalists or attempts below 1, or no such recovery.
    """

    strategy: str
    space: PruningSpace
    budgets: tuple[Budget, ...]
    costs: Mapping[str, CostModel]
    finalists: int
    attempts: int
    recovery: Recovery
    _tried: dict[tuple[Levels, Recovery], Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = {"finalists >= 1": self.finalists >= 1, "attempts >= 1": self.attempts >= 1}
        check_rules(self.strategy, rules, vars(self))
        check_recovery(self.recovery)

    def best(
        self, scored: Mapping[Levels, Trial], worth: Callable[[Trial], float] = lambda trial: trial.score
    ) -> Conversation:
        """Recover those of most worth, of those scored on most images, and measure the best: of what is predicted to
        keep the budgets first, then of what had to be bounded anew. Where nothing is left, the smallest network is
        measured, the closest there is."""
        whole = {levels: trial for levels, trial in scored.items() if trial.error is None}
        done: set[Levels] = set()
        answered = False
        for _ in range(self.attempts):
            bound = Bound(self.space, self.budgets, self.costs)
            ranked = sorted(whole, key=lambda n: (not bound.keeps(n), *_order(whole[n], worth)))
            inside = dict.fromkeys(levels if bound.keeps(levels) else bound.walked(levels) for levels in ranked)
            best = [levels for levels in inside if levels not in done][: self.finalists] if bound.reachable else []
            if not best:
                answered = False
                break
            measured = yield from self._measured(best, worth)
            if measured is None:
                done |= set(best)
                continue
            levels, trial = measured
            if all_met(self.budgets, trial.costs) is not False:
                return
            answered = True
            done.add(levels)
            self.costs = {name: cost.calibrated([trial]) for name, cost in self.costs.items()}
        if not answered:
            yield from self.smallest()

    def smallest(self) -> Conversation:
        """The smallest network measured, with its recovery or the next lesser one that does not fail."""
        ratios = tuple(group.levels[-1] for group in self.space.groups)
        for recovery in RECOVERIES[RECOVERIES.index(self.recovery) :]:
            (trial,) = yield [Candidate(ratios=ratios, recovery=recovery, measure=True)]
            if trial.error is None:
                return

    def _measured(
        self, best: Sequence[Levels], worth: Callable[[Trial], float]
    ) -> Generator[list[Candidate], Sequence[Trial], tuple[Levels, Trial] | None]:
        """The best of these after their recovery, or after the next lesser one where all fail, measured; the next best
        where a measurement fails."""
        for recovery in RECOVERIES[RECOVERIES.index(self.recovery) :]:
            unseen = [levels for levels in best if (levels, recovery) not in self._tried]
            asked = [
                Candidate(ratios=self.space.ratios(n), recovery=recovery, about={"phase": "finalist"}) for n in unseen
            ]
            trials = (yield asked) if asked else ()
            self._tried |= {(levels, recovery): trial for levels, trial in zip(unseen, trials, strict=True)}
            whole = {levels: self._tried[levels, recovery] for levels in best}
            whole = {levels: trial for levels, trial in whole.items() if trial.error is None}
            for levels in sorted(whole, key=lambda n: _order(whole[n], worth)):
                (trial,) = yield [Candidate(ratios=self.space.ratios(levels), recovery=recovery, measure=True)]
                if trial.error is None:
                    return levels, trial
        return None


def _order(trial: Trial, worth: Callable[[Trial], float]) -> tuple[float, float, float]:
    return -trial.candidate.fidelity, -worth(trial), trial.loss
