"""A search that was interrupted, or still goes on: what its outset and its study tell of it so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoprune import untrusted
from autoprune.core import Trial
from autoprune.storage import HIDDEN
from autoprune.study import recorded


def so_far(folder: Path) -> tuple[dict[str, Any], tuple[Trial, ...]]:
    """The content of a run's outset.json with what a page needs beside it, and the trials that are recorded. The
    password of a database is in config.yaml alone.

    Raises:
        InputError: the study cannot be read.
        LookupError, TypeError, ValueError: the outset is of no search, or the trials are of another.
    """
    outset = untrusted.json_of(folder / "outset.json")
    search, groups, storage = outset["search"], outset["groups"], outset["search"]["storage"]
    if storage and HIDDEN in storage:
        storage = str(untrusted.yaml_of(folder / "config.yaml")["study"]["storage"])
    trials = recorded(storage, search["study"], [budget["cost"] for budget in outset["budgets"]])
    if any(len(trial.candidate.ratios) != len(groups) for trial in trials):
        raise ValueError(f"its study '{search['study']}' is of other groups")
    return {**outset, "finished": False, "search": {**search, "trials": len(trials)}}, trials
