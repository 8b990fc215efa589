"""What kinds of workers have in common: what a worker and a crew can do, what they say, and how a subject is sent."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import cloudpickle

from autoprune.core import InputError, check_rules


class LostError(RuntimeError):
    """A worker died, or was killed; the message says how."""


class WorkersLostError(RuntimeError):
    """No worker can be kept running: nothing more can be evaluated, and what was recorded is kept."""


class Subject(Protocol):
    """What a worker holds: it answers a parcel with one message after the other."""

    def evaluated(self, parcel: Any) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Ready:
    """The worker holds its subject and waits for parcels."""


@dataclass(frozen=True)
class Done:
    """The parcel is finished."""


@dataclass(frozen=True)
class Failed:
    """The worker cannot hold its subject, or raised outside of a candidate; kind: what."""

    kind: str
    error: str

    @staticmethod
    def of(error: Exception) -> Failed:
        return Failed(type(error).__name__, str(error))


@dataclass(frozen=True)
class Said:
    """A line of the worker's log."""

    level: int
    text: str


class Worker(Protocol):
    """One worker. Messages are Ready, then what the subject yields and Done for each parcel; see above for others."""

    def give(self, parcel: Any) -> None:
        """Send it a parcel. A worker that is lost says so at `take`."""
        ...

    def take(self) -> Any:
        """The next message, once `Crew.telling` has named this worker. Raises LostError."""
        ...

    def kill(self) -> None:
        """End it, at once."""
        ...


class Workers:
    """Where candidates are evaluated."""


class Crew(Workers, ABC):
    """A kind of workers, as many as `count`. limit_s: how long a candidate may take at most."""

    count: int
    limit_s: float | None

    @abstractmethod
    def hire(self, subject: Subject, threads: int) -> Worker:
        """A new worker, which has begun to start."""

    @abstractmethod
    def telling(self, workers: Sequence[Any], timeout_s: float | None) -> list[Any]:
        """Those of the workers that have a message or are lost, as soon as there is one; none at the time-out."""

    @abstractmethod
    def close(self) -> None:
        """Give back what all workers have in common."""


def pack(subject: Subject, file: IO[bytes]) -> None:
    """Write a subject as bytes, for processes that read them at once.

    Raises:
        InputError: it holds something that no other process can be given.
    """
    try:
        cloudpickle.dump(subject, file)
        file.flush()
    except OSError:  # a full disk
        raise
    except Exception as error:
        raise InputError(
            f"workers: the task cannot be sent to another process ({type(error).__name__}: {error}): its model, loss, "
            "metric and training batches must not hold locks, open files or generators; or choose workers=serial"
        ) from error


def check_crew(place: str, count: int, limit_s: float | None) -> None:
    """Raises InputError for a setting that is out of its range."""
    rules = {
        "count must be a whole number, 1 or more": isinstance(count, int) and count >= 1,
        "limit_s must be null or above 0": limit_s is None or limit_s > 0,
    }
    check_rules(place, rules, {"count": count, "limit_s": limit_s})


class Telling(logging.Handler):
    """Lines of a worker's log go to who started it."""

    def __init__(self, tell: Callable[[Said], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._tell(Said(record.levelno, record.getMessage()))
