"""Weights from a file, for a model that is there already."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune import Task, report
from autoprune.borrowing import seeded
from autoprune.weights import with_weights


def task(model: nn.Module) -> Task:
    nothing: Any = None
    splits = {"train": nothing, "search": nothing, "test": nothing}
    return Task(name="tied", model=model, inputs=(), **splits, loss=nothing, metric=nothing, lr=0.1)


def states_are_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.b(self.a(x))
        return output


def test_weights_that_were_written_are_read_into_a_copy() -> None:
    with seeded(1):
        written, model = Tied(), Tied()
    before = copy.deepcopy(model)
    report._write_weights(written, Path("tied.safetensors"))
    found = with_weights(task(model), "tied.safetensors")
    assert states_are_equal(found.model, written)
    assert found.model.get_submodule("a").weight is found.model.get_submodule("b").weight
    assert states_are_equal(model, before)
