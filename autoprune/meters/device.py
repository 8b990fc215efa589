"""The target device: measuring processes that are started, asked, killed at their limit and restarted.

The worker's source (worker.py) goes to a fresh Python over execnet; messages are plain values. A model travels to a
process on this machine as bytes that cloudpickle makes and that process reads at once; no file and no other machine
ever sees them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from autoprune.core import InputError

LOG = logging.getLogger("autoprune")
START_LIMIT_S = 120.0
# OpenMP threads that wait asleep; glibc's allocator keeping its memory: by default it returns large activations to the
# system after each pass or not, by its history, and the page faults make one ResNet-20 take 29 or 49 ms.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


class MeasuringError(RuntimeError):
    """A network could not be measured: its worker hung or died again and again, or the network itself raised."""


class WorkerLostError(MeasuringError):
    """A measuring process hung and was killed, or died."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where and how costs are measured.

    runtime: what executes the network; place: "cpu", "cuda" or "cuda:1"; threads: of the CPU, fixed. processes: fresh
    processes behind one verdict, up to most_processes while its interval is wider than ± precision. samples: passes of
    a network in each at least; width: the widest 95 % interval of a process's median that is precise enough, as a
    fraction; seconds: at most so long for warming up, and for timing, a network in each process. limit_s: a worker that
    has not answered by then is killed. repeats: how often a reading that others disturbed may be taken again.
    """

    name: str = "torch_cpu"
    runtime: str = "torch"
    place: str = "cpu"
    threads: int = 1
    processes: int = 5
    most_processes: int = 10
    precision: float = 0.03
    samples: int = 30
    width: float = 0.01
    seconds: float = 2.0
    limit_s: float = 120.0
    repeats: int = 5

    def __post_init__(self) -> None:
        rules = {
            "threads >= 1": self.threads >= 1,
            "processes >= 2": self.processes >= 2,
            "most_processes >= processes": self.most_processes >= self.processes,
            "precision > 0": self.precision > 0,
            "samples >= 6": self.samples >= 6,
            "width > 0": self.width > 0,
            "seconds > 0": self.seconds > 0,
            "limit_s > 0": self.limit_s > 0,
            "repeats >= 0": self.repeats >= 0,
        }
        for rule, kept in rules.items():
            if not kept:
                name = rule.split()[0]
                raise InputError(f"device={self.name}: {rule} must hold, got {name}={getattr(self, name)}")

    def plan(self, seed: int) -> dict[str, Any]:
        """How a worker is to time each network for a verdict."""
        return {
            "samples": self.samples,
            "width": self.width,
            "seconds": self.seconds,
            "block": 5,
            "settle": True,
            "seed": seed,
        }


class Worker:
    """One measuring process. Closing it ends the process."""

    def __init__(self, device: Device) -> None:
        import execnet

        from autoprune.meters import worker

        self.device = device
        self.pid: int | None = None
        self._group = execnet.Group()
        threads = {"OMP_NUM_THREADS": device.threads, "MKL_NUM_THREADS": device.threads}
        words = ["env", *(f"{name}={value}" for name, value in (ENVIRONMENT | threads).items()), sys.executable]
        start = {"do": "start", "runtime": device.runtime, "device": device.place, "threads": device.threads}
        try:
            self._channel = self._group.makegateway(f"popen//python={shlex.join(words)}").remote_exec(worker)
            self.facts = self.ask({**start, "path": [str(p) for p in sys.path]}, limit_s=START_LIMIT_S)
        except WorkerLostError:
            raise
        except MeasuringError as error:
            self.close()
            raise InputError(f"device={device.name} is not there: {error}") from error
        except (EOFError, OSError) as error:
            self.close()
            raise WorkerLostError(f"a measuring worker could not be started ({error})") from error
        except BaseException:
            self.close()
            raise
        self.pid = self.facts.pop("pid")

    def ask(self, message: Mapping[str, Any], *, limit_s: float | None = None) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            WorkerLostError: no answer within the limit (the process is killed), or the process died.
            MeasuringError: the network raised; the process lives on.
        """
        limit = limit_s or self.device.limit_s
        watchdog = threading.Timer(limit, self._kill)  # sending blocks too, where the other side does not read
        watchdog.daemon = True
        watchdog.start()
        began = time.monotonic()
        try:
            self._channel.send(dict(message))
            answer: dict[str, Any] = self._channel.receive(limit)
        except (EOFError, OSError, self._channel.TimeoutError, self._channel.RemoteError) as error:
            self.close()
            if time.monotonic() - began >= limit:
                raise WorkerLostError(f"a measuring worker gave no answer within {limit:g} s and was killed") from None
            raise WorkerLostError(f"a measuring worker died ({' '.join(str(error).split())[:200]})") from None
        finally:
            watchdog.cancel()
        if "error" in answer:
            raise MeasuringError(answer["error"])
        return answer

    def _kill(self) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, at once."""
        self._kill()
        self.pid = None
        self._group.terminate(timeout=1.0)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WarmWorker:
    """A worker that stays: started at the first question, started again when it is lost, each with a line in the log.
    A question that loses two workers is given up."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._worker: Worker | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the runtime says of itself: runtime, threads, processor."""
        return self._started().facts

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """As Worker.ask, once more on a new worker where the first is lost."""
        try:
            return self._started().ask(message)
        except WorkerLostError as error:
            LOG.warning("%s; another one is started", error)
            self._worker = None
            return self._started().ask(message)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _started(self) -> Worker:
        if self._worker is None or self._worker.pid is None:
            self._worker = Worker(self.device)
        return self._worker


@contextlib.contextmanager
def warm(device: Device) -> Iterator[WarmWorker]:
    """A warm worker, closed at the end."""
    worker = WarmWorker(device)
    try:
        yield worker
    finally:
        worker.close()


def packed(model: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """A model and its inputs for a worker on this machine.

    Raises:
        InputError: the model holds something that no other process can be given (a lock, an open file).
    """
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps((model, tuple(inputs))))
    except Exception as error:
        raise InputError(
            f"the model cannot be sent to a measuring process ({type(error).__name__}: {error}): "
            "its attributes must be tensors, modules and plain values"
        ) from error


def settings(device: Device) -> dict[str, Any]:
    """What a measured value depends on, for keys and fingerprints."""
    return {key: value for key, value in asdict(device).items() if key in ("runtime", "place", "threads")}
