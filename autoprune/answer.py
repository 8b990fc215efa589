"""The conversation of a search, and the answer that it comes to."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from autoprune import loop, spread
from autoprune.borrowing import threads
from autoprune.core import Budget, Candidate, Measurement, Progress, Strategy, Trial, all_met
from autoprune.costs import Costs
from autoprune.crew import Workers
from autoprune.criteria import Scores
from autoprune.evaluate import Evaluator
from autoprune.final import tuning
from autoprune.healer import heal
from autoprune.lineage import Networks, folder_beside
from autoprune.recover import Teacher
from autoprune.rounds import Final, Pruner, everything
from autoprune.study import Study
from autoprune.units import Labels


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer's trial and network, fine-tuned unless it is the dense one, and the units that it keeps of each group;
    pruned: its score on the search split before that; record: what Result keeps of how it was found; known: its costs,
    where they were measured just now."""

    trial: Trial
    model: nn.Module
    kept: tuple[Labels, ...]
    pruned: float
    record: Mapping[str, Any]
    known: Mapping[str, Measurement] = field(default_factory=dict)


def left_alone(evaluator: Evaluator, prices: Costs, asked: Sequence[str], progress: Progress) -> Answer | None:
    """The dense network where it keeps every budget, measured once more; None where it does not now."""
    known = evaluator.measured(evaluator.dense_model)
    if not all(limit.met(known[limit.cost]) for limit in prices.limits):
        return None
    for text, limit in zip(asked, prices.limits, strict=True):
        progress.say(_already(text, limit, known[limit.cost]))
    answer = Trial(number=0, candidate=Candidate(ratios=prices.traced.space.dense()), score=evaluator.dense().score)
    record: dict[str, Any] = {"trials": (), "findings": {}, "rounds": (), "episodes": ()}
    record["seconds_searching"] = 0.0
    model = copy.deepcopy(evaluator.dense_model)
    kept = everything(prices.traced.space)
    return Answer(trial=answer, model=model, kept=kept, pruned=answer.score, record=record, known=known)


def searched(
    planner: Strategy,
    evaluator: Evaluator,
    prices: Costs,
    study: Study,
    *,
    plan: Final,
    progress: Progress,
    workers: Workers,
    rank: Callable[[nn.Module], Sequence[Scores]],
) -> Answer:
    """The best answer of the whole conversation, fine-tuned. rank: as of Pruner."""
    began = time.perf_counter()
    trials, replayed = _converse(planner, evaluator, study, progress, workers)
    seconds = time.perf_counter() - began + sum(trial.seconds for trial in trials[:replayed])
    findings = {f.group: f.what for f in getattr(planner, "findings", ())}
    traces = {"rounds": getattr(planner, "trace", ()), "episodes": getattr(planner, "walked", ())}
    answer = best(trials, prices.steered, prices.limits)
    model, kept, pruned = _recovered(evaluator, answer, plan, progress, rank)
    record = {"trials": trials, "findings": findings, "seconds_searching": seconds}
    record |= {name: tuple(asdict(each) for each in made) for name, made in traces.items()}
    return Answer(trial=answer, model=model, kept=kept, pruned=pruned, record=record)


def _converse(
    planner: Strategy, evaluator: Evaluator, study: Study, progress: Progress, workers: Workers
) -> tuple[tuple[Trial, ...], int]:
    """The loop, with the study as its record and its memory: all trials, and how many of them were remembered."""
    history = settled(study.trials())
    keeps = getattr(planner, "parents", False)
    evaluator.remember(history, Networks(folder_beside(study.storage, study.name)) if keeps else None)
    if history:
        progress.say(f"study '{study.name}' goes on: {len(history)} trials are not scored again")
    for trial in history:
        progress.scored(trial)

    def scored(trial: Trial) -> None:
        progress.step()
        progress.scored(trial)

    with spread.over(evaluator, workers) as evaluate:
        trials = loop.search(
            planner,
            evaluate,
            study.record,
            history=history,
            on_batch=lambda asked, known: progress.stage("scoring candidates", asked - known),
            on_trial=scored,
        )
    return trials, len(history)


def settled(history: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """The history without an end that was disturbed or failed, which is measured again; what was so on the way there
    stays, as everything after it rests on it."""
    last = next((t for t in reversed(history) if t.candidate.measure), None)
    if last is None or last.feasible is not None or any(t.candidate.parent == last.number for t in history):
        return history
    return history[: last.number]


def _recovered(
    evaluator: Evaluator,
    answer: Trial,
    plan: Final,
    progress: Progress,
    rank: Callable[[nn.Module], Sequence[Scores]],
) -> tuple[nn.Module, tuple[Labels, ...], float]:
    """The answer's network after the final training, the units that it keeps, and its score before: of its trial, or,
    where that was on a part of the images, as it is when healed. A training at once goes on from what the answer's
    parents have learnt."""
    candidate, task, healer = answer.candidate, evaluator.task, evaluator.healer
    whole = answer if candidate.fidelity == 1 else None
    tune = tuning(task, teacher=Teacher(evaluator.dense_model), seed=evaluator.seed, progress=progress)
    if candidate.parent is not None and plan.at_once and plan.weights == "trained":
        model = evaluator.recovered(candidate)
        before = whole.score if whole else evaluator.scored(model).score
        tune(model, plan, 0, lambda done: None)
        return model, healer.units(candidate.ratios), before
    probe = replace(candidate, recovery="probe", fidelity=1.0)
    before = whole.score if whole else evaluator.scored(evaluator.recovered(probe)).score

    def healed(model: nn.Module, kept: Sequence[Labels], source: nn.Module) -> None:
        steps, batches = healer.care.recipe.of_recovery("probe"), healer.care.batches
        with threads(evaluator.scoring.threads):
            heal(model, steps, batches, traced=evaluator.traced, kept=kept, source=source, seed=evaluator.seed)

    pruner = Pruner(
        task=task,
        traced=evaluator.traced,
        dense=evaluator.dense_model,
        scores=evaluator.importance,
        rank=rank,
        heal=healed,
        tune=tune,
        seed=evaluator.seed,
    )
    model, kept = pruner.pruned(candidate.ratios, plan)
    return model, kept, before


def best(trials: Sequence[Trial], steered: Sequence[Budget], budgets: Sequence[Budget]) -> Trial:
    """The measured trial of highest score within what was aimed at; without any, within the budgets; without any, one
    whose measurement was disturbed, or the one that exceeds them least."""
    answers = [t for t in trials if t.candidate.measure and t.error is None]
    if not answers:
        failed = next((t.error for t in reversed(trials) if t.error), "no candidate was measured")
        raise RuntimeError(f"the search ended without an answer: {failed}")
    for limits, verdict in ((steered, True), (budgets, True), (budgets, None)):
        if within := [t for t in answers if all_met(limits, t.costs) is verdict]:
            return max(within, key=lambda t: t.score)
    return min(answers, key=lambda t: max(t.costs[b.cost].high / b.limit for b in budgets))


def _already(asked: str, limit: Budget, dense: Measurement) -> str:
    word = asked.partition("_")[0]
    return (
        f"the dense network keeps {asked} already: {dense.value:.4g} [{dense.low:.4g}, {dense.high:.4g}] of at most "
        f"{limit.limit:.4g} {limit.unit}; nothing is pruned. To prune all the same: budget={word}_50pct"
    )
