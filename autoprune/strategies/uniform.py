"""The baseline: the same ratio for every group, or one threshold of importance for all, the smallest that keeps the
budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from autoprune.allocate import common_ratios, common_thresholds
from autoprune.core import Budget, CostModel, InputError, PruningSpace, Recovery, Scripted, check_recovery, check_rules
from autoprune.descent import descended


class Uniform(Scripted):
    """One candidate: every group at the level nearest above one common ratio; or, by "threshold", what one threshold of
    importance over all groups together leaves (global magnitude pruning, where single weights are pruned).

    A measured cost above its limit calibrates the cost model and the next larger ratio is tried, at most `attempts`
    times. recovery: what the answer gets before it is scored; where that fails, the next lesser one is tried.

    Raises:
        InputError: a setting is out of its range, or the space has no thresholds to go by.
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
        choices = common_thresholds(space) if by == "threshold" else common_ratios(space)
        super().__init__(descended(space, budgets, costs, choices, attempts=attempts, recovery=recovery))
