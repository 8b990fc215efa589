"""What the figures of a report say, worked out another way."""

from __future__ import annotations

import itertools
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from autoprune import figures, search_figures
from autoprune.page import html
from autoprune.search_figures import best_so_far, front, kind_of, scale_of, tradeoff
from autoprune.trialfile import Row

BUDGET = {"cost": "macs", "limit": 10.0, "unit": "MACs"}


def row(number: int, score: float = 0.5, macs: float = 5.0, **more: Any) -> Row:
    known: dict[str, Any] = {"recovery": "probe", "parent": "", "about": {}, "fidelity": 1.0, "measured": False}
    known |= {"change": (0.1, 0.0, 0.2), "feasible": None, "error": "", "ratios": (0.5, 0.0)}
    return Row(number=number, score=score, costs={"macs": macs}, **(known | more))


def test_the_front_is_what_nothing_beats() -> None:
    draw = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in draw.integers(0, 12, (60, 2))]
    beaten = {b for a, b in itertools.permutations(points, 2) if a[0] <= b[0] and a[1] >= b[1] and a != b}
    found = [points[i] for i in front(points)]
    assert found == sorted(set(points) - beaten)


def test_the_best_so_far_keeps_the_budgets_and_saw_all_images() -> None:
    trials = [
        row(0, 0.9, macs=20.0),
        row(1, 0.5),
        row(2, 0.8, fidelity=0.2),
        row(3, math.nan, error="MemoryError"),
        row(4, 0.4),
        row(5, 0.7, feasible=False),
        row(6, 0.6, macs=10.0),
        row(7, 0.65, fidelity=0.2, measured=True, feasible=True, macs=11.0),
    ]
    best = [None if t is None else t.number for t in best_so_far(trials, [BUDGET])]
    assert best == [None, 1, 1, 1, 1, 1, 6, 7]
    before = "before fine-tuning"
    kinds = [before, before, "on a part of the images", "failed", before, before, before, "measured"]
    assert [kind_of(t) for t in trials] == kinds
    assert kind_of(row(0, recovery="short")) == "fine-tuned"


@pytest.mark.parametrize(
    ("dense", "scores", "shown", "unit"),
    [
        (0.9, [0.9, 0.8], [90.0, 80.0], "m on the search split, %"),
        (0.2, [-0.2, -0.3], [0.2, 0.3], "m on the search split"),
        (30.0, [-30.0, -35.0], [30.0, 35.0], "m on the search split"),
        (-3.0, [-3.0, -4.0], [-3.0, -4.0], "split"),
    ],
)
def test_scores_are_shown_in_the_metrics_own_sign(
    dense: float, scores: list[float], shown: list[float], unit: str
) -> None:
    scale = scale_of({"metric": "m", "dense": dense}, [row(i, score) for i, score in enumerate(scores)])
    assert [scale.of_trial(score) for score in scores] == pytest.approx(shown)
    assert scale.label.endswith(unit)
    known = scale_of({"metric": "m", "dense": dense, "sign": scale.sign}, [])
    assert known == scale, "also where nothing was scored"


def test_the_baseline_and_the_answer_are_marked_and_partly_scored_trials_left_out() -> None:
    trials = [row(0, macs=20.0, score=0.9, ratios=(0.0, 0.0)), row(1, fidelity=0.1)]
    trials += [row(2, 0.6, about={"finalist": "evenness 0.25, one ratio widened"}), row(3, 0.7, measured=True)]
    values = {"finished": True, "score": {"metric": "m", "dense": 0.9}, "costs": {"macs": {"dense": 20.0}}}
    values |= {"groups": {"a": {"ratio": 0.5}, "b": {"ratio": 0.0}}, "budgets": [BUDGET]}
    ended = {
        "finished": True,
        "score": {"metric": "m", "dense": 0.9, "recovered": 0.8},
        "costs": {"macs": {"dense": 20.0, "measured": {"value": 9.5}}},
    }
    assert tradeoff({**values, **ended}, trials, BUDGET).rows[-1] == ("", "after the final training", 9.5, 80.0, 0, 0)
    drawn = tradeoff(values, trials, BUDGET)
    assert [(r[0], r[-1]) for r in drawn.rows] == [(0, 0), (2, 1), (3, 0)]
    assert [r[0] for r in drawn.rows if r[-2]] == [0, 3], "trial 2 costs the same and scores less"
    for words in ("one ratio for all groups", "the answer", "limit", "dense", "Pareto front"):
        assert f">{words}</text>" in drawn.svg
    assert "<script" not in drawn.svg
    assert drawn == tradeoff(values, trials, BUDGET), "the same bytes each time"


def test_shares_of_an_unfinished_run_are_those_before() -> None:
    group = {
        "size": 8,
        "kept": 8,
        "ratio": 0.0,
        "kinds": ["Conv2d"],
        "members": ["a"],
        "macs": [0.4, 0.4],
        "params": [0.3, 0.3],
    }
    values: dict[str, Any] = {"task": "t", "strategy": "s", "seed": 0, "device": "d", "versions": {}, "notes": []}
    values |= {
        "score": {"metric": "m", "dense": 0.9},
        "costs": {"macs": {"dense": 20.0, "unit": "MACs"}},
        "refused": {},
    }
    values |= {"groups": {"a": group}, "budgets": [{**BUDGET, "asked": "macs_10"}], "finished": False}
    values["search"] = {"study": "s", "storage": None, "trials": 1}
    known = dict.fromkeys(("parent", "about", "error", "loss_change", "loss_change_low", "loss_change_high"), "")
    trial = known | {"number": "0", "recovery": "probe", "score": "0.7", "macs": "9", "ratio:a": "0.25"}
    page, drawn = html(values, [trial])
    assert "unfinished" in page
    assert drawn[0].rows[0][:6] == ("a", "Conv2d", 8, 6, 0.25, 40.0)
    assert drawn[0].csv().splitlines()[1] == "a,Conv2d,8,6,0.25,40.0,,30.0,"
    assert ">after</text>" not in drawn[0].svg
    none, _ = html({**values, "search": {**values["search"], "trials": 0}}, [])
    assert "None so far keeps the budgets" in none
    losses, _ = html({**values, "score": {"metric": "m", "dense": 30.0}}, [{**trial, "score": "-35"}])
    assert "m\n35 on the search split, 30 dense" in losses


def test_sensitivity_is_of_one_group_alone() -> None:
    trials = [row(0), row(1, ratios=(0.25, 0.0)), row(2, ratios=(0.5, 0.5)), row(3, ratios=(0.75, 0.0), about={"x": 1})]
    trials += [row(4, ratios=(0.0, 0.5), error="no"), row(5, ratios=(0.0, 0.75), recovery="short")]
    assert figures.sensitivity_curves(["a", "b"], trials) == {"a": [(0.25, 0.1, 0.0, 0.2), (0.5, 0.1, 0.0, 0.2)]}


def test_the_warm_up_is_what_was_random() -> None:
    walks = [{"reward": r, "sigma": s} for r, s in ((0.1, None), (0.3, None), (0.9, 0.5))]
    assert search_figures.warm_up_mean(walks) == pytest.approx(0.2)
    drawn = search_figures.rewards(walks)
    assert [r[1] for r in drawn.rows] == ["random", "random", "agent"]
    assert drawn.rows[-1][3] == pytest.approx(1.3 / 3)


@pytest.mark.filterwarnings("error")
def test_names_are_no_formulas_and_break_no_file() -> None:
    group = {"size": 8, "kept": 4, "ratio": 0.5, "kinds": ["Conv2d"], "members": ["a"], "macs": [0.4, 0.2]}
    names = ["$\\foo{$", "a $x$", "b\x1b[31m\x01", "\u4e2d\u6587", "<b>&\"'"]
    drawn = [
        figures.ratios(dict.fromkeys(names, group)),
        figures.sensitivity(dict.fromkeys(names, group), {name: [(0.5, 0.1, 0.0, 0.2)] for name in names}),
        figures.layers([{"name": name, "dense_ms": 1.0, "pruned_ms": 0.5} for name in names]),
    ]
    for each in drawn:
        texts = "\n".join("".join(text.itertext()) for text in ElementTree.fromstring(each.svg).iter() if text.text)
        for name in ("$\\foo{$", "a $x$", "b?[31m?", "\u4e2d\u6587", "<b>&\"'"):
            assert name in texts, (each.name, name)
