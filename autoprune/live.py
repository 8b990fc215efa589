"""What a terminal shows of a search while it runs: the best so far against the budgets, its ratios, and the pace.

Letters: G groups.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from autoprune.core import Trial
from autoprune.page import amount, percent, score, with_interval

if TYPE_CHECKING:
    from autoprune.outset import Outset

PACED = 60  # trials that the pace is of, at most
NAME, BAR, COLUMNS = 20, 10, 3  # characters of a group's name and bar, and columns of groups, at most
BUDGET_BAR = 30  # characters, at most
GLYPHS, ASCII = ("█", "─", "┃", "…"), ("#", "-", "|", ".")


class Board:
    """The board of a search, empty until one has begun. stages: what is drawn beneath it. clock: in seconds.

    It keeps a handful of trials and counts, whatever their number, and draws at most what the terminal holds.
    """

    def __init__(self, stages: Callable[[], RenderableType], clock: Callable[[], float] = time.monotonic) -> None:
        self._stages, self._clock = stages, clock
        self._outset: Outset | None = None
        self._best: Trial | None = None
        self._last: Trial | None = None
        self._done = self._failed = self._cached = self._known = 0
        self._replaying = False
        self._times: deque[float] = deque(maxlen=PACED)

    def begun(self, outset: Outset) -> None:
        """A search begins, and nothing of the one before it counts: a comparison has several."""
        self._best = self._last = None
        self._done = self._failed = self._cached = self._known = 0
        self._times.clear()
        self._outset, self._replaying = outset, True

    def staged(self) -> None:
        """A stage begins: trials that come from now on are new ones."""
        if self._replaying:
            self._replaying = False
            self._times.append(self._clock())

    def scored(self, trial: Trial) -> None:
        self._done += 1
        self._failed += trial.error is not None
        self._cached += trial.cached
        if self._replaying:
            self._known += 1
        else:
            self._times.append(self._clock())
        self._last = trial
        if self._is_best(trial):
            self._best = trial

    def _is_best(self, trial: Trial) -> bool:
        """Of those within every budget, as far as is known of their costs, that were scored on all images or measured:
        the one of highest score."""
        if self._outset is None or trial.error is not None:
            return False
        whole = trial.candidate.fidelity == 1 or trial.candidate.measure
        costs = trial.costs
        within = all(b.cost in costs and b.slack(costs[b.cost]) >= 0 for b in self._outset.budgets)
        return whole and within and (self._best is None or trial.score > self._best.score)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Whatever goes wrong in drawing is no reason to end a search."""
        try:
            drawn = list(console.render(Group(*self._drawn(console, options)), options))
        except Exception as error:  # noqa: BLE001, see above
            logging.getLogger("autoprune").debug("the screen could not be drawn: %s", error)
            drawn = []
        yield from drawn

    def _drawn(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """All that the terminal's height holds: the groups give way first."""
        if (outset := self._outset) is not None:
            width, glyphs = options.max_width, ASCII if options.ascii_only else GLYPHS
            bar = max(BAR, min(BUDGET_BAR, width // 4))
            told = (self._scores(outset), *self._costs(outset, bar, glyphs), self._head(outset), *self._pace(outset))
            lines = [line for text in told for line in text.wrap(console, width)]
            room = console.size.height - 3  # but for the stage and what was said last
            ratios = outset.space.dense() if self._best is None else self._best.candidate.ratios
            groups = self._groups(outset, ratios, width=width, lines=max(0, room - len(lines)), glyphs=glyphs)
            for line in (*lines[: max(room, 1)], *groups):
                line.no_wrap, line.overflow = True, "ellipsis"
                yield line
        yield self._stages()

    def _head(self, outset: Outset) -> Text:
        words = (
            outset.task,
            outset.strategy,
            " ".join(outset.asked),
            f"seed {outset.seed}",
            outset.metric,
            outset.device,
        )
        return Text(" · ".join(words), style="dim")

    def _scores(self, outset: Outset) -> Text:
        line, dense = Text("best so far: "), f"; dense {_told(outset, outset.dense_score)}"
        if self._best is None:
            return line.append(f"none on all images within the budgets yet{dense}")
        low, high = sorted(outset.sign * end for end in (self._best.score_low, self._best.score_high))
        line.append(_told(outset, outset.sign * self._best.score), style="bold green")
        if low < high:
            line.append(f" [{_told(outset, low)}, {_told(outset, high)}]")
        return line.append(f", trial {self._best.number}{dense}")

    def _costs(self, outset: Outset, length: int, glyphs: Sequence[str]) -> Iterator[Text]:
        """A bar a budget, as long as the dense network's cost or the limit, if that is more; the mark is the limit."""
        for asked, budget in zip(outset.asked, outset.budgets, strict=True):
            costs = outset.dense if self._best is None else self._best.costs
            cost = costs[budget.cost]
            whole = max(outset.dense[budget.cost].value, budget.limit)
            within = budget.slack(cost) >= 0
            line = Text(f"{asked} ").append(
                _bar(cost.value / whole, length, glyphs, mark=budget.limit / whole),
                style="green" if within else "yellow",
            )
            line.append(f" {with_interval(asdict(cost))} of {amount(budget.limit)} {budget.unit}")
            line.append(f", {percent(cost.value / budget.limit)}; dense {amount(outset.dense[budget.cost].value)}")
            kind = "" if cost.kind == "counted" else cost.kind
            what = ", ".join(filter(None, (kind, "the dense network" if self._best is None else "")))
            yield line.append(f" ({what})", style="dim") if what else line

    def _groups(
        self, outset: Outset, ratios: Sequence[float], *, width: int, lines: int, glyphs: Sequence[str]
    ) -> Iterator[Text]:
        """A small bar a group [G], in columns where the terminal is wide; as many as it holds."""
        groups = outset.space.groups
        longest = min(NAME, max((len(g.name) for g in groups), default=0))
        cell = longest + BAR + 8
        columns = max(1, min(COLUMNS, width // cell))
        rows = min(-(-len(groups) // columns), lines - (len(groups) > lines * columns))
        if rows < 1:
            return
        shown = groups[: rows * columns]
        for row in range(rows):
            line = Text()
            for i in range(row, len(shown), rows):
                name = shown[i].name
                name = name if len(name) <= longest else glyphs[3] + name[1 - longest :]
                line.append(f"{name:{longest}} ").append(_bar(ratios[i], BAR, glyphs), style="cyan")
                line.append(f" {ratios[i]:.2f}  ")
            yield line
        if more := len(groups) - len(shown):
            yield Text(f"and {more} more", style="dim")

    def _pace(self, outset: Outset) -> Iterator[Text]:
        counts = [f"trials: {self._done}", f"{self._failed} failed", f"{self._cached} from the cache"]
        counts += [f"{self._known} of an earlier run"] if self._known else []
        if len(self._times) > 1:
            seconds = max(self._times[-1] - self._times[0], 1e-9)
            counts.append(f"{60 * (len(self._times) - 1) / seconds:.3g} a minute")
        yield Text(", ".join(counts))
        if (last := self._last) is not None:
            what = "failed" if last.error else _told(outset, outset.sign * last.score)
            costs = (f"{b.cost} {amount(last.costs[b.cost].value)}" for b in outset.budgets if b.cost in last.costs)
            yield Text(", ".join([f"last: trial {last.number}: {what}", *costs]), style="dim")


def _told(outset: Outset, value: float) -> str:
    return score(value, outset.dense_score, outset.sign)


def _bar(share: float, length: int, glyphs: Sequence[str], *, mark: float | None = None) -> str:
    """A share in [0, 1], with a mark at another where there is one."""
    full, empty, at, _ = glyphs
    filled = min(length, max(0, round(share * length)))
    drawn = full * filled + empty * (length - filled)
    if mark is None:
        return drawn
    place = min(length - 1, max(0, round(mark * length)))
    return drawn[:place] + at + drawn[place + 1 :]
