"""A search from values: what `autoprune.search(...)` and the command line both call."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from autoprune import components, costs
from autoprune.answer import left_alone, searched
from autoprune.borrowing import check_writable, first, seeded
from autoprune.cache import trim
from autoprune.checks import check_place, check_seed, check_settings, check_task
from autoprune.core import (
    Budget,
    Candidate,
    Progress,
    Recovery,
    Silent,
    Strategy,
    Task,
)
from autoprune.costs import Costs
from autoprune.crew import Workers
from autoprune.criteria import Criterion, Scores
from autoprune.evaluate import Evaluator, Scoring
from autoprune.final import FINAL
from autoprune.keywords import named, positional_task
from autoprune.measuring import device_of
from autoprune.meters.device import Device
from autoprune.meters.energy import Constants
from autoprune.meters.profile import Profile
from autoprune.prune import ranking
from autoprune.pruning_env import LayerPruningEnv
from autoprune.recover import FineTune
from autoprune.result import Result
from autoprune.rounds import Final, check_final
from autoprune.space import Space, trace
from autoprune.storage import check_storage
from autoprune.study import Study
from autoprune.traced import TracedModel
from autoprune.verdict import begun, concluded

Kind = TypeVar("Kind")


def search(
    task: Task,
    *,
    budget: str | Sequence[str],
    strategy: str | Mapping[str, Any] = "sensitivity",
    criterion: str | Mapping[str, Any] = "l1",
    device: str | Mapping[str, Any] | Device = "torch_cpu",
    energy: str | Mapping[str, Any] | Constants = "horowitz_45nm",
    seed: int = 0,
    space: Space = Space(),
    scoring: Scoring = Scoring(),
    final: FineTune = FINAL,
    profile: Profile = Profile(),
    tables: str | Path | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    cache: str | Path | None = None,
    readings: str | Path | None = None,
    workers: str | Mapping[str, Any] | Workers = "serial",
    progress: Progress = Silent(),
) -> Result:
    """Find a ratio for each group under the budgets, and the fine-tuned smaller network.

    budget: one or several, see Budget.parse. strategy, criterion, device: a name in conf/, or a mapping with `_target_`
    and keyword arguments; device is where latency, resident memory and energy are measured. energy: the constants that
    energy is modelled with where the device has no counter, given alike. profile: how the device's cost table is made
    where the folder `tables` has none; without that folder a search under a measured budget cannot be resumed, as the
    dense network is measured anew. storage: an Optuna storage URL; the same search on the same study goes on where it
    ended. None keeps the record in memory. study_name: by default made of task, strategy, budget, seed and fingerprint.
    cache: a folder for scores shared by searches. readings: a file that every raw latency sample is appended to.
    workers: where candidates are evaluated, a name in conf/workers, a mapping with `_target_`, or of workers.py; the
    trials are the same wherever that is.

    Raises:
        InputError: the task, a budget or a name is wrong, or the study belongs to another search.
        MeasuringError: the device could not measure the networks.
        WorkersLostError: no worker can be kept running.
    """
    began = time.perf_counter()
    chosen = {
        "strategy": components.chosen("strategy", strategy),
        "criterion": components.chosen("criterion", criterion),
    }
    build = components.bind(chosen["strategy"], "strategy", (), (), {}, seed=seed)
    crew = components.built(Workers, "workers", workers)
    check_storage(storage)
    plan = Final.of(final)

    def check(traced: TracedModel) -> None:
        check_settings(build, traced.space, seed=seed)
        check_final(plan, task, traced)

    prepared = _prepared(
        task,
        budget,
        criterion=chosen["criterion"],
        device=device,
        energy=energy,
        seed=seed,
        space=space,
        scoring=scoring,
        profile=profile,
        tables=tables,
        cache=cache,
        readings=readings,
        progress=progress,
        check=check,
    )
    evaluator, prices, asked = prepared.evaluator, prepared.prices, prepared.asked
    named_as = {group: components.named(group, values) for group, values in chosen.items()}
    outset = partial(begun, evaluator, prices, asked=asked, strategy=named_as["strategy"], storage=storage)
    answer = left_alone(evaluator, prices, asked, progress) if prices.already_met else None
    with ExitStack() as held:
        if answer is not None:
            known = outset(study="")
        else:
            ranked = prices.traced.space.ranked(evaluator.importance)
            planner: Strategy = build(ranked, prices.steered, prices.limited, seed=seed)  # it may refuse
            fingerprint = _fingerprint(evaluator, prices) | chosen | {"budgets": list(asked)}
            name = study_name or _study_name(task, chosen, asked, seed, fingerprint)
            made = Study(
                storage,
                name,
                fingerprint=fingerprint,
                space=prices.traced.space,
                budgets=prices.limits,
                progress=progress,
            )
            study = held.enter_context(made)  # to the end, so that no other search measures beside this one
            known = outset(study=name)
            study.describe(known)
            progress.begun(known)
            answer = searched(
                planner, evaluator, prices, study, plan=plan, progress=progress, workers=crew, rank=prepared.rank
            )
        result = concluded(
            evaluator,
            prices,
            answer,
            outset=known,
            criterion=named_as["criterion"],
            device=prepared.device,
            progress=progress,
            began=began,
        )
    named(result.model)
    return result


def environment(
    task: Task,
    *,
    budget: str | Sequence[str],
    reward: str = "accuracy",
    recovery: Recovery = "probe",
    criterion: str | Mapping[str, Any] = "l1",
    device: str | Mapping[str, Any] | Device = "torch_cpu",
    energy: str | Mapping[str, Any] | Constants = "horowitz_45nm",
    seed: int = 0,
    space: Space = Space(),
    scoring: Scoring = Scoring(),
    profile: Profile = Profile(),
    tables: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Progress = Silent(),
) -> LayerPruningEnv:
    """The Gymnasium environment that `amc` walks, for any agent to learn on: an episode ends with the score of the
    network it came to, cut and recovered as asked, on the search split.

    reward: see LayerPruningEnv. recovery: what a network gets before it is scored. Other arguments as of `search`.

    Raises:
        InputError: as of `search`, or the smallest network is predicted to exceed a budget.
    """
    chosen = components.chosen("criterion", criterion)
    prepared = _prepared(
        task,
        budget,
        criterion=chosen,
        device=device,
        energy=energy,
        seed=seed,
        space=space,
        scoring=scoring,
        profile=profile,
        tables=tables,
        cache=cache,
        readings=None,
        progress=progress,
    )
    numbers = itertools.count()

    def evaluate(ratios: tuple[float, ...]) -> float | None:
        (trial,) = prepared.evaluator([(next(numbers), Candidate(ratios=ratios, recovery=recovery))])
        return None if trial.error else trial.score

    prices = prepared.prices
    return LayerPruningEnv(prices.traced.space, prices.steered, prices.limited, evaluate=evaluate, reward=reward)


@dataclass(frozen=True)
class _Prepared:
    """All that stands before the first candidate."""

    evaluator: Evaluator
    prices: Costs
    asked: tuple[str, ...]
    device: Device
    rank: Callable[[nn.Module], Sequence[Scores]]


def _prepared(
    task: Task,
    budget: str | Sequence[str],
    *,
    criterion: Mapping[str, Any],
    device: str | Mapping[str, Any] | Device,
    energy: str | Mapping[str, Any] | Constants,
    seed: int,
    space: Space,
    scoring: Scoring,
    profile: Profile,
    tables: str | Path | None,
    cache: str | Path | None,
    readings: str | Path | None,
    progress: Progress,
    check: Callable[[TracedModel], None] = lambda traced: None,
) -> _Prepared:
    """Check everything, trace the model, price it, rank its units. check: what a traced model may still be refused for,
    before anything is measured."""
    task = positional_task(task)
    asked = (budget,) if isinstance(budget, str) else tuple(budget)
    budgets = tuple(Budget.parse(text) for text in asked)
    costs.check_budgets(budgets)
    check_seed(seed)
    check_place(scoring.device, "evaluator.device")
    target, constants = device_of(device), components.built(Constants, "energy", energy)
    rank: Criterion = components.bind(criterion, "criterion", task.model, (), batches=(), loss=None, seed=0)
    if cache is not None:
        check_writable(Path(cache), "evaluator.cache")
        trim(Path(cache))
    check_task(task)
    scoring.recipe.check_task(task)
    progress.stage("tracing", None)
    traced = trace(task.model, task.inputs, space)
    progress.say(_summary(task, traced))
    check(traced)
    with seeded(seed):
        batches = first(task.train, scoring.recalibration)
    order = ranking(traced, rank, batches=batches, loss=task.loss, seed=seed)
    scores = order(task.model)
    prices = costs.priced(
        task,
        traced,
        budgets,
        device=target,
        plan=profile,
        tables=None if tables is None else Path(tables),
        levels=space.levels,
        round_to=space.round_to,
        seed=seed,
        readings=None if readings is None else Path(readings),
        constants=constants,
        progress=progress,
    )
    evaluator = Evaluator(
        task,
        prices.traced,
        scores,
        budgets=prices.limits,
        costs=prices.models,
        meters=prices.meters,
        scoring=scoring,
        seed=seed,
        cache=None if cache is None else Path(cache),
    )
    if evaluator.anchored:
        progress.say(
            "the batch normalisation statistics are not of the training data: scales and shifts take up the difference"
        )
    return _Prepared(evaluator, prices, asked, target, order)


def _fingerprint(evaluator: Evaluator, prices: Costs) -> dict[str, Any]:
    """Everything that the trials of a search depend on, the cost models included."""
    traced = prices.traced
    groups = [(g.name, g.size, g.levels) for g in traced.space.groups]
    terms: list[object] = [(traced.macs, traced.params, traced.weights, traced.activations)]
    if "energy_mj" in prices.models:
        terms.append(traced.traffic)
    terms.append(sorted(costs.digestible(prices).items()))
    return evaluator.identity | {"space": _digest(groups), "costs": _digest(terms)}


def _digest(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _study_name(
    task: Task, chosen: Mapping[str, Mapping[str, Any]], asked: Sequence[str], seed: int, fingerprint: Mapping[str, Any]
) -> str:
    strategy = components.named("strategy", chosen["strategy"])
    digest = _digest(sorted(fingerprint.items()))[:8]
    return f"{task.name} {strategy} {'+'.join(asked)} seed {seed} ({digest})"


def _summary(task: Task, traced: TracedModel) -> str:
    units = sum(g.size for g in traced.space.groups)
    if not traced.narrows:
        return f"{task.name}: {len(traced.space.groups)} layers to be masked"
    refused = f"; {len(traced.space.refused)} kept whole" if traced.space.refused else ""
    return f"{task.name}: {len(traced.space.groups)} groups of {units} units, every group proven{refused}"
