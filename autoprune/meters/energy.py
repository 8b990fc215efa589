"""Energy of one forward pass: measured with zeus where a counter can be read, modelled from counts elsewhere.

Modelled: MACs x pJ/MAC + bytes moved x pJ/byte (Horowitz, ISSCC 2014). Every parameter and buffer is read once, every
tensor that an operation of PyTorch's eager execution makes is written once and read once, all from and to one memory;
views and operations in place move nothing, and the inputs are left out. Such a joule is an estimate: its kind is
"modelled", never "measured".

Measured: the device's own counters (NVML; RAPL, of CPU packages and their DRAM; Jetson; Apple), read by ZeusMonitor
(You et al., NSDI 2023) around windows of a second or more of repeated passes, the dense network's in between. They
cover all that runs there; idle power is not subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.core import InputError, Measurement
from autoprune.meters.counts import Macs, activation_bytes, weight_bytes
from autoprune.meters.device import Device, MeasuringError, fresh
from autoprune.meters.latency import Interval, Reference, described, interval, quiet_readings
from autoprune.meters.wire import packed

if TYPE_CHECKING:
    from torch import Tensor, nn

MJ_PER_PJ = 1e-9
WORD = 4  # bytes that word_pj moves
WINDOWS = 3  # of each network, in each process
WINDOW_S = 1.0  # at least: NVML's counter moves about every 0.1 s


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a technology's operations take, in pJ, and where that is published: one addition, one multiplication, and 32
    bits moved to or from memory.

    Raises:
        InputError: a constant is negative, or all are 0.
    """

    source: str = "Horowitz, Computing's Energy Problem, ISSCC 2014: 45 nm, 0.9 V"
    add_pj: float = 0.9
    multiply_pj: float = 3.7
    word_pj: float = 640.0

    def __post_init__(self) -> None:
        values = {"add_pj": self.add_pj, "multiply_pj": self.multiply_pj, "word_pj": self.word_pj}
        for name, value in values.items():
            if not 0 <= value < np.inf:
                raise InputError(f"energy: {name} must be a finite number of at least 0, got {value}")
        if not any(values.values()):
            raise InputError(f"energy: one of {', '.join(values)} must be above 0")

    @property
    def pj_per_mac(self) -> float:
        return self.add_pj + self.multiply_pj

    @property
    def pj_per_byte(self) -> float:
        return self.word_pj / WORD


class ModelledEnergy:
    """Millijoules of one forward pass on the example inputs by the formula above. why: why nothing was measured."""

    name, unit = "energy_mj", "mJ"

    def __init__(self, constants: Constants = Constants(), *, why: str = "") -> None:
        self.constants, self.why = constants, why

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        """Exact by the formula: the interval has no width."""
        per_mac, per_byte = self.constants.pj_per_mac, self.constants.pj_per_byte
        macs = Macs().measure(model, inputs).value * len(inputs[0])
        moved = weight_bytes(model) + 2 * activation_bytes(model, inputs).total
        notes = (
            f"modelled, not measured: {macs / 1e6:.4g}M MACs x {per_mac:g} pJ + {moved / 1e6:.4g} MB moved x "
            f"{per_byte:g} pJ/byte",
            "every parameter and buffer read once, every tensor made written once and read once",
            f"constants: {self.constants.source}",
            *([f"no counter: {self.why}"] if self.why else []),
        )
        return Measurement.exact((macs * per_mac + moved * per_byte) * MJ_PER_PJ, self.unit, "modelled", notes)


@dataclass(frozen=True)
class Counter:
    """The energy counter of a device, in words; "" where there is none, with the reason."""

    name: str
    why: str = ""


def counter_of(device: Device) -> Counter:
    """Raises InputError when the device is not there."""
    answer = fresh(device, {"do": "counter", "place": device.place})
    return Counter(answer["counter"], answer["why"])


class MeasuredEnergy:
    """Millijoules of one forward pass on the example inputs, by the device's counter.

    With a reference, its windows alternate with the network's. A relative value is the ratio of the two times the
    reference's own measurement; an absolute one is what the counter said of the network.
    """

    name, unit = "energy_mj", "mJ"

    def __init__(self, device: Device, *, seed: int = 0, reference: Reference | None = None) -> None:
        self.device, self.seed, self.reference = device, seed, reference

    def beside(self, reference: Reference) -> MeasuredEnergy:
        """The same meter with this network's windows between those of every other."""
        return MeasuredEnergy(self.device, seed=self.seed, reference=reference)

    def glance(self) -> MeasuredEnergy:
        """The same meter with the fewest processes."""
        return MeasuredEnergy(self.device.glance(), seed=self.seed, reference=self.reference)

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        """Raises MeasuringError when the network cannot be run, its worker is lost twice, or the counter is silent."""
        models = [model] if self.reference is None else [model, self.reference.model]
        blobs = [packed(m, inputs, self.device.runtime) for m in models]
        processes, undisturbed = quiet_readings(self.device, lambda _: self._reading(blobs), self._found)
        value, low, high = self._found(processes)
        counters = sorted({p["counter"] for p in processes})
        windows = sum(len(p["rows"][0]["mj"]) for p in processes)
        notes = [
            f"{windows} windows of {WINDOW_S:g} s or more in {len(processes)} fresh processes",
            "the counter covers all that runs there; idle power is not subtracted",
        ]
        if self.reference is not None:
            now = float(np.median(np.concatenate(_windows(processes, 1))))
            notes.append(f"dense {now:.4g} mJ in windows between, {self.reference.measurement.value:.4g} mJ at first")
        if not undisturbed:
            notes.insert(0, "disturbed: others used the processor")
        return Measurement(
            value=value,
            unit=self.unit,
            low=low,
            high=high,
            samples=windows,
            device=f"{described(self.device, processes[0]['facts'])}; counter: {', '.join(counters)}",
            kind="measured",
            notes=tuple(notes),
            decided=undisturbed,
        )

    def _reading(self, blobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        plan = {"windows": WINDOWS, "window_s": WINDOW_S, "seconds": self.device.seconds}
        message = {"do": "energy", "models": list(blobs), "plan": plan, "place": self.device.place}
        answer = fresh(self.device, message)
        if not answer["counter"] or min(min(row["mj"]) for row in answer["rows"]) <= 0:
            raise MeasuringError(f"energy could not be measured: {answer['why'] or 'the counter stood still'}")
        return answer

    def _found(self, processes: Sequence[Mapping[str, Any]]) -> Interval:
        own = _windows(processes, 0)
        if self.reference is None or not self.reference.relative:
            return interval(own, self.seed)
        ratios = [a / b for a, b in zip(own, _windows(processes, 1), strict=True)]
        value, low, high = interval(ratios, self.seed)
        then = self.reference.measurement.value
        return value * then, low * then, high * then


def _windows(processes: Sequence[Mapping[str, Any]], network: int) -> list[Any]:
    """mJ a pass in each window of one network, by process."""
    return [np.array(p["rows"][network]["mj"]) for p in processes]
