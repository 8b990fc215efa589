"""What runs on the device: time whole networks and their layers, in a process of its own.

One self-contained file: its source is sent to the measuring process, on this machine or on another, where nothing of
autoprune need be installed: only Python and the runtime. It answers messages, dictionaries of plain values, until the
channel closes. The environment (OMP_WAIT_POLICY) is set before this source arrives, and the runtime is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

STABLE = 0.01  # warm-up ends when the medians of the last two windows differ by less
WINDOW = 5
LEAST_SAMPLES = 6  # whatever the time: fewer give the median no interval
PROBE_S = 0.3  # to see whether an energy counter moves
BLOCK_MS = 50.0  # passes between two looks at the clock, in a window of energy
PASSES = 5  # behind a peak of memory
LEAST_MS = 1.0  # a sample is at least so long, so that reading the clocks is under 0.1 % of it


class Clock:
    """Wall and CPU milliseconds of a call on this process's CPU."""

    def __call__(self, call: Callable[[], Any]) -> tuple[float, float]:
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        call()
        wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
        return wall / 1e6, cpu / 1e6


class CudaClock:
    """Milliseconds between two events around a call, the device synchronised on both sides; the host's CPU time."""

    def __call__(self, call: Callable[[], Any]) -> tuple[float, float]:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time_ns()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), (time.process_time_ns() - cpu) / 1e6


class TorchRuntime:
    """PyTorch's eager execution, as the user's own code runs the model."""

    def __init__(self, device: str, threads: int, precision: str) -> None:
        import torch

        self.torch, self.device = torch, device
        torch.set_num_threads(threads)
        self.clock: Callable[[Callable[[], Any]], tuple[float, float]] = CudaClock() if "cuda" in device else Clock()
        torch.empty(1, device=device)

    def facts(self) -> dict[str, Any]:
        on_gpu = "cuda" in self.device
        return {
            "runtime": f"torch {self.torch.__version__}",
            "threads": self.torch.get_num_threads(),
            "processor": self.torch.cuda.get_device_name(self.device) if on_gpu else _processor(),
        }

    def load(self, blob: dict[str, bytes]) -> tuple[Any, tuple[Any, ...]]:
        """(model, inputs) sent by the parent process on this machine; never from a file or another machine."""
        import cloudpickle

        model, inputs = cloudpickle.loads(blob["pickle"])
        move = self.torch.utils._pytree.tree_map
        inputs = move(lambda x: x.to(self.device) if isinstance(x, self.torch.Tensor) else x, inputs)
        return model.to(self.device).eval(), inputs

    def call(self, model: Any, inputs: tuple[Any, ...]) -> Callable[[], Any]:
        def run() -> Any:
            with self.torch.inference_mode():
                return model(*inputs)

        return run

    def precision(self, model: Any) -> str:
        return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))

    def layers(self, model: Any, inputs: tuple[Any, ...], passes: int) -> dict[str, float]:
        """Milliseconds a pass of every module without children but with parameters."""
        spans: dict[str, list[tuple[Any, Any]]] = {}
        begun: dict[str, Any] = {}
        cuda = "cuda" in self.device

        def now() -> Any:
            if not cuda:
                return time.perf_counter_ns()
            event = self.torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def before(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any) -> None:
                begun[name] = now()

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                spans.setdefault(name, []).append((begun[name], now()))

            return hook

        leaves = [(n, m) for n, m in model.named_modules() if not list(m.children()) and list(m.parameters())]
        hooks = [m.register_forward_pre_hook(before(n)) for n, m in leaves]
        hooks += [m.register_forward_hook(after(n)) for n, m in leaves]
        run = self.call(model, inputs)
        for _ in range(passes):
            run()
        if cuda:
            self.torch.cuda.synchronize()
        for hook in hooks:
            hook.remove()
        found = {}
        for name, pairs in spans.items():
            each = [a.elapsed_time(b) if cuda else (b - a) / 1e6 for a, b in pairs]
            calls = len(each) // passes  # a layer may run several times in one pass
            found[name] = statistics.median(sum(each[i * calls : (i + 1) * calls]) for i in range(passes))
        return found


class OnnxRuntime:
    """ONNX Runtime; place is the name of an execution provider."""

    def __init__(self, place: str, threads: int, precision: str) -> None:
        import onnxruntime

        self.package, self.place, self.threads = onnxruntime, place, threads
        known = onnxruntime.get_available_providers()
        if place not in known:
            raise ValueError(f"no execution provider {place}, only {', '.join(known)}")
        self.clock: Callable[[Callable[[], Any]], tuple[float, float]] = Clock()

    def facts(self) -> dict[str, Any]:
        runtime = f"onnxruntime {self.package.__version__} {self.place}"
        return {"runtime": runtime, "threads": self.threads, "processor": _processor()}

    def load(self, blob: dict[str, Any]) -> tuple[Any, Any]:
        options = self.package.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        session = self.package.InferenceSession(blob["onnx"], options, providers=[self.place], enable_fallback=False)
        if session.get_providers()[0] != self.place:  # what it falls back to is another device
            raise RuntimeError(f"{self.place} does not work, only {session.get_providers()[0]}")
        return session, _arrays(blob)

    def call(self, model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
        return lambda: model.run(None, inputs)

    def precision(self, model: Any) -> str:
        return ", ".join(sorted({entry.type for entry in model.get_inputs()}))

    def layers(self, model: Any, inputs: Any, passes: int) -> dict[str, float]:
        return {}  # layers are fused: the network is what can be timed


class OpenVino:
    """OpenVINO; place is the name of a device, precision the one it computes in ("f32"), which it would else choose."""

    def __init__(self, place: str, threads: int, precision: str) -> None:
        import openvino

        self.package, self.core, self.place, self.threads = openvino, openvino.Core(), place, threads
        known = self.core.available_devices
        if place not in known:
            raise ValueError(f"no device {place}, only {', '.join(known) or 'none'}")
        self.settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if place == "CPU":
            self.settings["INFERENCE_NUM_THREADS"] = str(threads)
        self.clock: Callable[[Callable[[], Any]], tuple[float, float]] = Clock()

    def facts(self) -> dict[str, Any]:
        release = self.package.__version__.partition("-")[0]
        return {"runtime": f"openvino {release} {self.place}", "threads": self.threads, "processor": _processor()}

    def load(self, blob: dict[str, Any]) -> tuple[Any, Any]:
        return self.core.compile_model(self.core.read_model(blob["onnx"]), self.place, self.settings), _arrays(blob)

    def call(self, model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
        request = model.create_infer_request()
        for name, value in inputs.items():
            request.set_tensor(name, self.package.Tensor(value))
        return lambda: request.infer()

    def precision(self, model: Any) -> str:
        return f"computes in {model.get_property('INFERENCE_PRECISION_HINT').get_type_name()}"

    def layers(self, model: Any, inputs: Any, passes: int) -> dict[str, float]:
        return {}


def _arrays(blob: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name, from plain values."""
    import numpy as np

    return {
        name: np.frombuffer(entry["data"], entry["dtype"]).reshape(entry["shape"]).copy()
        for name, entry in blob["inputs"].items()
    }


RUNTIMES: dict[str, Callable[[str, int, str], Any]] = {
    "torch": TorchRuntime,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}


def timed(calls: Sequence[Callable[[], Any]], clock: Callable[..., tuple[float, float]], plan: dict[str, Any]) -> Any:
    """Time several networks interleaved, in blocks of random order, each warmed up before.

    It ends when each has plan["samples"] and the 95 % interval of every median is at most plan["width"] of it, or when
    plan["seconds"] a network are over and each has LEAST_SAMPLES. plan["settle"] False warms up with two calls only.
    Returns one row of raw samples a network; nothing is deleted.
    """
    rows = [_warmed(call, clock, plan["seconds"] if plan["settle"] else 0.0) for call in calls]
    rng = random.Random(plan["seed"])
    deadline = time.perf_counter() + plan["seconds"] * len(calls)
    gc.collect()
    while True:
        order = list(range(len(calls)))
        rng.shuffle(order)
        for i in order:
            row = rows[i]
            for _ in range(plan["block"]):
                wall, cpu = clock(row["call"])
                row["wall_ms"].append(wall / row["repeat"])
                row["cpu_ms"].append(cpu / row["repeat"])
        fewest = min(len(row["wall_ms"]) for row in rows)
        narrow = fewest >= plan["samples"] and all(_relative_width(row["wall_ms"]) <= plan["width"] for row in rows)
        if narrow or (fewest >= LEAST_SAMPLES and time.perf_counter() > deadline):
            break
    for row in rows:
        del row["call"]
        row["narrow"] = _relative_width(row["wall_ms"]) <= plan["width"]
    return rows


def _warmed(call: Callable[[], Any], clock: Callable[..., tuple[float, float]], seconds: float) -> dict[str, Any]:
    """Run until stable or for `seconds`; then settle how many calls make one sample."""
    deadline = time.perf_counter() + seconds
    first, _ = clock(call)
    readings: list[float] = []
    stable = False
    while not readings or (not stable and time.perf_counter() < deadline):
        readings.append(clock(call)[0])
        if len(readings) >= 2 * WINDOW:
            before = statistics.median(readings[-2 * WINDOW : -WINDOW])
            stable = abs(statistics.median(readings[-WINDOW:]) / before - 1) < STABLE
    typical = statistics.median(readings[-WINDOW:])
    repeat = max(1, round(LEAST_MS / typical)) if typical < LEAST_MS else 1
    one = call

    def several() -> None:
        for _ in range(repeat):
            one()

    return {
        "call": several if repeat > 1 else call,
        "repeat": repeat,
        "first_ms": first,
        "warm_up": len(readings),
        "stable": stable,
        "wall_ms": [],
        "cpu_ms": [],
    }


def _relative_width(samples: Sequence[float]) -> float:
    """Width of the 95 % interval of the median (order statistics) over the median."""
    n = len(samples)
    if n < LEAST_SAMPLES:
        return float("inf")
    ordered = sorted(samples)
    reach = 0.98 * n**0.5
    low, high = ordered[max(0, int(n / 2 - reach))], ordered[min(n - 1, int(n / 2 + reach) + 1)]
    return float((high - low) / statistics.median(ordered))


def peak_of(load: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """The most megabytes this process has resident while it runs what `load` gives, a few passes."""
    run = load()
    gc.collect()
    _return_free_memory()
    reset = _forget_peak()
    for _ in range(PASSES):
        run()
    return {"peak_mb": _peak_bytes() / 1e6, "reset": reset}


def _return_free_memory() -> None:
    """Bytes that the network arrived as are free by now; glibc's allocator was told to keep such."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> bool:
    """Whether the kernel's high-water mark could be set back to what is resident now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    """Not by getrusage on Linux: a process begins there with the peak of the one that started it."""
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class EnergyCounter:
    """What the processor at `place` has used, by its own counters, read through zeus. name: "" where there is none."""

    def __init__(self, place: str) -> None:
        self.name, self.why = "", ""
        self._on_gpu = on_gpu = place.lower().startswith(("cuda", "tensorrt"))
        if not on_gpu and not place.lower().startswith("cpu"):
            self.why = f"which counter is that of {place} is not known"
            return
        gpus = [int(place.partition(":")[2] or 0)] if on_gpu else []
        try:
            from zeus.monitor import ZeusMonitor

            try:
                self._monitor = ZeusMonitor(gpu_indices=gpus)
            except ValueError:  # no such GPU for zeus; a system on a chip counts its own
                self._monitor = ZeusMonitor(gpu_indices=[])
            found, used = self._probed()
        except ImportError:
            self.why = "zeus is not installed there"
            return
        except Exception as error:  # noqa: BLE001, whatever keeps zeus from working, there is no counter
            self.close()
            self.why = f"zeus does not work there ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            return
        if not found:
            processor = "this GPU" if on_gpu else "this processor (RAPL is for root only)"
            self.why = f"zeus finds no counter of {processor}"
        elif used <= 0:
            self.why = f"{found} stands still"
        else:
            self.name = found

    def _probed(self) -> tuple[str, float]:
        """What the counter says of a short while of work."""
        deadline = time.perf_counter() + PROBE_S
        self.begin()
        while time.perf_counter() < deadline:
            sum(range(1000))
        return self._read(self._monitor.end_window("window", sync_execution=False))

    def begin(self) -> None:
        self._monitor.begin_window("window", sync_execution=False)

    def end(self) -> float:
        """Millijoules since `begin`."""
        return self._read(self._monitor.end_window("window", sync_execution=False))[1]

    def close(self) -> None:
        """End the processes that zeus started to watch its counters: this one may be killed."""
        for child in multiprocessing.active_children():
            child.terminate()

    def _read(self, window: Any) -> tuple[str, float]:
        """Which counter spoke, and millijoules. zeus gives joules of GPUs and CPUs, millijoules of chips; nothing, not
        0, where it has no counter."""
        if window.gpu_energy:
            return f"GPU {', '.join(map(str, window.gpu_energy))}", 1e3 * sum(window.gpu_energy.values())
        if window.soc_energy is not None:
            return type(window.soc_energy).__name__.removesuffix("Measurement"), _of_chip(window.soc_energy)
        if window.cpu_energy and not self._on_gpu:
            dram = window.dram_energy or {}
            plural, also = "s" * (len(window.cpu_energy) > 1), ", with DRAM" * bool(dram)
            used = sum(window.cpu_energy.values()) + sum(dram.values())
            return f"{len(window.cpu_energy)} CPU package{plural}{also}", 1e3 * used
        return "", 0.0


def _of_chip(used: Any) -> float:
    """Millijoules of a system on a chip: its total where it has one, else the sum of its parts."""
    total = getattr(used, "total_energy_mj", None)
    parts = ("cpu_energy_mj", "gpu_energy_mj", "cpu_total_mj", "dram_mj", "gpu_mj", "gpu_sram_mj", "ane_mj")
    return float(total if total is not None else sum(getattr(used, part, None) or 0.0 for part in parts))


def energies(
    calls: Sequence[Callable[[], Any]],
    clock: Callable[..., tuple[float, float]],
    counter: EnergyCounter,
    plan: dict[str, Any],
) -> list[dict[str, Any]]:
    """mJ, wall and CPU ms a pass of several networks, in plan["windows"] windows each of plan["window_s"] or more; the
    networks take turns, each warmed up before."""
    rows = [_warmed(call, clock, plan["seconds"]) | {"mj": []} for call in calls]
    for row in rows:
        typical, _ = clock(row["call"])
        row["block"] = max(1, round(BLOCK_MS / typical))
    for window in range(plan["windows"]):
        for row in rows if window % 2 == 0 else reversed(rows):
            _window(row, clock, counter, plan["window_s"])
    for row in rows:
        del row["call"]
    return rows


def _window(
    row: dict[str, Any], clock: Callable[..., tuple[float, float]], counter: EnergyCounter, seconds: float
) -> None:
    def block() -> None:
        for _ in range(row["block"]):
            row["call"]()

    deadline = time.perf_counter() + seconds
    passes, wall, cpu = 0, 0.0, 0.0
    counter.begin()
    while time.perf_counter() < deadline:
        passed, worked = clock(block)
        passes, wall, cpu = passes + row["block"] * row["repeat"], wall + passed, cpu + worked
    row["mj"].append(counter.end() / passes)
    row["wall_ms"].append(wall / passes)
    row["cpu_ms"].append(cpu / passes)


def energy_of(runtime: Any, message: dict[str, Any]) -> dict[str, Any]:
    """The counter of this place, and what it reads of the networks given, if there are any."""
    counter = EnergyCounter(message["place"])
    answer: dict[str, Any] = {"counter": counter.name, "why": counter.why}
    try:
        if counter.name and "models" in message:
            calls = [runtime.call(*runtime.load(blob)) for blob in message["models"]]
            answer["rows"] = energies(calls, runtime.clock, counter, message["plan"])
    finally:
        counter.close()
    return answer


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def serve(channel: Any) -> None:
    """Answer messages until the channel closes. A failure is answered in words; the process lives on."""
    runtime: Any = None
    for message in channel:
        try:
            if hasattr(signal, "setitimer"):  # the system ends a process that hangs, in whatever code
                signal.setitimer(signal.ITIMER_REAL, message["limit_s"])
            if message["do"] == "start":
                sys.path[:] = message["path"] or sys.path
                runtime = RUNTIMES[message["runtime"]](message["place"], message["threads"], message["dtype"])
                channel.send({"pid": os.getpid(), "machine": platform.node(), **runtime.facts()})
                continue
            if message["do"] == "peak":
                channel.send(peak_of(lambda: runtime.call(*runtime.load(message["models"].pop()))))  # noqa: B023
                continue
            if message["do"] in ("counter", "energy"):
                channel.send(energy_of(runtime, message))
                continue
            answer: dict[str, Any] = {}
            if "models" in message:
                loaded = [runtime.load(blob) for blob in message["models"]]
                answer["precision"] = [runtime.precision(model) for model, _ in loaded]
                answer["rows"] = timed([runtime.call(*pair) for pair in loaded], runtime.clock, message["plan"])
            if "layers_of" in message:
                answer["layers"] = runtime.layers(*runtime.load(message["layers_of"]), message["layer_passes"])
            channel.send(answer)
        except Exception as error:  # noqa: BLE001, what the model raises is the parent's to report
            channel.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        finally:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__channelexec__":
    serve(globals()["channel"])  # execnet puts it there
