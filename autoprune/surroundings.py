"""What a search runs on: Python and PyTorch, the processor and who else is on it, memory, disk, runtimes, the device.

Nothing is written: looking makes no folder and no file.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from autoprune.core import InputError
from autoprune.findings import Finding, Status, guarded
from autoprune.meters.device import Device, fresh
from autoprune.waiting import LateError, in_time
from autoprune.writing import nearest

AREA = "environment"
LEAST_MB = 1000.0  # of memory and of disk, below which a warning is due
DEVICE_S = 45.0  # that a device has to answer
RUNTIMES = {  # package: (module, what brings it, what it is for)
    "onnx": ("onnx", "onnx", "export to ONNX"),
    "onnxruntime": ("onnxruntime", "onnxruntime", "device=onnxruntime"),
    "openvino": ("openvino", "openvino", "device=openvino"),
    "ray": ("ray", "ray", "workers=ray"),
    "optuna-dashboard": ("optuna_dashboard", "dashboard", "looking at studies in the browser"),
    "zeus": ("zeus", "energy", "measured energy"),
    "psycopg": ("psycopg", "postgresql", "studies in PostgreSQL"),
}


def environment(output: Path, *, threads: int) -> list[Finding]:
    """Of this machine. output: where runs are to go. threads: of its CPU that a search takes."""
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "torch": _torch,
        "processor": lambda: _processor(threads),
        "memory": _memory,
        "output": lambda: _output(output),
        "runtimes": _runtimes,
    }
    return [finding for what, look in looks.items() for finding in guarded(AREA, what, look)]


def _found(what: str, detail: str, status: Status = "ok", way_out: str = "") -> Finding:
    return Finding(area=AREA, what=what, detail=detail, status=status, way_out=way_out)


def _python() -> Iterator[Finding]:
    yield _found("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Iterator[Finding]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    bf16 = "bfloat16 in hardware" if _has_bfloat16() else "no bfloat16 in hardware"
    count = torch.get_num_threads()
    yield _found(
        "torch",
        f"{torch.__version__}, {count} thread{'s' * (count != 1)}, {', '.join(gpus) or 'no GPU'}, {bf16}",
    )


def _has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself, as Linux says."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def _processor(threads: int) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    detail = f"{cores} cores, {load:.1f} busy over the last minute"
    if threads > cores:
        yield _found("processor", detail, "warning", f"device.threads={threads} is more than there are: give {cores}")
    elif load + threads > cores:
        way_out = "end what else runs here, or latencies are disturbed and their verdicts may be undecided"
        yield _found("processor", detail, "warning", way_out)
    else:
        yield _found("processor", detail)


def _memory() -> Iterator[Finding]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    kb = {line.partition(":")[0]: float(line.split()[1]) for line in lines if len(line.split()) > 1}
    free, whole = kb["MemAvailable"] / 1e3, kb["MemTotal"] / 1e3
    status: Status = "ok" if free >= LEAST_MB else "warning"
    way_out = "" if status == "ok" else "end what else runs here, give workers=serial and a smaller task.batch_size"
    yield _found("memory", f"{free / 1e3:.1f} of {whole / 1e3:.1f} GB free", status, way_out)


def _output(output: Path) -> Iterator[Finding]:
    place = nearest(output)
    free = shutil.disk_usage(place).free / 1e6
    detail = f"{output}/: {free / 1e3:.1f} GB free" + ("" if output.exists() else ", not there yet")
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield _found("output", f"{detail}; {place} cannot be written", "failed", "give output=FOLDER that can be")
    elif free < LEAST_MB:
        yield _found("output", detail, "warning", "make room, or give output=FOLDER on another disk")
    else:
        yield _found("output", detail)


def _runtimes() -> Iterator[Finding]:
    for package, (module, extra, purpose) in RUNTIMES.items():
        if importlib.util.find_spec(module) is None:
            yield _found(package, "not installed", way_out=f"for {purpose}: pip install 'autoprune[{extra}]'")
        else:
            yield _found(package, _version(package))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # onnxruntime-gpu and others bring the same module
        return "installed by a package of another name"


def device(made: Callable[[], Device]) -> tuple[list[Finding], Device | None]:
    """Of the device that is configured: is it there, and can its energy be measured? It has DEVICE_S to answer."""
    built: list[Device] = []

    def look() -> Iterator[Finding]:
        built.append(made())
        answer = _in_time(built[0])
        facts = answer["facts"]
        said = ", ".join(f"{facts[key]}" for key in ("runtime", "processor", "machine") if facts.get(key))
        threads = f"{built[0].threads} thread{'s' * (built[0].threads != 1)}"
        yield _found("device", f"{built[0].name} answers: {said}, {threads}")
        why = str(answer["why"]).partition(" (")[0]
        yield _found(
            "energy",
            answer["counter"] or f"modelled, as {why}",
            way_out="" if answer["counter"] else "budgets on energy hold by the model only",
        )

    way_out = "device=torch_cpu is always there; python -m autoprune search --help lists the others"
    return guarded(AREA, "device", look, way_out=way_out), built[0] if built else None


def _in_time(device: Device) -> dict[str, Any]:
    """What a device says of its counter and of itself.

    Raises:
        InputError: it is not there, or has not answered by then; what hangs is left to itself.
    """
    try:
        return dict(in_time(lambda: fresh(device, {"do": "counter", "place": device.place}), DEVICE_S))
    except LateError:
        raise InputError(f"device={device.name} has not answered within {DEVICE_S:g} s") from None
