"""What the last screens say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoprune import commands, console
from autoprune.final import FineTuned
from autoprune.page import amount
from autoprune.telling import Telling, told
from autoprune.training import Silenced, Trained


def tuned(sign: float, dense: float, after: float) -> FineTuned:
    nothing: Any = None
    return FineTuned(
        table=nothing,
        model=nothing,
        metric="M",
        sign=sign,
        test_dense=dense,
        test_recovered=after,
        dense={},
        measured={},
        seconds=1.0,
    )


def trained(sign: float, before: float, after: float, *groups: str) -> Trained:
    nothing: Any = None
    return Trained(
        model=nothing,
        regularizer={"_target_": "autoprune.regularizers.bn_l1"},
        metric="M",
        sign=sign,
        test_before=before,
        test_after=after,
        groups={name: Silenced(units=4, before=0, after=1) for name in groups or "a"},
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("sign", "dense", "after", "says"),
    [
        (1.0, 0.75, 0.8, "75.00 % dense, 80.00 % pruned and fine-tuned (+5.00 points)"),
        (-1.0, 0.03, 0.02, "0.03 dense, 0.02 pruned and fine-tuned (-0.01)"),
        (-1.0, 23.4, 23.9, "23.4 dense, 23.9 pruned and fine-tuned (+0.5)"),
        (1.0, 35.0, 30.0, "35 dense, 30 pruned and fine-tuned (-5)"),
    ],
)
def test_scores_that_are_no_fractions_are_told_as_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sign: float, dense: float, after: float, says: str
) -> None:
    (tmp_path / "result.json").write_text("{}")
    with told(Telling(quiet=True)):
        console.show_finetuned(tuned(sign, dense, after), tmp_path)
        assert f"M: test {says}" in capsys.readouterr().out
        console.show_trained(trained(sign, dense, after), tmp_path)
        shown = says.replace("dense", "before").replace("pruned and fine-tuned", "trained with bn_l1")
        assert f"M: test {shown}" in capsys.readouterr().out


def test_names_are_shown_letter_by_letter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    names = ("a[0]", "[bold]b", "[/]", ":smile:")
    console.show_trained(trained(1.0, 0.5, 0.5, *names), tmp_path)
    shown = capsys.readouterr().out
    for name in names:
        assert f"│ {name} " in shown


def test_words_of_the_task_are_those_that_add_and_remove_too() -> None:
    words = ["task._target_=m.make", "+task.width=12", "~task.depth", "budget=flops_50pct", "weights=a", "+x.task=1"]
    assert commands._of(words, "task", "weights=") == [*words[:3], "weights=a"]


def test_an_amount_has_four_digits() -> None:
    values = [0.03689, 9999.4, 9999.7, 12345.0, 999960.0, 2.5e6, -5e4, 4.1e9]
    assert [amount(value) for value in values] == "0.03689 9999 10k 12.35k 1000k 2.5M -50k 4.1G".split()
