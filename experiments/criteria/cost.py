"""What does each criterion cost? python experiments/criteria/cost.py

Seconds of every criterion of conf/criterion, with its settings there, on ResNet-50 with random weights: three batches
of eight pictures of 224 px, all groups, one thread, each once, after a pass to warm up. Rows go to results.csv.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune import components
from autoprune.space import trace

BATCHES, EXAMPLES, SIDE, CLASSES = 3, 8, 224, 1000


class Bottleneck(nn.Module):
    def __init__(self, width: int, inner: int, stride: int) -> None:
        super().__init__()
        out = 4 * inner
        self.body = nn.Sequential(*conv(width, inner, 1), nn.ReLU(), *conv(inner, inner, 3, stride), nn.ReLU())
        self.last = nn.Sequential(*conv(inner, out, 1))
        same = stride == 1 and width == out
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv(width, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(self.body(x)) + self.shortcut(x))


def conv(i: int, o: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o)


def resnet50() -> nn.Sequential:
    """He et al., CVPR 2016, as torchvision has it."""
    layers: list[nn.Module] = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        inner = 64 * 2**stage
        for stride in (1 if stage == 0 else 2, *[1] * (count - 1)):
            layers.append(Bottleneck(width, inner, stride))
            width = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet50().eval()
    traced = trace(model, (torch.randn(1, 3, SIDE, SIDE),))
    batches = [(torch.randn(EXAMPLES, 3, SIDE, SIDE), torch.randint(CLASSES, (EXAMPLES,))) for _ in range(BATCHES)]
    units = sum(group.size for group in traced.space.groups)
    with torch.no_grad():
        model(batches[0][0])
        passes = seconds(lambda: [model(images) for images, _ in batches])
    print(f"{len(traced.space.groups)} groups, {units} units; a pass over the batches takes {passes:.1f} s", flush=True)
    rows = []
    for name in components.names("criterion"):
        values = components.spec("criterion", name)
        criterion = components.bind(values, "criterion", model, (), batches=(), loss=None, seed=0)
        given = {"batches": batches, "loss": F.cross_entropy, "seed": 0}
        spent = seconds(partial(criterion, model, traced.slices, **given))
        rows.append([name, round(spent, 3), round(spent / passes, 2)])
        print(f"| `{name}` | {spent:.2f} | {spent / passes:.2f} |", flush=True)
    with (Path(__file__).parent / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["criterion", "seconds", "passes"], *rows])


if __name__ == "__main__":
    main()
