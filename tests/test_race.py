from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from autoprune import race
from autoprune.core import Candidate, Trial
from autoprune.race import By, raced, spread

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
        return Trial(
            number=0,
            candidate=candidate,
            score=float(right.mean()),
            loss=1 - float(right.mean()),
            parts=tuple((part, 1 / 20 - part) for part in parts),
        )


def _best(trials: Sequence[Trial]) -> Trial:
    return max((t for t in trials if t.candidate.fidelity == 1 and not t.error), key=lambda t: t.score)


@pytest.mark.parametrize("by", ["score", "loss"])
def test_the_best_of_many_is_found_on_few_of_the_images(by: By) -> None:
    regrets, shares = [], []
    for seed in range(10):
        track = Track(np.random.default_rng(seed).uniform(0.3, 0.9, 120).tolist(), seed)
        best = _best(track.run(keep=3, by=by))
        regrets.append(max(map(track.score, track.candidates)) - track.score(best.candidate))
        shares.append(track.seen / IMAGES / 120)
    assert np.mean(shares) <= 0.12
    assert np.mean(regrets) <= 0.001


def test_of_near_ties_so_many_go_on_as_a_rung_takes() -> None:
    regrets, shares = [], []
    for seed in range(10):
        track = Track(np.random.default_rng(seed).uniform(0.85, 0.86, 120).tolist(), seed)
        best = _best(track.run(keep=3, error=0.01))
        regrets.append(max(map(track.score, track.candidates)) - track.score(best.candidate))
        shares.append(track.seen / IMAGES / 120)
    assert max(shares) <= 0.4
    assert np.mean(regrets) <= 0.002


@pytest.mark.parametrize("error", [0.02, 0.2])
@pytest.mark.parametrize("by", ["score", "loss"])
def test_as_good_ones_are_dropped_as_often_as_the_error_level_says(
    by: By, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time, of which one is kept: the other is dropped where it seems to be worse, which it is not."""
    monkeypatch.setattr(race, "RUNGS", {0.15: 1.0, 1.0: 1.0})
    count = 400
    raced = [Track([0.8, 0.8], seed).run(keep=1, by=by, error=error) for seed in range(count)]
    dropped = sum(min(trial.candidate.fidelity for trial in trials) < 1 for trials in raced)
    assert 0.2 * 2 * error * count <= dropped <= 1.3 * 2 * error * count, "either of the two may seem to be worse"


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


def test_where_all_fail_nothing_more_is_asked() -> None:
    track = Track([0.9, 0.5], 0)
    track.fails = lambda candidate: True
    assert all(t.error for t in track.run(keep=1))
    assert len(track.asked) == 1


def test_the_deviation_of_a_sum_is_estimated_without_bias() -> None:
    rng = np.random.default_rng(0)
    for count in (20, 21):
        parts = rng.normal(0, 1, (4000, count))
        estimates = [spread(each) for each in parts]
        assert np.mean([d**2 for d, _ in estimates]) == pytest.approx(count, rel=0.05)
        assert estimates[0][1] == 10
    assert spread(np.array([1.0])) == (0.0, 0)
