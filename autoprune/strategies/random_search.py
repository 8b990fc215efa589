"""The baseline that a learning agent has to beat: candidates drawn evenly from the surface of the budgets.

The surface is every choice of levels that takes between 1 - `band` of the tightest limit and all of it. A walk that
gives two groups levels at random, and stays where it is if that leaves the surface, visits each of its choices equally
often in the long run, as its proposals are symmetric (Metropolis et al., J. Chem. Phys. 21, 1953); one draw is taken
every `thin` proposals a group. Draws that are rejected at random instead would seldom lie on the surface at all; draws
that are cut until they fit would favour some choices over others.

Letters: G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from autoprune.bound import Bound, Levels
from autoprune.core import Budget, Candidate, CostModel, PruningSpace, Recovery, Scripted, check_recovery, check_rules
from autoprune.finalists import Conversation, Ending
from autoprune.race import WAYS, By, raced

BURN_IN = 20  # draws that are thrown away, as the walk begins at a choice of its own


class RandomSearch(Scripted):
    """See the module's docstring.

    episodes: candidates drawn, all at once; where the surface has fewer, each once. band in (0, 1], thin >= 1: see
    above. proxy: the recovery that they are scored after. race in [0, 1): how likely the best may be dropped before it
    was scored on all images, at a rung of the race (race.py), by its "loss", "score" or, taking half as many images
    again, "either"; 0 scores all on all. finalists, attempts, recovery: see finalists.py.

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
        episodes: int = 400,
        band: float = 0.05,
        thin: int = 5,
        proxy: Recovery = "probe",
        race: float = 0.05,
        by: By = "loss",
        finalists: int = 3,
        attempts: int = 4,
        recovery: Recovery = "short",
    ) -> None:
        rules = {
            "episodes >= 1": episodes >= 1,
            "0 < band <= 1": 0 < band <= 1,
            "thin >= 1": thin >= 1,
            "0 <= race < 1": 0 <= race < 1,
            f"by must be one of {', '.join(WAYS)}": by in WAYS,
        }
        given = {"episodes": episodes, "band": band, "thin": thin, "race": race, "by": by}
        check_rules("random", rules, given)
        check_recovery(proxy)
        self.space, self.budgets, self.costs, self.seed = space, tuple(budgets), dict(costs), seed
        self.episodes, self.band, self.thin = episodes, band, thin
        self.proxy: Recovery = proxy
        self.race, self.by, self.finalists = race, by, finalists
        self._ending = Ending(
            strategy="random",
            space=space,
            budgets=self.budgets,
            costs=self.costs,
            finalists=finalists,
            attempts=attempts,
            recovery=recovery,
        )
        super().__init__(self._converse())

    def _converse(self) -> Conversation:
        bound = Bound(self.space, self.budgets, self.costs)
        if not (self.budgets and bound.reachable):
            yield from self._ending.smallest()
            return
        drawn = surface(bound, np.random.default_rng(self.seed), band=self.band, thin=self.thin)
        found = list(dict.fromkeys(islice(drawn, BURN_IN, BURN_IN + self.episodes)))
        asked = [Candidate(ratios=bound.space.ratios(levels), recovery=self.proxy) for levels in found]
        trials = yield from raced(asked, keep=self.finalists, by=self.by, error=self.race, seed=self.seed)
        yield from self._ending.best(dict(zip(found, trials, strict=True)))


def surface(bound: Bound, rng: np.random.Generator, *, band: float, thin: int) -> Iterator[Levels]:
    """Endless draws [G] from the surface of the budgets; where nothing of it was found, the walk stays at the largest
    network inside that it began at."""
    here = _filled(bound, bound.walked([int(rng.integers(n + 1)) for n in bound.deepest]), rng)
    least = min(1 - band, bound.use(here))
    while True:
        for _ in range(thin * len(here)):
            a, b = rng.integers(len(here)), rng.integers(len(here))
            moved = list(here)
            moved[a], moved[b] = int(rng.integers(bound.deepest[a] + 1)), int(rng.integers(bound.deepest[b] + 1))
            if least <= bound.use(moved) <= 1:
                here = tuple(moved)
        yield here


def _filled(bound: Bound, levels: Levels, rng: np.random.Generator) -> Levels:
    """A network inside the budgets, its groups one by one in random order as shallow as the budgets allow."""
    for g in rng.permutation(len(levels)):
        open_to_it = (level for level in range(levels[g]) if bound.keeps((*levels[:g], level, *levels[g + 1 :])))
        levels = (*levels[:g], next(open_to_it, levels[g]), *levels[g + 1 :])
    return levels
