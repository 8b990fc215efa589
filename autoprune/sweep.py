"""A coarse sensitivity sweep: every group alone at a few levels, and the loss increases that follow from it.

Letters: G groups, L levels of one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from autoprune.core import PruningSpace, Trial

if TYPE_CHECKING:
    from autoprune.core import Floats

Levels = tuple[int, ...]


def cells(space: PruningSpace, count: int) -> list[tuple[int, int]]:
    """(group, level) of at most `count` levels a group, spread evenly, the deepest included."""
    found = []
    for g, group in enumerate(space.groups):
        last = len(group.levels) - 1
        found += [(g, level) for level in sorted({math.ceil((i + 1) * last / count) for i in range(count)} - {0})]
    return found


def alone(space: PruningSpace, cell: tuple[int, int]) -> Levels:
    """The levels [G] at which one group is cut and no other."""
    return tuple(cell[1] if g == cell[0] else 0 for g in range(len(space.groups)))


def increases(
    space: PruningSpace, swept: Sequence[tuple[int, int]], dense: Trial, trials: Sequence[Trial]
) -> list[Floats]:
    """Loss increases over the dense network, [L] a group, made to rise and interpolated between the cells; infinite
    from the first level that failed."""
    rows = []
    for g, group in enumerate(space.groups):
        known, losses = [0], [0.0]
        for (owner, level), trial in zip(swept, trials, strict=True):
            if owner == g and trial.error is not None:
                break
            if owner == g:
                known.append(level)
                losses.append(max(losses[-1], trial.loss - dense.loss))
        row = np.full(len(group.levels), math.inf)
        row[: known[-1] + 1] = np.interp(np.arange(known[-1] + 1), known, losses)
        rows.append(row)
    return rows
