"""What does a race spare, and what does it lose? python experiments/benchmarks/racing.py [mixed] [ties] [loss] [either]

120 mixed candidates (what `strategy=random` draws under flops_50pct) and 120 near ties (lightly cut, all within a point
of the best) of the trained ResNet-20 of Fashion-MNIST: each scored on all 5000 images of the search split, and raced
(race.py) as that strategy does, by loss and by either of loss and score, on five drawings of the images. Printed are
the images that the race looked at as a share of those of all, how many points the best that it found lies below the
best of all, both scored on all images, and the seconds of the race as a share of those of scoring all. Rows go to
results/racing.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoprune.bound import Bound
from autoprune.core import Budget, Candidate, Scripted, Task, Trial
from autoprune.costs import counted, counted_models
from autoprune.criteria import l1
from autoprune.evaluate import Evaluator, Scoring
from autoprune.loop import search
from autoprune.race import RUNGS, raced
from autoprune.space import trace
from autoprune.strategies.random_search import BURN_IN, surface
from autoprune.tasks.fashion_mnist_resnet20 import make_task
from autoprune.traced import TracedModel

FILE = Path(__file__).parent / "results" / "racing.json"
COUNT = 120
IMAGES = 5000
DRAWINGS = 5
POINT = 0.01


class Race(Scripted):
    """A race and nothing else."""

    def __init__(self, candidates: Sequence[Candidate], **settings: Any) -> None:
        super().__init__(self._converse(candidates, settings))

    def _converse(
        self, candidates: Sequence[Candidate], settings: dict[str, Any]
    ) -> Generator[list[Candidate], Sequence[Trial], None]:
        self.trials = yield from raced(candidates, **settings)


def mixed(bound: Bound, seed: int) -> list[Candidate]:
    """What `strategy=random` draws."""
    drawn = surface(bound, np.random.default_rng(seed), band=0.05, thin=5)
    found = dict.fromkeys(islice(drawn, BURN_IN, BURN_IN + 2 * COUNT))
    return [Candidate(ratios=bound.space.ratios(levels)) for levels in islice(found, COUNT)]


def ties(ours: Evaluator, seed: int) -> list[Trial]:
    """Lightly cut networks, the first so many that are all within a point of the best of them."""
    rng, space = np.random.default_rng(seed), ours.traced.space
    found: dict[Candidate, Trial] = {}
    while True:
        depth = rng.uniform(0.1, 0.6)
        levels = [int(rng.integers(round(depth * (len(g.levels) - 1)) + 1)) for g in space.groups]
        candidate = Candidate(ratios=space.ratios(levels))
        if candidate not in found:
            (found[candidate],) = ours([(len(found), candidate)])
        best = max(t.score for t in found.values())
        inside = [t for t in found.values() if t.score > best - POINT - 1e-9]
        if len(inside) == COUNT:
            return inside


def evaluator(task: Task, traced: TracedModel) -> Evaluator:
    settings: dict[str, Any] = {"budgets": (), "costs": {}, "meters": {}, "cache": None, "seed": 0}
    made = Evaluator(task, traced, l1(task.model, traced.slices), scoring=Scoring(images=IMAGES), **settings)
    made.dense()
    return made


def redraw(ours: Evaluator, seed: int) -> None:
    """Let the images that fewer are drawn of be others, and all else the same."""
    ours.seed = seed
    for known in (ours._samples, ours._dense, ours._scored):
        known.clear()
    ours.dense()


def raced_on(
    ours: Evaluator, candidates: Sequence[Candidate], scores: Mapping[Candidate, float], by: str
) -> dict[str, Any]:
    race = Race(candidates, keep=3, by=by)
    began = time.process_time()
    trials = search(race, ours, lambda trial: None)
    seconds = time.process_time() - began
    best = max((t for t in race.trials if t.candidate.fidelity == 1), key=lambda t: (t.score, -t.loss))
    seen = sum(t.loss_change.samples for t in trials if t.loss_change)
    return {
        "images": round(seen / (len(candidates) * IMAGES), 4),
        "regret, points": round(100 * (max(scores.values()) - scores[best.candidate]), 3),
        "seconds": round(seconds, 1),
        "scored": [sum(t.candidate.fidelity == fidelity for t in trials) for fidelity in RUNGS],
    }


def main() -> None:
    torch.set_num_threads(1)
    task = make_task(data="shipped")
    traced = trace(task.model, task.inputs)
    costs = counted_models(task, traced, counted(task.model, task.inputs))
    macs = costs["macs"].predict(traced.space.dense())
    bound = Bound(traced.space, (Budget("macs", macs / 2, "MACs"),), costs)
    FILE.parent.mkdir(exist_ok=True)
    asked = set(sys.argv[1:])
    for kind in ("mixed", "ties"):
        if asked & {"mixed", "ties"} and kind not in asked:
            continue
        ours = evaluator(task, traced)
        began = time.process_time()
        trials = list(ours(list(enumerate(mixed(bound, 0))))) if kind == "mixed" else ties(ours, 0)
        scores = {t.candidate: t.score for t in trials}
        spread = round(100 * (max(scores.values()) - min(scores.values())), 2)
        whole = (time.process_time() - began) / ours.evaluations * COUNT
        print(kind, {"points between best and worst": spread, "seconds": round(whole, 1)}, flush=True)
        for by in ("loss", "either"):
            if asked & {"loss", "either"} and by not in asked:
                continue
            found = []
            for seed in range(DRAWINGS):
                redraw(ours, seed)
                row = raced_on(ours, list(scores), scores, by)
                found.append(row | {"seconds": round(row["seconds"] / whole, 4)})
                print(kind, by, seed, found[-1], flush=True)
            keys = ("images", "regret, points", "seconds")
            means = {key: round(float(np.mean([row[key] for row in found])), 4) for key in keys}
            rows = json.loads(FILE.read_text()) if FILE.exists() else {}
            rows[f"{kind} by {by}"] = {"points between best and worst": spread, "mean": means, "drawings": found}
            FILE.write_text(json.dumps(rows, indent=1) + "\n")
            print(kind, by, means, flush=True)


if __name__ == "__main__":
    main()
