"""Published contracts: subclass one, give it your component, and pytest runs it.

    class TestMyStrategy(autoprune.testing.StrategyContract):
        def make(self, space, budgets, costs, *, seed):
            return MyStrategy(space, budgets, costs, seed=seed)

Every contract ships with fakes that break one rule each; a contract that does not reject its fakes is worth nothing.
"""

from __future__ import annotations

from autoprune.testing.criteria import (
    CriterionContract,
    by_position,
    moves_weights,
    nan_for_constant_inputs,
    nan_for_dead_units,
    one_too_few,
)
from autoprune.testing.meters import AlwaysTheSame, ForgetsTheUnit, MeterContract, TrainsWhileMeasuring
from autoprune.testing.strategies import (
    AsksOutside,
    DrawsGlobally,
    HoldsTheFirstBudget,
    IsItsOwnParent,
    NoBetterThanUniform,
    StrategyContract,
    TakesFailuresForFree,
    TrustsPredictions,
)
from autoprune.testing.tasks import TaskContract, leaking_task, restless_task
from autoprune.testing.worlds import World, answer

__all__ = [
    "AlwaysTheSame",
    "AsksOutside",
    "CriterionContract",
    "DrawsGlobally",
    "ForgetsTheUnit",
    "HoldsTheFirstBudget",
    "IsItsOwnParent",
    "MeterContract",
    "NoBetterThanUniform",
    "StrategyContract",
    "TakesFailuresForFree",
    "TaskContract",
    "TrainsWhileMeasuring",
    "TrustsPredictions",
    "World",
    "answer",
    "by_position",
    "leaking_task",
    "moves_weights",
    "nan_for_constant_inputs",
    "nan_for_dead_units",
    "one_too_few",
    "restless_task",
]
