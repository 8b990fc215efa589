"""Does a search per layer beat one threshold for all weights? python experiments/unstructured/unstructured.py

First 20 % of LeNet's weights by one threshold: each layer's sparsity, beside torch.nn.utils.prune.global_unstructured.
Then a tenth of the weights kept, of LeNet on Fashion-MNIST and on CIFAR-10 (whose .npz AUTOPRUNE_CIFAR10 names) and of
an auto-encoder (mean squared error, lower is better), three trainings each: one threshold against `sensitivity`,
fine-tuned alike for one epoch and for five. Rows go to results.csv.
"""

from __future__ import annotations

import copy
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).parents[1]))
from lenet import CHECKPOINTS, make_task
from records import append, rows

import autoprune
from autoprune import criteria
from autoprune.core import Task
from autoprune.evaluate import Scoring
from autoprune.prune import choose_units
from autoprune.recover import FineTune
from autoprune.space import Space, trace

FILE = Path(__file__).parent / "results.csv"
SPACE = Space(grain=("weight",), levels=50, max_ratio=0.98)  # thresholds at every 2 % of all weights
SCORING = Scoring(images=5000, short=FineTune(epochs=1))
NETWORKS = ("lenet", "lenet_cifar10", "auto_encoder")
EPOCHS = (1, 5)  # of the fine-tune of what is found
WAYS: dict[str, dict[str, Any]] = {
    "one threshold": {"_target_": "autoprune.strategies.global_threshold.GlobalThreshold", "floor": 0.0},
    "sensitivity": {"_target_": "autoprune.strategies.sensitivity.Sensitivity", "exchanges": 4},
}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def as_in_the_tutorial() -> None:
    """20 % of all weights by one threshold, ours beside torch.nn.utils.prune's."""
    task = make_task("lenet")
    traced = trace(task.model, task.inputs, SPACE)
    ratios = next(row for row in traced.space.thresholds if removed(traced.space.named(row), task.model) >= 0.2 - 1e-9)
    ours = layers(traced.cut(task.model, choose_units(traced.space, criteria.l1(task.model, traced.slices), ratios)))
    theirs = layers(copy.deepcopy(task.model))
    prune.global_unstructured([(m, "weight") for m in theirs.values()], prune.L1Unstructured, amount=0.2)
    for name, module in ours.items():
        same = torch.equal(module.get_buffer("weight_mask"), theirs[name].get_buffer("weight_mask"))
        print(f"Sparsity in {name}.weight: {100 * traced.space.named(ratios)[name]:.2f} %, masks equal: {same}")


def removed(ratios: dict[str, float], model: nn.Module) -> float:
    sizes = {name: module.get_parameter("weight").numel() for name, module in layers(model).items()}
    return sum(ratios[name] * sizes[name] for name in sizes) / sum(sizes.values())


def main() -> None:
    as_in_the_tutorial()
    for network, seed in product(NETWORKS, range(3)):
        task = make_task(network, seed)
        for way, epochs in product(WAYS, EPOCHS):
            key = (network, str(seed), way, str(epochs))
            if not any((r["network"], r["seed"], r["way"], r["epochs"]) == key for r in rows(FILE)):
                append(FILE, compared(task, network, seed, way, epochs))
    for network, epochs in product(NETWORKS, EPOCHS):
        of_these = [r for r in rows(FILE) if (r["network"], r["epochs"]) == (network, str(epochs))]
        for way in WAYS:
            values = [float(r["pruned"]) for r in of_these if r["way"] == way]
            each = ", ".join(f"{value:.5f}" for value in values)
            print(f"{network}, {epochs} epochs, {way}: {statistics.mean(values):.5f} ({each})")


def compared(task: Task, network: str, seed: int, way: str, epochs: int) -> dict[str, object]:
    """A tenth of a network's weights kept in one way, and fine-tuned; the search is done once, and then replayed."""
    weights = sum(m.get_parameter("weight").numel() for m in layers(task.model).values())
    others = sum(p.numel() for p in task.model.parameters()) - weights
    found = autoprune.search(
        task,
        budget=f"params_{weights - round(0.9 * weights) + others}",
        strategy=WAYS[way],
        space=SPACE,
        scoring=SCORING,
        final=FineTune(epochs=epochs),
        seed=seed,
        storage=f"sqlite:///{CHECKPOINTS / 'studies.db'}",
    )
    return {
        "network": network,
        "seed": seed,
        "way": way,
        "epochs": epochs,
        "kept_pct": round(100 * (found.measured["params"].value - others) / weights, 2),
        "metric": found.scores.metric,
        "dense": round(found.scores.test_dense, 5),
        "pruned": round(found.scores.test_recovered, 5),
        "sparsity": " ".join(f"{r:.3f}" for r in found.ratios),
        "trials": len(found.trials),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
