"""Residual blocks as units of their own, attention heads alone: found, proven, priced, allocated, rebuilt."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from test_space import built, result
from torch import Tensor, nn
from zoo import ZOO

import autoprune
from autoprune import components
from autoprune.allocate import allocate, cost_of, evenly
from autoprune.core import CostForm
from autoprune.costs import counted, counted_models
from autoprune.evaluate import Scoring
from autoprune.meters.fitted import Sample, Shape, fit
from autoprune.prune import RatioTable
from autoprune.recover import FineTune
from autoprune.space import Space, trace
from autoprune.tasks.resnet import ResNet
from autoprune.traced import LeftOut, tensors_of

BOTH = Space(grain=("channel", "block"))
BLOCK = Space(grain=("block",))
INPUTS = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(depth=20, width=8).eval()


def silent(model: nn.Module, blocks: list[str]) -> nn.Module:
    """The whole model, all parameters of these modules being zero."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for block in blocks:
            for parameter in masked.get_submodule(block).parameters():
                parameter.zero_()
    return masked


def test_blocks_that_hand_their_input_on_are_units() -> None:
    traced = trace(resnet(), INPUTS, BLOCK)
    names = [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)]
    assert [g.name for g in traced.space.groups] == [name for name in names if name not in ("layer2.0", "layer3.0")]
    assert {(g.size, g.levels, g.kind) for g in traced.space.groups} == {(1, (0.0, 1.0), "block")}


def test_what_is_no_residual_is_no_block() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.a(x))  # type: ignore[no-any-return]

    class PreNorm(PostNorm):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x + scale * self.a(self.norm(x))  # type: ignore[no-any-return]

    model = nn.Sequential(nn.Linear(6, 8), PostNorm(), PreNorm(), nn.Linear(8, 3))
    assert [g.name for g in trace(model, (torch.randn(2, 6),), BLOCK).space.groups] == ["2"]


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.inner(x)))  # type: ignore[no-any-return]


def test_blocks_that_share_a_layer_stay() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(
        nn.Linear(6, 8), Residual(shared), Residual(shared), Residual(nn.Linear(8, 8)), nn.Linear(8, 3)
    )
    assert [g.name for g in trace(model, (torch.randn(2, 6),), BLOCK).space.groups] == ["3"]


def test_a_block_that_another_needs_stays() -> None:
    class Fills(Residual):
        def forward(self, x: Tensor) -> Tensor:
            cache.append(x)
            return super().forward(x)

    class Reads(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * cache.pop()

    cache: list[Tensor] = []
    layers = [
        nn.Linear(6, 8),
        Fills(nn.Linear(8, 8)),
        Reads(nn.Linear(8, 8)),
        Residual(nn.Linear(8, 8)),
        nn.Linear(8, 3),
    ]
    traced = trace(nn.Sequential(*layers), (torch.randn(2, 6),), BLOCK)
    assert "1" not in [g.name for g in traced.space.groups]
    assert "3" in [g.name for g in traced.space.groups]
    assert ("1", "leaving this block out differs from silencing it") in [
        (r.name, r.reason) for r in traced.space.refused
    ]


def test_a_model_that_raises_on_zero_weights_is_traced() -> None:
    class Picky(Residual):
        def forward(self, x: Tensor) -> Tensor:
            if not bool(self.out.weight.any()):
                raise ValueError("degenerate")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(6, 8), Picky(nn.Linear(8, 8)), Residual(nn.Linear(8, 8)), nn.Linear(8, 3))
    assert [g.name for g in trace(model, (torch.randn(2, 6),), BLOCK).space.groups] == ["2"]


def test_of_the_blocks_the_common_ratio_goes_too() -> None:
    space = trace(resnet(), INPUTS, BOTH).space
    blocks = [i for i, g in enumerate(space.groups) if g.kind == "block"]
    levels = evenly(space, lambda levels: sum(levels[i] for i in blocks) >= 3)
    ratios = [r for g, r in zip(space.groups, space.ratios(levels), strict=True) if g.kind == "channel"]
    assert sum(levels[i] for i in blocks) == 3
    assert 0.3 <= min(ratios) <= max(ratios) <= 0.55
    only = trace(resnet(), INPUTS, BLOCK).space
    assert evenly(only, lambda levels: sum(levels) >= 2) == (0, 1, 0, 0, 0, 1, 0)


def test_leaving_blocks_out_equals_silencing_them() -> None:
    model = resnet()
    traced = trace(model, INPUTS, BOTH)
    rng = np.random.default_rng(0)
    before = {name: tensor.clone() for name, tensor in tensors_of(model)}
    for _ in range(4):
        kept = [np.arange(g.size) for g in traced.space.groups]
        gone = [g.name for g in traced.space.groups if g.kind == "block" and rng.random() < 0.5]
        kept = [units[:0] if g.name in gone else units for g, units in zip(traced.space.groups, kept, strict=True)]
        smaller = traced.cut(model, kept)
        with torch.no_grad():
            torch.testing.assert_close(smaller(*INPUTS), silent(model, gone)(*INPUTS))
            spread = traced.spread(model, dict(tensors_of(smaller)), kept)
            torch.testing.assert_close(spread(*INPUTS), smaller(*INPUTS))
        assert all(isinstance(smaller.get_submodule(name), LeftOut) for name in gone)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(model))


def test_counts_are_predicted_exactly_and_memory_from_above() -> None:
    model, task = resnet(), tiny.make_task()
    traced, dense = trace(model, INPUTS, BOTH), counted(model, INPUTS)
    models = counted_models(autoprune.Task(**{**vars(task), "model": model, "inputs": INPUTS}), traced, dense)
    rng = np.random.default_rng(0)
    for _ in range(12):
        ratios = tuple(float(rng.choice(g.levels)) for g in traced.space.groups)
        cut = traced.cut(model, [np.arange(n) for n in traced.space.kept(ratios)])
        found = counted(cut, INPUTS)
        assert models["macs"].predict(ratios) == pytest.approx(found["macs"].value, rel=1e-9)
        assert models["params"].predict(ratios) == pytest.approx(found["params"].value)
        assert models["memory_mb"].predict(ratios) >= found["memory_mb"].value * (1 - 1e-9)
        assert models["memory_mb"].predict(ratios) <= found["memory_mb"].value * 1.35
        levels = [g.levels.index(r) for g, r in zip(traced.space.groups, ratios, strict=True)]
        (form,) = models["macs"].tables()
        assert cost_of(form, levels) == pytest.approx(models["macs"].predict(ratios))


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_of_blocks_and_widths_is_the_best(seed: int) -> None:
    """Against trying every choice."""
    rng = np.random.default_rng(seed)
    sizes = [3, 4, 2, 3, 2]  # the third and the fifth are blocks

    def form(pairs: list[tuple[int, int]], gated: dict[int, CostForm]) -> CostForm:
        tables = {(a, b): rng.random((sizes[a], sizes[b])) for a, b in pairs}
        return CostForm(float(rng.random()), tuple(rng.random(n) for n in sizes), tables, gated)

    limited = form([(0, 1)], {2: form([(0, 1), (1, 3)], {}), 4: form([(1, 3)], {})})
    losses = [np.append(0.0, rng.random(n - 1)) for n in sizes]
    choices = list(np.ndindex(*sizes))
    costs = np.array([cost_of(limited, levels) for levels in choices])
    limit = float(np.quantile(costs, 0.3))
    best = min(
        sum(row[i] for row, i in zip(losses, c, strict=True))
        for c, cost in zip(choices, costs, strict=True)
        if cost <= limit
    )
    found = allocate(losses, [(limited, limit)])
    assert cost_of(limited, found.levels) <= limit
    assert found.loss == pytest.approx(best)


def test_a_device_table_knows_that_layers_go_with_their_block() -> None:
    """What each layer takes is what its width says, and nothing where its block is gone."""
    traced = trace(resnet(), INPUTS, BOTH)
    space, model = traced.space, resnet()
    names = [g.name for g in space.groups]
    block, inner = names.index("layer1.1"), names.index("layer1.1.conv1")
    widths = traced.weight_widths(model)
    shape = Shape("Conv2d", "conv", widths["layer1.1.conv1.weight"], 10.0, block)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(24):
        kept = [g.size if i == 0 else g.kept(float(rng.choice(g.levels))) for g in space.groups]
        stream = kept[names.index("conv1")] if "conv1" in names else 8
        took = 0.2 + 0.05 * kept[inner] * stream
        samples.append(Sample(tuple(kept), 5.0 + took * kept[block], {"layer1.1.conv1": took} if kept[block] else {}))
    for by in ("layers", "network"):
        cost = fit(samples, {"layer1.1.conv1": shape}, space, name="latency_ms", unit="ms", by=by)
        gone = [g.size for g in space.groups]
        gone[block] = 0
        assert cost.at_widths(gone) == pytest.approx(5.0, rel=0.02)
        (form,) = cost.tables()
        levels = [len(g.levels) // 2 for g in space.groups]
        ratios = [g.levels[i] for g, i in zip(space.groups, levels, strict=True)]
        assert cost_of(form, levels) == pytest.approx(cost.predict(ratios))


def test_heads_can_be_pruned_alone() -> None:
    model, inputs = built("heads"), ZOO["heads"].inputs(2)
    traced = trace(model, inputs, Space(grain=("head",)))
    assert [(g.name, g.size, g.kind) for g in traced.space.groups] == [("body.q", 4, "head")]
    assert "space=head leaves it whole" in {r.reason for r in traced.space.refused}
    with torch.no_grad():
        assert result(traced.cut(model, [np.array([0, 2])]), inputs).shape == result(model, inputs).shape


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["sensitivity", "netadapt", *(pytest.param(name, marks=pytest.mark.long) for name in ("amc", "optuna"))]
)
def test_every_strategy_searches_blocks_and_widths_together(strategy: str, tmp_path: Path) -> None:
    task = tiny.make_task()
    settings = {
        "amc": {"episodes": 12, "warm_up": 8},
        "optuna": {"episodes": 8},
        "netadapt": {"screen": 2},
    }
    chosen = components.spec("strategy", strategy)
    chosen |= {key: value for key, value in settings.get(strategy, {}).items() if key in chosen}
    result = autoprune.search(
        task,
        budget="flops_50pct",
        strategy=chosen,
        space=BOTH,
        scoring=Scoring(images=500, short=FineTune(epochs=0.2)),
        final=FineTune(epochs=0.2),
    )
    assert result.met
    assert {"block", "channel"} == {g.kind for g in result.space.groups}
    result.table.save(tmp_path / "ratios.yaml")
    safetensors.torch.save_model(result.model, str(tmp_path / "pruned.safetensors"))
    table = RatioTable.load(tmp_path / "ratios.yaml")
    rebuilt = table.rebuild(copy.deepcopy(task.model), task.inputs, tmp_path / "pruned.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(*task.inputs), result.model(*task.inputs))
