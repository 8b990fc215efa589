"""What does a whole search gain? python experiments/benchmarks/searches.py

`strategy=sensitivity` under flops_50pct on the shipped task, three seeds: as it is by default, and with a grid on all
images whose candidates run alone and finalists that get all of their fine-tune. Seconds of searching (sweep,
refinement, finalists; not the final fine-tune, which is the same) and accuracy on the test split. Rows go to
results/searches.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

import autoprune
from autoprune.evaluate import Scoring
from autoprune.tasks.fashion_mnist_resnet20 import make_task

FILE = Path(__file__).parent / "results" / "searches.json"
WAYS = {"default": ({}, True), "grid, alone": ({"sweep": "grid", "brief": 1.0}, False)}


def main() -> None:
    torch.set_num_threads(1)
    task = make_task(data="shipped")
    rows = []
    for seed in range(3):
        for way, (settings, shared) in WAYS.items():
            found = autoprune.search(
                task,
                budget="flops_50pct",
                strategy={"_target_": "autoprune.strategies.sensitivity.Sensitivity", **settings},
                scoring=Scoring(shared_prefix=shared),
                seed=seed,
            )
            short = [t for t in found.trials if t.candidate.recovery == "short" and not t.cached]
            rows.append(
                {
                    "seed": seed,
                    "way": way,
                    "met": found.met,
                    "trials": len(found.trials),
                    "searching_s": round(found.seconds_searching, 1),
                    "fine_tuning_s": round(sum(t.seconds for t in short), 1),
                    "test": round(found.scores.test_recovered, 4),
                    "test_dense": round(found.scores.test_dense, 4),
                }
            )
            print(rows[-1], flush=True)
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way]
        mean = {key: round(statistics.mean(float(str(r[key])) for r in mine), 4) for key in ("searching_s", "test")}
        print(way, mean)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
