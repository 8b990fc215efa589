"""The last steps of a search, and of a ratio table in someone's training: fine-tune, read the test split.

Letters: N images, C classes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune import components
from autoprune.borrowing import arguments, first, seeded, to_device
from autoprune.checks import check_place, check_seed, check_task
from autoprune.core import InputError, Measurement, Progress, Silent, Task
from autoprune.costs import counted
from autoprune.criteria import Criterion
from autoprune.healer import heal
from autoprune.keywords import named, positional_task
from autoprune.prune import RatioTable, ranking
from autoprune.recipe import HEALING, Step, check_healing
from autoprune.recover import FineTune, Teacher, anchored, finetune
from autoprune.rounds import Final, Pruner, Tune, check_final
from autoprune.scores import sign_of

FINAL = Final(epochs=3)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A network pruned by a ratio table and fine-tuned; test scores in the metric's own sign.

    table: the one given, with the units that this model keeps. sign: -1 where the metric is better the lower, else 1.
    """

    table: RatioTable
    model: nn.Module
    metric: str
    sign: float
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

    recovery: what heals it before it is trained, of recipe.HEALING, on the first `recalibration` training batches.
    final: how it is pruned and trained (rounds.Final).

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
    teacher = copy.deepcopy(task.model).to(device).eval()
    plan, steps, shown = Final.of(final), [Step(name) for name in recovery], to_device(batches, device)
    traced = table.traced(task.model, task.inputs)
    check_final(plan, task, traced)
    order = ranking(traced, rank, batches=batches, loss=task.loss, seed=0)
    listed = [np.isin(np.arange(g.size), g.units).astype(np.float64) for g in table.groups]
    pruner = Pruner(
        task=task,
        traced=traced,
        dense=copy.deepcopy(anchored(task.model, batches, task.loss)).to(device).eval(),
        scores=listed if plan.at_once else order(task.model),
        rank=order,
        heal=lambda model, kept, source: heal(model, steps, shown, traced=traced, kept=kept, source=source),
        tune=tuning(task, teacher=Teacher(teacher), seed=seed, progress=progress),
        seed=seed,
    )
    model, kept = pruner.pruned([g.ratio for g in table.groups], plan)
    table = table.keeping(kept)
    progress.stage("reading the test split", None)
    dense, recovered = test(task, [teacher, model])
    inputs = to_device(task.inputs, device)
    costs = counted(teacher, inputs), counted(model, inputs)  # as long as both are called by position
    return FineTuned(
        table=table,
        model=named(model),
        metric=type(task.metric).__name__,
        sign=sign_of(task.metric),
        test_dense=dense.metric,
        test_recovered=recovered.metric,
        dense=costs[0],
        measured=costs[1],
        seconds=time.perf_counter() - began,
    )


def healed(task: Task, table: RatioTable, batches: Sequence[Any], recovery: Sequence[str] = HEALING) -> nn.Module:
    """The task's model pruned by a table of its own weights and recovered without training, on these training batches;
    ready to be trained (recover.anchored).

    Raises:
        InputError: the model has another architecture than the table's.
    """
    dense = anchored(task.model, batches, task.loss)
    traced = table.traced(dense, task.inputs)
    model = traced.cut(dense, table.kept).eval()
    heal(model, map(Step, recovery), batches, traced=traced, kept=table.kept, source=dense)
    return model


def shown(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """A finetune's on_step by which `progress` sees it."""

    def on_step(done: int, total: int) -> None:
        if done == 1:
            progress.stage(stage, total)
        progress.step()

    return on_step


def tuning(task: Task, *, teacher: Teacher, seed: int, progress: Progress) -> Tune:
    """How a Pruner trains: on the task's training split, seen by `progress`."""

    def tune(model: nn.Module, plan: FineTune, number: int, after: Callable[[int], None]) -> None:
        seen = shown(progress, f"fine-tuning the answer{f', round {number + 1}' if number else ''}")

        def on_step(done: int, total: int) -> None:
            seen(done, total)
            after(done)

        with seeded(seed + number):
            finetune(
                model,
                task.train,
                plan,
                loss=task.loss,
                lr=task.lr,
                past=task.past,
                teacher=teacher,
                on_step=on_step,
            )

    return tune


@dataclass(frozen=True)
class Tested:
    """A network on the test split. metric: the task's, in its own sign. top1, top5: the share of images whose class is
    the one of highest output, or among the five of highest; None where the task does not classify (see Places), or has
    no more than one class, or five."""

    metric: float
    top1: float | None
    top5: float | None


def test(task: Task, models: Sequence[nn.Module]) -> list[Tested]:
    """What each model does on the test split, read once.

    Raises:
        InputError: the split is empty, or reading or scoring it raised.
    """
    metrics, places = [copy.deepcopy(task.metric) for _ in models], [Places() for _ in models]
    read = 0
    try:
        with torch.inference_mode(), seeded(0):
            for inputs, target in task.test:
                read += 1
                for model, metric, found in zip(models, metrics, places, strict=True):
                    device = next(model.parameters()).device
                    output, wanted = model(*arguments(inputs, device)), to_device(target, device)
                    found.update(output, wanted)
                    metric.to(device)
                    metric.update(output, wanted)
    except Exception as error:
        raise InputError(f"task '{task.name}': reading test raised {components.described(error)}") from error
    if not read:
        raise InputError(f"task '{task.name}': test holds no batch")
    pairs = zip(metrics, places, strict=True)
    return [Tested(float(metric.compute()), found.within(1), found.within(5)) for metric, found in pairs]


class Places:
    """Where the class of each image stands among all classes by a network's output: 0 for that of highest output, of
    equal ones the first, as of argmax.

    What a task classifies is told by its batches: outputs are one tensor of floats [N, C], targets one of whole numbers
    [N] from 0 to C - 1.
    """

    def __init__(self) -> None:
        self._classes: set[int] = set()  # C of each batch, 0 where it is of no classification
        self._places: list[Tensor] = []

    def update(self, output: Any, target: Any) -> None:
        classes = _classes(output, target)
        self._classes.add(classes)
        if classes:
            order = output.argsort(dim=1, descending=True, stable=True)
            self._places.append((order == target[:, None]).int().argmax(dim=1))

    def within(self, count: int) -> float | None:
        """The share of images whose class is among the first so many; None unless all batches were of one
        classification of more classes than that."""
        if len(self._classes) != 1 or max(self._classes) <= count:
            return None
        places = torch.cat(self._places)
        return int((places < count).sum()) / len(places)


def _classes(output: Any, target: Any) -> int:
    """C of a batch, 0 where it is of no classification."""
    if not (isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point()):
        return 0
    if not (isinstance(target, Tensor) and target.shape == output.shape[:1] and target.dtype in WHOLE):
        return 0
    classes = output.shape[1]
    return classes if bool(((target >= 0) & (target.long() < classes)).all()) else 0
