"""Candidates become trials here: prune, recover, score, cost. A failed candidate is a trial with its error.

Every candidate sees the same images in the same order. The search split's subset is drawn once, stratified by class,
and dealt into chunks; intervals (95 %) are Student's t over the chunks, and the loss change from the dense model is
paired chunk by chunk, which narrows it about fifteen-fold in variance.

Letters: N images, K chunks.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.borrowing import arguments, first, seeded, to_device
from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    DeviceLostError,
    Glancing,
    InputError,
    Measurement,
    Meter,
    Task,
    Trial,
    all_met,
    check_rules,
)
from autoprune.criteria import Scores
from autoprune.lineage import Networks, check_nested
from autoprune.prune import choose_units, weights_hash
from autoprune.reconstruct import Reconstruction
from autoprune.recover import HEALING, FineTune, check_healing, finetune, recalibrate
from autoprune.traced import TracedModel, tensors_of
from autoprune.units import Labels

CHUNKS = 20


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How candidates are scored: `images` of the search split, what a cut network gets first, `recalibration` training
    batches for it, the short fine-tune, and the device ("cpu", "cuda") that computes all this.

    recovery: of "reconstruct", which refits what reads pruned units to what it gave in the network that this one is cut
    from (reconstruct.py), and then "bn_recalibrate", which takes new batch normalisation statistics.
    """

    images: int = 1000
    recalibration: int = 4
    recovery: Sequence[str] = HEALING
    short: FineTune = FineTune(epochs=0.25, teach=0.0)
    device: str = "cpu"

    def __post_init__(self) -> None:
        rules = {"images >= 2": self.images >= 2, "recalibration >= 0": self.recalibration >= 0}
        check_rules("evaluator", rules, vars(self))
        check_healing("evaluator", self.recovery)


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


class Evaluator:
    """Candidates in, trials out, in order and one by one. Holds the dense model, never changes it."""

    def __init__(
        self,
        task: Task,
        traced: TracedModel,
        importance: Sequence[Scores],
        *,
        budgets: Sequence[Budget],
        costs: Mapping[str, CostModel],
        meters: Mapping[str, Meter],
        scoring: Scoring,
        seed: int,
        cache: Path | None,
    ) -> None:
        self.task, self.traced, self.importance = task, traced, importance
        self.budgets, self.costs, self.meters = tuple(budgets), costs, meters
        self.scoring, self.seed, self.cache = scoring, seed, cache
        device = scoring.device
        self.dense_model = copy.deepcopy(task.model).to(device).eval()
        with seeded(seed):
            self.chunks = to_device(_subset(task.search, scoring.images, seed), device)
            self.recalibration = to_device(first(task.train, scoring.recalibration), device)
        self._dense: Scored | None = None
        self._known: dict[int, Candidate] = {}
        self._digests: dict[Candidate, str] = {}
        self._networks: Networks | None = None
        self._reconstruction: tuple[str | None, Reconstruction] | None = None
        self.hits = self.evaluations = 0

    def remember(self, history: Iterable[Trial], networks: Networks | None) -> None:
        """Earlier trials, which may be named as parents, and where fine-tuned networks are kept for their children."""
        self._known |= {trial.number: trial.candidate for trial in history}
        self._networks = networks

    def __call__(self, batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        batch = list(batch)
        self._known |= dict(batch)
        self._forget({candidate.parent for _, candidate in batch if candidate.parent is not None})
        for number, candidate in batch:
            began = time.perf_counter()
            try:
                trial = self._evaluate(number, candidate)
            except DeviceLostError:
                raise
            except Exception as error:  # noqa: BLE001, a failed candidate is a trial with its error
                trial = Trial(number=number, candidate=candidate, error=f"{type(error).__name__}: {error}")
            yield replace(trial, seconds=time.perf_counter() - began)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What every score depends on besides the candidate. The dense model's own losses and scores stand for the
        task's loss and metric, which have no name that tells two settings apart."""
        dense = self.dense()
        return {
            "autoprune": version("autoprune"),
            "task": self.task.name,
            "weights": weights_hash(self.task.model),
            "architecture": self.traced.fingerprint,
            "data": _hash_tensors([self.chunks, self.recalibration]),
            "training batches": _count(self.task.train),
            "lr": self.task.lr,
            "metric": type(self.task.metric).__name__,
            "dense": hashlib.sha256(repr((dense.losses, dense.scores)).encode()).hexdigest()[:16],
            "scoring": asdict(self.scoring),
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def dense(self) -> Scored:
        """The dense model's scores on the same images."""
        if self._dense is None:
            self._dense = self.scored(self.dense_model)
        return self._dense

    def scored(self, model: nn.Module) -> Scored:
        """Any network's scores on the same images."""
        return score(model, self.chunks, self.task)

    def cut(self, ratios: Sequence[float]) -> nn.Module:
        """The network at these ratios, not recovered."""
        return self.traced.cut(self.dense_model, self._units(ratios)).eval()

    def recovered(self, candidate: Candidate) -> nn.Module:
        """The candidate's network, cut from the dense network or its parent's and recovered as it asks."""
        kept = self._units(candidate.ratios)
        if stored := self._stored(candidate):
            return self.traced.cut(self.traced.spread(self.dense_model, stored, kept), kept).eval()
        source = self.dense_model if candidate.parent is None else self._spread(candidate.parent, kept)
        model = self.traced.cut(source, kept).eval()
        if candidate.recovery != "none":
            if "reconstruct" in self.scoring.recovery:
                self._reconstruct(model, kept, source, candidate.parent)
            if "bn_recalibrate" in self.scoring.recovery:
                recalibrate(model, self.recalibration)
        if candidate.recovery == "short":
            with seeded(self.seed):
                finetune(
                    model,
                    self.task.train,
                    self.scoring.short,
                    loss=self.task.loss,
                    lr=self.task.lr,
                    teacher=self.dense_model,
                )
            self._keep(candidate, model)  # a lesser recovery is made again in a moment
        return model

    def _reconstruct(self, model: nn.Module, kept: Sequence[Labels], source: nn.Module, parent: int | None) -> None:
        """Refit a network that was cut from source, the parent's or the dense one; what is known of the last source is
        kept, as a round's candidates have one parent."""
        digest = None if parent is None else self._digest(self._candidate(parent))
        if self._reconstruction is None or self._reconstruction[0] != digest:
            self._reconstruction = None  # two at once would take twice the memory
            made = Reconstruction(source, self.traced, self.recalibration, seed=self.seed)
            self._reconstruction = digest, made
        self._reconstruction[1].apply(model, kept)

    def _spread(self, parent: int, kept: Sequence[Labels]) -> nn.Module:
        """A network of the dense one's shape that computes what the parent's recovered one does.

        Raises:
            ValueError: a unit is to be kept that the parent has lost.
        """
        earlier = self._candidate(parent)
        tensors = self._stored(earlier)
        if tensors is None:
            made = self.recovered(earlier)
            self._keep(earlier, made)  # whatever its recovery: it is needed for every child
            tensors = dict(tensors_of(made))
        older = self._units(earlier.ratios)
        check_nested(self.traced.space, older, kept)
        return self.traced.spread(self.dense_model, tensors, older).eval()

    def _stored(self, candidate: Candidate) -> Mapping[str, Tensor] | None:
        return None if self._networks is None else self._networks.get(self._digest(candidate))

    def _keep(self, candidate: Candidate, model: nn.Module) -> None:
        if self._networks is not None:
            self._networks.put(self._digest(candidate), model)

    def _forget(self, parents: Collection[int]) -> None:
        """Once a batch names its parents, only they and their children are likely to be asked for again."""
        if self._networks is None or not parents:
            return
        family = set()
        for number, candidate in self._known.items():
            if number in parents or candidate.parent in parents:
                with suppress(ValueError):  # what is no candidate at all becomes a failed trial
                    family.add(self._digest(candidate))
        self._networks.retain(family)

    def _candidate(self, number: int) -> Candidate:
        if number not in self._known:
            raise ValueError(f"parent {number} is not among the trials so far")
        return self._known[number]

    def _units(self, ratios: Sequence[float]) -> tuple[Labels, ...]:
        return choose_units(self.traced.space, self.importance, ratios)

    def _evaluate(self, number: int, candidate: Candidate) -> Trial:
        ratios = self.traced.space.check(candidate.ratios)
        path = self._cache_path(candidate)
        model, scored = None, _read_cached(path)
        cached = scored is not None
        if scored is None:
            self.evaluations += 1
            began = time.perf_counter()
            model = self.recovered(candidate)
            healing = time.perf_counter() - began
            scored = self.scored(model)
            scored = replace(scored, seconds_in_forward=scored.seconds_in_forward + healing)
            _write_cached(path, scored)
        else:
            self.hits += 1
        expected = {name: m.predict(ratios) for name, m in self.costs.items()}
        if candidate.measure:
            costs = self.measured(model or self.cut(ratios), glance=candidate.glance)
        else:
            costs = {n: Measurement.exact(expected[n], m.unit, "predicted") for n, m in self.costs.items()}
        low, high = _interval(scored.scores)
        change = np.subtract(scored.losses, self.dense().losses)
        change_low, change_high = _interval(change)
        return Trial(
            number=number,
            candidate=candidate,
            score=scored.score,
            score_low=scored.score + low,
            score_high=scored.score + high,
            loss=scored.loss,
            loss_change=Measurement(
                value=scored.loss - self.dense().loss,
                unit="loss",
                low=scored.loss - self.dense().loss + change_low,
                high=scored.loss - self.dense().loss + change_high,
                samples=sum(scored.sizes),
                kind="measured",
                notes=("paired with the dense model",),
            ),
            costs=costs,
            predicted=expected if candidate.measure else {},
            feasible=all_met(self.budgets, costs),
            seconds_in_forward=0.0 if cached else scored.seconds_in_forward,
            cached=cached,
        )

    def measured(self, model: nn.Module, *, glance: bool = False) -> dict[str, Measurement]:
        """Every cost of a network, counted or measured; at a glance where the meter knows how."""
        inputs = to_device(self.task.inputs, self.scoring.device)
        brief = {name: meter.glance() for name, meter in self.meters.items() if glance and isinstance(meter, Glancing)}
        return {name: meter.measure(model, inputs) for name, meter in {**self.meters, **brief}.items()}

    def _cache_path(self, candidate: Candidate) -> Path | None:
        """Where this candidate's scores are kept: a name made of everything that they depend on."""
        return None if self.cache is None else self.cache / f"{self._digest(candidate)}.json"

    def _digest(self, candidate: Candidate) -> str:
        """A name made of everything that a candidate's network and its scores depend on, the same of its parent."""
        if candidate not in self._digests:
            parent = candidate.parent
            content = {
                **{key: value for key, value in self.identity.items() if key != "task"},
                "kept": [units.tolist() for units in self._units(candidate.ratios)],
                "recovery": candidate.recovery,
                "parent": None if parent is None else self._digest(self._candidate(parent)),
            }
            self._digests[candidate] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        return self._digests[candidate]


def score(model: nn.Module, chunks: Sequence[Any], task: Task) -> Scored:
    """Score a network on chunks of (inputs, target). Raises FloatingPointError if a loss is not finite."""
    metric = copy.deepcopy(task.metric)
    metric.reset()
    device = next(model.parameters()).device
    metric.to(device)
    sign = -1.0 if metric.higher_is_better is False else 1.0
    scores, losses, sizes, forward = [], [], [], 0.0
    model.eval()
    with torch.inference_mode():
        for inputs, target in chunks:
            given, target = arguments(inputs, device), to_device(target, device)
            began = time.perf_counter()
            output = model(*given)
            forward += time.perf_counter() - began
            losses.append(float(task.loss(output, target)))
            scores.append(sign * float(metric(output, target)))
            sizes.append(len(given[0]))
    if not all(math.isfinite(value) for value in losses):
        raise FloatingPointError("the loss on the search split is not finite")
    total = float(metric.compute())
    if not math.isfinite(total):
        raise FloatingPointError("the metric on the search split is not finite")
    return Scored(sign * total, tuple(scores), tuple(losses), tuple(sizes), forward)


def _interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Half widths (low < 0 < high) of the 95 % interval of the mean over chunks."""
    k = len(values)
    half = float(student.ppf(0.975, k - 1) * np.std(values, ddof=1) / math.sqrt(k)) if k > 1 else math.inf
    return -half, half


def _subset(batches: Iterable[Any], images: int, seed: int) -> list[Any]:
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
    chosen = torch.from_numpy(_stratified(target, total, min(images, total), seed))
    parts = chosen.tensor_split(min(CHUNKS, len(chosen)))
    if per_image:
        return [(tuple(x[p] for x in inputs), [target[i] for i in p.tolist()]) for p in parts]
    return [(tuple(x[p] for x in inputs), tree_map(lambda y, p=p: y[p], target)) for p in parts]


def _stratified(target: Any, total: int, count: int, seed: int) -> NDArray[np.int64]:
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


def _hash_tensors(values: Any) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(values):
        digest.update(
            leaf.detach().cpu().contiguous().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode()
        )
    return digest.hexdigest()[:16]


def _read_cached(path: Path | None) -> Scored | None:
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


def _write_cached(path: Path | None, scored: Scored) -> None:
    if path is None:
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(asdict(scored)))
        temporary.replace(path)
    except OSError as error:  # a score is worth more than its copy
        logging.getLogger("autoprune").warning("the cache in %s cannot be written: %s", path.parent, error)


def _count(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None
