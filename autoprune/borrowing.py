"""Use what is the user's and leave it as it was: random generators, a model's modes, a batch's tensors, a folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.core import InputError
from autoprune.writing import room


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, Python's, numpy's and torch's global generators start from `seed`; afterwards their state is back.

    Data loaders, dropout and augmentation draw from these generators, so the same seed gives the same batches.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many threads of the CPU, on which the last bits of what it gives may depend."""
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, torch computes in "float32", or what does not need it in "bfloat16"."""
    with torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext():
        yield


@contextmanager
def silent() -> Iterator[None]:
    """Inside, nothing reaches the standard output, not even what a library prints past Python: HiGHS does, whatever it
    is told."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        with suppress(OSError, AttributeError, TypeError):  # what C has buffered goes nowhere too
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every submodule has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def arguments(inputs: Any, device: torch.device | str | None = None) -> tuple[Any, ...]:
    """A batch's inputs as positional arguments of a model, copied: a model may work in place on what it is given."""
    given = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    return tuple(tree_map(lambda x: x.clone().to(device or x.device) if isinstance(x, Tensor) else x, given))


def to_device(value: Any, device: torch.device | str) -> Any:
    """Every tensor in a nest of tuples, lists and dictionaries on the device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


def fingerprint(value: Any) -> str:
    """Of the contents of a nest: tensors by their bytes, anything else as it prints."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(repr((tuple(leaf.shape), leaf.dtype)).encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()[:32]


def first(batches: Any, count: int) -> list[Any]:
    """The first `count` batches of a split, and not one more."""
    taken: list[Any] = []
    for batch in batches if count else ():
        taken.append(batch)
        if len(taken) == count:
            break
    return taken


def check_writable(folder: Path, place: str) -> None:
    """Raises InputError where nothing could be kept, before any time is spent; `place` names the setting."""
    try:
        with room(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f"probe.{os.getpid()}.tmp"
            probe.write_text("")
            probe.unlink()
    except OSError as error:
        raise InputError(f"{place}={folder} cannot be written: {error.strerror}; null does without") from error
