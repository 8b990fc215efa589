"""Weights from a file, which may be anyone's (untrusted.py), for a model that is there already."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import nn

from autoprune import untrusted
from autoprune.core import InputError, Task


def with_weights(task: Task, path: str | Path) -> Task:
    """The task with a copy of its model that has the weights of a safetensors file.

    Raises:
        InputError: the file is absent, damaged, or of another network.
    """
    try:
        model = copy.deepcopy(task.model)
    except Exception as error:
        raise InputError(f"task '{task.name}': copying the model raised {type(error).__name__}: {error}") from error
    fill(model, path, "weights")
    return replace(task, model=model)


def fill(model: nn.Module, path: str | Path, place: str) -> None:
    """Give `model`, in place, the weights of a safetensors file: its whole state dict, tied tensors once. `place` names
    the setting.

    Raises:
        InputError: the file is absent, damaged, or of another network.
    """
    path = Path(str(path))
    try:
        untrusted.check_tensors(path, {name: tensor.shape for name, tensor in model.state_dict().items()})
        safetensors.torch.load_model(model, path)
    except untrusted.MisfitError as error:
        raise InputError(f"{place}={path} does not fit the model: {error}") from error
    except untrusted.DAMAGED as error:
        raise InputError(f"{place}={path} cannot be read: {_first_line(error)}") from error
    except RuntimeError as error:
        mismatch = str(error).strip().splitlines()[1:2] or [str(error)]
        raise InputError(f"{place}={path} does not fit the model: {mismatch[0].strip()}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
