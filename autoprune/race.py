"""The best few of many candidates, on as few images as tell them apart.

All candidates are scored on a few images, the same for each. Those that are worse than the best few by more than chance
explains, at a stated error level, have lost; the others are scored on more, and so on to all images. The differences
are paired, part by part of the images, which narrows them as every candidate finds the same images hard (Maron and
Moore, "Hoeffding Races", NIPS 1993; with paired tests Birattari et al., "A Racing Algorithm for Configuring
Metaheuristics", GECCO 2002). Where too many are too close to be told apart, only so many of the better go on as a rung
takes: any of them will do about as well (successive halving; Jamieson and Talwalkar, AISTATS 2016).

Letters: M candidates, K parts.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import stdtrit  # Student's quantile; scipy.stats takes a second to import

from autoprune.core import Candidate, Trial

if TYPE_CHECKING:
    from autoprune.core import Floats

By = Literal["score", "loss"]
# fraction of the images -> of the candidates, how many are scored on them at most
RUNGS = {0.04: 1.0, 0.15: 0.4, 1.0: 0.15}


def raced(
    candidates: Sequence[Candidate], *, keep: int, by: By = "loss", error: float = 0.2
) -> Generator[list[Candidate], Sequence[Trial], list[Trial]]:
    """The last trial of each candidate [M]: of full fidelity those of the best, `keep` of them at least.

    by: what they are compared by; losses tell networks apart that answer alike. error: in (0, 1), how likely one that
    is as good as the last of the best is dropped at a rung; 0 scores all on all images.
    """
    last: dict[int, Trial] = {}
    racing = list(range(len(candidates)))
    for fidelity, share in RUNGS.items() if error and len(candidates) > keep else [(1.0, 1.0)]:
        most = max(keep, math.ceil(share * len(candidates)))
        racing = racing[:most]
        trials = yield [replace(candidates[i], fidelity=fidelity) for i in racing]
        last |= zip(racing, trials, strict=True)
        racing = _ahead({i: t for i, t in zip(racing, trials, strict=True) if t.error is None}, keep, by, error)
        if not racing:
            break
    return [last[i] for i in range(len(candidates))]


def _ahead(trials: dict[int, Trial], keep: int, by: By, error: float) -> list[int]:
    """The candidates that have not lost, best first."""
    ranked = sorted(trials, key=lambda i: (_badness(trials[i], by), trials[i].loss))
    best, others = ranked[:keep], ranked[keep:]
    return [*best, *(i for i in others if not _behind(trials[i], trials[best[-1]], by, error))]


def _badness(trial: Trial, by: By) -> float:
    return -trial.score if by == "score" else trial.loss


def _behind(trial: Trial, other: Trial, by: By, error: float) -> bool:
    """Whether a trial is worse than another on the same images by more than chance explains."""
    if not trial.parts or len(trial.parts) != len(other.parts):
        return False
    each = np.subtract(other.parts, trial.parts)[:, 0] if by == "score" else np.subtract(trial.parts, other.parts)[:, 1]
    deviation, freedom = spread(each)
    unseen = math.sqrt(1 - trial.candidate.fidelity)  # all there is to see is not drawn from anything
    return freedom > 0 and float(each.sum()) > float(stdtrit(freedom, 1 - error)) * deviation * unseen


def spread(parts: Floats) -> tuple[float, int]:
    """The standard deviation of the sum of parts [K], and its degrees of freedom: two in a row are of one kind."""
    count = len(parts) - len(parts) % 2
    halves = parts[:count].reshape(-1, 2)
    return math.sqrt(float(((halves[:, 0] - halves[:, 1]) ** 2).sum()) * len(parts) / max(count, 1)), len(halves)
