"""Where the networks of these tasks are kept once training.py has trained them: safetensors, beside this file."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import nn

from autoprune.core import InputError

FOLDER = Path(__file__).parent / "checkpoints"


def trained(model: nn.Module, name: str) -> nn.Module:
    """The model with its trained weights, in evaluation mode.

    Raises:
        InputError: it was not trained yet.
    """
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        raise InputError(f"{path} is not there: python training.py {name} makes it")
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


def keep(model: nn.Module, name: str) -> Path:
    FOLDER.mkdir(exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), FOLDER / f"{name}.safetensors")
    return FOLDER / f"{name}.safetensors"
