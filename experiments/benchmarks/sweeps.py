"""What does a sweep cost beside running every candidate alone? python experiments/benchmarks/sweeps.py

Every group alone at two levels, healed as by default (on one batch) and scored on the same 500 images: each candidate
cut and run in full, beside candidates that share what comes before the first difference. The floor is what must be
computed again in any case: the seconds of each candidate's forward pass but for those of the modules whose outputs
cannot differ, or only lose rows. Then the sweep that a search does (bisection, on the fifth of the images that decides)
beside every level on all images, each candidate alone, for the trained ResNet-20. Seconds are of CPU, of one thread, so
that what else runs disturbs less. Rows go to results/sweeps.json.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from zoo import InvertedResidual, conv
from zoo import cells as cells_of

from autoprune import sweep
from autoprune.core import Candidate, Task, Trial
from autoprune.criteria import l1
from autoprune.dependence import Dependence
from autoprune.evaluate import Evaluator, Scoring
from autoprune.space import trace
from autoprune.tasks.fashion_mnist_resnet20 import make_task
from autoprune.tasks.resnet import ResNet
from autoprune.traced import TracedModel

FILE = Path(__file__).parent / "results" / "sweeps.json"
TOLERATED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # loss increases, for the deepest ratio within each


class Dense(nn.Module):
    """Each layer reads all that came before it."""

    def __init__(self, growth: int = 12, layers: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * growth, 3, padding=1)
        widths = [(2 + i) * growth for i in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, growth, 3, padding=1)) for n in widths
        )
        self.head = nn.Sequential(nn.BatchNorm2d((2 + layers) * growth), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.answer = nn.Linear((2 + layers) * growth, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return torch.as_tensor(self.answer(self.head(x).flatten(1)))


def mobilenet() -> nn.Module:
    strides = [(16, 24, 1), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 1), (96, 96, 1)]
    blocks = [InvertedResidual(i, o, s) for i, o, s in strides]
    return nn.Sequential(conv(3, 16), *blocks, conv(96, 192, 1), *head(192))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    width = 3
    for out in (32, 64, 128, 256):
        layers += [conv(width, out), conv(out, out), nn.MaxPool2d(2)]
        width = out
    return nn.Sequential(*layers, *head(256))


def head(width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)


def random_task(name: str, model: nn.Module) -> Task:
    """A network without training, on noise: what runs and how long is all the same."""
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(64, 3, 32, 32, generator=draw), torch.randint(10, (64,), generator=draw)) for _ in range(8)]
    return Task(
        name=name,
        model=model.eval(),
        inputs=(data[0][0][:1],),
        train=data,
        search=data,
        test=data,
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(10, average="micro"),
        lr=0.1,
    )


def evaluator(task: Task, traced: TracedModel, images: int, *, shared: bool, recalibration: int = 4) -> Evaluator:
    scoring = Scoring(images=images, shared_prefix=shared, recalibration=recalibration)
    importance = l1(task.model, traced.slices)
    settings: dict[str, Any] = {"budgets": (), "costs": {}, "meters": {}, "seed": 0, "cache": None}
    made = Evaluator(task, traced, importance, scoring=scoring, **settings)
    made.dense()
    return made


def timed(ours: Evaluator, candidates: Sequence[Candidate], start: int = 0) -> tuple[float, list[Trial]]:
    ours._scored.clear()  # it knows what it scored before
    began = time.process_time()
    trials = list(ours(list(enumerate(candidates, start=start))))
    failed = [t.error for t in trials if t.error]
    assert not failed, failed
    return time.process_time() - began, trials


def cells(traced: TracedModel, count: int) -> list[Candidate]:
    space = traced.space
    return [Candidate(ratios=space.ratios(sweep.alone(space, cell))) for cell in cells_of(space, count)]


def floor(ours: Evaluator, candidates: Sequence[Candidate]) -> float:
    """The share of the seconds of the candidates' own forward passes that lie outside of what others give as well."""
    found = Dependence(ours.traced, ours.dense_model, ours.task.inputs)
    again = whole = 0.0
    (inputs, _) = ours.chunks[0]
    for candidate in candidates:
        model = ours.healer.cut(candidate.ratios)
        changed = [g for g, ratio in enumerate(candidate.ratios) if ratio > 0]
        reused = [0.0]

        def enter(*_: Any) -> None:
            reused[0] -= time.process_time()

        def leave(*_: Any) -> None:
            reused[0] += time.process_time()

        for name in found.reusable(changed, changed):
            model.get_submodule(name).register_forward_pre_hook(enter)
            model.get_submodule(name).register_forward_hook(leave)
        with torch.inference_mode():
            model(*inputs)
            reused[0], began = 0.0, time.process_time()
            for _ in range(3):
                model(*inputs)
        seconds = time.process_time() - began
        whole, again = whole + seconds, again + seconds - reused[0]
    return again / whole


def exact(name: str, task: Task) -> dict[str, object]:
    traced = trace(task.model, task.inputs)
    asked = cells(traced, 2)
    alone, together = (evaluator(task, traced, 500, shared=shared, recalibration=1) for shared in (False, True))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(2):  # in turns, so that what disturbs the machine disturbs both
        (naive, theirs), (ours_s, ours) = timed(alone, asked), timed(together, asked)
        seconds[False].append(naive)
        seconds[True].append(ours_s)
    ratio = min(seconds[True]) / min(seconds[False])
    least = floor(together, asked)
    row: dict[str, object] = {
        "network": name,
        "cells": len(asked),
        "floor": round(least, 3),
        "ratio": round(ratio, 3),
        "over_floor": round(ratio / least, 3),
        "loss_differs_by": max(abs(a.loss - b.loss) for a, b in zip(ours, theirs, strict=True)),
        "alone_s": round(min(seconds[False]), 2),
    }
    print(row, flush=True)
    return row


def bisected(task: Task) -> dict[str, object]:
    traced = trace(task.model, task.inputs)
    space = traced.space
    every = [(g, i) for g, group in enumerate(space.groups) for i in range(1, len(group.levels))]
    candidates = [Candidate(ratios=space.ratios(sweep.alone(space, cell))) for cell in every]
    naive, (dense, *trials) = timed(
        evaluator(task, traced, 1000, shared=False), [Candidate(ratios=space.dense()), *candidates]
    )
    truth: list[list[float]] = [[0.0] for _ in space.groups]
    for (g, _), trial in zip(every, trials, strict=True):
        truth[g].append(trial.loss - dense.loss)
    ours, seconds, scored = evaluator(task, traced, 1000, shared=True), 0.0, 0
    asking = sweep.bisected(space, fidelity=0.2)
    batch = next(asking)
    while True:
        spent, told = timed(ours, batch, start=scored)
        seconds, scored = seconds + spent, scored + len(batch)
        try:
            batch = asking.send(told)
        except StopIteration as end:
            found = end.value
            break
    rising = [np.maximum(isotonic_regression(row).x, 0) for row in truth]
    flat = [np.concatenate([np.asarray(row)[1:] for row in rows]) for rows in (truth, rising, found)]
    levels = [
        abs(int((a <= most).sum()) - int((b <= most).sum()))
        for most in TOLERATED
        for a, b in zip(rising, found, strict=True)
    ]
    return {
        "network": task.name,
        "cells": len(every),
        "scored": scored,
        "ratio": round(seconds / naive, 4),
        "spearman": round(float(spearmanr(flat[2], flat[0])[0]), 3),
        "spearman_rising": round(float(spearmanr(flat[2], flat[1])[0]), 3),
        "within_a_level": round(float(np.mean([n <= 1 for n in levels])), 3),
        "alone_s": round(naive, 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    trained = make_task(data="shipped")
    rows = [
        exact("ResNet-20", trained),
        exact("ResNet-56", random_task("resnet56", ResNet(depth=56))),
        exact("MobileNetV2-style", random_task("mobilenet", mobilenet())),
        exact("DenseNet-style", random_task("densenet", Dense())),
        exact("VGG-style", random_task("vgg", vgg())),
    ]
    bisection = bisected(trained)
    print(bisection)
    FILE.parent.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
    FILE.write_text(json.dumps({**machine, "exact": rows, "bisected": bisection}, indent=1) + "\n")


if __name__ == "__main__":
    main()
