"""Latencies and cost tables without a search, and the devices that give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autoprune import components, costs, untrusted
from autoprune.checks import check_seed
from autoprune.core import Budget, InputError, Measurement, Progress, Silent, Task, is_number
from autoprune.keywords import positional_task, unnamed
from autoprune.meters.device import Device
from autoprune.meters.latency import Latency, Reference
from autoprune.meters.profile import CostTable, Profile
from autoprune.prune import RatioTable
from autoprune.space import Space, trace
from autoprune.traced import TracedModel


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
    task = positional_task(task)
    progress.stage("tracing", None)
    traced = trace(task.model, task.inputs, Space(max_ratio=max_ratio))
    meter = Latency(device_of(device), seed=seed)
    folder = None if tables is None else Path(tables)
    table = costs.table_for(task, traced, meter, plan=plan, folder=folder, seed=seed, progress=progress, refresh=True)
    return table, traced


def latency(
    model: nn.Module,
    inputs: tuple[Tensor, ...] | Mapping[str, Tensor],
    *,
    device: str | Mapping[str, Any] | Device = "torch_cpu",
    seed: int = 0,
) -> Measurement:
    """Milliseconds of model(*inputs), or model(**inputs), on a device, as a search's verdict measures them (see
    meters.latency.Latency)."""
    model, inputs, _ = unnamed(model, inputs)
    return Latency(device_of(device), seed=seed).measure(model, inputs)


def measured_again(
    task: Task, folder: Path, *, device: str | Mapping[str, Any] | Device = "torch_cpu", seed: int = 1
) -> tuple[Measurement, Measurement, dict[str, Budget]]:
    """The latency of a finished run's written network as the run measured it, and as it is now in new processes, as
    many as the device allows; and the run's latency budgets, by what was asked.

    Raises:
        InputError: the folder holds no run that measured a latency, or not of this task.
    """
    task = positional_task(task)
    table = RatioTable.load(folder / "ratios.yaml")
    model = table.rebuild(task.model, task.inputs, folder / "pruned.safetensors")
    dense, then, budgets = _recorded(folder)
    relative = any(asked.endswith("pct") for asked in budgets)
    chosen = device_of(device)
    chosen = replace(chosen, processes=chosen.most_processes)
    meter = Latency(chosen, seed=seed).beside(Reference(task.model, dense, relative))
    return then, meter.measure(model, task.inputs), budgets


def _recorded(folder: Path) -> tuple[Measurement, Measurement, dict[str, Budget]]:
    """What a run's result.json says of latency: of the dense network and of the pruned one, and its budgets."""
    try:
        values = untrusted.json_of(folder / "result.json")
        cost = values["costs"]["latency_ms"]
        then = Measurement.from_json(cost["measured"])
        asked = {str(b["asked"]): b for b in values["budgets"] if b["cost"] == "latency_ms"}
        budgets = {text: Budget("latency_ms", b["limit"], "ms") for text, b in asked.items()}
        for value in (cost["dense"], then.value, *(budget.limit for budget in budgets.values())):
            if not is_number(value) or value <= 0:
                raise ValueError(f"a latency must be above 0, got {value!r}")
    except untrusted.DAMAGED as error:
        raise InputError(f"{folder} holds no run that measured a latency ({type(error).__name__}: {error})") from error
    return Measurement.exact(cost["dense"], "ms", "measured"), then, budgets


def device_of(value: str | Mapping[str, Any] | Device) -> Device:
    """The device of a name in conf/device/, or of a mapping with `_target_`."""
    return components.built(Device, "device", value)
