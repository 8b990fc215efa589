"""Train a checkpoint that ships with autoprune: python experiments/checkpoints/train.py TASK DATA [EPOCHS]

TASK is fashion_mnist_resnet20 (DATA: the folder of the four official idx .gz files) or cifar10_resnet20 (DATA: an npz
with x_train y_train x_test y_test). 5,000 training images, 500 a class, are set apart as the search split and never
trained on. Writes TASK.safetensors and TASK.json (provenance: split, recipe, log, result) into autoprune/tasks/data,
and for Fashion-MNIST the shipped part of the data: the complete test set, the search split and 15,000 training images.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from autoprune.tasks.images import ImageBatches
from autoprune.tasks.resnet import ResNet

OUT = Path(__file__).parents[2] / "autoprune" / "tasks" / "data"
SEED, BATCH, MAX_LR, WEIGHT_DECAY = 0, 128, 0.2, 5e-4
RECIPES: dict[str, Any] = {
    "fashion_mnist_resnet20": {"epochs": 12, "mean": [0.2860], "std": [0.3530], "shift": 2},
    "cifar10_resnet20": {"epochs": 26, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616], "shift": 4},
}


def main(task: str, data: str, epochs: int | None = None) -> None:
    recipe = RECIPES[task] | ({"epochs": epochs} if epochs else {})
    arrays = read_idx(Path(data)) if task.startswith("fashion") else dict(np.load(data, allow_pickle=False))
    search = stratified(arrays["y_train"], 500, np.random.default_rng(SEED))
    rest = np.setdiff1d(np.arange(len(arrays["y_train"])), search)
    like = {"mean": recipe["mean"], "std": recipe["std"]}
    train = ImageBatches(
        arrays["x_train"][rest], arrays["y_train"][rest], batch_size=BATCH, shift=recipe["shift"], **like
    )
    held = ImageBatches(arrays["x_train"][search], arrays["y_train"][search], batch_size=500, **like)
    test = ImageBatches(arrays["x_test"], arrays["y_test"], batch_size=500, **like)

    torch.manual_seed(SEED)
    model: torch.nn.Module = ResNet(depth=20, channels=len(recipe["mean"]))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    log = fit(model, train, held, recipe["epochs"])
    result = {"search_accuracy": accuracy(model, held), "test_accuracy": accuracy(model, test)}
    print(result, flush=True)

    OUT.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, OUT / f"{task}.safetensors")
    provenance = {
        "made_by": "experiments/checkpoints/train.py",
        "recipe": recipe | {"seed": SEED, "batch": BATCH, "max_lr": MAX_LR, "weight_decay": WEIGHT_DECAY},
        "result": result,
        "weights_sha256": hashlib.sha256((OUT / f"{task}.safetensors").read_bytes()).hexdigest(),
        "search_sha256": hashlib.sha256(np.ascontiguousarray(arrays["x_train"][search]).tobytes()).hexdigest(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "log": log,
        "search_indices": search.tolist(),
    }
    (OUT / f"{task}.json").write_text(json.dumps(provenance) + "\n")
    if task.startswith("fashion"):
        pack(arrays, search, rest)


def fit(model: torch.nn.Module, train: ImageBatches, held: ImageBatches, epochs: int) -> list[dict[str, float]]:
    optimizer = torch.optim.SGD(model.parameters(), MAX_LR, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, MAX_LR, epochs=epochs, steps_per_epoch=len(train), pct_start=0.25
    )
    log = []
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        model.train()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        row = {"epoch": epoch, "loss": round(total / len(train), 4), "search_accuracy": accuracy(model, held)}
        log.append(row | {"seconds": round(time.perf_counter() - start, 1)})
        print(log[-1], flush=True)
    return log


def accuracy(model: torch.nn.Module, batches: ImageBatches) -> float:
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return hits / len(batches.labels)


def stratified(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def read_idx(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        arrays[f"x_{split}"] = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
        arrays[f"y_{split}"] = np.frombuffer(labels, np.uint8, offset=8)
    return arrays


def pack(arrays: dict[str, np.ndarray], search: np.ndarray, rest: np.ndarray) -> None:
    """An npz whose members are LZMA-compressed: numpy reads it as any other, at 0.37 kB an image."""
    extra = rest[stratified(arrays["y_train"][rest], 1500, np.random.default_rng(SEED))]
    part = np.sort(np.concatenate([search, extra]))
    members = {
        "x_train": arrays["x_train"][part],
        "y_train": arrays["y_train"][part],
        "train_indices": part.astype(np.int32),
        "x_test": arrays["x_test"],
        "y_test": arrays["y_test"],
    }
    with zipfile.ZipFile(OUT / "fashion_mnist.npz", "w", zipfile.ZIP_LZMA) as archive:
        for name, array in members.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
