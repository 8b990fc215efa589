"""Sparsity learning before a search: a task's model is trained further so that units which can go fall silent.

Letters: U units of one group.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autoprune import components, criteria
from autoprune.borrowing import first, seeded
from autoprune.checks import check_place, check_seed, check_task
from autoprune.core import InputError, Progress, Silent, Task
from autoprune.criteria import Groups
from autoprune.final import shown, test
from autoprune.keywords import named, positional_task
from autoprune.recover import FineTune, anchored, finetune
from autoprune.scores import sign_of
from autoprune.space import Space, trace

SPARSE = FineTune(epochs=5, lr_fraction=0.25, teach=0)
NEAR_ZERO = 0.01  # of the largest of its group
BATCHES = 4  # of training, for statistics that are not of the data


@dataclass(frozen=True, kw_only=True)
class Silenced:
    """Of the units of a group, how many were near zero before the training and are after it; see near_zero."""

    units: int
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A copy of a task's model that was trained with a regularizer; test scores in the metric's own sign, which is -1
    where it is better the lower, else 1."""

    model: nn.Module
    regularizer: Mapping[str, Any]
    metric: str
    sign: float
    test_before: float
    test_after: float
    groups: Mapping[str, Silenced]
    seconds: float

    def share(self, when: Literal["before", "after"]) -> float:
        """Of all units, the fraction that was near zero then."""
        groups = self.groups.values()
        return sum(g.before if when == "before" else g.after for g in groups) / sum(g.units for g in groups)


def train(
    task: Task,
    *,
    regularizer: str | Mapping[str, Any] = "bn_l1",
    plan: FineTune = SPARSE,
    seed: int = 0,
    space: Space = Space(),
    device: str = "cpu",
    progress: Progress = Silent(),
) -> Trained:
    """Train a copy of the task's model with its own loss and, added to it, a regularizer over the units of `space`. A
    search of the task with that copy for its model starts from there.

    regularizer: a name in conf/regularizer/, or a mapping with `_target_` and keyword arguments; of strength 0 it is
    none, and the training is that of recover.finetune.

    Raises:
        InputError: a setting or the task is wrong, nothing of its model can be pruned, the regularizer has nothing to
        hold on to in it, or the training diverged.
    """
    began = time.perf_counter()
    check_seed(seed)
    check_place(device, "device")
    chosen = components.chosen("regularizer", regularizer)
    components.bind(chosen, "regularizer", task.model, ())
    task = positional_task(task)
    check_task(task)
    progress.stage("tracing", None)
    traced = trace(task.model, task.inputs, space)
    groups = [pieces for pieces in traced.slices if pieces]  # a block has nothing to hold down
    if not groups:
        raise InputError("space: a block has no units to be silenced one by one; space.grain=[channel,block] has")
    names = [g.name for g, pieces in zip(traced.space.groups, traced.slices, strict=True) if pieces]
    with seeded(seed):
        batches = first(task.train, BATCHES)
    dense = copy.deepcopy(task.model).eval().to(device)
    model = copy.deepcopy(anchored(task.model, batches, task.loss)).eval().to(device)
    before = near_zero(model, groups)
    penalty = _penalty(chosen, model, groups, seed)
    try:
        with seeded(seed):
            finetune(
                model,
                task.train,
                plan,
                loss=task.loss,
                lr=task.lr,
                past=task.past,
                teacher=dense,
                penalty=penalty,
                on_step=shown(progress, f"training with {components.named('regularizer', chosen)}"),
            )
    except FloatingPointError as error:
        raise InputError(f"{error}: a lower regularizer.strength or training.lr_fraction may help") from error
    progress.stage("reading the test split", None)
    tested_before, tested_after = test(task, [dense, model])
    counts = zip(names, groups, before, near_zero(model, groups), strict=True)
    return Trained(
        model=named(model),
        regularizer=chosen,
        metric=type(task.metric).__name__,
        sign=sign_of(task.metric),
        test_before=tested_before.metric,
        test_after=tested_after.metric,
        groups={name: Silenced(units=len(own[0].positions), before=b, after=a) for name, own, b, a in counts},
        seconds=time.perf_counter() - began,
    )


def near_zero(model: nn.Module, groups: Groups) -> list[int]:
    """How many units of each group have all their normalisations' scales, or all the filters that make them, at most at
    NEAR_ZERO times the largest of the group. A group in which all are zero is near zero as a whole."""
    scales = criteria.bn_scale(model, groups, reduce="max", normalise="none")
    norms = criteria.l2(model, groups, reduce="max", normalise="none")
    small = [[sizes <= NEAR_ZERO * sizes.max() for sizes in own] for own in zip(scales, norms, strict=True)]
    return [int((by_scale | by_norm).sum()) for by_scale, by_norm in small]


def _penalty(
    values: Mapping[str, Any], model: nn.Module, groups: Groups, seed: int
) -> Callable[[nn.Module], Tensor] | None:
    """What the regularizer adds to the loss, tried once on the model; None where its strength is 0.

    Raises:
        InputError: it raised, returned no finite scalar, or one that nothing that is trained has a part in.
    """
    place, bound = f"regularizer: {values['_target_']}", components.bind(values, "regularizer", model, ())
    try:
        with torch.enable_grad(), seeded(seed):
            value = bound(model, groups)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{place} raised {components.described(error)}") from error
    if not isinstance(value, Tensor) or value.dim() or not torch.isfinite(value):
        raise InputError(f"{place} must return a finite scalar tensor, got {value!r}")
    if values.get("strength") == 0:
        return None  # what is added as 0 would still be decayed and rounded
    trainable = any(p.requires_grad for p in model.parameters())  # one that is frozen as a whole is trained as a whole
    if trainable and not value.requires_grad:
        raise InputError(f"{place} depends on no parameter that is trained: requires_grad of all of them is False")
    return lambda own: bound(own, groups)
