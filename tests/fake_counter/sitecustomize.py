"""Two processors for zeus, through its abstract classes, in every Python that starts with this folder on its path."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import zeus.device.cpu
from zeus.device.cpu.common import CPU, CpuDramMeasurement, CPUs

SHARE = float(os.environ.get("FAKE_WATTS", "1"))


class FakeCPU(CPU):  # type: ignore[misc, unused-ignore]
    """Its package takes 2 W idle and 4 W more while this process works, its DRAM 0.5 W and 1 W."""

    def get_total_energy_consumption(self) -> CpuDramMeasurement:
        used = SHARE * (2000 * time.perf_counter() + 4000 * time.process_time())
        return CpuDramMeasurement(cpu_mj=used, dram_mj=used / 4)

    def supports_get_dram_energy_consumption(self) -> bool:
        return True


class FakeCPUs(CPUs):  # type: ignore[misc, unused-ignore]
    """Two of them: 5 W idle and 10 W more."""

    def __init__(self) -> None:
        self._cpus = [FakeCPU(0), FakeCPU(1)]

    def __del__(self) -> None: ...

    @property
    def cpus(self) -> Sequence[CPU]:
        return self._cpus


zeus.device.cpu._cpus = FakeCPUs()
