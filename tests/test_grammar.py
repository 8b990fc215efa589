"""500 random networks: every group that is accepted is exact, each alone and all together."""

from __future__ import annotations

import collections
import copy

import numpy as np
import pytest
import torch
from grammar import CHANNELS, SIDE, Drawn
from torch import nn

from autoprune.core import amount_of
from autoprune.space import explored
from autoprune.traced import TracedModel, tensors_of
from autoprune.units import Labels

PORTION = 25
FAST = range(1)
SLOW, LONG = range(1, 7), range(7, 500 // PORTION)


def drawn(seed: int) -> nn.Module:
    """A network with weights and statistics as after training, so that no unit is trivially alike."""
    torch.manual_seed(seed)
    model = Drawn(seed).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.double()


def silenced(model: nn.Module, traced: TracedModel, kept: list[Labels]) -> nn.Module:
    """Full size, with what *makes* removed units set to zero: what reads them is left as it is."""
    masked = copy.deepcopy(model)
    tensors = dict(tensors_of(masked))
    for group, pieces, units in zip(traced.space.groups, traced.slices, kept, strict=True):
        gone = np.setdiff1d(np.arange(group.size), units)
        for piece in (piece for piece in pieces if piece.role != "in"):
            with torch.no_grad():
                tensors[piece.tensor].index_fill_(piece.dim, torch.from_numpy(piece.positions[gone].ravel()), 0.0)
    return masked


def differs(model: nn.Module, traced: TracedModel, kept: list[Labels], x: torch.Tensor) -> float:
    with torch.no_grad():
        cut, masked = traced.cut(model, kept)(x), silenced(model, traced, kept)(x)
    return float((cut - masked).abs().max() / masked.abs().max())


def check(seed: int) -> TracedModel:
    model, rng = drawn(seed), np.random.default_rng(seed)
    traced = explored(model.float(), (torch.randn(2, CHANNELS, SIDE, SIDE),))
    model, x = model.double(), torch.randn(3, CHANNELS, SIDE, SIDE, dtype=torch.double)
    everything = [np.arange(group.size) for group in traced.space.groups]
    for g, group in enumerate(traced.space.groups):
        for level in {group.levels[1], group.levels[len(group.levels) // 2], group.levels[-1]}:
            kept = list(everything)
            kept[g] = np.sort(rng.choice(group.size, group.kept(level), replace=False))
            assert differs(model, traced, kept, x) <= 1e-5, f"{group.name} at {level} of {model.words}"
    for _ in range(3):
        widths = [group.kept(float(rng.choice(group.levels))) for group in traced.space.groups]
        kept = [np.sort(rng.choice(g.size, n, replace=False)) for g, n in zip(traced.space.groups, widths, strict=True)]
        assert differs(model, traced, kept, x) <= 1e-5, f"all groups together of {model.words}"
    return traced


@pytest.mark.parametrize(
    "portion",
    [
        *FAST,
        *(pytest.param(i, marks=pytest.mark.slow) for i in SLOW),
        *(pytest.param(i, marks=[pytest.mark.slow, pytest.mark.long]) for i in LONG),
    ],
)
def test_no_accepted_group_is_wrong(portion: int) -> None:
    shares = []
    for seed in range(PORTION * portion, PORTION * (portion + 1)):
        traced = check(seed)
        dense = [group.size for group in traced.space.groups]
        cut = [term for term in traced.macs if term.left[1] or term.right[1]]
        shares.append(amount_of(cut, dense) / amount_of(traced.macs, dense))
    assert np.median(shares) > 0.9, f"shares of the MACs that some group cuts: {np.sort(shares)}"


def test_the_grammar_is_drawn_from_whole() -> None:
    words = collections.Counter(word for seed in range(500) for word in Drawn(seed).words)
    assert len(words) == 14
    assert min(words.values()) >= 50, words
