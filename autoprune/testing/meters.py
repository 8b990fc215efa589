"""What every meter owes, and fakes that break one rule each."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from autoprune.borrowing import seeded
from autoprune.core import (
    Measurement,
    Meter,
)
from autoprune.testing.worlds import random_state


class MeterContract:
    """What every meter owes: a value with unit and interval, less for a smaller network, the model untouched."""

    def make(self) -> Meter:
        """Your meter."""
        raise AssertionError("override make()")

    def _measure(self, width: int) -> Measurement:
        with seeded(0):
            model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 4))
        return self.make().measure(model, (torch.zeros(1, 3, 8, 8),))

    def test_a_value_with_its_unit_and_interval(self) -> None:
        meter, found = self.make(), self._measure(8)
        assert found.unit == meter.unit
        assert found.unit
        assert math.isfinite(found.value)
        assert 0 < found.low <= found.value <= found.high
        assert found.samples >= 1
        assert found.kind != "predicted"

    def test_a_smaller_network_costs_less(self) -> None:
        small, large = self._measure(4), self._measure(64)
        assert small.high < large.low

    def test_nothing_is_touched(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
        model[1].eval()  # as one who trains with frozen statistics
        modes = [m.training for m in model.modules()]
        before, state = copy.deepcopy(model.state_dict()), random_state()
        self.make().measure(model, (torch.ones(2, 1, 5, 5),))
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert [m.training for m in model.modules()] == modes
        assert random_state() == state


class ForgetsTheUnit:
    """Fake meter: parameters without a unit."""

    name, unit = "params", ""

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        return Measurement.exact(float(sum(p.numel() for p in model.parameters())), "", "counted")


class AlwaysTheSame:
    """Fake meter: a constant."""

    name, unit = "macs", "MACs"

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        return Measurement.exact(1e6, "MACs", "counted")


class TrainsWhileMeasuring:
    """Fake meter: runs the model in training mode, which moves its statistics."""

    name, unit = "params", "parameters"

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        model.train()
        model(*inputs)
        return Measurement.exact(float(sum(p.numel() for p in model.parameters())), "parameters", "counted")
