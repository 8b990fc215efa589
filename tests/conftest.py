from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores, and torch is not here yet
sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


MEASURING = ("test_latency", "test_profile", "test_measured_search", "test_remote", "test_resident", "test_energy")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What measures runs in one process, one after the other."""
    for item in items:
        if item.path.stem in MEASURING:
            item.add_marker(pytest.mark.xdist_group("measuring"))
            item.add_marker(pytest.mark.measuring)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test writes where it may."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def unheeding() -> Iterator[None]:
    """Others on this machine count for nothing: what is measured beside them is disturbed and would not be kept, and
    some tests are of what follows from what is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoprune.meters.latency.DISTURBED", math.inf)
        yield
