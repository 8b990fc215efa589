"""The cost table of a device: whole networks of many widths measured once, and the cost model fitted to them.

Networks are measured in one warm process, each pass beside one of the same reference network: the machine's slow and
fast spells cancel in the ratio of the two. The dense network is measured like a verdict, in fresh processes; it anchors
the table. Most widths are drawn at multiples of 4, 8 or 16, where stairs have their edges. Networks that were not
fitted tell how wrong the table is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from autoprune import __version__, untrusted
from autoprune.borrowing import arguments, evaluating, seeded
from autoprune.core import InputError, Measurement, Meter, PruningSpace, Width, is_number, width_of
from autoprune.meters.device import Device, MeasuringError, WarmWorker, WorkerLostError, settings, warm
from autoprune.meters.fitted import By, FittedCost, Sample, Shape, better, fit
from autoprune.meters.latency import Latency
from autoprune.meters.wire import packed
from autoprune.writing import whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autoprune.core import Floats

SCHEMA = 3
PASSES = 10
WHOLE = 3  # of so many networks one is all of multiples
LOG = logging.getLogger("autoprune")
Cut = Callable[[Sequence[int]], "nn.Module"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How many networks make a table: `networks` are fitted, `held_out` tell its error."""

    networks: int = 30
    held_out: int = 20

    def __post_init__(self) -> None:
        if self.networks < 8 or self.held_out < 1:
            raise InputError(
                f"profile: networks must be >= 8 and held_out >= 1, got {self.networks} and {self.held_out}"
            )


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """What was measured on a device, and for what: enough to fit the same cost model again, anywhere.

    dense: the dense network's verdict. samples: fitted ones first, the last `held_out` only tell the error. shapes: of
    the layers, by name. by: what the cost is fitted to. facts: the device and the versions.
    """

    dense: Measurement
    samples: tuple[Sample, ...]
    held_out: int
    shapes: Mapping[str, Shape]
    by: By
    facts: Mapping[str, Any]
    _fits: list[FittedCost] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def digest(self) -> str:
        """A hash of everything in it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def cost(self, space: PruningSpace) -> FittedCost:
        """The cost model, anchored at the dense network's verdict."""
        return self._fitted(space).anchored(self.dense.value)

    def held_out_pairs(self, space: PruningSpace) -> list[tuple[float, float]]:
        """(predicted, measured) in ms of the networks that were not fitted."""
        fitted = self._fitted(space)
        return [(fitted.at_widths(s.kept), s.total) for s in self.samples[-self.held_out :]]

    def errors(self, space: PruningSpace) -> Floats:
        """|predicted / measured - 1| of the networks that were not fitted."""
        return np.array([abs(p / m - 1) for p, m in self.held_out_pairs(space)])

    def _fitted(self, space: PruningSpace) -> FittedCost:
        if not self._fits:  # once, as it takes a while, and spaces differ in their levels alone
            fitted = self.samples[: len(self.samples) - self.held_out]
            self._fits.append(fit(fitted, self.shapes, space, name="latency_ms", unit="ms", by=self.by))
        return dataclasses.replace(self._fits[0], space=space)

    def to_json(self) -> dict[str, Any]:
        shapes = {
            name: {**vars(shape), "sides": [[fixed, list(map(list, of.items()))] for fixed, of in shape.sides]}
            for name, shape in self.shapes.items()
        }
        return {
            "schema": SCHEMA,
            "facts": dict(self.facts),
            "dense": asdict(self.dense),
            "held_out": self.held_out,
            "by": self.by,
            "shapes": shapes,
            "samples": [asdict(s) for s in self.samples],
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> CostTable:
        """Raises KeyError, TypeError or ValueError where the values are no cost table."""
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']}, this version reads {SCHEMA}")

        def width(side: Sequence[Any]) -> Width:
            return float(side[0]), {int(g): float(each) for g, each in side[1]}

        table = CostTable(
            dense=Measurement.from_json(values["dense"]),
            samples=tuple(Sample(tuple(s["kept"]), s["total"], s["layers"]) for s in values["samples"]),
            held_out=int(values["held_out"]),
            shapes={
                name: Shape(**{**shape, "sides": (width(shape["sides"][0]), width(shape["sides"][1]))})
                for name, shape in values["shapes"].items()
            },
            by=values["by"],
            facts=dict(values["facts"]),
        )
        table._check()
        return table

    def _check(self) -> None:
        """Raises ValueError where the parts do not go together."""
        groups = {len(s.kept) for s in self.samples}
        known = range(min(groups, default=0))
        times = [time for s in self.samples for time in (s.total, *s.layers.values())]
        sides = [side for shape in self.shapes.values() for side in shape.sides]
        rules = {
            f"held_out < {len(self.samples)} samples": 1 <= self.held_out < len(self.samples),
            "as many widths in every sample": len(groups) == 1,
            "widths of whole numbers": all(type(n) is int and n >= 0 for s in self.samples for n in s.kept),
            "finite times": all(is_number(time) and time >= 0 for time in times),
            "times of networks above 0": all(s.total > 0 for s in self.samples),
            "a dense time above 0": self.dense.value > 0,
            f"by one of {', '.join(get_args(By))}": self.by in get_args(By),
            "shapes for all layers": all(set(s.layers) <= set(self.shapes) for s in self.samples),
            "finite work": all(is_number(shape.work) for shape in self.shapes.values()),
            "finite widths of layers": all(math.isfinite(n) for fixed, of in sides for n in (fixed, *of.values())),
            "sides of groups that are there": all(g in known for _, of in sides for g in of),
            "gates that are there": all(shape.gate in (None, *known) for shape in self.shapes.values()),
        }
        for rule, kept in rules.items():
            if not kept:
                raise ValueError(f"it must have {rule}")


def key(
    device: Device,
    model: nn.Module,
    inputs: Sequence[Tensor],
    space: PruningSpace,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What a table is for: device, runtime, threads, versions, model, the form of its inputs, the widths covered."""
    forms = [[list(x.shape), list(x.stride()), str(x.dtype)] for x in inputs]
    groups = [[g.name, g.size, g.kept(g.levels[-1])] for g in space.groups]
    weights = [[name, list(p.shape), list(p.stride()), str(p.dtype)] for name, p in model.named_parameters()]
    content = json.dumps([repr(model), weights, forms, groups])
    return {
        "schema": SCHEMA,
        "autoprune": __version__,
        **settings(device),
        **facts,
        **({} if device.runtime == "torch" else {name: version(name) for name in ("torch", "onnx", "onnxscript")}),
        "model, inputs and groups": hashlib.sha256(content.encode()).hexdigest()[:16],
    }


def path_of(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Where the table for these facts is kept."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{digest}.json"


def load(folder: Path, facts: Mapping[str, Any], groups: int | None = None) -> CostTable | None:
    """The table for these facts, of so many groups; None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = path_of(folder, facts)
    if not path.exists():
        return None
    try:
        table = CostTable.from_json(untrusted.json_of(path))
        if table.facts != json.loads(json.dumps(facts)):
            raise ValueError("its facts are of another device, model or version")
        if groups not in (None, len(table.samples[0].kept)):
            raise ValueError(f"it is of {len(table.samples[0].kept)} groups, the model has {groups}")
    except untrusted.DAMAGED as error:
        raise InputError(
            f"the cost table {path} is damaged ({type(error).__name__}: {error}): delete it, or measure it again with "
            "python -m autoprune profile"
        ) from error
    return table


def save(folder: Path, table: CostTable) -> Path:
    """Write a table, whole or not at all."""
    path = path_of(folder, table.facts)
    with whole(path) as temporary:
        temporary.write_text(json.dumps(table.to_json()))
    return path


def build(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    space: PruningSpace,
    *,
    cut: Cut,
    weights: Mapping[str, tuple[Width, Width]],
    facts: Mapping[str, Any],
    meter: Latency,
    plan: Profile = Profile(),
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> CostTable:
    """Measure a device.

    cut: units kept of each group -> the smaller network. weights: parameter -> widths of its first two dimensions.
    facts: what the table is for, see key().

    Raises:
        MeasuringError: more than half of the networks could not be measured.
    """
    dense = dense_of(meter, meter.device, model, inputs)
    runtime, sizes = meter.device.runtime, [g.size for g in space.groups]
    kept = [sizes, *_drawn(space, plan.networks - 1, seed), *_drawn(space, plan.held_out, seed + 1)]
    samples: list[Sample | None] = []
    shapes = _shapes(model, inputs, weights, space)
    with warm(meter.device) as worker:
        reference = packed(cut([max(1, n // 3) for n in sizes]), inputs, runtime)
        spells: list[float] = []
        for i, widths in enumerate(kept):
            try:
                answer = _measured(worker, [packed(cut(widths), inputs, runtime), reference], meter.device, seed + i)
            except MeasuringError as error:
                LOG.warning("a network of the cost table could not be measured and is left out: %s", error)
                samples.append(None)
                continue
            own, other = (np.array(row["wall_ms"]) for row in answer["rows"])
            spell, layers = float(np.median(other)), answer["layers"]
            spells.append(spell)
            each = {name: ms / spell for name, ms in layers.items() if name in shapes}
            samples.append(Sample(tuple(widths), float(np.median(own / other)), each))
            on_step()
    fitted, tested = ([s for s in part if s] for part in (samples[: plan.networks], samples[plan.networks :]))
    if samples[0] is None or len(fitted) < plan.networks / 2 or not tested:
        raise MeasuringError("too few networks could be measured for a cost table; the log says why")
    typical = float(np.median(spells))
    return CostTable(
        dense=dense,
        samples=tuple(_scaled(sample, typical) for sample in (*fitted, *tested)),
        held_out=len(tested),
        shapes=shapes,
        by=better(fitted, shapes, space),
        facts=facts,
    )


def dense_of(meter: Meter, device: Device, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
    """What the user's own network costs.

    Raises:
        InputError: the device cannot run it.
        WorkerLostError: its worker was lost twice.
    """
    try:
        return meter.measure(model, inputs)
    except WorkerLostError:
        raise
    except MeasuringError as error:
        raise InputError(
            f"device={device.name} cannot run this model ({error}): choose another device, or versions of its runtime "
            "and of onnx that go together"
        ) from error


def _measured(worker: WarmWorker, blobs: Sequence[dict[str, Any]], device: Device, seed: int) -> dict[str, Any]:
    plan = {**device.plan(seed), "samples": PASSES, "width": math.inf, "block": 1, "settle": False}
    return worker.ask({"do": "time", "models": list(blobs), "plan": plan, "layers_of": blobs[0], "layer_passes": 4})


def _shapes(
    model: nn.Module, inputs: Sequence[Tensor], weights: Mapping[str, tuple[Width, Width]], space: PruningSpace
) -> dict[str, Shape]:
    """Of the layers that have weights and run; one that runs several times does the work of all."""
    import torch
    from torch.utils._pytree import tree_leaves

    found: dict[str, Shape] = {}
    sizes = [g.size for g in space.groups]
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())

    def seen(name: str, weight: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, named: Any, output: Any) -> None:
            given = next((x for x in tree_leaves((args, named)) if isinstance(x, torch.Tensor)), torch.empty(0))
            made = max((x.numel() for x in tree_leaves(output) if isinstance(x, torch.Tensor)), default=0)
            first, second = weights[weight]
            if transposed := bool(getattr(module, "transposed", False)):  # weights are [input, output, ...]
                made, first, second = given.numel(), second, first
            places = made / max(1.0, width_of(second if transposed else first, sizes))
            shape = Shape(
                operator=type(module).__name__ + " in groups" * (getattr(module, "groups", 1) != 1),
                kind=f"{module} on {list(given.shape)}",
                sides=(first, second),
                work=places * math.prod(parameters[weight].shape[2:]),
                gate=space.block_of(name),
            )
            earlier = found.setdefault(name, dataclasses.replace(shape, work=0.0))
            found[name] = dataclasses.replace(earlier, work=earlier.work + shape.work)

        return hook

    hooks = [
        modules[name].register_forward_hook(seen(name, weight), with_kwargs=True)
        for name, weight in _largest(weights, sizes).items()
        if name in modules
    ]
    try:
        with torch.inference_mode(), evaluating(model), seeded(0):
            model(*arguments(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _scaled(sample: Sample, by: float) -> Sample:
    layers = {name: ms * by for name, ms in sample.layers.items()}
    return dataclasses.replace(sample, total=sample.total * by, layers=layers)


def _largest(weights: Mapping[str, tuple[Width, Width]], sizes: Sequence[int]) -> dict[str, str]:
    """Layer -> its largest parameter, whose widths its cost depends on. A layer whose parameters are all another's
    (tied weights) has none: what it takes goes to the base."""

    def full(weight: str) -> float:
        return math.prod(width_of(side, sizes) for side in weights[weight])

    found: dict[str, str] = {}
    for weight in weights:
        layer = weight.rpartition(".")[0]
        if layer not in found or full(weight) > full(found[layer]):
            found[layer] = weight
    return found


def _drawn(space: PruningSpace, count: int, seed: int) -> list[list[int]]:
    """Units kept of each group for `count` networks: depths evenly spread from shallow to deep, each group drawn around
    its network's depth, three quarters of the widths at multiples of 4, 8 or 16; every third network's all of one of
    them (or of half a group's size), as answers are where kernels work on blocks."""
    rng = np.random.default_rng(seed)
    depths = (rng.permutation(count) + rng.random(count)) / count
    networks = []
    for number, depth in enumerate(depths):
        kept, common = [], int(rng.choice([4, 8, 16])) if number % WHOLE == 0 else None
        for group in space.groups:
            floor = group.kept(group.levels[-1])
            width = round(group.size - (group.size - floor) * min(1.0, rng.uniform(0, 2 * depth)))
            block = min(common, max(1, group.size // 2)) if common else int(rng.choice([1, 4, 8, 16]))
            if group.size > block:
                least = math.ceil(floor / block) * block if common else floor
                width = min(group.size, max(least, math.floor(width / block + 0.5) * block))
            kept.append(width)
        networks.append(kept)
    return networks
