"""Which units go, and how the network heals: what matters? python experiments/criteria/recoveries.py DATA [PROCESSES]

Every criterion of conf/criterion with every recovery, at one fixed set of ratios: ResNet-20 of CIFAR-10 at half its
FLOPs, the same ratio in all groups. Printed is the accuracy on the 5000 images of the search split, the mean over three
seeds (which training batches are seen, in which order; what `random` draws) and its 95 % interval. DATA: CIFAR-10 as an
npz or as the folder of the official binary files. Rows go to recoveries.csv; those that are there are not made again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append, rows

from autoprune import components
from autoprune.allocate import evenly
from autoprune.borrowing import first, seeded
from autoprune.compare import with_half_width
from autoprune.core import Candidate
from autoprune.costs import counted, counted_models
from autoprune.evaluate import Evaluator, Scoring
from autoprune.prune import ranking
from autoprune.recipe import Recipe
from autoprune.space import trace
from autoprune.tasks.cifar10_resnet20 import make_task

FILE = Path(__file__).with_name("recoveries.csv")
SEEDS = (0, 1, 2)
IMAGES, BATCHES = 5000, 4
STEPS = {"steps": 100}
RECOVERIES: dict[str, Sequence[Any]] = {
    "none": (),
    "bn_recalibrate": ("bn_recalibrate",),
    "reconstruct": ("reconstruct",),
    "finetune": ({"finetune": STEPS},),
    "distill": ({"distill": STEPS},),
}


@cache
def evaluator(data: str, seed: int) -> tuple[Evaluator, Candidate]:
    """What scores, and the candidate at half the FLOPs."""
    torch.set_num_threads(1)
    task = make_task(data=data)
    traced = trace(task.model, task.inputs)
    costs = counted_models(task, traced, counted(task.model, task.inputs))
    macs, space = costs["macs"], traced.space
    half = macs.predict(space.dense()) / 2
    levels = evenly(space, lambda found: macs.predict(space.ratios(found)) <= half)
    settings: dict[str, Any] = {"budgets": (), "costs": {}, "meters": {}, "cache": None, "seed": seed}
    ours = Evaluator(task, traced, (), scoring=Scoring(images=IMAGES, recalibration=BATCHES), **settings)
    return ours, Candidate(ratios=space.ratios(levels), recovery="short")


def scored(data: str, criterion: str, seed: int, recoveries: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each recovery."""
    ours, candidate = evaluator(data, seed)
    task, healer = ours.task, ours.healer
    values = components.chosen("criterion", criterion)
    rank = components.bind(values, "criterion", task.model, (), batches=(), loss=None, seed=0)
    with seeded(seed):
        batches = first(task.train, BATCHES)
    healer.importance = ranking(ours.traced, rank, batches=batches, loss=task.loss, seed=seed)(task.model)
    for name in recoveries:
        began = time.process_time()
        healer.care = replace(healer.care, recipe=Recipe.of("table", RECOVERIES[name], ours.scoring.short))
        accuracy = ours.scored(ours.recovered(candidate)).score
        seconds = round(time.process_time() - began, 1)
        yield {"criterion": criterion, "recovery": name, "seed": seed, "accuracy": accuracy, "seconds": seconds}


def job(asked: tuple[str, str, int, tuple[str, ...]]) -> list[dict[str, Any]]:
    return list(scored(*asked))


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table in percent, a line for each criterion."""
    lines = ["| criterion | " + " | ".join(RECOVERIES) + " |", "|---" * (1 + len(RECOVERIES)) + "|"]
    for criterion in dict.fromkeys(row["criterion"] for row in found):
        cells = []
        for name in RECOVERIES:
            own = [row for row in found if (row["criterion"], row["recovery"]) == (criterion, name)]
            cells.append(with_half_width([100 * float(row["accuracy"]) for row in own]) if own else "")
        lines.append(f"| `{criterion}` | " + " | ".join(cells) + " |")
    return lines


def main(data: str, processes: int = 2) -> None:
    found: list[Mapping[str, Any]] = [*rows(FILE)]
    made = {(row["criterion"], row["recovery"], int(row["seed"])) for row in found}
    jobs = []
    for seed, criterion in product(SEEDS, components.names("criterion")):
        missing = tuple(name for name in RECOVERIES if (criterion, name, seed) not in made)
        if missing:
            jobs.append((data, criterion, seed, missing))
    with ProcessPoolExecutor(processes) as pool:
        for new in pool.map(job, jobs):
            found += new
            for row in new:
                append(FILE, row)
    print("\n".join(table(found)))
    print(f"dense: {100 * evaluator(data, 0)[0].dense().score:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
