"""Every criterion YAML under the published contract, and the contract under its own fakes."""

from __future__ import annotations

from typing import Any

import pytest

from autoprune import components
from autoprune.testing import (
    CriterionContract,
    by_position,
    moves_weights,
    nan_for_constant_inputs,
    nan_for_dead_units,
    one_too_few,
)


def contract(name: str) -> type[CriterionContract]:
    criterion = components.bind(
        components.spec("criterion", name), "criterion", None, (), batches=(), loss=None, seed=0
    )
    members = {"make": lambda self: criterion, "equivariant": name != "random"}
    return type(f"Test{name.title()}", (CriterionContract,), members)


for _name in components.names("criterion"):
    globals()[f"Test{_name.title()}"] = contract(_name)


@pytest.mark.parametrize(
    ("fake", "rule"),
    [
        (nan_for_dead_units, "test_dead_units_are_finite_too"),
        (nan_for_constant_inputs, "test_constant_inputs_are_finite_too"),
        (one_too_few, "test_one_finite_score_a_unit"),
        (by_position, "test_scores_follow_their_units"),
        (moves_weights, "test_same_twice_and_nothing_touched"),
    ],
)
def test_the_contract_rejects_its_fakes(fake: Any, rule: str) -> None:
    broken = type("Broken", (CriterionContract,), {"make": lambda self: fake})()
    with pytest.raises(AssertionError):
        getattr(broken, rule)()
