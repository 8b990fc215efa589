"""How many steps of fine-tuning tell finalists apart? python experiments/benchmarks/finalists.py

The finalists of `strategy=sensitivity` under flops_50pct on the shipped task, three seeds, each fine-tuned for 6, 12
and 30 steps and for an epoch: the loss that a search sees after them, on 200 images or on 1000, and on all 5000 images
of the search split after the epoch.
"""

from __future__ import annotations

import torch

import autoprune
from autoprune.core import Candidate
from autoprune.criteria import l1
from autoprune.evaluate import Evaluator, Scoring
from autoprune.recover import FineTune
from autoprune.space import trace
from autoprune.tasks.fashion_mnist_resnet20 import make_task

STAGES = {"6 steps": (0.05, 200), "12 steps": (0.1, 200), "30 steps": (0.25, 1000), "1 epoch": (1.0, 5000)}


def main() -> None:
    torch.set_num_threads(1)
    task = make_task(data="shipped")
    traced = trace(task.model, task.inputs)
    importance = l1(task.model, traced.slices)
    for seed in range(3):
        found = autoprune.search(task, budget="flops_50pct", seed=seed, final=FineTune(epochs=0))
        finalists = [t.candidate for t in found.trials if "finalist" in t.candidate.about]
        print(seed, [candidate.about["finalist"] for candidate in finalists])
        for stage, (epochs, images) in STAGES.items():
            scoring = Scoring(images=5000, short=FineTune(epochs=epochs))
            made = Evaluator(
                task, traced, importance, budgets=(), costs={}, meters={}, scoring=scoring, seed=seed, cache=None
            )
            losses = []
            for candidate in finalists:
                model = made.recovered(Candidate(ratios=candidate.ratios, recovery="short"))
                losses.append(round(made.scored(model, images / 5000).loss, 4))
            print(seed, stage, losses, flush=True)


if __name__ == "__main__":
    main()
