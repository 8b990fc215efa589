"""Small networks whose single weights are pruned: LeNet on Fashion-MNIST and on CIFAR-10, and an auto-encoder that is
judged by its error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from autoprune.core import Task
from autoprune.tasks.images import ImageBatches
from autoprune.tasks.shipped import DATA, provenance

CHECKPOINTS = Path(__file__).parent / "checkpoints"
LIKE: dict[str, Any] = {"mean": [0.0], "std": [1.0]}


class LeNet(nn.Module):
    """LeCun et al., 1998, as PyTorch's pruning tutorial has it, for 28 px in grey or 32 in colour."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5, padding=2 if channels == 1 else 0), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))  # type: ignore[no-any-return]


class AutoEncoder(nn.Sequential):
    """An image through 24 numbers and back."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 24)),
            *(nn.ReLU(), nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 784)),
        )


class Itself:
    """Batches of images, each its own target."""

    def __init__(self, batches: ImageBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return ((x, x.flatten(1)) for x, _ in self.batches)


def cifar10() -> tuple[ImageBatches, ImageBatches, ImageBatches]:
    """From the archive that AUTOPRUNE_CIFAR10 names; its last 5000 training images are for the search."""
    with np.load(os.environ.get("AUTOPRUNE_CIFAR10", "cifar10.npz"), allow_pickle=False) as archive:
        x, y, test = archive["x_train"], archive["y_train"], (archive["x_test"], archive["y_test"])
    like: dict[str, Any] = {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262]}
    return (
        ImageBatches(x[:-5000], y[:-5000], batch_size=64, shift=2, **like),
        ImageBatches(x[-5000:], y[-5000:], batch_size=500, **like),
        ImageBatches(*test, batch_size=500, **like),
    )


def fashion_mnist() -> tuple[ImageBatches, ImageBatches, ImageBatches]:
    with np.load(DATA / "fashion_mnist.npz", allow_pickle=False) as archive:
        arrays = dict(archive)
    held = np.isin(arrays["train_indices"], provenance("fashion_mnist_resnet20")["search_indices"])
    x, y = arrays["x_train"], arrays["y_train"]
    return (
        ImageBatches(x[~held], y[~held], batch_size=64, shift=1, **LIKE),
        ImageBatches(x[held], y[held], batch_size=500, **LIKE),
        ImageBatches(arrays["x_test"], arrays["y_test"], batch_size=500, **LIKE),
    )


def make_task(network: str = "lenet", seed: int = 0) -> Task:
    """network: "lenet", "lenet_cifar10" or "auto_encoder"; seed: of its training, which is done once."""
    train, search, test = cifar10() if network == "lenet_cifar10" else fashion_mnist()
    classifies = network != "auto_encoder"
    torch.manual_seed(seed)
    model: nn.Module = LeNet(search.images.shape[-1]) if classifies else AutoEncoder()
    metric: Metric = MulticlassAccuracy(10, average="micro") if classifies else MeanSquaredError()
    lr, epochs = {"lenet": (0.1, 12), "lenet_cifar10": (0.05, 20), "auto_encoder": (1.0, 12)}[network]
    task = Task(
        name=f"{network}_{seed}",
        model=model,
        inputs=(search.normalised(search.images[:1]),),
        train=train if classifies else Itself(train),
        search=search if classifies else Itself(search),
        test=test if classifies else Itself(test),
        loss=F.cross_entropy if classifies else F.mse_loss,
        metric=metric,
        lr=lr,
    )
    path = CHECKPOINTS / f"{task.name}.safetensors"
    if path.exists():
        model.load_state_dict(safetensors.torch.load_file(path))
    else:
        trained(task, epochs)
        CHECKPOINTS.mkdir(exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), path)
    model.eval()
    return task


def trained(task: Task, epochs: int) -> None:
    """In place, by SGD with one cycle."""
    steps = epochs * len(task.train)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(task.model.parameters(), task.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, steps, pct_start=0.2)
    for _ in range(epochs):
        for inputs, target in task.train:
            value = task.loss(task.model(inputs), target)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
