"""The last steps of a search, and of a ratio table in someone's training: fine-tune, read the test split."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoprune import components
from autoprune.borrowing import arguments, first, seeded, to_device
from autoprune.checks import check_place, check_seed, check_task
from autoprune.core import InputError, Measurement, Progress, Silent, Task
from autoprune.costs import counted
from autoprune.criteria import Criterion
from autoprune.keywords import named, positional_task
from autoprune.prune import RatioTable, weights_hash
from autoprune.recover import HEALING, FineTune, anchored, check_healing, finetune, recalibrate

FINAL = FineTune(epochs=3)


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
    recovery: Sequence[str] = HEALING,
    recalibration: int = 4,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = Silent(),
) -> FineTuned:
    """Reuse a ratio table in training: prune the task's model by it, heal and fine-tune it, and read the test split.

    recovery: as of evaluate.Scoring, on the first `recalibration` training batches.

    Raises:
        InputError: a setting or the task is wrong, or its model has another architecture than the table's.
    """
    began = time.perf_counter()
    check_seed(seed)
    check_place(device, "device")
    check_healing("finetune", recovery)
    chosen = components.chosen("criterion", criterion)
    rank: Criterion = components.bind(chosen, "criterion", task.model, (), batches=(), loss=None, seed=0)
    task = positional_task(task)
    check_task(task)
    progress.stage("pruning", None)
    with seeded(seed):
        batches = first(task.train, recalibration)
    table = table.fitted(task.model, task.inputs, criterion=rank, batches=batches, loss=task.loss)
    teacher = copy.deepcopy(task.model).to(device)
    model = healed(task, table, batches, recovery, device=device)
    train(model, task, final, teacher=teacher, seed=seed, progress=progress)
    progress.stage("reading the test split", None)
    test_dense, test_recovered = test(task, [teacher, model])
    inputs = to_device(task.inputs, device)
    return FineTuned(
        table=table,
        model=named(model),
        metric=type(task.metric).__name__,
        test_dense=test_dense,
        test_recovered=test_recovered,
        dense=counted(teacher, inputs),
        measured=counted(model, inputs),
        seconds=time.perf_counter() - began,
    )


def healed(
    task: Task,
    table: RatioTable,
    batches: Sequence[Any],
    recovery: Sequence[str] = HEALING,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The task's model pruned by a table of its own weights, put on a device and recovered without training, on these
    training batches; ready to be trained (recover.anchored).

    Raises:
        InputError: the model has another architecture than the table's.
    """
    dense = anchored(task.model, batches, task.loss)
    if dense is not task.model:
        table = replace(table, weights=weights_hash(dense))  # the same units
    model = table.prune(dense, task.inputs, reconstruct=batches if "reconstruct" in recovery else ()).to(device)
    if "bn_recalibrate" in recovery:
        recalibrate(model, to_device(batches, device))
    return model


def train(
    model: nn.Module,
    task: Task,
    plan: FineTune,
    *,
    teacher: nn.Module,
    seed: int,
    progress: Progress,
) -> None:
    """Fine-tune a network in place, seen by `progress`."""
    begun = False

    def on_step(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            progress.stage("fine-tuning the answer", total)
            begun = True
        progress.step()

    with seeded(seed):
        finetune(model, task.train, plan, loss=task.loss, lr=task.lr, teacher=teacher, on_step=on_step)


def test(task: Task, models: Sequence[nn.Module]) -> list[float]:
    """The metric of each model on the test split, read once.

    Raises:
        InputError: the split is empty, or reading or scoring it raised.
    """
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
