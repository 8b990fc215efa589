"""The last screen of each command: what was asked, what was reached, what it cost, where it is, what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from autoprune.components import named
from autoprune.core import Budget, Measurement, PruningSpace, amount_of
from autoprune.meters.fitted import stair_levels, step_of
from autoprune.page import amount, percent, score, score_change, with_interval
from autoprune.regularizers import RANKED_BY
from autoprune.search_figures import SMOOTHED, warm_up_mean
from autoprune.telling import telling, write_json

if TYPE_CHECKING:
    from autoprune.diagnosis import Diagnosis, Examination
    from autoprune.exporting import Exported
    from autoprune.final import FineTuned
    from autoprune.meters.profile import CostTable
    from autoprune.result import Result
    from autoprune.training import Trained


MET = "[green]met[/]"
NOT_MET = "[bold red]not met[/]"
NOT_SHOWN = "[bold yellow]not shown to be met[/]: the interval holds the limit"
UNDECIDED = "[bold yellow]undecided[/]: the measurement was disturbed; measure it again on a quieter machine"
MARKS = {"ok": "[green]✓[/]", "warning": "[bold yellow]![/]", "failed": "[bold red]✗[/]"}
MODELLED = " [yellow](modelled, not measured)[/]"


def show(result: Result, folder: Path, *, command: Sequence[str] = (), task_words: Sequence[str] = ()) -> None:
    """The last screen of a search: what was asked, what was reached, what it cost, where it is, what to do next.

    command: the words that it was started with. task_words: those of them that say which task it was.
    """
    values = result.to_json()
    scores, search = values["score"], values["search"]

    def told(name: str) -> str:
        return score(scores[name], result.dense_score, result.sign)

    gained = score_change(scores["test_recovered"], scores["test_dense"], result.sign)
    reached = Text(
        f"{scores['metric']}: test {told('test_dense')} dense, {told('test_recovered')} pruned and fine-tuned "
        f"({gained}); search split {told('dense')} dense, {told('recovered')} pruned"
        if result.study
        else f"{scores['metric']}: test {told('test_dense')}, search split {told('dense')}; nothing was pruned, as the "
        "dense network keeps every budget"
    )
    taken = Text(
        f"{_counted(search['trials'], 'trial', 'trials')} ({_sources(search)}{search['failed']} failed; "
        f"{search['shared']:.0%} of the forward passes saved by sharing) in {search['seconds']:.0f} s"
    )
    asked = f"asked: {result.task}, {', '.join(result.asked)}, strategy {result.strategy}, seed {result.seed}"
    _tell(
        values | {"command": list(command), "folder": str(folder)},
        before=(_groups_table(values), _costs_table(values), asked, reached, taken, *_reward(values["episodes"])),
        verdict=[_budget_line(budget) for budget in values["budgets"]],
        after=(
            f"files: {folder}/  (ratios.yaml, result.json, trials.csv, pruned.safetensors, report.html)",
            *_next(result, folder, command, task_words),
        ),
    )


def _sources(search: Mapping[str, Any]) -> str:
    """Where the trials of a search come from."""
    earlier = search["trials"] - search["evaluations"] - search["cache_hits"]
    known = f"{earlier} of an earlier run, " if earlier > 0 else ""
    return f"{known}{search['evaluations']} evaluated, {search['cache_hits']} from the cache, "


def _reward(episodes: Sequence[Mapping[str, Any]]) -> list[Text]:
    if not episodes:
        return []
    last = [walked["reward"] for walked in episodes[-SMOOTHED:]]
    mean = sum(last) / len(last)
    told = f"{warm_up_mean(episodes):.4g} in the warm-up (mean), {mean:.4g} over the last {len(last)}"
    return [Text(f"reward: {told} of {len(episodes)} episodes")]


def _budget_line(budget: Mapping[str, Any]) -> Text:
    verdict = _verdict(budget["met"], budget["low"], budget["limit"])
    verdict += "; this is the closest found" * (budget["met"] is False) + MODELLED * (budget["kind"] == "modelled")
    limit = f"{amount(budget['limit'])} {budget['unit']}"
    return Text.from_markup(
        escape(f"budget {budget['asked']}: {with_interval(budget)} of at most {limit}, ") + verdict, emoji=False
    )


def _next(result: Result, folder: Path, command: Sequence[str], task_words: Sequence[str]) -> list[str]:
    """The next three commands, each a line to be pasted."""
    reuse = ["finetune", f"ratios={folder}/ratios.yaml", *task_words]
    export = ["export", str(folder), "format=onnx"]
    again = ["measure", str(folder)]
    unsure = any(b.cost == "latency_ms" and b.met(result.measured[b.cost]) is None for b in result.budgets)
    look = ["report", str(folder)]
    if result.storage and result.study:
        look = ["dashboard", *(word for word in command if word.startswith(("study.storage=", "output=")))]
    lines = ([("again:", again)] if unsure else []) + [("reuse:", reuse), ("export:", export), ("look:", look)]
    return [f"{name:7} {_line(words)}" for name, words in lines]


def show_finetuned(tuned: FineTuned, folder: Path) -> None:
    """The last screen of a fine-tune."""
    costs = ", ".join(
        f"{name} {amount(tuned.dense[name].value)} -> {amount(m.value)} {m.unit}" for name, m in tuned.measured.items()
    )
    before, after, gained = _compared(tuned.test_dense, tuned.test_recovered, tuned.sign)
    verdict = (
        costs,
        f"{tuned.metric}: test {before} dense, {after} pruned and fine-tuned ({gained}) in {tuned.seconds:.0f} s",
    )
    files = f"files: {folder}/  (ratios.yaml, result.json, pruned.safetensors)"
    _tell(_result_of(folder), verdict=verdict, after=(files,))


def _compared(before: float, after: float, sign: float) -> tuple[str, str, str]:
    """Two values of a metric and the change, as they are told."""
    return score(before, before, sign), score(after, before, sign), score_change(after, before, sign)


def show_trained(trained: Trained, folder: Path, *, words: Sequence[str] = ()) -> None:
    """The last screen of a training before a search. words: of the command, those that the search needs too."""
    groups = trained.groups
    table = Table("group", "units", "before", "after", title="units near zero", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, group in groups.items():
        table.add_row(name, str(group.units), str(group.before), str(group.after))
    name = named("regularizer", trained.regularizer)
    criterion = [f"criterion={RANKED_BY[name]}"] if name in RANKED_BY else []
    line = ["search", f"weights={folder}/trained.safetensors", *criterion, *words]
    before, after, gained = _compared(trained.test_before, trained.test_after, trained.sign)
    verdict = (
        f"{trained.metric}: test {before} before, {after} trained with {name} ({gained}) in {trained.seconds:.0f} s",
        f"units near zero: {percent(trained.share('before'))} before, {percent(trained.share('after'))} after",
    )
    files = f"files: {folder}/  (trained.safetensors, result.json)"
    _tell(_result_of(folder), before=(table,), verdict=verdict, after=(files, f"next:  {_line(line)}"))


def show_comparison(lines: Sequence[str], files: Sequence[Path], rows: Sequence[Any] = ()) -> None:
    """The last screen of a comparison: its tables, and where they are kept. rows: compare.Row of every search."""
    where = f"files: {', '.join(map(str, files))}"
    values = {"rows": [asdict(row) for row in rows], "files": [str(file) for file in files]}
    _tell(values, verdict=[*lines, where])


def show_examination(found: Examination) -> None:
    """The screen of a doctor: what can be pruned, then every finding with its way out, and how many are bad."""
    values: dict[str, Any] = {"findings": [asdict(finding) for finding in found.findings], "seconds": found.seconds}
    parts: list[RenderableType] = []
    if found.diagnosis is not None:
        values |= _diagnosis_values(found.diagnosis)
        parts += _diagnosis_parts(found.diagnosis, values["groups"])
    bad: list[Text] = []
    for area in dict.fromkeys(finding.area for finding in found.findings):
        parts.append(Text.from_markup(f"\n[bold]{area}[/]"))
        for finding in (finding for finding in found.findings if finding.area == area):
            line = f"{MARKS[finding.status]} {escape(f'{finding.what}: {finding.detail}')}"
            way_out = f" [dim]—[/] {escape(finding.way_out)}" if finding.way_out else ""
            parts.append(Text.from_markup(line + way_out, emoji=False))
            bad += [Text.from_markup(line + way_out, emoji=False)] if finding.status == "failed" else []
    counts = {status: sum(finding.status == status for finding in found.findings) for status in MARKS}
    verdict = (
        f"{counts['ok']} ok, {counts['warning']} to look at, {counts['failed']} in the way of a search, looked at in "
        f"{found.seconds:.0f} s"
    )
    _tell(values, before=(*parts, ""), verdict=(*(bad if telling().quiet else ()), verdict))


def _diagnosis_values(found: Diagnosis) -> dict[str, Any]:
    space, macs = found.traced.space, found.traced.macs
    whole, groups = [g.size for g in space.groups], {}
    for i, group in enumerate(space.groups):
        touched = [term for term in macs if i in term.left[1] or i in term.right[1] or i == term.gate]
        share = amount_of(touched, whole) / max(amount_of(macs, whole), 1.0)
        groups[group.name] = {"size": group.size, "members": group.members, "macs": share}
    values = {k: v for k, v in vars(found).items() if k not in ("traced", "seconds")}
    return values | {"groups": groups, "refused": {r.name: r.reason for r in space.refused}}


def _diagnosis_parts(found: Diagnosis, groups: Mapping[str, Any]) -> list[RenderableType]:
    """What can be pruned: every group, every layer that is left whole with the reason, and the shares."""
    title = "groups, each proven" if found.traced.narrows else "layers that can be masked"
    table = Table("group", "units", "layers", "of MACs", title=title, title_justify="left")
    for name, group in groups.items():
        first, *others = group["members"]
        more = f" and {len(others)} more" if others else ""
        table.add_row(name, str(group["size"]), f"{first}{more}", percent(group["macs"]))
    left = Table("layer", "reason", title="left whole", title_justify="left")
    for refusal in found.traced.space.refused:
        left.add_row(refusal.name, refusal.reason)
    units = sum(group["size"] for group in groups.values())
    return [
        table,
        *([left] if found.traced.space.refused else []),
        f"{found.task}: {len(groups)} groups of {units} units, traced and proven in {found.seconds:.1f} s",
        f"in layers that some group cuts: {percent(found.prunable_macs)} of MACs, "
        f"{percent(found.prunable_params)} of parameters",
        f"left at the deepest levels: {percent(found.least_macs)} of MACs, {percent(found.least_params)} of parameters",
    ]


def show_profile(table: CostTable, space: PruningSpace) -> None:
    """The last screen of a profile: the dense network's latency, the table's error, and each group's steps."""
    cost = table.cost(space)
    steps = stair_levels(cost, space, 16)
    widest = Column("widths worth keeping", min_width=20)
    drawn = Table("group", "units", "ms", "ms at half", "step", widest, title="steps", title_justify="left")
    sizes = [g.size for g in space.groups]
    groups = {}
    for i, group in enumerate(space.groups):
        half = cost.at_widths([*sizes[:i], group.size // 2, *sizes[i + 1 :]])
        widths = [group.kept(level) for level in steps.get(group.name, group.levels)]
        row = [str(group.size), f"{table.dense.value:.2f}", f"{half:.2f}", str(step_of(widths))]
        drawn.add_row(group.name, *row, ", ".join(map(str, widths)))
        groups[group.name] = {"size": group.size, "ms_at_half": half, "step": step_of(widths), "widths": widths}
    errors, pairs = table.errors(space), table.held_out_pairs(space)
    measured = [m for _, m in pairs]
    quantiles = [float(np.median(errors)), float(np.quantile(errors, 0.9)), float(errors.max())]
    verdict = (
        f"dense: {table.dense.value:.4g} [{table.dense.low:.4g}, {table.dense.high:.4g}] ms on {table.dense.device}",
        f"       {'; '.join(table.dense.notes)}",
        f"error on {len(errors)} networks of {min(measured):.3g} to {max(measured):.3g} ms that were not fitted: "
        f"median {percent(quantiles[0])}, 90th percentile {percent(quantiles[1])}, largest {percent(quantiles[2])}",
    )
    values = {"dense": asdict(table.dense), "held_out": pairs, "groups": groups}
    values["error"] = dict(zip(("median", "p90", "largest"), quantiles, strict=True))
    _tell(values, before=(drawn,), verdict=verdict)


def show_again(then: Measurement, now: Measurement, budgets: Mapping[str, Budget]) -> bool:
    """A run's latency beside a second measurement; whether every latency budget of the run is met by that one."""
    apart = now.value / then.value - 1
    lines = [f"{when}: {with_interval(asdict(m))} ms ({'; '.join(m.notes[:1])})" for when, m in _both(then, now)]
    verdicts = {asked: budget.met(now) for asked, budget in budgets.items()}
    told = [
        Text.from_markup(escape(f"budget {asked}: ") + _verdict(verdicts[asked], now.low, budget.limit), emoji=False)
        for asked, budget in budgets.items()
    ]
    values: dict[str, Any] = {when: asdict(m) for when, m in _both(then, now)}
    values |= {"apart": apart, "budgets": [{"asked": asked, "met": met} for asked, met in verdicts.items()]}
    _tell(values, before=lines, verdict=(f"apart: {100 * apart:+.1f} %", *told))
    return all(verdicts.values())


def show_dashboard(url: str, studies: int, only_here: bool) -> None:
    """Where a dashboard answers, and, where others can reach it, what that means."""
    if not only_here:
        Console(stderr=True).print(
            "warning: the dashboard has no password: whoever reaches this address can read, change and delete studies",
            highlight=False,
        )
    after = f"{_counted(studies, 'study', 'studies')}; Ctrl-C ends it"
    _tell({"url": url, "studies": studies}, verdict=(url,), after=(after,))


def _both(then: Measurement, now: Measurement) -> tuple[tuple[str, Measurement], tuple[str, Measurement]]:
    return ("then", then), ("now", now)


def show_report(folder: Path) -> None:
    """Where a report is."""
    page = folder / "report.html"
    _tell({"folder": str(folder), "report": str(page)}, verdict=(f"report: {page}",))


def show_exported(made: Exported, folder: Path) -> None:
    """The last screen of an export: the file, what it takes and gives, how far it is from PyTorch, how to load it."""
    kind = f"ONNX opset {made.opset}" if made.opset else {"torch": "torch.export"}.get(made.format, made.format)
    takes, gives = (
        ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items())
        for shapes in (made.inputs, made.outputs)
    )
    macs = "MACs not counted" if made.macs is None else f"{amount(made.macs)} MACs"
    apart = ", ".join(f"{gap:.2g} at a batch of {n}" for n, gap in made.differences.items())
    before = [
        f"file:  {made.path}  ({made.bytes / 1e6:.3g} MB, {kind}, {made.precision}, batch {made.batch})",
        *([f"       the batch is fixed at the example's, {made.note}"] if made.note else []),
        f"takes: {takes}; gives {gives}; {macs}, {amount(made.params)} parameters",
    ]
    verdict = (
        f"runs:  in {made.runtime}, apart from PyTorch by at most {apart} "
        f"({made.relative:.1g} of the largest value of an output)"
    )
    values = asdict(made) | {"path": str(made.path)}
    _tell(values, before=before, verdict=[verdict], after=[f"load:  {_loading(made, folder)}"])


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


def _tell(
    values: Mapping[str, Any],
    *,
    before: Sequence[RenderableType] = (),
    verdict: Sequence[str | Text],
    after: Sequence[str] = (),
) -> None:
    """Show a last screen as the command was asked to: its values as JSON, its verdict, or all of it."""
    if telling().json:
        write_json(values)
        return
    console = Console(markup=False, emoji=False)  # names and reasons stand as they are
    for part in verdict if telling().quiet else (*before, *verdict, *after):
        if isinstance(part, str):  # a line may be long, to be pasted
            console.print(part, highlight=False, soft_wrap=True, markup=False)
        else:
            console.print(part, highlight=False)


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _line(words: Sequence[str]) -> str:
    return f"python -m autoprune {shlex.join(words)}"


def _result_of(folder: Path) -> dict[str, Any]:
    """What was just written, as a program may read it again."""
    return json.loads((folder / "result.json").read_text()) | {"folder": str(folder)}  # type: ignore[no-any-return]


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
