"""Every strategy YAML under the published contract, and the contract under its own fakes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from autoprune import components
from autoprune.testing import (
    AsksOutside,
    DrawsGlobally,
    HoldsTheFirstBudget,
    IsItsOwnParent,
    NoBetterThanUniform,
    StrategyContract,
    TakesFailuresForFree,
    TrustsPredictions,
    World,
)

BASELINES = {"global", "uniform"}
SMALLER: dict[str, dict[str, Any]] = {  # the rules hold for any number of candidates; these take seconds
    "amc": {"episodes": 24, "warm_up": 16, "hidden": [16, 16]},
    "amc_paper": {"episodes": 24, "warm_up": 16, "hidden": [16, 16]},
    "optuna": {"episodes": 40},
    "random": {"episodes": 60},
}


def values_of(name: str) -> dict[str, Any]:
    return components.spec("strategy", name) | SMALLER.get(name, {})


def contract(name: str) -> type[StrategyContract]:
    build = components.bind(values_of(name), "strategy", (), (), {}, seed=0)

    def make(self: Any, space: Any, budgets: Any, costs: Any, *, seed: int) -> Any:
        return build(space, budgets, costs, seed=seed)

    return type(f"Test{name.title()}", (StrategyContract,), {"make": make, "baseline": name in BASELINES})


VARIANTS = {"amc_paper"}  # the same strategy with other settings: in full among the long tests
for _name in components.names("strategy"):
    _contract = contract(_name)
    globals()[f"Test{_name.title()}"] = (
        pytest.mark.slow(pytest.mark.long(_contract)) if _name in VARIANTS else _contract
    )


@pytest.mark.parametrize(
    ("fake", "rule"),
    [
        (AsksOutside, "test_candidates_lie_in_the_space"),
        (DrawsGlobally, "test_same_seed_same_conversation"),
        (DrawsGlobally, "test_replay_from_any_cut_gives_the_same_future"),
        (DrawsGlobally, "test_global_random_state_is_untouched"),
        (TrustsPredictions, "test_the_budget_is_reached"),
        (TrustsPredictions, "test_an_unreachable_budget_ends_with_the_closest"),
        (NoBetterThanUniform, "test_beats_uniform_on_nine_of_ten_seeds"),
        (HoldsTheFirstBudget, "test_two_budgets_are_reached"),
        (IsItsOwnParent, "test_parents_are_earlier_trials_that_succeeded"),
        (TakesFailuresForFree, "test_failed_regions_are_left"),
    ],
)
def test_the_contract_rejects_its_fakes(fake: Any, rule: str) -> None:
    def make(self: Any, space: Any, budgets: Any, costs: Any, *, seed: int) -> Any:
        return fake(space, budgets, costs, seed=seed)

    broken = type("Broken", (StrategyContract,), {"make": make})()
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        getattr(broken, rule)()


PLAYED = f"""
import json
from autoprune import components
from autoprune.testing import World
found = {{}}
for name, values in { ({name: values_of(name) for name in components.names("strategy")})!r}.items():
    world = World(11)
    build = components.bind(values, "strategy", (), (), {{}}, seed=3)
    trials = world.play(build(world.space, world.budgets, world.costs, seed=3))
    found[name] = [t.candidate.ratios for t in trials]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def there() -> dict[str, list[list[float]]]:
    """What every strategy asked in another process."""
    played = subprocess.run([sys.executable, "-c", PLAYED], capture_output=True, text=True, check=True)
    return dict(json.loads(played.stdout))


@pytest.mark.slow
@pytest.mark.xdist_group("another process")
@pytest.mark.parametrize("name", components.names("strategy"))
def test_the_same_conversation_in_another_process(name: str, there: dict[str, list[list[float]]]) -> None:
    build = components.bind(values_of(name), "strategy", (), (), {}, seed=3)
    world = World(11)
    here = world.play(build(world.space, world.budgets, world.costs, seed=3))
    assert there[name] == [list(t.candidate.ratios) for t in here]
