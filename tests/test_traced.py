"""A model's structure is copied as copy.deepcopy does, and its tensors are those that are given."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autoprune.traced import tensors_of, with_tensors


class Counts:
    """What is shared by those that hold it."""

    def __init__(self) -> None:
        self.seen = [0]


class Odd(nn.Module):
    """Holds a bit of everything."""

    listed: list[nn.Module]
    counts: Any
    parent: Any
    settings: Any
    run: Any

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.second.weight = nn.Parameter(torch.randn(4, 4, 3, 3), requires_grad=False)
        self.third = nn.Conv2d(4, 4, 3)
        self.third.weight = self.second.weight  # tied
        self.again = self.first  # the same module twice
        self.norm = nn.BatchNorm2d(4)
        self.listed = [self.norm, nn.Linear(4, 2)]  # one of which no name leads to
        self.settings = {"widths": [3, 4], "of": self.second, 7: (1, [2])}
        self.counts = Counts()
        vars(self.first)["counts"] = self.counts
        self.run = self.forward  # bound to the module
        self.alias = self.settings["widths"]
        self.register_buffer("none", None)
        self.register_buffer("scale", torch.ones(1), persistent=False)
        object.__setattr__(self, "parent", self)
        self.drawn = parametrizations.weight_norm(nn.Linear(4, 4))
        self.own, self.frozen = Careful(), Forgetful()
        self.lstm, self.attention = nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)
        self.scripted = torch.jit.script(nn.Linear(4, 4))
        self.norm.register_forward_hook(self.hear)

    def hear(self, *_: object) -> None:
        self.counts.seen[0] += 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.third(self.second(self.again(x)))) * self.scale
        x, _ = self.lstm(self.own(self.drawn(self.scripted(x.mean((2, 3))))))
        return torch.as_tensor(self.listed[1](self.attention(x, x, x)[0]))


class Careful(nn.Module):
    """Says itself how it is copied."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Careful:
        made = Careful()
        made.copies = self.copies + 1
        return made

    def forward(self, x: Tensor) -> Tensor:
        return x


class Forgetful(nn.Module):
    """Leaves out what it can make again when it is copied."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cache"}

    def __init__(self) -> None:
        super().__init__()
        self.cache = object()


def copied(model: Odd) -> Odd:
    made = with_tensors(model, {name: tensor.detach().clone() for name, tensor in tensors_of(model)})
    assert isinstance(made, Odd)
    return made


def told(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """All that an object holds, and what in it is one: as values that can be compared."""
    if isinstance(value, int | float | str | type | None):
        return value
    if id(value) in seen:
        return f"number {seen[id(value)][0]}"
    seen[id(value)] = len(seen), value  # held, as the next object may get the address of one that is gone
    if isinstance(value, Tensor):
        return type(value).__name__, value.requires_grad, value.tolist()
    if isinstance(value, dict):
        return type(value).__name__, [(told(k, seen), told(v, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [told(each, seen) for each in value]
    if hasattr(value, "__self__") and hasattr(value, "__func__"):
        return "method", value.__func__.__name__, told(value.__self__, seen)
    held = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in ("_c", "_flat_weight_refs")}
    return type(value).__name__, told(held, seen) if not callable(value) or isinstance(value, nn.Module) else ""


def test_a_structure_is_copied_as_deepcopy_does() -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    ours, theirs = copied(model), copy.deepcopy(model)
    assert told(ours, {}) == told(theirs, {})
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(ours(x), model(x))
    assert ours.counts.seen == model.counts.seen == [1]
    assert ours.get_parameter("third.weight") is ours.get_parameter("second.weight")
    assert ours.parent is ours.run.__self__ is ours


def test_nothing_of_a_copy_is_the_models() -> None:
    model = Odd()
    ours = copied(model)
    for (name, theirs), (_, made) in zip(tensors_of(model), tensors_of(ours), strict=True):
        assert made.data_ptr() != theirs.data_ptr(), name
    ours.settings["widths"].append(5)
    ours.get_submodule("first").register_forward_hook(lambda *_: None)
    ours.first.stride = (2, 2)
    ours.train(False)
    ours.add_module("more", nn.Linear(1, 1))
    assert model.settings["widths"] == model.alias == [3, 4]
    assert not model.get_submodule("first")._forward_hooks
    assert model.first.stride == (1, 1)
    assert model.training
    assert model.get_submodule("norm").training
    assert "more" not in dict(model.named_children())
    assert isinstance(ours.get_submodule("first")._forward_hooks, OrderedDict)


@pytest.mark.parametrize("attribute", ["listed", "settings", "counts", "run", "parent"])
def test_what_is_no_module_is_copied_with_it(attribute: str) -> None:
    model = Odd()
    assert getattr(copied(model), attribute) is not getattr(model, attribute)
