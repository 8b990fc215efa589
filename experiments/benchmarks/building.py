"""What does building one candidate cost beside Torch-Pruning? python experiments/benchmarks/building.py

A network that was traced once, half of every group cut from it, beside copy.deepcopy + Torch-Pruning: its graph built
and half of the channels of each of its groups pruned (the last ones on both sides: nothing is ranked). In turns in one
run, one thread, the least seconds of CPU of nine. Pictures of 224 x 224. Rows go to results/building.json.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from autoprune.space import trace
from autoprune.traced import TracedModel

FILE = Path(__file__).parent / "results" / "building.json"
TIMES = 9


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, act: type[nn.Module] | None = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Residual(nn.Module):
    """What it is given, made to fit, and what a body makes of it."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, act

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.act(self.body(x) + self.shortcut(x)))


def resnet(blocks: tuple[int, ...], *, bottleneck: bool) -> nn.Sequential:
    """He et al., CVPR 2016, as torchvision has it."""
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for stage, count in enumerate(blocks):
        inner = 64 * 2**stage
        out = inner * 4 if bottleneck else inner
        for stride in (1 if stage == 0 else 2, *[1] * (count - 1)):
            parts: tuple[nn.Module, ...]
            if bottleneck:
                parts = conv(width, inner, 1), conv(inner, inner, 3, stride), conv(inner, out, 1, act=None)
            else:
                parts = conv(width, inner, 3, stride), conv(inner, out, act=None)
            fits = stride == 1 and width == out
            shortcut = nn.Identity() if fits else conv(width, out, 1, stride, act=None)
            layers.append(Residual(nn.Sequential(*parts), shortcut, nn.ReLU()))
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def mobilenet_v2() -> nn.Sequential:
    """Sandler et al., CVPR 2018."""
    layers: list[nn.Module] = [conv(3, 32, 3, 2, act=nn.ReLU6)]
    width = 32
    for expand, out, count, first in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for stride in (first, *[1] * (count - 1)):
            inner = expand * width
            wide = [conv(width, inner, 1, act=nn.ReLU6)] if expand > 1 else []
            body = nn.Sequential(*wide, conv(inner, inner, 3, stride, inner, nn.ReLU6), conv(inner, out, 1, act=None))
            layers.append(Residual(body, nn.Identity(), nn.Identity()) if stride == 1 and width == out else body)
            width = out
    head = conv(width, 1280, 1, act=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)
    return nn.Sequential(*layers, *head)


def theirs(model: nn.Module, inputs: Tensor) -> nn.Module:
    smaller = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(smaller, example_inputs=inputs)
    head = smaller.get_submodule(list(dict(smaller.named_children()))[-1])
    for group in graph.get_all_groups(ignored_layers=[head], root_module_types=[nn.Conv2d]):
        layer = group[0].dep.target.module
        graph.get_pruning_group(
            layer, group[0].dep.handler, list(range(layer.out_channels - layer.out_channels // 2, layer.out_channels))
        ).prune()
    return smaller


def ours(traced: TracedModel, model: nn.Module) -> nn.Module:
    return traced.cut(model, [np.arange(group.size - group.size // 2) for group in traced.space.groups])


def seconds(function: Callable[[], nn.Module]) -> tuple[float, int]:
    """Of CPU, and the parameters of what was made."""
    began = time.process_time()
    made = function()
    return time.process_time() - began, sum(p.numel() for p in made.parameters())


def row(name: str, model: nn.Module) -> dict[str, object]:
    inputs = torch.randn(1, 3, 224, 224)
    traced = trace(model, (inputs,))
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    sizes = {}
    for _ in range(TIMES):
        for side, function in (("ours", lambda: ours(traced, model)), ("theirs", lambda: theirs(model, inputs))):
            took, sizes[side] = seconds(function)
            spent[side].append(took)
    least = {side: min(times) for side, times in spent.items()}
    return {
        "network": name,
        "groups": len(traced.space.groups),
        "params_left": sizes["ours"],
        "params_left_by_torch_pruning": sizes["theirs"],
        "ours_ms": round(1e3 * least["ours"], 2),
        "torch_pruning_ms": round(1e3 * least["theirs"], 2),
        "ratio": round(least["ours"] / least["theirs"], 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, model in (
        ("ResNet-18", resnet((2, 2, 2, 2), bottleneck=False)),
        ("ResNet-50", resnet((3, 4, 6, 3), bottleneck=True)),
        ("MobileNetV2", mobilenet_v2()),
    ):
        rows.append(row(name, model.eval()))
        print(rows[-1], flush=True)
    FILE.parent.mkdir(exist_ok=True)
    made = {"machine": platform.machine(), "torch": torch.__version__, "torch_pruning": tp.__version__, "threads": 1}
    FILE.write_text(json.dumps({**made, "building": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
