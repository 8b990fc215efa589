"""Models that are called with keyword arguments, seen as models called with positional ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn


def positional(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same module, sharing all it holds, called with the values of these keywords in this order."""
    kind: Any = type(model)

    def forward(self: nn.Module, *values: Any) -> Any:
        return kind.forward(self, **dict(zip(names, values, strict=True)))

    made = copy.copy(model)
    made.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return made
