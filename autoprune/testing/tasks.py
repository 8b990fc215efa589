"""What every task owes, and a fake that breaks one rule."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.borrowing import seeded
from autoprune.checks import check_task
from autoprune.core import Task
from autoprune.testing.criteria import two_layers


class TaskContract:
    """What every task owes: it scores, repeats under a seed, and holds its search split out of training."""

    def make(self) -> Task:
        """Your task."""
        raise AssertionError("override make()")

    def test_it_can_be_searched(self) -> None:
        check_task(self.make())

    def test_batches_repeat_under_a_seed(self) -> None:
        task = self.make()

        def first() -> list[Tensor]:
            with seeded(3):
                return [leaf for leaf in tree_leaves(next(iter(task.train))) if isinstance(leaf, Tensor)]

        assert all(torch.equal(a, b) for a, b in zip(first(), first(), strict=True))

    def test_search_images_are_in_no_other_split(self) -> None:
        task = self.make()
        held = _hashes(task.search)
        assert len(held) > 0
        assert not held & _hashes(task.train), "the search split shares images with the training split"
        assert not held & _hashes(task.test), "the search split shares images with the test split"


def _hashes(batches: Iterable[Any]) -> set[bytes]:
    """A hash of each example; augmented training images are compared as they are stored, where the split says so."""
    stored = getattr(batches, "images", None)
    rows = [stored] if stored is not None else [tree_leaves(inputs)[0] for inputs, _ in batches]
    return {hashlib.sha256(x.contiguous().numpy().tobytes()).digest() for part in rows for x in part}


def restless_task() -> Task:
    """Fake task: draws its batches from a generator of its own, which no seed of ours reaches."""
    generator = torch.Generator()
    generator.manual_seed(0)

    class Drawn:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield torch.randn(8, 4, generator=generator), torch.arange(8) % 3

    return replace(leaking_task(), name="restless", train=Drawn())


def leaking_task() -> Task:
    """Fake task: its search split is its training split."""
    from torchmetrics.classification import MulticlassAccuracy

    data = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]
    return Task(
        name="leaking",
        model=two_layers(),
        inputs=(data[0][0][:1],),
        train=data,
        search=data,
        test=data,
        loss=nn.functional.cross_entropy,
        metric=MulticlassAccuracy(3),
        lr=0.1,
    )
