"""The record of a search: an Optuna study, one finished trial written once, resumed by replay.

Parameters are the ratios, one a group; values are the score and the cost of every budget; the whole trial is kept as a
user attribute, so that a replay is exact. A failed candidate is a trial in state FAIL, one that was scored on a part of
the images and not measured in state PRUNED: Optuna compares the others.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from autoprune.core import Budget, InputError, Progress, PruningSpace, Silent, Trial
from autoprune.lease import KEY, Lease
from autoprune.outset import Outset
from autoprune.storage import leave, open_storage, open_to_read, patiently, shown, unbroken, usable, waiting
from autoprune.untrusted import DAMAGED

SCHEMA = 1

Given = TypeVar("Given")


class Study:
    """The trials of one search in an Optuna storage, which was checked (check_storage), held by it alone until it is
    closed. A storage that is out of reach is waited for.

    fingerprint: everything that the trials depend on; a study of another fingerprint is refused, naming what differs.

    Raises:
        InputError: it is refused, or another search holds it.
        StorageError: of every method, the storage failed or stayed out of reach.
    """

    def __init__(
        self,
        storage: str | None,
        name: str,
        *,
        fingerprint: Mapping[str, Any],
        space: PruningSpace,
        budgets: Sequence[Budget],
        progress: Progress = Silent(),
    ) -> None:
        self.storage, self.name = storage, name
        self._space, self._progress = space, progress
        self._costs = list(dict.fromkeys(b.cost for b in budgets))
        self._lease: Lease | None = None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._opened = self._at_first(partial(open_storage, storage))
        directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * len(self._costs)]
        make = partial(optuna.create_study, storage=self._opened, study_name=name, directions=directions)
        self._study = self._at_first(partial(make, load_if_exists=True))
        self._id = self._at_first(partial(self._opened.get_study_id_from_name, name))
        mine = json.loads(json.dumps({"schema": SCHEMA, **fingerprint}))
        try:
            self._check(mine)
            self._hold()
            if not self._check(mine):  # nor was it given another meanwhile
                self._at_first(partial(self._begin, mine))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Study:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other searches have it."""
        with unbroken():
            if self._lease is not None:
                self._lease.let_go()
            leave(self._opened)

    def _at_first(self, call: Callable[[], Given]) -> Given:
        """What fails before anything was computed is the user's."""
        with usable(self.storage):
            return waiting(self.storage, call, self._progress)

    def _recorded(self) -> list[FrozenTrial]:
        """From the storage itself, as an Optuna study keeps a copy of every trial in memory."""
        return self._opened.get_all_trials(self._id, deepcopy=False)

    def _hold(self) -> None:
        if isinstance(self._opened, optuna.storages.RDBStorage):
            lease = Lease(self._opened.engine, self._id, f"'{self.name}' in {shown(self.storage)}")
            self._lease = lease  # whatever comes of it, it is let go
            self._at_first(partial(lease.take, self._progress.say))

    def _check(self, fingerprint: Mapping[str, Any]) -> bool:
        """Whether the study has this fingerprint already. Raises InputError where it has another."""
        attributes = self._at_first(lambda: self._study.user_attrs)
        known, place = attributes.get("fingerprint"), f"study '{self.name}' in {shown(self.storage)}"
        if known is None and (attributes.keys() - {KEY} or self._at_first(self._recorded)):
            raise InputError(f"{place} was not made by autoprune: choose another study.name")
        if not isinstance(known, dict | None):
            raise InputError(f"{place} is damaged: choose another study.name")
        if known is not None and known != fingerprint:
            keys = [k for k in {**known, **fingerprint} if known.get(k) != fingerprint.get(k)]
            changes = (f"{k} was {_short(known.get(k))}, is {_short(fingerprint.get(k))}" for k in keys)
            raise InputError(f"{place} belongs to another search ({'; '.join(changes)}): choose another study.name")
        return known is not None

    def _begin(self, fingerprint: Mapping[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(["score", *self._costs])
        self._study.set_user_attr("fingerprint", fingerprint)

    def describe(self, outset: Outset) -> None:
        """Say for people, in the dashboard, what is searched, on what and with what."""
        about = {name: getattr(outset, name) for name in ("task", "strategy", "seed", "device")}
        about |= {"budget": " ".join(outset.asked), "versions": dict(outset.versions)}
        known = self._at_first(lambda: self._study.user_attrs)
        for key, value in about.items():
            if known.get(key) != value:
                self._at_first(partial(self._study.set_user_attr, key, value))

    def trials(self) -> tuple[Trial, ...]:
        """What was recorded, in order, up to the first gap.

        Raises:
            InputError: the storage or a trial in it is damaged.
        """
        return _in_order(self._at_first(self._recorded), self._costs, f"study '{self.name}' in {shown(self.storage)}")

    def record(self, trial: Trial) -> None:
        """Write a finished trial, whole or not at all, and once."""
        named = self._space.named(trial.candidate.ratios)
        failed = trial.error is not None
        text = json.dumps(trial.to_json())  # each attribute takes Optuna two milliseconds: few of them
        attributes = {
            "trial": text,
            "about": {
                "recovery": trial.candidate.recovery,
                "fidelity": trial.candidate.fidelity,
                "parent": trial.candidate.parent,
                "measured": trial.candidate.measure,
                "score interval": [trial.score_low, trial.score_high],
                **trial.candidate.about,
            },
            "costs": {name: f"{m.value:.6g} {m.unit} ({m.kind})" for name, m in trial.costs.items()},
        }
        partly = trial.candidate.fidelity < 1 and not trial.candidate.measure
        frozen = create_trial(
            state=TrialState.FAIL if failed else TrialState.PRUNED if partly else TrialState.COMPLETE,
            values=None if failed else [trial.score, *(trial.costs[c].value for c in self._costs)],
            params=named,
            distributions={
                g.name: optuna.distributions.FloatDistribution(0.0, max(g.levels[-1], 1e-9)) for g in self._space.groups
            },
            user_attrs=attributes | ({"error": trial.error} if failed else {"feasible": trial.feasible}),
        )
        tries = itertools.count()

        def write() -> None:
            if self._lease is not None:
                self._lease.renew()
            if next(tries) and any(known.user_attrs.get("trial") == text for known in self._recorded()):
                return  # it was written, and the answer to that was lost
            self._opened.create_new_trial(self._id, template_trial=frozen)

        patiently(self.storage, write, self._progress)


def recorded(storage: str | None, name: str, costs: Sequence[str]) -> tuple[Trial, ...]:
    """What a study has recorded, read alone: nothing is made or changed, and a search may go on meanwhile. costs: those
    that its budgets are on.

    Raises:
        InputError: there is no such storage or no such study, or it is damaged.
    """
    if storage is None:
        raise InputError("its study was kept in memory (study.storage=null) and is gone: nothing is left to report")
    place = f"study '{name}' in {shown(storage)}"
    with usable(storage):
        opened = open_to_read(storage)
        try:
            number = next((s._study_id for s in opened.get_all_studies() if s.study_name == name), None)
            if number is None:
                raise InputError(f"there is no {place}: it was deleted, or the storage is another one now")
            return _in_order(opened.get_all_trials(number, deepcopy=False), costs, place)
        finally:
            leave(opened)


def _in_order(given: Sequence[FrozenTrial], costs: Sequence[str], place: str) -> tuple[Trial, ...]:
    """The trials, in order, up to the first gap."""
    found: dict[int, tuple[str, Trial]] = {}
    for frozen in given:
        if text := frozen.user_attrs.get("trial"):
            trial = _read(frozen, costs, place)
            number = trial.number
            if number in found and found[number][0] == text:
                continue  # written twice, the answer to the first having been lost
            if number in found:  # recorded anew from here on, see answer.settled
                found = {earlier: known for earlier, known in found.items() if earlier < number}
            found[number] = text, trial
    numbers = itertools.takewhile(found.__contains__, itertools.count())
    return tuple(found[number][1] for number in numbers)


def _read(frozen: FrozenTrial, costs: Sequence[str], place: str) -> Trial:
    try:
        trial = Trial.from_json(json.loads(frozen.user_attrs["trial"]))
        if unpriced := [cost for cost in costs if trial.error is None and cost not in trial.costs]:
            raise ValueError(f"it has no {unpriced[0]}")
    except DAMAGED as error:
        raise InputError(
            f"trial {frozen.number} of {place} is damaged ({type(error).__name__}: {error}): choose another study.name"
        ) from error
    return trial


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
