"""Latency as wall-clock p50 (or p90, p99) over fresh processes, with an interval that no process's precision can fake.

One process's interval is false precision: medians of fresh processes differ by percents while each claims tenths. So a
verdict pools the passes of several fresh processes; its 95 % interval is bootstrapped over processes and, within them,
passes (Davison & Hinkley 1997, section 3.8), stretched by Student's t because a percentile bootstrap of so few
processes is too narrow. Processes are added while the interval, or that of the ratio below, is wider than asked for.

Machines have a pace: neighbours on the same processor slow every program for seconds or minutes, CPU time included. In
a search every network is therefore timed beside the dense one, block by block: their ratio is free of the pace (duet
benchmarking; Bulej et al., ICPE 2020). The interval of a verdict in milliseconds covers two paces: what was read now,
and that ratio times what the dense network took when it was measured for the cost table.
Letters: K processes, N passes, R rounds of one block of each network.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri, stdtrit

from autoprune.core import Measurement
from autoprune.meters.device import Device, fresh
from autoprune.meters.wire import packed
from autoprune.writing import append

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Floats = NDArray[np.float64]

DISTURBED = 1.05  # wall over CPU time above which another process had the core
RESAMPLES = 1000
PAUSE_S = 2.0
LOG = logging.getLogger("autoprune")
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Reference:
    """The dense network and what it was measured to take. relative: whether the other network's value is their ratio
    times this measurement, or its own milliseconds."""

    model: nn.Module
    measurement: Measurement
    relative: bool


class Latency:
    """Milliseconds of one forward pass on the example inputs.

    With a reference, the network is timed beside it in the same processes, blocks interleaved in random order. A
    relative value is their ratio times the reference's measured latency. An absolute one is their ratio times the
    reference's latency then and now (geometric mean); its interval covers both.
    limit: what the value is held against: where the interval of the first processes holds it, all that a device
    allows are taken, as one that met a slow spell may be among them. readings: a file that every raw sample is appended
    to, one JSON object a process.
    """

    name, unit = "latency_ms", "ms"

    def __init__(
        self,
        device: Device,
        *,
        seed: int = 0,
        reference: Reference | None = None,
        limit: float = math.inf,
        readings: Path | None = None,
    ) -> None:
        self.device, self.seed, self.reference, self.readings = device, seed, reference, readings
        self.limit = limit

    def beside(self, reference: Reference, *, limit: float = math.inf) -> Latency:
        """The same meter with this network timed beside every other, and held against a limit."""
        return Latency(self.device, seed=self.seed, reference=reference, limit=limit, readings=self.readings)

    def glance(self) -> Latency:
        """The same meter with the fewest processes."""
        return Latency(self.device.glance(), seed=self.seed, reference=self.reference, readings=self.readings)

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        """Raises MeasuringError when the network cannot be run or its worker is lost twice."""
        models = [model] if self.reference is None else [model, self.reference.model]
        processes, undisturbed = self._processes([packed(m, inputs, self.device.runtime) for m in models])
        found, notes = self._verdict(processes, undisturbed)
        notes += _notes(processes, self.device, len(inputs[0]) if inputs[0].dim() else 1)
        if not undisturbed:
            notes = (f"disturbed: wall time over {DISTURBED:g} x CPU time, others used the processor", *notes)
        return Measurement(
            value=found[0],
            unit=self.unit,
            low=found[1],
            high=found[2],
            samples=sum(len(p["rows"][0]["wall_ms"]) for p in processes),
            device=described(self.device, processes[0]["facts"]),
            kind="measured",
            notes=notes,
            decided=undisturbed,
        )

    def ratio(self, model: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        """How many times as long `model` takes as `other`, interleaved in the same fresh processes."""
        one = Measurement.exact(1.0, "x", "measured")
        return replace(self.beside(Reference(other, one, relative=True)).measure(model, inputs), unit="x")

    def _verdict(self, processes: Sequence[Mapping[str, Any]], undisturbed: bool) -> tuple[Interval, tuple[str, ...]]:
        """The value with its interval, and what it was made of. Of a disturbed reading the truth lies between the time
        the CPU worked and the time that passed."""
        own = self._clocked(processes, 0, undisturbed)
        if self.reference is None:
            return own, ()
        ratio = self._ratio(processes, "wall_ms", "wall_ms")
        if not undisturbed:
            low, high = (self._ratio(processes, *clocks) for clocks in (("cpu_ms", "wall_ms"), ("wall_ms", "cpu_ms")))
            ratio = _covering(ratio, low, high)
        dense, now = self.reference.measurement, self._clocked(processes, 1, undisturbed)
        notes: tuple[str, ...] = (f"{ratio[0]:.4f} [{ratio[1]:.4f}, {ratio[2]:.4f}] of dense, interleaved",)
        if self.reference.relative:
            return (ratio[0] * dense.value, ratio[1] * dense.value, ratio[2] * dense.value), notes
        notes += (f"dense {now[0]:.4g} ms now, {dense.value:.4g} ms in the cost table",)
        then = _product(ratio, (dense.value, dense.low, dense.high))
        return _covering((ratio[0] * (dense.value * now[0]) ** 0.5, *then[1:]), own), notes

    def _clocked(self, processes: Sequence[Mapping[str, Any]], network: int, undisturbed: bool) -> Interval:
        """One network's milliseconds; of a disturbed reading from the time the CPU worked to the time that passed."""
        clocks = ("wall_ms",) if undisturbed else ("wall_ms", "cpu_ms")
        return _covering(
            *(interval(_passes(processes, network, clock), self.seed, self.device.quantile) for clock in clocks)
        )

    def _ratio(self, processes: Sequence[Mapping[str, Any]], over: str, under: str) -> Interval:
        """The first network's time by one clock over the second's by another: block by block, or, of another quantile
        than the median, which a block is too short for, process by process."""
        if self.device.quantile == 0.5:
            return interval(_ratios(processes, over, under), self.seed)
        own, other = _passes(processes, 0, over), _passes(processes, 1, under)
        return quantile_ratio(own, other, self.seed, self.device.quantile)

    def _processes(self, blobs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
        take = partial(self._reading, blobs)
        return quiet_readings(self.device, take, self._found, decided=self._decided)

    def _decided(self, processes: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the limit lies outside the interval."""
        (_, low, high), _ = self._verdict(processes, undisturbed=True)
        return not low <= self.limit < high

    def _found(self, processes: Sequence[Mapping[str, Any]]) -> Interval:
        """What more processes make narrower: of a network beside another the ratio, as its milliseconds are as wide as
        the machine's pace."""
        if self.reference is not None:
            return self._ratio(processes, "wall_ms", "wall_ms")
        return self._clocked(processes, 0, undisturbed=True)

    def _reading(self, blobs: Sequence[dict[str, Any]], ordinal: int) -> dict[str, Any]:
        plan = self.device.plan(1000 * self.seed + ordinal)
        message = {"do": "time", "models": list(blobs), "plan": plan}
        answer = {**fresh(self.device, message), "block": plan["block"]}
        self._keep(answer)
        return answer

    def _keep(self, answer: Mapping[str, Any]) -> None:
        if self.readings is not None:
            append(self.readings, json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **answer}) + "\n")


def quiet_readings(
    device: Device,
    take: Callable[[int], dict[str, Any]],
    found: Callable[[Sequence[Mapping[str, Any]]], Interval],
    *,
    decided: Callable[[Sequence[Mapping[str, Any]]], bool] = lambda kept: True,
) -> tuple[list[dict[str, Any]], bool]:
    """Readings of fresh processes, disturbed ones taken again as long as repeats last; more while the interval is wide,
    and all there may be where the first do not decide. That is asked once: to stop at the first interval that happens
    to be on the right side would be to choose it.

    take: the ordinal of a process -> its reading, with `rows` of what its clocks read. found: what readings amount to.
    Returns the readings, and whether all of them were undisturbed.
    """

    def wide() -> bool:
        value, low, high = found(kept)
        return high - low > 2 * device.precision * value

    kept: list[dict[str, Any]] = []
    repeats, undisturbed, wanted = device.repeats, True, device.processes
    while len(kept) < wanted or (len(kept) < device.most_processes and wide()):
        reading = take(len(kept))
        quiet = not any(disturbed(row, device) for row in reading["rows"])
        if not quiet and repeats > 0:
            repeats -= 1
            LOG.info("a reading was disturbed by others (wall above CPU time) and is taken again")
            time.sleep(PAUSE_S)
            continue
        undisturbed = undisturbed and quiet
        kept.append(reading)
        if len(kept) == device.processes and not decided(kept):
            wanted = device.most_processes
    return kept, undisturbed


def disturbed(row: Mapping[str, Any], device: Device) -> bool:
    """Whether the passes took clearly longer than the CPU worked on them; not told with several threads or a GPU."""
    if device.threads != 1 or not device.on_cpu:
        return False
    return bool(np.median(row["wall_ms"]) > DISTURBED * np.median(row["cpu_ms"]))


def _passes(processes: Sequence[Mapping[str, Any]], network: int, clock: str) -> list[Floats]:
    """What a clock read of one network in each process: its passes [N]."""
    return _alike([np.array(p["rows"][network][clock]) for p in processes])


def _ratios(processes: Sequence[Mapping[str, Any]], over: str, under: str) -> list[Floats]:
    """The first network's time by one clock over the second's by another, in each process, block by block [R]."""
    found = []
    for process in processes:
        own, other = (
            np.median(np.reshape(row[clock], (-1, process["block"])), axis=1)
            for row, clock in zip(process["rows"], (over, under), strict=True)
        )
        found.append(own / other)
    return _alike(found)


def _alike(samples: Sequence[Floats]) -> list[Floats]:
    """As many samples of each process, evenly spread: one that did not settle made more, and is not to count for
    more."""
    n = min(len(each) for each in samples)
    return [each[np.linspace(0, len(each) - 1, n).round().astype(int)] for each in samples]


def described(device: Device, facts: Mapping[str, Any]) -> str:
    """The device in one line."""
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    return f"{device.name}: {facts['processor']}, {facts['runtime']}, {threads}"


def interval(samples: Sequence[Floats], seed: int, quantile: float = 0.5) -> Interval:
    """A quantile of K processes' pooled samples [N], and its 95 % interval."""
    rng = np.random.default_rng(seed)
    k = len(samples)
    found = _resampled(samples, rng.integers(0, k, (RESAMPLES, k)), rng, quantile)
    return _stretched(float(np.quantile(np.concatenate(samples), quantile)), found, k)


def quantile_ratio(samples: Sequence[Floats], others: Sequence[Floats], seed: int, quantile: float) -> Interval:
    """A quantile of K processes' pooled samples over that of the same processes' other samples; 95 % interval."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(samples), (RESAMPLES, len(samples)))
    found = _resampled(samples, chosen, rng, quantile) / _resampled(others, chosen, rng, quantile)
    own, other = (float(np.quantile(np.concatenate(each), quantile)) for each in (samples, others))
    return _stretched(own / other, found, len(samples))


def _stretched(value: float, resampled: Floats, k: int) -> Interval:
    """The value with the bootstrap's 95 % interval, as wide as Student's t asks for K processes; on a log scale, as
    times are positive."""
    stretch = float(stdtrit(k - 1, 0.975) / ndtri(0.975) * np.sqrt(k / (k - 1)))
    low, high = (float(q) for q in np.quantile(resampled / value, [0.025, 0.975]))
    return value, value * min(low, 1.0) ** stretch, value * max(high, 1.0) ** stretch


def _product(one: Interval, other: Interval) -> Interval:
    """Two independent values multiplied: relative half widths add as squares, on a log scale."""
    value = one[0] * other[0]
    low, high = (math.hypot(*(math.log(each[side] / each[0]) for each in (one, other))) for side in (1, 2))
    return value, value * math.exp(-low), value * math.exp(high)


def _covering(found: Interval, *others: Interval) -> Interval:
    """The value with an interval that covers the others' too."""
    every = (found, *others)
    return found[0], min(low for _, low, _ in every), max(high for _, _, high in every)


def _resampled(
    samples: Sequence[Floats], chosen: NDArray[np.int64], rng: np.random.Generator, quantile: float
) -> Floats:
    """Pooled quantiles [RESAMPLES] of the processes chosen [RESAMPLES, K], the samples [N] of each drawn anew."""
    stacked = np.stack(samples)
    drawn = stacked[chosen[..., None], rng.integers(0, stacked.shape[1], (*chosen.shape, stacked.shape[1]))]
    return np.asarray(np.quantile(drawn.reshape(len(chosen), -1), quantile, axis=1))


def _notes(processes: Sequence[Mapping[str, Any]], device: Device, examples: int) -> tuple[str, ...]:
    rows = [p["rows"][0] for p in processes]
    wall, cpu = (np.concatenate([row[key] for row in rows]) for key in ("wall_ms", "cpu_ms"))
    p50, p90, p99 = np.quantile(wall, [0.5, 0.9, 0.99])
    medians = [float(np.median(row["wall_ms"])) for row in rows]
    notes = [
        f"p50 {p50:.4g}, p90 {p90:.4g}, p99 {p99:.4g}, least {wall.min():.4g} ms",
        f"CPU time p50 {np.median(cpu):.4g} ms",
        f"{len(rows)} fresh processes, medians {min(medians):.4g} to {max(medians):.4g} ms",
        f"{100 * float((wall > 1.5 * p50).mean()):.1f} % of passes above 1.5 x p50",
        f"{1000 * examples / p50:.4g} examples/s",
        f"first call {float(np.median([row['first_ms'] for row in rows])):.4g} ms",
        f"{processes[0]['precision'][0]}",
    ]
    if not all(row["stable"] and row["narrow"] for row in rows):
        notes.append(f"unstable: a process did not settle within {device.seconds:g} s")
    return tuple(notes)
