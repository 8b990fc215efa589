"""A batch of candidates spread over workers, which may die: trials come back in order, the same as in one process.

Candidates that may be scored together go out in as many parcels as there are workers, dealt like cards, because what
runs again for a candidate differs most between neighbours; every other one goes out alone. What is measured is measured
here, with nothing running beside it.

A worker that is lost takes nothing along but what it had not sent: each of these goes out once more, alone, so that
the one that kills its workers is told from those beside it. What has lost DEATHS workers alone is a failed trial, and
so is, at once, what took longer than the limit alone. The limit holds for parcels too: where a whole parcel did not
keep it, and each of its candidates does, candidates go out alone from then on. Where no worker comes up STARTS times in
a row, the search ends.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from autoprune.core import Candidate, InputError, StorageError, Trial
from autoprune.crew import Crew, Done, Failed, LostError, Ready, Said, Workers, WorkersLostError
from autoprune.evaluate import Evaluator

LOG = logging.getLogger("autoprune")
DEATHS = 3
STARTS = 10
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")
START_S = 300.0  # for a worker to come up
GRACE_S = 1.0  # a time limit is looked after so much later, for what is on its way

Numbered = tuple[int, Candidate]
Evaluate = Callable[[Sequence[Numbered]], Iterator[Trial]]


@dataclass
class _Hired:
    """A worker and what it has to do. until: the moment at which it is given up, by time.monotonic()."""

    worker: Any
    ready: bool = False
    left: deque[Numbered] = field(default_factory=deque)
    alone: bool = False
    began: float = 0.0
    until: float = 0.0


def over(evaluator: Evaluator, workers: Workers) -> AbstractContextManager[Evaluate]:
    """What evaluates as the evaluator does, where it is to be done, for as long as the context lasts."""
    return Spread(evaluator, workers) if isinstance(workers, Crew) else nullcontext(evaluator)


class Spread:
    """Evaluates as its evaluator does, over a crew of workers; a context that ends them.

    Raises:
        InputError: the evaluator holds what cannot be sent to another process, or no worker can read it.
        StorageError: a disk is full.
        WorkersLostError: no worker can be kept running.
    """

    def __init__(self, evaluator: Evaluator, crew: Crew) -> None:
        self._evaluator, self._crew = evaluator, crew
        self._subject = evaluator.elsewhere()
        self._hired: list[_Hired] = []
        self._lost_starting = 0
        self._together = True

    def __enter__(self) -> Spread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as each:
            each.callback(self._crew.close)
            for hired in list(self._hired):
                each.callback(self._dismiss, hired)

    def __call__(self, batch: Sequence[Numbered]) -> Iterator[Trial]:
        self._evaluator.expect(batch)
        here = {number for number, candidate in batch if candidate.measure or self._evaluator.knows(candidate)}
        arriving = self._spread([each for each in batch if each[0] not in here])
        waiting: list[tuple[int, Trial]] = []
        try:
            for number, candidate in batch:
                if number in here:
                    for trial in arriving if candidate.measure else ():
                        heapq.heappush(waiting, (trial.number, trial))
                    yield from self._evaluator.trials([(number, candidate)])
                    continue
                while not waiting or waiting[0][0] != number:
                    trial = next(arriving)
                    heapq.heappush(waiting, (trial.number, trial))
                yield heapq.heappop(waiting)[1]
            next(arriving, None)  # all have arrived: it only draws its conclusions
        finally:
            for hired in [hired for hired in self._hired if hired.left]:  # left off in the middle
                self._dismiss(hired)

    def _spread(self, batch: Sequence[Numbered]) -> Iterator[Trial]:
        """Trials as they arrive."""
        jobs: deque[tuple[Numbered, ...]] = deque()
        for part in self._evaluator.alike(batch):
            hands = min(self._crew.count, len(part)) if self._together else len(part)
            jobs.extend(tuple(part[i::hands]) for i in range(hands))
        deaths: Counter[int] = Counter()
        slow_together, slow_alone = False, False
        while jobs or any(hired.left for hired in self._hired):
            self._give(jobs)
            for hired in self._telling():
                try:
                    trial = self._took(hired, hired.worker.take())
                except LostError as error:
                    yield from self._lost(hired, f"its worker {error}", jobs, deaths)
                    continue
                if trial is not None:
                    yield trial
            for hired in self._late():
                slow_alone |= hired.ready and hired.alone
                slow_together |= hired.ready and not hired.alone
                if hired.ready and hired.alone:
                    number, candidate = hired.left.popleft()
                    late = f"it took longer than limit_s={self._crew.limit_s:g} and was killed"
                    yield _failed(number, candidate, late, time.monotonic() - hired.began)
                yield from self._lost(hired, "its worker was killed at its limit", jobs, deaths)
        if slow_together and not slow_alone:
            self._together = False
            LOG.warning(
                "limit_s=%g is enough for each candidate but not for those that are scored together: from now on they "
                "go out alone, which takes longer",
                self._crew.limit_s,
            )

    def _give(self, jobs: deque[tuple[Numbered, ...]]) -> None:
        """A job to everyone who has none, and a worker to a job while there are fewer than the crew counts."""
        while jobs:
            free = next((hired for hired in self._hired if not hired.left), None)
            if free is None and len(self._hired) < self._crew.count:
                try:
                    worker = self._crew.hire(self._subject, self._evaluator.scoring.threads)
                except OSError as error:
                    raise WorkersLostError(f"no worker can be started: {error}") from error
                free = _Hired(worker, until=time.monotonic() + START_S)
                self._hired.append(free)
            if free is None:
                return
            job = jobs.popleft()
            free.left, free.alone = deque(job), len(job) == 1
            self._wind(free)
            free.worker.give(self._evaluator.parcel(job))

    def _wind(self, hired: _Hired) -> None:
        """The clock of a worker that begins with its candidates, or goes on with the next."""
        if hired.ready:
            hired.began = time.monotonic()
            limit = self._crew.limit_s
            hired.until = float("inf") if limit is None else hired.began + limit + GRACE_S

    def _telling(self) -> list[_Hired]:
        busy = {id(hired.worker): hired for hired in self._hired if hired.left or not hired.ready}
        left = min(hired.until for hired in busy.values()) - time.monotonic()
        timeout = None if left == float("inf") else max(left, 0.0)
        return [busy[id(worker)] for worker in self._crew.telling([h.worker for h in busy.values()], timeout)]

    def _late(self) -> list[_Hired]:
        """Those that are past their moment and silent: what has come meanwhile, while a trial was recorded, counts."""
        now = time.monotonic()
        late = {id(hired.worker): hired for hired in self._hired if hired.left and hired.until <= now}
        for worker in self._crew.telling([hired.worker for hired in late.values()], 0) if late else ():
            del late[id(worker)]
        return list(late.values())

    def _took(self, hired: _Hired, message: Any) -> Trial | None:
        match message:
            case Said(level, text):
                LOG.log(level, "%s", text)
            case Ready():
                hired.ready, self._lost_starting = True, 0
                self._wind(hired)
            case Done():
                pass
            case Failed(kind, error) if kind == StorageError.__name__:
                raise StorageError(error)
            case Failed(kind, error) if kind in OUT_OF_MEMORY:
                raise LostError(f"ran out of memory ({error})")
            case Failed(kind, error):
                raise InputError(
                    f"workers: another process cannot evaluate this task ({kind}: {error}): choose workers=serial"
                )
            case _:
                trial = self._evaluator.took(message)
                hired.left.popleft()
                self._wind(hired)
                return trial
        return None

    def _lost(
        self, hired: _Hired, reason: str, jobs: deque[tuple[Numbered, ...]], deaths: Counter[int]
    ) -> Iterator[Trial]:
        """What a lost worker had left goes out again, or has failed."""
        self._dismiss(hired)
        if not hired.ready:
            self._lost_starting += 1
            if self._lost_starting >= STARTS and not any(other.ready for other in self._hired):
                raise WorkersLostError(f"{STARTS} workers in a row could not be started; of the last, {reason}")
        elif hired.left:
            LOG.warning("%s; %d candidates go to others", reason, len(hired.left))
        for number, candidate in reversed(hired.left):
            deaths[number] += hired.ready and hired.alone
            if deaths[number] == DEATHS:
                error = f"{DEATHS} workers were lost on it alone; of the last, {reason}"
                yield _failed(number, candidate, error, time.monotonic() - hired.began)
            else:
                jobs.appendleft(((number, candidate),))

    def _dismiss(self, hired: _Hired) -> None:
        self._hired.remove(hired)
        hired.worker.kill()


def _failed(number: int, candidate: Candidate, error: str, seconds: float) -> Trial:
    return Trial(number=number, candidate=candidate, error=error, seconds=seconds)
