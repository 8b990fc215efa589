"""A call that may hang: what it gives or raises, and that it was late."""

from __future__ import annotations

import threading

import pytest

from autoprune.waiting import LateError, in_time


def test_what_is_given_in_time_is_given_on() -> None:
    assert in_time(lambda: None, 10) is None
    assert in_time(lambda: [1], 10) == [1]


def test_what_a_call_raises_is_not_said_to_be_late() -> None:
    def refused() -> None:
        raise TimeoutError("the login timed out")

    with pytest.raises(TimeoutError, match="the login timed out"):
        in_time(refused, 10)


def test_what_hangs_is_left_to_itself() -> None:
    never = threading.Event()
    with pytest.raises(LateError, match=r"no answer within 0\.05 s"):
        in_time(never.wait, 0.05)
    never.set()
