"""Every counting meter under the published contract, and the contract under its own fakes."""

from __future__ import annotations

from typing import Any

import pytest

from autoprune.meters.counts import COUNTED
from autoprune.meters.energy import ModelledEnergy
from autoprune.testing import AlwaysTheSame, ForgetsTheUnit, MeterContract, TrainsWhileMeasuring

for _name, _meter in {**COUNTED, "energy_mj": ModelledEnergy}.items():
    globals()[f"Test{_name.title()}"] = type(
        f"Test{_name.title()}", (MeterContract,), {"make": lambda self, meter=_meter: meter()}
    )


@pytest.mark.parametrize(
    ("fake", "rule"),
    [
        (ForgetsTheUnit, "test_a_value_with_its_unit_and_interval"),
        (AlwaysTheSame, "test_a_smaller_network_costs_less"),
        (TrainsWhileMeasuring, "test_nothing_is_touched"),
    ],
)
def test_the_contract_rejects_its_fakes(fake: Any, rule: str) -> None:
    broken = type("Broken", (MeterContract,), {"make": lambda self: fake()})()
    with pytest.raises(AssertionError):
        getattr(broken, rule)()
