"""What a search counts, measures and predicts: meters, the dense network's costs, and a cost model for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoprune.borrowing import check_writable
from autoprune.core import Budget, CostModel, InputError, Measurement, Meter, Progress, Task, Term
from autoprune.meters import profile
from autoprune.meters.counts import COUNTED, weight_bytes
from autoprune.meters.device import Device, packed, warm
from autoprune.meters.fitted import stair_levels
from autoprune.meters.latency import Latency, Reference
from autoprune.meters.profile import CostTable, Profile
from autoprune.meters.table import CountedCost
from autoprune.traced import TracedModel

COUNTING: dict[str, Meter] = {name: meter() for name, meter in COUNTED.items()}
MEASURED = ("latency_ms",)
LARGEST_MARGIN = 0.15


@dataclass(frozen=True, kw_only=True)
class Costs:
    """All that is known of costs before a search begins.

    traced: the model with the levels that the costs make worth having. dense, meters, models: by the cost's name.
    limits: the budgets in the costs' own units. table: the device's cost table where something is measured. margin:
    the fraction of a measured limit that the next measurement may differ by.
    """

    traced: TracedModel
    dense: Mapping[str, Measurement]
    meters: Mapping[str, Meter]
    models: Mapping[str, CostModel]
    limits: tuple[Budget, ...]
    table: CostTable | None = None
    margin: float = 0.0

    @property
    def steered(self) -> tuple[Budget, ...]:
        """The limits that a strategy aims at: below a measured one by the margin, as the final network is measured
        again and may read more."""
        return tuple(replace(b, limit=b.limit * (1 - self.margin)) if b.cost in MEASURED else b for b in self.limits)

    @property
    def already_met(self) -> bool:
        """Whether the dense network keeps every budget."""
        return all(limit.met(self.dense[limit.cost]) for limit in self.limits)


def counted(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Measurement]:
    """Every counted cost of a model on its example inputs."""
    return {name: meter.measure(model, inputs) for name, meter in COUNTING.items()}


def counted_models(task: Task, traced: TracedModel, dense: Mapping[str, Measurement]) -> dict[str, CostModel]:
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


def _scaled(term: Term, by: float) -> Term:
    return replace(term, scale=term.scale * by)


def check_budgets(budgets: Sequence[Budget]) -> None:
    """Raises InputError for a budget that this version cannot hold, or two that cannot be held together."""
    if not budgets:
        raise InputError("budget is empty: name at least one, such as budget=latency_20ms")
    known = (*COUNTED, *MEASURED)
    for budget in budgets:
        if budget.cost not in known:
            raise InputError(f"budget: {budget.cost} cannot be measured yet; budgets may limit {', '.join(known)}")
    units = {b.unit for b in budgets if b.cost in MEASURED}
    if len(units) > 1:
        raise InputError(
            "budget: latency is limited both in ms and relative to dense, which are verdicts of two kinds; give one"
        )


def priced(
    task: Task,
    traced: TracedModel,
    budgets: Sequence[Budget],
    *,
    device: Device,
    plan: Profile,
    tables: Path | None,
    levels: int,
    round_to: int,
    seed: int,
    readings: Path | None,
    progress: Progress,
) -> Costs:
    """Count the dense network; where a budget is measured, find or build the device's cost table as well."""
    dense = counted(task.model, task.inputs)
    meters: dict[str, Meter] = dict(COUNTING)
    if not any(b.cost in MEASURED for b in budgets):
        limits = tuple(b.resolve(dense) for b in budgets)
        return Costs(
            traced=traced, dense=dense, meters=meters, models=counted_models(task, traced, dense), limits=limits
        )
    meter = Latency(device, seed=seed, readings=readings)
    table = table_for(task, traced, meter, plan=plan, folder=tables, seed=seed, progress=progress)
    dense["latency_ms"] = table.dense
    limits = tuple(b.resolve(dense) for b in budgets)
    stairs = stair_levels(table.cost(traced.space), traced.space, levels, round_to)
    if any(b.cost in COUNTED for b in budgets):  # widths between the steps matter to what is counted
        stairs = {g.name: _merged(stairs.get(g.name, ()), g.levels, levels) for g in traced.space.groups}
    traced = replace(traced, space=traced.space.with_levels(stairs))
    relative = any(b.cost in MEASURED and b.unit == "dense" for b in budgets)
    meters["latency_ms"] = meter.against(Reference(task.model, table.dense)) if relative else meter
    models: dict[str, CostModel] = counted_models(task, traced, dense)
    models["latency_ms"] = table.cost(traced.space)
    spread = 0.0 if relative else table.dense.high / table.dense.value - 1  # a ratio is spared the machine's spells
    margin = min(max(device.precision, spread), LARGEST_MARGIN)
    return Costs(traced=traced, dense=dense, meters=meters, models=models, limits=limits, table=table, margin=margin)


def table_for(
    task: Task,
    traced: TracedModel,
    meter: Latency,
    *,
    plan: Profile,
    folder: Path | None,
    seed: int,
    progress: Progress,
    refresh: bool = False,
) -> CostTable:
    """The cost table of this task's model on a device: the one in the folder, or a new one that is kept there."""
    if folder is not None:
        check_writable(folder, "profile.folder")
    with warm(meter.device) as worker:
        facts = profile.key(meter.device, task.model, task.inputs, traced.space, worker.facts)
    known = None if folder is None or refresh else profile.load(folder, facts)
    if known is not None:
        progress.say(f"{_accuracy(known, traced, meter.device)} (kept in {folder})")
        return known
    progress.stage(f"measuring networks on {meter.device.name}", plan.networks + plan.held_out)
    table = profile.build(
        task.model,
        task.inputs,
        traced.space,
        cut=lambda kept: traced.cut(task.model, [np.arange(n) for n in kept]),
        weights=traced.weight_widths(task.model),
        facts=facts,
        meter=meter,
        plan=plan,
        seed=seed,
        on_step=progress.step,
    )
    if folder is not None and table.dense.decided:  # one made under load would mislead every search after it
        profile.save(folder, table)
    progress.say(_accuracy(table, traced, meter.device))
    return table


def _accuracy(table: CostTable, traced: TracedModel, device: Device) -> str:
    errors = table.errors(traced.space)
    return (
        f"cost table of {device.name}: error on {len(errors)} networks it was not fitted to: median "
        f"{100 * np.median(errors):.1f} %, 90th percentile {100 * np.quantile(errors, 0.9):.1f} %"
    )


def layer_times(device: Device, models: Sequence[nn.Module], inputs: tuple[Tensor, ...]) -> list[dict[str, float]]:
    """Milliseconds of every layer of each model, medians of 20 passes in one warm process."""
    with warm(device) as worker:
        answers = [worker.ask({"do": "time", "layers_of": packed(m, inputs), "layer_passes": 20}) for m in models]
    return [{name: row["ms"] for name, row in answer["layers"].items()} for answer in answers]


def _merged(stairs: Sequence[float], even: Sequence[float], most: int) -> tuple[float, ...]:
    """Steps of the device first, then evenly spread levels as long as there is room, and always the deepest."""
    wanted = [*stairs, *(even[i] for i in np.linspace(0, len(even) - 1, min(most, len(even))).round().astype(int))]
    kept = list(dict.fromkeys([0.0, even[-1], *wanted]))[: max(most, len(stairs))]
    return tuple(sorted(kept))


def digestible(costs: Costs) -> dict[str, Any]:
    """What a study's fingerprint holds of the costs: counted values, and the device's table by its hash."""
    values = {name: m.value for name, m in costs.dense.items() if name in COUNTED}
    return values | ({"cost table": costs.table.digest, "margin": costs.margin} if costs.table is not None else {})
