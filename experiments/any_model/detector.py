"""A detector of YOLOv8n's shape on pictures with boxes that are made here: metric mAP, COCO's mean over ten IoU.

The pictures are 128 px, up to five garments of Fashion-MNIST at 24 to 64 px pasted on a smooth coloured ground; a box
is where its ink is. The network is written from the published architecture (C2f, SPPF, a path-aggregating neck,
decoupled heads with a distribution for each side of a box); it returns the raw maps of its three strides, which the
loss and the metric decode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from checkpoints import trained
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from autoprune.core import Task
from autoprune.tasks.shipped import DATA

SIDE, CLASSES, BINS, STRIDES = 128, 10, 16, (8, 16, 32)
SIZES = (0.0, 30.0, 48.0, math.inf)  # longer sides of boxes that each stride is taught
MOST = 5  # boxes a picture


# ------------------------------------------------------------------------------------------------------ the network


class Conv(nn.Sequential):
    def __init__(self, i: int, o: int, k: int = 1, s: int = 1) -> None:
        super().__init__(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.shortcut = Conv(c, c, 3), Conv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    def __init__(self, i: int, o: int, n: int, shortcut: bool = False) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(i, o), Conv((2 + n) * (o // 2), o)
        self.m = nn.ModuleList(Bottleneck(o // 2, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.pool = Conv(c, c // 2), Conv(2 * c, c), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Head(nn.Module):
    """For each stride [B, 4 * BINS + CLASSES, H, W]: distributions of the four sides, and class logits."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        box, sort = max(16, widths[0] // 4, 4 * BINS), max(widths[0], CLASSES)
        self.box = nn.ModuleList(
            nn.Sequential(Conv(w, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * BINS, 1)) for w in widths
        )
        self.sort = nn.ModuleList(
            nn.Sequential(Conv(w, sort, 3), Conv(sort, sort, 3), nn.Conv2d(sort, CLASSES, 1)) for w in widths
        )
        for branch in self.sort:
            nn.init.constant_(branch[-1].bias, -math.log(99))  # type: ignore[index]

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        both = zip(self.box, self.sort, maps, strict=True)
        return tuple(torch.cat([box(x), sort(x)], 1) for box, sort, x in both)


class Detector(nn.Module):
    """YOLOv8n: 3.0M parameters at 80 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down1 = Conv(3, 16, 3, 2), Conv(16, 32, 3, 2)
        self.c1, self.down2, self.c2 = C2f(32, 32, 1, True), Conv(32, 64, 3, 2), C2f(64, 64, 2, True)
        self.down3, self.c3 = Conv(64, 128, 3, 2), C2f(128, 128, 2, True)
        self.down4, self.c4, self.sppf = Conv(128, 256, 3, 2), C2f(256, 256, 1, True), SPPF(256)
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.n1, self.n2 = C2f(384, 128, 1), C2f(192, 64, 1)
        self.back1, self.n3 = Conv(64, 64, 3, 2), C2f(192, 128, 1)
        self.back2, self.n4 = Conv(128, 128, 3, 2), C2f(384, 256, 1)
        self.head = Head((64, 128, 256))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        p3 = self.c2(self.down2(self.c1(self.down1(self.stem(x)))))
        p4 = self.c3(self.down3(p3))
        p5 = self.sppf(self.c4(self.down4(p4)))
        t4 = self.n1(torch.cat([self.up(p5), p4], 1))
        t3 = self.n2(torch.cat([self.up(t4), p3], 1))
        b4 = self.n3(torch.cat([self.back1(t3), t4], 1))
        b5 = self.n4(torch.cat([self.back2(b4), p5], 1))
        return self.head([t3, b4, b5])


# --------------------------------------------------------------------------------------------------- boxes and loss


def decoded(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [B, N, 4] in pixels (left, top, right, bottom), class logits [B, N, CLASSES], distributions
    [B, N, 4, BINS]."""
    boxes, logits, sides = [], [], []
    for x, stride in zip(outputs, STRIDES, strict=True):
        batch, _, height, width = x.shape
        flat = x.flatten(2).transpose(1, 2)
        side = flat[..., : 4 * BINS].reshape(batch, -1, 4, BINS)
        reach = (side.softmax(-1) * torch.arange(BINS, device=x.device, dtype=x.dtype)).sum(-1) * stride
        centre = centres(height, width, stride).to(x)
        boxes.append(torch.cat([centre - reach[..., :2], centre + reach[..., 2:]], -1))
        logits.append(flat[..., 4 * BINS :])
        sides.append(side)
    return torch.cat(boxes, 1), torch.cat(logits, 1), torch.cat(sides, 1)


def centres(height: int, width: int, stride: int) -> Tensor:
    """Of the cells of a map, in pixels: [H * W, 2], x first."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride


PLACES = torch.cat([centres(SIDE // s, SIDE // s, s) for s in STRIDES])
STRIDE = torch.cat([torch.full(((SIDE // s) ** 2,), float(s)) for s in STRIDES])
REACH = torch.tensor(list(pairwise(SIZES))).repeat_interleave(torch.tensor([(SIDE // s) ** 2 for s in STRIDES]), 0)


def assigned(target: Tensor) -> Tensor:
    """Which box each place is taught, -1 for none [B, N]: places near a box's centre at the stride for its size."""
    boxes, real = target[..., 1:], target[..., 0] >= 0
    middle, longer = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).amax(-1)
    away = (PLACES[None, :, None] - middle[:, None]).abs().amax(-1) / STRIDE[None, :, None]
    within = (longer[:, None] > REACH[None, :, :1]) & (longer[:, None] <= REACH[None, :, 1:])
    away = torch.where(within & real[:, None] & (away < 1.0), away, torch.inf)
    nearest = away.min(-1)
    return torch.where(nearest.values.isfinite(), nearest.indices, -1)


def loss(outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    """Class cross-entropy on all places; on those taught a box generalised IoU and the distributions of its sides."""
    boxes, logits, sides = decoded(outputs)
    which = assigned(target)
    taught = which >= 0
    count = max(int(taught.sum()), 1)
    wanted = target.gather(1, which.clamp(min=0)[..., None].expand(-1, -1, 5))
    classes = F.one_hot(wanted[..., 0].long().clamp(min=0), CLASSES).to(logits) * taught[..., None]
    sorting = F.binary_cross_entropy_with_logits(logits, classes, reduction="sum") / count
    if not taught.any():
        return sorting
    place, stride = PLACES.expand(*which.shape, 2)[taught], STRIDE.expand_as(which)[taught]
    box = wanted[..., 1:][taught]
    reach = torch.cat([place - box[:, :2], box[:, 2:] - place], 1) / stride[:, None]
    reach = reach.clamp(0, BINS - 1.01)
    low, part = reach.floor().long()[..., None], (reach - reach.floor())[..., None]
    chance = sides[taught].log_softmax(-1)
    shape = -(chance.gather(-1, low) * (1 - part) + chance.gather(-1, low + 1) * part)
    return sorting + 2 * (1 - generalised(boxes[taught], box)).mean() + 0.5 * shape.mean()


def generalised(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes in pairs [N, 4] (Rezatofighi et al., CVPR 2019)."""
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    return shared / union - (hull - union) / hull


# ------------------------------------------------------------------------------------------------------------- mAP


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every pair [N, M]."""
    sides = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (a, b)]
    both = sides.clamp(min=0).prod(-1)
    return both / (areas[0][:, None] + areas[1][None] - both).clamp(min=1e-9)


def found(boxes: Tensor, logits: Tensor, most: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and classes of one picture: above 0.01, overlaps of one class above 0.6 dropped."""
    scores, classes = logits.sigmoid().max(-1)
    order = scores.argsort(descending=True)[:100]
    order = order[scores[order] > 0.01]
    boxes, scores, classes = boxes[order], scores[order], classes[order]
    rivals = (overlaps(boxes, boxes) > 0.6) & (classes[:, None] == classes[None])
    kept: list[int] = []
    for i in range(len(order)):
        if len(kept) < most and not any(rivals[i, k] for k in kept):
            kept.append(i)
    return boxes[kept], scores[kept], classes[kept]


class MeanAveragePrecision(Metric):
    """COCO's mAP: precision at 101 recalls, the mean over classes and over IoU of 0.50, 0.55 ... 0.95."""

    higher_is_better = True
    full_state_update = False
    hits: list[Tensor]
    wanted: Tensor
    LIMITS = torch.arange(0.5, 0.96, 0.05)

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", [], dist_reduce_fx="cat")  # [D, 12]: class, score, right or not at each limit
        self.add_state("wanted", torch.zeros(CLASSES), dist_reduce_fx="sum")

    def update(self, outputs: tuple[Tensor, ...], target: Tensor) -> None:
        boxes, logits, _ = decoded(outputs)
        for box, logit, truth in zip(boxes, logits, target, strict=True):
            truth = truth[truth[:, 0] >= 0]
            self.wanted += torch.bincount(truth[:, 0].long(), minlength=CLASSES)
            where, scores, classes = found(box, logit)
            same = classes[:, None] == truth[None, :, 0]
            alike = overlaps(where, truth[:, 1:]) * same
            right = torch.zeros(len(where), len(self.LIMITS))
            for k, limit in enumerate(self.LIMITS):
                free = torch.ones(len(truth), dtype=torch.bool)
                for i in range(len(where)):  # by score: each takes the free box it covers best
                    best = (alike[i] * free).max(0) if len(truth) else None
                    if best is not None and best.values >= limit:
                        right[i, k], free[best.indices] = 1, False
            self.hits.append(torch.cat([classes[:, None], scores[:, None], right], 1))

    def compute(self) -> Tensor:
        hits = torch.cat(self.hits)
        return torch.stack([self._of(hits, c) for c in range(CLASSES) if self.wanted[c] > 0]).mean()

    def _of(self, hits: Tensor, c: int) -> Tensor:
        mine = hits[hits[:, 0] == c]
        right = mine[mine[:, 1].argsort(descending=True, stable=True), 2:]
        if not len(right):
            return torch.tensor(0.0)
        true = right.cumsum(0)
        precision = true / torch.arange(1, len(right) + 1)[:, None]
        precision = precision.flip(0).cummax(0).values.flip(0)
        recall = true / self.wanted[c]
        at = torch.searchsorted(recall.T.contiguous(), torch.linspace(0, 1, 101).repeat(len(self.LIMITS), 1))
        padded = torch.cat([precision, torch.zeros(1, len(self.LIMITS))])
        return padded.T.gather(1, at.clamp(max=len(right))).mean()


# ------------------------------------------------------------------------------------------------------------- data


class Scenes:
    """Batches of pictures [B, 3, SIDE, SIDE] and boxes [B, MOST, 5] (class, left, top, right, bottom; class -1 for
    none), each made from its own seed; `again`: other pictures at each pass, drawn by the global generator."""

    def __init__(self, garments: tuple[Tensor, Tensor], count: int, seed: int, *, size: int = 32, again: bool) -> None:
        self.garments, self.count, self.seed, self.size, self.again = garments, count, seed, size, again
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return self.count // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.again:
            seed = int(torch.randint(2**31, ()))
            yield from (self._batch((seed, i)) for i in range(len(self)))
            return
        if not self.kept:
            self.kept = [self._batch((self.seed, i)) for i in range(len(self))]
        yield from self.kept

    def _batch(self, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(seed)
        made = [self._scene(rng) for _ in range(self.size)]
        return torch.stack([x for x, _ in made]), torch.stack([y for _, y in made])

    def _scene(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        ground = torch.from_numpy(rng.random((1, 3, 5, 5), dtype=np.float32))
        picture = F.interpolate(ground, SIDE, mode="bilinear", align_corners=True)[0]
        picture += 0.05 * torch.from_numpy(rng.standard_normal((3, SIDE, SIDE), dtype=np.float32))
        boxes = torch.full((MOST, 5), -1.0)
        taken: list[tuple[int, int, int]] = []
        for _ in range(rng.integers(3, MOST + 1)):
            which, size = int(rng.integers(len(self.garments[0]))), int(rng.integers(24, 65))
            x, y = (int(v) for v in rng.integers(0, SIDE - size + 1, 2))
            near = any(abs(x - a) < (size + s) / 2 and abs(y - b) < (size + s) / 2 for a, b, s in taken)
            if near:
                continue
            image = F.interpolate(self.garments[0][which][None], size, mode="bilinear")[0, 0]
            ink = image > 0.15
            rows, columns = ink.any(1).nonzero()[:, 0], ink.any(0).nonzero()[:, 0]
            if not len(rows):
                continue
            tint = torch.from_numpy(rng.uniform(0.3, 1.0, (3, 1, 1)).astype(np.float32))
            patch = picture[:, y : y + size, x : x + size]
            patch.copy_(torch.where(ink, image * tint, patch))
            sides = x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1
            boxes[len(taken)] = torch.tensor([float(self.garments[1][which]), *(float(v) for v in sides)])
            taken.append((x, y, size))
        return picture - 0.5, boxes


def garments() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [N, 1, 28, 28] in [0, 1] and classes for the three splits; no garment is in two."""
    with np.load(DATA / "fashion_mnist.npz", allow_pickle=False) as archive:
        arrays = {k: torch.from_numpy(archive[k]) for k in ("x_train", "y_train", "x_test", "y_test")}
    x, y = arrays["x_train"].permute(0, 3, 1, 2) / 255, arrays["y_train"].long()
    test = arrays["x_test"].permute(0, 3, 1, 2) / 255, arrays["y_test"].long()
    return (x[:-4000], y[:-4000]), (x[-4000:], y[-4000:]), test


def make_task() -> Task:
    train, search, test = garments()
    return Task(
        name="yolov8n_garments",
        model=trained(Detector(), "detector"),
        inputs=(torch.zeros(4, 3, SIDE, SIDE),),
        train=Scenes(train, 3200, 1, again=True),
        search=Scenes(search, 640, 2, again=False),
        test=Scenes(test, 1600, 3, again=False),
        loss=loss,
        metric=MeanAveragePrecision(),
        lr=0.02,
    )
