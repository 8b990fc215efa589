"""The shipped task under the published contract, and the contract under its own fake."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from autoprune.core import Task
from autoprune.tasks import cifar10_resnet20, fashion_mnist_resnet20
from autoprune.testing import TaskContract, leaking_task, restless_task

CIFAR10 = Path(os.environ.get("AUTOPRUNE_CIFAR10", "cifar10.npz"))


@functools.cache
def fashion() -> Task:
    return fashion_mnist_resnet20.make_task(data="shipped")


@functools.cache
def cifar() -> Task:
    return cifar10_resnet20.make_task(data=str(CIFAR10))


class TestFashionMnist(TaskContract):
    def make(self) -> Task:
        return fashion()


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not ours to ship: set AUTOPRUNE_CIFAR10 to yours")
class TestCifar10(TaskContract):
    def make(self) -> Task:
        return cifar()


class Leaking(TaskContract):
    def make(self) -> Task:
        return leaking_task()


class Restless(TaskContract):
    def make(self) -> Task:
        return task


task = restless_task()


def test_the_contract_rejects_its_fakes() -> None:
    with pytest.raises(AssertionError):
        Restless().test_batches_repeat_under_a_seed()
    with pytest.raises(AssertionError, match="shares images"):
        Leaking().test_search_images_are_in_no_other_split()
