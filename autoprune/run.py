"""A search from values: what `autoprune.search(...)` and the command line both call."""

from __future__ import annotations

import copy
import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoprune import components, loop
from autoprune.borrowing import arguments, first, seeded, to_device
from autoprune.checks import check_task
from autoprune.core import Budget, CostModel, InputError, Measurement, Meter, Strategy, Task, Trial
from autoprune.criteria import Criterion
from autoprune.criteria import Scores as Importance
from autoprune.evaluate import Evaluator, Scoring
from autoprune.meters.counts import COUNTED, weight_bytes
from autoprune.meters.table import CountedCost
from autoprune.prune import RatioTable, TableGroup, choose_units, weights_hash
from autoprune.recover import FineTune, finetune, recalibrate
from autoprune.result import Result, Scores
from autoprune.space import trace
from autoprune.study import Study
from autoprune.traced import TracedModel

FINAL = FineTune(epochs=4)
METERS: dict[str, Meter] = {name: meter() for name, meter in COUNTED.items()}


class Progress(Protocol):
    """Who watches a search: a stage begins with so many steps (None: unknown), steps are made, something is said."""

    def stage(self, name: str, steps: int | None) -> None: ...

    def step(self) -> None: ...

    def say(self, line: str) -> None: ...


class Silent:
    """Nobody watches."""

    def stage(self, name: str, steps: int | None) -> None: ...

    def step(self) -> None: ...

    def say(self, line: str) -> None: ...


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
    budget: str | Sequence[str] = "flops_50pct",
    strategy: str | Mapping[str, Any] = "sensitivity",
    criterion: str | Mapping[str, Any] = "l1",
    seed: int = 0,
    space: Space = Space(),
    scoring: Scoring = Scoring(),
    final: FineTune = FINAL,
    storage: str | None = None,
    study_name: str | None = None,
    cache: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = Silent(),
) -> Result:
    """Find a ratio for each group under the budgets, and the fine-tuned smaller network.

    budget: one or several, see Budget.parse. strategy, criterion: a name in conf/, or a mapping with `_target_` and
    keyword arguments. storage: an Optuna storage URL; the
    same search on the same study goes on where it ended. None keeps the record in memory.
    study_name: by default made of task, strategy, budget, seed and fingerprint. cache: a folder for scores shared by
    searches. device: where candidates are scored and trained, "cpu" or "cuda".

    Raises:
        InputError: the task, a budget or a name is wrong, or the study belongs to another search.
    """
    began = time.perf_counter()
    asked = (budget,) if isinstance(budget, str) else tuple(budget)
    budgets = tuple(Budget.parse(text) for text in asked)
    _check_budgets(budgets)
    _check_seed(seed)
    _check_device(device)
    chosen = {"strategy": _spec("strategy", strategy), "criterion": _spec("criterion", criterion)}
    build = components.bind(chosen["strategy"], "strategy", (), (), {}, seed=seed)
    rank: Criterion = components.bind(chosen["criterion"], "criterion", task.model, (), batches=(), loss=None, seed=0)
    check_task(task)

    progress.stage("tracing", None)
    traced = trace(task.model, task.inputs, **asdict(space))
    dense = measure(task.model, task.inputs)
    limits = tuple(b.resolve(dense) for b in budgets)
    costs = cost_models(task, traced, dense)
    progress.say(_summary(task, traced))
    with seeded(seed):
        batches = first(task.train, scoring.recalibration)
        importance = rank(task.model, traced.slices, batches=batches, loss=task.loss, seed=seed)
    evaluator = Evaluator(
        task,
        traced,
        importance,
        budgets=limits,
        costs=costs,
        meters=METERS,
        scoring=scoring,
        seed=seed,
        cache=None if cache is None else Path(cache),
        device=device,
    )
    planner: Strategy = build(traced.space, limits, {n: costs[n] for n in {b.cost for b in limits}}, seed=seed)
    fingerprint = _fingerprint(evaluator, traced, dense) | chosen | {"budgets": list(asked)}
    name = study_name or _study_name(task, chosen, asked, seed, fingerprint)
    study = Study(storage, name, fingerprint=fingerprint, space=traced.space, budgets=limits)
    trials = _converse(planner, evaluator, study, progress)
    answer = _best(trials, limits)

    model = evaluator.cut(answer.candidate.ratios)
    recalibrate(model, evaluator.recalibration)
    _train(model, task, final, teacher=evaluator.dense_model, seed=seed, progress=progress)
    recovered = evaluator.scored(model)
    progress.stage("reading the test split", None)
    test_dense, test_recovered = _test(task, [evaluator.dense_model, model])
    measured = evaluator.measured(model)
    sign = -1.0 if task.metric.higher_is_better is False else 1.0
    provenance = {"task": task.name, "strategy": _named(chosen["strategy"]), "seed": seed, "versions": _versions()}
    return Result(
        task=task.name,
        strategy=_named(chosen["strategy"]),
        seed=seed,
        device=f"{device}: {_processor(device)}, {torch.get_num_threads()} threads",
        table=RatioTable(
            groups=_table_groups(traced, importance, answer.candidate.ratios),
            architecture=traced.fingerprint,
            weights=weights_hash(task.model),
            criterion=_named(chosen["criterion"]),
            budgets=_verdicts(asked, limits, measured),
            provenance=provenance,
        ),
        model=model,
        space=traced.space,
        ratios=answer.candidate.ratios,
        trials=trials,
        scores=Scores(
            metric=type(task.metric).__name__,
            dense=sign * evaluator.dense().score,
            pruned=sign * answer.score,
            recovered=sign * recovered.score,
            test_dense=test_dense,
            test_recovered=test_recovered,
        ),
        dense=dense,
        predicted={n: c.predict(answer.candidate.ratios) for n, c in costs.items()},
        measured=measured,
        budgets=limits,
        asked=asked,
        versions=_versions(),
        study=name,
        storage=storage,
        evaluations=evaluator.evaluations,
        cache_hits=evaluator.hits,
        seconds=time.perf_counter() - began,
        findings={f.group: f.what for f in getattr(planner, "findings", ())},
        notes=task.notes,
    )


def _converse(planner: Strategy, evaluator: Evaluator, study: Study, progress: Progress) -> tuple[Trial, ...]:
    """The loop, with the study as its record and its memory."""
    history = study.trials()
    if history:
        progress.say(f"study '{study.name}' goes on: {len(history)} trials are not scored again")
    return loop.search(
        planner,
        evaluator,
        study.record,
        history=history,
        on_batch=lambda asked, known: progress.stage("scoring candidates", asked - known),
        on_trial=lambda trial: progress.step(),
    )


def _table_groups(
    traced: TracedModel, importance: Sequence[Importance], ratios: Sequence[float]
) -> tuple[TableGroup, ...]:
    kept = choose_units(traced.space, importance, ratios)
    return tuple(
        TableGroup(name=g.name, size=g.size, units=tuple(units.tolist()), members=g.members)
        for g, units in zip(traced.space.groups, kept, strict=True)
    )


def _verdicts(
    asked: Sequence[str], budgets: Sequence[Budget], measured: Mapping[str, Measurement]
) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"budget": text, "cost": b.cost, "limit": b.limit, "unit": b.unit, "value": measured[b.cost].value}
        | {"kind": measured[b.cost].kind, "met": bool(b.met(measured[b.cost]))}
        for text, b in zip(asked, budgets, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A network pruned by a ratio table and fine-tuned; test scores in the metric's own sign.

    table: the one given, with the units that this model keeps.
    """

    table: RatioTable
    model: nn.Module
    metric: str
    test_dense: float
    test_recovered: float
    dense: Mapping[str, Measurement]
    measured: Mapping[str, Measurement]
    seconds: float


def finetune_table(
    task: Task,
    table: RatioTable,
    *,
    criterion: str | Mapping[str, Any] = "l1",
    final: FineTune = FINAL,
    recalibration: int = 4,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = Silent(),
) -> FineTuned:
    """Reuse a ratio table in training: prune the task's model by it, recalibrate, fine-tune, and read the test split.

    Raises:
        InputError: the task is wrong, or its model has another architecture than the table's.
    """
    began = time.perf_counter()
    _check_seed(seed)
    _check_device(device)
    chosen = _spec("criterion", criterion)
    rank: Criterion = components.bind(chosen, "criterion", task.model, (), batches=(), loss=None, seed=0)
    check_task(task)
    progress.stage("pruning", None)
    with seeded(seed):
        batches = first(task.train, recalibration)
    table = table.fitted(task.model, task.inputs, criterion=rank, batches=batches, loss=task.loss)
    model = table.prune(task.model, task.inputs).to(device)
    teacher = copy.deepcopy(task.model).to(device)
    recalibrate(model, to_device(batches, device))
    _train(model, task, final, teacher=teacher, seed=seed, progress=progress)
    progress.stage("reading the test split", None)
    test_dense, test_recovered = _test(task, [teacher, model])
    inputs = to_device(task.inputs, device)
    return FineTuned(
        table=table,
        model=model,
        metric=type(task.metric).__name__,
        test_dense=test_dense,
        test_recovered=test_recovered,
        dense=measure(teacher, inputs),
        measured=measure(model, inputs),
        seconds=time.perf_counter() - began,
    )


def measure(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Measurement]:
    """Every counted cost of a model on its example inputs."""
    return {name: meter.measure(model, inputs) for name, meter in METERS.items()}


def cost_models(task: Task, traced: TracedModel, dense: Mapping[str, Measurement]) -> dict[str, CostModel]:
    """A model for each counted cost, exact at the dense network."""
    examples = len(task.inputs[0])
    per_parameter = weight_bytes(task.model) / max(dense["params"].value, 1.0)
    weights = tuple(_scaled(term, per_parameter / 1e6) for term in traced.params)
    alive = tuple(tuple(_scaled(t, examples / 1e6) for t in instant) for instant in traced.activations)
    forms = {
        "macs": (traced.macs,),
        "params": (traced.params,),
        "memory_mb": tuple(weights + instant for instant in alive) or (weights,),
    }
    return {
        name: CountedCost(name, dense[name].unit, traced.space, terms).anchored(dense[name].value)
        for name, terms in forms.items()
    }


def _scaled(term: Any, by: float) -> Any:
    return type(term)(term.scale * by, term.left, term.right)


def _train(model: nn.Module, task: Task, plan: FineTune, *, teacher: nn.Module, seed: int, progress: Progress) -> None:
    begun = False

    def on_step(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            progress.stage("fine-tuning the answer", total)
            begun = True
        progress.step()

    with seeded(seed):
        finetune(model, task.train, plan, loss=task.loss, lr=task.lr, teacher=teacher, on_step=on_step)


def _test(task: Task, models: Sequence[nn.Module]) -> list[float]:
    """The metric of each model on the test split, read once."""
    metrics = [copy.deepcopy(task.metric) for _ in models]
    read = 0
    try:
        with torch.inference_mode(), seeded(0):
            for inputs, target in task.test:
                read += 1
                for model, metric in zip(models, metrics, strict=True):
                    device = next(model.parameters()).device
                    metric.to(device)
                    metric.update(model(*arguments(inputs, device)), to_device(target, device))
    except Exception as error:
        raise InputError(f"task '{task.name}': reading test raised {components.described(error)}") from error
    if not read:
        raise InputError(f"task '{task.name}': test holds no batch")
    return [float(metric.compute()) for metric in metrics]


def _best(trials: Sequence[Trial], budgets: Sequence[Budget]) -> Trial:
    """The measured trial of highest score within the budgets; without any, the one that exceeds them least."""
    answers = [t for t in trials if t.candidate.measure and t.error is None]
    if not answers:
        failed = next((t.error for t in reversed(trials) if t.error), "no candidate was measured")
        raise RuntimeError(f"the search ended without an answer: {failed}")
    feasible = [t for t in answers if t.feasible]
    if feasible:
        return max(feasible, key=lambda t: t.score)
    return min(answers, key=lambda t: max(t.costs[b.cost].high / b.limit for b in budgets))


def _check_budgets(budgets: Sequence[Budget]) -> None:
    if not budgets:
        raise InputError("budget is empty: name at least one, such as budget=flops_50pct")
    for budget in budgets:
        if budget.cost not in COUNTED:
            raise InputError(
                f"budget: {budget.cost} needs measuring on a device, which this version does not do yet; "
                f"budgets may limit {', '.join(COUNTED)} (flops, macs, params, memory)"
            )


def _check_seed(seed: object) -> None:
    if type(seed) is not int or seed < 0:
        raise InputError(f"seed must be a whole number of 0 or more, got {seed!r}")


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device} is not there: {str(error).splitlines()[0]}") from error


def _spec(group: str, chosen: str | Mapping[str, Any]) -> dict[str, Any]:
    return components.spec(group, chosen) if isinstance(chosen, str) else dict(chosen)


def _named(values: Mapping[str, Any]) -> str:
    """The name in conf/ whose target this is, else the target itself."""
    target = str(values["_target_"])
    for group in ("strategy", "criterion"):
        for name in components.names(group):
            if components.spec(group, name)["_target_"] == target:
                return name
    return target


def _fingerprint(evaluator: Evaluator, traced: TracedModel, dense: Mapping[str, Measurement]) -> dict[str, Any]:
    """Everything that the trials of a search depend on, the cost models included."""
    groups = [(g.name, g.size, g.levels) for g in traced.space.groups]
    costs = [(traced.macs, traced.params, traced.activations), [(name, m.value) for name, m in dense.items()]]
    return evaluator.identity | {"space": _digest(groups), "costs": _digest(costs)}


def _digest(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _study_name(
    task: Task, chosen: Mapping[str, Mapping[str, Any]], asked: Sequence[str], seed: int, fingerprint: Mapping[str, Any]
) -> str:
    digest = _digest(sorted(fingerprint.items()))[:8]
    return f"{task.name} {_named(chosen['strategy'])} {'+'.join(asked)} seed {seed} ({digest})"


def _summary(task: Task, traced: TracedModel) -> str:
    units = sum(g.size for g in traced.space.groups)
    refused = f"; {len(traced.space.refused)} kept whole" if traced.space.refused else ""
    return f"{task.name}: {len(traced.space.groups)} groups of {units} units, every group proven{refused}"


def _versions() -> dict[str, str]:
    names = ("autoprune", "torch", "numpy", "scipy", "optuna", "fvcore")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
