"""Sensitivity sweeps: every group alone at some of its levels, and the loss increases that follow from it.

Letters: G groups, L levels of one group.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from autoprune.core import Candidate, PruningSpace, Recovery, Trial

if TYPE_CHECKING:
    from autoprune.core import Floats

Levels = tuple[int, ...]
RESOLUTION = 0.25  # see bisected


def bisected(
    space: PruningSpace, *, fidelity: float = 0.2, recovery: Recovery = "probe"
) -> Generator[list[Candidate], Sequence[Trial], list[Floats]]:
    """Loss increases [L] of each group alone, scored where its curve rises and interpolated where it does not.

    The curves rise with the ratio, so two levels of nearly one loss tell what lies between them. Every group is scored
    at its deepest level, then the middle between two levels as long as the roots of their losses differ by more than
    RESOLUTION of the root of what the groups lose at their deepest, in the median: roots, because what an allocation
    has to choose from is low. What loses more than that median is no choice and is not told apart.
    A level that fails bars the deeper ones. Candidates get this recovery and are scored at `fidelity`, beside the dense
    network healed alike.
    """
    increases: list[dict[int, float]] = [{0: 0.0} for _ in space.groups]
    asked = [(g, len(group.levels) - 1) for g, group in enumerate(space.groups) if len(group.levels) > 1]
    reference = math.nan
    while asked:
        ratios = [space.dense(), *(space.ratios(alone(space, cell)) for cell in asked)]
        dense, *trials = yield [Candidate(ratios=each, recovery=recovery, fidelity=fidelity) for each in ratios]
        reference = reference if dense.error else dense.loss
        for (g, level), trial in zip(asked, trials, strict=True):
            increases[g][level] = math.inf if trial.error else max(trial.loss - reference, 0.0)
        most = _scale(increases)
        asked = [(g, middle) for g, known in enumerate(increases) for middle in _between(known, most)]
    return [monotone(known, len(group.levels)) for known, group in zip(increases, space.groups, strict=True)]


def _scale(increases: Sequence[Mapping[int, float]]) -> float:
    """What the groups lose at the deepest level that could be scored, in the median of those that lose anything."""
    deepest = [max(value for value in known.values() if math.isfinite(value)) for known in increases]
    return median([value for value in deepest if value > 0] or [0.0])


def _between(known: Mapping[int, float], most: float) -> list[int]:
    """The levels to score next, each halfway between two that are known; losses above `most` are not told apart."""
    found, levels = [], sorted(known)
    for low, high in pairwise(levels):
        if not math.isfinite(known[low]):
            break
        rise = math.sqrt(min(known[high], most)) - math.sqrt(min(known[low], most))
        if high - low > 1 and (rise > RESOLUTION * math.sqrt(most) or not math.isfinite(known[high])):
            found.append((low + high) // 2)
    return found


def monotone(points: Mapping[int, float], count: int) -> Floats:
    """Loss increases at some levels [L] -> at all, rising; levels from the first that failed on are infinite."""
    known = sorted(points)
    broken = next((i for i in known if not math.isfinite(points[i])), count)
    finite = [i for i in known if i < broken]
    row = np.full(count, math.inf)
    rising = np.maximum(isotonic_regression([points[i] for i in finite]).x, 0.0)
    rising[0] = 0.0
    if len(finite) == 1:
        row[finite[0]] = 0.0
    else:
        inside = np.arange(finite[-1] + 1)
        row[inside] = PchipInterpolator(finite, rising)(inside)
    return row


def alone(space: PruningSpace, cell: tuple[int, int]) -> Levels:
    """The levels [G] at which one group is cut and no other."""
    return tuple(cell[1] if g == cell[0] else 0 for g in range(len(space.groups)))
