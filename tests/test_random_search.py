from __future__ import annotations

from collections import Counter
from itertools import islice, product
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from autoprune.bound import Bound
from autoprune.core import InputError
from autoprune.strategies.random_search import RandomSearch, surface
from autoprune.testing import World, answer


@pytest.mark.slow
def test_every_choice_on_the_surface_is_drawn_as_often() -> None:
    world = World(0, groups=4, levels=5)
    bound = Bound(world.space, world.budgets, world.costs)
    on_it = [levels for levels in product(range(5), repeat=4) if 0.8 <= bound.use(levels) <= 1]
    assert len(on_it) > 30
    drawn = Counter(islice(surface(bound, np.random.default_rng(0), band=0.2, thin=5), 100 * len(on_it)))
    assert set(drawn) == set(on_it)
    assert chisquare([drawn[levels] for levels in on_it]).pvalue > 0.001


def test_draws_that_are_cut_until_they_fit_would_not_be() -> None:
    """The test above can fail: by the bound alone some choices come far more often than others."""
    world, rng = World(0, groups=4, levels=5), np.random.default_rng(0)
    bound = Bound(world.space, world.budgets, world.costs, least=0.8)
    on_it = [levels for levels in product(range(5), repeat=4) if 0.8 <= bound.use(levels) <= 1]
    drawn = Counter(bound.walked(rng.integers(0, 5, 4).tolist()) for _ in range(100 * len(on_it)))
    assert chisquare([drawn[n] for n in on_it], sum_check=False).pvalue < 1e-6


def test_candidates_are_different_and_go_out_together() -> None:
    world = World(1)
    strategy = RandomSearch(world.space, world.budgets, world.costs, episodes=50)
    batch = strategy.ask()
    assert len({c.ratios for c in batch}) == len(batch) <= 50
    assert len(batch) > 40
    uses = [world.costs["macs"].predict(c.ratios) / world.budgets[0].limit for c in batch]
    assert 0.95 <= min(uses) <= max(uses) <= 1


def test_a_surface_of_few_choices_is_drawn_whole() -> None:
    world = World(0, groups=2, levels=3)
    trials = world.play(RandomSearch(world.space, world.budgets, world.costs, episodes=200, band=1.0))
    scored = {t.candidate.ratios for t in trials if t.candidate.recovery == "probe"}
    inside = [n for n in product(range(3), repeat=2) if Bound(world.space, world.budgets, world.costs).use(n) <= 1]
    assert len(scored) == len(inside)


@pytest.mark.slow
def test_more_draws_find_better() -> None:
    few, many = (
        np.mean([answer(World(s).play(_random(World(s), episodes=n))).loss for s in range(5)]) for n in (10, 300)
    )
    assert many < few


def _random(world: World, **settings: Any) -> RandomSearch:
    return RandomSearch(world.space, world.budgets, world.costs, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 0}, "random: episodes >= 1 must hold, got episodes=0"),
        ({"band": 0.0}, "random: 0 < band <= 1 must hold, got band=0.0"),
        ({"thin": 0}, "random: thin >= 1 must hold, got thin=0"),
        ({"attempts": 0}, "random: attempts >= 1 must hold, got attempts=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _random(World(0), **settings)
