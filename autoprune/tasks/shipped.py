"""Checkpoints in the package, with the provenance that proves the search split was held out of their training."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from autoprune.core import InputError, Past, Task
from autoprune.tasks.images import ImageBatches
from autoprune.tasks.resnet import ResNet
from autoprune.weights import fill

DATA = Path(__file__).parent / "data"
Images = NDArray[np.uint8]


def provenance(name: str) -> dict[str, Any]:
    """How the checkpoint was made: recipe, log, result, versions, and the search split's indices and hash."""
    return dict(json.loads((DATA / f"{name}.json").read_text()))


def resnet20_task(
    name: str,
    arrays: dict[str, Images],
    search: NDArray[np.integer],
    *,
    source: str,
    checkpoint: str | None,
    batch: int,
    batch_size: int,
) -> Task:
    """A shipped ResNet-20 on its data (x_train y_train x_test y_test), the `search` rows of train held out."""
    record = provenance(name)
    check_held_out(arrays["x_train"][search], record, source)
    x, y = arrays["x_train"], arrays["y_train"]
    train = np.setdiff1d(np.arange(len(y)), search)
    model = ResNet(depth=20, channels=x.shape[-1])
    load_weights(model, name, checkpoint)
    like = {"mean": record["recipe"]["mean"], "std": record["recipe"]["std"]}
    held = ImageBatches(x[search], y[search], batch_size=500, **like)
    return Task(
        name=name,
        model=model.eval(),
        inputs=(held.normalised(held.images[:batch]),),
        train=ImageBatches(x[train], y[train], batch_size=batch_size, shift=record["recipe"]["shift"], **like),
        search=held,
        test=ImageBatches(arrays["x_test"], arrays["y_test"], batch_size=500, **like),
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(10, average="micro"),
        lr=record["recipe"]["max_lr"],
        past=Past(epochs=record["recipe"]["epochs"], schedule=one_cycle),
        notes=(f"data: {source}, {len(train)} training, {len(search)} search and {len(arrays['y_test'])} test images",),
    )


def one_cycle(done: float) -> float:
    """The learning rate of the checkpoints' training, as a fraction of its highest, at a fraction of the steps: up for
    a quarter and down for the rest, both as a cosine (torch.optim.lr_scheduler.OneCycleLR)."""
    start, peak, end, up = 1 / 25, 1.0, 1 / 25e4, 0.25
    low, part = (start, done / up) if done < up else (end, (1 - done) / (1 - up))
    return low + (peak - low) * (1 - math.cos(math.pi * part)) / 2


def load_weights(model: nn.Module, name: str, checkpoint: str | None) -> None:
    """Fill `model` in place from the shipped checkpoint, or from the user's safetensors file.

    Raises:
        InputError: the file is absent, damaged, or of another shape.
    """
    fill(model, checkpoint or DATA / f"{name}.safetensors", "task.checkpoint")


def check_held_out(images: Images, record: dict[str, Any], source: str) -> None:
    """Raises InputError unless these are the very images that were held out when the checkpoint was trained."""
    if hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest() != record["search_sha256"]:
        raise InputError(
            f"the search split taken from {source} is not the one held out of the checkpoint's training: "
            "the data differ from the official set; use that one"
        )


def check_arrays(arrays: dict[str, Images], shape: tuple[int, ...], source: str) -> None:
    """Raises InputError unless x_train, y_train, x_test, y_test are images [N, *shape] of uint8 with labels 0..9."""
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.shape[1:] != shape or len(x) == 0:
            raise InputError(f"{source}: x_{split} must be uint8 [N, {shape}], got {x.dtype} {list(x.shape)}")
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() > 9:
            raise InputError(f"{source}: y_{split} must be {len(x)} labels in 0..9, got {y.dtype} {list(y.shape)}")
