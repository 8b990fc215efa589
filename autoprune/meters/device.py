"""The target device: measuring processes that are started, asked, killed at their limit and restarted.

The worker's source (worker.py) goes to a fresh Python over execnet, on this machine or through ssh on another; messages
are plain values (wire.py). Local and remote readings have one code path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from autoprune.core import DeviceLostError, InputError, check_rules
from autoprune.meters import answers
from autoprune.waiting import LateError, in_time

LOG = logging.getLogger("autoprune")
START_LIMIT_S = 120.0
PROCESSES, GLANCE = 5, 2  # behind a verdict, and behind a value to steer by
GRACE_S = 2.0  # a process ends itself at its limit, wherever it is; this one's own clock comes after
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
RUNTIMES = ("torch", "onnxruntime", "openvino")
# Host keys are always checked, nobody is asked for a password, and a line that is cut is noticed.
SSH = "-o StrictHostKeyChecking=yes -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5"
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

    runtime: what executes the network: "torch", "onnxruntime" or "openvino". place: in the runtime's own words: "cpu",
    "cuda:1"; "CPUExecutionProvider"; "CPU". threads: of the CPU, fixed. dtype: what openvino computes in. host: another
    machine, as ssh knows it ("user@board"); ssh: further arguments for ssh; python: the interpreter there, with the
    runtime installed; reconnects: how often a machine that was lost is tried again.
    statistic: which quantile of the passes a latency is: "p50", "p90" or "p99".
    processes: fresh processes behind one verdict, up to most_processes while its interval is wider than ± precision.
    samples: passes of a network in each process at least; width: the widest 95 % interval of a process's median that is
    precise enough, as a fraction; seconds: at most so long for warming up, and for timing, a network in each process.
    limit_s: a worker that has not answered by then is killed. repeats: how often a reading that others disturbed may be
    taken again.
    """

    name: str = "torch_cpu"
    runtime: str = "torch"
    place: str = "cpu"
    threads: int = 1
    dtype: str = "f32"
    host: str = ""
    ssh: str = ""
    python: str = "python3"
    reconnects: int = 4
    statistic: str = "p50"
    processes: int = PROCESSES
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
            "reconnects >= 0": self.reconnects >= 0,
        }
        check_rules(f"device={self.name}", rules, vars(self))
        if self.runtime not in RUNTIMES:
            raise InputError(f"device={self.name}: runtime must be one of {', '.join(RUNTIMES)}, got '{self.runtime}'")
        if self.statistic not in QUANTILES:
            known = ", ".join(QUANTILES)
            raise InputError(f"device={self.name}: statistic must be one of {known}, got '{self.statistic}'")
        if self.host and self.runtime == "torch":
            raise InputError(
                f"device={self.name}: runtime=torch would need a pickled model on {self.host}; "
                "choose onnxruntime or openvino there"
            )
        if any("//" in words for words in (self.host, self.ssh, self.python)):
            raise InputError(f"device={self.name}: host, ssh and python must not hold '//'")
        if self.host and not re.fullmatch(r"[^\s-]\S*", self.host):
            raise InputError(
                f"device={self.name}: host must be as ssh knows it, user@board, without spaces and not beginning with "
                f"'-', got '{self.host}'"
            )

    @property
    def quantile(self) -> float:
        """What the statistic is, in (0, 1)."""
        return QUANTILES[self.statistic]

    @property
    def where(self) -> tuple[str, ...]:
        """What has to be there for it to answer, whatever it is asked."""
        return (self.host, self.ssh, self.python, self.runtime, self.place)

    def glance(self) -> Device:
        """The same with as few processes behind a value as give it an interval."""
        return dataclasses.replace(self, processes=GLANCE, most_processes=GLANCE)

    @property
    def on_cpu(self) -> bool:
        """Whether networks run on a CPU."""
        return self.place.lower().startswith("cpu")

    def plan(self, seed: int) -> dict[str, Any]:
        """How a worker is to time each network for a verdict."""
        processes = max(self.processes, PROCESSES)  # a glance is no longer than a part of a verdict
        samples = max(self.samples, math.ceil(10 / (1 - self.quantile) / processes))  # ten passes above a quantile
        return {
            "samples": samples,
            "width": self.width,
            "seconds": self.seconds * samples / self.samples,
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
        self._log = tempfile.NamedTemporaryFile(prefix="autoprune_ssh_", suffix=".log")  # noqa: SIM115, closed in close
        start = {"do": "start", "runtime": device.runtime, "place": device.place, "threads": device.threads}
        start |= {"dtype": device.dtype, "path": [] if device.host else [str(p) for p in sys.path]}
        try:
            self._channel = self._gateway().remote_exec(worker)
            self.facts = self.ask(start, limit_s=START_LIMIT_S)
        except (WorkerLostError, EOFError, OSError, AssertionError, execnet.HostNotFound) as error:
            said = self._said() or (
                "what answered is no Python; does its shell print something?" * isinstance(error, AssertionError)
            )
            self.close()
            raise WorkerLostError(f"a measuring worker could not be started ({said or error})") from error
        except MeasuringError as error:
            self.close()
            raise InputError(f"device={device.name} is not there: {error}") from error
        except BaseException:
            self.close()
            raise
        self.pid = self.facts.pop("pid")

    def _gateway(self) -> Any:
        """A fresh Python, which must answer in time: what waits behind a login that never ends is left to itself."""
        try:
            return in_time(lambda: self._group.makegateway(self._address()), START_LIMIT_S)
        except LateError:
            raise WorkerLostError(f"no Python answered within {START_LIMIT_S:g} s") from None

    def _address(self) -> str:
        """Where execnet finds the fresh Python: the environment is set before it starts."""
        threads = {"OMP_NUM_THREADS": self.device.threads, "MKL_NUM_THREADS": self.device.threads}
        there = self.device.host
        words = ["env", *(f"{name}={value}" for name, value in (ENVIRONMENT | threads).items())]
        words.append(self.device.python if there else sys.executable)
        python = f"python={shlex.join(words)}"
        if not there:
            return f"popen//{python}"
        return f"ssh={SSH} -E {self._log.name} {self.device.ssh} {there}//{python}"

    def _said(self) -> str:
        """The last line that ssh wrote."""
        with contextlib.suppress(OSError):
            lines = [line.strip() for line in Path(self._log.name).read_text().splitlines() if line.strip()]
            telling = [line for line in lines if "@@@" not in line and not line.startswith("Warning")]
            return telling[-1] if telling else ""
        return ""

    def ask(self, message: Mapping[str, Any], *, limit_s: float | None = None) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            WorkerLostError: no answer within the limit (the process is killed), or the process died.
            MeasuringError: the network raised, or the answer is none to this message; the process lives on.
        """
        limit = limit_s or self.device.limit_s
        # sending blocks too, where the other side does not read
        watchdog = threading.Timer(limit + GRACE_S, self._kill)
        watchdog.daemon = True
        watchdog.start()
        began = time.monotonic()
        try:
            self._channel.send({**message, "limit_s": limit})
            answer: dict[str, Any] = self._channel.receive(limit + GRACE_S)
        except (EOFError, OSError, self._channel.TimeoutError, self._channel.RemoteError) as error:
            self.close()
            if time.monotonic() - began >= limit:
                raise WorkerLostError(f"a measuring worker gave no answer within {limit:g} s and was killed") from None
            raise WorkerLostError(f"a measuring worker died ({' '.join(str(error).split())[:200]})") from None
        finally:
            watchdog.cancel()
        try:
            answers.check(message, answer)
        except ValueError as error:
            raise MeasuringError(f"the measuring process answered '{message['do']}' with {error}") from error
        if "error" in answer:
            raise MeasuringError(str(answer["error"]))
        return answer

    def _kill(self) -> None:
        """End the process; of one on another machine the connection, without which it ends."""
        if self.device.host:
            for gateway in self._group:
                gateway._io.kill()
        elif self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, at once."""
        self._kill()
        self.pid = None
        self._group.terminate(timeout=1.0)
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_answered: set[tuple[str, ...]] = set()  # by this process's questions: such a device is lost when it is not there


def started(device: Device, *, told: bool = False) -> Worker:
    """A worker on the device. One that answered before and cannot be reached now is tried again, after longer and
    longer waits; told: the log has a line of this loss already.

    Raises:
        InputError: the device is not there.
        DeviceLostError: it was there, and could not be reached again.
    """
    for attempt in range(device.reconnects + 1):
        try:
            worker = Worker(device)
        except (WorkerLostError, InputError) as error:
            if device.where not in _answered:
                there = f"device={device.name} is not there: "
                raise InputError(there + str(error).removeprefix(there)) from error
            problem = error
        else:
            _answered.add(device.where)
            return worker
        if attempt < device.reconnects:
            level = logging.DEBUG if told or attempt else logging.WARNING
            LOG.log(level, "device=%s: %s; it is tried again %d times", device.name, problem, device.reconnects)
            time.sleep(2**attempt)
    raise DeviceLostError(f"device={device.name} was lost: {problem}")


class WarmWorker:
    """A worker that stays: started at the first question, started again when it is lost, each with a line in the log.
    A question that loses two workers is given up."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._worker: Worker | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the runtime says of itself: runtime, threads, processor.

        Raises:
            InputError: the device is not there.
        """
        return self._started().facts

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """As Worker.ask, once more on a new worker where the first is lost."""
        try:
            return self._started().ask(message)
        except WorkerLostError as error:
            LOG.warning("%s; another one is started", error)
            self._worker = started(self.device, told=True)
            return self._worker.ask(message)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _started(self) -> Worker:
        if self._worker is None or self._worker.pid is None:
            self._worker = started(self.device)
        return self._worker


@contextlib.contextmanager
def warm(device: Device) -> Iterator[WarmWorker]:
    """A warm worker, closed at the end."""
    worker = WarmWorker(device)
    try:
        yield worker
    finally:
        worker.close()


def fresh(device: Device, message: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a process started for this message alone, with the device's facts; once more where it is lost."""

    def once(*, told: bool) -> dict[str, Any]:
        with started(device, told=told) as worker:
            return {**worker.ask(message), "facts": worker.facts}

    try:
        return once(told=False)
    except WorkerLostError as error:
        LOG.warning("%s; another one is started", error)
        return once(told=True)


def settings(device: Device) -> dict[str, Any]:
    """What a measured value depends on, for keys and fingerprints."""
    return {key: getattr(device, key) for key in ("runtime", "place", "threads", "dtype", "host", "statistic")}
