"""The baseline: the same ratio for every group, the smallest that keeps the budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoprune.allocate import common_ratios
from autoprune.core import Budget, CostModel, PruningSpace, Recovery, Scripted, check_recovery, check_rules
from autoprune.descent import descended


class Uniform(Scripted):
    """One candidate: every group at the level nearest above one common ratio.

    A measured cost above its limit calibrates the cost model and the next larger ratio is tried, at most `attempts`
    times. recovery: what the answer gets before it is scored; where that fails, the next lesser one is tried.

    Raises:
        InputError: a setting is out of its range.
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
    ) -> None:
        check_rules("uniform", {"attempts >= 1": attempts >= 1}, {"attempts": attempts})
        check_recovery(recovery)
        super().__init__(descended(space, budgets, costs, common_ratios(space), attempts=attempts, recovery=recovery))
