"""What the storage of the studies holds, and whether a search can use it: looked at, and nothing made of it."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import sqlalchemy

from autoprune.findings import Finding, Status, guarded
from autoprune.storage import libpq, shown
from autoprune.writing import nearest

AREA = "storage"
SHARED = ("nfs", "cifs", "smb", "fuse.sshfs", "9p", "afs", "lustre", "ceph", "gpfs", "glusterfs")  # disks of others
TABLES = ("studies", "trials")


def stock(storage: str | None) -> list[Finding]:
    """Of a storage by its URL; None for memory."""
    way_out = "give study.storage=sqlite:///PATH on a disk of this machine, or the URL of a database that is there"
    return guarded(AREA, "storage", lambda: _look(storage), way_out=way_out)


def _look(storage: str | None) -> Iterator[Finding]:
    if storage is None or ":memory:" in storage or re.fullmatch(r"sqlite(\+\w+)?:/{0,3}", storage):
        way_out = "study.storage=sqlite:///outputs/studies.db, to go on after an interruption"
        yield _found("storage", "in memory: gone when the search ends", "warning", way_out)
    elif file := re.match(r"sqlite(\+\w+)?:///", storage):
        path = Path(storage.removeprefix(file.group()))
        yield _sqlite(path)
        yield _locks(nearest(path))
    else:
        yield _database(storage)


def _found(what: str, detail: str, status: Status = "ok", way_out: str = "") -> Finding:
    return Finding(area=AREA, what=what, detail=detail, status=status, way_out=way_out)


def _sqlite(path: Path) -> Finding:
    there = path if path.exists() else nearest(path)
    folder = path.parent if path.parent.is_dir() else nearest(path)
    if not folder.is_dir() or not all(os.access(place, os.W_OK) for place in {there, folder}):
        way_out = "study.storage=sqlite:///PATH elsewhere"
        return _found("storage", f"{path}: {there} cannot be written", "failed", way_out)
    if not path.exists():
        absent = "" if path.parent.is_dir() else f", nor is its folder {path.parent}"
        return _found("storage", f"{path} is not there yet{absent}: the first search makes it")
    size = sum(each.stat().st_size for each in (path, Path(f"{path}-wal")) if each.exists()) / 1e6
    try:
        idle = not Path(f"{path}-wal").exists()  # else SQLite would make files beside it to read it
        address = f"file:{quote(str(path.resolve()))}?{'immutable=1' if idle else 'mode=ro'}"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=5)) as database:
            known = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type='table'")}
            counts = [database.execute(f"SELECT count(*) FROM {t}").fetchone()[0] if t in known else 0 for t in TABLES]
    except sqlite3.OperationalError as error:
        way_out = "another program may hold it: try again when it is done"
        return _found("storage", f"{path}: {error}", "warning", way_out)
    except sqlite3.DatabaseError as error:
        return _found("storage", f"{path}: {error}", "failed", f"move {path} away, or give another study.storage")
    return _found("storage", f"{path}: {counts[0]} studies, {counts[1]} trials, {size:.1f} MB")


def _locks(place: Path) -> Finding:
    """Whether the disk that a file of SQLite lies on has locks that hold."""
    kind = _filesystem(place)
    if kind.startswith(SHARED):
        way_out = "its locks may not hold: a disk of this machine, or PostgreSQL where several machines write"
        return _found("locks", f"{place} is on a shared disk ({kind})", "warning", way_out)
    return _found("locks", f"{place} is on a disk of this machine ({kind or 'unknown'})")


def _filesystem(place: Path) -> str:
    """The kind of the file system that a path lies on, as Linux says; "" elsewhere."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    whole = place.resolve()
    over = [(len(m[1]), m[2]) for m in mounts if whole.is_relative_to(m[1].replace("\\040", " "))]
    return max(over, default=(0, ""))[1]


def _database(storage: str) -> Finding:
    try:
        settings = libpq(storage) if storage.startswith("postgresql") else {}
        engine = sqlalchemy.create_engine(storage, connect_args=settings)
        with engine.connect() as connection:
            known = set(sqlalchemy.inspect(connection).get_table_names())
            counts = [
                connection.execute(sqlalchemy.text(f"SELECT count(*) FROM {table}")).scalar() if table in known else 0
                for table in TABLES
            ]
            writable = _may_write(connection, known)
        engine.dispose()
    except ImportError as error:
        way_out = "pip install 'autoprune[postgresql]', and begin the URL with postgresql+psycopg://"
        return _found("storage", f"{shown(storage)}: its driver {error.name} is not installed", "failed", way_out)
    except sqlalchemy.exc.SQLAlchemyError as error:
        said = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        way_out = "is the server there, and are the name and the password right?"
        return _found("storage", f"{shown(storage)}: {said}", "failed", way_out)
    if not writable:
        return _found("storage", f"{shown(storage)} may not be written", "failed", "let this user create and insert")
    return _found("storage", f"{shown(storage)}: {counts[0]} studies, {counts[1]} trials")


def _may_write(connection: sqlalchemy.Connection, known: set[str]) -> bool:
    if connection.dialect.name != "postgresql":
        return True  # not known without writing
    made, unmade = "has_table_privilege('trials', 'INSERT')", "has_schema_privilege(current_schema(), 'CREATE')"
    question = made if "trials" in known else unmade
    return bool(connection.execute(sqlalchemy.text(f"SELECT {question}")).scalar())
