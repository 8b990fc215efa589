"""Strategies side by side: the same task, budgets and seeds, and as many candidates where a strategy counts them; one
table, one plot, and the standard report that the field's benchmark asks for (Blalock, Gonzalez Ortiz, Frankle and
Guttag, "What is the State of Neural Network Pruning?", MLSys 2020, arXiv 2003.03033).

Letters: S seeds.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from autoprune import __version__, components, run, untrusted
from autoprune.borrowing import first, seeded
from autoprune.checks import check_seed, check_settings
from autoprune.core import DeviceLostError, InputError, Progress, PruningSpace, Silent, StorageError, Task
from autoprune.crew import WorkersLostError
from autoprune.drawing import BLUE, GREY, ORANGE, figure, svg
from autoprune.evaluate import Scoring
from autoprune.final import healed, test
from autoprune.keywords import positional_task
from autoprune.result import Result
from autoprune.writing import append, whole

FILES = ("comparison.csv", "comparison.md", "comparison.svg")
BATCHES = 8  # of training, for what answers get before they are fine-tuned
MEANINGS = (  # of the standard report's words
    "compression ratio: parameters of the dense network / of the pruned one, masked weights not counted",
    "theoretical speed-up: multiply-adds of the dense network / of the pruned one, masked weights not counted",
    "mean±half width of its 95 % interval over the seeds (Student's t); one seed has no interval",
)
TOP = "top-1, top-5: percent of the test split whose class has the highest output, or one of the five highest"
WHEN = "before → after: the final fine-tune, as in the table above"
NO_TOP5 = "no top-5: the task has no more than five classes"
NO_TOP = "no top-1 and top-5: the task's outputs are no scores of classes; its metric is in the table above"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One search. use: the largest fraction of a limit that its network takes. before, fine_tuned: the metric on the
    test split, of the units that the answer ends with, as `evaluator.recovery` leaves them without training, and after
    the final fine-tune; dense: of the dense network. trials: how many candidates were scored, finalists and answers
    included; seconds: from the first to the last, with what the strategy thought between. compression,
    theoretical_speed_up: see Result. top1_*, top5_*: as the metric at each of its three times, see final.Tested.
    made_of: a digest of all settings."""

    budget: str
    strategy: str
    seed: int
    met: bool
    use: float
    dense: float
    before: float
    fine_tuned: float
    trials: int
    seconds: float
    compression: float
    theoretical_speed_up: float
    top1_dense: float | None
    top1_before: float | None
    top1_fine_tuned: float | None
    top5_dense: float | None
    top5_before: float | None
    top5_fine_tuned: float | None
    made_of: str


def planned(
    names: Sequence[str], evaluations: int, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The strategies of conf/strategy/ with these names, those that count candidates allowed so many.

    Raises:
        InputError: no such strategy, settings that one does not take or of one that is not compared, or fewer than 4
        evaluations.
    """
    if not names:
        raise InputError(f"strategies is empty: give some of {', '.join(components.names('strategy'))}")
    if evaluations < 4:
        raise InputError(f"evaluations >= 4 must hold, got evaluations={evaluations}")
    if unknown := sorted(set(settings) - set(map(str, names))):
        raise InputError(f"settings.{unknown[0]}: '{unknown[0]}' is not among the strategies compared")
    found = {}
    for name in map(str, names):
        values, own = components.spec("strategy", name), settings.get(name, {})
        if not isinstance(own, Mapping):
            raise InputError(f"settings.{name} must be a mapping of the strategy's keys, got {own!r}")
        if "episodes" in values:
            values["episodes"] = evaluations
        if "warm_up" in values:
            values["warm_up"] = min(values["warm_up"], evaluations // 4)
        found[name] = values | dict(own)
        build = components.bind(found[name], f"settings.{name}", (), (), {}, seed=0)
        check_settings(build, PruningSpace(()), seed=0)
    return found


def check(budgets: Sequence[Sequence[str]], seeds: Sequence[int]) -> None:
    """Raises InputError where there is no budget or no seed, or one twice."""
    for name, values in (("budget", budgets), ("seeds", seeds)):
        if not values:
            raise InputError(f"{name} is empty: give at least one")
        if len(set(values)) < len(values):
            raise InputError(f"{name} has one of {list(values)} twice: each is compared once")
    for seed in seeds:
        check_seed(seed)


def compare(
    task: Task,
    *,
    budgets: Sequence[Sequence[str]],
    strategies: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    folder: Path,
    identity: str = "",
    progress: Progress = Silent(),
    **settings: Any,
) -> tuple[Row, ...]:
    """Search with every strategy under every budget from every seed; rows that the folder holds are not made again. A
    search that fails is said and left out.

    identity: what stands for the task and for the settings, which are as of run.search.

    Raises:
        InputError: the folder holds a row that was made of other settings.
    """
    file, rows = folder / FILES[0], []
    made = {(row.budget, row.strategy, row.seed): row for row in read(file)}
    for seed, budget, name in product(seeds, budgets, strategies):
        key = ("+".join(budget), name, seed)
        row, digest = made.get(key), _digest(identity, strategies[name])
        if row is not None and row.made_of != digest:
            raise InputError(f"{file} has {name} under {key[0]}, seed {seed}, of other settings: give another name=")
        if row is None:
            progress.say(f"{name} under {key[0]}, seed {seed}")
            study = f"comparison {folder.name}: {name} {key[0]} seed {seed} ({digest})"
            try:
                result = run.search(
                    task,
                    budget=budget,
                    strategy=strategies[name],
                    seed=seed,
                    study_name=study,
                    progress=progress,
                    **settings,
                )
            except (InputError, DeviceLostError, StorageError, WorkersLostError):
                raise
            except RuntimeError as error:
                progress.say(f"{name} under {key[0]}, seed {seed} failed and is left out: {error}")
                continue
            healing = settings.get("scoring", Scoring()).recipe.of_recovery("probe")
            row = _row(task, result, key, digest, [step.name for step in healing])
            _append(file, row)
        rows.append(row)
        for name, content in zip(FILES[1:], ("\n".join(told(rows)) + "\n", plot(rows)), strict=True):
            with whole(folder / name) as temporary:
                temporary.write_text(content)
    return tuple(rows)


def _digest(identity: str, strategy: Mapping[str, Any]) -> str:
    made_of = repr((identity, sorted(strategy.items()), __version__))
    return hashlib.sha256(made_of.encode()).hexdigest()[:8]


def _row(task: Task, result: Result, key: tuple[str, str, int], digest: str, recovery: Sequence[str]) -> Row:
    task, scores = positional_task(task), result.scores
    with seeded(key[2]):
        batches = first(task.train, BATCHES)
    (before,) = test(task, [healed(task, result.table, batches, recovery)])
    return Row(
        budget=key[0],
        strategy=key[1],
        seed=key[2],
        met=result.met,
        use=max(result.measured[b.cost].value / b.limit for b in result.budgets),
        dense=scores.test_dense,
        before=before.metric,
        fine_tuned=scores.test_recovered,
        trials=len(result.trials),
        seconds=round(result.seconds_searching, 1),
        compression=result.compression,
        theoretical_speed_up=result.theoretical_speed_up,
        top1_dense=scores.top1_dense,
        top1_before=before.top1,
        top1_fine_tuned=scores.top1_recovered,
        top5_dense=scores.top5_dense,
        top5_before=before.top5,
        top5_fine_tuned=scores.top5_recovered,
        made_of=digest,
    )


# ------------------------------------------------------------------------------------------------- what people see


def told(rows: Sequence[Row]) -> list[str]:
    """All that is told in words: the table, and the standard report once there is a row."""
    return [*table(rows), *(["", "standard report (Blalock et al., MLSys 2020):", "", *standard(rows)] if rows else [])]


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table, a line for each budget and strategy: means over the seeds with their 95 % interval."""
    lines = [
        "| budget | strategy | met | of the limit | before fine-tuning | fine-tuned | against dense | trials | s |",
        "|---" * 9 + "|",
    ]
    for (budget, strategy), own in _by_line(rows).items():
        cells = [budget, strategy, f"{sum(row.met for row in own)} of {len(own)}"]
        cells += [f"{statistics.mean(row.use for row in own):.3f}"]
        cells += [with_half_width([100 * row.before for row in own])]
        cells += [with_half_width([100 * row.fine_tuned for row in own])]
        cells += [f"{100 * statistics.mean(row.fine_tuned - row.dense for row in own):+.2f}"]
        cells += [f"{statistics.mean(value):.0f}" for value in zip(*((r.trials, r.seconds) for r in own), strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def standard(rows: Sequence[Row]) -> list[str]:
    """A Markdown table, a line for the dense network, which is the same for all, and one for each budget and strategy:
    means over the seeds with their 95 % interval; below it what each of its words means."""
    tops = [top for top in ("1", "5") if all(None not in _top(top, row) for row in rows)]
    heads = ["budget", "strategy", "seeds", "compression ratio", "theoretical speed-up"]
    lines = [[*heads, *(f"top-{top} before → after" for top in tops)]]
    lines.append(["", "dense", "", "1", "1"])
    lines[-1] += [f"{100 * statistics.mean(_top(top, row)[0] for row in rows):.2f}" for top in tops]
    for (budget, strategy), own in _by_line(rows).items():
        cells = [budget, strategy, str(len(own))]
        cells += [_narrow([row.compression for row in own]), _narrow([row.theoretical_speed_up for row in own])]
        for top in tops:
            _, before, after = zip(*(_top(top, row) for row in own), strict=True)
            cells.append(f"{_narrow([100 * share for share in before])} → {_narrow([100 * share for share in after])}")
        lines.append(cells)
    head, *rest = ("| " + " | ".join(cells) + " |" for cells in lines)
    notes = [*MEANINGS, *((NO_TOP,), (TOP, NO_TOP5, WHEN), (TOP, WHEN))[len(tops)]]
    return [head, "|---" * len(lines[0]) + "|", *rest, "", *(f"- {note}" for note in notes)]


def _top(count: str, row: Row) -> tuple[Any, Any, Any]:
    """top1_* or top5_* of the dense network, before the fine-tune and after it."""
    dense, before, after = (getattr(row, f"top{count}_{when}") for when in ("dense", "before", "fine_tuned"))
    return dense, before, after


def _by_line(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each budget and strategy."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.budget, row.strategy), []).append(row)
    return lines


def _narrow(values: Sequence[float]) -> str:
    """As with_half_width, where a line holds many."""
    return with_half_width(values).replace(" ", "")


def with_half_width(values: Sequence[float]) -> str:
    """A mean over S seeds, and the half width of its 95 % interval (Student's t)."""
    half = half_width(values)
    return f"{statistics.mean(values):.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of a mean over S seeds; infinite for one."""
    count = len(values)
    if count < 2:
        return math.inf
    return float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)


def plot(rows: Sequence[Row]) -> str:
    """SVG: of each budget a panel, the test metric of every strategy: seeds as dots, their mean and interval."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    names = list(dict.fromkeys(row.strategy for row in rows))
    drawn, axes = figure(7.5, 0.8 + (0.5 + 0.3 * len(names)) * len(budgets), len(budgets), 1)
    for axis, budget in zip(axes, budgets, strict=True):
        for what, colour, shift in (("before", BLUE, -0.15), ("fine_tuned", ORANGE, 0.15)):
            for place, name in enumerate(names):
                values = [100 * getattr(r, what) for r in rows if (r.budget, r.strategy) == (budget, name)]
                half = half_width(values)
                axis.plot(values, [place + shift] * len(values), "o", color=colour, alpha=0.4, markersize=3)
                error = half if math.isfinite(half) else 0.0
                axis.errorbar(statistics.mean(values), place + shift, xerr=error, fmt="|", color=colour, capsize=2)
        axis.axvline(100 * statistics.mean(r.dense for r in rows), color=GREY, linestyle="--", linewidth=1.0)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(budget, fontsize=9)
    drawn.supxlabel(
        "test metric in percent, 95 % interval: before fine-tuning (blue), fine-tuned (orange), dense (dashed)",
        fontsize=9,
        color=GREY,
    )
    return svg(drawn)


# ----------------------------------------------------------------------------------------------------------- files


def read(file: Path) -> tuple[Row, ...]:
    """The rows that were made so far.

    Raises:
        InputError: the file is not of a comparison.
    """
    if not file.exists():
        return ()
    kinds: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": _finite,
        "bool": {"True": True, "False": False}.__getitem__,
        "str": str,
        "float | None": lambda text: _finite(text) if text else None,
    }
    try:
        return tuple(
            Row(**{name: kinds[str(kind)](values[name]) for name, kind in Row.__annotations__.items()})
            for values in untrusted.rows_of(file)
        )
    except untrusted.DAMAGED as error:
        raise InputError(f"{file} is of no comparison ({type(error).__name__}: {error}): give another name=") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number must be finite, got {text}")
    return value


def _append(file: Path, row: Row) -> None:
    values, text = asdict(row), io.StringIO(newline="")
    writer = csv.DictWriter(text, list(values))
    if not file.exists() or not file.stat().st_size:
        writer.writeheader()
    writer.writerow(values)
    append(file, text.getvalue())
