"""The figures of a pruned network: what was taken from each group, what that cost, and what is known of the costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoprune.drawing import BLUE, GREY, INK, ORANGE, Figure, figure, legend, marks, svg
from autoprune.trialfile import Row

FEW = 36  # rows of a figure that has room for large ones
LONGEST = 36  # letters of a name beside an axis
Curves = Mapping[str, Sequence[tuple[float, float, float, float]]]


def ratios(groups: Mapping[str, Any]) -> Figure:
    """Every group's ratio in the network's order, and its layers' share of the costs before and after."""
    title = "Ratio of each group"
    shares = [c for c in ("macs", "params") if groups and all(c in g for g in groups.values())]
    rows = tuple(
        (
            name,
            ", ".join(g.get("kinds", ())),
            g["size"],
            g["kept"],
            g["ratio"],
            *(100 * s for c in shares for s in g[c]),
        )
        for name, g in groups.items()
    )
    heads: tuple[str, ...] = (
        "group",
        "kinds of its layers",
        "units",
        "kept units",
        "ratio (fraction of units removed)",
    )
    heads += tuple(f"{cost} {when} (% of the dense network)" for cost in shares for when in ("before", "after"))
    labels = [f"{_short(name)}  {_kind(groups[name])}".rstrip() for name in groups]
    drawn, axes = figure(8.2, _height(len(rows)), 1, 1 + len(shares), sharey=True)
    places = range(len(rows))
    small = 8 if len(rows) <= FEW else 6.5
    axes[0].barh(places, [1.0] * len(rows), color=GREY, alpha=0.22, height=0.72)
    axes[0].barh(places, [row[4] for row in rows], color=ORANGE, height=0.72)
    for place, row in enumerate(rows):
        kept = f"{row[3]} of {row[2]}"
        axes[0].text(0.98, place, kept, ha="right", va="center", fontsize=small - 1, color=INK)
    axes[0].set_xlim(0, 1)
    axes[0].set_xlabel("ratio: fraction of units removed")
    for i, cost in enumerate(shares):
        axis = axes[i + 1]
        axis.barh(places, [row[5 + 2 * i] for row in rows], color=GREY, alpha=0.35, height=0.72, label="before")
        if not any(math.isnan(row[6 + 2 * i]) for row in rows):
            axis.barh(places, [row[6 + 2 * i] for row in rows], color=BLUE, height=0.36, label="after")
        axis.set_xlabel(f"{'MACs' if cost == 'macs' else 'parameters'}, % of all in dense")
        legend(axis, columns=2)
    axes[0].set_yticks(places, labels, fontsize=small)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    says = "From the input (top) to the output (bottom); the numbers are the units kept."
    if shares:
        says += " The shares are of all layers that a group cuts: a layer between two groups counts for both."
    return Figure("ratios", title, says, heads, rows, svg(drawn, "ratios", title))


def sensitivity_curves(groups: Sequence[str], trials: Sequence[Row]) -> Curves:
    """Group -> (ratio, loss change, low, high) of the trials of a sweep that prune that group alone, by ratio."""
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for trial in trials:
        if trial.parent or trial.about or trial.error or trial.recovery != "probe":
            continue  # of a round or a walk, not of a sweep
        pruned = [i for i, ratio in enumerate(trial.ratios) if ratio > 0]
        if len(pruned) == 1 and all(map(math.isfinite, trial.change)):
            curves.setdefault(groups[pruned[0]], []).append((trial.ratios[pruned[0]], *trial.change))
    return {name: sorted(curves[name]) for name in groups if name in curves}


def sensitivity(groups: Mapping[str, Any], curves: Curves) -> Figure:
    """Small curves, one a group: what its pruning alone costs in loss."""
    title = "Sensitivity of each group"
    heads = ("group", "ratio (fraction of units removed)", "loss increase over dense", "low (95 %)", "high (95 %)")
    rows = tuple((name, *point) for name, points in curves.items() for point in points)
    columns = min(4, len(curves))
    lines = math.ceil(len(curves) / columns)
    width, height = 8.6, 1.5 * lines + 0.9
    drawn, axes = figure(width, height, lines, columns, layout="none")
    space = {"left": 0.75 / width, "right": 0.99, "bottom": 0.55 / height, "top": 1 - 0.3 / height}
    drawn.subplots_adjust(**space, hspace=0.32, wspace=0.1)
    top = max(high for points in curves.values() for *_, high in points)
    least = min(low for points in curves.values() for *_, low, _ in points)
    fine = (0.01,) if top < 0.1 else ()
    ticks = [t for t in (-1.0, -0.1, 0.0, *fine, 0.1, 1.0, 10.0, 100.0) if least <= t <= top or t == 0]
    for i, (axis, (name, points)) in enumerate(zip(axes, curves.items(), strict=False)):
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set(xlim=(0, 1), ylim=(min(-0.01, least), max(top, 0.01) * 1.2))  # each its own: sharing takes the square
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"] if i + columns >= len(curves) else [""] * 3)
        axis.set_yticks(ticks, [f"{t:g}" if i % columns == 0 else "" for t in ticks])
        axis.minorticks_off()
        if i % columns == 0:
            axis.set_ylabel("loss increase", fontsize=8)
        x, y, low, high = zip(*((0.0, 0.0, 0.0, 0.0), *points), strict=True)
        axis.fill_between(x, low, high, color=BLUE, alpha=0.25, linewidth=0)
        axis.plot(x, y, color=BLUE, marker="o", markersize=2.5, linewidth=1.1)
        axis.axvline(groups[name]["ratio"], color=ORANGE, linestyle="--", linewidth=1.2)
        axis.set_title(_short(name, 26), fontsize=8, pad=3, loc="left", color=INK)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    drawn.supxlabel("ratio of this group alone: fraction of units removed", fontsize=9, color=INK, y=0.07 / height)
    says = (
        "Loss increase on the search split when one group alone is pruned, before any fine-tuning; shaded: 95 % "
        "interval; dashed: the chosen ratio. The loss axis is linear to 0.01 and logarithmic beyond."
    )
    return Figure("sensitivity", title, says, heads, rows, svg(drawn, "sensitivity", title))


def prediction(table: Mapping[str, Any]) -> Figure:
    """Networks that tell the cost table's error, and the answers that were measured."""
    title = "Predicted and measured latency"
    rows = tuple(("held-out network", *pair) for pair in table["held_out"])
    rows += tuple((f"trial {a['trial']}", a["predicted"], a["measured"]) for a in table["answers"] if _timed(a))
    held_out, answers = ([row[1:] for row in rows if row[0].startswith(what)] for what in ("held", "trial"))
    drawn, axes = figure(4.8, 4.6, 1, 1)
    top = 1.05 * max(value for pair in (*held_out, *answers) for value in pair)
    axes[0].plot([0, top], [0, top], color=GREY, linewidth=0.8)
    for pairs, shape, colour, label in (
        (held_out, "dot", BLUE, "held-out networks"),
        (answers, "cross", ORANGE, "answers"),
    ):
        marks(axes[0], pairs, shape, colour=colour, label=label, size=1.8 if shape == "cross" else None)
    axes[0].set_xlim(0, top)
    axes[0].set_ylim(0, top)
    axes[0].set_xlabel("predicted latency in ms")
    axes[0].set_ylabel("measured latency in ms")
    legend(axes[0])
    says = (
        "Networks that the device's cost table was not fitted to, and answers measured in fresh processes; on the "
        "line, both are equal."
    )
    heads = ("network", "predicted (ms)", "measured (ms)")
    return Figure("prediction", title, says, heads, rows, svg(drawn, "prediction", title))


def _timed(answer: Mapping[str, Any]) -> bool:
    return bool(answer["cost"] == "latency_ms")


def layers(times: Sequence[Mapping[str, Any]]) -> Figure:
    """What each layer takes in the dense and in the final network."""
    title = "What each layer takes"
    rows = tuple((row["name"], row["dense_ms"], row["pruned_ms"]) for row in times)
    drawn, axes = figure(8.2, _height(len(rows)), 1, 1)
    places = range(len(rows))
    axes[0].barh(places, [row[1] for row in rows], color=GREY, alpha=0.35, height=0.72, label="dense")
    axes[0].barh(places, [row[2] for row in rows], color=ORANGE, height=0.36, label="pruned")
    axes[0].set_yticks(places, [_short(row[0]) for row in rows], fontsize=8 if len(rows) <= FEW else 6.5)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    axes[0].set_xlabel("latency in ms")
    legend(axes[0])
    says = (
        "Milliseconds on the device, medians of 20 passes in one process; activations and additions are in none of "
        "them."
    )
    heads = ("layer", "dense (ms)", "pruned (ms)")
    return Figure("layers", title, says, heads, rows, svg(drawn, "layers", title))


def _height(rows: int) -> float:
    """Inches that so many bars take."""
    return 0.85 + (0.26 if rows <= FEW else 0.17) * rows


def _kind(group: Mapping[str, Any]) -> str:
    """The kind of layer that a group's units are of."""
    return str(next(iter(group.get("kinds", ())), ""))


def _short(name: str, most: int = LONGEST) -> str:
    """A name whose end tells it from others."""
    return name if len(name) <= most else "…" + name[1 - most :]
