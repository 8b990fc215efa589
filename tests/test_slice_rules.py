"""What a layer gives where units are cut is what it gave, cut, wherever the rules say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map
from zoo import ZOO

from autoprune.dependence import Dependence
from autoprune.handing import narrowed, same
from autoprune.probe import randomise
from autoprune.space import trace


def narrower(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, set[str]]:
    """The modules that need not run where a group alone is cut, by group, but for those that it leaves as they are;
    each gives in the cut network what it gave, cut."""
    model = model.eval()
    traced = trace(model, inputs)
    randomise(model, np.random.default_rng(3))
    dependence, whole, found = Dependence(traced, model, inputs), outputs(model, inputs), {}
    common = [np.arange(g.size) for g in traced.space.groups]
    for g, group in enumerate(traced.space.groups):
        kept = [*common]
        kept[g] = np.sort(np.random.default_rng(g).choice(group.size, max(1, group.size // 3), replace=False))
        found[group.name] = dependence.reusable([g], [g]).keys() - dependence.reusable([g]).keys()
        cut = outputs(traced.cut(model, kept), inputs)
        for name in found[group.name]:
            theirs = narrowed(whole[name], dependence.left(name, kept, common))
            for a, b in zip(tree_leaves(cut[name]), tree_leaves(theirs), strict=True):
                torch.testing.assert_close(a, b)
    return found


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        found[name] = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda *a, name=name: keep(name, a[-1]))
    with torch.no_grad():
        model(*(x.clone() for x in inputs))
    for module in model.modules():
        module._forward_hooks.clear()
    return found


FOUND = {
    "resnet": {
        "conv1": {"conv1", "bn1", "layer1.0.shortcut"},
        "layer1.0.conv1": {"layer1.0.conv1", "layer1.0.bn1"},
        "layer2.0.conv2": {"layer2"},
    },
    "vgg": {"0": {"0", "2"}, "3": {"3", "5", "6"}, "7": {"7", "9"}},
    "mobilenetv2": {
        "0.0": {"0"},
        "1.body.0.0": {"1.body.0", "1.body.1"},
        "2.body.0.0": {"2.body.0", "2.body.1"},
        "3.0": {"3", "4", "5"},
    },
    "densenet": {
        "stem": {"stem", "layers.0.0", "layers.0.1"},
        "layers.0.2": {"layers.0", "layers.1.0", "layers.1.1"},
    },
    "vit_block": {"mlp.0": {"mlp.0", "mlp.1"}},
    "squeeze_excite": {"a.0": {"a"}, "down": {"down"}, "b.0": {"b"}},
    "heads": {"patch": {"patch"}, "body.q": {"body.q", "body.k", "body.v"}, "body.o": {"body"}},
    "grouped": {"0.0": {"0"}, "1.0": {"1"}, "2.0": {"2", "3", "4"}},
    "c2f": {},
}


@pytest.mark.parametrize("name", FOUND)
def test_what_need_not_run_gives_what_it_gave_cut(name: str) -> None:
    torch.manual_seed(0)
    found = narrower(ZOO[name].build(), ZOO[name].inputs(2))
    for group, modules in FOUND[name].items():
        assert found[group] == modules


class Between(nn.Module):
    """A convolution, something that is done to what it gives, and one that reads that."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.stage = Applied(act)
        self.last = nn.LazyConv2d(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.stage(self.first(x))))


class Applied(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "activations": lambda x: F.leaky_relu(F.hardswish(x) * 2 - torch.sigmoid(x)).relu_(),
    "pooling": lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2) + F.avg_pool2d(x, 3, 1, 1),
    "a gate for each channel": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "softmax over places": lambda x: x * x.flatten(2).softmax(-1).view(x.shape),
    "layout": lambda x: F.pad(x.permute(0, 2, 3, 1).contiguous().transpose(1, 3), (1, 1))[:, :, 1:],
    "two halves of an image": lambda x: torch.cat([part.abs() for part in x.chunk(2, 2)], 2),
    "twice": lambda x: torch.cat([x, -x], 1),
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "over channels": lambda x: x * x.square().sum(1, keepdim=True),
    "written in place": lambda x: x.mul_(x.square().sum(1, keepdim=True)),
    "a product": lambda x: x * (x.flatten(2).transpose(1, 2) @ x.flatten(2)).sum(1).view(-1, 1, 8, 8),
}


@pytest.mark.parametrize("act", PASSING.values(), ids=PASSING)
def test_what_is_done_to_each_channel_alone_is_cut(act: Callable[[Tensor], Tensor]) -> None:
    assert narrower(*between(act))["first"] == {"first", "stage"}


@pytest.mark.parametrize("act", MIXING.values(), ids=MIXING)
def test_what_mixes_channels_runs(act: Callable[[Tensor], Tensor]) -> None:
    model, inputs = between(act)
    assert narrower(model, inputs)["first"] == {"first"}


def between(act: Callable[[Tensor], Tensor]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = Between(act), (torch.randn(2, 3, 8, 8),)
    model(*inputs)
    return model, inputs


class Looped(nn.Module):
    """A convolution that reads the units that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loop = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.as_tensor(self.head(x + self.loop(x)))


def test_a_layer_that_reads_the_units_that_it_makes_runs() -> None:
    torch.manual_seed(0)
    assert narrower(Looped(), (torch.randn(2, 3, 8, 8),)) == {"stem": {"stem"}}


def test_what_is_left_lies_in_memory_as_before() -> None:
    x, where = torch.randn(2, 6, 4, 4), torch.tensor([0, 3, 5])
    for form in (torch.contiguous_format, torch.channels_last):
        (left,) = narrowed([x.contiguous(memory_format=form)], [{1: where}])
        assert same(left, x[:, where].contiguous(memory_format=form))
    assert not same(x, x.contiguous(memory_format=torch.channels_last))
    assert not same(x, x + 1e-6)
