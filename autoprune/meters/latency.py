"""Latency as wall-clock p50 over fresh processes, with an interval that one process's own precision cannot fake.

One process's interval is false precision: medians of fresh processes differ by percents while each claims tenths. So a
verdict pools the passes of several fresh processes; its 95 % interval is bootstrapped over processes and, within them,
passes (Davison & Hinkley 1997, section 3.8), stretched by Student's t because a percentile bootstrap of so few
processes is too narrow. Processes are added while the interval is wider than asked for. Letters: K processes, N passes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from autoprune.core import Measurement
from autoprune.meters.device import Device, Worker, WorkerLostError, packed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Floats = NDArray[np.float64]

DISTURBED = 1.05  # wall over CPU time above which another process had the core
RESAMPLES = 1000
PAUSE_S = 2.0
LOG = logging.getLogger("autoprune")


@dataclass(frozen=True)
class Reference:
    """What a relative budget is relative to: the dense network and what it was measured to take."""

    model: nn.Module
    measurement: Measurement


class Latency:
    """Milliseconds of one forward pass on the example inputs.

    With a reference, the network is timed beside it in the same processes, blocks interleaved in random order, and the
    value is their ratio times the reference's own latency: drift of the machine between two days cancels out.
    readings: a file that every raw sample is appended to, one JSON object a process.
    """

    name, unit = "latency_ms", "ms"

    def __init__(
        self, device: Device, *, seed: int = 0, reference: Reference | None = None, readings: Path | None = None
    ) -> None:
        self.device, self.seed, self.reference, self.readings = device, seed, reference, readings

    def against(self, reference: Reference) -> Latency:
        """The same meter, relative to this network."""
        return Latency(self.device, seed=self.seed, reference=reference, readings=self.readings)

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        """Raises MeasuringError when the network cannot be run or its worker is lost twice."""
        models = [model] if self.reference is None else [model, self.reference.model]
        processes, undisturbed = self._processes([packed(m, inputs) for m in models])
        wall, cpu = (_passes(processes, clock) for clock in ("wall_ms", "cpu_ms"))
        notes = _notes(processes, self.device)
        found = interval(wall[0], self.seed, *wall[1:])
        if not undisturbed:  # the truth lies between the time the CPU worked and the time that passed
            bounds = [interval(cpu[0], self.seed, *wall[1:])[1], interval(wall[0], self.seed, *cpu[1:])[2]]
            found = (found[0], min(found[1], bounds[0]), max(found[2], bounds[1]))
            notes = (f"disturbed: wall time over {DISTURBED:g} x CPU time, others used the processor", *notes)
        if self.reference is not None:
            own = interval(wall[0], self.seed)
            notes = (
                f"itself {own[0]:.4g} [{own[1]:.4g}, {own[2]:.4g}] ms",
                f"{found[0]:.4f} [{found[1]:.4f}, {found[2]:.4f}] of dense, interleaved",
                *notes,
            )
            scale = self.reference.measurement.value
            found = (found[0] * scale, found[1] * scale, found[2] * scale)
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
        return replace(self.against(Reference(other, one)).measure(model, inputs), unit="x")

    def _processes(self, blobs: Sequence[bytes]) -> tuple[list[dict[str, Any]], bool]:
        """Readings of fresh processes, disturbed ones taken again as long as repeats last; more while the interval is
        wide."""
        kept: list[dict[str, Any]] = []
        repeats, undisturbed = self.device.repeats, True
        while len(kept) < self.device.processes or (len(kept) < self.device.most_processes and self._wide(kept)):
            reading = self._reading(blobs, len(kept))
            quiet = not any(disturbed(row, self.device) for row in reading["rows"])
            if not quiet and repeats > 0:
                repeats -= 1
                LOG.info("a latency reading was disturbed by others (wall above CPU time) and is taken again")
                time.sleep(PAUSE_S)
                continue
            undisturbed = undisturbed and quiet
            kept.append(reading)
        return kept, undisturbed

    def _wide(self, processes: Sequence[Mapping[str, Any]]) -> bool:
        own, *others = _passes(processes, "wall_ms")
        value, low, high = interval(own, self.seed, *others)
        return high - low > 2 * self.device.precision * value

    def _reading(self, blobs: Sequence[bytes], ordinal: int) -> dict[str, Any]:
        message = {"do": "time", "models": list(blobs), "plan": self.device.plan(1000 * self.seed + ordinal)}
        for last in (False, True):
            try:
                with Worker(self.device) as worker:
                    answer = {**worker.ask(message), "facts": worker.facts}
                break
            except WorkerLostError as error:
                if last:
                    raise
                LOG.warning("%s; another one is started", error)
        self._keep(answer)
        return answer

    def _keep(self, answer: Mapping[str, Any]) -> None:
        if self.readings is not None:
            with self.readings.open("a") as file:
                file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **answer}) + "\n")


def disturbed(row: Mapping[str, Any], device: Device) -> bool:
    """Whether the passes took clearly longer than the CPU worked on them; not told with several threads or a GPU."""
    if device.threads != 1 or device.place != "cpu":
        return False
    return bool(np.median(row["wall_ms"]) > DISTURBED * np.median(row["cpu_ms"]))


def _passes(processes: Sequence[Mapping[str, Any]], clock: str) -> list[list[Floats]]:
    """What a clock read: for each network, for each process, its passes [N], as many of each: a process that did not
    settle made more of them, and is not to count for more."""
    networks = list(zip(*(p["rows"] for p in processes), strict=True))
    counts = [min(len(row[clock]) for row in rows) for rows in networks]
    return [
        [np.array(row[clock])[np.linspace(0, len(row[clock]) - 1, n).round().astype(int)] for row in rows]
        for rows, n in zip(networks, counts, strict=True)
    ]


def described(device: Device, facts: Mapping[str, Any]) -> str:
    """The device in one line."""
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    return f"{device.name}: {facts['processor']}, {facts['runtime']}, {threads}"


def interval(passes: Sequence[Floats], seed: int, others: Sequence[Floats] | None = None) -> tuple[float, float, float]:
    """The pooled median of K processes' passes [N] (over that of `others`), and its 95 % interval."""
    rng = np.random.default_rng(seed)
    k = len(passes)
    chosen = rng.integers(0, k, (RESAMPLES, k))
    medians = _resampled(passes, chosen, rng)
    value = float(np.median(np.concatenate(passes)))
    if others is not None:
        medians = medians / _resampled(others, chosen, rng)
        value /= float(np.median(np.concatenate(others)))
    stretch = float(student.ppf(0.975, k - 1) / norm.ppf(0.975) * np.sqrt(k / (k - 1)))
    low, high = (float(q) for q in np.quantile(medians / value, [0.025, 0.975]))
    return value, value * min(low, 1.0) ** stretch, value * max(high, 1.0) ** stretch  # times are positive: log scale


def _resampled(passes: Sequence[Floats], chosen: NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Pooled medians [RESAMPLES] of the processes chosen [RESAMPLES, K], the passes of each drawn anew."""
    counts = np.array([len(p) for p in passes])
    longest = int(counts.max())
    padded = np.stack([np.pad(p, (0, longest - len(p))) for p in passes])
    drawn = padded[chosen[..., None], rng.integers(0, counts[chosen][..., None], (*chosen.shape, longest))]
    drawn[np.arange(longest) >= counts[chosen][..., None]] = np.nan
    return np.asarray(np.nanmedian(drawn.reshape(len(chosen), -1), axis=1))


def _notes(processes: Sequence[Mapping[str, Any]], device: Device) -> tuple[str, ...]:
    rows = [p["rows"][0] for p in processes]
    wall, cpu = (np.concatenate([row[key] for row in rows]) for key in ("wall_ms", "cpu_ms"))
    p50, p90, p99 = np.quantile(wall, [0.5, 0.9, 0.99])
    medians = [float(np.median(row["wall_ms"])) for row in rows]
    notes = [
        f"p50 {p50:.4g}, p90 {p90:.4g}, p99 {p99:.4g}, least {wall.min():.4g} ms",
        f"CPU time p50 {np.median(cpu):.4g} ms",
        f"{len(rows)} fresh processes, medians {min(medians):.4g} to {max(medians):.4g} ms",
        f"{100 * float((wall > 1.5 * p50).mean()):.1f} % of passes above 1.5 x p50",
        f"first call {float(np.median([row['first_ms'] for row in rows])):.4g} ms",
        f"{processes[0]['precision'][0]}",
    ]
    if not all(row["stable"] and row["narrow"] for row in rows):
        notes.append(f"unstable: a process did not settle within {device.seconds:g} s")
    return tuple(notes)
