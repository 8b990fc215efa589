"""Watching the operations of a model's own forward pass."""

from __future__ import annotations

import sys

from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """A mode that sees every operation, and does not bring torch's compiler in: torch would import it, 95 MB and two
    seconds, only to have it leave the mode alone."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return "torch._dynamo" in sys.modules
