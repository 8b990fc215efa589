"""The screen while a command works: the live board of a search on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from autoprune.live import Board

if TYPE_CHECKING:
    from autoprune.core import Trial
    from autoprune.outset import Outset

REFRESHED = 4  # times a second
EVERY_S = 60  # seconds after which a stage says how far it is, where there is no terminal


class Screen:
    """Progress on the console: one live board with the time left on a terminal, plain lines elsewhere.

    begun: called with what a search begins with. quiet: nothing is shown, all goes to the log. console: by default the
    standard error.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        begun: Callable[[Outset], None] = lambda outset: None,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._logger, self._begun = logger, begun
        self._console = console or Console(stderr=True, quiet=quiet)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(*columns, console=self._console, disable=True)  # drawn on the board
        self._board = Board(self._bar.get_renderable)
        shown = self._console.is_terminal and not quiet
        live = Live(self._board, console=self._console, refresh_per_second=REFRESHED, transient=True)
        self._live = live if shown else None
        self._task: TaskID | None = None
        self._name, self._done, self._began = "", 0, time.perf_counter()
        self._said = self._began
        self._steps: int | None = None

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start(refresh=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        if self._live is not None:
            try:
                self._live.stop()
            except OSError as gone:  # a terminal that was closed
                self._logger.info("the terminal cannot be written: %s", gone)

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
        self._board.staged()

    def step(self) -> None:
        self._done += 1
        if self._live is None and time.perf_counter() - self._said > EVERY_S:
            self.say(f"{self._name}: {self._done}{f' of {self._steps}' if self._steps else ''}")
        if self._task is not None:
            self._bar.advance(self._task)

    def say(self, line: str) -> None:
        self._logger.info(line)
        self._said = time.perf_counter()
        try:
            self._console.print(line, highlight=False, markup=False)
        except OSError as gone:  # a terminal that was closed
            self._logger.info("the terminal cannot be written: %s", gone)

    def begun(self, outset: Outset) -> None:
        self._begun(outset)
        self._board.begun(outset)

    def scored(self, trial: Trial) -> None:
        self._board.scored(trial)

    def _finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if self._name:
            count = f" ({self._done})" if self._done else ""
            self.say(f"{self._name}{count}: {time.perf_counter() - self._began:.1f} s")
            self._name = ""
