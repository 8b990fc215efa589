"""The page of a run: report.html, one file that is read offline, from result.json and trials.csv alone."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATIO = "ratio:"  # what the columns of ratios in trials.csv begin with
SMOOTHED = 25  # episodes that a reward is averaged over
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#808080"  # apart for colour-blind eyes (Okabe & Ito, 2008)


def html(values: Mapping[str, Any], trials: Sequence[Mapping[str, str]]) -> str:
    """The self-contained page of a run: result.json's content and the rows of trials.csv."""
    environment = Environment(loader=PackageLoader("autoprune", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(amount=amount, percent=percent, points=points, interval=with_interval)
    curves = sensitivity_curves(values["groups"], trials)
    values = {
        "cost_table": {"held_out": [], "answers": []},
        "layers": [],
        "rounds": [],
        "episodes": [],
        **values,
    }  # absent in older runs
    return environment.get_template("report.html.j2").render(
        values=values,
        ratios=_ratios_svg(values),
        sensitivity=_sensitivity_svg(values, curves) if curves else "",
        prediction=_prediction_svg(values["cost_table"]) if values["cost_table"]["held_out"] else "",
        layers=_layers_svg(values["layers"]) if values["layers"] else "",
        rounds=_rounds_svg(values, trials) if values["rounds"] else "",
        rewards=_rewards_svg(values["episodes"]) if values["episodes"] else "",
        about=[json.loads(trials[made["winner"]]["about"]) for made in values["rounds"]],
    )


def sensitivity_curves(
    groups: Mapping[str, Any], trials: Sequence[Mapping[str, str]]
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Group -> (ratio, loss change, low, high) of the trials of a sweep that prune that group alone, by ratio."""
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for trial in trials:
        if trial.get("parent") or trial.get("about"):
            continue  # of a round, not of a sweep
        pruned = [name for name in groups if float(trial[RATIO + name]) > 0]
        if len(pruned) == 1 and trial["recovery"] == "probe" and not trial["error"]:
            change = (float(trial[k]) for k in ("loss_change", "loss_change_low", "loss_change_high"))
            value, low, high = change
            curves.setdefault(pruned[0], []).append((float(trial[RATIO + pruned[0]]), value, low, high))
    return {name: sorted(curves[name]) for name in groups if name in curves}


def _ratios_svg(values: Mapping[str, Any]) -> str:
    names = list(values["groups"])
    drawn, axes = figure(7.5, 0.6 + 0.26 * len(names), 1, 1)
    ratios = [values["groups"][name]["ratio"] for name in names]
    axes[0].barh(range(len(names)), [1.0] * len(names), color=GREY, alpha=0.25, height=0.7)
    axes[0].barh(range(len(names)), ratios, color=ORANGE, height=0.7)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1)
    axes[0].set_xlabel("ratio: fraction of units removed, in the network's order")
    return svg(drawn)


def _sensitivity_svg(
    values: Mapping[str, Any], curves: Mapping[str, Sequence[tuple[float, float, float, float]]]
) -> str:
    rows = math.ceil(len(curves) / 3)
    drawn, axes = figure(9.0, 1.9 * rows + 0.4, rows, 3)
    top = max(high for points in curves.values() for *_, high in points)
    for axis, (name, points) in zip(axes, curves.items(), strict=False):
        x, y, low, high = zip(*((0.0, 0.0, 0.0, 0.0), *points), strict=True)
        axis.fill_between(x, low, high, color=BLUE, alpha=0.25, linewidth=0)
        axis.plot(x, y, color=BLUE, marker="o", markersize=3, linewidth=1.2)
        axis.axvline(values["groups"][name]["ratio"], color=ORANGE, linestyle="--", linewidth=1.2)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_ylim(min(-0.01, min(low)), top * 1.1)
        axis.set_xlim(0, 1)
        axis.set_title(name, fontsize=9)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    drawn.supxlabel("ratio of this group alone (dashed: chosen)", fontsize=9, color=GREY)
    drawn.supylabel("loss increase over dense, 95 % interval", fontsize=9, color=GREY)
    return svg(drawn)


def _prediction_svg(table: Mapping[str, Any]) -> str:
    drawn, axes = figure(4.5, 4.2, 1, 1)
    answers = [(a["predicted"], a["measured"]) for a in table["answers"] if a["cost"] == "latency_ms"]
    top = 1.05 * max(value for pair in (*table["held_out"], *answers) for value in pair)
    axes[0].plot([0, top], [0, top], color=GREY, linewidth=0.8)
    axes[0].plot(*zip(*table["held_out"], strict=True), "o", color=BLUE, markersize=4)
    if answers:
        axes[0].plot(*zip(*answers, strict=True), "x", color=ORANGE, markersize=8, markeredgewidth=2)
    axes[0].set_xlim(0, top)
    axes[0].set_ylim(0, top)
    axes[0].set_xlabel("predicted ms")
    axes[0].set_ylabel("measured ms", color=GREY)
    return svg(drawn)


def _layers_svg(layers: Sequence[Mapping[str, Any]]) -> str:
    drawn, axes = figure(7.5, 0.6 + 0.2 * len(layers), 1, 1)
    places = range(len(layers))
    axes[0].barh(places, [row["dense_ms"] for row in layers], color=GREY, alpha=0.35, height=0.8, label="dense")
    axes[0].barh(places, [row["pruned_ms"] for row in layers], color=ORANGE, height=0.4, label="pruned")
    axes[0].set_yticks(places, [row["name"] for row in layers])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("ms")
    axes[0].legend(frameon=False, labelcolor=GREY, fontsize=8)
    return svg(drawn)


def _rounds_svg(values: Mapping[str, Any], trials: Sequence[Mapping[str, str]]) -> str:
    """Score against the first budget's cost: the proposals of all rounds, and the way of the winners."""
    budget, rounds = values["budgets"][0], values["rounds"]
    drawn, axes = figure(7.5, 4.0, 1, 1)
    for recovery, colour, label in (("probe", GREY, "before fine-tuning"), ("short", BLUE, "fine-tuned")):
        proposed = (trials[n] for made in rounds for n in made["proposals"])
        shown = [t for t in proposed if t["recovery"] == recovery and not t["error"]]
        if shown:
            x, y = zip(*((float(t[budget["cost"]]), float(t["score"])) for t in shown), strict=True)
            axes[0].plot(x, y, "o", color=colour, alpha=0.6, markersize=3, label=f"proposals, {label}")
    dense = (t for t in trials if not t["error"] and not any(float(t[RATIO + name]) for name in values["groups"]))
    way = [(values["costs"][budget["cost"]]["dense"], float(t["score"])) for t in dense][:1]
    way += [(made["measured"][0], made["score_after"]) for made in rounds]
    axes[0].plot(*zip(*way, strict=True), color=ORANGE, marker="o", markersize=5, linewidth=1.2, label="winners")
    axes[0].axvline(budget["limit"], color=GREY, linestyle="--", linewidth=1.2)
    axes[0].set_xlabel(
        f"{budget['cost']} in {budget['unit']}: winners measured, proposals predicted; dashed: the limit"
    )
    axes[0].set_ylabel(f"score on the search split ({values['score']['metric']})", color=GREY)
    axes[0].legend(frameon=False, labelcolor=GREY, fontsize=8)
    return svg(drawn)


def _rewards_svg(episodes: Sequence[Mapping[str, Any]]) -> str:
    """The reward of each episode, its mean over the last SMOOTHED, and the mean of the random walks at first."""
    drawn, axes = figure(7.5, 3.2, 1, 1)
    rewards = [walked["reward"] for walked in episodes]
    recent = [rewards[max(0, i + 1 - SMOOTHED) : i + 1] for i in range(len(rewards))]
    axes[0].plot(rewards, "o", color=BLUE, alpha=0.4, markersize=2, label="episodes")
    axes[0].plot([sum(r) / len(r) for r in recent], color=ORANGE, linewidth=1.5, label=f"mean of the last {SMOOTHED}")
    axes[0].axhline(warm_up_mean(episodes), color=GREY, linestyle="--", linewidth=1.2, label="mean of the warm-up")
    axes[0].set_xlabel("episode")
    axes[0].set_ylabel("reward", color=GREY)
    axes[0].legend(frameon=False, labelcolor=GREY, fontsize=8)
    return svg(drawn)


def warm_up_mean(episodes: Sequence[Mapping[str, Any]]) -> float:
    """The mean reward of an agent's random walks."""
    rewards: list[float] = [walked["reward"] for walked in episodes if walked["sigma"] is None]
    return sum(rewards) / len(rewards)


def figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """An empty figure in inches, and its axes row by row."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.tick_params(colors=GREY, labelsize=8)
        axis.xaxis.label.set_color(GREY)
        axis.title.set_color(GREY)
        axis.patch.set_alpha(0)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    drawn.patch.set_alpha(0)
    return drawn, axes


def svg(drawn: Figure) -> str:
    """SVG text to stand inside a page; text stays text, and the same figure gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "autoprune"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def amount(value: float) -> str:
    """Four digits, with k, M or G."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
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
