"""Searches under measured budgets, with real measuring processes on the tiny task."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import QUICK, searched
from tiny import make_task

from autoprune import report
from autoprune.answer import best, settled
from autoprune.core import Budget, Candidate, CostModel, InputError, Measurement, PruningSpace, Silent, Task, Trial
from autoprune.costs import Costs
from autoprune.meters.device import Device, MeasuringError
from autoprune.meters.profile import CostTable, Profile
from autoprune.result import Result
from autoprune.verdict import _measured

DEVICE = Device(processes=2, most_processes=2, samples=10, seconds=0.3, repeats=1, limit_s=20)


class Spoken(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def task() -> Task:
    """The tiny task with enough examples in its input that arithmetic, not Python, takes the time."""
    plain = make_task()
    return dataclasses.replace(plain, inputs=(plain.search[0][0].repeat(4, 1, 1, 1),))  # type: ignore[index]


def measured_search(folder: Path, budget: Any = "latency_80pct", **settings: Any) -> Result:
    defaults: dict[str, Any] = {
        "device": DEVICE,
        "profile": Profile(networks=16, held_out=5),
        "tables": folder / "tables",
        "final": QUICK,
    }
    return searched(task(), budget=budget, **(defaults | settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, unheeding: None) -> Path:
    """Where the tests of this file keep one cost table."""
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Result:
    """One search from profile to verdict."""
    return measured_search(folder, readings=folder / "readings.jsonl")


@pytest.mark.slow
def test_a_measured_budget_from_profile_to_verdict(whole: Result, folder: Path, tmp_path: Path) -> None:
    result = whole
    latency = result.measured["latency_ms"]
    assert latency.kind == "measured"
    assert result.met == (latency.high <= result.budgets[0].limit), "the verdict follows from the interval"
    assert "of dense, interleaved" in " ".join(latency.notes)
    answers = [t for t in result.trials if t.candidate.measure]
    assert 1 <= len(answers) <= 1 + 4, "four attempts, and before them the smallest network where none seems to do"
    assert all(t.predicted["latency_ms"] > 0 and t.costs["latency_ms"].kind == "measured" for t in answers)
    assert len(result.held_out) == 5
    assert {layer.name for layer in result.layers} >= {"0.0", "3.0"}
    processes = (folder / "readings.jsonl").read_text().splitlines()
    assert len(processes) >= 2 * (1 + len(answers) + 1), "the dense network, the answers, the final network"

    report.write(result, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6  # ratios, trade-off, progress, sensitivity, prediction, layers
    assert "Predicted and measured" in page
    assert "What each layer takes" in page


@pytest.mark.slow
def test_an_interrupted_measured_search_goes_on_and_with_another_table_is_another(
    whole: Result, folder: Path, tmp_path: Path
) -> None:
    class Impatient(Silent):
        def stage(self, name: str, steps: int | None) -> None:
            if name.startswith("fine-tuning"):
                raise KeyboardInterrupt

    storage = f"sqlite:///{tmp_path}/studies.db"
    with pytest.raises(KeyboardInterrupt):
        measured_search(folder, storage=storage, study_name="mine", progress=Impatient())
    said = Spoken()
    resumed = measured_search(folder, storage=storage, study_name="mine", progress=said)
    assert resumed.evaluations == 0
    assert any("goes on" in line for line in said.lines)
    assert before_measuring(resumed) == before_measuring(whole), "the same table gives the same trials"
    (kept,) = (folder / "tables").iterdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / kept.name).write_text(kept.read_text().replace('"held_out": 5', '"held_out": 4'))
    with pytest.raises(InputError, match=r"study 'mine' .* belongs to another search .*costs was"):
        measured_search(tmp_path, storage=storage, study_name="mine")


def before_measuring(result: Result) -> list[tuple[Candidate, float]]:
    """The trials up to the first that was measured."""
    first = next(i for i, t in enumerate(result.trials) if t.candidate.measure)
    return [(t.candidate, t.score) for t in result.trials[: first + 1]]


@pytest.mark.slow
def test_a_dense_network_that_keeps_the_budget_is_left_alone(folder: Path, tmp_path: Path) -> None:
    said = Spoken()
    result = measured_search(folder, budget="latency_10s", progress=said)
    assert result.met
    assert result.trials == ()
    assert set(result.ratios) == {0.0}
    assert result.scores.test_recovered == result.scores.test_dense
    (line,) = (line for line in said.lines if "keeps latency_10s already" in line)
    assert f"{result.measured['latency_ms'].value:.4g}" in line
    assert line.endswith("budget=latency_50pct")
    assert all(
        torch.equal(a, b) for a, b in zip(result.model.parameters(), make_task().model.parameters(), strict=True)
    )
    report.write(result, tmp_path)


@pytest.mark.slow
def test_budgets_mix(folder: Path) -> None:
    result = measured_search(folder, budget=["latency_90pct", "params_60pct"])
    assert result.measured["params"].value <= result.budgets[1].limit
    assert {b.cost for b in result.budgets} == {"latency_ms", "params"}


def test_latency_is_absolute_or_relative() -> None:
    with pytest.raises(InputError, match="both in ms and relative to dense"):
        searched(budget=["latency_50pct", "latency_3ms"])


def test_energy_is_absolute_or_relative() -> None:
    with pytest.raises(InputError, match="energy is limited both in mJ and relative to dense"):
        searched(budget=["energy_50pct", "energy_3mJ"])


@pytest.mark.slow
@pytest.mark.long
def test_an_unreachable_budget_ends_with_the_smallest_measured(folder: Path) -> None:
    result = measured_search(folder, budget="latency_1us")
    assert not result.met
    assert result.ratios == tuple(g.levels[-1] for g in result.space.groups)
    assert result.measured["latency_ms"].kind == "measured"


@pytest.mark.slow
@pytest.mark.long
def test_a_hanging_worker_costs_one_line_and_no_trial(
    whole: Result, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first answer's process is made to hang: it is killed at the limit, another one gives the reading."""
    from autoprune.meters import device

    ask = device.Worker.ask
    hung: list[int | None] = []

    def slow(self: device.Worker, message: Any, **limit: Any) -> Any:
        if message.get("plan", {}).get("settle") and not hung:
            hung.append(self.pid)
            return ask(self, {**message, "plan": {**message["plan"], "samples": 10**9, "seconds": 600.0}}, limit_s=2.0)
        return ask(self, message, **limit)

    monkeypatch.setattr(device.Worker, "ask", slow)
    with caplog.at_level(logging.WARNING, "autoprune"):
        result = measured_search(folder)
    assert caplog.text.count("was killed; another one is started") == 1
    assert before_measuring(result) == before_measuring(whole)
    assert not any(t.error for t in result.trials)


def answer(number: int, value: float, score: float, *, decided: bool = True) -> Trial:
    cost = Measurement(value=value, unit="ms", low=value - 0.9, high=value, kind="measured", decided=decided)
    budget = Budget("latency_ms", 10.0, "ms")
    return Trial(
        number=number,
        candidate=Candidate(ratios=(0.0,), measure=True),
        score=score,
        score_low=score,
        score_high=score,
        loss=1 - score,
        costs={"latency_ms": cost},
        feasible=budget.met(cost),
    )


def test_a_disturbed_answer_comes_after_those_that_are_met() -> None:
    budgets = (Budget("latency_ms", 10.0, "ms"),)
    over, disturbed, met = answer(0, 11.0, 0.9), answer(1, 10.5, 0.8, decided=False), answer(2, 9.0, 0.5)
    assert disturbed.feasible is None
    assert best([over, disturbed, met], budgets, budgets) is met
    assert best([over, disturbed], budgets, budgets) is disturbed
    assert best([over], budgets, budgets) is over


def test_an_answer_as_low_as_was_aimed_at_comes_first() -> None:
    """The final network is measured again: one that is barely inside now may read more then."""
    aimed, asked = (Budget("latency_ms", limit, "ms") for limit in (9.5, 10.0))
    barely, well = answer(0, 9.9, 0.9), answer(1, 9.4, 0.8)
    assert best([barely, well], [aimed], [asked]) is well
    assert best([barely], [aimed], [asked]) is barely


def test_a_disturbed_answer_that_is_surely_above_the_limit_is_not_met() -> None:
    """11.1 to 12 of 10 ms: disturbed or not, a smaller excess is closer."""
    budgets = (Budget("latency_ms", 10.0, "ms"),)
    far, near = answer(0, 12.0, 0.9, decided=False), answer(1, 10.5, 0.5)
    assert far.feasible is False
    assert best([far, near], budgets, budgets) is near


def test_only_a_disturbed_end_is_measured_again() -> None:
    on_the_way, then, end = (
        answer(0, 10.5, 0.9, decided=False),
        answer(1, 11.0, 0.8),
        answer(2, 10.5, 0.7, decided=False),
    )
    assert on_the_way.feasible is None
    assert settled((on_the_way, then, end)) == (on_the_way, then)
    assert settled((on_the_way, then)) == (on_the_way, then)
    assert settled((on_the_way,)) == ()


def test_an_end_that_others_start_from_is_none() -> None:
    """A round went on from a disturbed winner and was interrupted before it measured its own."""
    won = answer(0, 10.5, 0.9, decided=False)
    proposal = Trial(number=1, candidate=Candidate(ratios=(0.5,), parent=0))
    assert settled((won, proposal)) == (won, proposal)
    beside = dataclasses.replace(proposal, candidate=Candidate(ratios=(0.5,)))
    assert settled((won, beside)) == ()


def test_a_device_that_fails_at_the_end_loses_no_work() -> None:
    """The trial's own measurement stands as a prediction, so that the files are written and nothing is called met."""

    class Failing:
        def measured(self, model: torch.nn.Module) -> dict[str, Measurement]:
            raise MeasuringError("gone")

    counted = Measurement.exact(5.0, "MACs", "counted")
    trial = answer(0, 9.0, 0.5)
    trial = dataclasses.replace(trial, costs={**trial.costs, "macs": counted})
    found = _measured(Failing(), torch.nn.ReLU(), trial)  # type: ignore[arg-type]
    assert found["macs"] == counted
    assert Budget("latency_ms", 10.0, "ms").met(found["latency_ms"]) is None
    assert "could not be measured (gone)" in found["latency_ms"].notes[0]
    with pytest.raises(MeasuringError):
        _measured(Failing(), torch.nn.ReLU(), dataclasses.replace(trial, costs={}))  # type: ignore[arg-type]


def test_what_was_disturbed_is_measured_again(tmp_path: Path) -> None:
    """A study rewinds where a trial is recorded anew."""
    from autoprune.core import Group, PruningSpace
    from autoprune.study import Study

    space = PruningSpace((Group(name="g", size=2, levels=(0.0, 0.5)),))
    budgets = (Budget("latency_ms", 10.0, "ms"),)
    study = Study(f"sqlite:///{tmp_path}/s.db", "s", fingerprint={}, space=space, budgets=budgets)
    for trial in (answer(0, 9.0, 0.1), answer(1, 10.5, 0.2, decided=False), answer(2, 8.0, 0.3)):
        study.record(trial)
    study.record(answer(1, 9.5, 0.2))
    assert [(t.number, t.costs["latency_ms"].value) for t in study.trials()] == [(0, 9.0), (1, 9.5)]


class SaysWhatDenseTakes:
    """Fake: refuses, with what the cost model it is given predicts of the dense network."""

    def __init__(self, space: PruningSpace, budgets: Any, costs: Mapping[str, CostModel], *, seed: int) -> None:
        if costs:
            raise InputError(repr(float(costs["latency_ms"].predict(space.dense()))))


@pytest.mark.slow
def test_under_a_limit_in_ms_the_first_answer_is_aimed_at_the_upper_end(tmp_path: Path, unheeding: None) -> None:
    """By as much as the dense network's interval reaches above its value; a ratio is spared the pace."""
    few, strategy = Profile(networks=8, held_out=1), {"_target_": f"{__name__}.SaysWhatDenseTakes"}
    said = {}
    for budget in ("latency_0.01ms", "latency_50pct"):
        with pytest.raises(InputError) as refused:
            measured_search(tmp_path, budget=budget, profile=few, strategy=strategy)
        said[budget] = float(str(refused.value))
    (path,) = (tmp_path / "tables").iterdir()
    dense = CostTable.from_json(json.loads(path.read_text())).dense
    assert dense.high > dense.value
    assert list(said.values()) == pytest.approx([dense.high, dense.value])


def test_strategies_aim_below_a_measured_limit_only(whole_costs: Costs) -> None:
    macs, latency = whole_costs.steered
    assert macs.limit == 100.0
    assert latency.limit == pytest.approx(18.0)


@pytest.fixture
def whole_costs() -> Costs:
    from autoprune.space import trace

    plain = make_task()
    limits = (Budget("macs", 100.0, "MACs"), Budget("latency_ms", 20.0, "ms"))
    traced = trace(plain.model, plain.inputs)
    return Costs(traced=traced, dense={}, meters={}, models={}, aimed={}, limits=limits, margins={"latency_ms": 0.1})
