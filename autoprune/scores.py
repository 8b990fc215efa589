"""What a network scores on images of the search split, chunk by chunk, with intervals; and the file that keeps it.

The images are drawn once, stratified by class, and dealt into chunks; intervals (95 %) are Student's t over the chunks.

Letters: K chunks.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoprune.borrowing import arguments, to_device
from autoprune.core import InputError, Task

CHUNKS = 20


@dataclass(frozen=True)
class Scored:
    """What the chunks gave: the metric and loss of each [K], and the metric over all images."""

    score: float
    scores: tuple[float, ...]
    losses: tuple[float, ...]
    sizes: tuple[int, ...]
    seconds_in_forward: float = 0.0

    @property
    def loss(self) -> float:
        return float(np.average(self.losses, weights=self.sizes))


def score(model: nn.Module, chunks: Sequence[Any], task: Task) -> Scored:
    """Score a network on chunks of (inputs, target). Raises FloatingPointError if a loss is not finite."""
    device = next(model.parameters()).device
    tally = Tally(task, device)
    model.eval()
    with torch.inference_mode():
        for inputs, target in chunks:
            tally.add(model, inputs, to_device(target, device))
    return tally.scored()


class Tally:
    """A network's losses and metric, chunk by chunk."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._loss, self._device = task.loss, device
        self._metric = copy.deepcopy(task.metric).to(device)
        self._metric.reset()
        self._sign = -1.0 if self._metric.higher_is_better is False else 1.0
        self._scores: list[float] = []
        self._losses: list[float] = []
        self._sizes: list[int] = []
        self.forward = 0.0  # seconds

    def add(self, model: nn.Module, inputs: Any, target: Any) -> Any:
        """Run the network on a chunk; returns its output."""
        given = arguments(inputs, self._device)
        began = time.perf_counter()
        output = model(*given)
        self.forward += time.perf_counter() - began
        self._losses.append(float(self._loss(output, target)))
        self._scores.append(self._sign * float(self._metric(output, target)))
        self._sizes.append(len(given[0]))
        return output

    def scored(self) -> Scored:
        """Raises FloatingPointError if a loss or the metric is not finite."""
        if not all(math.isfinite(value) for value in self._losses):
            raise FloatingPointError("the loss on the search split is not finite")
        total = float(self._metric.compute())
        if not math.isfinite(total):
            raise FloatingPointError("the metric on the search split is not finite")
        return Scored(self._sign * total, tuple(self._scores), tuple(self._losses), tuple(self._sizes), self.forward)


def interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Half widths (low < 0 < high) of the 95 % interval of the mean over chunks."""
    k = len(values)
    half = float(student.ppf(0.975, k - 1) * np.std(values, ddof=1) / math.sqrt(k)) if k > 1 else math.inf
    return -half, half


def subset(batches: Iterable[Any], images: int, seed: int) -> list[Any]:
    """A fixed subset of a split in K chunks, stratified where the target is one class an image."""
    gathered = list(batches)
    if not gathered:
        raise InputError("task.search is empty: hold some images out of the training split for the search")
    whole = [arguments(x) for x, _ in gathered]
    targets = [y for _, y in gathered]
    per_image = all(isinstance(y, list) and len(y) == len(x[0]) for x, y in zip(whole, targets, strict=True))
    try:
        inputs = tuple(torch.cat(parts) for parts in zip(*whole, strict=True))
        if per_image:  # one entry an image, as detectors have
            target: Any = [entry for y in targets for entry in y]
        else:
            target = tree_map(lambda *parts: torch.cat(parts), *targets)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"task.search: its batches cannot be joined ({str(error).splitlines()[0]})") from error
    total = len(inputs[0])
    chosen = torch.from_numpy(stratified(target, total, min(images, total), seed))
    parts = chosen.tensor_split(min(CHUNKS, len(chosen)))
    if per_image:
        return [(tuple(x[p] for x in inputs), [target[i] for i in p.tolist()]) for p in parts]
    return [(tuple(x[p] for x in inputs), tree_map(lambda y, p=p: y[p], target)) for p in parts]


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


def read_cached(path: Path | None) -> Scored | None:
    """What was written there; None where nothing was, or where it is damaged."""
    if path is None:
        return None
    try:
        values = json.loads(path.read_text())
        return Scored(
            score=float(values["score"]),
            scores=tuple(values["scores"]),
            losses=tuple(values["losses"]),
            sizes=tuple(values["sizes"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None  # absent or damaged: scored again and rewritten


def write_cached(path: Path | None, scored: Scored) -> None:
    """Keep scores; where that cannot be done the log says so."""
    if path is None:
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(scored)))
        temporary.replace(path)
    except OSError as error:  # a score is worth more than its copy
        logging.getLogger("autoprune").warning("the cache in %s cannot be written: %s", path.parent, error)
