"""Sensitivity against uniform at half the MACs: python experiments/flops_50pct/run.py TASK [DATA] [SEEDS]

For each seed both strategies search, both answers are scored on the test split before fine-tuning (reconstructed and
recalibrated) and after the same fine-tune of 3 epochs. Rows go to results.csv as they are made; rows already there are
not made again. Prints the table with the paired difference (per test image, 95 % interval).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import autoprune
from autoprune.borrowing import first, seeded
from autoprune.core import Task
from autoprune.final import healed
from autoprune.tasks import cifar10_resnet20, fashion_mnist_resnet20

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append, rows

HERE = Path(__file__).parent
EPOCHS = 3
BATCHES = 8  # of training, for what networks get before they are fine-tuned
FIELDS = ["task", "seed", "strategy", "of_dense_macs", "dense", "before", "fine_tuned"]


def main(name: str, data: str = "shipped", seeds: str = "0,1,2") -> None:
    make = {"fashion_mnist_resnet20": fashion_mnist_resnet20, "cifar10_resnet20": cifar10_resnet20}[name].make_task
    task = make(data=data)
    dense = correct(task.model, task)
    path = HERE / "results.csv"
    for seed in map(int, seeds.split(",")):
        for strategy in ("uniform", "sensitivity"):
            if not any(r["task"] == name and r["seed"] == str(seed) and r["strategy"] == strategy for r in rows(path)):
                append(path, row(task, seed, strategy, float(dense.mean())))
    show(name, rows(path))


def row(task: Task, seed: int, strategy: str, dense: float) -> dict[str, Any]:
    result = autoprune.search(
        task, budget="flops_50pct", strategy=strategy, seed=seed, final=autoprune.FineTune(epochs=EPOCHS)
    )
    assert result.met
    with seeded(seed):
        batches = first(task.train, BATCHES)
    before, after = (correct(model, task) for model in (healed(task, result.table, batches), result.model))
    np.savez_compressed(HERE / f"{task.name}_{seed}_{strategy}.npz", before=before, after=after)
    share = result.measured["macs"].value / result.dense["macs"].value
    values = [task.name, seed, strategy, round(share, 4), dense, float(before.mean()), float(after.mean())]
    return dict(zip(FIELDS, values, strict=True))


def correct(model: nn.Module, task: Task) -> NDArray[np.bool_]:
    """Which test images are classified correctly."""
    model.eval()
    with torch.inference_mode():
        return np.concatenate([(model(x).argmax(1) == y).numpy() for x, y in task.test])


def paired(name: str, seed: str, when: str) -> tuple[float, float]:
    """Difference of accuracy in points, sensitivity minus uniform, and the half width of its 95 % interval."""
    ours, theirs = (np.load(HERE / f"{name}_{seed}_{s}.npz")[when].astype(float) for s in ("sensitivity", "uniform"))
    difference = 100 * (ours - theirs)
    return float(difference.mean()), float(1.96 * difference.std() / np.sqrt(len(difference)))


def show(name: str, rows: list[dict[str, str]]) -> None:
    head = ["before fine-tuning: uniform", "ours", "difference", "after: uniform", "ours", "difference"]
    print("| " + " | ".join([f"{name}, seed", "dense", *head]) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in sorted({r["seed"] for r in rows if r["task"] == name}):
        by = {r["strategy"]: r for r in rows if r["task"] == name and r["seed"] == seed}
        cells = [seed, f"{100 * float(by['uniform']['dense']):.2f}"]
        for field, when in (("before", "before"), ("fine_tuned", "after")):
            cells += [f"{100 * float(by[s][field]):.2f}" for s in ("uniform", "sensitivity")]
            mean, half = paired(name, seed, when)
            cells.append(f"{mean:+.2f} ± {half:.2f}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
