"""ResNet-20 on CIFAR-10 (Krizhevsky, 2009): the checkpoint ships, the data are the user's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autoprune import untrusted
from autoprune.core import InputError, Task
from autoprune.tasks.shipped import Images, check_arrays, provenance, resnet20_task

NAME = "cifar10_resnet20"
RECORD = 3073  # one label byte, then 3 x 32 x 32 bytes
IN_FILE = 10_000  # records
MOST = {"train": 5 * IN_FILE, "test": IN_FILE}


def make_task(*, data: str, checkpoint: str | None = None, batch: int = 50, batch_size: int = 128) -> Task:
    """data: an npz with x_train y_train x_test y_test (uint8 [N, 32, 32, 3]) or the official binary folder
    (cifar-10-batches-bin: data_batch_1.bin ... data_batch_5.bin, test_batch.bin). Other arguments as the default task.

    Raises:
        InputError: data or checkpoint are absent, damaged, or not what they should be.
    """
    if batch < 1 or batch_size < 1:
        raise InputError(f"task.batch and task.batch_size must be >= 1, got {batch} and {batch_size}")
    record = provenance(NAME)
    path = Path(str(data))
    arrays = _read_binary(path) if path.is_dir() else _read_npz(path)
    check_arrays(arrays, (32, 32, 3), data)
    if len(arrays["y_train"]) != 50_000:
        raise InputError(f"task.data={data} holds {len(arrays['y_train'])} training images, the official set has 50000")
    search = np.array(record["search_indices"])
    return resnet20_task(
        NAME, arrays, search, source=str(data), checkpoint=checkpoint, batch=batch, batch_size=batch_size
    )


def _read_npz(path: Path) -> dict[str, Images]:
    try:
        most = {f"x_{split}": (RECORD - 1) * count for split, count in MOST.items()}
        return untrusted.arrays_of(path, most | {f"y_{split}": 8 * count for split, count in MOST.items()})
    except untrusted.DAMAGED as error:
        raise InputError(f"task.data={path} is no npz with x_train y_train x_test y_test: {error}") from error


def _read_binary(folder: Path) -> dict[str, Images]:
    arrays = {}
    for split, names in (("train", [f"data_batch_{i}.bin" for i in range(1, 6)]), ("test", ["test_batch.bin"])):
        try:
            content = b"".join(untrusted.content(folder / name, RECORD * IN_FILE) for name in names)
        except OSError as error:
            raise InputError(f"task.data={folder}: {error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"task.data={folder}: a file of the {split} records cannot be read: {error}") from error
        if not content or len(content) % RECORD:
            raise InputError(f"task.data={folder}: the {split} files are not whole records of {RECORD} bytes")
        rows = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
        arrays[f"y_{split}"] = rows[:, 0].copy()
        arrays[f"x_{split}"] = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()
    return arrays
