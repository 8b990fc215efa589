"""A search that was interrupted, or still goes on: what its outset and its study tell of it so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune.core import Trial
from autoprune.study import recorded


def so_far(outset: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Trial, ...]]:
    """The content of outset.json with what a page needs beside it, and the trials that are recorded.

    Raises:
        InputError: the study cannot be read.
        LookupError, TypeError, ValueError: the outset is of no search, or the trials are of another.
    """
    search, groups = outset["search"], outset["groups"]
    trials = recorded(search["storage"], search["study"], [budget["cost"] for budget in outset["budgets"]])
    if any(len(trial.candidate.ratios) != len(groups) for trial in trials):
        raise ValueError(f"its study '{search['study']}' is of other groups")
    return {**outset, "finished": False, "search": {**search, "trials": len(trials)}}, trials
