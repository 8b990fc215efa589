from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from autoprune import race
from autoprune.core import Candidate, Trial
from autoprune.race import By, chances, raced

IMAGES = 1000


class Track:
    """Candidates [M] that answer each of the images right or wrong, and races between them."""

    def __init__(self, accuracies: Sequence[float], seed: int, noise: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        difficulty = rng.uniform(0, 1, IMAGES)  # the same image is hard for all
        own = rng.normal(0, noise, (len(accuracies), IMAGES))
        each = zip(difficulty + own, accuracies, strict=True)
        self.right = np.stack([hardness <= np.quantile(hardness, accuracy) for hardness, accuracy in each]).astype(
            float
        )
        self.order = rng.permutation(IMAGES)
        self.candidates = [Candidate(ratios=(i / 1e3,)) for i in range(len(accuracies))]
        self.seen = 0
        self.asked: list[list[Candidate]] = []
        self.fails: Callable[[Candidate], bool] = lambda candidate: False
        self.handicap = np.zeros(len(accuracies))  # of each candidate's loss

    def run(self, **settings: Any) -> list[Trial]:
        running = raced(self.candidates, **settings)
        batch = next(running)
        while True:
            self.asked.append(batch)
            try:
                batch = running.send([self._trial(candidate) for candidate in batch])
            except StopIteration as end:
                return list(end.value)

    def score(self, candidate: Candidate) -> float:
        return float(self.right[round(1e3 * candidate.ratios[0])].mean())

    def _trial(self, candidate: Candidate) -> Trial:
        if self.fails(candidate):
            return Trial(number=0, candidate=candidate, error="RuntimeError: it fails")
        images = self.order[: round(candidate.fidelity * IMAGES)]
        self.seen += len(images)
        right = self.right[round(1e3 * candidate.ratios[0])][images]
        parts = [float(part.sum()) / len(images) for part in np.array_split(right, 20)]
        more = float(self.handicap[round(1e3 * candidate.ratios[0])])
        return Trial(
            number=0,
            candidate=candidate,
            score=float(right.mean()),
            loss=1 - float(right.mean()) + more,
            parts=tuple((part, (1 + more) / 20 - part) for part in parts),
        )


def _best(trials: Sequence[Trial]) -> Trial:
    return max((t for t in trials if t.candidate.fidelity == 1 and not t.error), key=lambda t: t.score)


@pytest.mark.parametrize("by", ["score", "loss", "either"])
def test_the_best_of_many_is_found_on_few_of_the_images(by: By) -> None:
    regrets, shares = [], []
    for seed in range(10):
        track = Track(np.random.default_rng(seed).uniform(0.3, 0.9, 120).tolist(), seed)
        best = _best(track.run(keep=3, by=by))
        regrets.append(max(map(track.score, track.candidates)) - track.score(best.candidate))
        shares.append(track.seen / IMAGES / 120)
    assert np.mean(shares) <= 0.1
    assert np.mean(regrets) <= 0.002


def test_the_best_by_score_stays_though_its_loss_is_none_of_the_least() -> None:
    found = {}
    for by in ("loss", "either"):
        track = Track([0.8] * 59 + [0.9], seed=0)
        track.handicap[-1] = 0.2
        trials = track.run(keep=2, by=by)
        found[by] = trials[-1].candidate.fidelity
        assert 2 <= sum(t.candidate.fidelity == 1 for t in trials) <= math.ceil(0.15 * 60)
    assert found == {"loss": min(race.RUNGS), "either": 1.0}


def test_of_near_ties_so_many_go_on_as_a_rung_takes() -> None:
    regrets, shares = [], []
    for seed in range(10):
        track = Track(np.random.default_rng(seed).uniform(0.85, 0.86, 120).tolist(), seed)
        best = _best(track.run(keep=3))
        regrets.append(max(map(track.score, track.candidates)) - track.score(best.candidate))
        shares.append(track.seen / IMAGES / 120)
    assert max(shares) <= 0.4
    assert np.mean(regrets) <= 0.002


@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize("by", ["score", "loss"])
def test_the_best_is_dropped_as_seldom_as_the_error_level_says(
    by: By, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "RUNGS", {0.15: 1.0, 1.0: 1.0})
    count, dropped, sharing = 200, 0, 0
    for seed in range(count):
        track = Track(np.random.default_rng(seed).uniform(0.6, 0.9, 20).tolist(), seed)
        trials = track.run(keep=1, by=by, error=error, seed=seed)
        best = max(range(20), key=lambda i: track.score(track.candidates[i]))
        dropped += trials[best].candidate.fidelity < 1
        sharing += len(track.asked[-1])
    assert dropped <= error * count + 3 * math.sqrt(count * error * (1 - error))
    assert sharing <= 4 * count, "of twenty, few may be the best"


def test_chances_are_those_of_paired_differences() -> None:
    """What all candidates have in common tells nothing about which is the best."""
    rng = np.random.default_rng(0)
    common, own = rng.normal(0, 1, 400), rng.normal(0, 0.01, (3, 400))
    parts = own + common + np.array([[0.0], [0.0], [0.002]])
    first, second, third = chances(parts, 1.0, seed=0)
    assert third < 0.05 < min(first, second)
    gap = float((parts[1] - parts[0]).sum())
    deviation = 0.01 * math.sqrt(2 * 400)
    assert first / (first + second) == pytest.approx(float(norm.cdf(gap / deviation)), abs=0.1)
    assert chances(parts, 0.0, seed=0).tolist() == [float(i == parts.sum(1).argmin()) for i in range(3)]


def test_the_best_few_are_scored_on_all_images() -> None:
    track = Track([0.3 + 0.005 * i for i in range(120)], 0)
    trials = track.run(keep=3)
    full = [i for i, t in enumerate(trials) if t.candidate.fidelity == 1]
    assert len(full) >= 3
    assert {117, 118, 119} & set(full)
    assert [t.candidate.ratios for t in trials] == [c.ratios for c in track.candidates]
    last = [t.candidate.fidelity for t in trials]
    assert np.mean(last[:40]) < np.mean(last[80:])


def test_without_an_error_level_all_are_scored_on_all_images() -> None:
    track = Track([0.5, 0.9, 0.7, 0.6], 0)
    trials = track.run(keep=1, error=0)
    assert track.asked == [track.candidates]
    assert [t.candidate for t in trials] == track.candidates


def test_no_more_than_are_kept_need_not_race() -> None:
    track = Track([0.5, 0.9], 0)
    track.run(keep=2)
    assert track.asked == [track.candidates]


def test_what_fails_is_out_and_the_others_race_on() -> None:
    track = Track([0.9, 0.5, 0.8, 0.4], 0)
    track.fails = lambda candidate: candidate.ratios == (0.0,)
    trials = track.run(keep=1)
    assert trials[0].error
    assert _best(trials).candidate.ratios == (0.002,)
    assert [len(batch) for batch in track.asked[1:]] == [1] * (len(track.asked) - 1)


def test_where_all_fail_on_few_images_some_are_scored_on_all() -> None:
    """A metric may need more images than a rung has."""
    track = Track([0.9, 0.5, 0.7], 0)
    track.fails = lambda candidate: candidate.fidelity < 1
    assert _best(track.run(keep=1)).candidate.fidelity == 1
    track.fails = lambda candidate: True
    assert all(t.error for t in track.run(keep=1))


def test_trials_that_do_not_tell_their_parts_are_not_dropped_for_them() -> None:
    running = raced([Candidate(ratios=(i / 10,)) for i in range(5)], keep=1)
    batch = next(running)
    batch = running.send([Trial(number=0, candidate=c, score=0.5, loss=c.ratios[0]) for c in batch])
    assert [c.ratios for c in batch] == [(0.0,), (0.1,)], "as many as the rung takes"
