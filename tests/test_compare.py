from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run
from test_final import Once, share_within
from test_prune import Named
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from autoprune import compare, components
from autoprune.compare import Row, half_width, plot, read, standard, table, told
from autoprune.core import InputError, Task
from autoprune.recover import FineTune
from autoprune.result import Result
from autoprune.run import search
from autoprune.space import Space

SMALL = (
    "task._target_=tiny.make_task finetune.epochs=0.1 evaluator.images=200 evaluator.short.epochs=0.1 "
    "evaluator.cache=null strategies=[uniform,random] evaluations=6"
)


def row(strategy: str, seed: int, fine_tuned: float) -> Row:
    return Row(
        budget="flops_50pct",
        strategy=strategy,
        seed=seed,
        met=True,
        use=0.98,
        dense=0.93,
        before=0.8,
        fine_tuned=fine_tuned,
        trials=10,
        seconds=3.0,
        compression=2.5,
        theoretical_speed_up=2.0,
        top1_dense=0.93,
        top1_before=0.8,
        top1_fine_tuned=fine_tuned,
        top5_dense=0.99,
        top5_before=0.95,
        top5_fine_tuned=0.98,
        made_of="",
    )


@pytest.mark.slow
def test_a_comparison_is_made_once_and_grows(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "compare", *SMALL.split(), "seeds=[0]", "settings.random.finalists=1")
    assert status == 0, err
    (file,) = Path("outputs").rglob("comparison.csv")
    assert [(r.strategy, r.seed) for r in read(file)] == [("uniform", 0), ("random", 0)]
    assert "| flops_50pct | random | 1 of 1 |" in out
    before = file.read_text()
    status, out, err = run(capsys, "compare", *SMALL.split(), "seeds=[0,1]", "settings.random.finalists=1")
    assert status == 0, err
    assert file.read_text().startswith(before), "rows that are there are not made again"
    assert [(r.strategy, r.seed) for r in read(file)[2:]] == [("uniform", 1), ("random", 1)]
    assert "| flops_50pct | random | 2 of 2 |" in out
    assert (file.parent / "comparison.svg").read_text().startswith("<svg")
    words = (file.parent / "comparison.md").read_text()
    assert words in out, "what is kept is what is shown"
    assert "| flops_50pct | random | 2 |" in words.partition("standard report")[2]
    for made in read(file):
        assert made.top1_fine_tuned == pytest.approx(made.fine_tuned, abs=1e-6), "its metric is the micro accuracy"
        assert made.top1_before == pytest.approx(made.before, abs=1e-6)
        assert made.theoretical_speed_up >= 2, "at most half the FLOPs"
    with file.open(newline="") as opened:
        trials = {r["strategy"]: int(r["trials"]) for r in csv.DictReader(opened)}
    assert trials["uniform"] == 1
    assert trials["random"] <= 6 + 3 + 1 + 2, "six, those that race on and on, one finalist, and the answer"
    status, _, err = run(
        capsys, "compare", *SMALL.split(), "seeds=[0]", "settings.random.finalists=2", f"name={file.parent.name}"
    )
    assert status == 2
    assert "random under flops_50pct, seed 0, of other settings: give another name=" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("strategies=[magic]", "unknown strategy 'magic': it must be one of amc"),
        ("strategies=[]", "strategies is empty"),
        ("evaluations=3", "evaluations >= 4 must hold, got evaluations=3"),
        ("settings.netadapt.screen=1", "settings.netadapt: 'netadapt' is not among the strategies compared"),
        ("settings={random:{speed:1}}", "does not take these arguments"),
        ("settings.random.band=7", "random: 0 < band <= 1 must hold, got band=7"),
        ("settings.random=5", "settings.random must be a mapping of the strategy's keys, got 5"),
        ("seeds=[]", "seeds is empty"),
        ("seeds=[0,0]", "seeds has one of [0, 0] twice"),
        ("seeds=3", "seeds must be a list, got 3"),
        ("strategies=uniform", "strategies must be a list, got 'uniform'"),
        ("budget=speed_50pct", "unknown cost 'speed'"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_2(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "compare", *SMALL.split(), words)
    assert status == 2
    assert says in err


def test_the_table_tells_means_with_their_intervals() -> None:
    rows = [row("amc", 0, 0.90), row("amc", 1, 0.92), row("uniform", 0, 0.88)]
    lines = table(rows)
    assert lines[2] == "| flops_50pct | amc | 2 of 2 | 0.980 | 80.00 ± 0.00 | 91.00 ± 12.71 | -2.00 | 10 | 3 |"
    assert lines[3] == "| flops_50pct | uniform | 1 of 1 | 0.980 | 80.00 | 88.00 | -5.00 | 10 | 3 |"
    assert half_width([90.0, 92.0]) == pytest.approx(12.706, abs=1e-3)
    assert "amc" in plot(rows)


def cells(lines: Sequence[str], strategy: str) -> list[str]:
    (line,) = (line for line in lines if f"| {strategy} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_standard_report_tells_means_over_seeds_and_what_its_words_mean() -> None:
    ratios, after = [2.1, 2.4, 2.6], [0.90, 0.92, 0.91]
    rows = [
        dataclasses.replace(row("amc", seed, value), compression=ratio)
        for seed, (ratio, value) in enumerate(zip(ratios, after, strict=True))
    ]
    rows.append(row("uniform", 0, 0.88))
    lines = standard(rows)
    quantile = 4.302653  # of Student's t with two degrees of freedom, from a table
    halves = [quantile * statistics.stdev(values) / 3**0.5 for values in (ratios, [100 * value for value in after])]
    spread = [f"{statistics.mean(ratios):.2f}±{halves[0]:.2f}", f"91.00±{halves[1]:.2f}"]
    assert cells(lines, "dense") == ["", "dense", "", "1", "1", "93.00", "99.00"]
    assert cells(lines, "amc")[2:] == [
        *("3", spread[0], "2.00±0.00"),
        *(f"80.00±0.00 → {spread[1]}", "95.00±0.00 → 98.00±0.00"),
    ]
    assert cells(lines, "uniform")[2:] == ["1", "2.50", "2.00", "80.00 → 88.00", "95.00 → 98.00"], "no spread of one"
    assert (
        "- compression ratio: parameters of the dense network / of the pruned one, masked weights not counted" in lines
    )
    assert any(line.startswith("- theoretical speed-up: multiply-adds of the dense network / of the") for line in lines)
    assert told([]) == table([])


@pytest.mark.parametrize(("known", "says"), [((), "no top-1 and top-5: the task's outputs"), ((1,), "no top-5: the")])
def test_a_task_without_top_1_or_top_5_is_told_so(known: tuple[int, ...], says: str) -> None:
    nothing: dict[str, Any] = {
        f"top{k}_{when}": None for k in {1, 5} - set(known) for when in ("dense", "before", "fine_tuned")
    }
    lines = standard([dataclasses.replace(row("amc", seed, 0.9), **nothing) for seed in (0, 1)])
    assert cells(lines, "amc")[2:] == ["2", "2.50±0.00", "2.00±0.00", *["80.00±0.00 → 90.00±0.00"] * len(known)]
    assert any(line.startswith(f"- {says}") for line in lines)


def test_both_tables_fit_a_terminal() -> None:
    rows = [
        dataclasses.replace(row("sensitivity", seed, 0.9 + 0.01 * seed), budget="latency_50pct", compression=2 + seed)
        for seed in range(3)
    ]
    assert max(map(len, told(rows))) <= 120


class Wide(Named):
    """Seven classes, linear layers alone, so that every multiply-add is a weight's."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 7)


def test_a_row_is_of_the_networks_it_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Single weights are masked, batches are mappings, and the test split is read once for the dense network and the
    answer, once for the answer before its fine-tune."""
    torch.manual_seed(0)
    model, inputs = Wide(), {"one": torch.randn(1, 6), "other": torch.randn(1, 4)}
    splits = [
        [({"other": torch.randn(n, 4), "one": torch.randn(n, 6)}, torch.randint(7, (n,))) for n in (64, 64, 21)]
        for _ in range(3)
    ]
    test = Once(splits[2])
    task = Task(
        name="wide",
        model=model,
        inputs=inputs,
        train=splits[0],
        search=splits[1],
        test=test,
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(7, average="macro"),
        lr=0.2,
    )
    found: list[Result] = []

    def seen(*given: Any, **settings: Any) -> Result:
        found.append(search(*given, **settings))
        return found[-1]

    monkeypatch.setattr("autoprune.run.search", seen)
    (made,) = compare.compare(
        task,
        budgets=[("params_50pct",)],
        strategies={"uniform": components.spec("strategy", "uniform")},
        seeds=[0],
        folder=tmp_path,
        space=Space(grain=("weight",)),
        final=FineTune(epochs=2),
    )
    assert test.begun == 2
    assert read(tmp_path / "comparison.csv") == (made,)
    (result,) = found
    masks = dict(result.model.named_buffers())
    assert len(masks) == 3
    weights, left = sum(mask.numel() for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values())
    biases = 8 + 8 + 7
    assert made.compression == pytest.approx((weights + biases) / (left + biases))
    assert made.compression > 2
    assert made.theoretical_speed_up == pytest.approx(weights / left)
    cut = result.table.prune(model, inputs)
    for when, network in (("dense", model), ("before", cut), ("fine_tuned", result.model)):
        with torch.no_grad():
            answers = [(network(**given), target) for given, target in splits[2]]
        for count in (1, 5):
            assert getattr(made, f"top{count}_{when}") == pytest.approx(share_within(count, answers)), (when, count)
    assert made.top1_before != made.top1_fine_tuned


OLDER = "budget,strategy,seed,met,use,dense,before,fine_tuned,trials,seconds,made_of\n"
OLDER += "flops_50pct,amc,0,True,0.9,0.93,0.8,0.9,10,3.0,abc\n"


@pytest.mark.parametrize("content", ["a,b\n1,2\n", OLDER])
def test_a_file_of_something_else_or_an_earlier_version_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.csv").write_text(content)
    with pytest.raises(InputError, match=r"is of no comparison.*give another name="):
        read(tmp_path / "comparison.csv")
