"""What a command was asked to show: all it has to say, the verdict alone, or one JSON object for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

QUIET, JSON = ("-q", "--quiet"), "--json"


@dataclass(frozen=True)
class Telling:
    """quiet: no progress, and of the last screen the verdict alone. json: the last screen as one JSON object."""

    quiet: bool = False
    json: bool = False


_TELLING = ContextVar("telling", default=Telling())  # noqa: B039, it is frozen


def of_line(words: Sequence[str]) -> tuple[Telling, list[str]]:
    """What the flags among a command's words ask for, and the other words."""
    asked = Telling(quiet=any(word in QUIET for word in words), json=JSON in words)
    return asked, [word for word in words if word not in (*QUIET, JSON)]


@contextmanager
def told(asked: Telling) -> Iterator[None]:
    """What is shown inside is shown so."""
    token = _TELLING.set(asked)
    try:
        yield
    finally:
        _TELLING.reset(token)


def telling() -> Telling:
    """How the command that runs was asked to show what it has to say."""
    return _TELLING.get()


def write_json(values: Mapping[str, Any]) -> None:
    """One JSON object on one line of the standard output; a number that is not finite is null, as JSON has none."""
    sys.stdout.write(json.dumps(_finite(values), allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if hasattr(value, "item"):  # a number of NumPy's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
