from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


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
