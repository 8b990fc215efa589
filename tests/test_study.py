from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autoprune.study import check_storage


def test_searches_may_make_the_same_storage_at_once(tmp_path: Path) -> None:
    """Three of four would lose Optuna's race for its tables."""
    together = threading.Barrier(4)

    def opened(number: int) -> None:
        together.wait()
        check_storage(f"sqlite:///{tmp_path / 'studies.db'}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(opened, range(4)))
