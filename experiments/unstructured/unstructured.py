"""Does a search per layer beat one threshold for all weights? python experiments/unstructured/unstructured.py

First 20 % of LeNet's weights by one threshold: each layer's sparsity, beside torch.nn.utils.prune.global_unstructured.
Then a tenth of the weights kept, of LeNet (accuracy) and of an auto-encoder (mean squared error, lower is better),
three trainings each: one threshold against `sensitivity`, fine-tuned alike. Rows go to results.csv.
"""

from __future__ import annotations

import copy
import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).parents[1]))
from lenet import make_task
from records import append, rows

import autoprune
from autoprune import criteria
from autoprune.evaluate import Scoring
from autoprune.prune import choose_units
from autoprune.recover import FineTune
from autoprune.space import Space, trace

FILE = Path(__file__).parent / "results.csv"
SPACE = Space(grain=("weight",), levels=50, max_ratio=0.98)  # thresholds at every 2 % of all weights
SCORING = Scoring(images=5000, short=FineTune(epochs=1))
FINAL = FineTune(epochs=5)


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
    for network in ("lenet", "auto_encoder"):
        for seed in range(3):
            task = make_task(network, seed)
            weights = sum(m.get_parameter("weight").numel() for m in layers(task.model).values())
            others = sum(p.numel() for p in task.model.parameters()) - weights
            limit = weights - round(0.9 * weights) + others
            for way, strategy in (
                ("one threshold", {"_target_": "autoprune.strategies.uniform.Uniform", "by": "threshold"}),
                ("sensitivity", {"_target_": "autoprune.strategies.sensitivity.Sensitivity", "exchanges": 4}),
            ):
                if any((r["network"], r["seed"], r["way"]) == (network, str(seed), way) for r in rows(FILE)):
                    continue
                found = autoprune.search(
                    task,
                    budget=f"params_{limit}",
                    strategy=strategy,
                    space=SPACE,
                    scoring=SCORING,
                    final=FINAL,
                    seed=seed,
                )
                kept = found.measured["params"].value - others
                append(
                    FILE,
                    {
                        "network": network,
                        "seed": seed,
                        "way": way,
                        "kept_pct": round(100 * kept / weights, 2),
                        "metric": found.scores.metric,
                        "dense": round(found.scores.test_dense, 5),
                        "pruned": round(found.scores.test_recovered, 5),
                        "sparsity": " ".join(f"{r:.3f}" for r in found.ratios),
                        "trials": len(found.trials),
                    },
                )
    for network in ("lenet", "auto_encoder"):
        each = [(r["way"], float(r["pruned"])) for r in rows(FILE) if r["network"] == network]
        for way in dict.fromkeys(way for way, _ in each):
            values = [value for other, value in each if other == way]
            print(f"{network}, {way}: {statistics.mean(values):.5f}, {', '.join(f'{v:.5f}' for v in values)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
