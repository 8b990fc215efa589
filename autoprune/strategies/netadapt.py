"""NetAdapt: many small steps, each in the one group where it hurts least, the device deciding how much a step saves.

Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications", ECCV 2018, arXiv 1804.03230,
Algorithm 1. Each round lowers the target of every budgeted cost by a scheduled amount; one proposal a group makes the
least cut of that group alone that meets the targets; proposals start from the last winner's weights and are fine-tuned
briefly; the best becomes the winner, is measured, and the next round starts from it.

Deviations from the paper:
- screen: only the `screen` proposals of best score before fine-tuning are fine-tuned (0: all, as in the paper).
- rule="loss": the winner is the proposal of least loss on the search images, which tells proposals apart where
  accuracies differ by a few images; "accuracy" is the paper's rule, equal ones told apart by the loss; "ratio" the
  least loss of score per cost saved (Howard et al., MobileNetV3, ICCV 2019, section 4.2; the authors' public code).
- start="allocation": rounds begin a part of the way to the budget, at the exact allocation of a sensitivity sweep that
  loses least after its recovery. Allocations beyond the last winner, which cut several groups, are proposed beside the
  cuts of one: where kernels have few steps, one group alone overshoots a target or is cut to the bone.
- Units are ranked by the search's criterion on the dense network, not by the L2 norm of the current weights.
- The winner alone is measured, and calibrates the cost models; the paper measures nothing but its layers beforehand.
  Far from the limits a glance will do, whose value the next round's target goes by and which calibrates nothing.
  Between the schedule's targets a model is relative to the last winner's measured value; at the limit itself it
  predicts the upper end of the measured interval, as that has to lie within the budget.
- Several budgets at once: a proposal meets the targets of all of them.
- Where no group can meet the targets alone, the group whose deepest cut comes nearest takes it.
- A budget that the smallest network seems not to keep is tried on that network first: no rounds for what cannot be met.
- A proposal that fails drops its group for the round. Where a winner's measurement was disturbed, its prediction stands
  for it until a round comes to the limit itself, which only a measurement decides.

Letters: G groups, L levels of one group, B budgets.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from autoprune import sweep
from autoprune.allocate import EVENNESS, InfeasibleError, allocate, charged, evenly, within
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
    check_rules,
)

if TYPE_CHECKING:
    from autoprune.core import Floats

CLOSE = 0.05  # a winner predicted nearer to where it would matter is measured in earnest
SEVERAL = "several"  # instead of a group's name: a proposal that cuts more than one
Levels = tuple[int, ...]
Conversation = Generator[list[Candidate], Sequence[Trial], "Trial | None"]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round. number: from 1; 0 is the allocation that rounds start from.

    targets, predicted, measured: one value a budget [B] in the cost's unit; predicted and measured are the winner's.
    proposals: numbers of the trials that were compared. winner: number of the winner's measured trial. Its score before
    fine-tuning (None where that was not asked for) and after its short fine-tune.
    """

    number: int
    targets: tuple[float, ...]
    proposals: tuple[int, ...]
    winner: int
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    score_before: float | None
    score_after: float


class NetAdapt(Scripted):
    """See the module's docstring.

    initial: reduction of the first round, a fraction of the dense cost in (0, 1); each round's is `decay` in (0, 1]
    times the last one's. rule: how the winner is chosen, see above. screen: how many proposals are fine-tuned a round,
    0 for all. start, start_at: where the rounds begin, and how far that is from the dense network (0) to the limits
    (1). attempts: how many rounds may aim at the limits themselves. recovery: what proposals get; where all fail, the
    next lesser one.

    Raises:
        InputError: a setting is out of its range, or the reductions of all rounds together fall short of a budget.
    """

    parents = True  # candidates start from each other's networks: an evaluator does well to keep them

    def __init__(
        self,
        space: PruningSpace,
        budgets: Sequence[Budget],
        costs: Mapping[str, CostModel],
        *,
        seed: int = 0,
        initial: float = 0.05,
        decay: float = 0.98,
        rule: Literal["loss", "accuracy", "ratio"] = "loss",
        screen: int = 3,
        start: Literal["dense", "allocation"] = "allocation",
        start_at: float = 0.8,
        attempts: int = 4,
        recovery: Recovery = "short",
    ) -> None:
        _check(initial, decay, rule=rule, screen=screen, start=start, start_at=start_at, attempts=attempts)
        check_recovery(recovery)
        self.space, self.budgets, self.costs = space, tuple(budgets), dict(costs)
        self.initial, self.decay, self.rule, self.screen = initial, decay, rule, screen
        self.start, self.start_at, self.attempts = start, start_at, attempts
        self.recovery: Recovery = recovery
        self.trace: tuple[Round, ...] = ()
        self._levels = (0,) * len(space.groups)  # of the last winner
        self._sweep: list[Floats] | None = None  # loss increases [L] of each group, where they were asked for
        self._parent: int | None = None
        self._score = math.nan
        self._dense = tuple(self.costs[b.cost].predict(space.dense()) for b in self.budgets)
        self._current = self._dense
        self._check_schedule()
        super().__init__(self._converse())

    def _check_schedule(self) -> None:
        """The reductions of all rounds, initial x sum of decay^(i-1) of the dense cost, must reach every limit."""
        reach = math.inf if self.decay == 1 else self.initial / (1 - self.decay)
        way = 1 - self.start_at if self.start == "allocation" else 1.0
        for budget, dense in zip(self.budgets, self._dense, strict=True):
            needed = way * (1 - budget.limit / dense)
            if needed > reach * (1 + 1e-9):
                raise InputError(
                    f"netadapt: initial={self.initial} and decay={self.decay} reduce {budget.cost} by "
                    f"{100 * reach:.4g} % of the dense network's in all, and {100 * needed:.4g} % must go to reach "
                    f"{budget.limit:.4g} {budget.unit}: set strategy.initial to at least "
                    f"{math.ceil(1e4 * needed * (1 - self.decay) - 1e-9) / 1e4:.4f}, or strategy.decay nearer to 1"
                )

    # ---------------------------------------------------------------------------------------------- the conversation

    def _converse(self) -> Conversation:
        """Algorithm 1."""
        tried_smallest = False
        if self._out_of_reach():
            tried_smallest = True
            if not self._met((yield from self._smallest())):
                return None
        trial = yield from self._begin()
        number = at_limit = 0
        while trial is None or self._goes_on(trial):  # line 2, "while Res_i > Bud"
            if at_limit == self.attempts:
                return None
            if self._out_of_reach() and not tried_smallest:
                tried_smallest = True
                if not self._met((yield from self._smallest())):
                    return None
            number += 1
            targets = self._targets(number, self._current)
            at_limit += all(target == b.limit for target, b in zip(targets, self.budgets, strict=True))
            trial = yield from self._round(number, targets)
            if trial is None:  # nothing can be removed any more
                if not tried_smallest:
                    yield from self._smallest()
                return None
        return None

    def _targets(self, number: int, current: Sequence[float]) -> tuple[float, ...]:
        """Line 3, "Con = Res_i - dR_i", for every budget [B], and never below its limit."""
        reduction = self.initial * self.decay ** (number - 1)
        each = zip(self.budgets, current, self._dense, strict=True)
        return tuple(max(b.limit, cost - reduction * dense) for b, cost, dense in each)

    def _on_the_way(self, number: int, predicted: Sequence[float]) -> bool:
        """Whether the round after this one would not come to a limit yet: its winner need not be told apart from it."""
        after = self._targets(number + 1, [(1 - CLOSE) * cost for cost in predicted])
        return all(target > b.limit for target, b in zip(after, self.budgets, strict=True))

    def _round(self, number: int, targets: tuple[float, ...]) -> Conversation:
        """Lines 4-11: the measured winner; None where no group can be cut further or all that could be failed."""
        dropped: set[str] = set()
        proposals: list[int] = []
        while cuts := self._cuts(targets, dropped):
            candidates = {n: self._candidate(n, number, targets, name) for n, name in cuts.items()}
            before, after = yield from self._tried(candidates)
            proposals += [t.number for t in (*before.values(), *after.values())]
            for levels in self._ranked(after):
                score = before[levels].score if levels in before else None
                glance = self._on_the_way(number, self._predicted(levels, targets))
                winner = replace(after[levels].candidate, measure=True, glance=glance)
                trial, probed = yield from self._measured(winner, score)
                if trial.error is None:
                    self._won(trial, levels, number, targets, proposals, probed)
                    return trial
            dropped |= set(cuts.values())
        return None

    def _cuts(self, targets: tuple[float, ...], dropped: set[str]) -> dict[Levels, str]:
        """ChooseNumFilters: the least cut of each group that alone meets the targets, by the group's name, and after a
        sweep cuts of several groups; if no cut can, the nearest miss of one group."""
        names = [g.name for g in self.space.groups]
        groups = [g for g, name in enumerate(names) if name not in dropped]
        cuts: dict[Levels, str] = {}
        for g in groups:
            deeper = (self._moved(g, level) for level in range(self._levels[g] + 1, len(self.space.groups[g].levels)))
            reaching = (levels for levels in deeper if self._excess(levels, targets) <= 0)
            cuts |= {levels: names[g] for levels in [next(reaching, None)] if levels is not None}
        if SEVERAL not in dropped and self._sweep is not None:
            for levels in self._allocations(self._sweep, targets, beyond=self._levels):
                cuts.setdefault(levels, SEVERAL)
        if cuts:
            return cuts
        deepest = {self._moved(g, len(self.space.groups[g].levels) - 1): names[g] for g in groups}
        deepest.pop(self._levels, None)
        nearest = min(deepest, key=lambda levels: self._excess(levels, targets), default=None)
        return {} if nearest is None else {nearest: deepest[nearest]}

    def _tried(
        self, candidates: Mapping[Levels, Candidate]
    ) -> Generator[list[Candidate], Sequence[Trial], tuple[dict[Levels, Trial], dict[Levels, Trial]]]:
        """The proposals that succeeded: before fine-tuning (none without screening), and recovered as was asked."""
        before: dict[Levels, Trial] = {}
        order = list(candidates)
        if self.screen and self.recovery == "short":
            before = yield from self._scored({n: replace(c, recovery="probe") for n, c in candidates.items()})
            order = self._ranked(before)
        count = self.screen or len(order)
        for recovery in RECOVERIES[RECOVERIES.index(self.recovery) :]:
            for i in range(0, len(order), count):  # where the best all fail, the next best
                best = {n: replace(candidates[n], recovery=recovery) for n in order[i : i + count]}
                if after := (yield from self._scored(best)):
                    return before, after
        return before, {}

    def _scored(
        self, candidates: Mapping[Levels, Candidate]
    ) -> Generator[list[Candidate], Sequence[Trial], dict[Levels, Trial]]:
        trials = (yield list(candidates.values())) if candidates else []
        return {levels: t for levels, t in zip(candidates, trials, strict=True) if t.error is None}

    def _ranked(self, trials: Mapping[Levels, Trial]) -> list[Levels]:
        """PickHighestAccuracy: best first."""

        def badness(levels: Levels) -> tuple[float, float]:
            trial = trials[levels]
            if self.rule == "loss":
                return trial.loss, -trial.score
            if self.rule == "accuracy":
                return -trial.score, trial.loss
            return (self._score - trial.score) / self._saved(levels), trial.loss

        return sorted(trials, key=badness)

    def _won(
        self,
        trial: Trial,
        levels: Levels,
        number: int,
        targets: tuple[float, ...],
        proposals: Sequence[int],
        before: float | None,
    ) -> None:
        """A measured network becomes the one that the next round starts from."""
        predicted = self._predicted(levels, targets)
        self._levels, self._parent, self._score = levels, trial.number, trial.score
        measured = [trial.costs[b.cost] for b in self.budgets]
        self._current = tuple(m.value if m.decided else p for m, p in zip(measured, predicted, strict=True))
        if not trial.candidate.glance:
            self._calibrate(trial)
        made = Round(
            number=number,
            targets=targets,
            proposals=tuple(proposals),
            winner=trial.number,
            predicted=predicted,
            measured=tuple(m.value for m in measured),
            score_before=before,
            score_after=trial.score,
        )
        self.trace = (*self.trace, made)

    # ----------------------------------------------------------------------------------------------- where it begins

    def _begin(self) -> Conversation:
        """The dense network's score; with start="allocation" a sweep, and the measured network that it leads to."""
        (dense,) = yield [Candidate(ratios=self.space.dense(), recovery="none")]
        self._score = dense.score
        if self.start == "dense":
            return None
        self._sweep = yield from sweep.bisected(self.space)
        return (yield from self._allocated(self._sweep))

    def _allocated(self, losses: Sequence[Floats]) -> Conversation:
        """The allocation that loses least after its recovery, measured; None where all fail."""
        each = zip(self.budgets, self._dense, strict=True)
        targets = tuple(b.limit + (1 - self.start_at) * max(0.0, dense - b.limit) for b, dense in each)
        starts = list(dict.fromkeys(self._allocations(losses, targets)))
        about = {"round": 0}
        asked = [Candidate(ratios=self.space.ratios(n), recovery=self.recovery, about=about) for n in starts]
        trials = (yield asked) if asked else ()
        for made, levels in sorted(zip(trials, starts, strict=True), key=lambda pair: pair[0].loss):
            if made.error is None:
                trial, before = yield from self._measured(made.candidate, None)
                if trial.error is None:
                    self._won(trial, levels, 0, targets, [t.number for t in trials], before)
                    return trial
        return None

    def _allocations(
        self, losses: Sequence[Floats], targets: Sequence[float], *, beyond: Levels | None = None
    ) -> list[Levels]:
        """Exact allocations that meet the targets and keep no unit that the levels `beyond` have lost: on the losses as
        they are, on those with a charge on squared ratios, which evens what is cut, and one ratio for all, widened."""
        beyond = beyond or (0,) * len(self.space.groups)
        limits = []
        for budget, target, scale in zip(self.budgets, targets, self._scales(targets), strict=True):
            limits += [(form, target / scale) for form in self.costs[budget.cost].tables()]
        found = []
        with suppress(InfeasibleError):
            for weight in (0.0, *EVENNESS):
                rows = within(charged(self.space, losses, weight), beyond, self._deepest())
                found.append(allocate(rows, limits).levels)
        with suppress(InfeasibleError):
            even = evenly(self.space, lambda levels: self._excess(_deeper(levels, beyond), targets) <= 0, losses)
            found.append(_deeper(even, beyond))
            rows = within(charged(self.space, losses, EVENNESS[0]), beyond, found[-1])
            found.append(allocate(rows, limits).levels)
        return found

    # --------------------------------------------------------------------------------------------------- what it costs

    def _predicted(self, levels: Sequence[int], targets: Sequence[float]) -> tuple[float, ...]:
        """Every budgeted cost [B]: what would be measured going by the last winner's value; where the target is the
        limit, the upper end of that measurement."""
        predicted = (self.costs[b.cost].predict(self.space.ratios(levels)) for b in self.budgets)
        return tuple(scale * p for scale, p in zip(self._scales(targets), predicted, strict=True))

    def _scales(self, targets: Sequence[float]) -> tuple[float, ...]:
        """What each budget's cost model [B] is to be multiplied by."""
        each = zip(self.budgets, targets, self._current, strict=True)
        here = self.space.ratios(self._levels)
        return tuple(1.0 if t == b.limit else current / self.costs[b.cost].predict(here) for b, t, current in each)

    def _excess(self, levels: Sequence[int], targets: Sequence[float]) -> float:
        """By how much the worst budget's prediction exceeds its target, as a fraction of it; at most 0 if all meet."""
        each = zip(self._predicted(levels, targets), targets, strict=True)
        return max(predicted / target - 1 for predicted, target in each)

    def _saved(self, levels: Sequence[int]) -> float:
        """What these levels save against the last winner: the budgets' costs as fractions of dense, summed; > 0."""
        after = (self.costs[b.cost].predict(self.space.ratios(levels)) for b in self.budgets)
        before = (self.costs[b.cost].predict(self.space.ratios(self._levels)) for b in self.budgets)
        saved = sum((a - b) / dense for a, b, dense in zip(before, after, self._dense, strict=True))
        return max(saved, 1e-12)

    def _calibrate(self, trial: Trial) -> None:
        self.costs = {name: cost.calibrated([trial]) for name, cost in self.costs.items()}

    def _out_of_reach(self) -> bool:
        """Whether even the smallest network is predicted to exceed a limit."""
        smallest = self.space.ratios(self._deepest())
        return any(self.costs[b.cost].predict(smallest) > b.limit for b in self.budgets)

    def _goes_on(self, winner: Trial) -> bool:
        """Whether a budget is exceeded; where a disturbed measurement cannot tell, whether rounds were still on the
        way, the prediction standing for it."""
        met = all_met(self.budgets, winner.costs)
        above = any(current > b.limit for current, b in zip(self._current, self.budgets, strict=True))
        return met is False or (met is None and above)

    def _met(self, trial: Trial | None) -> bool:
        return trial is not None and trial.error is None and all_met(self.budgets, trial.costs) is True

    # ----------------------------------------------------------------------------------------------------- candidates

    def _smallest(self) -> Conversation:
        """The closest there is: the deepest level of every group, measured; it calibrates where it can."""
        candidate = Candidate(ratios=self.space.ratios(self._deepest()), recovery=self.recovery, parent=self._parent)
        for recovery in RECOVERIES[RECOVERIES.index(self.recovery) :]:
            (trial,) = yield [replace(candidate, recovery=recovery, measure=True)]
            if trial.error is None:
                self._calibrate(trial)
                break
        return trial

    def _measured(
        self, candidate: Candidate, before: float | None
    ) -> Generator[list[Candidate], Sequence[Trial], tuple[Trial, float | None]]:
        """The candidate measured, and its score before the fine-tune: asked for now where it is not known."""
        probe = (
            [replace(candidate, recovery="probe", glance=False)]
            if before is None and candidate.recovery == "short"
            else []
        )
        trial, *probed = yield [replace(candidate, measure=True), *(replace(c, measure=False) for c in probe)]
        return trial, probed[0].score if probed and probed[0].error is None else before

    def _candidate(self, levels: Levels, number: int, targets: Sequence[float], group: str) -> Candidate:
        about: dict[str, float | str] = {"round": number, "group": group}
        about |= {f"target {b.cost}": target for b, target in zip(self.budgets, targets, strict=True)}
        return Candidate(ratios=self.space.ratios(levels), recovery=self.recovery, parent=self._parent, about=about)

    def _moved(self, group: int, level: int) -> Levels:
        return (*self._levels[:group], level, *self._levels[group + 1 :])

    def _deepest(self) -> tuple[int, ...]:
        return tuple(len(g.levels) - 1 for g in self.space.groups)


def _deeper(levels: Levels, others: Levels) -> Levels:
    return tuple(map(max, levels, others))


def _check(initial: float, decay: float, *, rule: str, screen: int, start: str, start_at: float, attempts: int) -> None:
    """Raises InputError for the first setting that is out of its range."""
    rules = {
        "0 < initial < 1": 0 < initial < 1,
        "0 < decay <= 1": 0 < decay <= 1,
        "rule must be loss, accuracy or ratio": rule in ("loss", "accuracy", "ratio"),
        "screen >= 0": screen >= 0,
        "start must be dense or allocation": start in ("dense", "allocation"),
        "0 < start_at < 1": 0 < start_at < 1,
        "attempts >= 1": attempts >= 1,
    }
    given = {"initial": initial, "decay": decay, "rule": rule, "screen": screen}
    check_rules("netadapt", rules, given | {"start": start, "start_at": start_at, "attempts": attempts})
