"""What do tracing and proving cost? python experiments/tracing/speed.py

autoprune's analysis (labels and groups) and its whole `trace` (analysis and proof on random weights) beside
Torch-Pruning's graph building, and one candidate cut from precomputed indices beside deepcopy + Torch-Pruning, all in
one run, medians of 5. ResNet-50 is torchvision's, through the coverage experiment.
"""

from __future__ import annotations

import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "coverage"))
from models import networks

from autoprune.grouping import gather
from autoprune.space import trace
from autoprune.tasks.resnet import ResNet
from autoprune.tracing import record


def seconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def their_candidate(model: nn.Module, inputs: torch.Tensor) -> None:
    smaller = copy.deepcopy(model)
    head = smaller.get_submodule("fc")
    pruner = tp.pruner.MagnitudePruner(
        smaller, inputs, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=[head]
    )
    pruner.step()


def main() -> None:
    rows = []
    resnet50 = networks()["torchvision/resnet50"].build()
    for name, model, size in (
        ("ResNet-20", ResNet(depth=20), 32),
        ("ResNet-56", ResNet(depth=56), 32),
        ("ResNet-50", resnet50, 224),
    ):
        model.eval()
        inputs = torch.randn(1, 3, size, size)
        traced = trace(model, (inputs,))
        kept = [np.arange(g.size // 2) for g in traced.space.groups]
        ours = seconds(lambda: trace(model, (inputs,)))
        analysis = seconds(lambda: gather(model, record(model, (inputs,), {}), 1, {}))
        graph = seconds(lambda: tp.DependencyGraph().build_dependency(model, example_inputs=inputs))
        cut = seconds(lambda: traced.cut(model, kept))
        theirs = seconds(lambda: their_candidate(model, inputs))
        ratios = round(analysis / graph, 2), round(cut, 4), round(theirs, 4), round(cut / theirs, 3)
        rows.append([name, round(ours, 3), round(analysis, 3), round(graph, 3), *ratios])
        print(
            f"{name}: trace and prove {ours:.2f} s; analysis alone {analysis:.2f} s, Torch-Pruning's graph {graph:.2f} "
            f"s, ratio {analysis / graph:.1f}; "
            f"a candidate {1e3 * cut:.1f} ms, deepcopy + Torch-Pruning {1e3 * theirs:.1f} ms, ratio {cut / theirs:.2f}",
            flush=True,
        )
    with (Path(__file__).parent / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("model trace_s analysis_s tp_graph_s analysis_over_tp cut_s tp_candidate_s cut_over_tp".split())
        writer.writerows(rows)


if __name__ == "__main__":
    main()
