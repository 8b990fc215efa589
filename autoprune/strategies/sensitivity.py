"""Sensitivity: what each group's pruning costs in loss, then the exact choice of ratios under the budgets.

Each group alone is cut at some of its levels and scored (MIT 6.5940's per-layer sweep; Han et al., NeurIPS 2015). The
loss increase over the dense model on the same images, before any fine-tuning, is made monotone (isotonic regression)
and interpolated to the other levels. The levels of least summed loss under every budget follow
from an exact allocation (allocate.py) on the cost tables, pairs of groups included. The answer is measured; a limit
that is missed, or kept by far, calibrates its cost model, and what leads to the answer is solved again.

Deviations from the course's rule:
- Loss instead of accuracy (smoother at equal images), an allocation instead of one accuracy threshold for all layers.
- The sum of single increases ignores how groups interact: `refinements` sweeps the neighbourhood of the answer again,
  all other groups staying pruned, and keeps what scores better.
- What is lost before training is not what training leaves lost: groups cut deeply recover least. So several finalists
  get a part of their recovery, and the one of least loss is the answer: the allocations on the sweep, on its refinement
  and on the sweep plus a charge on squared ratios (`evenness`), and one ratio for all groups, widened where that leaves
  room.

Letters: G groups, L levels of one group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from autoprune import sweep
from autoprune.allocate import EVENNESS, InfeasibleError, allocate, charged, evenly, globally, within
from autoprune.core import (
    RECOVERIES,
    Budget,
    Candidate,
    CostModel,
    Finding,
    InputError,
    Measurement,
    PruningSpace,
    Recovery,
    Scripted,
    Trial,
    all_met,
    check_recovery,
    check_rules,
)

Losses = NDArray[np.float64]
Levels = tuple[int, ...]
Kinds = Mapping[str, "Callable[[], Levels]"]  # of finalists: how each is allocated under the costs as calibrated
AIM = 0.25  # of a missed measurement's half width: so far below the limit the next answer is aimed
ROOM = 0.9  # of a limit: an answer whose measured interval lies below leaves room for a larger network
TIE = 1e-3  # of evenness, in every allocation: where a curve is level, the budget is spent on wider groups
EXCHANGES = 20  # of a round
SWEEPS = ("bisect", "grid")
NEGLIGIBLE = 0.01  # of the dense loss: a group whose deepest cut costs less is called insensitive


class Sensitivity(Scripted):
    """See the module's docstring.

    sweep: "bisect" scores levels where a group's loss rises, at a `fidelity` of the images (sweep.bisected); "grid"
    scores sweep_levels of each group, spread evenly, on all images. refinements: rounds of sweeping around the answer,
    to the next of these levels. brief: fraction of their recovery's steps, and of the images, on
    which finalists compete and the answer is scored: what tells them apart shows in a few steps, and more of them level
    it (experiments/benchmarks). evenness: weights w >= 0, one finalist each: to a group's loss is added w x its ratio
    squared x the groups' mean loss at the deepest level that could be scored. exchanges: rounds in which a group gives
    to another, from the best finalist, scored after their recovery; the best of a round is gone on from while it is
    better. attempts: how often the answer may be measured, calibrated and solved again. recovery: what finalists get
    before they are scored.

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
        sweep: str = "bisect",
        fidelity: float = 0.2,
        sweep_levels: int = 6,
        refinements: int = 1,
        brief: float = 0.2,
        evenness: Sequence[float] = EVENNESS,
        exchanges: int = 0,
        attempts: int = 4,
        recovery: Recovery = "short",
    ) -> None:
        given = {"sweep_levels": sweep_levels, "refinements": refinements, "exchanges": exchanges, "attempts": attempts}
        least = {"sweep_levels": 1, "refinements": 0, "exchanges": 0, "attempts": 1}
        check_rules("sensitivity", {f"{name} >= {n}": given[name] >= n for name, n in least.items()}, given)
        rules = {
            "sweep must be bisect or grid": sweep in SWEEPS,
            "0 < fidelity <= 1": 0 < fidelity <= 1,
            "0 < brief <= 1": 0 < brief <= 1,
        }
        check_rules("sensitivity", rules, {"sweep": sweep, "fidelity": fidelity, "brief": brief})
        _check_weights(evenness)
        check_recovery(recovery)
        self.space, self.budgets, self.costs = space, tuple(budgets), dict(costs)
        self.sweep, self.fidelity = sweep, fidelity
        self.sweep_levels, self.refinements, self.attempts = sweep_levels, refinements, attempts
        self.brief, self.evenness, self.exchanges = brief, tuple(evenness), exchanges
        self._aims = {b.cost: 1.0 for b in self.budgets}  # what share of its limit an allocation may take
        self._leading: Kinds = {}  # to the best two finalists so far
        self._inside: dict[Levels, bool] = {}  # what was measured: whether it kept the budgets
        self._recovered: dict[tuple[Levels, Recovery], Trial] = {}
        self.recovery: Recovery = recovery
        self.findings: tuple[Finding, ...] = ()
        super().__init__(self._converse())

    def _converse(self) -> Generator[list[Candidate], Sequence[Trial], None]:
        smallest = tuple(len(g.levels) - 1 for g in self.space.groups)
        if any(self.costs[b.cost].predict(self.space.ratios(smallest)) > b.limit for b in self.budgets):
            trial = yield from self._measured(smallest)  # nothing seems to keep the budgets: the closest there is
            if trial.error or not (all_met(self.budgets, trial.costs) and self._worth_another(trial)):
                return
            self.costs = {name: cost.calibrated([trial]) for name, cost in self.costs.items()}
        losses = yield from self._sweep()
        try:
            kinds = yield from self._kinds(losses)
            for _ in range(self.attempts):
                best = yield from self._best_of(kinds)
                if best is None:
                    return
                answer, recovery = yield from self._exchanged(*best, losses)
                trial = yield from self._measured(answer, recovery)
                if trial.error or not self._worth_another(trial):
                    return
                self._inside[answer] = all_met(self.budgets, trial.costs) is True
                if not self._inside[answer]:
                    self._aims = {name: 1 - AIM * _half_width(trial.costs[name]) for name in self._aims}
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

    def _sweep(self) -> Generator[list[Candidate], Sequence[Trial], list[Losses]]:
        """Monotone loss increases, one [L] a group; what they tell of the groups goes into the findings: "insensitive",
        "impossible" (no level could be scored)."""
        (dense,) = yield [Candidate(ratios=self.space.dense(), recovery="none")]
        if self.sweep == "grid":
            losses = yield from self._grid(dense)
        else:
            losses = yield from sweep.bisected(self.space, fidelity=self.fidelity)
        found = []
        for group, row in zip(self.space.groups, losses, strict=True):
            if len(row) > 1 and not np.isfinite(row[1:]).any():
                found.append(Finding(group.name, "impossible"))
            elif len(row) > 1 and row[-1] <= NEGLIGIBLE * abs(dense.loss):
                found.append(Finding(group.name, "insensitive"))
        self.findings = tuple(found)
        return losses

    def _grid(self, dense: Trial) -> Generator[list[Candidate], Sequence[Trial], list[Losses]]:
        cells = [(g, i) for g in range(len(self.space.groups)) for i in self._swept(g)]
        trials = yield [self._moved((0,) * len(self.space.groups), g, i) for g, i in cells]
        increases: list[dict[int, float]] = [{0: 0.0} for _ in self.space.groups]
        for (g, i), trial in zip(cells, trials, strict=True):
            increases[g][i] = math.inf if trial.error else trial.loss - dense.loss
        return [sweep.monotone(row, len(g.levels)) for row, g in zip(increases, self.space.groups, strict=True)]

    def _allocated(self, losses: Sequence[Losses]) -> Levels:
        limits = [(form, b.limit * self._aims[b.cost]) for b in self.budgets for form in self.costs[b.cost].tables()]
        return allocate(charged(self.space, losses, TIE), limits).levels

    def _keeps(self, levels: Levels) -> bool:
        ratios = self.space.ratios(levels)
        return all(self.costs[b.cost].predict(ratios) <= b.limit * self._aims[b.cost] for b in self.budgets)

    # ------------------------------------------------------------------------------------------------- refinement

    def _refined(
        self, answer: Levels, losses: list[Losses]
    ) -> Generator[list[Candidate], Sequence[Trial], list[list[Losses]]]:
        """Sweep around the answer, allocate within what was seen, go there if it scores better; and so on.

        Returns the losses that led there, round by round.
        """
        found: list[list[Losses]] = []
        if self.refinements == 0:
            return found
        near = 1.0 if self.sweep == "grid" else self.fidelity
        (here,) = yield [Candidate(ratios=self.space.ratios(answer), fidelity=near)]
        for _ in range(self.refinements):
            steps = self._steps(answer)
            if here.error or not steps:
                break
            trials = yield [self._moved(answer, g, i, near) for g, i in steps]
            local = self._local(answer, here.loss, steps, trials)
            proposal = self._allocated(local)
            if proposal == answer:
                break
            (there,) = yield [Candidate(ratios=self.space.ratios(proposal), fidelity=near)]
            if there.error or there.loss >= here.loss:
                break
            answer, here = proposal, there
            found.append(local)
        return found

    # ------------------------------------------------------------------------------------------------- the finalists

    def _kinds(self, losses: list[Losses]) -> Generator[list[Candidate], Sequence[Trial], Kinds]:
        kinds: dict[str, Callable[[], Levels]] = {"sweep": partial(self._allocated, losses)}
        with suppress(InfeasibleError):  # a level that failed may bar what the budget takes
            for number, local in enumerate((yield from self._refined(self._allocated(losses), losses)), start=1):
                kinds[f"refinement {number}"] = partial(self._refinement, local, losses)
        kinds |= {
            f"evenness {weight}": partial(self._allocated, charged(self.space, losses, weight))
            for weight in self.evenness
        }
        if self.space.thresholds:
            kinds["one threshold widened"] = partial(self._widened, losses, globally)
        return kinds | {"one ratio widened": partial(self._widened, losses)}

    def _widened(self, losses: list[Losses], one: Callable[..., Levels] = evenly) -> Levels:
        """One ratio or threshold for all groups, widened."""
        return self._wider(one(self.space, self._keeps, losses), losses)

    def _refinement(self, local: list[Losses], losses: list[Losses]) -> Levels:
        """The allocation within what a refinement has seen, and what it leaves of the budgets spent beyond."""
        return self._wider(self._allocated(local), losses)

    def _wider(self, levels: Levels, losses: list[Losses]) -> Levels:
        """What these leave of the budgets spent on wider groups; the charge tells levels of the same loss apart."""
        rows = within(charged(self.space, losses, EVENNESS[0]), (0,) * len(levels), levels)
        with suppress(InfeasibleError):
            if self._keeps(wider := self._allocated(rows)):  # a form may be linear elsewhere
                return wider
        return levels

    def _best_of(self, kinds: Kinds) -> Generator[list[Candidate], Sequence[Trial], tuple[Levels, Recovery] | None]:
        """The finalist that scores best after its recovery, or after the next lesser one where all fail; what leads to
        the best two is remembered, and allocated again alone. None where nothing new can be measured.

        Raises:
            InfeasibleError: no finalist is predicted to keep the budgets.
        """
        for candidates in (self._leading, kinds):
            proposed = self._proposed(candidates)
            if left := [levels for levels in proposed if self._inside.get(levels, True)]:
                break
        if not proposed:
            raise InfeasibleError
        if len(left) == 1:
            return None if left[0] in self._inside else (left[0], self.recovery)
        for recovery in RECOVERIES[RECOVERIES.index(self.recovery) :]:
            unseen = [levels for levels in left if (levels, recovery) not in self._recovered]
            trials = (yield [self._finalist(n, recovery, proposed[n]) for n in unseen]) if unseen else ()
            self._recovered |= {(levels, recovery): t for levels, t in zip(unseen, trials, strict=True)}
            losses = {n: self._recovered[n, recovery].loss for n in left if not self._recovered[n, recovery].error}
            if losses:
                ranked = sorted(losses, key=losses.__getitem__)
                self._leading = {kind: kinds[kind] for levels in ranked[:2] for kind in proposed[levels]}
                return None if ranked[0] in self._inside else (ranked[0], recovery)
        return None

    # ------------------------------------------------------------------------------------------------- exchanges

    def _exchanged(
        self, answer: Levels, recovery: Recovery, losses: Sequence[Losses]
    ) -> Generator[list[Candidate], Sequence[Trial], tuple[Levels, Recovery]]:
        """Where exchanges between groups lead from a finalist."""
        for _ in range(self.exchanges):
            around = [answer, *self._exchanges(answer, losses)]
            unseen = [levels for levels in around if (levels, recovery) not in self._recovered]
            trials = (yield [self._finalist(n, recovery, ["exchange"]) for n in unseen]) if unseen else ()
            self._recovered |= {(levels, recovery): t for levels, t in zip(unseen, trials, strict=True)}
            whole = {n: self._recovered[n, recovery].loss for n in around if not self._recovered[n, recovery].error}
            best = min(whole, key=whole.__getitem__, default=answer)
            if best == answer or best in self._inside:
                break
            answer = best
        return answer, recovery

    def _exchanges(self, answer: Levels, losses: Sequence[Losses]) -> list[Levels]:
        """One group a level deeper, or as many as it takes for another to be as wide as the budgets then allow; those
        of least loss by the sweep."""
        found: dict[Levels, float] = {}
        for giver, taker in itertools.permutations(range(len(answer)), 2):
            for deeper in range(answer[giver] + 1, len(self.space.groups[giver].levels)):
                given = (*answer[:giver], deeper, *answer[giver + 1 :])
                taken = ((*given[:taker], wider, *given[taker + 1 :]) for wider in range(answer[taker]))
                if (levels := next(filter(self._keeps, taken), None)) is not None:
                    found[levels] = sum(float(row[i]) for row, i in zip(losses, levels, strict=True))
                    break
        return sorted((levels for levels in found if math.isfinite(found[levels])), key=found.__getitem__)[:EXCHANGES]

    # ------------------------------------------------------------------------------------------------- proposals

    def _proposed(self, kinds: Kinds) -> dict[Levels, list[str]]:
        """Every allocation that keeps the budgets, with the kinds that lead to it."""
        found: dict[Levels, list[str]] = {}
        for kind, allocated in kinds.items():
            with suppress(InfeasibleError):  # a refinement may not reach far enough, one ratio may not do at all
                found.setdefault(allocated(), []).append(kind)
        return found

    def _finalist(self, levels: Levels, recovery: Recovery, kinds: Sequence[str]) -> Candidate:
        about = {"finalist": ", ".join(kinds)}
        return Candidate(ratios=self.space.ratios(levels), recovery=recovery, fidelity=self.brief, about=about)

    # ------------------------------------------------------------------------------------------------- neighbourhood

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

    def _moved(self, levels: Sequence[int], group: int, level: int, fidelity: float = 1.0) -> Candidate:
        return Candidate(ratios=self.space.ratios((*levels[:group], level, *levels[group + 1 :])), fidelity=fidelity)

    def _measured(
        self, levels: Sequence[int], recovery: Recovery | None = None
    ) -> Generator[list[Candidate], Sequence[Trial], Trial]:
        """The answer with its recovery; where that fails (a fine-tune that diverges, say) with the next lesser one."""
        for lesser in RECOVERIES[RECOVERIES.index(recovery or self.recovery) :]:
            ratios = self.space.ratios(levels)
            (trial,) = yield [Candidate(ratios=ratios, recovery=lesser, fidelity=self.brief, measure=True)]
            if not trial.error:
                break
        return trial


def _half_width(measured: Measurement) -> float:
    """Of its interval, as a fraction of the value; 0 of a count."""
    return (measured.high - measured.low) / 2 / measured.value


def _check_weights(evenness: Sequence[float]) -> None:
    """Raises InputError unless these are different weights."""
    numbers = isinstance(evenness, Sequence) and all(isinstance(w, int | float) for w in evenness)
    if not (numbers and all(0 <= w < math.inf for w in evenness) and len(set(evenness)) == len(evenness)):
        raise InputError(
            f"sensitivity: evenness must be a list of different finite weights >= 0, got {evenness}: "
            "strategy.evenness=[0.25], or [] for none"
        )
