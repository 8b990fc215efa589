"""Where candidates are evaluated: in this process, in processes of this machine, or on a Ray cluster.

A worker holds a copy of the evaluator, made once; it is given parcels of candidates and sends back one message for
each, as it is finished. Workers know nothing of each other and may be killed at any time (spread.py goes on without).

A local worker is a fresh Python at the other end of a socket of its own, which closes when either of the two dies: no
lock and no queue is shared, so that one death harms nobody else (loky and concurrent.futures give up the whole pool,
multiprocessing.Pool waits for ever). It does not import the user's __main__ module: what is defined there travels by
value. A Ray worker is an actor in a slot of the cluster; the evaluator is put into its object store once.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import mmap
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import cloudpickle

from autoprune.core import InputError, check_rules
from autoprune.crew import Crew, Done, Failed, LostError, Ready, Subject, Telling, Worker, Workers, check_crew, pack

LOG = logging.getLogger("autoprune")
START = (
    "import json, sys; path, *numbers = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from autoprune.workers import serve; serve(*numbers)"
)
STUCK_S = 60  # that the other end may leave a message half written or half read
BLAS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Serial(Workers):
    """Candidates are evaluated one after the other, in this process."""


# ------------------------------------------------------------------------------------------------- on this machine


class Local(Crew):
    """Processes of this machine.

    count: how many. limit_s: seconds that a candidate may take, after which its worker is killed and it has failed
    (spread.py); None for as long as it likes. memory_mb: what a worker may allocate beyond what it starts with, where a
    candidate that asks for more fails; None for all there is (Linux).

    Raises:
        InputError: a setting is out of its range.
    """

    def __init__(self, *, count: int = 2, limit_s: float | None = None, memory_mb: float | None = None) -> None:
        check_crew("workers=local", count, limit_s)
        check_rules(
            "workers=local",
            {"memory_mb must be null or above 0": memory_mb is None or memory_mb > 0},
            {"memory_mb": memory_mb},
        )
        self.count, self.limit_s, self.memory_mb = count, limit_s, memory_mb
        self._packed: IO[bytes] | None = None  # a file without a name

    def hire(self, subject: Subject, threads: int) -> Worker:
        if self._packed is None:
            packed = tempfile.TemporaryFile()  # noqa: SIM115, closed in close
            pack(subject, packed)
            self._packed = packed
        memory = 0 if self.memory_mb is None else round(self.memory_mb * 2**20)
        return _Process(self._packed.fileno(), threads, memory)

    def telling(self, workers: Sequence[_Process], timeout_s: float | None) -> list[_Process]:
        ready = wait([worker.connection for worker in workers], timeout_s)
        return [worker for worker in workers if worker.connection in ready]

    def close(self) -> None:
        if self._packed is not None:
            self._packed.close()
        self._packed = None


class _Process:
    """A local worker: a fresh Python that runs `serve`."""

    def __init__(self, subject: int, threads: int, memory: int) -> None:
        ours, theirs = socket.socketpair()
        for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", STUCK_S, 0))
        numbers = (theirs.fileno(), subject, memory)
        words = [sys.executable, "-P", "-c", START, json.dumps([[str(p) for p in sys.path], *numbers])]
        environment = os.environ | dict.fromkeys(BLAS, str(threads))
        with theirs, ours:
            self._process = subprocess.Popen(
                words,
                pass_fds=[theirs.fileno(), subject],
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,  # Ctrl-C is for who started it
            )
            self.connection: Connection[Any, Any] = Connection(ours.detach())

    def give(self, parcel: Any) -> None:
        try:
            self.connection.send_bytes(cloudpickle.dumps(parcel))
        except OSError:  # it is lost, and says so when it is heard
            self._process.kill()

    def take(self) -> Any:
        try:
            return cloudpickle.loads(self.connection.recv_bytes())  # of a process that this one started
        except (EOFError, OSError):
            raise LostError(self._end()) from None

    def _end(self) -> str:
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status >= 0:
            return f"ended with status {status}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
        return f"was killed by signal {-status}"

    def kill(self) -> None:
        self._process.kill()
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that its machine does not let go
            self._process.wait(5)


def serve(descriptor: int, file: int, memory: int) -> None:
    """The life of a local worker: read the subject from a file, then parcels, until the other end closes."""
    connection: Connection[Any, Any] = Connection(descriptor)
    telling = threading.Lock()

    def tell(message: Any) -> None:
        content = cloudpickle.dumps(message)
        with telling:
            connection.send_bytes(content)

    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    LOG.addHandler(Telling(tell))
    LOG.propagate = False
    try:
        with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as content:
            subject: Subject = cloudpickle.loads(content)
        if memory:
            limit = _address_space() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        tell(Ready())
        while True:
            for message in subject.evaluated(cloudpickle.loads(inbox.get())):
                tell(message)
            tell(Done())
    except Exception as error:  # noqa: BLE001, told to who can say it
        tell(Failed.of(error))


def _read(connection: Connection[Any, Any], inbox: queue.SimpleQueue[bytes]) -> None:
    """Parcels as they come; the process ends with who sends them, whatever it is doing."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:  # noqa: BLE001, where it has no memory for a parcel, say
        os._exit(1)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


# ------------------------------------------------------------------------------------------------------------ on Ray


class Ray(Crew):
    """Actors of a Ray cluster, one a slot of `threads` CPUs and so many GPUs.

    address: of a running cluster ("auto", "10.0.0.1:6379", "ray://…"); None starts one on this machine, which ends with
    the search. Every node needs autoprune and what the task imports. Token authentication is on unless RAY_AUTH_MODE
    says otherwise; a cluster of one's own must be started with it. count, limit_s: as of Local.

    Raises:
        InputError: a setting is out of its range, Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self, *, count: int = 2, address: str | None = None, gpus: float = 0.0, limit_s: float | None = None
    ) -> None:
        check_crew("workers=ray", count, limit_s)
        check_rules("workers=ray", {"gpus >= 0": gpus >= 0}, {"gpus": gpus})
        self.count, self.address, self.gpus, self.limit_s = count, address, gpus, limit_s
        self._ray: Any = None
        self._put: tuple[Subject, Any] | None = None

    def hire(self, subject: Subject, threads: int) -> Worker:
        ray = self._connected(threads)
        if self._put is None or self._put[0] is not subject:
            content = io.BytesIO()
            pack(subject, content)
            self._put = subject, ray.put(content.getvalue())
        slot = ray.remote(_actor()).options(num_cpus=threads, num_gpus=self.gpus, max_restarts=0, max_task_retries=0)
        return _Actor(ray, slot.remote([str(p) for p in sys.path], self._put[1]))

    def telling(self, workers: Sequence[_Actor], timeout_s: float | None) -> list[_Actor]:
        waiting = {worker.waiting: worker for worker in workers if worker.waiting is not None}
        self._ray.wait(list(waiting), timeout=timeout_s, fetch_local=True)
        ready, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=True)
        return [waiting[one] for one in ready]

    def close(self) -> None:
        if self._ray is not None:
            self._ray.shutdown()
        self._ray = self._put = None

    def _connected(self, threads: int) -> Any:
        if self._ray is not None:
            return self._ray
        if "ray" not in sys.modules:  # which reads these when it is imported
            for name, value in {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}.items():
                os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise InputError("workers=ray: Ray is not installed: pip install 'autoprune[ray]'") from error
        except KeyError as error:  # amdsmi beside Ray
            raise InputError(
                f"workers=ray: Ray does not start beside amdsmi, which the extra 'energy' brings ({error}): "
                "pip uninstall amdsmi, or choose workers=local"
            ) from error
        here = {"num_cpus": self.count * threads, "include_dashboard": False} if self.address is None else {}
        try:
            ray.init(address=self.address or "local", logging_level=logging.ERROR, log_to_driver=False, **here)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if self.address is None:
                raise InputError(f"workers=ray: no cluster can be started here ({first}); or workers=local") from error
            raise InputError(
                f"workers=ray: the cluster at address={self.address} cannot be reached ({first}): start it with "
                "RAY_AUTH_MODE=token ray start --head, with the same token; or leave workers.address out"
            ) from error
        slots = sum(self._room(node["Resources"], threads) for node in ray.nodes() if node["Alive"])
        if slots < self.count:
            ray.shutdown()
            raise InputError(
                f"workers=ray: the cluster has room for {slots} workers of {threads} CPUs and {self.gpus:g} GPUs, got "
                f"count={self.count}: add nodes, or workers.count={slots}"
            )
        self._ray = ray
        return ray

    def _room(self, node: Mapping[str, float], threads: int) -> int:
        """How many workers a node holds."""
        gpus = node.get("GPU", 0) // self.gpus if self.gpus else math.inf
        return int(min(node.get("CPU", 0) // threads, gpus))


class _Actor:
    """A Ray worker, by its handle. waiting: what its next message comes from."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle
        self._parcel: bytes | None = None
        self.waiting: Any = handle.begin.remote()

    def give(self, parcel: Any) -> None:
        self._parcel = cloudpickle.dumps(parcel)
        if self.waiting is None:
            self._ask()

    def _ask(self) -> None:
        self.waiting, self._parcel = self._handle.evaluated.remote(self._parcel), None

    def take(self) -> Any:
        try:
            streamed = hasattr(self.waiting, "__next__")
            message = cloudpickle.loads(self._ray.get(next(self.waiting) if streamed else self.waiting))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            raise LostError(" ".join(str(error).split())[:200]) from None
        if isinstance(message, Ready | Done):
            self.waiting = None
            if self._parcel is not None:
                self._ask()
        return message

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(self._handle)


def _actor() -> type:
    """The class of the actors, made here so that Ray sends it by value, before autoprune can be imported there."""

    class Holder:
        def __init__(self, path: Sequence[str], subject: bytes) -> None:
            import sys

            sys.path += [p for p in path if p not in sys.path]
            self._subject = subject

        def begin(self) -> bytes:
            import logging

            import cloudpickle

            from autoprune import crew

            self._said: list[Any] = []
            logger = logging.getLogger("autoprune")
            logger.addHandler(crew.Telling(self._said.append))
            logger.propagate = False
            try:
                self._holds = cloudpickle.loads(self._subject)
                del self._subject
            except Exception as error:  # noqa: BLE001, told to who can say it
                return bytes(cloudpickle.dumps(crew.Failed.of(error)))
            return bytes(cloudpickle.dumps(crew.Ready()))

        def evaluated(self, parcel: bytes) -> Iterator[bytes]:
            import cloudpickle

            from autoprune import crew

            try:
                for message in self._holds.evaluated(cloudpickle.loads(parcel)):
                    while self._said:
                        yield cloudpickle.dumps(self._said.pop(0))
                    yield cloudpickle.dumps(message)
                yield cloudpickle.dumps(crew.Done())
            except Exception as error:  # noqa: BLE001, told to who can say it
                yield cloudpickle.dumps(crew.Failed.of(error))

    return Holder
