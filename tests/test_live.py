"""The board of a search: what it shows, in any terminal, and that nothing about it ends or slows a search."""

from __future__ import annotations

import io
import logging
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from autoprune.core import Budget, Candidate, Group, Measurement, PruningSpace, Trial
from autoprune.live import COLUMNS, Board
from autoprune.outset import Outset
from autoprune.screen import Screen


def outset(groups: int = 3, *, sign: float = 1.0, dense: float = 0.9, name: str = "g") -> Outset:
    space = PruningSpace(tuple(Group(name=f"{name}{i}", size=8, levels=(0.0, 0.25, 0.5, 0.75)) for i in range(groups)))
    return Outset(
        task="tiny",
        strategy="uniform",
        seed=0,
        device="cpu, 1 thread",
        metric="MulticlassAccuracy",
        dense_score=dense,
        sign=sign,
        dense={"macs": Measurement.exact(1000.0, "MACs", "counted")},
        budgets=(Budget("macs", 500.0, "MACs"),),
        asked=("flops_50pct",),
        space=space,
        parts={},
        study="",
        storage=None,
        versions={},
        notes=(),
    )


def trial(number: int, score: float, macs: float, ratio: float = 0.5, **rest: Any) -> Trial:
    fidelity = rest.pop("fidelity", 1.0)
    return Trial(
        number=number,
        candidate=Candidate(ratios=(ratio,) * rest.pop("groups", 3), fidelity=fidelity),
        score=score,
        score_low=score - 0.01,
        score_high=score + 0.01,
        costs={"macs": Measurement.exact(macs, "MACs", "predicted")},
        **rest,
    )


def drawn(board: Board, width: int = 100, height: int = 30) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(board)
    return captured.get()


def board(*trials: Trial, of: Outset | None = None, clock: Any = time.monotonic) -> Board:
    made = Board(lambda: "the stage", clock)
    made.begun(of or outset())
    made.staged()
    for each in trials:
        made.scored(each)
    return made


def test_the_best_so_far_is_within_the_budgets_and_scored_on_all_images() -> None:
    assert "none on all images within the budgets yet; dense 90.00 %" in drawn(board(trial(0, 0.99, 900.0)))
    best = board(
        trial(0, 0.80, 400.0, 0.25),
        trial(1, 0.85, 500.0, 0.75),
        trial(2, 0.99, 501.0),  # over the limit
        trial(3, 0.98, 100.0, fidelity=0.2),  # on a part of the images
        trial(4, 0.84, 100.0),
        Trial(number=5, candidate=Candidate(ratios=(0.5,) * 3), error="out of memory"),
    )
    shown = drawn(best)
    assert "best so far: 85.00 % [84.00 %, 86.00 %], trial 1; dense 90.00 %" in shown
    assert "500 of 500 MACs, 100.00 %; dense 1000 (predicted)" in shown
    assert shown.count("0.75") == 3  # the ratios of the groups
    assert "trials: 6, 1 failed, 0 from the cache" in shown
    assert "last: trial 5: failed" in shown
    assert "the stage" in shown


def test_a_metric_that_is_better_the_lower_is_shown_in_its_own_sign() -> None:
    shown = drawn(board(trial(0, -3.2, 400.0), trial(1, -3.5, 400.0), of=outset(sign=-1.0, dense=3.0)))
    assert "best so far: 3.2 [3.19, 3.21], trial 0; dense 3" in shown


def test_the_pace_counts_no_trial_of_an_earlier_run() -> None:
    times = iter([0.0, 10.0, 20.0, 30.0])
    made = Board(lambda: "", lambda: next(times))
    made.begun(outset())
    for number in range(50):
        made.scored(trial(number, 0.5, 400.0))
    made.staged()
    for number in range(50, 53):
        made.scored(trial(number, 0.5, 400.0))
    shown = drawn(made)
    assert "50 of an earlier run, 6 a minute" in shown


@pytest.mark.parametrize(("width", "height"), [(40, 24), (80, 24), (100, 12), (300, 50), (20, 5)])
def test_it_fits_the_terminal(width: int, height: int) -> None:
    many = outset(200, name="a.rather.long.name.of.a.layer.")
    lines = drawn(board(trial(0, 0.8, 400.0, groups=200), of=many), width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= height - 2  # the stage among them
    assert "".join(" ".join(lines).split()).startswith("bestsofar:80.00%[79.00%,81.00%]")
    shown = sum(line.count("0.50") for line in lines)
    assert shown <= COLUMNS * height
    if shown:
        assert f"and {200 - shown} more" in lines[-2]


def test_no_colour_and_no_unicode_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(board(trial(0, 0.8, 400.0)))
    assert "\x1b[32m" not in captured.get()
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, force_terminal=True)
    with console.capture() as captured:
        console.print(board(trial(0, 0.8, 400.0)))
    assert "#####-----" in captured.get()


def test_ten_thousand_trials_cost_nothing() -> None:
    of, trials = outset(100), [trial(n, n / 1e5, 400.0, groups=100) for n in range(10_000)]
    began = time.perf_counter()
    made = board(*trials, of=of)
    fed = time.perf_counter() - began
    began = time.perf_counter()
    drawn(made)
    assert fed < 2
    assert time.perf_counter() - began < 0.5


class Broken(Board):
    def _drawn(self, *_: Any) -> Any:
        raise ZeroDivisionError


def test_what_cannot_be_drawn_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.screen.Board", Broken)
    file = io.StringIO()
    with Screen(logging.getLogger("t"), console=Console(file=file, force_terminal=True, width=80)) as screen:
        screen.begun(outset())
        screen.stage("scoring candidates", 2)
        screen.scored(trial(0, 0.8, 400.0))
        screen.step()
        screen.say("a line")
    assert "a line" in file.getvalue()
    broken = Broken(lambda: "")
    assert drawn(broken).strip() == ""


def test_lines_go_above_the_board_on_a_terminal_and_stand_alone_elsewhere() -> None:
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=80, height=25)
        with Screen(logging.getLogger("t"), console=console) as screen:
            screen.begun(outset())
            screen.stage("scoring candidates", 1)
            screen.scored(trial(0, 0.8, 400.0))
            screen.step()
            time.sleep(0.6 * terminal)
        text = file.getvalue()
        assert ("best so far" in text) is terminal
        assert "scoring candidates (1): " in text
        assert terminal or text.count("\n") == 1


def test_a_long_stage_says_how_far_it_is_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.screen.EVERY_S", -1.0)
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=80, height=25)
        with Screen(logging.getLogger("t"), console=console) as screen:
            screen.stage("scoring candidates", 2)
            screen.step()
        assert ("scoring candidates: 1 of 2\n" in file.getvalue()) is not terminal


def test_quiet_shows_nothing() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, quiet=True)
    with Screen(logging.getLogger("t"), quiet=True, console=console) as screen:
        screen.stage("tracing", None)
        screen.say("a line")
    assert file.getvalue() == ""


def test_of_several_searches_the_last_is_shown_alone() -> None:
    made = board(trial(0, 0.85, 400.0, 0.75))
    made.begun(replace(outset(), strategy="amc", asked=("flops_10pct",), budgets=(Budget("macs", 100.0, "MACs"),)))
    shown = drawn(made)
    assert "none on all images within the budgets yet" in shown
    assert "trials: 0, 0 failed, 0 from the cache\n" in shown
    assert "last:" not in shown
    made.staged()
    made.scored(trial(0, 0.6, 90.0))
    assert "best so far: 60.00 % [59.00 %, 61.00 %], trial 0" in drawn(made)
