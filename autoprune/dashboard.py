"""Optuna's dashboard on the storage that studies are kept in, each study with the report of its search.

A report is an artifact of its study: a file in a folder of this machine, beside an SQLite file, else in the output
folder. Nothing of what is served is protected by a password, so that it is for this machine unless told otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.artifacts._upload import ARTIFACTS_ATTR_PREFIX
from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from autoprune.core import InputError, StorageError, check_rules
from autoprune.storage import UnreachableError, leave, open_storage, shown, usable
from autoprune.untrusted import DAMAGED

LOG = logging.getLogger("autoprune")
TABLES = {"studies", "trials", "version_info"}  # of every Optuna database
NOTE = "[The report of this search]"  # what a study's note begins with
INSTALL = "pip install 'autoprune[dashboard]'"


def artifacts_of(storage: str, output: str | Path) -> Path:
    """The folder of the reports: beside an SQLite file, in the output folder for any other database."""
    path = _file(storage)
    return (Path(output) if path is None else path.parent) / "artifacts"


def attach(report: Path, *, storage: str, study: str, output: str | Path) -> None:
    """Keep a report with its study, in the place of an earlier one of the same name; where that fails, a line in the
    log says so."""
    try:
        opened = open_storage(storage)
        try:
            _attach(report, opened, study, artifacts_of(storage, output))
        finally:
            leave(opened)
    except (StorageError, UnreachableError, SQLAlchemyError, OptunaError, ImportError, *DAMAGED) as error:
        LOG.warning("the report could not be attached to study '%s': %s: %s", study, type(error).__name__, error)


def _attach(report: Path, opened: optuna.storages.BaseStorage, name: str, folder: Path) -> None:
    study = optuna.load_study(study_name=name, storage=opened)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = FileSystemArtifactStore(folder)
    study.set_user_attr("folder", str(report.parent.resolve()))
    attributes = opened.get_study_system_attrs(study._study_id)
    metas = [json.loads(text) for key, text in attributes.items() if key.startswith(ARTIFACTS_ATTR_PREFIX)]
    kept = [meta["artifact_id"] for meta in metas if meta and meta["filename"] == report.name]  # null: deleted since
    if kept:
        with report.open("rb") as file:
            artifacts.write(kept[0], file)
    else:
        kept = [upload_artifact(artifact_store=artifacts, file_path=str(report), study_or_trial=study)]
    if importlib.util.find_spec("optuna_dashboard") is not None:
        _note(study, f"{NOTE}(/artifacts/{study._study_id}/{kept[0]}) ({report.parent})")


def _note(study: optuna.Study, text: str) -> None:
    """Lead people from the study's note to its report, but for a note of their own."""
    from optuna_dashboard import get_note, save_note

    if (earlier := get_note(study)) != text and (not earlier or earlier.startswith(NOTE)):
        save_note(study, text)


def serve(
    storage: str | None,
    *,
    artifacts: Path,
    host: str,
    port: int,
    browse: bool,
    listening: Callable[[str, int, bool], None],
) -> None:
    """Serve the dashboard until Ctrl-C. artifacts: the folder of the reports. port: 0 for a free one. browse: whether
    to open it in the browser of a desktop, where there is one. listening: called with the URL, how many studies there
    are, and whether only this machine can reach it, once it answers.

    Raises:
        InputError: there is no storage of Optuna's there, the dashboard is not installed, or nobody can listen there.
    """
    rules = {"0 <= port <= 65535": 0 <= port <= 65535, "host must be a name or an address": bool(host)}
    check_rules("dashboard", rules, {"port": port, "host": host})
    opened = _opened(storage)
    try:
        with usable(storage):
            count = len(opened.get_all_studies())
        server = _listening(host, port)
        with server, contextlib.suppress(KeyboardInterrupt):  # from before anybody is told that it listens
            if threading.current_thread() is threading.main_thread():  # a script's `&` would have it ignored
                signal.signal(signal.SIGINT, signal.default_int_handler)
            server.set_app(_application(opened, artifacts))
            url = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/dashboard"
            listening(url, count, _is_loopback(host))
            if browse:
                _open(url)
            server.serve_forever()
    finally:
        leave(opened)


def _opened(storage: str | None) -> optuna.storages.RDBStorage:
    """A storage that is there already, as Optuna itself opens it: a dashboard makes none."""
    if storage is None:
        raise InputError("study.storage=null: studies that are kept in memory cannot be shown; give study.storage=URL")
    with usable(storage):
        path = _file(storage)
        if path is not None and not path.is_file():
            raise InputError(
                f"study.storage={shown(storage)}: there is no file {path}: search first, or give study.storage=URL"
            )
        engine = sqlalchemy.create_engine(storage)
        try:
            tables = set(sqlalchemy.inspect(engine).get_table_names())
        finally:
            engine.dispose()
        if not tables >= TABLES:
            raise InputError(f"study.storage={shown(storage)} holds no studies: it must be a database of Optuna's")
        try:
            return optuna.storages.RDBStorage(storage)
        except RuntimeError as error:  # of another version
            raise InputError(f"study.storage={shown(storage)} cannot be used: {error}") from error


def _file(storage: str) -> Path | None:
    """The file of an SQLite storage."""
    try:
        url = sqlalchemy.make_url(storage)
    except (SQLAlchemyError, ValueError):  # no URL, or a port that is no number
        return None
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def _application(opened: optuna.storages.RDBStorage, artifacts: Path) -> Any:
    try:
        import optuna_dashboard
    except ImportError as error:
        raise InputError(f"optuna-dashboard is not installed ({error}): {INSTALL}") from error
    return optuna_dashboard.wsgi(opened, artifact_store=FileSystemArtifactStore(artifacts))


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no news."""
        LOG.debug("a request was not answered", exc_info=True)


class _SixServer(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Requests are no news."""


def _listening(host: str, port: int) -> WSGIServer:
    try:
        return (_SixServer if ":" in host else _Server)((host, port), _Handler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port={port} of {host} is taken: give another, or port=0 for a free one") from error
        raise InputError(f"host={host} port={port}: cannot listen there: {error.strerror or error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open(url: str) -> None:
    """Open a page in the browser of a desktop; without one, a browser of text would take the terminal."""
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):

        def browse() -> None:
            with contextlib.suppress(webbrowser.Error, OSError):
                webbrowser.open(url)

        threading.Thread(target=browse, daemon=True).start()
