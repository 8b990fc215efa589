"""Waiting for what may never come back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Given = TypeVar("Given")


class LateError(Exception):
    """It has not ended in time."""


def in_time(call: Callable[[], Given], seconds: float) -> Given:
    """What a call gives, or raises, within so many seconds; one that hangs is left to itself, in a thread of its own.

    Raises:
        LateError: it has not ended by then.
    """
    given: list[Given] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            given.append(call())
        except BaseException as error:  # noqa: BLE001, it is raised where it is waited for
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not given:
        raise LateError(f"no answer within {seconds:g} s")
    return given[0]
