"""Measuring processes that hang, die and are restarted; intervals that are honest; verdicts that may be undecided."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import ends
from torch import Tensor, nn

from autoprune.core import Budget, InputError, Measurement
from autoprune.meters.device import Device, MeasuringError, Worker, WorkerLostError, warm
from autoprune.meters.latency import Latency, Reference, disturbed, interval, quiet_readings
from autoprune.meters.wire import packed

QUICK = Device(processes=2, most_processes=2, samples=6, seconds=0.2, repeats=0)
ONCE = {"samples": 6, "width": 1.0, "seconds": 0.1, "block": 2, "settle": False, "seed": 0}


class Calls(nn.Module):
    """Runs a function of the test's instead of a network."""

    def __init__(self, action: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.action = action

    def forward(self, x: Tensor) -> Tensor:
        match self.action:
            case "sleep":
                time.sleep(0.01)
            case "hang":
                time.sleep(60)
            case "die":
                os._exit(3)
            case "environment":
                raise RuntimeError(f"{os.environ['OMP_WAIT_POLICY']} {torch.get_num_threads()} threads")
        return x * self.weight


class Sometimes(nn.Module):
    """Every fifth pass takes ten times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for _ in range(9 * (self.calls % 5 == 0)):
            self.layer(x)
        return self.layer(x)  # type: ignore[no-any-return]


def question(model: nn.Module) -> dict[str, object]:
    return {"do": "time", "models": [packed(model, (torch.ones(1),), "torch")], "plan": ONCE}


def test_a_worker_fixes_its_threads_and_its_waiting() -> None:
    with Worker(Device(threads=2)) as worker:
        assert worker.facts["threads"] == 2
        with pytest.raises(MeasuringError, match="RuntimeError: PASSIVE 2 threads"):
            worker.ask(question(Calls("environment")))
        assert worker.ask(question(nn.ReLU()))["rows"], "the process lives on after the network raised"


def test_a_worker_that_hangs_is_killed_at_its_limit() -> None:
    worker = Worker(QUICK)
    pid, began = worker.pid, time.perf_counter()
    assert pid is not None
    with pytest.raises(WorkerLostError, match="no answer within 1 s and was killed"):
        worker.ask(question(Calls("hang")), limit_s=1.0)
    assert time.perf_counter() - began < 3.0
    assert ends(pid)


def test_a_worker_that_dies_is_restarted_with_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with warm(QUICK) as worker, caplog.at_level(logging.WARNING, "autoprune"):
        first = worker._started().pid
        with pytest.raises(WorkerLostError, match="died"):
            worker.ask(question(Calls("die")))  # each of the two that are tried
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "another one is started" in caplog.text
        assert worker.ask(question(nn.ReLU()))["rows"]
        assert worker._started().pid != first


def test_a_process_killed_from_outside_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with warm(QUICK) as worker, caplog.at_level(logging.WARNING, "autoprune"):
        pid = worker._started().pid
        assert pid is not None
        threading.Timer(0.3, os.kill, (pid, 9)).start()
        plan = {**ONCE, "samples": 10**9, "seconds": 1.0}
        answer = worker.ask({**question(nn.ReLU()), "plan": plan})
        assert len(answer["rows"][0]["wall_ms"]) > 100
        assert len(caplog.records) == 1


def test_what_cannot_be_sent_is_named() -> None:
    model = nn.ReLU()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"cannot be sent to a measuring process .*lock"):
        packed(model, (torch.ones(1),), "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"device=gpu is not there: .*CUDA"):
        Worker(Device(name="gpu", place="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    found = Latency(Device(name="gpu", place="cuda")).measure(nn.Conv2d(3, 64, 3), (torch.randn(8, 3, 64, 64),))
    assert 0 < found.low <= found.value <= found.high
    assert found.decided


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"processes": 1}, {"seconds": 0.0}, {"most_processes": 3}])
def test_a_device_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"device=torch_cpu: {next(iter(wrong))}"):
        Device(**wrong)  # type: ignore[arg-type]


def test_a_measurement_says_what_it_is() -> None:
    found = Latency(QUICK).measure(nn.Conv2d(8, 8, 3), (torch.randn(4, 8, 32, 32),))
    assert found.kind == "measured"
    assert found.unit == "ms"
    assert 0 < found.low <= found.value <= found.high
    assert found.samples >= 2 * 6
    assert "torch_cpu" in found.device
    assert "1 thread" in found.device
    notes = "; ".join(found.notes)
    for word in ("p50", "p90", "p99", "CPU time", "first call", "2 fresh processes", "float32"):
        assert word in notes


def test_wall_above_cpu_time_decides_only_what_is_certain() -> None:
    """The network sleeps: 10 ms pass while the CPU works for far less. The truth is somewhere between."""
    found = Latency(QUICK).measure(Calls("sleep"), (torch.ones(1),))
    assert not found.decided
    assert "disturbed" in found.notes[0]
    assert found.low < 5 < 10 <= found.high
    assert Budget("latency_ms", 5.0, "ms").met(found) is None
    assert Budget("latency_ms", 1000.0, "ms").met(found) is True
    assert Budget("latency_ms", 1e-12, "ms").met(found) is False, "even the CPU worked for longer"


def test_a_disturbed_ratio_is_bounded_from_both_sides() -> None:
    found = Latency(QUICK).ratio(Calls("sleep"), Calls("sleep"), (torch.ones(1),))
    assert not found.decided
    assert found.low < 0.5 < 1 < 2 < found.high


def test_disturbance_is_told_at_one_cpu_thread_only() -> None:
    row = {"wall_ms": [1.0, 2.0, 2.0], "cpu_ms": [1.0, 1.0, 1.0]}
    assert disturbed(row, QUICK)
    assert not disturbed({**row, "wall_ms": [1.04, 1.0, 5.0]}, QUICK)
    assert not disturbed(row, Device(threads=2))
    assert not disturbed(row, Device(place="cuda"))


def test_a_ratio_is_told_apart() -> None:
    """Four times the work, interleaved: the interval lies well above 1, and the value is in the reference's ms."""
    inputs = (torch.randn(4, 16, 32, 32),)
    small, large = nn.Conv2d(16, 16, 3), nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
    ratio = Latency(QUICK).ratio(large, small, inputs)
    assert ratio.low > 2
    reference = Reference(small, Measurement.exact(10.0, "ms", "measured"), relative=True)
    value = Latency(QUICK).beside(reference).measure(large, inputs)
    assert value.value > 20
    assert "of dense, interleaved" in " ".join(value.notes)


def test_a_verdict_holds_at_either_pace() -> None:
    """The dense network is said to have taken 100 times as long when the table was made: the interval covers what
    passes now and what would have passed then, the value lies between."""
    inputs = (torch.randn(4, 16, 32, 32),)
    model = nn.Conv2d(16, 16, 3)
    now = Latency(QUICK).measure(model, inputs)
    slower = Reference(model, Measurement.exact(100 * now.value, "ms", "measured"), relative=False)
    found = Latency(QUICK).beside(slower).measure(model, inputs)
    assert found.low < 2 * now.value
    assert 5 * now.value < found.value < 20 * now.value
    assert found.high > 50 * now.value
    assert "in the cost table" in " ".join(found.notes)


@pytest.mark.parametrize(("noise", "processes"), [(0.0, 5), (0.2, 10)])
def test_processes_are_added_for_a_wide_ratio_and_not_for_the_pace(
    noise: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's pace differs by half from one process to the next, which no number of them makes narrower."""
    rng = np.random.default_rng(0)

    def reading(*_: object) -> dict[str, Any]:
        pace = float(rng.uniform(20, 30))
        rows = [pace * share * np.ones(12) for share in (0.5 * float(np.exp(rng.normal(0, noise))), 1.0)]
        return {"rows": [{"wall_ms": list(row), "cpu_ms": list(row)} for row in rows], "block": 3}

    meter = Latency(Device()).beside(Reference(nn.Identity(), Measurement.exact(25.0, "ms", "measured"), False))
    monkeypatch.setattr(meter, "_reading", reading)
    taken, undisturbed = meter._processes([])
    assert undisturbed
    assert len(taken) == processes


def simulated(rng: np.random.Generator, processes: int, spread: float) -> list[NDArray[np.float64]]:
    levels = 20 * np.exp(rng.normal(0, spread, processes))
    return [level * (1 + np.abs(rng.normal(0, 0.02, 40))) for level in levels]


def test_the_interval_covers_what_processes_differ_by() -> None:
    """Medians of processes differ by 3 %: the interval of 5 covers the true median in at least 90 % of 200 trials,
    though one process's own interval would cover it in far fewer."""
    rng = np.random.default_rng(0)
    truth = float(np.median(np.concatenate(simulated(rng, 4000, 0.03))))
    found = [interval(simulated(rng, 5, 0.03), i) for i in range(200)]
    assert sum(low <= truth <= high for _, low, high in found) >= 180
    assert all(low <= value <= high for value, low, high in found)


def test_the_same_model_is_not_called_faster() -> None:
    """A/A: both share their process's level; at most 5 % of 200 ratios exclude 1."""
    rng = np.random.default_rng(1)
    wrong = 0
    for i in range(200):
        levels = 20 * np.exp(rng.normal(0, 0.1, 5))
        a, b = ([level * (1 + np.abs(rng.normal(0, 0.03, 40))) for level in levels] for _ in "ab")
        _, low, high = interval([x / y for x, y in zip(a, b, strict=True)], i)
        wrong += not low <= 1 <= high
    assert wrong <= 10


@pytest.mark.slow
@pytest.mark.long
def test_a_high_quantile_is_above_the_median() -> None:
    """Every fifth pass is slow: p90 shows it, absolutely and as a ratio, and p50 does not. (One pass takes over a
    millisecond: shorter ones are timed several at once.)"""
    inputs = (torch.randn(32, 16, 48, 48),)
    model, plain = Sometimes(), nn.Conv2d(16, 16, 3)
    readings = {q: Latency(dataclasses.replace(QUICK, statistic=q)) for q in ("p50", "p90")}
    p50, p90 = (readings[q].measure(model, inputs).value for q in ("p50", "p90"))
    assert p90 > 2 * p50
    p50, p90 = (readings[q].ratio(model, plain, inputs).value for q in ("p50", "p90"))
    assert p90 > 1.5 * p50


@pytest.mark.parametrize(("statistic", "above"), [("p50", 0.5), ("p90", 0.1), ("p99", 0.01)])
def test_ten_passes_lie_above_a_quantile(statistic: str, above: float) -> None:
    device = Device(statistic=statistic)
    assert device.quantile == pytest.approx(1 - above)
    assert device.plan(0)["samples"] * device.processes * above >= 10 - 1e-9
    assert device.plan(0)["samples"] >= device.samples


def test_a_glance_takes_two_processes() -> None:
    inputs, model = (torch.randn(4, 16, 32, 32),), nn.Conv2d(16, 16, 3)
    meter = Latency(dataclasses.replace(QUICK, processes=5, most_processes=10))
    brief = meter.glance().measure(model, inputs)
    assert any("2 fresh processes" in note for note in brief.notes)


def test_a_statistic_that_is_not_known() -> None:
    with pytest.raises(InputError, match=r"statistic must be one of p50, p90, p99, got 'mean'"):
        Device(statistic="mean")


def test_raw_samples_are_kept(tmp_path: object) -> None:
    import json
    from pathlib import Path

    path = Path(str(tmp_path)) / "readings.jsonl"
    Latency(QUICK, readings=path).measure(nn.Conv2d(3, 8, 3), (torch.randn(1, 3, 16, 16),))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2
    assert all(len(r["rows"][0]["wall_ms"]) == len(r["rows"][0]["cpu_ms"]) >= 6 for r in rows)
    assert all(r["facts"]["runtime"].startswith("torch") for r in rows)


@pytest.mark.parametrize(("decides", "taken"), [(True, 3), (False, 6)])
def test_all_processes_are_taken_where_the_first_do_not_decide_and_that_is_asked_once(
    decides: bool, taken: int
) -> None:
    asked = []

    def decided(kept: Any) -> bool:
        asked.append(len(kept))
        return decides

    kept, _ = quiet_readings(
        dataclasses.replace(QUICK, processes=3, most_processes=6),
        lambda ordinal: {"rows": [{"wall_ms": [1.0], "cpu_ms": [1.0]}]},
        lambda kept: (1.0, 1.0, 1.0),
        decided=decided,
    )
    assert len(kept) == taken
    assert asked == [3]


@pytest.mark.slow
def test_a_limit_inside_the_interval_asks_for_every_process() -> None:
    model, inputs = nn.Linear(64, 64), (torch.ones(64, 64),)
    device = dataclasses.replace(QUICK, most_processes=4, precision=10.0)
    reference = Reference(model, Measurement.exact(1.0, "ms", "measured"), relative=True)
    held = [Latency(device).beside(reference, limit=limit).measure(model, inputs) for limit in (1.0, 50.0)]
    assert [any(f"{count} fresh processes" in note for note in m.notes) for m, count in zip(held, (4, 2), strict=True)]


def test_what_measures_runs_in_one_process(request: pytest.FixtureRequest) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        assert request.node.nodeid.endswith("@measuring")
