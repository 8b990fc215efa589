"""Single weights and n of every m: against torch.nn.utils.prune, through training, tables and whole searches."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchmetrics import MeanSquaredError

import autoprune
from autoprune import components, criteria
from autoprune.core import Budget, InputError, Term
from autoprune.costs import counted, counted_models
from autoprune.evaluate import Scoring
from autoprune.meters.table import CountedCost
from autoprune.prune import RatioTable, choose_units
from autoprune.recover import FineTune, finetune
from autoprune.space import Space, trace
from autoprune.strategies.global_threshold import GlobalThreshold
from autoprune.traced import TracedModel, tensors_of

WEIGHT = Space(grain=("weight",), levels=50, max_ratio=0.98)
N_M = Space(grain=("n_m",))
BRIEF = Scoring(images=500, short=FineTune(epochs=0.2))


class LeNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, bias=False), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)),
        )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return LeNet().eval()


INPUTS = (torch.randn(2, 1, 14, 14, generator=torch.Generator().manual_seed(0)),)


def cut(model: nn.Module, traced: TracedModel, ratios: tuple[float, ...]) -> nn.Module:
    return traced.cut(model, choose_units(traced.space, criteria.l1(model, traced.slices), ratios))


@pytest.mark.parametrize("threshold", [10, 45])
def test_one_threshold_is_global_magnitude_pruning(model: nn.Module, threshold: int) -> None:
    traced = trace(model, INPUTS, WEIGHT)
    ratios = traced.space.thresholds[threshold]
    ours, theirs = cut(model, traced, ratios), copy.deepcopy(model)
    layers = [m for m in theirs if isinstance(m, nn.Conv2d | nn.Linear)]  # type: ignore[attr-defined]
    prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=0.02 * threshold)
    for group, ratio in traced.space.named(ratios).items():
        mask = theirs.get_submodule(group).get_buffer("weight_mask")
        assert torch.equal(ours.get_submodule(group).get_buffer("weight_mask"), mask)
        assert ratio == pytest.approx(1 - float(mask.mean()))


@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_a_search_by_one_threshold_is_global_magnitude_pruning(model: nn.Module, amount: float) -> None:
    """Whatever the criterion: its importance is of single weights, which are compared by magnitude."""
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(0.3)
    space = trace(model, INPUTS, WEIGHT).space
    sizes = [g.size for g in space.groups]
    kept = CountedCost(
        "params", "parameters", space, (tuple(Term(1.0, (0.0, {g: 1.0}), (1.0, {})) for g in range(len(sizes))),)
    )
    limit = Budget("params", (1 - amount) * sum(sizes) + 0.5, "parameters")  # half a weight for rounding
    space = space.ranked([np.ones(size) for size in sizes])
    assert not space.importance

    def ratios(floor: float) -> tuple[float, ...]:
        return GlobalThreshold(space, [limit], {"params": kept}, floor=floor).ask()[0].ratios

    layers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]  # type: ignore[attr-defined]
    prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=amount)
    gone = [1 - float(m.get_buffer("weight_mask").mean()) for m in layers]
    assert ratios(0.0) == pytest.approx(gone)
    floor = 1 - 0.9 * max(gone)
    spared = ratios(floor)
    assert max(spared) <= 1 - floor
    assert min(spared) > min(gone), "the threshold is higher for the others"
    assert kept.predict(spared) <= limit.limit


def test_of_every_m_the_n_largest_stay(model: nn.Module) -> None:
    traced = trace(model, INPUTS, N_M)
    assert {g.name: g.levels for g in traced.space.groups} == dict.fromkeys(("3", "7", "9"), (0.0, 0.25, 0.5, 0.75))
    assert [r.name for r in traced.space.refused] == ["0"]  # one input channel
    smaller = cut(model, traced, (0.5, 0.75, 0.0))
    for name, n in (("3", 2), ("7", 1), ("9", 4)):
        dense = model.get_submodule(name).get_parameter("weight").detach()
        mask = smaller.get_submodule(name)._buffers.get("weight_mask", torch.ones_like(dense))
        assert mask is not None
        rows, left = (w.movedim(1, -1).reshape(-1, 4) for w in (dense, dense * mask))
        assert bool(((left != 0).sum(1) == n).all())
        assert torch.equal(left.abs().amax(1), rows.abs().amax(1))


class Attending(nn.Module):
    """Multi-head attention reads its output layer's weight without calling it; the head is tied to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(8, 16, bias=False), nn.MultiheadAttention(16, 2, batch_first=True)
        self.last, self.head = nn.Linear(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.attention(x, x, x)[0]
        return self.head(self.last(x)).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("space", [WEIGHT, N_M])
def test_weights_that_a_mask_would_miss_are_refused(space: Space) -> None:
    model, inputs = Attending().eval(), (torch.randn(2, 5, 8),)
    traced = trace(model, inputs, space)
    assert [g.name for g in traced.space.groups] == ["last"]
    assert {r.name: r.reason for r in traced.space.refused} == {
        "first": "its weight is another layer's too",
        "attention": "a weight of MultiheadAttention is not masked",
        "attention.out_proj": "its weight is read without its own forward, past a mask",
    }
    smaller = cut(model, traced, (traced.space.groups[0].levels[-1],))
    assert counted(smaller, inputs)["params"].value < counted(model, inputs)["params"].value


def test_along_which_dimension_a_transposed_convolution_reads_is_not_guessed() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 8, 1))
    traced = trace(model, (torch.randn(2, 8, 4, 4),), N_M)
    assert [g.name for g in traced.space.groups] == ["1"]


def test_a_layer_of_zeros_hides_no_threshold(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("7.weight").zero_()
    traced = trace(model, INPUTS, WEIGHT)
    assert len(traced.space.thresholds) == 50
    assert traced.space.thresholds[-1][2] == pytest.approx(1 - 1 / model.get_parameter("7.weight").numel())


def test_a_masked_network_can_be_copied_and_half_precision_traced(model: nn.Module) -> None:
    traced = trace(model, INPUTS, WEIGHT)
    smaller = cut(model, traced, traced.space.thresholds[20])
    torch.testing.assert_close(copy.deepcopy(smaller)(*INPUTS), smaller(*INPUTS))
    low = LeNet().to(torch.bfloat16)
    assert len(trace(low, (INPUTS[0].to(torch.bfloat16),), WEIGHT).space.groups) == 4
    assert {g.kind for g in traced.space.groups} == {"weight"}


@pytest.mark.parametrize("space", [WEIGHT, N_M])
def test_masked_weights_stay_gone_in_training(model: nn.Module, space: Space) -> None:
    traced = trace(model, INPUTS, space)
    before = {name: tensor.clone() for name, tensor in tensors_of(model)}
    masked = cut(model, traced, tuple(g.levels[-1] for g in traced.space.groups))
    gone = {g.name: masked.get_submodule(g.name).get_buffer("weight_mask") == 0 for g in traced.space.groups}
    batches = [(torch.randn(8, 1, 14, 14), torch.randint(10, (8,))) for _ in range(4)]
    finetune(masked, batches, FineTune(epochs=2), loss=F.cross_entropy, lr=0.1)
    with torch.no_grad():
        masked(*INPUTS)
    for group, where in gone.items():
        weight = masked.get_submodule(group).weight
        assert isinstance(weight, torch.Tensor)
        assert bool((weight[where] == 0).all())
        assert not torch.equal(weight, before[f"{group}.weight"] * ~where)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(model))


@pytest.mark.parametrize("space", [WEIGHT, N_M])
def test_what_is_predicted_is_what_is_counted(model: nn.Module, space: Space) -> None:
    traced, task = trace(model, INPUTS, space), tiny.make_task()
    dense = counted(model, INPUTS)
    models = counted_models(autoprune.Task(**{**vars(task), "model": model, "inputs": INPUTS}), traced, dense)
    rng = np.random.default_rng(0)
    for _ in range(4):
        ratios = tuple(float(rng.choice(g.levels)) for g in traced.space.groups)
        found = counted(cut(model, traced, ratios), INPUTS)
        for cost in ("macs", "params"):
            assert models[cost].predict(ratios) == pytest.approx(found[cost].value)


@pytest.mark.parametrize("space", [WEIGHT, N_M])
def test_a_masked_network_spread_computes_the_same(model: nn.Module, space: Space) -> None:
    traced = trace(model, INPUTS, space)
    kept = choose_units(traced.space, criteria.l1(model, traced.slices), [g.levels[-1] for g in traced.space.groups])
    masked = traced.cut(model, kept)
    whole = traced.spread(model, dict(tensors_of(masked)), kept)
    assert [name for name, _ in tensors_of(whole)] == [name for name, _ in tensors_of(model)]
    torch.testing.assert_close(whole(*INPUTS), masked(*INPUTS))


SEARCHES, MORE = [("weight", "sensitivity"), ("n_m", "random")], [("weight", "netadapt"), ("n_m", "sensitivity")]


@pytest.mark.parametrize(
    ("grain", "strategy"),
    [
        ("weight", "global"),
        ("n_m", "global"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SEARCHES),
        *(pytest.param(*each, marks=[pytest.mark.slow, pytest.mark.long]) for each in MORE),
    ],
)
def test_every_strategy_searches_and_its_table_rebuilds(grain: str, strategy: str, tmp_path: Path) -> None:
    task = tiny.make_task()
    settings = {"random": {"episodes": 8, "finalists": 2}, "netadapt": {"screen": 2}}.get(strategy, {})
    chosen = components.spec("strategy", strategy) | settings
    result = autoprune.search(
        task,
        budget="params_60pct",
        strategy=chosen,
        space=Space(grain=(grain,)),
        scoring=BRIEF,
        final=FineTune(epochs=0.2),
    )
    assert result.met
    assert result.table.grain == grain
    assert result.measured["params"].value <= 0.6 * result.dense["params"].value
    result.table.save(tmp_path / "ratios.yaml")
    safetensors.torch.save_model(result.model, str(tmp_path / "pruned.safetensors"))
    table = RatioTable.load(tmp_path / "ratios.yaml")
    assert table == result.table
    rebuilt = table.rebuild(copy.deepcopy(task.model), task.inputs, tmp_path / "pruned.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(*task.inputs), result.model(*task.inputs))


def test_an_error_is_a_metric_too() -> None:
    """Of a metric that falls as things get better, the pruned network's is higher."""
    classes, task = tiny.make_task(), tiny.make_task(name="itself")

    def itself(batches: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(x, x.flatten(1)) for x, _ in batches]  # type: ignore[attr-defined]

    torch.manual_seed(0)
    coder = nn.Sequential(nn.Flatten(), nn.Linear(196, 24), nn.ReLU(), nn.Linear(24, 196))
    splits = {split: itself(getattr(classes, split)) for split in ("train", "search", "test")}
    finetune(coder, splits["train"], FineTune(epochs=6, lr_fraction=1, teach=0), loss=F.mse_loss, lr=0.5)
    task = autoprune.Task(
        **{**vars(task), **splits, "model": coder, "loss": F.mse_loss, "metric": MeanSquaredError(), "lr": 0.5}
    )
    result = autoprune.search(
        task, budget="params_20pct", space=Space(grain=("weight",)), scoring=BRIEF, final=FineTune(epochs=1)
    )
    assert result.met
    assert result.scores.test_recovered > result.scores.test_dense
    dense, *pruned = result.trials
    assert all(trial.score < dense.score for trial in pruned if trial.candidate.recovery == "none")


def test_a_latency_budget_is_refused(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"latency_ms is not lowered by masks.*space=weight limit params"):
        autoprune.search(tiny.make_task(), budget="latency_50pct", space=WEIGHT)


def test_masks_that_are_there_already_are_refused(model: nn.Module) -> None:
    prune.l1_unstructured(model.get_submodule("0"), "weight", 0.5)
    with pytest.raises(InputError, match="make them permanent"):
        trace(model, INPUTS, WEIGHT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grain": ("layer",)}, "grain must be one or several of channel, head, block, weight, n_m, got grain=layer"),
        ({"grain": ("channel", "weight")}, "stand alone"),
        ({"grain": ("n_m",), "m": 1}, "m >= 2"),
        ({"max_ratio": 1.0}, "max_ratio must lie between 0 and 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Space(**settings)  # type: ignore[arg-type]
