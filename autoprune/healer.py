"""Candidates' networks: cut from the dense one, or from what an earlier candidate came to, and healed as they ask."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from autoprune.borrowing import seeded
from autoprune.core import Candidate, Recovery, Task
from autoprune.criteria import Scores
from autoprune.lineage import Networks, check_nested
from autoprune.prune import choose_units
from autoprune.recipe import Recipe, Step
from autoprune.reconstruct import Reconstruction
from autoprune.recover import Teacher, finetune, recalibrate, shorter
from autoprune.traced import TracedModel, tensors_of
from autoprune.units import Labels

LESSONS = 64 * 2**20  # bytes of the dense model's outputs that are kept for the next candidate's short fine-tune


def part(batches: Sequence[Any], fidelity: float) -> Sequence[Any]:
    """The first of them, at least one."""
    return batches[: math.ceil(fidelity * len(batches) - 1e-9)]


@dataclass(frozen=True)
class Care:
    """What heals a network: the steps, the batches that those read which do not train, and the seed of the others."""

    recipe: Recipe
    batches: Sequence[Any]
    seed: int

    def has(self, step: str, recovery: Recovery) -> bool:
        """Whether a candidate with this recovery gets this step."""
        return any(own.name == step for own in self.recipe.of_recovery(recovery))

    def read(self, fidelity: float) -> Sequence[Any]:
        """Those that a candidate of this fidelity is healed with."""
        return part(self.batches, fidelity)


def heal(
    model: nn.Module,
    steps: Iterable[Step],
    batches: Sequence[Any],
    *,
    traced: TracedModel,
    kept: Sequence[Labels],
    source: nn.Module,
    seed: int = 0,
) -> None:
    """Those of these steps that do not train, in their order and in place, for a model that was cut from source to
    these units."""
    for step in steps:
        if step.name == "bn_recalibrate":
            recalibrate(model, batches)
        elif step.name == "reconstruct" and traced.narrows:
            Reconstruction(source, traced, batches, seed=seed).apply(model, kept)


class Healer:
    """See the module's docstring. Holds the dense model, never changes it.

    digest: a name made of everything that a candidate's network depends on. known: candidates by number, which may be
    parents. networks: where what parents came to is kept; None for nowhere, where it is made again each time.
    """

    def __init__(
        self,
        task: Task,
        traced: TracedModel,
        importance: Sequence[Scores],
        dense: nn.Module,
        care: Care,
        digest: Callable[[Candidate], str],
    ) -> None:
        self.traced, self.importance, self.dense, self.care, self.digest = traced, importance, dense, care, digest
        self.known: dict[int, Candidate] = {}
        self.networks: Networks | None = None
        self._train, self._loss, self._lr = task.train, task.loss, task.lr
        self._past = task.past and replace(task.past, early=None)  # a whole network, that no candidate needs
        self._teacher = Teacher(dense, remembered=LESSONS)
        self._reconstruction: tuple[str | None, Reconstruction] | None = None

    def elsewhere(self, digest: Callable[[Candidate], str]) -> Healer:
        """One for another process, that knows no candidate yet."""
        there = copy.copy(self)
        there.digest, there.known, there.networks = digest, {}, None
        there._teacher = Teacher(self.dense, remembered=LESSONS)
        there._reconstruction = None
        return there

    def units(self, ratios: Sequence[float]) -> tuple[Labels, ...]:
        """What is kept at these ratios."""
        return choose_units(self.traced.space, self.importance, ratios)

    def cut(self, ratios: Sequence[float]) -> nn.Module:
        """The network at these ratios, not healed."""
        return self.traced.cut(self.dense, self.units(ratios)).eval()

    def healed(self, candidate: Candidate) -> nn.Module:
        """The candidate's network, in evaluation mode."""
        kept = self.units(candidate.ratios)
        if stored := self.stored(candidate):
            return self.traced.cut(self.traced.spread(self.dense, stored, kept), kept).eval()
        source, steps = self.source(candidate.parent), self.care.recipe.of_recovery(candidate.recovery)
        model = self._cut(candidate.parent, source, kept)
        for number, step in enumerate(steps):
            if step.name == "reconstruct":
                self._reconstruct(model, kept, source, candidate.parent)
            elif step.name == "bn_recalibrate":
                recalibrate(model, self.care.read(candidate.fidelity))
            else:
                before = sum(earlier.plan is not None for earlier in steps[:number])
                self._train_briefly(model, step, candidate.fidelity, self.care.seed + before)
        if candidate.recovery == "short":
            self._keep(candidate, model)  # a lesser recovery is made again in a moment
        return model

    def _train_briefly(self, model: nn.Module, step: Step, fidelity: float, seed: int) -> None:
        assert step.plan is not None
        with seeded(seed):
            finetune(
                model,
                self._train,
                shorter(step.plan, fidelity, self._train),
                loss=self._loss,
                lr=self._lr,
                past=self._past,
                teacher=self._teacher if step.plan.teach else None,
            )

    def rebuilt(
        self,
        parent: int | None,
        source: nn.Module,
        recovery: Recovery,
        kept: Sequence[Labels],
    ) -> nn.Module:
        """A parent's child, cut and refitted, its statistics not yet taken anew, that shares with its source the
        parameters that lose nothing.

        Raises:
            ValueError: a unit is to be kept that the parent has lost.
        """
        model = self._cut(parent, source, kept, sharing=True)
        if self.care.has("reconstruct", recovery):
            self._reconstruct(model, kept, source, parent)
        return model

    def _cut(
        self, parent: int | None, source: nn.Module, kept: Sequence[Labels], *, sharing: bool = False
    ) -> nn.Module:
        if parent is not None:
            check_nested(self.traced.space, self.units(self.candidate(parent).ratios), kept)
        return self.traced.cut(source, kept, sharing=sharing).eval()

    def source(self, parent: int | None) -> nn.Module:
        """What a parent's children are cut from."""
        return self.dense if parent is None else self.spread(parent)

    def spread(self, parent: int) -> nn.Module:
        """A network of the dense one's shape that computes what the parent's healed one does."""
        earlier = self.candidate(parent)
        tensors = self.stored(earlier)
        if tensors is None:
            made = self.healed(earlier)
            self._keep(earlier, made)  # whatever its recovery: it is needed for every child
            tensors = dict(tensors_of(made))
        return self.traced.spread(self.dense, tensors, self.units(earlier.ratios)).eval()

    def _reconstruct(self, model: nn.Module, kept: Sequence[Labels], source: nn.Module, parent: int | None) -> None:
        """Refit a network that was cut from source, the parent's or the dense one; what is known of the last source is
        kept, as a round's candidates have one parent."""
        if not self.traced.narrows:
            return
        digest = None if parent is None else self.digest(self.candidate(parent))
        if self._reconstruction is None or self._reconstruction[0] != digest:
            self._reconstruction = None  # two at once would take twice the memory
            made = Reconstruction(source, self.traced, self.care.batches, seed=self.care.seed)
            self._reconstruction = digest, made
        self._reconstruction[1].apply(model, kept)

    # ------------------------------------------------------------------------------------------------------- parents

    def candidate(self, number: int) -> Candidate:
        """Raises ValueError if there is none of that number."""
        if number not in self.known:
            raise ValueError(f"parent {number} is not among the trials so far")
        return self.known[number]

    def parents(self, candidates: Iterable[Candidate]) -> dict[int, Candidate]:
        """Those of these candidates that are known, by number."""
        numbers = {candidate.parent for candidate in candidates}
        return {number: self.known[number] for number in numbers if number is not None and number in self.known}

    def stored(self, candidate: Candidate) -> Mapping[str, Tensor] | None:
        """The tensors of its network, where they are kept."""
        if self.networks is None:
            return None
        return self.networks.get(self.digest(candidate), {n: t.shape for n, t in tensors_of(self.dense)})

    def _keep(self, candidate: Candidate, model: nn.Module) -> None:
        if self.networks is not None:
            self.networks.put(self.digest(candidate), model)

    def retain(self, parents: Collection[int]) -> None:
        """Forget networks: once a batch names its parents, only they and their children are likely to be asked for
        again."""
        if self.networks is None or not parents:
            return
        family = set()
        for number, candidate in self.known.items():
            if number in parents or candidate.parent in parents:
                with suppress(ValueError):  # what is no candidate at all becomes a failed trial
                    family.add(self.digest(candidate))
        self.networks.retain(family)
