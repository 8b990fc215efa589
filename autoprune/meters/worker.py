"""What runs on the device: time whole networks and their layers, in a process of its own.

One self-contained file: its source is sent to the measuring process, where nothing of autoprune need be installed. It
answers messages, dictionaries of plain values, until the channel closes. The environment (OMP_WAIT_POLICY) is set
before this source arrives, and torch is imported here.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

STABLE = 0.01  # warm-up ends when the medians of the last two windows differ by less
WINDOW = 5
LEAST_SAMPLES = 6  # whatever the time: fewer give the median no interval
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

    def __init__(self, device: str, threads: int) -> None:
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

    def load(self, blob: bytes) -> tuple[Any, tuple[Any, ...]]:
        """(model, inputs) sent by the parent process on this machine; never from a file or another machine."""
        import cloudpickle

        model, inputs = cloudpickle.loads(blob)
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

    def layers(self, model: Any, inputs: tuple[Any, ...], passes: int) -> dict[str, dict[str, Any]]:
        """Every module without children but with parameters: what it is, its shapes, its milliseconds a pass."""
        found: dict[str, dict[str, Any]] = {}
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
                ended = now()
                row = found.setdefault(name, {"what": repr(module), "spans": []})
                row["input"] = list(args[0].shape) if args and hasattr(args[0], "shape") else []
                row["spans"].append((begun[name], ended))

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
        for row in found.values():
            spans = row.pop("spans")
            each = [a.elapsed_time(b) if cuda else (b - a) / 1e6 for a, b in spans]
            calls = len(each) // passes  # a layer may run several times in one pass
            row["ms"] = statistics.median(sum(each[i * calls : (i + 1) * calls]) for i in range(passes))
        return found


RUNTIMES: dict[str, Callable[[str, int], TorchRuntime]] = {"torch": TorchRuntime}


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
            if message["do"] == "start":
                sys.path[:] = message["path"]
                runtime = RUNTIMES[message["runtime"]](message["device"], message["threads"])
                channel.send({"pid": os.getpid(), **runtime.facts()})
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


if __name__ == "__channelexec__":
    serve(globals()["channel"])  # execnet puts it there
