"""Is what the user gave what a search needs? Asked once, before any time is spent."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn

from autoprune.borrowing import arguments, seeded
from autoprune.components import described
from autoprune.core import InputError, Past, PruningSpace, Strategy, Task, is_number

LOG = logging.getLogger("autoprune")


def check_task(task: Task) -> None:
    """Run one batch of the search split through model, loss and metric.

    Raises:
        InputError: something is not as autoprune.Task's docstring says; the message names it.
    """
    where = f"task '{task.name}'"
    if not isinstance(task.model, nn.Module):
        raise InputError(f"{where}: model must be a torch.nn.Module, got {type(task.model).__name__}")
    if not isinstance(task.inputs, tuple) or not all(isinstance(x, Tensor) and x.dim() for x in task.inputs):
        raise InputError(
            f"{where}: inputs must be a tuple of tensors whose first dimension is the batch, or a mapping of them by "
            "the names of the model's arguments"
        )
    if not isinstance(task.metric, torchmetrics.Metric) or task.metric.higher_is_better is None:
        raise InputError(f"{where}: metric must be a torchmetrics.Metric whose higher_is_better is True or False")
    if not task.lr > 0:
        raise InputError(f"{where}: lr must be above 0, got {task.lr}")
    if task.past is not None:
        _check_past(where, task.past)
    for name, tensor in task.model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where}: the weights hold NaN or infinity, first in '{name}'; train the model again")
    for split in ("train", "search", "test"):
        batches = getattr(task, split)
        if batches is None or (hasattr(batches, "__len__") and len(batches) == 0):
            raise InputError(f"{where}: {split} holds no batch")
        if hasattr(batches, "__next__"):
            raise InputError(f"{where}: {split} can be read only once; give a list, a DataLoader or the like")
    for split in ("train", "search"):
        _check_batch(where, split, _first_batch(where, split, getattr(task, split)))
    _check_scoring(where, task, _first_batch(where, "search", task.search))


def _check_past(where: str, past: Past) -> None:
    if not is_number(past.epochs) or past.epochs <= 0:
        raise InputError(f"{where}: past.epochs must be a number above 0, got {past.epochs!r}")
    try:
        rates = [float(past.schedule(done)) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
    except Exception as error:
        raise InputError(f"{where}: past.schedule raised {described(error)}") from error
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise InputError(f"{where}: past.schedule must give numbers of 0 or more from 0 to 1, got {rates}")


def check_seed(seed: object) -> None:
    """Raises InputError unless this is a whole number of 0 or more."""
    if type(seed) is not int or seed < 0:
        raise InputError(f"seed must be a whole number of 0 or more, got {seed!r}")
    if seed >= 2**63:
        raise InputError(f"seed must be below 2**63, got {seed}")


def check_place(place: str, what: str) -> None:
    """Raises InputError unless torch can put a tensor there; `what` names the setting."""
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"{what}={place} is not there: {str(error).splitlines()[0]}") from error


def _first_batch(where: str, split: str, batches: Any) -> Any:
    with seeded(0):
        try:
            return next(iter(batches))
        except StopIteration:
            raise InputError(f"{where}: {split} holds no batch") from None
        except Exception as error:
            raise InputError(f"{where}: iterating {split} raised {described(error)}") from error


def _check_batch(where: str, split: str, batch: Any) -> None:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(f"{where}: {split} must yield (inputs, target) pairs, got {type(batch).__name__}")
    if not all(isinstance(x, Tensor) for x in arguments(batch[0])):
        raise InputError(f"{where}: {split} must yield tensors as inputs, got {type(batch[0]).__name__}")


def _check_scoring(where: str, task: Task, batch: Any) -> None:
    inputs, target = batch
    step = "copying the model"
    try:
        with torch.no_grad(), seeded(0):
            model, metric = copy.deepcopy(task.model).cpu().eval(), copy.deepcopy(task.metric)
            step = "the model"
            output = model(*arguments(inputs))
            step = "loss(output, target)"
            loss = float(task.loss(output, target))
            step = "metric(output, target)"
            score = float(metric(output, target))
    except Exception as error:
        raise InputError(f"{where}: {step} fails on a search batch: {described(error)}") from error
    if not math.isfinite(loss) or not math.isfinite(score):
        raise InputError(f"{where}: loss {loss} and metric {score} of a search batch must be finite")


def check_settings(build: Callable[..., Strategy], space: PruningSpace, *, seed: int) -> None:
    """Let a strategy refuse its settings before anything is measured: built once without a budget.

    Raises:
        InputError: what the strategy says of its settings; any other trouble waits until it is built in earnest.
    """
    try:
        build(space, (), {}, seed=seed)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001, a strategy may need a budget, or groups
        LOG.debug("%s without a budget: %s", build, error)
