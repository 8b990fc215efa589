"""The cost table: measured on real processes, kept in a file, damaged files refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import MobileNetV2

from autoprune.core import InputError, width_of
from autoprune.meters import profile
from autoprune.meters.device import Device, MeasuringError
from autoprune.meters.latency import Latency
from autoprune.meters.profile import CostTable, Profile
from autoprune.space import trace
from autoprune.traced import TracedModel

QUICK = Device(processes=2, most_processes=2, samples=6, seconds=0.2, repeats=0)
MODEL = MobileNetV2(classes=4).eval()
INPUTS = (torch.randn(64, 3, 16, 16),)  # enough that arithmetic, not Python, takes the time


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    return trace(MODEL, INPUTS)


@pytest.fixture(scope="module")
def table(traced: TracedModel) -> CostTable:
    return built(traced)


def built(traced: TracedModel, model: nn.Module = MODEL, **change: Any) -> CostTable:
    return profile.build(
        model,
        INPUTS,
        traced.space,
        cut=lambda kept: traced.cut(model, [np.arange(n) for n in kept]),
        weights=traced.weight_widths(model),
        facts={"device": "here"},
        meter=Latency(QUICK),
        plan=Profile(networks=12, held_out=5),
        **change,
    )


def test_a_table_from_real_measurements(table: CostTable, traced: TracedModel) -> None:
    assert len(table.samples) == 17
    assert table.samples[0].kept == tuple(g.size for g in traced.space.groups), "the dense network comes first"
    assert set(table.shapes) == set(table.samples[0].layers)
    assert len(table.errors(traced.space)) == 5
    cost = table.cost(traced.space)
    assert cost.predict(traced.space.dense()) == pytest.approx(table.dense.value)
    deepest = [g.levels[-1] for g in traced.space.groups]
    assert cost.predict(deepest) < cost.predict(traced.space.dense())


@pytest.mark.slow
def test_a_model_left_in_training_mode_is_not_touched() -> None:
    """Its statistics would move with every pass in its own mode."""
    model = copy.deepcopy(MODEL).train()
    before = copy.deepcopy(model.state_dict())
    built(trace(model, INPUTS), model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_every_layer_with_weights_is_timed(table: CostTable) -> None:
    with_weights = {n for n, m in MODEL.named_modules() if not list(m.children()) and list(m.parameters())}
    assert set(table.shapes) == with_weights
    assert all(sum(s.layers.values()) < 2 * s.total for s in table.samples)


def test_work_is_macs_for_each_unit_of_both_sides() -> None:
    """Places x kernel weights, of every call; of a transposed convolution the places are the input's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.strided = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
            self.depthwise, self.up = nn.Conv2d(8, 8, 5, 1, 2, groups=8), nn.ConvTranspose2d(8, 4, 2, 2)
            self.twice, self.norm, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(self.depthwise(self.strided(self.plain(input=x))))
            x = self.norm(self.twice(torch.relu(self.twice(x))))
            out: torch.Tensor = self.last(x.mean((2, 3)))
            return out

    model, inputs = Net().eval(), (torch.randn(2, 3, 16, 16),)
    traced = trace(model, inputs)
    shapes = profile._shapes(model, inputs, traced.weight_widths(model), traced.space)
    pixels = 2 * 16 * 16
    expected = {"plain": 9 * pixels, "strided": 9 * pixels // 4, "depthwise": 25 * pixels // 4, "up": 4 * pixels // 4}
    expected |= {"twice": 2 * pixels, "norm": pixels, "last": 2}
    assert {name: shape.work for name, shape in shapes.items()} == expected
    assert shapes["plain"].kind.endswith("on [2, 3, 16, 16]")
    assert (shapes["plain"].operator, shapes["depthwise"].operator) == ("Conv2d", "Conv2d in groups")
    sizes = [g.size for g in traced.space.groups]
    assert [width_of(side, sizes) for side in shapes["up"].sides] == [4, 8], "output, then input"


def test_the_file_gives_back_the_same_table(table: CostTable, traced: TracedModel, tmp_path: Path) -> None:
    assert profile.load(tmp_path, table.facts) is None
    path = profile.save(tmp_path, table)
    again = profile.load(tmp_path, table.facts)
    assert again == table
    assert again is not None
    assert again.digest == table.digest
    assert again.held_out_pairs(traced.space) == table.held_out_pairs(traced.space)
    assert profile.load(tmp_path, {"device": "another"}) is None
    for damage in (
        "{",
        "[]",
        json.dumps({"schema": 99}),
        json.dumps({**table.to_json(), "samples": [{}]}),
        json.dumps({**table.to_json(), "shapes": []}),
    ):
        path.write_text(damage)
        with pytest.raises(InputError, match=r"the cost table .* is damaged .*: delete it"):
            profile.load(tmp_path, table.facts)


def test_any_change_changes_the_digest(table: CostTable) -> None:
    sample = dataclasses.replace(table.samples[0], total=table.samples[0].total * 1.0001)
    changed = dataclasses.replace(table, samples=(sample, *table.samples[1:]))
    assert changed.digest != table.digest


class Narrow(nn.Module):
    """Runs in its measuring process only as long as it is wide: a network that fails on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first.out_channels < 8:
            raise RuntimeError("too narrow for this device")
        out: torch.Tensor = self.second(self.first(x).relu())
        return out


@pytest.mark.slow
@pytest.mark.long
def test_networks_that_fail_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = Narrow()
    space = trace(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3)), INPUTS)
    names = {"0": "first", "2": "second"}
    slices = tuple(
        tuple(dataclasses.replace(s, tensor=names[s.tensor[0]] + s.tensor[1:]) for s in g) for g in space.slices
    )
    with caplog.at_level("WARNING", "autoprune"):
        table = built(dataclasses.replace(space, slices=slices), model)
    assert 0 < caplog.text.count("too narrow for this device") == 17 - len(table.samples)
    with pytest.raises(MeasuringError, match="too few networks could be measured"):
        built(dataclasses.replace(space, slices=slices), Broken())


class Broken(Narrow):
    """Runs dense, and never cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first.out_channels < 32:
            raise RuntimeError("broken")
        return super().forward(x)


def test_every_third_network_is_all_of_one_block(traced: TracedModel) -> None:
    for kept in profile._drawn(traced.space, 60, 0)[::3]:
        widths = [(n, g.size) for n, g in zip(kept, traced.space.groups, strict=True)]
        blocks = (4, 8, 16)  # a group of fewer than two has halves
        assert any(all(n in (size, n // b * b, n // (size // 2) * (size // 2)) for n, size in widths) for b in blocks)


def test_drawn_networks_span_the_space(traced: TracedModel) -> None:
    drawn = np.array(profile._drawn(traced.space, 200, 0))
    for widths, group in zip(drawn.T, traced.space.groups, strict=True):
        assert widths.min() >= group.kept(group.levels[-1])
        assert widths.max() <= group.size
        assert widths.min() <= 0.3 * group.size
        assert widths.max() >= 0.9 * group.size
    assert profile._drawn(traced.space, 5, 1) == profile._drawn(traced.space, 5, 1)


@pytest.mark.parametrize("wrong", [{"networks": 7}, {"held_out": 0}])
def test_a_profile_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="profile: networks must be >= 8 and held_out >= 1"):
        Profile(**wrong)
