"""What people see and take away: the screen while searching, the tables after it, and the files of a run."""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from autoprune.core import InputError, Measurement, PruningSpace, Trial
from autoprune.meters.fitted import stair_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

    from autoprune.final import FineTuned
    from autoprune.meters.profile import CostTable
    from autoprune.result import Result

RATIO = "ratio:"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#808080"  # apart for colour-blind eyes (Okabe & Ito, 2008)


VERDICTS = {
    True: "[green]met[/]",
    False: "[bold red]not met[/]; this is the closest found",
    None: "[bold yellow]undecided[/]: the measurement was disturbed, run it again on a quieter machine",
}


class Screen:
    """Progress on the console: a live bar with the time left on a terminal, plain lines elsewhere."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._console = Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task: TaskID | None = None
        self._name, self._done, self._began = "", 0, time.perf_counter()
        self._steps: int | None = None

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        self._bar.stop()

    def stage(self, name: str, steps: int | None) -> None:
        if name == self._name and self._steps is None:
            self._name = ""  # the same stage, its steps now known
        self._finish()
        self._name, self._steps, self._done, self._began = name, steps, 0, time.perf_counter()
        self._task = self._bar.add_task(name, total=steps)

    def step(self) -> None:
        self._done += 1
        if self._task is not None:
            self._bar.advance(self._task)

    def say(self, line: str) -> None:
        self._logger.info(line)
        self._console.print(line, highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if self._name:
            count = f" ({self._done})" if self._done else ""
            self.say(f"{self._name}{count}: {time.perf_counter() - self._began:.1f} s")
            self._name = ""


# ------------------------------------------------------------------------------------------------------------- tables


def show(result: Result, folder: Path, *, task_words: Sequence[str] = ()) -> None:
    """The last screen of a search: what was asked, what was reached, what it cost, where it is, what to do next."""
    console = Console()
    values = result.to_json()
    console.print(_groups_table(values))
    console.print(_costs_table(values))
    score = values["score"]
    console.print(
        f"{score['metric']}: test {_percent(score['test_dense'])} dense, "
        f"{_percent(score['test_recovered'])} pruned and fine-tuned "
        f"({_points(score['test_recovered'] - score['test_dense'])}); "
        f"search split {_percent(score['dense'])} dense, {_percent(score['recovered'])} pruned",
        highlight=False,
    )
    search = values["search"]
    console.print(
        f"{search['trials']} trials ({search['evaluations']} evaluated, {search['cache_hits']} from the cache, "
        f"{search['failed']} failed) in {search['seconds']:.0f} s",
        highlight=False,
    )
    for budget in values["budgets"]:
        verdict = VERDICTS[budget["met"]]
        console.print(
            f"budget {budget['asked']}: {_with_interval(budget)} of at most {_amount(budget['limit'])} "
            f"{budget['unit']}, {verdict}",
            highlight=False,
        )
    _lines(
        console,
        f"files: {folder}/  (ratios.yaml, result.json, trials.csv, pruned.safetensors, report.html)",
        f"reuse: python -m autoprune finetune ratios={folder}/ratios.yaml {shlex.join(task_words)}".rstrip(),
        *([f"look:  optuna-dashboard {result.storage}"] if result.storage else []),
    )


def show_finetuned(tuned: FineTuned, folder: Path) -> None:
    """The last screen of a fine-tune."""
    console = Console()
    costs = ", ".join(
        f"{name} {_amount(tuned.dense[name].value)} -> {_amount(m.value)} {m.unit}"
        for name, m in tuned.measured.items()
    )
    _lines(
        console,
        costs,
        f"{tuned.metric}: test {_percent(tuned.test_dense)} dense, {_percent(tuned.test_recovered)} pruned and "
        f"fine-tuned ({_points(tuned.test_recovered - tuned.test_dense)}) in {tuned.seconds:.0f} s",
        f"files: {folder}/  (ratios.yaml, result.json, pruned.safetensors)",
    )


def show_profile(table: CostTable, space: PruningSpace) -> None:
    """The last screen of a profile: the dense network's latency, the table's error, and each group's steps."""
    console = Console()
    cost = table.cost(space)
    steps = stair_levels(cost, space, 16)
    shown = Table(
        "group", "units", "ms at full width", "at half", "widths worth keeping", title="steps", title_justify="left"
    )
    sizes = [g.size for g in space.groups]
    for i, group in enumerate(space.groups):
        half = cost.at_widths([*sizes[:i], group.size // 2, *sizes[i + 1 :]])
        widths = ", ".join(str(group.kept(level)) for level in steps.get(group.name, group.levels))
        shown.add_row(group.name, str(group.size), f"{table.dense.value:.2f}", f"{half:.2f}", widths)
    console.print(shown)
    errors, pairs = table.errors(space), table.held_out_pairs(space)
    measured = [m for _, m in pairs]
    _lines(
        console,
        f"dense: {table.dense.value:.4g} [{table.dense.low:.4g}, {table.dense.high:.4g}] ms on {table.dense.device}",
        f"       {'; '.join(table.dense.notes)}",
        f"error on {len(errors)} networks of {min(measured):.3g} to {max(measured):.3g} ms that were not fitted: "
        f"median {_percent(float(np.median(errors)))}, 90th percentile {_percent(float(np.quantile(errors, 0.9)))}, "
        f"largest {_percent(float(errors.max()))}",
    )


def _lines(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _groups_table(values: Mapping[str, Any]) -> Table:
    table = Table("group", "units", "kept", "ratio", "", title="ratios", title_justify="left")
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    for name, row in values["groups"].items():
        bar = "█" * round(20 * row["ratio"])
        note = values["findings"].get(name, "")
        table.add_row(name, str(row["size"]), str(row["kept"]), f"{row['ratio']:.2f}", f"{bar} {note}".strip())
    return table


def _costs_table(values: Mapping[str, Any]) -> Table:
    table = Table("cost", "dense", "predicted", "pruned", "of dense", title="costs", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in values["costs"].items():
        after = row["measured"]
        table.add_row(
            f"{name} ({after['kind']})",
            _amount(row["dense"]),
            _amount(row["predicted"]),
            _amount(after["value"]),
            _percent(after["value"] / row["dense"]),
        )
    return table


def _amount(value: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= scale:
            return f"{value / (1e3 if letter == 'k' else scale):.4g}{letter}"
    return f"{value:.4g}"


def _with_interval(row: Mapping[str, Any]) -> str:
    """A value, with its interval where that has a width."""
    if row.get("low") == row.get("high"):
        return _amount(row["value"])
    return f"{_amount(row['value'])} [{_amount(row['low'])}, {_amount(row['high'])}]"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.2f} points"


# -------------------------------------------------------------------------------------------------------------- files


def write(result: Result, folder: Path) -> None:
    """Write a search's files into its folder."""
    result.table.save(folder / "ratios.yaml")
    _write_json(folder / "result.json", result.to_json())
    _write_trials(folder / "trials.csv", result.trials, result.space)
    _write_weights(result.model, folder / "pruned.safetensors")
    rewrite(folder)


def write_finetuned(tuned: FineTuned, folder: Path) -> None:
    """Write a fine-tune's files into its folder."""
    tuned.table.save(folder / "ratios.yaml")
    _write_weights(tuned.model, folder / "pruned.safetensors")
    values = {k: v for k, v in vars(tuned).items() if k not in ("table", "model", "dense", "measured")}
    costs = {name: {"dense": asdict(tuned.dense[name]), "measured": asdict(m)} for name, m in tuned.measured.items()}
    _write_json(folder / "result.json", values | {"costs": costs})


def rewrite(folder: Path) -> None:
    """Write report.html from the result.json and trials.csv of a finished run.

    Raises:
        InputError: the folder holds no finished run.
    """
    try:
        values = json.loads((folder / "result.json").read_text())
        with (folder / "trials.csv").open(newline="") as file:
            trials = list(csv.DictReader(file))
        page = html(values, trials)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UndefinedError) as error:
        raise InputError(f"{folder} holds no finished search: {type(error).__name__}: {error}") from error
    (folder / "report.html").write_text(page)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _write_weights(model: nn.Module, path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_model(copy.deepcopy(model).cpu(), str(path))


def _write_trials(path: Path, trials: Sequence[Trial], space: PruningSpace) -> None:
    costs = sorted({name for trial in trials for name in trial.costs})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        head = ["number", "recovery", "score", "score_low", "score_high", "loss", "loss_change", "loss_change_low"]
        head += ["loss_change_high", *costs, "feasible", "cached", "seconds", "error"]
        writer.writerow([*head, *(RATIO + g.name for g in space.groups)])
        for t in trials:
            change = t.loss_change or Measurement.exact(math.nan, "loss", "measured")
            row: list[object] = [
                t.number,
                t.candidate.recovery,
                t.score,
                t.score_low,
                t.score_high,
                t.loss,
                change.value,
                change.low,
            ]
            row += [change.high, *(t.costs[c].value if c in t.costs else "" for c in costs)]
            row += ["" if t.feasible is None else t.feasible, t.cached, round(t.seconds, 4), t.error or ""]
            writer.writerow([*row, *t.candidate.ratios])


# --------------------------------------------------------------------------------------------------------------- html


def html(values: Mapping[str, Any], trials: Sequence[Mapping[str, str]]) -> str:
    """The self-contained page of a run: result.json's content and the rows of trials.csv."""
    environment = Environment(loader=PackageLoader("autoprune", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(amount=_amount, percent=_percent, points=_points, interval=_with_interval)
    curves = sensitivity_curves(values["groups"], trials)
    values = {"cost_table": {"held_out": [], "answers": []}, "layers": [], **values}  # absent in older runs
    return environment.get_template("report.html.j2").render(
        values=values,
        ratios=_ratios_svg(values),
        sensitivity=_sensitivity_svg(values, curves) if curves else "",
        prediction=_prediction_svg(values["cost_table"]) if values["cost_table"]["held_out"] else "",
        layers=_layers_svg(values["layers"]) if values["layers"] else "",
    )


def sensitivity_curves(
    groups: Mapping[str, Any], trials: Sequence[Mapping[str, str]]
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Group -> (ratio, loss change, low, high) of the trials that prune that group alone, by ratio."""
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for trial in trials:
        pruned = [name for name in groups if float(trial[RATIO + name]) > 0]
        if len(pruned) == 1 and trial["recovery"] == "probe" and not trial["error"]:
            change = (float(trial[k]) for k in ("loss_change", "loss_change_low", "loss_change_high"))
            value, low, high = change
            curves.setdefault(pruned[0], []).append((float(trial[RATIO + pruned[0]]), value, low, high))
    return {name: sorted(curves[name]) for name in groups if name in curves}


def _ratios_svg(values: Mapping[str, Any]) -> str:
    names = list(values["groups"])
    figure, axes = _figure(7.5, 0.6 + 0.26 * len(names), 1, 1)
    ratios = [values["groups"][name]["ratio"] for name in names]
    axes[0].barh(range(len(names)), [1.0] * len(names), color=GREY, alpha=0.25, height=0.7)
    axes[0].barh(range(len(names)), ratios, color=ORANGE, height=0.7)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1)
    axes[0].set_xlabel("ratio: fraction of units removed, in the network's order")
    return _svg(figure)


def _sensitivity_svg(
    values: Mapping[str, Any], curves: Mapping[str, Sequence[tuple[float, float, float, float]]]
) -> str:
    rows = math.ceil(len(curves) / 3)
    figure, axes = _figure(9.0, 1.9 * rows + 0.4, rows, 3)
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
    figure.supxlabel("ratio of this group alone (dashed: chosen)", fontsize=9, color=GREY)
    figure.supylabel("loss increase over dense, 95 % interval", fontsize=9, color=GREY)
    return _svg(figure)


def _prediction_svg(table: Mapping[str, Any]) -> str:
    figure, axes = _figure(4.5, 4.2, 1, 1)
    answers = [(a["predicted"], a["measured"]) for a in table["answers"]]
    top = 1.05 * max(value for pair in (*table["held_out"], *answers) for value in pair)
    axes[0].plot([0, top], [0, top], color=GREY, linewidth=0.8)
    axes[0].plot(*zip(*table["held_out"], strict=True), "o", color=BLUE, markersize=4)
    if answers:
        axes[0].plot(*zip(*answers, strict=True), "x", color=ORANGE, markersize=8, markeredgewidth=2)
    axes[0].set_xlim(0, top)
    axes[0].set_ylim(0, top)
    axes[0].set_xlabel("predicted ms")
    axes[0].set_ylabel("measured ms", color=GREY)
    return _svg(figure)


def _layers_svg(layers: Sequence[Mapping[str, Any]]) -> str:
    figure, axes = _figure(7.5, 0.6 + 0.2 * len(layers), 1, 1)
    places = range(len(layers))
    axes[0].barh(places, [row["dense_ms"] for row in layers], color=GREY, alpha=0.35, height=0.8, label="dense")
    axes[0].barh(places, [row["pruned_ms"] for row in layers], color=ORANGE, height=0.4, label="pruned")
    axes[0].set_yticks(places, [row["name"] for row in layers])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("ms")
    axes[0].legend(frameon=False, labelcolor=GREY, fontsize=8)
    return _svg(figure)


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.tick_params(colors=GREY, labelsize=8)
        axis.xaxis.label.set_color(GREY)
        axis.title.set_color(GREY)
        axis.patch.set_alpha(0)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    figure.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure) -> str:
    """SVG text to stand inside a page; text stays text, and the same figure gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "autoprune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
