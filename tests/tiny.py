"""A task that searches in seconds: a small network on real Fashion-MNIST images at half size, trained on the spot."""

from __future__ import annotations

import functools
import time

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from zoo import MobileNetV2

from autoprune import Task
from autoprune.borrowing import seeded
from autoprune.recover import FineTune, finetune
from autoprune.tasks.fashion_mnist_resnet20 import make_task as full_task


def ends(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process has ended, or does so soon: who kills it need not wait for it, nor reap it."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@functools.cache
def _data() -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    full = full_task(data="shipped")

    def half(batches: object, count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        split = batches.normalised(batches.images[:count])  # type: ignore[attr-defined]
        images, labels = F.avg_pool2d(split, 2), batches.labels[:count]  # type: ignore[attr-defined]
        return list(zip(images.split(size), labels.split(size), strict=True))

    return {
        "train": half(full.train, 3000, 100),
        "search": half(full.search, 1000, 250),
        "test": half(full.test, 1000, 250),
    }


@functools.cache
def _trained(seed: int) -> nn.Module:
    with seeded(seed):
        model = MobileNetV2(classes=10, channels=1)
        finetune(model, _data()["train"], FineTune(epochs=4, lr_fraction=1, teach=0), loss=F.cross_entropy, lr=0.1)
    return model


def make_task(*, seed: int = 0, name: str = "tiny") -> Task:
    data = _data()
    return Task(
        name=name,
        model=_trained(seed),
        inputs=(data["search"][0][0][:1],),
        train=data["train"],
        search=data["search"],
        test=data["test"],
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(10, average="micro"),
        lr=0.1,
    )
