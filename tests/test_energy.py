"""Energy: modelled in closed form and exactly predicted; measured by a counter put into zeus by its own interface."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_counts import task_of
from test_run import QUICK, searched
from tiny import make_task
from torch import nn
from zoo import ZOO

from autoprune import console, report
from autoprune.costs import modelled_energy
from autoprune.meters.device import Device
from autoprune.meters.energy import Constants, Counter, MeasuredEnergy, ModelledEnergy, counter_of
from autoprune.meters.latency import Reference
from autoprune.result import Result
from autoprune.space import trace

DEVICE = Device(processes=2, most_processes=2, seconds=0.3, repeats=2)
ZEUS = find_spec("zeus") is not None
FAKE = Path(__file__).parent / "fake_counter"
with_zeus = pytest.mark.skipif(not ZEUS, reason="zeus is not installed")


# ------------------------------------------------------------------------------------------------------------ modelled


def test_modelled_energy_in_closed_form() -> None:
    """Two images of [3, 10, 10] through a 1 x 1 convolution to 8 channels, and a ReLU: every number by hand."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    found = ModelledEnergy(why="zeus is not installed there").measure(model, (torch.zeros(2, 3, 10, 10),))
    macs = 2 * 100 * 3 * 8
    moved = 4 * (3 * 8 + 8) + 2 * (4 * 2 * 100 * 8) * 2  # weights once; two tensors, written and read
    assert found.value == pytest.approx((macs * 4.6 + moved * 160) * 1e-9)
    assert found.low == found.value == found.high
    assert (found.kind, found.unit) == ("modelled", "mJ")
    notes = "; ".join(found.notes)
    assert "modelled, not measured: 0.0048M MACs x 4.6 pJ + 0.02573 MB moved x 160 pJ/byte" in notes
    assert "Horowitz" in notes
    assert "no counter: zeus is not installed there" in notes


@pytest.mark.parametrize("name", ZOO)
def test_predicted_energy_is_the_meters_at_random_candidates(name: str) -> None:
    task, meter = task_of(name, batch=3), ModelledEnergy(Constants(add_pj=1.0, multiply_pj=2.0, word_pj=40.0))
    traced = trace(task.model, task.inputs)
    plain = modelled_energy(task, traced, meter.constants)
    cost = plain.anchored(meter.measure(task.model, task.inputs).value)
    rng = np.random.default_rng(2)
    for _ in range(3):
        ratios = [float(rng.choice(g.levels)) for g in traced.space.groups]
        cut = traced.cut(task.model, [np.arange(w) for w in traced.space.kept(ratios)])
        assert cost.predict(ratios) == pytest.approx(meter.measure(cut, task.inputs).value, rel=1e-9)


@pytest.mark.slow
def test_a_search_under_modelled_energy_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = searched(budget="energy_50pct", device=DEVICE, final=QUICK)
    energy = result.measured["energy_mj"]
    assert result.met
    assert energy.kind == "modelled"
    assert energy.value <= 0.5 * result.dense["energy_mj"].value
    assert energy.value == pytest.approx(result.predicted["energy_mj"], rel=1e-9)
    assert "latency_ms" not in result.measured, "no latency table is made for it"

    report.write(result, tmp_path)
    console.show(result, tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "met (modelled, not measured)" in shown
    assert "energy_mj (modelled)" in shown
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["budgets"][0]["kind"] == "modelled"
    assert values["costs"]["energy_mj"]["measured"]["kind"] == "modelled"
    assert "kind: modelled" in (tmp_path / "ratios.yaml").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "mJ, modelled, not measured." in page
    assert "Horowitz" in page


@pytest.mark.skipif(ZEUS, reason="zeus is installed")
def test_without_zeus_there_is_no_counter() -> None:
    assert counter_of(DEVICE) == Counter("", "zeus is not installed there")


# ------------------------------------------------------------------------------------------------------------ measured


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python started from here gives zeus a processor of 5 W idle and 10 W more while this process works."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]))


def small_and_large() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...]]:
    nets = [nn.Sequential(nn.Conv2d(8, w, 3, padding=1), nn.ReLU(), nn.Conv2d(w, 8, 3)).eval() for w in (16, 64)]
    return nets[0], nets[1], (torch.zeros(1, 8, 48, 48),)


@with_zeus
@pytest.mark.slow
@pytest.mark.usefixtures("counter")
def test_a_counter_is_read_and_idle_power_is_in_it() -> None:
    assert counter_of(DEVICE).name == "2 CPU packages, with DRAM"
    small, large, inputs = small_and_large()
    dense = MeasuredEnergy(DEVICE).measure(large, inputs)
    assert (dense.kind, dense.unit) == ("measured", "mJ")
    assert "counter: 2 CPU packages, with DRAM" in dense.device
    assert dense.samples == 2 * 3
    beside = MeasuredEnergy(DEVICE, reference=Reference(large, dense, relative=True)).measure(small, inputs)
    assert 0 < beside.low <= beside.value <= beside.high
    assert beside.value < 0.7 * dense.value, "a quarter of the channels"
    assert any("idle power is not subtracted" in note for note in beside.notes)


@with_zeus
@pytest.mark.usefixtures("counter")
def test_millijoules_are_watts_times_milliseconds() -> None:
    """15 W while it works: what the counter says of one pass is 15 x the milliseconds of one pass."""
    from autoprune.meters.device import fresh
    from autoprune.meters.wire import packed

    _, large, inputs = small_and_large()
    plan = {"windows": 2, "window_s": 1.0, "seconds": 0.3}
    message: dict[str, Any] = {"do": "energy", "models": [packed(large, inputs, "torch")], "plan": plan}
    (row,) = fresh(DEVICE, {**message, "place": "cpu"})["rows"]
    for mj, wall, cpu in zip(row["mj"], row["wall_ms"], row["cpu_ms"], strict=True):
        assert mj == pytest.approx(5 * wall + 10 * cpu, rel=0.05)


@with_zeus
@pytest.mark.usefixtures("counter")
def test_a_cpus_counter_says_nothing_of_a_gpu() -> None:
    from autoprune.meters.device import fresh

    answer = fresh(DEVICE, {"do": "counter", "place": "cuda:0"})
    assert answer == {**answer, "counter": "", "why": "zeus finds no counter of this GPU"}


@with_zeus
@pytest.mark.usefixtures("counter")
def test_a_counter_that_stands_still_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WATTS", "0")
    found = counter_of(DEVICE)
    assert (found.name, found.why) == ("", "2 CPU packages, with DRAM stands still")


@with_zeus
@pytest.mark.slow
@pytest.mark.usefixtures("counter")
def test_a_search_under_measured_energy(tmp_path: Path) -> None:
    plain = make_task()
    task = dataclasses.replace(plain, inputs=(plain.search[0][0].repeat(4, 1, 1, 1),))  # type: ignore[index]
    device = dataclasses.replace(DEVICE, processes=4, most_processes=4)
    result: Result = searched(
        task, budget="energy_70pct", device=device, tables=tmp_path / "tables", final=QUICK, strategy="uniform"
    )
    energy = result.measured["energy_mj"]
    assert energy.kind == "measured"
    assert result.met == (energy.high <= result.budgets[0].limit)
    assert result.met
    assert "counter: 2 CPU packages" in result.device
    assert len(list((tmp_path / "tables").iterdir())) == 1
    report.write(result, tmp_path)
    assert "not measured" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("used", "millijoules"),
    [
        ({"total_energy_mj": 7.0, "cpu_energy_mj": 3.0, "gpu_energy_mj": 2.0}, 7.0),  # Jetson
        ({"total_energy_mj": None, "cpu_energy_mj": 3.0, "gpu_energy_mj": 2.0}, 5.0),
        ({"cpu_total_mj": 4, "dram_mj": 1, "gpu_mj": None, "efficiency_cores_mj": [1, 2]}, 5.0),  # Apple
    ],
)
def test_a_chip_is_counted_whole_and_once(used: dict[str, Any], millijoules: float) -> None:
    from types import SimpleNamespace

    from autoprune.meters.worker import _of_chip

    assert _of_chip(SimpleNamespace(**used)) == millijoules
