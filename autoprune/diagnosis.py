"""What of a task's model can be pruned, what cannot, and which operation stands in the way, before any search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.checks import check_task
from autoprune.core import Progress, Silent, Task, Term, amount_of
from autoprune.keywords import positional_task
from autoprune.space import Space, explored
from autoprune.traced import TracedModel


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """traced: the groups, each proven, and what was refused with the reason. Shares in [0, 1] of all that the tracer
    counted: of what lies in tensors that some group cuts, and of what is left with every group at its deepest level.
    """

    task: str
    traced: TracedModel
    prunable_macs: float
    prunable_params: float
    least_macs: float
    least_params: float
    seconds: float


def doctor(task: Task, space: Space = Space(), *, progress: Progress = Silent()) -> Diagnosis:
    """Trace a task's model and prove its groups, as a search does first.

    Raises:
        InputError: the task is wrong, or its model does not run on its inputs.
    """
    task = positional_task(task)
    check_task(task)
    progress.stage("tracing", None)
    began = time.perf_counter()
    traced = explored(task.model, task.inputs, space)
    seconds = time.perf_counter() - began
    dense = [g.size for g in traced.space.groups]
    least = [g.kept(g.levels[-1]) for g in traced.space.groups]
    macs, params = traced.macs, traced.params
    return Diagnosis(
        task=task.name,
        traced=traced,
        prunable_macs=prunable(macs, dense),
        prunable_params=prunable(params, dense),
        least_macs=amount_of(macs, least) / max(amount_of(macs, dense), 1.0),
        least_params=amount_of(params, least) / max(amount_of(params, dense), 1.0),
        seconds=seconds,
    )


def prunable(terms: Sequence[Term], kept: Sequence[int]) -> float:
    """The share of the terms that some group cuts, at these widths."""
    cut = [term for term in terms if term.left[1] or term.right[1] or term.gate is not None]
    return amount_of(cut, kept) / max(amount_of(terms, kept), 1.0)
