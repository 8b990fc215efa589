"""Peak resident memory: what a process that runs the network takes of the machine, its runtime included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.core import Measurement
from autoprune.meters.device import Device, fresh
from autoprune.meters.latency import Interval, described, interval, quiet_readings
from autoprune.meters.wire import packed

if TYPE_CHECKING:
    from torch import Tensor, nn


class Resident:
    """Megabytes (1e6 bytes) that a fresh process has resident at most while it runs the network on the example inputs:
    interpreter, runtime, weights and activations; of a GPU only what the host holds.

    On Linux the peak is the kernel's high-water mark (VmHWM), reset after loading, so that what only travelled to the
    process does not count; elsewhere it is ru_maxrss, and loading counts. The allocator keeps what it has been given,
    as for latency. The median and its 95 % interval are of several processes.
    """

    name, unit = "rss_mb", "MB"

    def __init__(self, device: Device, *, seed: int = 0) -> None:
        self.device, self.seed = device, seed

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        """Raises MeasuringError when the network cannot be run or its worker is lost twice."""
        message = {"do": "peak", "models": [packed(model, inputs, self.device.runtime)]}
        processes, _ = quiet_readings(self.device, lambda _: {**fresh(self.device, message), "rows": []}, self._found)
        value, low, high = self._found(processes)
        peaks = [p["peak_mb"] for p in processes]
        since = "while running" if all(p["reset"] for p in processes) else "since the process began, loading included"
        return Measurement(
            value=value,
            unit=self.unit,
            low=low,
            high=high,
            samples=len(peaks),
            device=described(self.device, processes[0]["facts"]),
            kind="measured",
            notes=(f"{len(peaks)} fresh processes, peaks {min(peaks):.4g} to {max(peaks):.4g} MB {since}",),
        )

    def _found(self, processes: Sequence[Mapping[str, Any]]) -> Interval:
        return interval([np.array([p["peak_mb"]]) for p in processes], self.seed)
