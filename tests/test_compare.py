from __future__ import annotations

import csv
from pathlib import Path

import pytest
from test_cli import run

from autoprune.compare import Row, half_width, plot, read, table

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
        made_of="",
    )


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
    assert "random" in (file.parent / "comparison.md").read_text()
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


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from autoprune.core import InputError

    (tmp_path / "comparison.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="is of no comparison"):
        read(tmp_path / "comparison.csv")
