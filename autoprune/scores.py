"""What a network scores on images of the search split, chunk by chunk, with intervals; and the file that keeps it.

The images are drawn once, stratified by class, and dealt into chunks; intervals (95 %) are Student's t over the chunks.
Where fewer are to do, they are drawn anew, more of those that decide: most images are so certain that no cut of a group
changes their loss, and a few near the border carry the change. `drawn` sorts the images by the dense network's loss
into strata of equal sums of it and draws equally many of each; what a stratum gives counts by its size (Neyman, 1934;
the loss stands for the unknown deviation of the change). On ResNet-20, 200 images of 1000 rank the cuts of single
groups as all do with a rank correlation of 0.97, and 200 drawn evenly with 0.75.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit  # Student's quantile; scipy.stats takes a second to import
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torchmetrics import Metric

from autoprune.borrowing import arguments, computing_in, to_device
from autoprune.core import InputError, Task

LOG = logging.getLogger("autoprune")
CHUNKS = 20
STRATUM = 20  # images drawn of each stratum, fewer of
STRATA = 10  # as many strata at least
LEAST = 4  # two in each half: some metrics are not defined on one image
EVEN = 0.3  # of the mean loss, added to each image's: a deep cut makes certain images lose too


@dataclass(frozen=True)
class Scored:
    """What the parts of a sample gave: the metric and loss of each [K], what each counts [K], and the metric of all."""

    score: float
    scores: tuple[float, ...]
    losses: tuple[float, ...]
    sizes: tuple[float, ...]
    seconds_in_forward: float = 0.0

    @property
    def loss(self) -> float:
        return float(np.average(self.losses, weights=self.sizes))


@dataclass(frozen=True)
class Sample:
    """Batches of (inputs, target), each cut into parts of so many images, and the images that each part [K] stands for.
    halves: whether two parts in a row are halves of one stratum."""

    batches: tuple[Any, ...]
    parts: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    halves: bool = False

    @staticmethod
    def of(chunks: Sequence[Any]) -> Sample:
        """All images of some chunks, each a part."""
        sizes = [len(arguments(inputs)[0]) for inputs, _ in chunks]
        return Sample(tuple(chunks), tuple((size,) for size in sizes), tuple(float(size) for size in sizes))

    def interval(self, values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
        """Half widths (low < 0 < high) of the 95 % interval of the mean of what the parts gave [K]."""
        if not self.halves:
            return interval(values)
        shares = np.asarray(self.weights) / sum(self.weights)
        strata, halves = shares.reshape(-1, 2).sum(1), np.asarray(values).reshape(-1, 2)
        deviation = math.sqrt(float(((strata * (halves[:, 0] - halves[:, 1]) / 2) ** 2).sum()))
        half = float(stdtrit(len(halves), 0.975)) * deviation
        return -half, half


def sign_of(metric: Metric) -> float:
    """1, or -1 where a metric is better the lower: times it, its values are better the higher."""
    return -1.0 if metric.higher_is_better is False else 1.0


def score(model: nn.Module, sample: Sample, task: Task, precision: str = "float32") -> Scored:
    """Score a network, computing in this precision. Raises FloatingPointError if a loss is not finite."""
    tally = Tally(task, next(model.parameters()).device, sample, precision)
    model.eval()
    with torch.inference_mode():
        for number in range(len(sample.batches)):
            tally.add(model, number)
    return tally.scored()


class Tally:
    """A network's losses and metric on a sample, batch by batch; its own forward pass in this precision."""

    def __init__(self, task: Task, device: torch.device, sample: Sample, precision: str = "float32") -> None:
        self._loss, self._device, self._sample, self._precision = task.loss, device, sample, precision
        self._metric = copy.deepcopy(task.metric).to(device)
        self._metric.reset()
        self._sign = sign_of(self._metric)
        self._scores: list[float] = []
        self._losses: list[float] = []
        self.forward = 0.0  # seconds

    def add(self, model: nn.Module, number: int) -> Any:
        """Run the network on a batch of the sample; returns its output."""
        inputs, target = self._sample.batches[number]
        given = arguments(inputs, self._device)
        target = to_device(target, self._device)
        began = time.perf_counter()
        output = answer(model, given, self._precision, self._device)
        self.forward += time.perf_counter() - began
        parts = self._sample.parts[number]
        for outputs, targets in (
            [(output, target)] if len(parts) == 1 else zip(split(output, parts), split(target, parts), strict=True)
        ):
            self._losses.append(float(self._loss(outputs, targets)))
            self._scores.append(self._sign * float(self._metric(outputs, targets)))
        return output

    def scored(self) -> Scored:
        """Raises FloatingPointError if a loss or the metric is not finite."""
        if not all(math.isfinite(value) for value in self._losses):
            raise FloatingPointError("the loss on the search split is not finite")
        total = self._sign * float(self._metric.compute())
        if self._sample.halves and all(math.isfinite(value) for value in self._scores):
            total = float(np.average(self._scores, weights=self._sample.weights))
        if not math.isfinite(total):
            raise FloatingPointError("the metric on the search split is not finite")
        return Scored(total, tuple(self._scores), tuple(self._losses), self._sample.weights, self.forward)


def answer(model: nn.Module, given: tuple[Any, ...], precision: str, device: torch.device) -> Any:
    """What the network gives, computed in this precision; floats are float32 at least.

    Raises:
        InputError: it gives something that these cannot be found in.
    """
    if precision == "float32":
        return model(*given)
    with computing_in(precision, device):
        output = model(*given)
    for leaf in tree_leaves(output):
        if not isinstance(leaf, Tensor | int | float | str | None):
            raise InputError(
                f"evaluator.precision={precision} takes outputs in tuples, lists and mappings, and the model gives a "
                f"{type(leaf).__name__}: evaluator.precision=float32 takes any"
            )
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x, output)


def split(value: Any, parts: Sequence[int]) -> list[Any]:
    """What a batch holds an image, cut into parts of so many images: tensors along their first dimension, and lists.

    Raises:
        ValueError: it is something else, or of another length.
    """
    whole = sum(parts)

    def cut(leaf: Any) -> list[Tensor]:
        if not (isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == whole):
            raise ValueError("not one entry an image")
        return list(leaf.split(list(parts)))

    if isinstance(value, list) and len(value) == whole:  # one entry an image, as detectors have
        ends = np.cumsum([0, *parts])
        return [value[a:b] for a, b in pairwise(ends.tolist())]
    leaves, form = tree_flatten(value)
    return [tree_unflatten(list(each), form) for each in zip(*(cut(leaf) for leaf in leaves), strict=True)]


def losses_by_image(model: nn.Module, sample: Sample, task: Task) -> NDArray[np.float64] | None:
    """The loss of each image [N]; None where a batch's loss is not the mean of its images'."""
    device = next(model.parameters()).device
    found: list[float] = []
    model.eval()
    with torch.inference_mode():
        for inputs, target in sample.batches:
            given, target = arguments(inputs, device), to_device(target, device)
            output, ones = model(*given), [1] * len(given[0])
            try:
                pairs = zip(split(output, ones), split(target, ones), strict=True)
                each = [float(task.loss(outputs, targets)) for outputs, targets in pairs]
            except Exception:  # noqa: BLE001, a loss of the user's that is not for one image
                return None
            if not np.isclose(np.mean(each), float(task.loss(output, target)), rtol=1e-3, atol=1e-6):
                return None
            found += each
    return np.asarray(found)


def drawn(chunks: Sequence[Any], losses: NDArray[np.float64], images: int, seed: int) -> Sample:
    """Some `images` of chunks that hold 2 x STRATUM at least, about as many of each of the strata, which have equal
    sums of the dense network's loss by image [N]."""
    key = np.maximum(losses, 0) + EVEN * np.abs(losses).mean() + 1e-12
    size = min(STRATUM, max(LEAST, images // (2 * STRATA) * 2))
    strata = _strata(key, max(images // size, 1), size)
    rng = np.random.default_rng(seed)
    chosen, weights = [], []
    for stratum in strata:
        taken = rng.choice(stratum, min(size, len(stratum)), replace=False)
        halves = np.array_split(taken, 2)
        chosen += halves
        weights += [len(stratum) * len(half) / len(taken) for half in halves]
    together = max(len(arguments(chunks[0][0])[0]) // size, 1) * 2
    joined = Joined.of(chunks)
    batches = [chosen[i : i + together] for i in range(0, len(chosen), together)]
    return Sample(
        batches=tuple(joined.rows(torch.from_numpy(np.concatenate(halves))) for halves in batches),
        parts=tuple(tuple(len(half) for half in halves) for halves in batches),
        weights=tuple(weights),
        halves=True,
    )


def _strata(key: NDArray[np.float64], count: int, least: int) -> list[NDArray[np.int64]]:
    """Images by falling key, in strata of nearly equal sums of it, each of so many images at least."""
    left, strata = np.argsort(-key, kind="stable"), []
    for more in range(count, 0, -1):
        sums = np.cumsum(key[left])
        size = len(left) if more == 1 else max(least, int(np.searchsorted(sums, sums[-1] / more)) + 1)
        if len(left) - size < LEAST:
            size = len(left)
        strata.append(left[:size])
        left = left[size:]
        if not len(left):
            break
    return strata


def interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Half widths (low < 0 < high) of the 95 % interval of the mean over chunks."""
    k = len(values)
    half = float(stdtrit(k - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(k)) if k > 1 else math.inf
    return -half, half


def subset(batches: Iterable[Any], images: int, seed: int) -> list[Any]:
    """A fixed subset of a split in K chunks, stratified where the target is one class an image."""
    joined = Joined.of(list(batches))
    chosen = torch.from_numpy(stratified(joined.target, len(joined), min(images, len(joined)), seed))
    return [joined.rows(part) for part in chosen.tensor_split(min(CHUNKS, len(chosen)))]


@dataclass(frozen=True)
class Joined:
    """The batches of a split as one."""

    inputs: tuple[Tensor, ...]
    target: Any
    by_image: bool  # the target is a list of one entry an image, as detectors have

    @staticmethod
    def of(batches: Sequence[Any]) -> Joined:
        """Raises InputError if there are none, or they cannot be joined."""
        if not batches:
            raise InputError("task.search is empty: hold some images out of the training split for the search")
        whole = [arguments(x) for x, _ in batches]
        targets = [y for _, y in batches]
        by_image = all(isinstance(y, list) and len(y) == len(x[0]) for x, y in zip(whole, targets, strict=True))
        try:
            inputs = tuple(torch.cat(parts) for parts in zip(*whole, strict=True))
            if by_image:
                return Joined(inputs, [entry for y in targets for entry in y], by_image)
            return Joined(inputs, tree_map(lambda *parts: torch.cat(parts), *targets), by_image)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"task.search: its batches cannot be joined ({str(error).splitlines()[0]})") from error

    def __len__(self) -> int:
        return len(self.inputs[0])

    def rows(self, chosen: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """A batch of these images."""
        inputs = tuple(x[chosen.to(x.device)] for x in self.inputs)
        if self.by_image:
            return inputs, [self.target[i] for i in chosen.tolist()]
        return inputs, tree_map(lambda y: y[chosen.to(y.device)], self.target)


def stratified(target: Any, total: int, count: int, seed: int) -> NDArray[np.int64]:
    """`count` image numbers; each class in proportion, and every chunk of consecutive ones alike."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(total)
    if isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point():
        classes = target.cpu().numpy()[order]
        rank_in_class = np.zeros(total)
        for c in np.unique(classes):
            members = np.flatnonzero(classes == c)
            rank_in_class[members] = (np.arange(len(members)) + rng.random()) / len(members)
        order = order[np.argsort(rank_in_class, kind="stable")]
    return np.asarray(order[:count], dtype=np.int64)
