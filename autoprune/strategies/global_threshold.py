"""Global pruning: one threshold of importance over the whole network; what lies below it goes, whatever group it is of.

Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, arXiv 1611.06440,
rank the filters of all layers together; Liu et al., "Learning Efficient Convolutional Networks through Network
Slimming", ICCV 2017, arXiv 1708.06519, cut all at one threshold. Scores of different groups have different scales, so
each group's are divided first (`normalise`): by their mean, as the code of Torch-Pruning does by default (Fang et al.,
"DepGraph", CVPR 2023, arXiv 2301.12900), by their max or sum, which it has too, or by their l2 norm, as Molchanov et
al. do. LAMP (Lee et al., ICLR 2021, arXiv 2010.07611) makes scores that are compared as they are.

A threshold may take all of a layer while others are hardly touched: layer collapse (Tanaka et al., "Pruning neural
networks without any data by iteratively conserving synaptic flow", NeurIPS 2020, arXiv 2006.05467). So every group
keeps a `floor`, and the threshold rises further for the others.

Deviations from the papers:
- The threshold is the least that is predicted to keep the budgets, instead of one that takes a given fraction.
- A group takes the deepest of its levels that removes nothing above the threshold: it keeps what the threshold alone
  would leave of it, or more where levels are coarse, and the threshold rises for it.
- One cut, without training between several.
- Floors that leave the budgets no room give: once every group is at its floor, or as deep as its levels go, the units
  below the floors go by the same thresholds. The report names the groups.
- Of equal scores, as normalisations have that were never trained, those that leave their group at the least ratio go
  first, so that no group goes before another.

Letters: G groups, L levels of one group, U units of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from autoprune.allocate import common_thresholds
from autoprune.core import (
    Budget,
    CostModel,
    Finding,
    InputError,
    PruningSpace,
    Recovery,
    Scripted,
    Trial,
    check_recovery,
    check_rules,
    is_number,
)
from autoprune.descent import descended

if TYPE_CHECKING:
    from autoprune.core import Floats

SCALES: dict[str, Callable[[Floats], float]] = {
    "mean": lambda scores: float(np.mean(scores)),
    "max": lambda scores: float(np.max(scores)),
    "sum": lambda scores: float(np.sum(scores)),
    "l2": lambda scores: float(np.linalg.norm(scores)),
    "none": lambda scores: 1.0,
}
LEAST = 1e-300  # what scores that are all zero are divided by


class GlobalThreshold(Scripted):
    """See the module's docstring.

    normalise: what each group's scores are divided by: their "mean", "max", "sum" or "l2" norm, or "none". Most
    criteria divide each layer's scores by their mean themselves (`criterion.normalise`), and "none" then is as "mean";
    where scores are to be compared as they are, such as LAMP's, both are "none". Single weights are compared by
    magnitude, whatever this and the criterion are: global magnitude pruning. floor in [0, 1): the fraction of its units
    that each group keeps; one it always keeps. attempts: how many answers may be measured; a measured cost above its
    limit calibrates the cost model, and the next higher threshold is tried. recovery: what an answer gets before it is
    scored; where that fails, the next lesser one is tried.

    Raises:
        InputError: a setting is out of its range, the space has blocks, or a score is not finite.
    """

    def __init__(
        self,
        space: PruningSpace,
        budgets: Sequence[Budget],
        costs: Mapping[str, CostModel],
        *,
        seed: int = 0,
        normalise: str = "mean",
        floor: float = 0.1,
        attempts: int = 4,
        recovery: Recovery = "short",
    ) -> None:
        rules = {
            f"normalise must be one of {', '.join(SCALES)}": normalise in SCALES,
            "floor must be a number from 0 to below 1": is_number(floor) and 0 <= floor < 1,
            "attempts >= 1": attempts >= 1,
        }
        check_rules("global", rules, {"normalise": normalise, "floor": floor, "attempts": attempts})
        check_recovery(recovery)
        if block := next((group.name for group in space.groups if group.kind == "block"), None):
            raise InputError(
                f"global: a block has no units to compare with those of other groups, got '{block}': leave block out "
                "of space.grain, or choose another strategy"
            )
        self.space, self.floor = space, floor
        self.findings: tuple[Finding, ...] = ()
        choices = thresholds(space, normalise=normalise, floor=floor)
        super().__init__(descended(space, budgets, costs, choices, attempts=attempts, recovery=recovery))

    def tell(self, trials: Sequence[Trial]) -> None:
        kept = zip(self.space.groups, self.space.kept(trials[-1].candidate.ratios), strict=True)
        self.findings = tuple(Finding(g.name, "below the floor") for g, n in kept if n / g.size < self.floor)
        super().tell(trials)


def thresholds(space: PruningSpace, *, normalise: str, floor: float) -> Iterator[tuple[int, ...]]:
    """What each threshold leads to, as level indices [G], from the dense network to the smallest: with the floors, and
    then without them."""
    levels = [0] * len(space.groups)
    yield tuple(levels)
    reached = _of_weights(space) if space.thresholds else _of_units(space, normalise)
    steps = [
        ((group.kept(ratio) / group.size < floor, *threshold), g, level)
        for g, (group, rows) in enumerate(zip(space.groups, reached, strict=True))
        for level, (ratio, threshold) in enumerate(zip(group.levels[1:], rows, strict=True), start=1)
    ]
    for _, together in groupby(sorted(steps), key=itemgetter(0)):
        for _, g, level in together:
            levels[g] = level
        yield tuple(levels)


def _of_units(space: PruningSpace, normalise: str) -> list[list[tuple[float, ...]]]:
    """Of each group's levels but the first, the importance of the last unit that it removes, and its ratio."""
    if len(space.importance) != len(space.groups):
        raise ValueError("the space does not hold the importance of its groups' units: see PruningSpace.ranked")
    found: list[list[tuple[float, ...]]] = []
    for group, importance in zip(space.groups, space.importance, strict=True):
        scores = np.array(importance)
        if not np.isfinite(scores).all():
            raise InputError(
                f"global: the importance of every unit must be finite, the criterion's of {group.name} is not"
            )
        scores = scores / max(SCALES[normalise](np.abs(scores)), LEAST)
        found.append([(float(scores[group.size - group.kept(r) - 1]), r) for r in group.levels[1:]])
    return found


def _of_weights(space: PruningSpace) -> list[list[tuple[float, ...]]]:
    """Of each group's levels but the first, the number of the space's threshold at which it is reached."""
    rows = list(common_thresholds(space))
    return [
        [(next(k for k, levels in enumerate(rows) if levels[g] >= i),) for i in range(1, len(group.levels))]
        for g, group in enumerate(space.groups)
    ]
