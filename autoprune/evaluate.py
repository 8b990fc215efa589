"""Candidates become trials here: prune, recover, score, cost. A failed candidate is a trial with its error.

Every candidate sees the same images in the same order (scores.py); its loss change from the dense model is paired chunk
by chunk, which narrows it about fifteen-fold in variance.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune import __version__
from autoprune.borrowing import fingerprint, first, seeded, threads, to_device
from autoprune.cache import read_cached, write_cached
from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    DeviceLostError,
    Glancing,
    Measurement,
    Meter,
    Recovery,
    StorageError,
    Task,
    Trial,
    all_met,
    check_rules,
)
from autoprune.criteria import Scores
from autoprune.healer import Care, Healer, part
from autoprune.lineage import Networks
from autoprune.prune import weights_hash
from autoprune.recipe import RECOVERY, Entry, Recipe
from autoprune.recover import FineTune, anchored
from autoprune.scores import STRATUM, Sample, Scored, drawn, losses_by_image, score, subset
from autoprune.shared_prefix import Beside, Outcome, SharedPrefix
from autoprune.traced import TracedModel
from autoprune.units import Labels
from autoprune.writing import is_full

LOG = logging.getLogger("autoprune")
Likeness = tuple[int | None, Recovery, float]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How candidates are scored: `images` of the search split, what a cut network gets first, `recalibration` training
    batches for it, the settings of short fine-tunes, and the device ("cpu", "cuda") that computes all this, on so many
    `threads` of the CPU: the same however many workers there are (workers.py), so that the same trials come out.

    recovery: the steps of Recipe.of, in their order; those that train are left out of a "probe".
    precision: "float32", or "bfloat16" for the forward passes that score, not for those that heal and train.
    shared_prefix: what candidates of one batch have in common runs once (shared_prefix.py), with the same results.
    """

    images: int = 1000
    recalibration: int = 4
    recovery: Sequence[Entry] = RECOVERY
    short: FineTune = FineTune(epochs=0.25)
    device: str = "cpu"
    threads: int = 1
    precision: str = "float32"
    shared_prefix: bool = True

    def __post_init__(self) -> None:
        rules = {
            "images >= 2": self.images >= 2,
            "recalibration >= 0": self.recalibration >= 0,
            "precision must be float32 or bfloat16": self.precision in ("float32", "bfloat16"),
            "threads must be a whole number, 1 or more": isinstance(self.threads, int) and self.threads >= 1,
        }
        check_rules("evaluator", rules, vars(self))
        self.recipe  # noqa: B018, checks it

    @functools.cached_property
    def recipe(self) -> Recipe:
        """What candidates get."""
        return Recipe.of("evaluator", self.recovery, self.short)


@dataclass(frozen=True)
class Parcel:
    """Candidates for an evaluator in another process, by number, the earlier ones that they come from, and what is kept
    of networks, by digest; None where none are kept."""

    batch: tuple[tuple[int, Candidate], ...]
    known: Mapping[int, Candidate]
    networks: Mapping[str, Mapping[str, Tensor]] | None


@dataclass(frozen=True)
class Evaluated:
    """What came of one of them: the trial, the networks to keep, and the dense networks' FLOPs that were saved."""

    trial: Trial
    networks: Mapping[str, Mapping[str, Tensor]]
    saved: float


class Evaluator:
    """Candidates in, trials out, in order and one by one. Holds the dense model, never changes it.

    anchored: whether its batch normalisation statistics were of other data and are replaced (recover.anchored).
    """

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
        with seeded(seed):
            self.chunks = to_device(subset(task.search, scoring.images, seed), device)
            self.recalibration = to_device(first(task.train, scoring.recalibration), device)
        given = copy.deepcopy(task.model).to(device).eval()
        self.dense_model = anchored(given, self.recalibration, task.loss)
        self.anchored = self.dense_model is not given
        care = Care(scoring.recipe, self.recalibration, seed)
        self.healer = Healer(task, traced, importance, self.dense_model, care, self._digest)
        self._dense: dict[float, Scored] = {}
        self._samples: dict[float, Sample] = {}
        self._scored: dict[Candidate, Trial] = {}
        self._digests: dict[Candidate, str] = {}
        self._prefix: SharedPrefix | None = None
        self._saved_elsewhere = 0.0
        self.hits = self.evaluations = 0

    def remember(self, history: Iterable[Trial], networks: Networks | None) -> None:
        """Earlier trials, which may be parents and are not scored again, and where networks are kept for children."""
        for trial in history:
            self.healer.known[trial.number] = trial.candidate
            self._add(trial)
        self.healer.networks = networks

    def _add(self, trial: Trial) -> None:
        if trial.error is None:
            self._scored.setdefault(_plain(trial.candidate), trial)

    def knows(self, candidate: Candidate) -> bool:
        """Whether the candidate was scored already, measured or not."""
        return _plain(candidate) in self._scored

    def __call__(self, batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        batch = list(batch)
        self.expect(batch)
        yield from self.trials(batch)

    def trials(self, batch: Sequence[tuple[int, Candidate]]) -> Iterator[Trial]:
        """Of candidates that are expected."""
        known = self.healer.known
        beside = Beside(self._blocks(batch), lambda n, scored: write_cached(self._cache_path(known[n]), scored))
        for number, candidate in batch:
            with threads(self.scoring.threads):
                outcome = beside.of(number)
                began = time.perf_counter()
                try:
                    trial = self._evaluate(number, candidate, outcome)
                except (DeviceLostError, StorageError):
                    raise
                except Exception as error:  # a failed candidate is a trial with its error
                    if is_full(error):
                        raise StorageError(f"the disk is full: {error}") from error
                    trial = Trial(number=number, candidate=candidate, error=f"{type(error).__name__}: {error}")
            seconds = 0.0 if outcome is None else outcome.seconds
            trial = replace(trial, seconds=seconds + time.perf_counter() - began)
            self._add(trial)
            yield trial

    def expect(self, batch: Sequence[tuple[int, Candidate]]) -> None:
        """These will be asked for, or their children: of kept networks only those are kept on that they come from."""
        self.healer.known |= dict(batch)
        self.healer.retain({candidate.parent for _, candidate in batch if candidate.parent is not None})

    def elsewhere(self) -> Evaluator:
        """One for another process, with the same trials: without the meters, and without the splits that it has no
        business with."""
        self.identity  # noqa: B018, found here, where the given model and the search split are
        there = copy.copy(self)
        past = self.task.past and replace(self.task.past, early=None)
        there.task = replace(self.task, model=nn.Identity(), search=(), test=(), past=past)
        there.meters, there.hits, there.evaluations = {}, 0, 0
        there._scored, there._digests, there._prefix = {}, {}, None
        there.healer = self.healer.elsewhere(there._digest)
        return there

    def alike(self, batch: Sequence[tuple[int, Candidate]]) -> list[list[tuple[int, Candidate]]]:
        """A batch in parts: those that may be scored together, each other one for itself."""
        parts: dict[object, list[tuple[int, Candidate]]] = defaultdict(list)
        for number, candidate in batch:
            like = self._likeness(candidate)
            parts[like or number].append((number, candidate))
        return list(parts.values())

    def parcel(self, batch: Sequence[tuple[int, Candidate]]) -> Parcel:
        """These, with what an evaluator elsewhere must know of where they come from."""
        known: dict[int, Candidate] = {}
        networks: dict[str, Mapping[str, Tensor]] = {}
        healer = self.healer
        parents = healer.parents(candidate for _, candidate in batch)
        older = parents
        while older.keys() - known.keys():
            known |= older
            older = healer.parents(older.values())
        for number, parent in parents.items() if healer.networks is not None else ():
            with suppress(Exception):  # what cannot be made fails with each of its children
                if healer.stored(parent) is None:
                    healer.spread(number)  # once, here
                if tensors := healer.stored(parent):
                    networks[self._digest(parent)] = tensors
        return Parcel(tuple(batch), known, None if healer.networks is None else networks)

    def evaluated(self, parcel: Parcel) -> Iterator[Evaluated]:
        """Trials of what another process's evaluator sent."""
        networks = Networks(None)
        for digest, tensors in (parcel.networks or {}).items():
            networks.add(digest, tensors)
        self.healer.known, self.healer.networks = dict(parcel.known), None if parcel.networks is None else networks
        self._scored.clear()
        sent, saved = set(networks.in_memory()), self._saved_here
        for trial in self(parcel.batch):
            made = {digest: t for digest, t in networks.in_memory().items() if digest not in sent}
            yield Evaluated(trial, made, self._saved_here - saved)
            sent, saved = sent | made.keys(), self._saved_here

    def took(self, evaluated: Evaluated) -> Trial:
        """A trial that came from another process."""
        trial = replace(evaluated.trial, candidate=self.healer.known[evaluated.trial.number])
        self._add(trial)
        self.hits += trial.cached
        self.evaluations += not trial.cached
        self._saved_elsewhere += evaluated.saved
        if self.healer.networks is not None:
            for digest, tensors in evaluated.networks.items():
                self.healer.networks.add(digest, tensors)
        return trial

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What every score depends on besides the candidate. The dense model's own losses and scores stand for the
        task's loss and metric, which have no name that tells two settings apart."""
        dense = self.dense()
        return {
            "autoprune": __version__,
            "task": self.task.name,
            "weights": weights_hash(self.task.model),
            "architecture": self.traced.fingerprint,
            "units": ["+".join(self.traced.grain), *(group.size for group in self.traced.space.groups)],
            "data": fingerprint([self.chunks, self.recalibration]),
            "training batches": _count(self.task.train),
            "lr": self.task.lr,
            "metric": type(self.task.metric).__name__,
            "dense": hashlib.sha256(repr((dense.losses, dense.scores)).encode()).hexdigest()[:16],
            "past": self._rewound_to(),
            "scoring": {name: value for name, value in asdict(self.scoring).items() if name != "shared_prefix"},
            "seed": self.seed,
            "torch": torch.__version__,
        }

    def _rewound_to(self) -> list[float]:
        """What a rewound schedule follows, where some step of the recovery has one."""
        past, plans = self.task.past, [step.plan for step in self.scoring.recipe.steps if step.plan]
        if past is None or not any(plan.schedule == "rewound" for plan in plans):
            return []
        return [past.epochs, *(past.schedule(done / 64) for done in range(65))]

    @property
    def shared(self) -> float:
        """The fraction of the forward passes of all that was evaluated that ran once for many, by FLOPs."""
        return (self._saved_here + self._saved_elsewhere) / max(self.evaluations, 1)

    @property
    def _saved_here(self) -> float:
        return self._prefix.saved if self._prefix else 0.0

    def dense(self, fidelity: float = 1.0) -> Scored:
        """The dense model's scores on the same images."""
        if fidelity not in self._dense:
            self._dense[fidelity] = self.scored(self.dense_model, fidelity)
        return self._dense[fidelity]

    def scored(self, model: nn.Module, fidelity: float = 1.0) -> Scored:
        """Any network's scores on the same images."""
        with threads(self.scoring.threads):
            return score(model, self._sample(fidelity), self.task, self.scoring.precision)

    def _sample(self, fidelity: float) -> Sample:
        """What candidates of this fidelity are scored on."""
        if fidelity not in self._samples:
            self._samples[fidelity] = Sample.of(self.chunks) if fidelity == 1 else self._drawn(fidelity)
        return self._samples[fidelity]

    def _drawn(self, fidelity: float) -> Sample:
        """A fraction of the images, those that decide where the dense network's loss on each tells."""
        losses = losses_by_image(self.dense_model, self._sample(1.0), self.task)
        if losses is None:
            return Sample.of(part(self.chunks, fidelity))
        if len(losses) < 2 * STRATUM:
            return self._sample(1.0)
        return drawn(self.chunks, losses, round(fidelity * len(losses)), self.seed)

    def recovered(self, candidate: Candidate) -> nn.Module:
        """The candidate's network, cut from the dense network or its parent's and recovered as it asks."""
        with threads(self.scoring.threads):
            return self.healer.healed(candidate)

    def _blocks(self, batch: Sequence[tuple[int, Candidate]]) -> dict[int, Iterator[dict[int, Outcome | None]]]:
        """The candidates of a batch that are scored together, by number, each with what scores it and others."""
        alike: dict[Likeness, dict[int, Sequence[Labels]]] = defaultdict(dict)
        seen: set[Path | None] = set()
        for number, candidate in batch:
            like = self._likeness(candidate)
            if like is None or self.knows(candidate):
                continue
            with suppress(ValueError):  # what is no candidate at all becomes a failed trial
                self.traced.space.check(candidate.ratios)
                path = self._cache_path(candidate)
                if path is None or (path not in seen and self._read(path, candidate) is None):
                    alike[like][number] = self.healer.units(candidate.ratios)
                    seen.add(path)
        found: dict[int, Iterator[dict[int, Outcome | None]]] = {}
        for (parent, recovery, fidelity), candidates in alike.items():
            together = self._scored_together(parent, recovery, fidelity, candidates)
            found |= dict.fromkeys(candidates, together)
        return found

    def _scored_together(
        self, parent: int | None, recovery: Recovery, fidelity: float, candidates: Mapping[int, Sequence[Labels]]
    ) -> Iterator[dict[int, Outcome | None]]:
        if len(candidates) < 2:
            return
        self.dense(fidelity)
        if self._prefix is None:
            self._prefix = SharedPrefix(self.traced, self.dense_model, self.task, self.scoring.precision)
        make = functools.partial(self.healer.rebuilt, parent, self.healer.source(parent), recovery)
        care = self.healer.care
        recalibration = care.read(fidelity) if care.has("bn_recalibrate", recovery) else []
        yield from self._prefix.scored(candidates, make, self._sample(fidelity), recalibration)

    def _likeness(self, candidate: Candidate) -> Likeness | None:
        """What candidates must have in common to be scored together; None for those that are scored alone."""
        together = self.scoring.shared_prefix and self.scoring.recipe.shareable
        if not together or candidate.recovery == "short" or candidate.measure:
            return None
        return candidate.parent, candidate.recovery, candidate.fidelity

    def _evaluate(self, number: int, candidate: Candidate, outcome: Outcome | None) -> Trial:
        ratios = self.traced.space.check(candidate.ratios)
        model = None
        earlier = self._scored.get(_plain(candidate))
        if earlier is None:
            earlier, model = self._score(candidate, outcome)
        else:
            self.hits += 1
            earlier = replace(earlier, cached=True, seconds_in_forward=0.0)
        expected = {name: m.predict(ratios) for name, m in self.costs.items()}
        if candidate.measure:
            costs = self.measured(model or self.healer.cut(ratios), glance=candidate.glance)
        else:
            costs = {n: Measurement.exact(expected[n], m.unit, "predicted") for n, m in self.costs.items()}
        return replace(
            earlier,
            number=number,
            candidate=candidate,
            costs=costs,
            predicted=expected if candidate.measure else {},
            feasible=all_met(self.budgets, costs),
        )

    def _score(self, candidate: Candidate, outcome: Outcome | None) -> tuple[Trial, nn.Module | None]:
        """What the candidate scores, and its network if it had to be made."""
        path = self._cache_path(candidate)
        model, cached = None, False
        if outcome is not None:
            scored: Scored | None = outcome.scored
        else:
            scored = self._read(path, candidate)
            cached = scored is not None
        self.hits += cached
        self.evaluations += not cached
        if scored is None:
            began = time.perf_counter()
            self.dense(candidate.fidelity)
            model = self.recovered(candidate)
            healing = time.perf_counter() - began
            scored = self.scored(model, candidate.fidelity)
            scored = replace(scored, seconds_in_forward=scored.seconds_in_forward + healing)
            write_cached(path, scored)
        sample = self._sample(candidate.fidelity)
        low, high = sample.interval(scored.scores)
        change = np.subtract(scored.losses, self.dense(candidate.fidelity).losses)
        difference = float(np.average(change, weights=scored.sizes))
        change_low, change_high = sample.interval(change)
        parts = np.divide([scored.scores, scored.losses], sum(scored.sizes)) * scored.sizes
        known = bool(np.isfinite(parts).all())  # a metric may not be defined on a part
        trial = Trial(
            number=0,
            candidate=candidate,
            score=scored.score,
            score_low=scored.score + low,
            score_high=scored.score + high,
            loss=scored.loss,
            loss_change=Measurement(
                value=difference,
                unit="loss",
                low=difference + change_low,
                high=difference + change_high,
                samples=sum(sum(parts) for parts in sample.parts),
                kind="measured",
                notes=("paired with the dense model",),
            ),
            parts=tuple((float(f"{score:.6g}"), float(f"{loss:.6g}")) for score, loss in parts.T) if known else (),
            seconds_in_forward=0.0 if cached else scored.seconds_in_forward,
            cached=cached,
        )
        return trial, model

    def measured(self, model: nn.Module, *, glance: bool = False) -> dict[str, Measurement]:
        """Every cost of a network, counted or measured; at a glance where the meter knows how."""
        inputs = to_device(self.task.inputs, self.scoring.device)
        brief = {name: meter.glance() for name, meter in self.meters.items() if glance and isinstance(meter, Glancing)}
        return {name: meter.measure(model, inputs) for name, meter in {**self.meters, **brief}.items()}

    def _cache_path(self, candidate: Candidate) -> Path | None:
        """Where this candidate's scores are kept: a name made of everything that they depend on."""
        return None if self.cache is None else self.cache / f"{self._digest(candidate)}.json"

    def _read(self, path: Path | None, candidate: Candidate) -> Scored | None:
        return read_cached(path, len(self._sample(candidate.fidelity).weights))

    def _digest(self, candidate: Candidate) -> str:
        """A name made of everything that a candidate's network and its scores depend on, the same of its parent."""
        if candidate not in self._digests:
            parent = candidate.parent
            content = {
                **{key: value for key, value in self.identity.items() if key != "task"},
                "kept": [hashlib.sha256(units.tobytes()).hexdigest() for units in self.healer.units(candidate.ratios)],
                "recovery": candidate.recovery,
                "fidelity": candidate.fidelity,
                "parent": None if parent is None else self._digest(self.healer.candidate(parent)),
            }
            self._digests[candidate] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
        return self._digests[candidate]


def _plain(candidate: Candidate) -> Candidate:
    """What of a candidate its score depends on."""
    return replace(candidate, measure=False, glance=False, about={})


def _count(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None
