"""Random small networks drawn from a grammar of the ways in which layers are coupled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 8  # pixels of the input
CHANNELS = 3
CLASSES = 4


class Step(nn.Module):
    """What makes new maps from some of those there are; of the zero map it makes zero, but for what a bias adds."""

    def __init__(self, name: str, sources: list[int], apply: Callable[..., list[Tensor]], *modules: nn.Module) -> None:
        super().__init__()
        self.name, self.sources, self.apply_to = name, sources, apply
        self.parts = nn.ModuleList(modules)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return self.apply_to(*(maps[i] for i in self.sources), *self.parts)


class Drawn(nn.Module):
    """A network of `steps`; each takes one or two of the maps so far and adds what it makes to them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.shapes: list[tuple[int, int]] = [(CHANNELS, SIDE)]  # channels and pixels a side of each map
        self.steps = nn.ModuleList()
        self._conv(0)
        rules = [self._conv, self._depthwise, self._grouped, self._add, self._cat, self._split, self._chunk]
        rules += [self._shuffle, self._gate, self._pool, self._upsample, self._norm, self._pixel_shuffle]
        for _ in range(int(self.rng.integers(4, 11))):
            rules[self.rng.integers(len(rules))](self._any())
        self._end()
        del self.rng  # what is drawn is drawn

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for step in self.steps:
            maps += step(maps)
        return maps[-1]

    @property
    def words(self) -> list[str]:
        return [step.name for step in self.steps if isinstance(step, Step)]

    def _any(self) -> int:
        """One of the maps, the latest being likeliest, never the input again."""
        count = len(self.shapes)
        return count - 1 if count == 2 or self.rng.random() < 0.6 else int(self.rng.integers(1, count))

    def _put(self, step: Step, *shapes: tuple[int, int]) -> int:
        self.steps.append(step)
        self.shapes += shapes
        return len(self.shapes) - 1

    def _conv(self, at: int) -> None:
        channels, side = self.shapes[at]
        out, kernel = 4 * int(self.rng.integers(1, 5)), int(self.rng.choice([1, 3]))
        stride = int(self.rng.choice([1, 1, 1, 2])) if side > 2 else 1
        layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=bool(self.rng.random() < 0.5))
        norm = nn.BatchNorm2d(out) if self.rng.random() < 0.6 else nn.Identity()
        self._put(Step("conv", [at], _chain, layer, norm, nn.ReLU()), (out, (side - 1) // stride + 1))

    def _depthwise(self, at: int) -> None:
        channels, side = self.shapes[at]
        times = int(self.rng.choice([1, 1, 2]))
        layer = nn.Conv2d(channels, times * channels, 3, padding=1, groups=channels, bias=False)
        self._put(Step("depthwise", [at], _chain, layer, nn.BatchNorm2d(times * channels)), (times * channels, side))

    def _grouped(self, at: int) -> None:
        channels, side = self.shapes[at]
        out, groups = 4 * int(self.rng.integers(1, 5)), int(self.rng.choice([2, 4]))
        if channels % groups == 0:
            self._put(Step("grouped", [at], _chain, nn.Conv2d(channels, out, 1, groups=groups)), (out, side))

    def _add(self, at: int) -> None:
        channels, side = self.shapes[at]
        alike = [i for i, shape in enumerate(self.shapes) if shape == (channels, side) and i not in (0, at)]
        if not alike:
            layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            alike = [self._put(Step("conv", [at], _chain, layer, nn.BatchNorm2d(channels)), (channels, side))]
        other = alike[int(self.rng.integers(len(alike)))]
        self._put(Step("add", [at, other], lambda a, b: [F.relu(a + b)]), (channels, side))

    def _cat(self, at: int) -> None:
        side = self.shapes[at][1]
        alike = [i for i, (_, other) in enumerate(self.shapes) if other == side and i]
        other = alike[int(self.rng.integers(len(alike)))]  # it may be the same once more
        channels = self.shapes[at][0] + self.shapes[other][0]
        if channels <= 64:
            self._put(Step("cat", [at, other], lambda a, b: [torch.cat([a, b], 1)]), (channels, side))

    def _split(self, at: int) -> None:
        channels, side = self.shapes[at]
        if channels >= 4:
            first = channels // 4  # a size that the code holds
            shapes = (first, side), (channels - first, side)
            self._put(Step("split", [at], lambda x: list(x.split([first, x.shape[1] - first], 1))), *shapes)

    def _chunk(self, at: int) -> None:
        channels, side = self.shapes[at]
        if channels % 2 == 0:
            self._put(Step("chunk", [at], lambda x: list(x.chunk(2, 1))), *[(channels // 2, side)] * 2)

    def _shuffle(self, at: int) -> None:
        channels, side = self.shapes[at]
        if channels % 2 == 0:
            self._put(Step("shuffle", [at], lambda x: [F.channel_shuffle(x, 2)]), (channels, side))

    def _gate(self, at: int) -> None:
        channels, side = self.shapes[at]
        inner = max(2, channels // 2)
        parts = nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1), nn.Sigmoid()
        gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *parts)
        self._put(Step("gate", [at], lambda x, by: [x * by(x)], gate), (channels, side))

    def _pool(self, at: int) -> None:
        channels, side = self.shapes[at]
        kind = [nn.MaxPool2d, nn.AvgPool2d][self.rng.integers(2)]
        if side >= 2:
            self._put(Step("pool", [at], _chain, kind(2)), (channels, side // 2))

    def _upsample(self, at: int) -> None:
        channels, side = self.shapes[at]
        mode = str(self.rng.choice(["nearest", "bilinear"]))
        if side < SIDE:
            self._put(Step("upsample", [at], _chain, nn.Upsample(scale_factor=2, mode=mode)), (channels, 2 * side))

    def _norm(self, at: int) -> None:
        channels, side = self.shapes[at]
        kinds = [nn.BatchNorm2d(channels), nn.InstanceNorm2d(channels, affine=True), nn.GroupNorm(1, channels)]
        kind = kinds[int(self.rng.choice(3, p=[0.6, 0.2, 0.2]))] if side > 1 else kinds[0]
        self._put(Step("norm", [at], _chain, kind), (channels, side))

    def _pixel_shuffle(self, at: int) -> None:
        channels, side = self.shapes[at]
        if channels % 4 == 0 and channels > 4 and side < SIDE:
            self._put(Step("pixel_shuffle", [at], _chain, nn.PixelShuffle(2)), (channels // 4, 2 * side))

    def _end(self) -> None:
        at = len(self.shapes) - 1
        channels, side = self.shapes[at]
        if self.rng.random() < 0.5:
            parts: list[nn.Module] = [nn.Flatten(), nn.Linear(channels * side * side, 8), nn.ReLU()]
            parts.append(nn.Linear(8, CLASSES))
        else:
            parts = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
        self._put(Step("flatten", [at], _chain, *parts), (CLASSES, 1))


def _chain(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    for module in modules:
        x = module(x)
    return [x]
