"""Tasks whose model is called with keyword arguments, seen as tasks whose model is called with positional ones.

Everything below works on positional arguments; a task whose `inputs` have names passes through here on its way in, and
its networks on their way out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from autoprune.core import InputError, Task


def positional(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same module, sharing all it holds, called with the values of these keywords in this order."""
    kind: Any = type(model)

    def forward(self: nn.Module, *values: Any) -> Any:
        return kind.forward(self, **dict(zip(names, values, strict=True)))

    made = copy.copy(model)
    made.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "_named": kind})
    return made


def named(model: nn.Module) -> nn.Module:
    """A module that `positional` made, or a copy of one, called by keywords again; any other as it is."""
    model.__class__ = getattr(type(model), "_named", type(model))
    return model


def positional_task(task: Task) -> Task:
    """The task with positional inputs: itself where they have no names."""
    if not isinstance(task.inputs, Mapping):
        return task
    names = tuple(task.inputs)
    splits: dict[str, Any] = {
        split: Unnamed(getattr(task, split), names, split) for split in ("train", "search", "test")
    }
    return replace(task, model=positional(task.model, names), inputs=tuple(task.inputs.values()), **splits)


def unnamed(model: nn.Module, inputs: Any, *splits: Any) -> tuple[nn.Module, tuple[Tensor, ...], list[Any]]:
    """A model, its inputs (a tensor, a tuple, or a mapping by name) and batches, all positional."""
    if isinstance(inputs, Mapping):
        names = tuple(inputs)
        return positional(model, names), tuple(inputs.values()), [Unnamed(split, names, "batches") for split in splits]
    return model, inputs if isinstance(inputs, tuple) else (inputs,), list(splits)


class Unnamed:
    """Batches (inputs by name, target) as batches (inputs in the order of these names, target), read anew each time."""

    def __init__(self, batches: Any, names: Sequence[str], place: str) -> None:
        self._batches, self._names, self._place = batches, tuple(names), place
        if hasattr(batches, "__len__"):
            self.__class__ = _Counted

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        for inputs, target in self._batches:
            missing = [name for name in self._names if name not in inputs]
            if missing:
                raise InputError(
                    f"{self._place}: a batch has no '{missing[0]}', which task.inputs has: a batch's inputs are a "
                    f"mapping with {', '.join(self._names)}"
                )
            yield tuple(inputs[name] for name in self._names), target


class _Counted(Unnamed):
    def __len__(self) -> int:
        return len(self._batches)
