"""The test split: read once, and what of it is known of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_prune import Named, table_of
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from autoprune import final
from autoprune.core import Task
from autoprune.keywords import positional, positional_task
from autoprune.recover import FineTune


class Echo(nn.Module):
    """Its outputs are what it is given, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Whole(Echo):
    """Hands on what it is given as it is."""

    def forward(self, x: Tensor) -> Any:
        return x


class Batches(Metric):
    """How many batches it was given, whatever they hold."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def update(self, output: Any, target: Any) -> None:
        self.count += 1

    def compute(self) -> float:
        return float(self.count)


class Once:
    """Batches that tell how often they were begun."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.begun = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        yield from self.batches


def task_of(test: Any, metric: Metric, model: nn.Module | None = None, inputs: Any = None) -> Task:
    given = {"inputs": inputs or (torch.zeros(1, 2),), "train": test, "search": test, "test": test, "lr": 0.1}
    return Task(name="t", model=model or Echo(), loss=F.cross_entropy, metric=metric, **given)


def share_within(count: int, batches: list[tuple[Tensor, Tensor]], factor: float = 1.0) -> float:
    """The share of targets among the first so many classes, of equal ones the first, image by image."""
    hits = []
    for outputs, target in batches:
        for scores, wanted in zip(outputs.tolist(), target.tolist(), strict=True):
            order = sorted(range(len(scores)), key=lambda c: -factor * scores[c])
            hits.append(wanted in order[:count])
    return sum(hits) / len(hits)


@pytest.mark.parametrize("classes", [2, 5, 6, 9])
@pytest.mark.parametrize("kind", [torch.int64, torch.uint8])
def test_top_1_and_top_5_are_those_counted_image_by_image(classes: int, kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(classes)
    batches = [
        ((4 * torch.randn(size, classes, generator=draw)).round(), torch.randint(classes, (size,), generator=draw))
        for size in (40, 40, 7)
    ]  # rounded, so that some classes are level
    split = Once([(x, y.to(kind)) for x, y in batches])
    task = task_of(split, MulticlassAccuracy(classes, average="micro"))
    for factor, tested in zip((1.0, -1.0), final.test(task, [Echo(), Echo(-1.0)]), strict=True):
        assert tested.top1 == pytest.approx(share_within(1, batches, factor), abs=1e-12)
        assert tested.metric == pytest.approx(tested.top1, abs=1e-6), "a micro accuracy is another's top-1"
        assert tested.top5 == (pytest.approx(share_within(5, batches, factor), abs=1e-12) if classes > 5 else None)
    assert split.begun == 1, "two networks, one reading"
    (broken,) = final.test(task, [Echo(math.nan)])
    assert broken.top1 == pytest.approx(broken.metric, abs=1e-6), "NaN is no right answer"


SCORES, NUMBERS = torch.randn(4, 7), torch.tensor([0, 3, 6, 2])


@pytest.mark.parametrize(
    ("outputs", "target"),
    [
        (SCORES, torch.tensor([0, 3, 7, 2])),  # of more classes than there are scores
        (SCORES, torch.tensor([0, 3, -100, 2])),  # one that is to be ignored
        (SCORES, NUMBERS.float()),
        (SCORES, NUMBERS > 1),
        (SCORES, SCORES),
        (SCORES, NUMBERS[:, None]),
        (SCORES, NUMBERS[:3]),
        (SCORES, NUMBERS.tolist()),
        (SCORES, {"classes": NUMBERS}),
        (SCORES[:, :1], torch.zeros(4, dtype=torch.int64)),  # one class
        (SCORES.long(), NUMBERS),
        (SCORES[0], torch.tensor(3)),
        (SCORES[..., None, None].expand(4, 7, 2, 2), torch.zeros(4, 2, 2, dtype=torch.int64)),  # segmentation
    ],
)
def test_what_is_no_classification_has_its_metric_alone(outputs: Tensor, target: Any) -> None:
    for batches in (
        [(outputs, target)],
        [(SCORES, NUMBERS), (outputs, target)],
        [(outputs, target), (SCORES, NUMBERS)],
    ):
        (tested,) = final.test(task_of(batches, Batches()), [Whole()])
        assert tested == final.Tested(metric=len(batches), top1=None, top5=None)


@pytest.mark.parametrize("form", [lambda x: (x, x), lambda x: {"logits": x}])
def test_outputs_that_are_not_one_tensor_are_no_classification(form: Callable[[Tensor], Any]) -> None:
    class Formed(Echo):
        def forward(self, x: Tensor) -> Any:
            return form(x)

    assert final.test(task_of([(SCORES, NUMBERS)], Batches()), [Formed()]) == [final.Tested(1.0, None, None)]


def test_batches_by_name_are_tested_and_a_table_is_reused_on_them() -> None:
    """On a model that takes nothing by position, whose batches name its arguments in another order."""
    draw = torch.Generator().manual_seed(0)
    model, inputs = Named(), {"one": torch.randn(1, 6), "other": torch.randn(1, 4)}
    split = [
        ({"other": torch.randn(20, 4, generator=draw), "one": torch.randn(20, 6, generator=draw)}, torch.arange(20) % 3)
        for _ in range(2)
    ]
    task = task_of(split, MulticlassAccuracy(3, average="micro"), model, inputs)
    with torch.no_grad():
        hits = [(model(**given).argmax(dim=1) == target).float().mean().item() for given, target in split]
    in_order = positional_task(task)
    (tested,) = final.test(in_order, [in_order.model])
    assert tested.top1 == pytest.approx(sum(hits) / 2)
    assert tested.top5 is None
    table = table_of(positional(model, tuple(inputs)), inputs=tuple(inputs.values()))
    tuned = final.finetune_table(task, table, final=FineTune(epochs=0))
    assert tuned.test_dense == pytest.approx(sum(hits) / 2)
    assert tuned.model(**inputs).shape == (1, 3)
    assert tuned.measured["macs"].value == 4 * (6 + 4) + 4 * 3
