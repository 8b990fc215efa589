"""trials.csv, the file of all trials of a run: written once, and read again for its report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.core import Measurement, Trial
from autoprune.writing import whole

RATIO = "ratio:"  # what the columns of ratios begin with


@dataclass(frozen=True)
class Row:
    """A trial as the file has it: numbers that it lacks are NaN. change: the loss change with its interval. costs: by
    name. ratios [G]. Older files have no fidelity, which is 1 then."""

    number: int
    recovery: str
    parent: str
    about: Mapping[str, Any]
    fidelity: float
    score: float
    change: tuple[float, float, float]
    costs: Mapping[str, float]
    measured: bool
    feasible: bool | None
    error: str
    ratios: tuple[float, ...]

    @property
    def comparable(self) -> bool:
        """Whether it was scored on all images, or is an answer."""
        return not self.error and math.isfinite(self.score) and (self.fidelity >= 1 or self.measured)

    def keeps(self, budgets: Sequence[Mapping[str, Any]]) -> bool:
        """Whether its costs, predicted or measured, are within all limits."""
        within = all(self.costs.get(b["cost"], math.nan) <= b["limit"] for b in budgets)
        return within if self.feasible is None else self.feasible


def write(path: Path, trials: Sequence[Trial], groups: Sequence[str]) -> None:
    """Write the trials; groups: the names of all, in the order of the ratios."""
    costs = sorted({name for trial in trials for name in trial.costs})
    predicted = sorted({name for trial in trials for name in trial.predicted})
    with whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        head = ["number", "recovery", "parent", "about", "score", "score_low", "score_high", "loss", "loss_change"]
        head += ["loss_change_low", "loss_change_high", *costs, *(f"predicted {c}" for c in predicted), "measured"]
        head += ["feasible", "cached", "seconds", "error", "fidelity"]
        writer.writerow([*head, *(RATIO + name for name in groups)])
        for t in trials:
            change = t.loss_change or Measurement.exact(math.nan, "loss", "measured")
            row: list[object] = [
                t.number,
                t.candidate.recovery,
                "" if t.candidate.parent is None else t.candidate.parent,
                json.dumps(dict(t.candidate.about), separators=(",", ":")) if t.candidate.about else "",
                t.score,
                t.score_low,
                t.score_high,
                t.loss,
                change.value,
                change.low,
            ]
            row += [change.high, *(t.costs[c].value if c in t.costs else "" for c in costs)]
            row += [t.predicted.get(c, "") for c in predicted]
            row += [
                t.candidate.measure,
                "" if t.feasible is None else t.feasible,
                t.cached,
                round(t.seconds, 4),
                t.error or "",
                t.candidate.fidelity,
            ]
            writer.writerow([*row, *t.candidate.ratios])


def parsed(rows: Sequence[Mapping[str, str]], groups: Sequence[str], costs: Sequence[str]) -> tuple[Row, ...]:
    """The trials in a file's rows. Raises LookupError, TypeError or ValueError where they are of no trials."""
    return tuple(_row(row, groups, costs) for row in rows)


def _row(row: Mapping[str, str], groups: Sequence[str], costs: Sequence[str]) -> Row:
    about = json.loads(row["about"]) if row["about"] else {}
    if not isinstance(about, dict):
        raise TypeError(f"what a trial is about must be a mapping, got {about!r}")
    change = [_number(row, k) for k in ("loss_change", "loss_change_low", "loss_change_high")]
    return Row(
        number=int(row["number"]),
        recovery=row["recovery"],
        parent=row["parent"],
        about=about,
        fidelity=float(row.get("fidelity") or 1),
        score=_number(row, "score"),
        change=(change[0], change[1], change[2]),
        costs={cost: _number(row, cost) for cost in costs},
        measured=row.get("measured") == "True",
        feasible={"True": True, "False": False}.get(row.get("feasible", "")),
        error=row["error"],
        ratios=tuple(float(row[RATIO + name]) for name in groups),
    )


def _number(row: Mapping[str, str], name: str) -> float:
    return float(row.get(name) or math.nan)
