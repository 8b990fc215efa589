"""ResNet-20 on Fashion-MNIST (Xiao et al., arXiv 1708.07747; MIT licence): real data and a trained checkpoint ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from autoprune import untrusted
from autoprune.core import InputError, Task
from autoprune.tasks.shipped import DATA, Images, check_arrays, provenance, resnet20_task

NAME = "fashion_mnist_resnet20"
MOST = 60_000  # images of a split
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def make_task(
    *, data: str | None = None, checkpoint: str | None = None, batch: int = 44, batch_size: int = 128
) -> Task:
    """The default task.

    data: a folder with the four official idx .gz files, or "shipped" for the part in the package (the complete test
    set, the search split and 15,000 training images); by default Debian's dataset-fashion-mnist if it is installed,
    else "shipped". checkpoint: a safetensors file instead of the shipped one. batch: examples in the input that costs
    are counted and measured on. batch_size: of training.

    Raises:
        InputError: data or checkpoint are absent, damaged, or not what they should be.
    """
    if batch < 1 or batch_size < 1:
        raise InputError(f"task.batch and task.batch_size must be >= 1, got {batch} and {batch_size}")
    record = provenance(NAME)
    source = str(data) if data else str(DEBIAN) if DEBIAN.is_dir() else "shipped"
    arrays = _shipped() if source == "shipped" else _read_idx(Path(source))
    check_arrays({k: v for k, v in arrays.items() if k != "train_indices"}, (28, 28, 1), source)
    position = {int(i): p for p, i in enumerate(arrays["train_indices"])}
    if not all(i in position for i in record["search_indices"]):
        raise InputError(f"task.data={source} holds {len(position)} training images, the official set has 60000")
    search = np.array([position[i] for i in record["search_indices"]])
    return resnet20_task(
        NAME, arrays, search, source=str(source), checkpoint=checkpoint, batch=batch, batch_size=batch_size
    )


def _shipped() -> dict[str, Images]:
    with np.load(DATA / "fashion_mnist.npz", allow_pickle=False) as archive:
        return dict(archive)


def _read_idx(folder: Path) -> dict[str, Images]:
    arrays: dict[str, Any] = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"x_{split}"] = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16, MOST * 784)
        arrays[f"y_{split}"] = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8, MOST)
        count = len(arrays[f"y_{split}"])
        if arrays[f"x_{split}"].size != count * 784:
            raise InputError(f"task.data={folder}: {count} {split} labels do not pair with the images of 784 bytes")
        arrays[f"x_{split}"] = arrays[f"x_{split}"].reshape(count, 28, 28, 1)
    return arrays | {"train_indices": np.arange(len(arrays["y_train"]))}


def _idx(path: Path, header: int, most: int) -> Images:
    try:
        content = untrusted.unzipped(path, header + most)
    except untrusted.DAMAGED as error:
        raise InputError(f"task.data: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return np.frombuffer(content, np.uint8, offset=min(header, len(content))).copy()
