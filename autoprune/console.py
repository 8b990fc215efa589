"""The last screen of each command: what was asked, what was reached, what it cost, where it is, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from autoprune.components import named
from autoprune.core import Budget, Measurement, PruningSpace, amount_of
from autoprune.meters.fitted import stair_levels, step_of
from autoprune.page import amount, percent, points, with_interval
from autoprune.regularizers import RANKED_BY
from autoprune.search_figures import SMOOTHED, warm_up_mean

if TYPE_CHECKING:
    from autoprune.diagnosis import Diagnosis
    from autoprune.exporting import Exported
    from autoprune.final import FineTuned
    from autoprune.meters.profile import CostTable
    from autoprune.result import Result
    from autoprune.training import Trained


MET = "[green]met[/]"
NOT_MET = "[bold red]not met[/]"
NOT_SHOWN = "[bold yellow]not shown to be met[/]: the interval holds the limit"
UNDECIDED = "[bold yellow]undecided[/]: the measurement was disturbed, run it again on a quieter machine"
MODELLED = " [yellow](modelled, not measured)[/]"


def show(result: Result, folder: Path, *, task_words: Sequence[str] = ()) -> None:
    """The last screen of a search: what was asked, what was reached, what it cost, where it is, what to do next."""
    console = Console()
    values = result.to_json()
    console.print(_groups_table(values))
    console.print(_costs_table(values))
    score = values["score"]
    console.print(
        f"{score['metric']}: test {percent(score['test_dense'])} dense, "
        f"{percent(score['test_recovered'])} pruned and fine-tuned "
        f"({points(score['test_recovered'] - score['test_dense'])}); "
        f"search split {percent(score['dense'])} dense, {percent(score['recovered'])} pruned",
        highlight=False,
    )
    search = values["search"]
    console.print(
        f"{search['trials']} trials ({search['evaluations']} evaluated, {search['cache_hits']} from the cache, "
        f"{search['failed']} failed; {search['shared']:.0%} of their forward passes ran once for many) "
        f"in {search['seconds']:.0f} s",
        highlight=False,
    )
    if episodes := values["episodes"]:
        last = [walked["reward"] for walked in episodes[-SMOOTHED:]]
        console.print(
            f"reward: {warm_up_mean(episodes):.4g} in the warm-up (mean), {sum(last) / len(last):.4g} over the last "
            f"{len(last)} of {len(episodes)} episodes",
            highlight=False,
        )
    for budget in values["budgets"]:
        verdict = _verdict(budget["met"], budget["low"], budget["limit"])
        verdict += "; this is the closest found" * (budget["met"] is False) + MODELLED * (budget["kind"] == "modelled")
        console.print(
            f"budget {budget['asked']}: {with_interval(budget)} of at most {amount(budget['limit'])} "
            f"{budget['unit']}, {verdict}",
            highlight=False,
        )
    _lines(
        console,
        f"files: {folder}/  (ratios.yaml, result.json, trials.csv, pruned.safetensors, report.html)",
        f"reuse: python -m autoprune finetune ratios={folder}/ratios.yaml {shlex.join(task_words)}".rstrip(),
        *([f"look:  optuna-dashboard {result.storage}"] if result.storage and result.study else []),
    )


def show_finetuned(tuned: FineTuned, folder: Path) -> None:
    """The last screen of a fine-tune."""
    console = Console()
    costs = ", ".join(
        f"{name} {amount(tuned.dense[name].value)} -> {amount(m.value)} {m.unit}" for name, m in tuned.measured.items()
    )
    _lines(
        console,
        costs,
        f"{tuned.metric}: test {percent(tuned.test_dense)} dense, {percent(tuned.test_recovered)} pruned and "
        f"fine-tuned ({points(tuned.test_recovered - tuned.test_dense)}) in {tuned.seconds:.0f} s",
        f"files: {folder}/  (ratios.yaml, result.json, pruned.safetensors)",
    )


def show_trained(trained: Trained, folder: Path, *, words: Sequence[str] = ()) -> None:
    """The last screen of a training before a search. words: of the command, those that the search needs too."""
    console, groups = Console(), trained.groups
    table = Table("group", "units", "before", "after", title="units near zero", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, group in groups.items():
        table.add_row(name, str(group.units), str(group.before), str(group.after))
    console.print(table)
    name = named("regularizer", trained.regularizer)
    criterion = [f"criterion={RANKED_BY[name]}"] if name in RANKED_BY else []
    line = ["search", f"weights={folder}/trained.safetensors", *criterion, *words]
    _lines(
        console,
        f"{trained.metric}: test {percent(trained.test_before)} before, {percent(trained.test_after)} trained with "
        f"{name} ({points(trained.test_after - trained.test_before)}) in {trained.seconds:.0f} s",
        f"units near zero: {percent(trained.share('before'))} before, {percent(trained.share('after'))} after",
        f"files: {folder}/  (trained.safetensors, result.json)",
        f"next:  python -m autoprune {shlex.join(line)}",
    )


def show_comparison(lines: Sequence[str], files: Sequence[Path]) -> None:
    """The last screen of a comparison: its tables, and where they are kept."""
    _lines(Console(), *lines, f"files: {', '.join(map(str, files))}")


def show_diagnosis(found: Diagnosis) -> None:
    """The screen of a doctor: every group, every layer that is left whole with the reason, and the shares."""
    console, space, macs = Console(), found.traced.space, found.traced.macs
    title = "groups, each proven" if found.traced.narrows else "layers that can be masked"
    shown = Table("group", "units", "layers", "of MACs", title=title, title_justify="left")
    whole = [g.size for g in space.groups]
    for i, group in enumerate(space.groups):
        touched = [term for term in macs if i in term.left[1] or i in term.right[1] or i == term.gate]
        more = f" and {len(group.members) - 1} more" if len(group.members) > 1 else ""
        share = percent(amount_of(touched, whole) / max(amount_of(macs, whole), 1.0))
        shown.add_row(group.name, str(group.size), f"{group.members[0]}{more}", share)
    console.print(shown)
    left = Table("layer", "reason", title="left whole", title_justify="left")
    for refusal in space.refused:
        left.add_row(refusal.name, refusal.reason)
    if space.refused:
        console.print(left)
    units = sum(whole)
    _lines(
        console,
        f"{found.task}: {len(space.groups)} groups of {units} units, traced and proven in {found.seconds:.1f} s",
        f"in layers that some group cuts: {percent(found.prunable_macs)} of MACs, "
        f"{percent(found.prunable_params)} of parameters",
        f"left at the deepest levels: {percent(found.least_macs)} of MACs, {percent(found.least_params)} of parameters",
    )


def show_profile(table: CostTable, space: PruningSpace) -> None:
    """The last screen of a profile: the dense network's latency, the table's error, and each group's steps."""
    console = Console()
    cost = table.cost(space)
    steps = stair_levels(cost, space, 16)
    widest = Column("widths worth keeping", min_width=20)
    shown = Table("group", "units", "ms", "ms at half", "step", widest, title="steps", title_justify="left")
    sizes = [g.size for g in space.groups]
    for i, group in enumerate(space.groups):
        half = cost.at_widths([*sizes[:i], group.size // 2, *sizes[i + 1 :]])
        widths = [group.kept(level) for level in steps.get(group.name, group.levels)]
        row = [str(group.size), f"{table.dense.value:.2f}", f"{half:.2f}", str(step_of(widths))]
        shown.add_row(group.name, *row, ", ".join(map(str, widths)))
    console.print(shown)
    errors, pairs = table.errors(space), table.held_out_pairs(space)
    measured = [m for _, m in pairs]
    _lines(
        console,
        f"dense: {table.dense.value:.4g} [{table.dense.low:.4g}, {table.dense.high:.4g}] ms on {table.dense.device}",
        f"       {'; '.join(table.dense.notes)}",
        f"error on {len(errors)} networks of {min(measured):.3g} to {max(measured):.3g} ms that were not fitted: "
        f"median {percent(float(np.median(errors)))}, 90th percentile {percent(float(np.quantile(errors, 0.9)))}, "
        f"largest {percent(float(errors.max()))}",
    )


def show_again(then: Measurement, now: Measurement, budgets: Mapping[str, Budget]) -> bool:
    """A run's latency beside a second measurement; whether every latency budget of the run is met by that one."""
    console = Console()
    for when, m in (("then", then), ("now", now)):
        console.print(f"{when}: {with_interval(asdict(m))} ms ({escape('; '.join(m.notes[:1]))})", highlight=False)
    console.print(f"apart: {100 * (now.value / then.value - 1):+.1f} %", highlight=False)
    met = True
    for asked, budget in budgets.items():
        verdict = budget.met(now)
        console.print(f"budget {escape(asked)}: {_verdict(verdict, now.low, budget.limit)}", highlight=False)
        met = met and bool(verdict)
    return met


def show_exported(made: Exported, folder: Path) -> None:
    """The last screen of an export: the file, what it takes and gives, how far it is from PyTorch, how to load it."""
    kind = f"ONNX opset {made.opset}" if made.opset else {"torch": "torch.export"}.get(made.format, made.format)
    takes, gives = (
        ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items())
        for shapes in (made.inputs, made.outputs)
    )
    macs = "MACs not counted" if made.macs is None else f"{amount(made.macs)} MACs"
    apart = ", ".join(f"{gap:.2g} at a batch of {n}" for n, gap in made.differences.items())
    _lines(
        Console(),
        f"file:  {made.path}  ({made.bytes / 1e6:.3g} MB, {kind}, {made.precision}, batch {made.batch})",
        *([f"       the batch is fixed at the example's, {made.note}"] if made.note else []),
        f"takes: {takes}; gives {gives}; {macs}, {amount(made.params)} parameters",
        f"runs:  in {made.runtime}, apart from PyTorch by at most {apart} "
        f"({made.relative:.1g} of the largest value of an output)",
        f"load:  {_loading(made, folder)}",
    )


def _loading(made: Exported, folder: Path) -> str:
    """The line of Python that gives the network of a file."""
    if made.format == "onnx":
        return f'onnxruntime.InferenceSession("{made.path}")'
    if made.format == "torch":
        return f'torch.export.load("{made.path}").module()'
    return f'autoprune.RatioTable.load("{folder}/ratios.yaml").rebuild(model, inputs, "{made.path}")'


def _verdict(met: bool | None, low: float, limit: float) -> str:
    """What is said of a budget; an interval that holds the limit shows neither that it is kept nor that it is not."""
    if met is None:
        return UNDECIDED
    return MET if met else NOT_SHOWN if low <= limit else NOT_MET


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
            amount(row["dense"]),
            amount(row["predicted"]),
            amount(after["value"]),
            percent(after["value"] / row["dense"]),
        )
    return table
