"""The database that studies are kept in: opened by URL, and waited for while it is out of reach.

SQLite is in write-ahead mode, flushed at every trial. What a database says of its failures is told apart here: a full
disk stops a search, a lost connection or a lock has it wait.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from urllib.parse import quote

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages._rdb import models
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from autoprune.core import InputError, Progress, StorageError
from autoprune.untrusted import DAMAGED
from autoprune.writing import is_full

SQLITE = "sqlite:///"
MAKING = 20  # tries at making the tables
LOCKED_S = 60  # that SQLite waits for another writer by itself
PATIENCE_S = 600.0  # for a storage that was there and is out of reach
HIDDEN = "***"
PAUSE_S = 10.0  # between two tries, at most
# of libpq, so that a server whose machine is gone is seen to be: what PostgreSQL's drivers share
LIBPQ = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "tcp_user_timeout": 30_000}

Given = TypeVar("Given")


class UnreachableError(Exception):
    """The database is out of reach for now, or locked; the same call may be made again."""


class _Storage(optuna.storages.RDBStorage):
    """Writes what a new trial holds without asking for it first: Optuna looks for every parameter and attribute among
    those that are there, and whether the trial may be written at all, four fifths of the time that it takes."""

    def _set_trial_param_without_commit(
        self,
        session: sqlalchemy.orm.Session,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None = None,
    ) -> None:
        written = distribution_to_json(distribution)
        session.add(
            models.TrialParamModel(
                trial_id=trial_id,
                param_name=param_name,
                param_value=param_value_internal,
                distribution_json=written,
            )
        )

    def _set_trial_attr_without_commit(
        self,
        session: sqlalchemy.orm.Session,
        model_cls: type[models.TrialUserAttributeModel | models.TrialSystemAttributeModel],
        trial_id: int,
        key: str,
        value: Any,
    ) -> None:
        session.add(model_cls(trial_id=trial_id, key=key, value_json=json.dumps(value)))


def check_storage(storage: str | None) -> None:
    """Raises InputError where no study could be kept, before any time is spent on one."""
    with usable(storage):
        opened = open_storage(storage)
        try:
            opened.get_all_studies()
        finally:
            leave(opened)


@contextmanager
def usable(storage: str | None) -> Iterator[None]:
    """Errors of the storage inside are the user's, but for a full disk."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except (SQLAlchemyError, optuna.exceptions.OptunaError, UnreachableError, ImportError, *DAMAGED) as error:
        if is_full(error):
            raise StorageError(f"the disk is full: {shown(storage)} cannot be written") from error
        raise InputError(f"study.storage={shown(storage)} cannot be used: {_first_line(error)}") from error


def open_storage(storage: str | None) -> optuna.storages.BaseStorage:
    """An Optuna storage by URL, in memory for None, that says whether to wait (UnreachableError) or to stop."""
    if storage is None:
        return optuna.storages.InMemoryStorage()
    settings: dict[str, Any] = {"pool_pre_ping": True}
    if storage.startswith(SQLITE):
        _begin(storage)
        settings = {"connect_args": {"timeout": LOCKED_S}}
    elif storage.startswith("postgresql"):
        settings["connect_args"] = libpq(storage)
    opened = _made(storage, settings, told=storage)
    sqlalchemy.event.listen(opened.engine, "handle_error", lambda context: _told_apart(storage, context))
    if storage.startswith(SQLITE):
        sqlalchemy.event.listen(opened.engine, "connect", _write_ahead)
        opened.engine.dispose()  # connections made before the listener
    return opened


def open_to_read(storage: str) -> optuna.storages.BaseStorage:
    """An Optuna storage by URL of which nothing is made or changed. Raises as `usable` tells."""
    settings: dict[str, Any] = {}
    if storage.startswith(SQLITE):
        path = Path(storage.removeprefix(SQLITE))
        if not path.is_file():
            raise InputError(f"study.storage={shown(storage)} cannot be used: there is no file {path}")
        settings["creator"] = partial(_only_read, path)
    elif storage.startswith("postgresql"):
        settings["connect_args"] = libpq(storage)
    return optuna.storages.RDBStorage(storage, settings, skip_compatibility_check=True, skip_table_creation=True)


def patiently(storage: str | None, call: Callable[[], Given], progress: Progress) -> Given:
    """What the call gives, which Ctrl-C does not break into: made again, with growing pauses, as long as the storage is
    out of reach.

    Raises:
        StorageError: it stayed so for PATIENCE_S, or failed in another way.
    """
    try:
        return waiting(storage, unbroken()(call), progress)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, OSError) as error:
        raise StorageError(f"the study's storage {shown(storage)} failed: {_first_line(error)}") from error


def waiting(storage: str | None, call: Callable[[], Given], progress: Progress) -> Given:
    """As `patiently`, but that Ctrl-C breaks into it, and other failures are raised as they are."""
    began, pause = None, 1.0
    while True:
        try:
            given = call()
        except UnreachableError as error:
            if began is None:
                began = time.monotonic()
                progress.say(
                    f"the study's storage {shown(storage)} cannot be reached ({error}): waiting, trying again for up "
                    f"to {PATIENCE_S / 60:.3g} minutes"
                )
            if time.monotonic() - began > PATIENCE_S:
                raise StorageError(
                    f"the study's storage {shown(storage)} could not be reached for {PATIENCE_S / 60:.3g} minutes "
                    f"({error})"
                ) from error
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_S)
        else:
            if began is not None:
                away = time.monotonic() - began
                progress.say(f"the study's storage can be reached again after {away:.0f} s: the search goes on")
            return given


@contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C takes effect when this ends, only the second at once: within a transaction it may leave a connection that
    keeps the lock, for which this very process would wait when it gives the study up."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        if pressed:
            handler(number, frame)
        pressed.append(number)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(signal.SIGINT, None)


def leave(opened: optuna.storages.BaseStorage) -> None:
    """Close its connections."""
    if isinstance(opened, optuna.storages.RDBStorage):
        opened.engine.dispose()


def shown(storage: str | None) -> str:
    """The URL without its password, which has HIDDEN in its place."""
    try:
        url = sqlalchemy.make_url(storage or "")
    except (SQLAlchemyError, ValueError):
        return str(storage)
    secret = {key: HIDDEN for key in url.query if "password" in key.lower()}  # as libpq takes it too
    told = url.update_query_dict(secret).render_as_string(hide_password=True)
    return told.replace(quote(HIDDEN), HIDDEN)


def _begin(storage: str) -> None:
    """Make an SQLite file with all its tables, whole or not at all, where there is none: one whose making was cut short
    would lack the index that keeps a study's name its own, and nobody would notice."""
    path = Path(storage.removeprefix(SQLITE))
    if ":memory:" in storage or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(3).hex()}.tmp")
    try:
        leave(_made(f"{SQLITE}{temporary}", {}, told=storage))
        _name(temporary, path)
    finally:
        for made in path.parent.glob(f"{temporary.name}*"):  # its journal too
            made.unlink(missing_ok=True)


def _name(temporary: Path, path: Path) -> None:
    """Give a file its name, unless another search was faster."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a disk without hard links
        temporary.replace(path)


def _made(storage: str, settings: dict[str, Any], *, told: str) -> optuna.storages.RDBStorage:
    """A storage, its tables made where there are none: again where another search makes them at this instant, which
    Optuna does not foresee. told: the storage as errors call it."""
    tries = MAKING
    while True:
        try:
            return _Storage(storage, engine_kwargs=settings)
        except DBAPIError as error:
            tries -= 1
            raced = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
            if not (raced and tries):
                if meaning := _meaning(told, error):
                    raise meaning from error
                raise
        time.sleep(0.2)


def _write_ahead(connection: sqlite3.Connection, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")  # a trial that was recorded outlives the machine


def libpq(storage: str) -> dict[str, int]:
    """LIBPQ, but for what the URL itself says."""
    given = sqlalchemy.make_url(storage).query
    return {key: value for key, value in LIBPQ.items() if key not in given}


def _only_read(path: Path) -> sqlite3.Connection:
    """A connection to a database that is there; one that may write removes what write-ahead mode puts beside it."""
    place = f"file:{quote(str(path))}?mode=rw"
    connection = sqlite3.connect(place, uri=True, timeout=LOCKED_S, check_same_thread=False)
    connection.execute("PRAGMA query_only=ON")
    return connection


def _told_apart(storage: str, context: sqlalchemy.engine.ExceptionContext) -> None:
    """Raised in the place of SQLAlchemy's own, which Optuna would hide in one of its own, after tries of its own."""
    error = context.sqlalchemy_exception
    meaning = _meaning(storage, error) if isinstance(error, DBAPIError) and not context.is_pre_ping else None
    if meaning is not None:
        raise meaning


def _meaning(storage: str, error: DBAPIError) -> Exception | None:
    """What a database's error means for a search; None where it means nothing more than it says."""
    text = _first_line(error)
    name = getattr(error.orig, "sqlite_errorname", None)
    if name is None:
        if getattr(error.orig, "sqlstate", None) == "53100":
            return StorageError(f"the disk of {shown(storage)} is full: {text}")
        return UnreachableError(text) if isinstance(error, OperationalError | InterfaceError) else None
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return UnreachableError(text)
    path = Path(storage.removeprefix(SQLITE))
    unsaid = name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) and shutil.disk_usage(path.parent).free < 2**16
    if name == "SQLITE_FULL" or unsaid:
        return StorageError(f"the disk is full: {path} cannot be written ({text})")
    return None


def _first_line(error: Exception) -> str:
    """Of what the database's own driver said."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else None
    said = getattr(cause or error, "orig", None) or cause or error
    return (str(said).strip() or type(said).__name__).splitlines()[0]
