"""AMC's action bound: a walk over the groups that ends inside every budget, whatever it wishes on its way.

He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018, arXiv 1802.03494,
Algorithm 1: what is kept so far, this layer and the least of all later layers together must fit. Here for groups of
coupled layers, any cost model and several budgets: a level is open to a group if the network that has it, the levels
chosen before, and the deepest level of every later group is predicted to keep every budget. The deepest level is always
open, as the step before left that very network open; so nothing has to be assumed of how costs depend on levels.

Beside the paper's bound from above there may be one from below: what keeps every later group whole is to use most of
the tightest limit, or the walk can only end far inside it, where a larger network would have done.

Letters: G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoprune.core import Budget, CostModel, PruningSpace

Levels = tuple[int, ...]  # level indices, one a group [G], or of the first groups


class Bound:
    """The bound of one space, its budgets and their cost models. least: the fraction of the tightest limit that a walk
    is to use if it can; 0, the paper's, for no bound from below."""

    def __init__(
        self, space: PruningSpace, budgets: Sequence[Budget], costs: Mapping[str, CostModel], *, least: float = 0.0
    ) -> None:
        self.space, self.budgets, self.costs, self.least = space, tuple(budgets), costs, least
        self.deepest: Levels = tuple(len(group.levels) - 1 for group in space.groups)

    @property
    def reachable(self) -> bool:
        """Whether the smallest network is predicted to keep every budget; nothing is bounded where it is not."""
        return self.keeps(self.deepest)

    def keeps(self, levels: Sequence[int]) -> bool:
        """Whether a network is predicted to keep every budget."""
        return self.use(levels) <= 1

    def use(self, levels: Sequence[int]) -> float:
        """The largest fraction of a limit that a network is predicted to take."""
        ratios = self.space.ratios(levels)
        return max((self.costs[b.cost].predict(ratios) / b.limit for b in self.budgets), default=0.0)

    def opened(self, chosen: Levels, wish: int) -> int:
        """The next group's level after those chosen: the wish, or the first deeper one that is open; of a wish that
        would leave too much of the limits unused, the first shallower one that does not, as far as they are open."""
        deepest = self.deepest[len(chosen)]
        level = next((n for n in range(wish, deepest) if self._open(chosen, n)), deepest)
        while level > 0 and self._wastes(chosen, level) and self._open(chosen, level - 1):
            level -= 1
        return level

    def _open(self, chosen: Levels, level: int) -> bool:
        return self.keeps((*chosen, level, *self.deepest[len(chosen) + 1 :]))

    def _wastes(self, chosen: Levels, level: int) -> bool:
        rest = len(self.deepest) - len(chosen) - 1
        return self.least > 0 and self.use((*chosen, level, *(0,) * rest)) < self.least

    def walked(self, wishes: Sequence[int]) -> Levels:
        """A whole walk [G]: every group's wish, or the first deeper level that is open."""
        chosen: Levels = ()
        for wish in wishes:
            chosen = (*chosen, self.opened(chosen, wish))
        return chosen
