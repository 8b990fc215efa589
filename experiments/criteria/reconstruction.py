"""Is the closed form as good as least squares, and how much faster? python experiments/criteria/reconstruction.py

ResNet-20 of Fashion-MNIST at half its FLOPs, every layer that reads pruned channels: its weights refitted from the Gram
matrix (reconstruct.solved), which is summed up once for all candidates, and by torch.linalg.lstsq on the features that
the matrix was made of, with the ridge as rows of its own. Printed, a layer a line: the seconds of the first over the
second (medians of REPEATS), the relative difference of what they give, and the squared error of the output against the
dense layer's, of the total: without any recovery, refitted, and by lstsq without a ridge. Rows go to
reconstruction.csv.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append

from autoprune.allocate import evenly
from autoprune.borrowing import first, seeded
from autoprune.costs import counted, counted_models
from autoprune.criteria import l1
from autoprune.prune import choose_units
from autoprune.reconstruct import POSITIONS, RIDGE, solved, windows
from autoprune.space import trace
from autoprune.tasks.fashion_mnist_resnet20 import make_task

FILE = Path(__file__).with_name("reconstruction.csv")
BATCHES, REPEATS = 4, 5


def features(model: nn.Module, name: str, batches: list[Any]) -> Tensor:
    """What a layer reads at POSITIONS places of each image [N, I], in float64."""
    draw, found = torch.Generator().manual_seed(0), []

    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen = windows(module, given[0])
        places = torch.randperm(seen.shape[1] * seen.shape[2], generator=draw)[:POSITIONS]
        found.append(seen[:, places // seen.shape[2], places % seen.shape[2]].flatten(2).flatten(0, 1).double())

    handle = model.get_submodule(name.rpartition(".")[0]).register_forward_hook(hook)
    with torch.inference_mode():
        for inputs, _ in batches:
            model(inputs)
    handle.remove()
    return torch.cat(found)


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        found = function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), found


def main() -> None:
    torch.set_num_threads(1)
    task = make_task(data="shipped")
    traced = trace(task.model, task.inputs)
    macs, space = counted_models(task, traced, counted(task.model, task.inputs))["macs"], traced.space
    half = macs.predict(space.dense()) / 2
    ratios = space.ratios(evenly(space, lambda levels: macs.predict(space.ratios(levels)) <= half))
    removed = traced.removed(choose_units(space, l1(task.model, traced.slices), ratios))
    with seeded(0):
        batches = first(task.train, BATCHES)
    FILE.unlink(missing_ok=True)
    totals = [0.0, 0.0]
    for name, parameter in task.model.named_parameters():
        if 1 not in removed.get(name, {}):
            continue
        weight, each = parameter.detach(), int(np.prod(parameter.shape[2:]))
        flat = weight.flatten(1).double()
        columns = np.zeros(weight.shape[1], dtype=bool)
        columns[removed[name][1]] = True
        gone = torch.from_numpy(np.flatnonzero(np.repeat(columns, each)))
        kept = torch.from_numpy(np.flatnonzero(np.repeat(~columns, each)))
        x = features(task.model, name, batches)
        target, gram = x @ flat.T, x.T @ x
        ridge = float(RIDGE * gram.diagonal().mean()) ** 0.5
        rows = torch.cat([x[:, kept], ridge * torch.eye(len(kept), dtype=x.dtype)])
        targets = torch.cat([target, ridge * flat[:, kept].T])
        ours, refitted = timed(lambda: solved(gram, flat, kept, gone))
        theirs, expected = timed(lambda: torch.linalg.lstsq(rows, targets).solution)
        plain = torch.linalg.lstsq(x[:, kept], target).solution
        given = [x[:, kept] @ w for w in (flat[:, kept].T, refitted.T, plain)]
        lost = [float((found - target).square().sum() / target.square().sum()) for found in given]
        difference = float((given[1] - x[:, kept] @ expected).norm() / (x[:, kept] @ expected).norm())
        totals = [totals[0] + ours, totals[1] + theirs]
        append(
            FILE,
            {
                "layer": name.removesuffix(".weight"),
                "samples": len(x),
                "inputs": flat.shape[1],
                "kept": len(kept),
                "time ratio": round(ours / theirs, 4),
                "difference": f"{difference:.1e}",
                "lost by cutting": round(lost[0], 4),
                "refitted": round(lost[1], 5),
                "lstsq": round(lost[2], 5),
            },
        )
    print(f"all layers: {totals[0] / totals[1]:.4f} of the time")


if __name__ == "__main__":
    main()
