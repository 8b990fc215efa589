"""The best few of many candidates, on as few images as tell them apart.

All candidates are scored on a few images, the same for each. Those that may be the best, but for a stated error, are
scored on more, and so on to all images. How likely each is the best follows from what the parts of the images say: what
two parts that are alike differ by, multiplied by random numbers (the wild bootstrap; Wu, Annals of Statistics 14,
1986), moves all candidates at once, so that comparisons are paired, images being hard for all. It is a race (Maron and
Moore, "Hoeffding Races", NIPS 1993) whose survivors are a model confidence set (Hansen, Lunde and Nason, Econometrica
79, 2011). Where more are too close to be told apart than a rung takes, the better ones go on: any of them will do about
as well.

Letters: M candidates, K parts of the images.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from autoprune.core import Candidate, Trial

if TYPE_CHECKING:
    from autoprune.core import Floats

By = Literal["score", "loss", "either"]
WAYS: tuple[By, ...] = ("score", "loss", "either")
# fraction of the images -> of the candidates, how many are scored on them at most
RUNGS = {0.04: 1.0, 0.15: 0.4, 1.0: 0.15}
DRAWS = 1000


def raced(
    candidates: Sequence[Candidate], *, keep: int, by: By = "loss", error: float = 0.05, seed: int = 0
) -> Generator[list[Candidate], Sequence[Trial], list[Trial]]:
    """The last trial of each candidate [M]: of full fidelity those of the best, `keep` of them unless more fail.

    by: what they are compared by; losses tell networks apart that answer alike, and those stay that may be the best by
    "either" where the one of best score is asked for among networks that are nearly as good. error: in (0, 1), how
    likely the best by that is dropped at a rung for what its images say; more may be dropped where more are left than a
    rung takes. 0 scores all on all images.
    """
    last: dict[int, Trial] = {}
    racing = list(range(len(candidates)))
    for fidelity, share in RUNGS.items() if error and len(candidates) > keep else [(1.0, 1.0)]:
        racing = racing[: max(keep, math.ceil(share * len(candidates)))]
        trials = yield [replace(candidates[i], fidelity=fidelity) for i in racing]
        last |= zip(racing, trials, strict=True)
        if fidelity < 1:
            whole = {i: t for i, t in zip(racing, trials, strict=True) if t.error is None}
            racing = _ahead(whole, keep, by, error, seed) or racing  # all may fail for the images being few
    return [last[i] for i in range(len(candidates))]


def _ahead(trials: Mapping[int, Trial], keep: int, by: By, error: float, seed: int) -> list[int]:
    """The candidates that may be the best, and `keep` of them at least, best first."""
    ranked = sorted(trials, key=lambda i: (_badness(trials[i], by), trials[i].loss))
    if len(ranked) <= keep or not all(trials[i].parts for i in ranked):
        return ranked
    parts = np.asarray([trials[i].parts for i in ranked])
    unseen = 1 - trials[ranked[0]].candidate.fidelity  # of so many images, what is seen already is certain
    likelies = []
    staying = {*range(keep)}
    for column, sign in [(0, -1.0)] * (by != "loss") + [(1, 1.0)] * (by != "score"):
        likely = chances(sign * parts[:, :, column], math.sqrt(unseen), seed)
        order = np.argsort(-likely, kind="stable")
        enough = int(np.searchsorted(np.cumsum(likely[order]), 1 - error)) + 1
        staying |= {*order[:enough].tolist()}
        likelies.append(likely)
    places = [place for place in range(len(ranked)) if place in staying]
    if by == "either":
        places.sort(key=lambda place: -max(likely[place] for likely in likelies))
    return [ranked[place] for place in places]


def _badness(trial: Trial, by: By) -> float:
    return -trial.score if by == "score" else trial.loss


def chances(parts: Floats, scale: float, seed: int) -> Floats:
    """How likely each candidate's sum of parts [M, K] is the least [M]. Two parts in a row are alike, so that what they
    differ by is chance; scale: what that is multiplied by."""
    pairs = parts.shape[1] // 2
    if not pairs:
        return np.full(len(parts), 1 / len(parts))
    halves = parts[:, : 2 * pairs].reshape(len(parts), pairs, 2)
    differences = (halves[..., 0] - halves[..., 1]) * math.sqrt(parts.shape[1] / (2 * pairs))
    rng = np.random.default_rng(seed)
    student = rng.standard_normal((DRAWS, pairs)) * np.sqrt(pairs / rng.chisquare(pairs, (DRAWS, 1)))
    sums = parts.sum(1) + scale * (student @ differences.T)
    return np.asarray(np.bincount(sums.argmin(1), minlength=len(parts)) / DRAWS, dtype=np.float64)
