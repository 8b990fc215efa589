"""The screen while a command works: a live bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from autoprune.core import Trial
    from autoprune.outset import Outset


class Screen:
    """Progress on the console: a live bar with the time left on a terminal, plain lines elsewhere.

    begun: called with what a search begins with.
    """

    def __init__(self, logger: logging.Logger, *, begun: Callable[[Outset], None] = lambda outset: None) -> None:
        self._logger, self._begun = logger, begun
        self._console = Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task: TaskID | None = None
        self._name, self._done, self._began = "", 0, time.perf_counter()
        self._steps: int | None = None

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        self._bar.stop()

    def stage(self, name: str, steps: int | None) -> None:
        if name == self._name and self._steps is not None and steps is not None:
            self._steps += steps  # more of the same: one line for all
            if self._task is not None:
                self._bar.update(self._task, total=self._steps)
            return
        if name == self._name and self._steps is None:
            self._name = ""  # the same stage, its steps now known
        self._finish()
        self._name, self._steps, self._done, self._began = name, steps, 0, time.perf_counter()
        self._task = self._bar.add_task(name, total=steps)

    def step(self) -> None:
        self._done += 1
        if self._task is not None:
            self._bar.advance(self._task)

    def say(self, line: str) -> None:
        self._logger.info(line)
        self._console.print(line, highlight=False, markup=False)

    def begun(self, outset: Outset) -> None:
        self._begun(outset)

    def scored(self, trial: Trial) -> None:
        pass

    def _finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if self._name:
            count = f" ({self._done})" if self._done else ""
            self.say(f"{self._name}{count}: {time.perf_counter() - self._began:.1f} s")
            self._name = ""
