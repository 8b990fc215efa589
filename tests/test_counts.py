"""Counted costs against closed forms, and cost models against counting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from zoo import ZOO

from autoprune.allocate import cost_of
from autoprune.core import Candidate as Asked
from autoprune.core import Measurement, Task, Trial
from autoprune.costs import counted_models
from autoprune.meters.counts import COUNTED, Macs, Memory, Params
from autoprune.space import trace


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 12), 8 * 3 * 9 * 10 * 12),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (1, 4, 8, 8), 8 * 2 * 9 * 16),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6), (1, 6, 7, 7), 6 * 25 * 49),
        (nn.ConvTranspose2d(4, 6, 2, 2), (1, 4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Linear(7, 9), (1, 7), 63),
    ],
)
def test_macs_of_each_layer_type(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert Macs().measure(layer, (torch.zeros(shape),)).value == macs


class Attending(nn.Module):
    """3 heads of 2 dimensions over 5 tokens, 4 dimensions a value."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        heads = q.view(len(q), 5, 3, 6).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads[..., :2], heads[..., :2], heads[..., 2:])


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.LSTM(8, 6, batch_first=True), (2, 5, 8), 5 * 4 * 6 * (8 + 6)),
        (nn.GRU(8, 6, num_layers=2, bidirectional=True, batch_first=True), (2, 5, 8), 5 * 2 * 18 * (8 + 6 + 12 + 6)),
        (nn.LSTM(8, 6, proj_size=4, batch_first=True), (2, 5, 8), 5 * (4 * 6 * (8 + 4) + 4 * 6)),
        (Attending(), (2, 5, 18), 3 * 5 * 5 * (2 + 4)),
    ],
)
def test_macs_of_attention_and_recurrent_layers(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert Macs().measure(layer, (torch.zeros(shape),)).value == macs


def test_macs_are_of_one_example_and_name_what_is_not_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    one, four = (Macs().measure(model, (torch.zeros(n, 4),)) for n in (1, 4))
    assert one.value == four.value == 16
    assert one.notes == ("aten::gelu x1 not counted",)


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(4, 4)
    assert Params().measure(nn.Sequential(layer, nn.ReLU(), layer), (torch.zeros(1, 4),)).value == 20


def test_memory_is_weights_and_the_peak_of_live_activations() -> None:
    """Two convolutions: at the second one its input [2, 8, 10, 10] and output [2, 4, 10, 10] are alive."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(self.b(self.a(x)), 1)

    weights = 4 * (3 * 8 + 8 + 8 * 4 + 4)
    peak = 4 * 2 * 100 * (8 + 4)
    assert Memory().measure(Two(), (torch.zeros(2, 3, 10, 10),)).value == pytest.approx((weights + peak) / 1e6)


def task_of(name: str, batch: int = 2) -> Task:
    torch.manual_seed(0)
    return Task(
        name=name,
        model=ZOO[name].build().eval(),
        inputs=ZOO[name].inputs(batch),
        train=[],
        search=[],
        test=[],
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(5),
        lr=0.1,
    )


@pytest.mark.parametrize("name", ZOO)
def test_predictions_equal_counts_at_random_candidates(name: str) -> None:
    """MACs within 2 % (operations whose size no group explains), parameters and memory exactly."""
    task = task_of(name)
    traced = trace(task.model, task.inputs)
    dense = {n: meter().measure(task.model, task.inputs) for n, meter in COUNTED.items()}
    models = counted_models(task, traced, dense)
    rng = np.random.default_rng(1)
    for _ in range(4):
        ratios = [float(rng.choice(g.levels)) for g in traced.space.groups]
        kept = [np.arange(w) for w in traced.space.kept(ratios)]
        cut = traced.cut(task.model, kept)
        for cost, within in (("macs", 0.02), ("params", 1e-9), ("memory_mb", 1e-9)):
            counted = COUNTED[cost]().measure(cut, task.inputs).value
            assert models[cost].predict(ratios) == pytest.approx(counted, rel=within), cost
            by_table = max(
                cost_of(form, [g.levels.index(r) for g, r in zip(traced.space.groups, ratios, strict=True)])
                for form in models[cost].tables()
            )
            assert by_table == pytest.approx(models[cost].predict(ratios))


def test_calibration_makes_the_last_measured_trial_exact() -> None:
    task = task_of("resnet")
    traced = trace(task.model, task.inputs)
    dense = {n: meter().measure(task.model, task.inputs) for n, meter in COUNTED.items()}
    model = counted_models(task, traced, dense)["macs"]
    ratios = tuple(g.levels[3] for g in traced.space.groups)
    measured = Measurement.exact(1.25 * model.predict(ratios), "MACs", "counted")
    trial = Trial(number=0, candidate=Asked(ratios=ratios, measure=True), costs={"macs": measured})
    assert model.calibrated([trial]).predict(ratios) == pytest.approx(measured.value)
    assert model.calibrated([]).predict(ratios) == model.predict(ratios)
