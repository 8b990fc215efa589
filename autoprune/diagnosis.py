"""What stands in the way of a search, before any: in the machine, the device, the storage and the task; and what of the
task's model can be pruned, what cannot, and which operation is the reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune import surroundings
from autoprune.checks import check_task
from autoprune.checkup import AREA as TASK
from autoprune.checkup import Plan, check_up
from autoprune.core import Progress, Silent, Task, Term, amount_of
from autoprune.findings import Finding, guarded
from autoprune.keywords import positional_task
from autoprune.measuring import device_of
from autoprune.meters.device import Device
from autoprune.space import Space, explored
from autoprune.stock import stock
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
    return _traced(task, space, progress)


def _traced(task: Task, space: Space, progress: Progress) -> Diagnosis:
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


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that was looked at; diagnosis: None where the task's model could not be traced."""

    findings: tuple[Finding, ...]
    diagnosis: Diagnosis | None
    seconds: float

    @property
    def failed(self) -> list[Finding]:
        """What a search would be refused for."""
        return [finding for finding in self.findings if finding.status == "failed"]


def examine(
    make: Callable[[], Task],
    *,
    space: Space = Space(),
    device: str | Mapping[str, Any] | Device = "torch_cpu",
    storage: str | None = None,
    output: Path = Path("outputs"),
    plan: Plan = Plan(),
    progress: Progress = Silent(),
) -> Examination:
    """Look at all that a search needs, and say of each what was found. What raises is a finding, and the rest is looked
    at all the same; nothing is written, and neither the task nor a global random generator is left changed.

    make: gives the task, and may raise.
    """
    began = time.perf_counter()
    progress.stage("looking at the device", None)
    there, target = surroundings.device(lambda: device_of(device))
    threads = 1 if target is None or target.host else target.threads
    found = surroundings.environment(output, threads=threads) + there + stock(storage)
    progress.stage("making the task", None)
    tasks: list[Task] = []
    found += guarded(TASK, "task", lambda: _made(make, tasks))
    diagnoses: list[Diagnosis] = []
    for task in tasks:
        found += guarded(TASK, "prunable", lambda task=task: _traceable(task, space, diagnoses, progress))  # type: ignore[misc]
        progress.stage("trying the task", None)
        found += check_up(task, diagnoses[0].traced if diagnoses else None, plan, target)
    seconds = time.perf_counter() - began
    return Examination(findings=tuple(found), diagnosis=diagnoses[0] if diagnoses else None, seconds=seconds)


def _made(make: Callable[[], Task], tasks: list[Task]) -> Iterator[Finding]:
    """Adds the task; nothing is to be said of it yet."""
    tasks.append(positional_task(make()))
    yield from ()


def _traceable(task: Task, space: Space, diagnoses: list[Diagnosis], progress: Progress) -> Iterator[Finding]:
    """Adds the diagnosis."""
    diagnoses.append(_traced(task, space, progress))
    yield _prunable(diagnoses[0])


def _prunable(found: Diagnosis) -> Finding:
    groups, refused = found.traced.space.groups, found.traced.space.refused
    if not groups:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in refused[:3]) or "it has no convolution or linear layer"
        way_out = "another space may do: channel, block or head, or weight, which masks single ones"
        return Finding(area=TASK, what="prunable", detail=f"nothing: {reasons}", status="failed", way_out=way_out)
    detail = f"{len(groups)} groups, in {found.prunable_macs:.0%} of MACs and {found.prunable_params:.0%} of parameters"
    whole = f"; {len(refused)} left whole, the reasons are above" if refused else ""
    return Finding(area=TASK, what="prunable", detail=detail + whole)


def prunable(terms: Sequence[Term], kept: Sequence[int]) -> float:
    """The share of the terms that some group cuts, at these widths."""
    cut = [term for term in terms if term.left[1] or term.right[1] or term.gate is not None]
    return amount_of(cut, kept) / max(amount_of(terms, kept), 1.0)
