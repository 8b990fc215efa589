"""Sensitivity: what each group's pruning costs in loss, then the exact choice of ratios under the budgets.

Each group alone is cut at some of its levels and scored (MIT 6.5940's per-layer sweep; Han et al., NeurIPS 2015). The
loss increase over the dense model on the same images, after recalibrating batch normalisation, is made monotone
(isotonic regression) and interpolated to the other levels. The levels of least summed loss under every budget follow
from an exact allocation (allocate.py) on the cost tables, pairs of groups included. The answer is measured; a limit
that is missed, or kept by far, calibrates its cost model and the allocation is solved again.

Deviations from the course's rule: loss instead of accuracy (smoother at equal images), an allocation instead of one
accuracy threshold for all layers. The sum of single increases ignores how groups interact: `refinements` sweeps the
neighbourhood of the answer again, all other groups staying pruned, and keeps what scores better.

Letters: G groups, L levels of one group.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from autoprune.allocate import InfeasibleError, allocate, evenly
from autoprune.core import (
    RECOVERIES,
    Budget,
    Candidate,
    CostModel,
    InputError,
    PruningSpace,
    Recovery,
    Scripted,
    Trial,
    all_met,
    check_recovery,
)

Losses = NDArray[np.float64]
Finalists = Mapping[str, "Sequence[Losses] | None"]  # by kind: what it is allocated on; None is one ratio for all
ROOM = 0.9  # of a limit: an answer whose measured interval lies below leaves room for a larger network
NEGLIGIBLE = 0.01  # of the dense loss: a group whose deepest cut costs less is called insensitive


@dataclass(frozen=True)
class Finding:
    """What the sweep says of one group, for the report: "insensitive", "impossible" (no level could be scored)."""

    group: str
    what: str


class Sensitivity(Scripted):
    """See the module's docstring.

    sweep_levels: how many levels of each group are scored, spread evenly over its range. refinements: rounds of
    sweeping around the answer. evenness: weights w >= 0, one finalist each: to a group's loss is added w x its ratio
    squared x the mean loss of the groups' deepest cuts. attempts: how often the answer may be measured, calibrated and
    solved again. recovery: what finalists get before they are scored.

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
        sweep_levels: int = 7,
        refinements: int = 1,
        evenness: Sequence[float] = (0.125, 0.25, 0.5),
        attempts: int = 4,
        recovery: Recovery = "short",
    ) -> None:
        if sweep_levels < 1 or refinements < 0 or attempts < 1:
            raise InputError(
                "sensitivity: sweep_levels and attempts must be >= 1 and refinements >= 0, "
                f"got {sweep_levels}, {attempts}, {refinements}"
            )
        if not all(0 <= weight < math.inf for weight in evenness):
            raise InputError(f"sensitivity: evenness must be finite weights >= 0, got {list(evenness)}")
        check_recovery(recovery)
        self.space, self.budgets, self.costs = space, tuple(budgets), dict(costs)
        self.sweep_levels, self.refinements, self.attempts = sweep_levels, refinements, attempts
        self.evenness = tuple(evenness)
        self.recovery: Recovery = recovery
        self.findings: tuple[Finding, ...] = ()
        super().__init__(self._converse())

    def _converse(self) -> Generator[list[Candidate], Sequence[Trial], None]:
        smallest = tuple(len(g.levels) - 1 for g in self.space.groups)
        if any(self.costs[b.cost].predict(self._ratios(smallest)) > b.limit for b in self.budgets):
            trial = yield from self._measured(smallest)  # nothing seems to keep the budgets: the closest there is
            if trial.error or not (all_met(self.budgets, trial.costs) and self._worth_another(trial)):
                return
            self.costs = {name: cost.calibrated([trial]) for name, cost in self.costs.items()}
        losses = self._analysed((yield self._sweep()))
        try:
            finalists: Finalists = {
                "sweep": losses,
                **(yield from self._refined(self._allocated(losses), losses)),
                **{f"evenness {weight:g}": self._charged(losses, weight) for weight in self.evenness},
                "one ratio": None,
            }
            tried = set()
            for _ in range(self.attempts):
                answer, finalists = yield from self._best_of(finalists)
                if answer in tried:
                    return
                tried.add(answer)
                trial = yield from self._measured(answer)
                if trial.error or not self._worth_another(trial):
                    return
                self.costs = {name: cost.calibrated([trial]) for name, cost in self.costs.items()}
        except InfeasibleError:
            yield from self._measured(smallest)

    def _worth_another(self, trial: Trial) -> bool:
        """Whether a budget is exceeded, or all are kept with so much room that a larger network would do; not after a
        disturbed measurement, which calibrates nothing."""
        inside = all_met(self.budgets, trial.costs)
        if inside is None:
            return False
        return not inside or all(trial.costs[b.cost].high < ROOM * b.limit for b in self.budgets)

    # ------------------------------------------------------------------------------------------------- the sweep

    def _swept(self, group: int) -> list[int]:
        """Level indices of a group that the sweep scores, the deepest included."""
        last = len(self.space.groups[group].levels) - 1
        count = min(self.sweep_levels, last)
        return sorted({round((i + 1) * last / count) for i in range(count)})

    def _cells(self) -> list[tuple[int, int]]:
        return [(g, i) for g in range(len(self.space.groups)) for i in self._swept(g)]

    def _sweep(self) -> list[Candidate]:
        """The dense model as it is, then every cell: one group at one level."""
        dense = (0,) * len(self.space.groups)
        cells = (self._moved(dense, g, i) for g, i in self._cells())
        return [Candidate(ratios=self._ratios(dense), recovery="none"), *cells]

    def _analysed(self, trials: Sequence[Trial]) -> list[Losses]:
        """The sweep's trials -> monotone loss increases, one [L] a group."""
        dense, *swept = trials
        increases: list[dict[int, float]] = [{0: 0.0} for _ in self.space.groups]
        for (g, i), trial in zip(self._cells(), swept, strict=True):
            increases[g][i] = math.inf if trial.error else trial.loss - dense.loss
        losses = [_monotone(row, len(g.levels)) for row, g in zip(increases, self.space.groups, strict=True)]
        found = []
        for group, row in zip(self.space.groups, losses, strict=True):
            if len(row) > 1 and not np.isfinite(row[1:]).any():
                found.append(Finding(group.name, "impossible"))
            elif len(row) > 1 and row[-1] <= NEGLIGIBLE * abs(dense.loss):
                found.append(Finding(group.name, "insensitive"))
        self.findings = tuple(found)
        return losses

    def _allocated(self, losses: Sequence[Losses] | None) -> tuple[int, ...]:
        """The levels of least summed loss under the budgets; without losses, of one ratio for all groups."""
        if losses is None:
            return evenly(self.space, lambda r: all(self.costs[b.cost].predict(r) <= b.limit for b in self.budgets))
        limits = [(form, b.limit) for b in self.budgets for form in self.costs[b.cost].tables()]
        return allocate(losses, limits).levels

    # ------------------------------------------------------------------------------------------------- refinement

    def _refined(
        self, answer: tuple[int, ...], losses: list[Losses]
    ) -> Generator[list[Candidate], Sequence[Trial], dict[str, list[Losses]]]:
        """Sweep around the answer, allocate within what was seen, go there if it scores better; and so on.

        Returns the losses that led there, round by round.
        """
        found: dict[str, list[Losses]] = {}
        if self.refinements == 0:
            return found
        (here,) = yield [Candidate(ratios=self._ratios(answer))]
        for number in range(1, self.refinements + 1):
            steps = self._steps(answer)
            if here.error or not steps:
                break
            trials = yield [self._moved(answer, g, i) for g, i in steps]
            local = self._local(answer, here.loss, steps, trials)
            proposal = self._allocated(local)
            if proposal == answer:
                break
            (there,) = yield [Candidate(ratios=self._ratios(proposal))]
            if there.error or there.loss >= here.loss:
                break
            answer, here = proposal, there
            found[f"refinement {number}"] = local
        return found

    def _charged(self, losses: Sequence[Losses], weight: float) -> list[Losses]:
        """Losses with a charge on ratios: quadratic, so that it spreads what is cut over the groups."""
        deepest = [row[np.isfinite(row)][-1] for row in losses]
        each = zip(self.space.groups, losses, strict=True)
        return [row + weight * float(np.mean(deepest)) * np.square(g.levels) for g, row in each]

    def _best_of(
        self, finalists: Finalists
    ) -> Generator[list[Candidate], Sequence[Trial], tuple[tuple[int, ...], Finalists]]:
        """Allocate for every finalist under the costs as calibrated: the one that scores best after its recovery, and
        the two best kinds of finalist."""
        proposals: dict[tuple[int, ...], str] = {}
        for kind, losses in finalists.items():
            with suppress(InfeasibleError):  # a refinement may not reach far enough, one ratio may not do at all
                proposals.setdefault(self._allocated(losses), kind)
        if not proposals:
            raise InfeasibleError
        ranked = list(proposals)
        if len(ranked) > 1:
            asked = [
                Candidate(ratios=self._ratios(levels), recovery=self.recovery, about={"finalist": kind})
                for levels, kind in proposals.items()
            ]
            trials = dict(zip(proposals, (yield asked), strict=True))
            ranked.sort(key=lambda levels: (trials[levels].error is not None, trials[levels].loss))
        return ranked[0], {proposals[levels]: finalists[proposals[levels]] for levels in ranked[:2]}

    def _steps(self, answer: Sequence[int]) -> list[tuple[int, int]]:
        """The swept levels on either side of the answer, for each group."""
        steps = []
        for g, now in enumerate(answer):
            swept = [0, *self._swept(g)]
            below, above = [i for i in swept if i < now], [i for i in swept if i > now]
            steps += [(g, i) for i in (*below[-1:], *above[:1])]
        return steps

    def _local(
        self, answer: Sequence[int], loss: float, steps: Sequence[tuple[int, int]], trials: Sequence[Trial]
    ) -> list[Losses]:
        """Loss changes from the answer; levels beyond the steps seen are not allowed."""
        seen: list[dict[int, float]] = [{now: 0.0} for now in answer]
        for (g, i), trial in zip(steps, trials, strict=True):
            if not trial.error:
                seen[g][i] = trial.loss - loss
        rows = []
        for points, group in zip(seen, self.space.groups, strict=True):
            known = sorted(points)
            rising = isotonic_regression([points[i] for i in known]).x
            row = np.full(len(group.levels), math.inf)
            row[known[0] : known[-1] + 1] = np.interp(np.arange(known[0], known[-1] + 1), known, rising)
            rows.append(row)
        return rows

    # ------------------------------------------------------------------------------------------------- candidates

    def _moved(self, levels: Sequence[int], group: int, level: int) -> Candidate:
        return Candidate(ratios=self._ratios((*levels[:group], level, *levels[group + 1 :])))

    def _measured(self, levels: Sequence[int]) -> Generator[list[Candidate], Sequence[Trial], Trial]:
        """The answer with its recovery; where that fails (a fine-tune that diverges, say) with the next lesser one."""
        for recovery in RECOVERIES[RECOVERIES.index(self.recovery) :]:
            (trial,) = yield [Candidate(ratios=self._ratios(levels), recovery=recovery, measure=True)]
            if not trial.error:
                break
        return trial

    def _ratios(self, levels: Sequence[int]) -> tuple[float, ...]:
        return tuple(g.levels[i] for g, i in zip(self.space.groups, levels, strict=True))


def _monotone(points: Mapping[int, float], count: int) -> Losses:
    """Loss increases at some levels [L] -> at all, rising; levels beyond the last that could be scored are infinite."""
    known = sorted(points)
    finite = [i for i in known if math.isfinite(points[i])]
    broken = next((i for i in known if not math.isfinite(points[i])), count)
    finite = [i for i in finite if i < broken]
    row = np.full(count, math.inf)
    rising = np.maximum(isotonic_regression([points[i] for i in finite]).x, 0.0)
    rising[0] = 0.0
    if len(finite) == 1:
        row[finite[0]] = 0.0
    else:
        inside = np.arange(finite[-1] + 1)
        row[inside] = PchipInterpolator(finite, rising)(inside)
    return row
