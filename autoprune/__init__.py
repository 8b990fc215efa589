"""autoprune: how much to prune from each layer of a trained PyTorch network under a hard budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autoprune.core import Budget, InputError, Past, PruningSpace, Task
    from autoprune.diagnosis import doctor
    from autoprune.evaluate import Scoring
    from autoprune.exporting import export
    from autoprune.measuring import latency, profile
    from autoprune.prune import RatioTable
    from autoprune.pruning_env import LayerPruningEnv
    from autoprune.recover import FineTune
    from autoprune.result import Result
    from autoprune.rounds import Final
    from autoprune.run import environment, search
    from autoprune.training import train

_HOMES = {
    "Budget": "core",
    "Final": "rounds",
    "FineTune": "recover",
    "InputError": "core",
    "LayerPruningEnv": "pruning_env",
    "Past": "core",
    "PruningSpace": "core",
    "RatioTable": "prune",
    "Result": "result",
    "Scoring": "evaluate",
    "Task": "core",
    "doctor": "diagnosis",
    "environment": "run",
    "export": "exporting",
    "latency": "measuring",
    "profile": "measuring",
    "search": "run",
    "train": "training",
}
__all__ = [
    "Budget",
    "Final",
    "FineTune",
    "InputError",
    "LayerPruningEnv",
    "Past",
    "PruningSpace",
    "RatioTable",
    "Result",
    "Scoring",
    "Task",
    "doctor",
    "environment",
    "export",
    "latency",
    "profile",
    "search",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoprune' has no attribute '{name}'")
    return getattr(import_module(f"autoprune.{_HOMES[name]}"), name)
