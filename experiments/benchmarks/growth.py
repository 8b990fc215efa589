"""What grows with the groups of a network and the trials of a study? python experiments/benchmarks/growth.py

Made-up networks (autoprune.testing.World), whose losses and costs are formulas, so that what is timed is all but the
evaluation: the strategy, the exact allocation, the loop and the SQLite study. First a whole `sensitivity` search over
20 to 200 groups of 10 levels, and one exact allocation alone; then `random` over 20 groups with 100 to 10,000 trials,
recorded, and read back as a resumed search does. Each row comes from a process of its own. Rows go to
results/growth.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.allocate import allocate
from autoprune.loop import search
from autoprune.strategies.random_search import RandomSearch
from autoprune.strategies.sensitivity import Sensitivity
from autoprune.study import Study
from autoprune.testing import World

FILE = Path(__file__).parent / "results" / "growth.json"
GROUPS = (20, 50, 100, 200)
TRIALS = (100, 1000, 10000)


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def recorded(world: World, strategy: Any, folder: str) -> dict[str, Any]:
    """A whole search with a study, and what it takes to go on from its end."""
    place: dict[str, Any] = {"fingerprint": {"world": 0}, "space": world.space, "budgets": world.budgets}
    url = f"sqlite:///{folder}/studies.db"
    with Study(url, "growth", **place) as study:
        before, began = memory_mb(), time.perf_counter()
        trials = search(strategy, world.evaluate, study.record)
        seconds = time.perf_counter() - began
    searching, began = memory_mb() - before, time.perf_counter()
    with Study(url, "growth", **place) as study:
        assert study.trials() == trials
    return {
        "trials": len(trials),
        "ms_a_trial": round(1000 * seconds / len(trials), 2),
        "read_back_ms_a_trial": round(1000 * (time.perf_counter() - began) / len(trials), 3),
        "memory_mb": round(searching),
        "read_back_memory_mb": round(memory_mb() - before),
    }


def of_groups(count: int, folder: str) -> dict[str, Any]:
    world = World(0, groups=count, levels=10)
    rng = np.random.default_rng(0)
    losses = [np.concatenate([[0.0], np.sort(rng.uniform(0, 1, 9))]) for _ in range(count)]
    limits = [(form, world.budgets[0].limit) for form in world.costs["macs"].tables()]
    began = time.perf_counter()
    allocate(losses, limits)
    seconds = time.perf_counter() - began
    row = recorded(world, Sensitivity(world.space, world.budgets, world.costs), folder)
    return {"groups": count, "allocation_s": round(seconds, 2), **row}


def of_trials(count: int, folder: str) -> dict[str, Any]:
    world = World(0, groups=20, levels=10)
    strategy = RandomSearch(world.space, world.budgets, world.costs, episodes=count)
    return {"groups": 20, **recorded(world, strategy, folder)}


def main() -> None:
    rows: dict[str, list[Any]] = {"groups": [], "trials": []}
    for what, counts in {"groups": GROUPS, "trials": TRIALS}.items():
        for count in counts:
            words = [sys.executable, __file__, what, str(count)]
            said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[what].append(json.loads(said.splitlines()[-1]))
            print(rows[what][-1], flush=True)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        with tempfile.TemporaryDirectory() as place:
            made = (of_groups if sys.argv[1] == "groups" else of_trials)(int(sys.argv[2]), place)
        print(json.dumps(made))
