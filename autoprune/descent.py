"""How a baseline that has laid out its candidates beforehand searches: from the largest network to the smallest, the
first that is predicted to keep every budget is measured; where it exceeds one, that calibrates the cost models, and the
next that they then predict to keep all is measured.

For strategies that follow one number, a ratio or a threshold (uniform, global).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress

from autoprune.allocate import InfeasibleError, first_inside
from autoprune.core import RECOVERIES, Budget, Candidate, CostModel, PruningSpace, Recovery, Trial, all_met


def descended(
    space: PruningSpace,
    budgets: Sequence[Budget],
    costs: Mapping[str, CostModel],
    choices: Iterable[tuple[int, ...]],
    *,
    attempts: int,
    recovery: Recovery,
) -> Generator[list[Candidate], Sequence[Trial], None]:
    """At most `attempts` candidates, one at a time; where none of the choices is left, the smallest network, which is
    the closest there is.

    choices: level indices [G] each, from the largest network to the smallest. recovery: what a candidate gets before it
    is scored; where that fails, it is tried again with the next lesser one.
    """

    def keeps(levels: tuple[int, ...]) -> bool:
        return all(costs[b.cost].predict(space.ratios(levels)) <= b.limit for b in budgets)

    def following() -> tuple[int, ...]:
        with suppress(InfeasibleError):
            return first_inside(left, lambda choice: choice != levels and keeps(choice))
        return smallest

    levels: tuple[int, ...] = ()
    costs, left = dict(costs), iter(choices)
    smallest = tuple(len(group.levels) - 1 for group in space.groups)
    recoveries = list(RECOVERIES[RECOVERIES.index(recovery) :])
    levels = following()
    for _ in range(attempts):
        (trial,) = yield [Candidate(ratios=space.ratios(levels), recovery=recoveries[0], measure=True)]
        if trial.error:
            recoveries.pop(0)
            if not recoveries:
                return
        elif all_met(budgets, trial.costs) is False and levels != smallest:  # None: the measurement was disturbed
            costs = {name: cost.calibrated([trial]) for name, cost in costs.items()}
            levels = following()
        else:
            return
