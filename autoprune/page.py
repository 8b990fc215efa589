"""The page of a run: report.html, one file that is read offline, from what the run's files say alone."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from autoprune import figures, search_figures, trialfile
from autoprune.drawing import Figure
from autoprune.storage import shown

ABSENT: Mapping[str, Any] = {  # in older runs
    "cost_table": {"held_out": [], "answers": []},
    "layers": [],
    "rounds": [],
    "episodes": [],
    "findings": {},
    "command": [],
    "measured_again": [],
    "finished": True,
}
FEW = 40  # rows of a table that is not folded


def html(values: Mapping[str, Any], trials: Sequence[Mapping[str, str]]) -> tuple[str, list[Figure]]:
    """The self-contained page of a run, and the figures in it.

    values: the content of result.json, or of outset.json with what unfinished.py adds. trials: the rows of trials.csv.
    """
    values = {**ABSENT, **values}
    rows = trialfile.parsed(trials, list(values["groups"]), list(values["costs"]))
    best = (search_figures.best_so_far(rows, values["budgets"]) or [None])[-1]
    if best is not None and not values["finished"]:
        values["groups"] = _at(values["groups"], best.ratios)
    drawn = drawings(values, rows)
    environment = Environment(loader=PackageLoader("autoprune", "."), autoescape=True, undefined=StrictUndefined)
    scale = search_figures.scale_of(values["score"], rows)
    environment.filters.update(amount=amount, percent=percent, interval=with_interval)
    environment.filters.update(score=percent if scale.fraction else amount)
    environment.filters.update(change=points if scale.fraction else "{:+.4g}".format)
    page = environment.get_template("report.html.j2").render(
        values=values,
        figures={figure.name: figure for figure in drawn},
        tradeoffs=[figure.name for figure in drawn if figure.name.startswith("tradeoff_")],
        about=[json.loads(trials[made["winner"]]["about"]) for made in values["rounds"]],
        command=shlex.join(values["command"]),
        storage=shown(values["search"]["storage"]) if values["search"]["storage"] else "",  # older runs keep it whole
        best=best,
        sign=scale.sign,
        failed=sum(bool(row.error) for row in rows),
        few=FEW,
        **_tables(values),
    )
    return page, drawn


def drawings(values: Mapping[str, Any], rows: Sequence[trialfile.Row]) -> list[Figure]:
    """The figures that there is something to draw for, in the page's order."""
    chosen = values["finished"] or search_figures.best_so_far(rows, values["budgets"])
    found = [figures.ratios(values["groups"])] if chosen else []
    scored = any(not row.error and row.score == row.score for row in rows)
    if scored:
        costs = {budget["cost"]: budget for budget in reversed(values["budgets"])}
        found += [search_figures.tradeoff(values, rows, costs[cost]) for cost in reversed(costs)]
        found.append(search_figures.progress(values, rows))
    if curves := figures.sensitivity_curves(list(values["groups"]), rows):
        found.append(figures.sensitivity(values["groups"], curves))
    if values["rounds"]:
        found.append(search_figures.rounds(values, rows))
    if values["episodes"]:
        found.append(search_figures.rewards(values["episodes"]))
    if values["cost_table"]["held_out"]:
        found.append(figures.prediction(values["cost_table"]))
    if values["layers"]:
        found.append(figures.layers(values["layers"]))
    return found


def _at(groups: Mapping[str, Any], ratios: Sequence[float]) -> dict[str, Any]:
    """The groups of an outset with these ratios; what their layers cost then is not known from its numbers."""
    rows = zip(groups.items(), ratios, strict=True)
    found = {}
    for (name, group), ratio in rows:
        shares = {cost: [group[cost][0], math.nan] for cost in ("macs", "params") if cost in group}
        kept = group["size"] - round(ratio * group["size"])
        found[name] = {**group, "ratio": ratio, "kept": kept, **shares}
    return found


def _tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables of groups need to know beside them."""
    groups = values["groups"].values()
    searched = values["finished"] and values["search"]["study"]
    whole = [name for name, group in values["groups"].items() if searched and not group["ratio"]]
    return {
        "shares": [cost for cost in ("macs", "params") if groups and all(cost in group for group in groups)],
        "whole": whole,
        "kinds": all("kinds" in group for group in groups),
    }


def amount(value: float) -> str:
    """Four digits, with k, M or G."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (9999.5, "k")):
        if abs(value) >= scale:
            return f"{value / (1e3 if letter == 'k' else scale):.4g}{letter}"
    return f"{value:.4g}"


def with_interval(row: Mapping[str, Any]) -> str:
    """A value, with its interval where that has a width."""
    if row.get("low") == row.get("high"):
        return amount(row["value"])
    return f"{amount(row['value'])} [{amount(row['low'])}, {amount(row['high'])}]"


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.2f} %"


def points(value: float) -> str:
    """A difference of fractions in percentage points."""
    return f"{100 * value:+.2f} points"


def score(value: float, dense: float, sign: float) -> str:
    """A metric's value, in percent where it is a fraction."""
    return percent(value) if search_figures.is_fraction(dense, sign) else amount(value)


def score_change(value: float, dense: float, sign: float) -> str:
    """How far a metric's value is from that of the dense network."""
    return points(value - dense) if search_figures.is_fraction(dense, sign) else f"{value - dense:+.4g}"
