"""Models made to mislead the tracer: what it accepts is exact, what it cannot see is refused, and nothing crashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from autoprune.recover import FineTune, Teacher, finetune
from autoprune.space import explored
from autoprune.traced import TracedModel

INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    """Three convolutions and a head; what lies between is each test's."""

    def __init__(self, widths: tuple[int, int, int] = (16, 16, 8)) -> None:
        super().__init__()
        a, b, c = widths
        self.a, self.b, self.c = nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 1), nn.Conv2d(b, c, 1)
        self.head = nn.Linear(c, 5)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.c(self.body(x))).mean((2, 3)))


def sizes(model: nn.Module) -> dict[str, int]:
    torch.manual_seed(0)
    return {g.name: g.size for g in explored(model.eval(), INPUTS).space.groups}


def shapes_at_every_level(model: nn.Module, traced: TracedModel) -> set[torch.Size]:
    """Of what the model returns with each group alone at each of its levels."""
    found = {model(*INPUTS).shape}
    for g, group in enumerate(traced.space.groups):
        for level in group.levels:
            kept = [np.arange(other.size) for other in traced.space.groups]
            kept[g] = kept[g][: group.kept(level)]
            with torch.no_grad():
                found.add(traced.cut(model, kept)(*INPUTS).shape)
    return found


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("way", ["chunk", "tensor_split"])
def test_groups_that_must_keep_a_proportion_are_not_offered_apart(way: str, parts: int) -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 16 if parts == 3 else 15, 1)
            widths = [t.shape[1] for t in self.split(torch.zeros(1, self.a.out_channels, 1, 1))]
            self.each = nn.ModuleList(nn.Conv2d(n, 6, 1) for n in widths)
            self.head = nn.Linear(6, 5)

        def split(self, x: Tensor) -> Any:
            return getattr(x, way)(parts, 1)

        def forward(self, x: Tensor) -> Tensor:
            made = [each(part) for each, part in zip(self.each, self.split(self.a(x)), strict=True)]
            return self.head(F.relu(sum(made)).mean((2, 3)))  # type: ignore[no-any-return]

    model = Uneven().eval()
    traced = explored(model, INPUTS)
    assert shapes_at_every_level(model, traced) == {torch.Size([2, 5])}
    assert [g.name for g in traced.space.groups if g.name.startswith("each")] == ["each.0"]


@pytest.mark.parametrize("shown", ["threshold", "sign", "argmax"])
def test_an_output_that_shows_nothing_proves_nothing(shown: str) -> None:
    class Hidden(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            found = {"threshold": y.softmax(1)[y.softmax(1) > 0.9999], "sign": torch.sign(y), "argmax": y.argmax(1)}
            return found[shown]

    traced = explored(Hidden().eval(), INPUTS)
    assert not traced.space.groups
    assert "the output does not show it" in {r.reason for r in traced.space.refused}


def test_what_only_training_reads_is_not_cut() -> None:
    class Aux(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.a(x))
            y = self.head(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))
            return (y, self.aux(x.mean((2, 3)))) if self.training else y

    traced = explored(Aux().eval(), INPUTS)
    assert {g.name for g in traced.space.groups} == {"b", "c"}
    assert any(r.name == "a" and "in training" in r.reason for r in traced.space.refused)


def test_outputs_of_every_kind_are_compared() -> None:
    class Mixed(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            masked = y.masked_fill(torch.tensor([True, False, False, True, False]), -torch.inf)
            return {"logits": y, "masked": masked, "mask": x > 0, "none": None, "name": "y"}

    assert sizes(Mixed()) == {"a": 16, "b": 16, "c": 8}


def test_as_many_outputs_as_units_are_refused() -> None:
    class Listed(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.body(x)
            return super().forward(torch.zeros_like(x[:, :3])), list(range(x.shape[1]))

    assert "b" not in sizes(Listed())


@pytest.mark.parametrize("halved", [False, True])
def test_a_gate_that_starts_at_zero_hides_nothing(halved: bool) -> None:
    """What lies behind it is proven on other weights: offered where it is right, refused where it is not."""

    class Gated(Net):
        def __init__(self) -> None:
            super().__init__()
            self.back, self.gate = nn.Conv2d(16, 16, 1), nn.Parameter(torch.zeros(1))

        def body(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            inner = F.relu(self.b(x))
            if halved:  # after a shuffle, so that halves of fewer channels hold others
                n, c, h, w = inner.shape
                inner = inner.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
                inner = torch.cat([inner[:, : c // 2].relu(), inner[:, c // 2 :].sigmoid() * 30], 1)
            return x + self.gate * self.back(inner)  # type: ignore[no-any-return]

    assert sizes(Gated()) == {"a": 16, "c": 8} | ({} if halved else {"b": 16})


def test_randomness_does_not_look_like_a_difference() -> None:
    class Noisy(Net):
        def body(self, x: Tensor) -> Tensor:
            return super().body(x + torch.randn_like(x))

    assert sizes(Noisy()) == {"a": 16, "b": 16, "c": 8}


@pytest.mark.parametrize("kind", ["autocast", "cast", "script", "broadcast", "picked"])
def test_what_leaves_units_alone_leaves_them_free(kind: str) -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.relu = torch.jit.script(nn.ReLU())
            self.place = nn.Parameter(torch.randn(1, 1, 8, 8))

        def body(self, x: Tensor) -> Tensor:
            if kind == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return super().body(x).float()
            if kind == "cast":
                return F.relu(F.conv2d(F.relu(self.a(x)), self.b.weight.double().to(x.dtype), self.b.bias))
            if kind == "script":
                return self.relu(self.b(self.relu(self.a(x))))  # type: ignore[no-any-return]
            if kind == "broadcast":
                return F.relu(self.b(F.relu(self.a(x) + self.place)))
            x = F.relu(self.a(x)).flatten(2).index_select(2, torch.arange(63, -1, -1))
            x = x.gather(2, torch.arange(64).expand(len(x), x.shape[1], 64))
            return F.relu(self.b(x.unflatten(2, (8, 8))))

    assert sizes(Plain()) == {"a": 16, "b": 16, "c": 8}


@pytest.mark.parametrize("also", ["none", "whole", "number"])
def test_the_dense_network_teaches_what_it_can(also: str) -> None:
    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return y, {"none": None, "whole": y.argmax(1), "number": 3}[also]

    torch.manual_seed(0)
    batches = [(torch.randn(8, 3), torch.randint(4, (8,))) for _ in range(4)]
    model, teacher = Rich(), Rich()

    def apart() -> float:
        with torch.no_grad():
            return float(sum((model(x)[0].softmax(1) - teacher(x)[0].softmax(1)).abs().sum() for x, _ in batches))

    before = apart()
    plan = FineTune(epochs=20, lr_fraction=1, teach=1.0)
    finetune(
        model, batches, plan, loss=lambda output, y: F.cross_entropy(output[0], y), lr=0.5, teacher=Teacher(teacher)
    )
    assert apart() < 0.5 * before
    assert len(tree_leaves(model(batches[0][0]))) == 2
