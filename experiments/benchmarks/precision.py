"""Does scoring in bfloat16 rank candidates as float32 does? python experiments/benchmarks/precision.py

Forty cuts of single groups and forty networks as `strategy=random` draws them under flops_50pct, of the trained
ResNet-20 of Fashion-MNIST, each healed and scored alone on the same 1000 images in float32 and in bfloat16: the rank
correlation of their losses, how far these differ, and the seconds that scoring takes, of one thread of the CPU, in
turns in one run. Rows go to results/precision.json.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from autoprune.bound import Bound
from autoprune.core import Budget, Candidate
from autoprune.costs import counted, counted_models
from autoprune.criteria import l1
from autoprune.evaluate import Evaluator, Scoring
from autoprune.scores import Sample, score
from autoprune.space import trace
from autoprune.strategies.random_search import BURN_IN, surface
from autoprune.sweep import alone
from autoprune.tasks.fashion_mnist_resnet20 import make_task

FILE = Path(__file__).parent / "results" / "precision.json"
COUNT = 40


def main() -> None:
    torch.set_num_threads(1)
    task = make_task(data="shipped")
    traced = trace(task.model, task.inputs)
    space = traced.space
    costs = counted_models(task, traced, counted(task.model, task.inputs))
    bound = Bound(space, (Budget("macs", costs["macs"].predict(space.dense()) / 2, "MACs"),), costs)
    drawn = surface(bound, np.random.default_rng(0), band=0.05, thin=5)
    cells = [(g, level) for g, group in enumerate(space.groups) for level in range(1, len(group.levels))]
    kinds = {
        "cuts of single groups": [alone(space, cells[i]) for i in np.linspace(0, len(cells) - 1, COUNT, dtype=int)],
        "whole networks": list(islice(drawn, BURN_IN, BURN_IN + COUNT)),
    }
    settings: dict[str, Any] = {"budgets": (), "costs": {}, "meters": {}, "cache": None, "seed": 0}
    ours = Evaluator(task, traced, l1(task.model, traced.slices), scoring=Scoring(), **settings)
    sample = Sample.of(ours.chunks)
    rows: dict[str, Any] = {}
    for kind, candidates in kinds.items():
        losses: dict[str, list[float]] = {"float32": [], "bfloat16": []}
        seconds = dict.fromkeys(losses, 0.0)
        for levels in candidates:
            model = ours.recovered(Candidate(ratios=space.ratios(levels)))
            for precision, found in losses.items():
                began = time.process_time()
                found.append(score(model, sample, task, precision).loss)
                seconds[precision] += time.process_time() - began
        exact, rough = losses.values()
        rows[kind] = {
            "spearman": round(float(spearmanr(exact, rough).statistic), 4),
            "differ by at most": round(max(abs(b - a) / a for a, b in zip(exact, rough, strict=True)), 4),
            "seconds": round(seconds["bfloat16"] / seconds["float32"], 3),
        }
        print(kind, rows[kind], flush=True)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
