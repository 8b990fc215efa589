"""Who searches a study: one row among the study's attributes, so that one search at a time writes to it.

The row tells the searcher's machine and process, and holds a count that grows as long as it lives. One whose process
ended on this machine is taken over from at once; one that shows no sign of life for QUIET_S, also from another machine.
No machine's clock is compared with another's.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sqlalchemy
from sqlalchemy import ColumnElement

from autoprune.core import InputError, StorageError

KEY = "searched by"
BEAT_S = 10.0
QUIET_S = 60.0
LOOK_S = 1.0
COLUMNS = ("study_id", "key", "value_json")
HELD: set[str] = set()  # tokens of this process's own
ROWS = sqlalchemy.table("study_user_attributes", *(sqlalchemy.column(name) for name in COLUMNS))  # Optuna's


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A search: host and since for people, machine, pid and began to find its process by, beats its signs of life."""

    host: str
    machine: str
    pid: int
    began: str | None
    since: str
    token: str
    beats: int = 0

    @staticmethod
    def here() -> Holder:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        pid, token = os.getpid(), uuid.uuid4().hex
        machine = _machine()
        return Holder(host=platform.node(), machine=machine, pid=pid, began=_began(pid), since=since, token=token)

    def ended(self) -> bool | None:
        """Whether its process has; None where that cannot be known from here."""
        if self.machine != _machine() or os.name != "posix":
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's
        began = _began(self.pid)
        if began is None or self.began is None:
            return None
        return began != self.began or (self.pid == os.getpid() and self.token not in HELD)

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"


class Lease:
    """One search's hold on a study. name: the study as people know it."""

    def __init__(self, engine: sqlalchemy.Engine, study_id: int, name: str) -> None:
        self._engine, self._name = engine, name
        self._row = (ROWS.c.study_id == study_id) & (ROWS.c.key == KEY)
        self._new = {"study_id": study_id, "key": KEY}
        self._mine = Holder.here()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def take(self, say: Callable[[str], None]) -> None:
        """Take hold of the study, and keep it until it is let go.

        Raises:
            InputError: another search holds it.
        """
        HELD.add(self._mine.token)
        try:
            self._wait(say)
        except BaseException:
            HELD.discard(self._mine.token)
            raise
        self._beating.start()

    def _wait(self, say: Callable[[str], None]) -> None:
        """Until the row is this search's own."""
        watched, began = None, 0.0
        while True:
            text, holder = self._read()
            if holder is not None and holder.token == self._mine.token:
                return
            quiet = watched is not None and time.monotonic() - began > QUIET_S
            ended = None if holder is None else holder.ended()
            if holder is None or ended or quiet:
                self._swap(text, self._mine)
                continue
            if ended is False or (watched is not None and text != watched):
                raise InputError(
                    f"study {self._name} is being searched already, by {holder}: wait until that search has ended, or "
                    "choose another study.name"
                )
            if watched is None:
                say(f"study {self._name} was left by {holder}: waiting up to {QUIET_S:.0f} s for a sign of life")
                watched, began = text, time.monotonic()
            time.sleep(LOOK_S)

    def renew(self) -> None:
        """Give a sign of life.

        Raises:
            StorageError: another search holds the study now, as none was given for long.
        """
        with self._lock:
            if self._update(self._own(), self._next()):
                self._mine = self._next()
                return
            _, holder = self._read()
        whose = "was deleted" if holder is None else f"is searched by another now, by {holder}"
        raise StorageError(f"study {self._name} {whose}")

    def let_go(self) -> None:
        """Give the study up, where it can be reached."""
        self._over.set()
        HELD.discard(self._mine.token)
        with self._lock, suppress(Exception), self._engine.begin() as connection:
            connection.execute(sqlalchemy.delete(ROWS).where(self._row, self._own()))

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with suppress(Exception):  # whoever records the next trial meets it too, and says so
                self.renew()

    def _next(self) -> Holder:
        return replace(self._mine, beats=self._mine.beats + 1)

    def _own(self) -> ColumnElement[bool]:
        """That the row is as this search left it: the answer to its last sign of life may have been lost."""
        return ROWS.c.value_json.in_([_text(self._mine), _text(self._next())])

    def _read(self) -> tuple[str | None, Holder | None]:
        with self._engine.connect() as connection:
            text = connection.execute(sqlalchemy.select(ROWS.c.value_json).where(self._row)).scalar()
        try:
            return text, None if text is None else Holder(**json.loads(text))
        except (TypeError, ValueError):
            return text, None  # of another version

    def _swap(self, text: str | None, holder: Holder) -> None:
        """Write the holder where the row still is as it was read."""
        if text is not None:
            self._update(ROWS.c.value_json == text, holder)
            return
        with suppress(sqlalchemy.exc.IntegrityError), self._engine.begin() as connection:
            connection.execute(sqlalchemy.insert(ROWS).values(**self._new, value_json=_text(holder)))

    def _update(self, where: ColumnElement[bool], holder: Holder) -> bool:
        with self._engine.begin() as connection:
            change = sqlalchemy.update(ROWS).where(self._row, where).values(value_json=_text(holder))
            return connection.execute(change).rowcount == 1


def _text(holder: Holder) -> str:
    return json.dumps(asdict(holder))


def _machine() -> str:
    """What process numbers are told apart by: this start of the kernel and, in a container, the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's own count; nothing where it has ended, None where that cannot be read."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if state in "ZX" else rest[18]
