"""What should candidates be scored after? python experiments/amc/proxy.py [NETWORKS [CIFAR10.NPZ]]

Networks drawn at random within half of the MACs of a task (the default one, or CIFAR-10 ResNet-20 given its data) are
scored after each `evaluator.recovery`, and after an epoch of fine-tuning that starts from two of them. A recovery is
good where it ranks networks as that epoch does, and where the epoch that starts from it ends lower. Rows go to
proxy_<task>.csv beside this file; a row that is there is not made again.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import autoprune
from autoprune.borrowing import first, seeded
from autoprune.core import Task
from autoprune.criteria import l1
from autoprune.prune import choose_units
from autoprune.reconstruct import Reconstruction
from autoprune.recover import FineTune, finetune, recalibrate
from autoprune.scores import Sample, score
from autoprune.space import trace
from autoprune.tasks import cifar10_resnet20, fashion_mnist_resnet20

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append, rows

HERE = Path(__file__).parent
RECOVERIES: dict[str, Sequence[str]] = {
    "none": (),
    "bn_recalibrate": ("bn_recalibrate",),
    "reconstruct": ("reconstruct",),
    "reconstruct, bn_recalibrate": ("reconstruct", "bn_recalibrate"),
}
TRAINED = ("bn_recalibrate", "reconstruct, bn_recalibrate")  # which an epoch starts from
BATCHES = 4


def made(task: Task, file: Path, count: int) -> None:
    """The rows of the first `count` networks."""
    space = trace(task.model, task.inputs)
    importance = l1(task.model, space.slices)
    with seeded(0):
        sample, batches = Sample.of(first(task.search, 8)), first(task.train, BATCHES)
    rebuild = Reconstruction(task.model, space, batches)
    env, rng = autoprune.environment(task, budget="flops_50pct"), np.random.default_rng(0)
    for number in range(count):
        env.reset()
        done, info = False, dict[str, Any]()
        while not done:
            _, _, done, _, info = env.step(rng.uniform(size=1).astype(np.float32))
        if any(int(row["network"]) == number for row in rows(file)):
            continue
        values: dict[str, Any] = {"network": number}
        kept = choose_units(space.space, importance, env.bound.space.ratios(info["levels"]))
        for name, steps in RECOVERIES.items():
            began, model = time.time(), space.cut(task.model, kept).eval()
            for step in steps:
                recalibrate(model, batches) if step == "bn_recalibrate" else rebuild.apply(model, kept)
            values[f"{name}: s"] = round(time.time() - began, 3)
            found = score(model, sample, task)
            values |= {f"{name}: score": found.score, f"{name}: loss": found.loss}
            if name in TRAINED:
                with seeded(0):
                    finetune(model, task.train, FineTune(epochs=1), loss=task.loss, lr=task.lr, teacher=task.model)
                found = score(model, sample, task)
                values |= {f"epoch from {name}: score": found.score, f"epoch from {name}: loss": found.loss}
        append(file, values)


def table(found: Sequence[dict[str, str]]) -> list[str]:
    """Means over the networks, and how a recovery ranks them beside the epoch from recalibration."""
    lines = [
        "| scored after | score, % | loss | rank correlation of the loss with that after an epoch | s |",
        "|---" * 5 + "|",
    ]
    after = [float(row[f"epoch from {TRAINED[0]}: loss"]) for row in found]
    for name in (*RECOVERIES, *(f"epoch from {name}" for name in TRAINED)):
        scores, losses = ([float(row[f"{name}: {what}"]) for row in found] for what in ("score", "loss"))
        seconds = f"{statistics.mean(float(r[f'{name}: s']) for r in found):.2f}" if name in RECOVERIES else ""
        cells = [f"{100 * statistics.mean(scores):.2f}", f"{statistics.mean(losses):.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {spearmanr(losses, after).statistic:.2f} | {seconds} |")
    return lines


def main(count: int, data: str | None) -> None:
    task = cifar10_resnet20.make_task(data=data) if data else fashion_mnist_resnet20.make_task(data="shipped")
    file = HERE / f"proxy_{task.name}.csv"
    made(task, file, count)
    print("\n".join(table(rows(file))))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16, sys.argv[2] if len(sys.argv) > 2 else None)
