"""What a search counts, measures and predicts: meters, the dense network's costs, and a cost model for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoprune.borrowing import check_writable
from autoprune.core import COST_UNITS, Budget, CostModel, InputError, Measurement, Meter, Progress, Task, Term
from autoprune.meters import kept, profile
from autoprune.meters.counts import COUNTED
from autoprune.meters.device import Device, warm
from autoprune.meters.energy import MJ_PER_PJ, Constants, MeasuredEnergy, ModelledEnergy, counter_of
from autoprune.meters.fitted import stair_levels
from autoprune.meters.latency import Latency, Reference
from autoprune.meters.profile import CostTable, Profile
from autoprune.meters.resident import Resident
from autoprune.meters.table import AddedCost, CountedCost
from autoprune.meters.wire import packed
from autoprune.traced import TracedModel

COUNTING: dict[str, Meter] = {name: meter() for name, meter in COUNTED.items()}
PACED = ("latency_ms", "energy_mj")  # measured beside the dense network where they are limited relative to it
LARGEST_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class Costs:
    """All that is known of costs before a search begins.

    traced: the model with the levels that the costs make worth having. dense, meters, models: by the cost's name.
    limits: the budgets in the costs' own units. table: the device's cost table where latency is measured. margins: of
    each cost that is measured, the fraction of its limit that the next measurement may differ by. aimed: models that
    strategies begin with; of a latency in ms they predict the upper end of the interval, which the dense network's
    tells beforehand.
    """

    traced: TracedModel
    dense: Mapping[str, Measurement]
    meters: Mapping[str, Meter]
    models: Mapping[str, CostModel]
    limits: tuple[Budget, ...]
    aimed: Mapping[str, CostModel]
    table: CostTable | None = None
    margins: Mapping[str, float] = field(default_factory=dict)

    @property
    def steered(self) -> tuple[Budget, ...]:
        """The limits that a strategy aims at: below a measured one by the margin, as the final network is measured
        again and may read more."""
        return tuple(replace(b, limit=b.limit * (1 - self.margins.get(b.cost, 0.0))) for b in self.limits)

    @property
    def limited(self) -> Mapping[str, CostModel]:
        """The models of the limited costs, as strategies begin with them."""
        return {limit.cost: self.aimed[limit.cost] for limit in self.limits}

    @property
    def device(self) -> str:
        """What costs are measured on; "" where all are counted or modelled."""
        return next((m.device for m in self.dense.values() if m.kind == "measured"), "")

    @property
    def already_met(self) -> bool:
        """Whether the dense network keeps every budget."""
        return all(limit.met(self.dense[limit.cost]) for limit in self.limits)


def counted(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Measurement]:
    """Every counted cost of a model on its example inputs."""
    return {name: meter.measure(model, inputs) for name, meter in COUNTING.items()}


def counted_models(task: Task, traced: TracedModel, dense: Mapping[str, Measurement]) -> dict[str, CostModel]:
    """A model for each counted cost, exact at the dense network."""
    forms = {"macs": (traced.macs,), "params": (traced.params,), "memory_mb": memory_forms(task, traced)}
    return {
        name: CountedCost(name, dense[name].unit, traced.space, terms).anchored(dense[name].value)
        for name, terms in forms.items()
    }


def memory_forms(task: Task, traced: TracedModel) -> tuple[tuple[Term, ...], ...]:
    """MB of weights and activations, one form for each instant that can be the peak."""
    weights = tuple(_scaled(term, 1e-6) for term in traced.weights)
    alive = (tuple(_scaled(t, len(task.inputs[0]) / 1e6) for t in instant) for instant in traced.activations)
    return tuple(weights + instant for instant in alive) or (weights,)


def modelled_energy(task: Task, traced: TracedModel, constants: Constants) -> CountedCost:
    """What ModelledEnergy says of a network, by the units kept; without what does not depend on them."""
    examples = len(task.inputs[0])
    per_mac, per_byte = constants.pj_per_mac * MJ_PER_PJ, constants.pj_per_byte * MJ_PER_PJ
    terms = [_scaled(term, per_mac * examples) for term in traced.macs]
    terms += [_scaled(term, per_byte) for term in traced.weights]
    terms += [_scaled(term, 2 * per_byte * examples) for term in traced.traffic]
    return CountedCost("energy_mj", "mJ", traced.space, (tuple(terms),))


def _scaled(term: Term, by: float) -> Term:
    return replace(term, scale=term.scale * by)


def check_budgets(budgets: Sequence[Budget]) -> None:
    """Raises InputError for a budget that this version cannot hold, or two that cannot be held together."""
    if not budgets:
        raise InputError("budget is empty: name at least one, such as budget=latency_20ms")
    for cost in PACED:
        units = {b.unit for b in budgets if b.cost == cost}
        if len(units) > 1:
            raise InputError(
                f"budget: {cost.partition('_')[0]} is limited both in {COST_UNITS[cost]} and relative to dense, which "
                "are verdicts of two kinds; give one"
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
    constants: Constants,
    progress: Progress,
) -> Costs:
    """Count the dense network; where a budget needs it, measure it and find or build the device's cost table."""
    limited = {b.cost for b in budgets}
    if not traced.narrows and (beyond := limited - {"macs", "params"}):
        raise InputError(
            f"budget: {sorted(beyond)[0]} is not lowered by masks, which leave every tensor as large as it was; with "
            f"space={traced.grain[0]} limit params, flops or macs"
        )
    relative = {b.cost for b in budgets if b.unit == "dense"}
    dense = counted(task.model, task.inputs)
    meters: dict[str, Meter] = dict(COUNTING)
    table: CostTable | None = None
    if "latency_ms" in limited:
        meter = Latency(device, seed=seed, readings=readings)
        table = table_for(task, traced, meter, plan=plan, folder=tables, seed=seed, progress=progress)
        dense["latency_ms"] = table.dense
        reference = Reference(task.model, table.dense, "latency_ms" in relative)
        resolved = [b.resolve(dense).limit for b in budgets if b.cost == "latency_ms"]
        meters["latency_ms"] = meter.beside(reference, limit=min(resolved))
        traced = _on_stairs(traced, table, levels, round_to, even=len(limited) > 1)
    models: dict[str, CostModel] = counted_models(task, traced, dense)
    aimed: dict[str, CostModel] = {}
    if table is not None:
        models["latency_ms"] = cost = table.cost(traced.space)
        if "latency_ms" not in relative:
            aimed["latency_ms"] = cost.anchored(table.dense.high)
    once = _Once(task, traced, device, tables, seed, progress)
    if "rss_mb" in limited:
        dense["rss_mb"], meters["rss_mb"], models["rss_mb"] = _resident(once)
    if "energy_mj" in limited:
        found = _energy(once, constants, relative="energy_mj" in relative)
        dense["energy_mj"], meters["energy_mj"], models["energy_mj"] = found
    return Costs(
        traced=traced,
        dense=dense,
        meters=meters,
        models=models,
        aimed=models | aimed,
        limits=tuple(b.resolve(dense) for b in budgets),
        table=table,
        margins={c: _margin(c, dense[c], device, c in relative) for c in limited if dense[c].kind == "measured"},
    )


@dataclass(frozen=True)
class _Once:
    """What it takes to measure the dense network once, or to find what the folder keeps of it."""

    task: Task
    traced: TracedModel
    device: Device
    folder: Path | None
    seed: int
    progress: Progress

    def measured(self, meter: Meter, **by: str) -> Measurement:
        """by: what else the value depends on."""
        if self.folder is not None:
            check_writable(self.folder, "profile.folder")
        task, device = self.task, self.device
        with warm(device) as worker:
            facts = profile.key(device, task.model, task.inputs, self.traced.space, {**worker.facts, **by})
        self.progress.stage(f"measuring the dense network's {meter.name} on {device.name}", None)
        return kept.measured(meter, task.model, task.inputs, device=device, facts=facts, folder=self.folder)


def _resident(once: _Once) -> tuple[Measurement, Meter, CostModel]:
    """Resident memory: what is counted of it, and what the runtime takes beside."""
    meter = Resident(once.device, seed=once.seed)
    dense = once.measured(meter)
    beside = AddedCost(meter.name, meter.unit, once.traced.space, memory_forms(once.task, once.traced))
    return dense, meter, beside.anchored(dense.value)


def _energy(once: _Once, constants: Constants, *, relative: bool) -> tuple[Measurement, Meter, CostModel]:
    """Energy: measured where the device has a counter, and steered by the model; else the model alone."""
    task, device = once.task, once.device
    modelled, counter = ModelledEnergy(constants), counter_of(device)
    exact = modelled_energy(task, once.traced, constants)
    exact = exact.anchored(modelled.measure(task.model, task.inputs).value)
    if not counter.name:
        once.progress.say(f"energy is modelled, not measured: {counter.why}")
        modelled = ModelledEnergy(constants, why=counter.why)
        return modelled.measure(task.model, task.inputs), modelled, exact
    meter = MeasuredEnergy(device, seed=once.seed)
    dense = once.measured(meter, counter=counter.name)
    return dense, meter.beside(Reference(task.model, dense, relative)), exact.scaled(dense.value)


def _margin(cost: str, dense: Measurement, device: Device, relative: bool) -> float:
    covered = cost == "latency_ms" or (relative and cost in PACED)  # by its interval, or a ratio spared the pace
    spread = 0.0 if covered else dense.high / dense.value - 1
    return min(max(device.precision if cost in PACED else 0.0, spread), LARGEST_MARGIN)


def _on_stairs(traced: TracedModel, table: CostTable, levels: int, round_to: int, *, even: bool) -> TracedModel:
    """The traced model with levels on the device's steps, and evenly spread ones too where other costs are limited."""
    stairs = stair_levels(table.cost(traced.space), traced.space, levels, round_to)
    if even:
        cut = (g for g in traced.space.groups if g.kind != "block")
        stairs = {g.name: _merged(stairs.get(g.name, ()), g.levels, levels) for g in cut}
    return replace(traced, space=traced.space.with_levels(stairs))


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
    known = None if folder is None or refresh else profile.load(folder, facts, len(traced.space.groups))
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
        blobs = [packed(m, inputs, device.runtime) for m in models]
        return [worker.ask({"do": "time", "layers_of": b, "layer_passes": 20})["layers"] for b in blobs]


def _merged(stairs: Sequence[float], even: Sequence[float], most: int) -> tuple[float, ...]:
    """Steps of the device first, then evenly spread levels as long as there is room, and always the deepest."""
    wanted = [*stairs, *(even[i] for i in np.linspace(0, len(even) - 1, min(most, len(even))).round().astype(int))]
    kept = list(dict.fromkeys([0.0, even[-1], *wanted]))[: max(most, len(stairs))]
    return tuple(sorted(kept))


def digestible(costs: Costs) -> dict[str, Any]:
    """What a study's fingerprint holds of the costs: counted values, and the device's table by its hash."""
    values = {name: m.value for name, m in costs.dense.items() if name in COUNTED}
    values |= {f"{n} {m.kind}": m.value for n, m in costs.dense.items() if n in ("rss_mb", "energy_mj")}
    table = {} if costs.table is None else {"cost table": costs.table.digest}
    return values | table | ({"margins": sorted(costs.margins.items())} if costs.margins else {})
