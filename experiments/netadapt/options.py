"""NetAdapt's options beside the paper's own way: python experiments/netadapt/options.py [seeds]

Searches the default task under flops_50pct, a counted budget, so that options alone make the difference, and fine-tunes
each answer for one epoch; short fine-tunes are a tenth of one. Rows go to options.csv; a row that is there is not made
again. Seconds are of searches that share no cache.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import autoprune
from autoprune.evaluate import Scoring
from autoprune.recover import FineTune
from autoprune.tasks import fashion_mnist_resnet20

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append, rows

FILE = Path(__file__).parent / "options.csv"
SCORING = Scoring(short=FineTune(epochs=0.1))
NETADAPT = {"_target_": "autoprune.strategies.netadapt.NetAdapt"}
OPTIONS: dict[str, str | dict[str, Any]] = {
    "uniform": "uniform",
    "sensitivity": "sensitivity",
    "the paper's way: start=dense, screen=0, rule=accuracy": {
        **NETADAPT,
        "start": "dense",
        "screen": 0,
        "rule": "accuracy",
    },
    "start=dense": {**NETADAPT, "start": "dense"},
    "start=dense, rule=accuracy": {**NETADAPT, "start": "dense", "rule": "accuracy"},
    "start=dense, screen=1": {**NETADAPT, "start": "dense", "screen": 1},
    "start=dense, rule=ratio": {**NETADAPT, "start": "dense", "rule": "ratio"},
    "start=dense, larger steps early: initial=0.1 decay=0.9": {
        **NETADAPT,
        "start": "dense",
        "initial": 0.1,
        "decay": 0.9,
    },
    "default: start=allocation, start_at=0.8": NETADAPT,
    "start=allocation, start_at=0.5": {**NETADAPT, "start_at": 0.5},
}


def main(seeds: int) -> None:
    task = fashion_mnist_resnet20.make_task(data="shipped")
    for seed in range(seeds):
        for option, strategy in OPTIONS.items():
            if any(row["option"] == option and int(row["seed"]) == seed for row in rows(FILE)):
                continue
            began = time.time()
            result = autoprune.search(
                task, budget="flops_50pct", strategy=strategy, seed=seed, scoring=SCORING, final=FineTune(epochs=1)
            )
            values: dict[str, Any] = {"seed": seed, "option": option, "rounds": len(result.rounds)}
            values |= {"fine_tuned": sum(t.candidate.recovery == "short" for t in result.trials)}
            values |= {"seconds": round(time.time() - began), "macs": result.measured["macs"].value}
            values |= {"score": result.scores.pruned, "test": result.scores.test_recovered, "met": result.met}
            append(FILE, values)
    print("\n".join(table(rows(FILE))))


def table(found: list[dict[str, str]]) -> list[str]:
    """Means over the seeds that are there; test accuracy also of each seed."""
    lines = [
        "| | rounds | short fine-tunes | seconds | score of the answer | test, 1 epoch | each seed |",
        "|---" * 7 + "|",
    ]
    for option in OPTIONS:
        own = [row for row in found if row["option"] == option]
        if own:
            mean = {k: statistics.mean(float(r[k]) for r in own) for k in ("rounds", "fine_tuned", "seconds")}
            scores, tests = ([100 * float(r[k]) for r in own] for k in ("score", "test"))
            cells = [f"{mean['rounds']:.0f}", f"{mean['fine_tuned']:.0f}", f"{mean['seconds']:.0f}"]
            cells += [f"{statistics.mean(scores):.2f}", f"{statistics.mean(tests):.2f}"]
            lines.append(f"| {option} | {' | '.join(cells)} | {', '.join(f'{t:.2f}' for t in tests)} |")
    return lines


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
