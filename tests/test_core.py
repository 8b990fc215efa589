from __future__ import annotations

import json

import pytest

from autoprune.core import Budget, Candidate, Group, InputError, Measurement, PruningSpace, Trial


@pytest.mark.parametrize(
    ("text", "cost", "limit", "unit"),
    [
        ("flops_50pct", "macs", 0.5, "dense"),
        ("flops_40M", "macs", 20e6, "MACs"),
        ("macs_20M", "macs", 20e6, "MACs"),
        ("params_300k", "params", 300e3, "parameters"),
        ("params_1234", "params", 1234, "parameters"),
        ("memory_2MB", "memory_mb", 2.0, "MB"),
        ("memory_500KB", "memory_mb", 0.5, "MB"),
        ("latency_15ms", "latency_ms", 15.0, "ms"),
        ("latency_0.5s", "latency_ms", 500.0, "ms"),
        ("energy_50pct", "energy_mj", 0.5, "dense"),
    ],
)
def test_budgets_are_read(text: str, cost: str, limit: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(cost, limit, unit)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latency_20", "unit is missing"),
        ("latency_-5ms", "must be above 0"),
        ("flops_150pct", "at most 100"),
        ("speed_20ms", "unknown cost 'speed'"),
        ("flops_0pct", "must be above 0"),
        ("macs_20MB", "unknown unit 'MB'"),
        ("macs_1.2.3M", "not a number"),
        ("flops", "is not <cost>_<number><unit>"),
        ("", "is not <cost>_<number><unit>"),
    ],
)
def test_malformed_budgets_say_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Budget.parse(text)


def test_a_relative_budget_is_taken_of_the_dense_model() -> None:
    resolved = Budget.parse("flops_25pct").resolve({"macs": Measurement.exact(80.0, "MACs", "counted")})
    assert resolved == Budget("macs", 20.0, "MACs")


def test_the_whole_interval_decides_and_a_prediction_decides_nothing() -> None:
    budget = Budget("latency_ms", 20.0, "ms")
    within = Measurement(value=19.0, unit="ms", low=18.0, high=19.9, kind="measured")
    across = Measurement(value=19.0, unit="ms", low=18.0, high=20.1, kind="measured")
    assert budget.met(within) is True
    assert budget.met(across) is False
    assert budget.met(Measurement.exact(1.0, "ms", "predicted")) is None


def test_a_space_checks_its_candidates() -> None:
    space = PruningSpace((Group(name="a", size=8, levels=(0.0, 0.25, 0.5)), Group(name="b", size=4, levels=(0.0,))))
    assert space.check([0.25, 0.0]) == (0.25, 0.0)
    assert space.kept((0.25, 0.0)) == (6, 4)
    with pytest.raises(ValueError, match="not a level of a"):
        space.check([0.3, 0.0])
    with pytest.raises(ValueError, match="2 groups but 1"):
        space.check([0.25])


@pytest.mark.parametrize("levels", [(), (0.1, 0.2), (0.0, 0.5, 0.5), (0.0, 1.0)])
def test_levels_must_rise_from_zero(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must rise from"):
        Group(name="a", size=8, levels=levels)


def test_a_trial_survives_json_exactly() -> None:
    trial = Trial(
        number=3,
        candidate=Candidate(
            ratios=(1 / 3, 0.1),
            recovery="short",
            measure=True,
            parent=2,
            about={"round": 4, "target macs": 1e9 / 3, "group": "conv1"},
        ),
        score=0.1 + 0.2,
        loss=1e-17,
        loss_change=Measurement.exact(0.7, "loss", "measured", ("paired",)),
        costs={"macs": Measurement.exact(1e9 / 3, "MACs", "counted")},
        feasible=True,
    )
    back = Trial.from_json(json.loads(json.dumps(trial.to_json())))
    assert back.candidate == trial.candidate
    assert (back.score, back.loss, back.costs, back.loss_change) == (
        trial.score,
        trial.loss,
        trial.costs,
        trial.loss_change,
    )
