"""A search from values: what `autoprune.search(...)` and the command line both call."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from autoprune import components, costs, loop
from autoprune import final as last_steps
from autoprune.borrowing import check_writable, first, seeded
from autoprune.checks import check_place, check_seed, check_settings, check_task
from autoprune.core import (
    Budget,
    Candidate,
    InputError,
    Measurement,
    Progress,
    Recovery,
    Silent,
    Strategy,
    Task,
    Trial,
    all_met,
)
from autoprune.costs import Costs
from autoprune.criteria import Criterion
from autoprune.evaluate import Evaluator, Scoring
from autoprune.lineage import Networks, folder_beside
from autoprune.meters.device import Device
from autoprune.meters.energy import Constants
from autoprune.meters.latency import Latency, Reference
from autoprune.meters.profile import CostTable, Profile
from autoprune.prune import RatioTable
from autoprune.pruning_env import LayerPruningEnv
from autoprune.recover import FineTune
from autoprune.result import Result
from autoprune.space import trace
from autoprune.study import Study, check_storage
from autoprune.traced import TracedModel
from autoprune.verdict import concluded

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Space:
    """Which ratios a group may take: at most `levels` of them, widths kept being multiples of round_to, no group
    losing more than max_ratio."""

    levels: int = 16
    round_to: int = 1
    max_ratio: float = 0.9


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
    final: FineTune = last_steps.FINAL,
    profile: Profile = Profile(),
    tables: str | Path | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    cache: str | Path | None = None,
    readings: str | Path | None = None,
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

    Raises:
        InputError: the task, a budget or a name is wrong, or the study belongs to another search.
        MeasuringError: the device could not measure the networks.
    """
    began = time.perf_counter()
    chosen = {
        "strategy": components.chosen("strategy", strategy),
        "criterion": components.chosen("criterion", criterion),
    }
    build = components.bind(chosen["strategy"], "strategy", (), (), {}, seed=seed)
    check_storage(storage)
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
        check=lambda traced: check_settings(build, traced.space, seed=seed),
    )
    evaluator, prices, asked = prepared.evaluator, prepared.prices, prepared.asked
    found = _left_alone(evaluator, prices, asked, progress) if prices.already_met else None
    if found is None:
        planner: Strategy = build(prices.traced.space, prices.steered, prices.limited, seed=seed)  # it may refuse
        fingerprint = _fingerprint(evaluator, prices) | chosen | {"budgets": list(asked)}
        name = study_name or _study_name(task, chosen, asked, seed, fingerprint)
        study = Study(storage, name, fingerprint=fingerprint, space=prices.traced.space, budgets=prices.limits)
        found = _found(planner, evaluator, prices, study, final, progress)
    return concluded(
        evaluator,
        prices,
        found.answer,
        found.model,
        evaluator.importance,
        asked=asked,
        chosen=chosen,
        device=prepared.device,
        progress=progress,
        known=found.known,
        storage=storage,
        began=began,
        **found.record,
    )


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
    asked = (budget,) if isinstance(budget, str) else tuple(budget)
    budgets = tuple(Budget.parse(text) for text in asked)
    costs.check_budgets(budgets)
    check_seed(seed)
    check_place(scoring.device, "evaluator.device")
    target, constants = device_of(device), _built(Constants, "energy", energy)
    rank: Criterion = components.bind(criterion, "criterion", task.model, (), batches=(), loss=None, seed=0)
    if cache is not None:
        check_writable(Path(cache), "evaluator.cache")
    check_task(task)
    progress.stage("tracing", None)
    traced = trace(task.model, task.inputs, **asdict(space))
    progress.say(_summary(task, traced))
    check(traced)
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
    with seeded(seed):
        batches = first(task.train, scoring.recalibration)
        importance = rank(task.model, traced.slices, batches=batches, loss=task.loss, seed=seed)
    evaluator = Evaluator(
        task,
        prices.traced,
        importance,
        budgets=prices.limits,
        costs=prices.models,
        meters=prices.meters,
        scoring=scoring,
        seed=seed,
        cache=None if cache is None else Path(cache),
    )
    return _Prepared(evaluator, prices, asked, target)


def profile(
    task: Task,
    *,
    device: str | Mapping[str, Any] | Device = "torch_cpu",
    plan: Profile = Profile(),
    tables: str | Path | None = None,
    max_ratio: float = 0.9,
    seed: int = 0,
    progress: Progress = Silent(),
) -> tuple[CostTable, TracedModel]:
    """Measure a device's cost table for a task's model anew, and keep it in the folder `tables`.

    Raises:
        InputError: the device is not there or the model cannot be traced.
        MeasuringError: too few networks could be measured.
    """
    check_seed(seed)
    progress.stage("tracing", None)
    traced = trace(task.model, task.inputs, max_ratio=max_ratio)
    meter = Latency(device_of(device), seed=seed)
    folder = None if tables is None else Path(tables)
    table = costs.table_for(task, traced, meter, plan=plan, folder=folder, seed=seed, progress=progress, refresh=True)
    return table, traced


def latency(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    device: str | Mapping[str, Any] | Device = "torch_cpu",
    seed: int = 0,
) -> Measurement:
    """Milliseconds of model(*inputs) on a device, as a search's verdict measures them (see meters.latency.Latency)."""
    return Latency(device_of(device), seed=seed).measure(model, inputs)


def measured_again(
    task: Task, folder: Path, *, device: str | Mapping[str, Any] | Device = "torch_cpu", seed: int = 1
) -> tuple[Measurement, Measurement]:
    """The latency of a finished run's written network as the run measured it, and as it is now in new processes, as
    many as the device allows.

    Raises:
        InputError: the folder holds no run that measured a latency, or not of this task.
    """
    table = RatioTable.load(folder / "ratios.yaml")
    model = table.rebuild(task.model, task.inputs, folder / "pruned.safetensors")
    try:
        values = json.loads((folder / "result.json").read_text())
        cost = values["costs"]["latency_ms"]
        relative = any(b["asked"].endswith("pct") for b in values["budgets"] if b["cost"] == "latency_ms")
        then = Measurement(**{**cost["measured"], "notes": tuple(cost["measured"]["notes"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no run that measured a latency ({type(error).__name__}: {error})") from error
    dense = Measurement.exact(cost["dense"], "ms", "measured")
    chosen = device_of(device)
    chosen = replace(chosen, processes=chosen.most_processes)
    meter = Latency(chosen, seed=seed).beside(Reference(task.model, dense, relative))
    return then, meter.measure(model, task.inputs)


def device_of(value: str | Mapping[str, Any] | Device) -> Device:
    """The device of a name in conf/device/, or of a mapping with `_target_`."""
    return _built(Device, "device", value)


def _built(kind: type[Kind], group: str, value: str | Mapping[str, Any] | Kind) -> Kind:
    """The value of a name in a folder of conf/, or of a mapping with `_target_`.

    Raises:
        InputError: there is no such name, or what it makes is of another kind.
    """
    if isinstance(value, kind):
        return value
    made = components.bind(components.chosen(group, value), group)()  # type: ignore[arg-type]
    if not isinstance(made, kind):
        raise InputError(f"{group}: {value} gives a {type(made).__name__}, it must be an autoprune {kind.__name__}")
    return made


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The answer and its network, whose costs are `known` where they were measured just now; what Result keeps of how
    it was found."""

    answer: Trial
    model: nn.Module
    record: Mapping[str, Any]
    known: Mapping[str, Measurement] = field(default_factory=dict)


def _left_alone(evaluator: Evaluator, prices: Costs, asked: Sequence[str], progress: Progress) -> _Found | None:
    """The dense network where it keeps every budget, measured once more; None where it does not now."""
    known = evaluator.measured(evaluator.dense_model)
    if not all(limit.met(known[limit.cost]) for limit in prices.limits):
        return None
    for text, limit in zip(asked, prices.limits, strict=True):
        progress.say(_already(text, limit, known[limit.cost]))
    answer = Trial(number=0, candidate=Candidate(ratios=prices.traced.space.dense()), score=evaluator.dense().score)
    record: dict[str, Any] = {"trials": (), "study": "", "findings": {}, "rounds": (), "episodes": ()}
    record["seconds_searching"] = 0.0
    return _Found(answer=answer, model=copy.deepcopy(evaluator.dense_model), record=record, known=known)


def _found(
    planner: Strategy, evaluator: Evaluator, prices: Costs, study: Study, plan: FineTune, progress: Progress
) -> _Found:
    """The best answer of the whole conversation, fine-tuned."""
    began = time.perf_counter()
    trials, replayed = _converse(planner, evaluator, study, progress)
    seconds = time.perf_counter() - began + sum(trial.seconds for trial in trials[:replayed])
    findings = {f.group: f.what for f in getattr(planner, "findings", ())}
    traces = {"rounds": getattr(planner, "trace", ()), "episodes": getattr(planner, "walked", ())}
    answer = _best(trials, prices.steered, prices.limits)
    model = _recovered(evaluator, answer, plan, seed=evaluator.seed, progress=progress)
    record = {"trials": trials, "study": study.name, "findings": findings, "seconds_searching": seconds}
    record |= {name: tuple(asdict(each) for each in made) for name, made in traces.items()}
    return _Found(answer=answer, model=model, record=record)


def _converse(
    planner: Strategy, evaluator: Evaluator, study: Study, progress: Progress
) -> tuple[tuple[Trial, ...], int]:
    """The loop, with the study as its record and its memory: all trials, and how many of them were remembered."""
    history = _settled(study.trials())
    keeps = getattr(planner, "parents", False)
    evaluator.remember(history, Networks(folder_beside(study.storage, study.name)) if keeps else None)
    if history:
        progress.say(f"study '{study.name}' goes on: {len(history)} trials are not scored again")
    trials = loop.search(
        planner,
        evaluator,
        study.record,
        history=history,
        on_batch=lambda asked, known: progress.stage("scoring candidates", asked - known),
        on_trial=lambda trial: progress.step(),
    )
    return trials, len(history)


def _settled(history: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """The history without an end that was disturbed or failed, which is measured again; what was so on the way there
    stays, as everything after it rests on it."""
    last = next((t for t in reversed(history) if t.candidate.measure), None)
    if last is None or last.feasible is not None or any(t.candidate.parent == last.number for t in history):
        return history
    return history[: last.number]


def _recovered(evaluator: Evaluator, answer: Trial, plan: FineTune, *, seed: int, progress: Progress) -> nn.Module:
    """The answer's network after the final fine-tune, which goes on from what the answer's parents have learnt."""
    goes_on = answer.candidate.parent is not None
    model = evaluator.recovered(answer.candidate if goes_on else replace(answer.candidate, recovery="probe"))
    last_steps.train(model, evaluator.task, plan, teacher=evaluator.dense_model, seed=seed, progress=progress)
    return model


def _best(trials: Sequence[Trial], steered: Sequence[Budget], budgets: Sequence[Budget]) -> Trial:
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
    refused = f"; {len(traced.space.refused)} kept whole" if traced.space.refused else ""
    return f"{task.name}: {len(traced.space.groups)} groups of {units} units, every group proven{refused}"
