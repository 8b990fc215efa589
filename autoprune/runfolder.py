"""The folder of a run: its configuration and its log."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from autoprune import untrusted
from autoprune.configuration import save
from autoprune.core import InputError, StorageError
from autoprune.writing import is_full


def run_folder(config: dict[str, Any], task: str, what: str, name: str | None = None) -> Path:
    """A folder for this run, with the configuration and a log in it: a new one, or the one of this name."""
    base = Path(config["output"]) / task / what
    stamp, folder, count = time.strftime("%Y-%m-%d_%H-%M-%S"), Path(), 1
    _check_inside(Path(config["output"]), task, what, name or stamp)
    try:
        while name is None:
            folder = base / (stamp if count == 1 else f"{stamp}_{count}")
            try:
                folder.mkdir(parents=True, exist_ok=False)
                break
            except FileExistsError:
                if not folder.is_dir():
                    raise
                count += 1
        if name is not None:
            folder = base / name
            folder.mkdir(parents=True, exist_ok=True)
        save(config, folder / "config.yaml")
        handler = _Log(folder / "log.txt")
    except OSError as error:
        if is_full(error):
            raise StorageError(f"the disk is full: {folder} cannot be written") from error
        raise InputError(f"output={config['output']}: cannot write to {folder}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("autoprune")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    return folder


def check_finished(folder: Path) -> None:
    """Raises InputError for the folder of a search that is unfinished, with the line that goes on with it."""
    if (folder / "outset.json").exists() and not (folder / "ratios.yaml").exists():
        command = untrusted.json_of(folder / "outset.json").get("command", [])
        raise InputError(
            f"{folder} is of a search that is unfinished: go on with {shlex.join(map(str, command))}, or see what "
            f"there is with python -m autoprune report {folder}"
        )


class _Log(logging.FileHandler):
    """A run's log; a run is worth more than it, so that what cannot be written is said once and left out."""

    said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        if not self.said:
            sys.stderr.write(f"the log {self.baseFilename} cannot be written ({sys.exception()}): the run goes on\n")
        self.said = True


def _check_inside(output: Path, task: str, what: str, name: str) -> None:
    """Raises InputError where a name that a run's folder is made of leads out of the folder of all runs."""
    for place, text in (("the task's name", task), ("the strategy's name", what), ("name", name)):
        if "\0" in text or Path(text).is_absolute() or ".." in Path(text).parts:
            raise InputError(f"{place} is part of a path inside output={output}: it must not hold '..', got {text!r}")
