"""What is put down of a search: at its outset, and at its end, when the final network is measured and tested."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from torch import nn

from autoprune import __version__
from autoprune.answer import Answer
from autoprune.core import Budget, DeviceLostError, InputError, Measurement, Progress, Trial
from autoprune.costs import Costs, layer_times
from autoprune.evaluate import Evaluator, Scoring
from autoprune.final import test
from autoprune.meters.device import Device, MeasuringError
from autoprune.outset import Outset, parts_of
from autoprune.prune import RatioTable, weights_hash
from autoprune.result import LayerTime, Result, Scores
from autoprune.rows import TableGroup
from autoprune.scores import sign_of
from autoprune.storage import shown
from autoprune.traced import TracedModel
from autoprune.units import Labels

LOG = logging.getLogger("autoprune")


def concluded(
    evaluator: Evaluator,
    prices: Costs,
    answer: Answer,
    *,
    outset: Outset,
    criterion: str,
    device: Device,
    progress: Progress,
    began: float,
) -> Result:
    """Measure and test the final network, and put down all that is known of it. began: by time.perf_counter()."""
    task, model, ratios = evaluator.task, answer.model, answer.trial.candidate.ratios
    scores = _scores(evaluator, answer, progress)
    if prices.device and not answer.known:
        progress.stage(f"measuring the answer on {device.name}", None)
    measured = answer.known or _measured(evaluator, model, answer.trial)
    provenance = {name: getattr(outset, name) for name in ("task", "strategy", "seed", "versions")}
    return Result(
        **vars(outset),
        table=RatioTable(
            groups=_table_groups(prices.traced, answer.kept),
            architecture=prices.traced.fingerprint,
            weights=weights_hash(task.model),
            criterion=criterion,
            grain="+".join(prices.traced.grain),
            budgets=_verdicts(outset.asked, prices.limits, measured),
            provenance=provenance,
        ),
        model=model,
        ratios=ratios,
        scores=scores,
        predicted={n: c.predict(ratios) for n, c in prices.models.items()},
        measured=measured,
        evaluations=evaluator.evaluations,
        cache_hits=evaluator.hits,
        shared=evaluator.shared,
        held_out=tuple(prices.table.held_out_pairs(prices.traced.space)) if prices.table else (),
        layers=_layers(device, evaluator, model) if prices.table else (),
        seconds=time.perf_counter() - began,
        **answer.record,
    )


def begun(
    evaluator: Evaluator,
    prices: Costs,
    *,
    asked: Sequence[str],
    strategy: str,
    study: str,
    storage: str | None,
) -> Outset:
    """What a search begins with."""
    task = evaluator.task
    return Outset(
        task=task.name,
        strategy=strategy,
        seed=evaluator.seed,
        device=prices.device or _place(evaluator.scoring),
        metric=type(task.metric).__name__,
        dense_score=sign_of(task.metric) * evaluator.dense().score,
        sign=sign_of(task.metric),
        dense=prices.dense,
        budgets=prices.limits,
        asked=tuple(asked),
        space=prices.traced.space,
        parts=parts_of(prices.traced, evaluator.dense_model),
        study=study,
        storage=None if storage is None else shown(storage),
        versions=_versions(),
        notes=task.notes,
    )


def _scores(evaluator: Evaluator, answer: Answer, progress: Progress) -> Scores:
    """In the metric's own sign, on the search split and the test split."""
    task = evaluator.task
    sign = sign_of(task.metric)
    recovered = sign * evaluator.scored(answer.model).score
    progress.stage("reading the test split", None)
    of_dense, of_answer = test(task, [evaluator.dense_model, answer.model])
    return Scores(
        metric=type(task.metric).__name__,
        dense=sign * evaluator.dense().score,
        pruned=sign * answer.pruned,
        recovered=recovered,
        test_dense=of_dense.metric,
        test_recovered=of_answer.metric,
        top1_dense=of_dense.top1,
        top1_recovered=of_answer.top1,
        top5_dense=of_dense.top5,
        top5_recovered=of_answer.top5,
    )


def _measured(evaluator: Evaluator, model: nn.Module, answer: Trial) -> Mapping[str, Measurement]:
    """Every cost of the final network; where its device fails now, what its trial took stands as a
    prediction, which decides nothing."""
    try:
        return evaluator.measured(model)
    except (MeasuringError, DeviceLostError, InputError) as error:
        LOG.warning("the final network could not be measured: %s", error)
        if not answer.costs:
            raise
        note = f"the final network could not be measured ({error}); this is what its trial took"
        return {
            name: replace(m, kind="predicted", notes=(note, *m.notes)) if m.kind == "measured" else m
            for name, m in answer.costs.items()
        }


def _layers(device: Device, evaluator: Evaluator, model: nn.Module) -> tuple[LayerTime, ...]:
    """What each layer takes in the dense and in the final network; nothing where that cannot be measured."""
    try:
        before, after = layer_times(device, [evaluator.dense_model, model], evaluator.task.inputs)
    except (MeasuringError, DeviceLostError, InputError) as error:
        LOG.warning("the layers could not be timed: %s", error)
        return ()
    return tuple(LayerTime(name, ms, after.get(name, 0.0)) for name, ms in before.items())


def _place(scoring: Scoring) -> str:
    many = "s" * (scoring.threads != 1)
    return f"{scoring.device}, {scoring.threads} thread{many}"


def _table_groups(traced: TracedModel, kept: Sequence[Labels]) -> tuple[TableGroup, ...]:
    return tuple(
        TableGroup(name=g.name, size=g.size, units=tuple(units.tolist()), members=g.members)
        for g, units in zip(traced.space.groups, kept, strict=True)
    )


def _verdicts(
    asked: Sequence[str], budgets: Sequence[Budget], measured: Mapping[str, Measurement]
) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"budget": text, "cost": b.cost, "limit": b.limit, "unit": b.unit, "value": measured[b.cost].value}
        | {"kind": measured[b.cost].kind, "met": b.met(measured[b.cost])}
        for text, b in zip(asked, budgets, strict=True)
    )


def _versions() -> dict[str, str]:
    names = ("torch", "numpy", "scipy", "optuna", "fvcore")
    return {"python": platform.python_version(), "autoprune": __version__} | {name: version(name) for name in names}
