"""Networks that differ in few groups, healed and scored together: what comes before the first difference runs once.

The candidates of a sweep, or of a round of NetAdapt, have most ratios in common. One network, at the ratios that most
of them have, runs over the data batch by batch, its modules' outputs are kept, each candidate's own forward runs over
the same batch, and every module whose output does not depend on the groups in which it differs (dependence.py)
hands back what was kept. So it goes for whatever runs, residual or concatenating, and gives what the candidate gives
alone. Layers that only lose rows where units go hand back the other rows of what was kept (reuse.py). Recalibration is
shared alike: normalisations before the difference have the statistics of the common network.

What a recorded pass cannot tell, a candidate shows: on the first batch, the first of those that reuse the same modules
runs in full as well, and where the outputs differ all of these are left to be evaluated alone.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.borrowing import arguments, computing_in
from autoprune.core import Task
from autoprune.dependence import Dependence
from autoprune.handing import Outputs, Positions, alike, cloned, hollow, narrowed
from autoprune.recover import averaging, norms_of
from autoprune.reuse import Reuse, kind
from autoprune.scores import Sample, Scored, Tally, answer
from autoprune.traced import TracedModel, tensors_of
from autoprune.units import Labels

BLOCK = 64  # candidates that are evaluated together at most, which is what a crash can lose
KEPT = 2**30  # bytes of outputs and of networks that are kept at once
LOG = logging.getLogger("autoprune")
WORTHWHILE = 0.1  # of a batch's MACs that must be saved


class _Reached(BaseException):
    """All outputs that are needed are kept: the rest of the common network need not run."""


@dataclass(frozen=True)
class Outcome:
    """What a candidate came to beside others, and the seconds that it took."""

    scored: Scored
    seconds: float


class Beside:
    """Outcomes of candidates that are scored together, made block by block when the first of a block is asked for."""

    def __init__(
        self, blocks: Mapping[int, Iterator[dict[int, Outcome | None]]], keep: Callable[[int, Scored], None]
    ) -> None:
        self._blocks, self._keep = blocks, keep
        self._done: dict[int, Outcome | None] = {}

    def of(self, number: int) -> Outcome | None:
        """None for a candidate that is to be evaluated alone."""
        while number in self._blocks and number not in self._done:
            try:
                block = next(self._blocks[number], None)
            except Exception as error:  # noqa: BLE001, whatever it was, one by one they may do
                LOG.warning("candidates cannot be scored together (%s: %s): one by one", type(error).__name__, error)
                block = None
            if block is None:
                return None
            for n, outcome in block.items():
                if outcome is not None:
                    self._keep(n, outcome.scored)
            self._done |= block
        return self._done.pop(number, None)


@dataclass
class _Member:
    """One candidate of a block."""

    kept: Sequence[Labels]
    reuse: Reuse
    tally: Tally
    model: nn.Module | None = None
    seconds: float = 0.0
    healing: float = 0.0  # of these, before it was scored
    failed: bool = False

    @contextmanager
    def working(self) -> Iterator[None]:
        """Time that is this candidate's. Should it fail, it is left to fail alone, or not to."""
        began = time.perf_counter()
        try:
            yield
        except Exception:  # noqa: BLE001
            self.failed = True
        self.seconds += time.perf_counter() - began


class SharedPrefix:
    """See the module's docstring. dense: the model that candidates are cut from. precision: that they are scored in.

    Raises:
        whatever the model raises on the task's inputs.
    """

    def __init__(self, traced: TracedModel, dense: nn.Module, task: Task, precision: str = "float32") -> None:
        self._task, self._precision = task, precision
        self._device = next(dense.parameters()).device
        example = arguments(task.inputs, self._device)
        self._dependence = Dependence(traced, dense, example)
        self._per_example = max(len(example[0]), 1)
        norms = norms_of(dense)
        names = [name for name, module in dense.named_modules() if module in norms]
        self._exact = all(len(self._dependence.normalised(name)) <= 1 for name in names)
        self._traced = traced
        self._bytes = {name: tensor.nbytes for name, tensor in tensors_of(dense)}
        self._shown: set[frozenset[str]] = set()  # modules that were reused, and the outputs were right
        self._refuted: set[frozenset[str]] = set()  # and they were not
        self.saved = 0.0  # dense networks' FLOPs that were not computed again

    def scored(
        self,
        candidates: Mapping[int, Sequence[Labels]],
        make: Callable[[Sequence[Labels]], nn.Module],
        sample: Sample,
        recalibration: Sequence[Any] = (),
    ) -> Iterator[dict[int, Outcome | None]]:
        """Candidates by number, given as the units that they keep -> what they came to, block by block, on a sample
        and with normalisation statistics of some batches, or as they are cut without any.

        None for those that fail, or differ from what they give alone; those that share too little are in no block.
        make: the network that keeps these units, before recalibration, in evaluation mode; parameters that are not
        changed may be shared.
        """
        if recalibration and not self._exact:  # a norm that runs twice mixes what differs with what does not
            return
        common = _common(list(candidates.values()))
        reuse = {n: self._reuse(kept, common) for n, kept in candidates.items()}
        reuse = {n: each for n, each in reuse.items() if frozenset(each.whole) not in self._refuted}
        saved = {n: self._dependence.share(each.whole) for n, each in reuse.items()}
        # the common network runs as far as any candidate reuses it
        if len(reuse) < 2 or sum(saved.values()) - max(saved.values()) < WORTHWHILE * len(reuse):
            return
        network = make(common)
        largest = max(len(arguments(inputs)[0]) for inputs, _ in (*sample.batches, *recalibration))
        own = {n: self._own_bytes(candidates[n]) for n in reuse}
        for block in self._blocks(reuse, own, largest / self._per_example):
            tallies = {n: Tally(self._task, self._device, sample, self._precision) for n in block}
            members = {n: _Member(candidates[n], reuse[n], tallies[n]) for n in block}
            began = time.perf_counter()
            self._block(network, common, list(members.values()), make, sample, recalibration)
            common_seconds = time.perf_counter() - began - sum(m.seconds for m in members.values())
            done: dict[int, Outcome | None] = dict.fromkeys(block)
            for n, member in members.items():
                if not (member.failed or frozenset(member.reuse.whole) in self._refuted):
                    with suppress(FloatingPointError):
                        scored, shared = member.tally.scored(), common_seconds / len(block)
                        forward = scored.seconds_in_forward + member.healing + shared
                        done[n] = Outcome(replace(scored, seconds_in_forward=forward), member.seconds + shared)
            self.saved += max(sum(saved[n] for n in block if done[n]) - max(saved[n] for n in block), 0.0)
            yield done

    def _reuse(self, kept: Sequence[Labels], common: Sequence[Labels]) -> Reuse:
        """What a candidate may take of the common network, but for what is inside of blocks that one of them leaves
        out."""
        gone = tuple(f"{block}." for units in (common, kept) for block in self._traced.left_out(units))
        changed = _changed(kept, common)
        losing = {g for g in changed if len(kept[g]) and np.isin(kept[g], common[g]).all()}
        whole, narrower = (
            {n: read for n, read in self._dependence.reusable(changed, of).items() if not n.startswith(gone)}
            for of in ((), losing)
        )
        more = narrower.keys() - whole.keys()
        return Reuse(whole, narrower, {n: self._dependence.left(n, kept, common) for n in narrower if n in more})

    def _own_bytes(self, kept: Sequence[Labels]) -> int:
        """Of a candidate's network, what it does not share with others at most; a mask is as large as what it masks."""
        each = sum(self._bytes[name] for name in self._traced.removed(kept))
        return each if self._traced.narrows else 2 * each

    def _blocks(self, reuse: Mapping[int, Reuse], own: Mapping[int, int], batch: float) -> Iterator[list[int]]:
        """Candidates in order, so many at once as KEPT leaves room for; batch: how many of the task's inputs the
        largest batch is."""
        block: list[int] = []
        kept: set[str] = set()
        networks = 0
        for n, each in reuse.items():
            if frozenset(each.whole) in self._refuted:  # since
                continue
            read = {name for name, is_read in each.read().items() if is_read}
            outputs = batch * sum(self._dependence.bytes(name) for name in kept | read)
            if block and (outputs + networks + own[n] > KEPT or len(block) == BLOCK):
                yield block
                block, kept, networks = [], set(), 0
            block.append(n)
            kept |= read
            networks += own[n]
        if block:
            yield block

    def _block(
        self,
        network: nn.Module,
        common: Sequence[Labels],
        members: Sequence[_Member],
        make: Callable[[Sequence[Labels]], nn.Module],
        sample: Sample,
        recalibration: Sequence[Any],
    ) -> None:
        for member in members:
            with member.working():
                member.model = make(member.kept)
        if recalibration:
            network = copy.deepcopy(network)
            self._recalibrate(network, common, members, recalibration)
        for member in members:
            member.healing = member.seconds
        with torch.inference_mode():
            for number, (inputs, _) in enumerate(sample.batches):
                batch = kind(inputs, "score")
                with computing_in(self._precision, self._device):
                    outputs = self._outputs(network, members, inputs, batch)
                for member in _whole(members):
                    self._add(member, number, inputs, batch, outputs)
                outputs.clear()

    def _add(self, member: _Member, number: int, inputs: Any, batch: Hashable, outputs: Outputs) -> None:
        assert member.model is not None
        with member.working(), member.reuse.taking(member.model, outputs, batch):
            output = member.tally.add(member.model, number)
        reused = frozenset(member.reuse.whole)
        if number == 0 and reused and not member.failed and reused not in self._shown | self._refuted:
            with member.working():
                began = time.perf_counter()
                whole = answer(member.model, arguments(inputs, self._device), self._precision, self._device)
                member.tally.forward += time.perf_counter() - began
                (self._shown if alike(output, whole) else self._refuted).add(reused)

    def _recalibrate(
        self, network: nn.Module, common: Sequence[Labels], members: Sequence[_Member], batches: Sequence[Any]
    ) -> None:
        """As recover.recalibrate each alone, and the common network as far as it is reused."""
        norms: dict[int, _Norms] = {}
        with ExitStack() as modes:
            modes.enter_context(averaging(norms_of(network)))
            for member in members:
                with member.working():
                    norms[id(member)] = self._norms(member, network, common)
                    modes.enter_context(averaging([module for module, _ in norms[id(member)].own]))
            with torch.no_grad():
                for number, (inputs, _) in enumerate(batches):
                    batch = kind(inputs, "recalibrate")
                    outputs = self._outputs(network, members, inputs, batch)
                    for member in _whole(members):
                        assert member.model is not None
                        narrower = bool(member.reuse.narrower)
                        with member.working(), member.reuse.taking(member.model, outputs, batch):
                            member.model(*arguments(inputs, self._device))
                        # else what it did not compute of earlier batches is missing from its statistics
                        member.failed |= number > 0 and narrower and not member.reuse.narrower
                    outputs.clear()
        for member in _whole(members):
            norms[id(member)].hand_over(narrower=bool(member.reuse.narrower) and len(batches) > 1)

    def _norms(self, member: _Member, network: nn.Module, common: Sequence[Labels]) -> _Norms:
        """Those of a candidate, by where its statistics come from."""
        assert member.model is not None
        norms, found = set(norms_of(member.model)), _Norms([], [], [])
        for name, module in member.model.named_modules():
            if module not in norms:
                continue
            theirs = network.get_submodule(name)
            within = self._dependence.normalised(name)
            if any(not member.reuse.whole.keys().isdisjoint(inside) for inside in within):
                found.whole.append((module, theirs))
                continue
            found.own.append((module, theirs))
            if any(not member.reuse.narrower.keys().isdisjoint(inside) for inside in within):
                left = self._dependence.left_of
                positions = {
                    buffer: left(f"{name}.{buffer}", member.kept, common)
                    for buffer, _ in module.named_buffers(recurse=False)
                }
                found.narrower.append((module, theirs, positions))
        return found

    def _outputs(self, network: nn.Module, members: Sequence[_Member], inputs: Any, batch: Hashable) -> Outputs:
        """What the modules that members reuse give in the common network."""
        reads: Counter[str] = Counter()
        for member in _whole(members):
            reads.update({name: int(read) for name, read in member.reuse.asked(batch).items()})
        found: Outputs = {}

        def keep(name: str, output: Any) -> None:
            if not reads[name]:  # only other modules that hand back read it, and they do not
                found[name] = hollow(output)
            elif self._dependence.written(name):
                found[name] = cloned(output)
            else:
                found[name] = lambda: output
            if len(found) == len(reads):
                raise _Reached

        with ExitStack() as hooks:
            for name in reads:
                hook = network.get_submodule(name).register_forward_hook(lambda *a, name=name: keep(name, a[-1]))
                hooks.callback(hook.remove)
            with suppress(_Reached):
                network(*arguments(inputs, self._device))
        return found


@dataclass(frozen=True)
class _Norms:
    """A candidate's normalisations and the common network's of the same name: those that see what is the same there,
    those that run, and of these the ones that see what is narrower, with the positions that are left."""

    whole: list[tuple[nn.Module, nn.Module]]
    own: list[tuple[nn.modules.batchnorm._BatchNorm, nn.Module]]
    narrower: list[tuple[nn.Module, nn.Module, Mapping[str, Positions]]]

    def hand_over(self, *, narrower: bool) -> None:
        """Give those that did not run, or not always, the statistics of the common network."""
        for module, theirs in self.whole:
            for buffer, values in theirs.named_buffers(recurse=False):
                setattr(module, buffer, values)
        for module, theirs, positions in self.narrower if narrower else ():
            for buffer, where in positions.items():
                setattr(module, buffer, narrowed(theirs.get_buffer(buffer), [where]))


def _whole(members: Sequence[_Member]) -> list[_Member]:
    return [member for member in members if not member.failed]


def _common(candidates: Sequence[Sequence[Labels]]) -> list[Labels]:
    """Of each group the units that most of the candidates keep."""
    common = []
    for each in zip(*candidates, strict=True):
        (key, _), *_ = Counter(units.tobytes() for units in each).most_common(1)
        common.append(next(units for units in each if units.tobytes() == key))
    return common


def _changed(kept: Sequence[Labels], common: Sequence[Labels]) -> frozenset[int]:
    return frozenset(
        g for g, pair in enumerate(zip(kept, common, strict=True)) if pair[0].tobytes() != pair[1].tobytes()
    )
