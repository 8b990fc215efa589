"""The record of a search: an Optuna study, one finished trial written once, resumed by replay.

Parameters are the ratios, one a group; values are the score and the cost of every budget; the whole trial is kept as a
user attribute, so that a replay is exact. A failed candidate is a trial in state FAIL.
"""

from __future__ import annotations

import json
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from autoprune.core import Budget, InputError, PruningSpace, Trial

SCHEMA = 1
MAKING = 20  # tries at making the tables


class Study:
    """The trials of one search in an Optuna storage.

    fingerprint: everything that the trials depend on; a study of another fingerprint is refused, naming what differs.
    """

    def __init__(
        self,
        storage: str | None,
        name: str,
        *,
        fingerprint: Mapping[str, Any],
        space: PruningSpace,
        budgets: Sequence[Budget],
    ) -> None:
        self.storage, self.name = storage, name
        self._space = space
        self._costs = list(dict.fromkeys(b.cost for b in budgets))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * len(self._costs)]
        with _usable(storage):
            self._study = optuna.create_study(
                storage=_open(storage), study_name=name, directions=directions, load_if_exists=True
            )
            self._check(json.loads(json.dumps({"schema": SCHEMA, **fingerprint})))

    def _check(self, fingerprint: dict[str, Any]) -> None:
        known = self._study.user_attrs.get("fingerprint")
        if known is None and (self._study.get_trials(deepcopy=False) or self._study.user_attrs):
            raise InputError(
                f"study '{self.name}' in {self.storage} was not made by autoprune: choose another study.name"
            )
        if known is None:
            self._study.set_user_attr("fingerprint", fingerprint)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._study.set_metric_names(["score", *self._costs])
        elif known != fingerprint:
            keys = [k for k in {**known, **fingerprint} if known.get(k) != fingerprint.get(k)]
            changes = (f"{k} was {_short(known.get(k))}, is {_short(fingerprint.get(k))}" for k in keys)
            raise InputError(
                f"study '{self.name}' in {self.storage} belongs to another search ({'; '.join(changes)}): "
                "choose another study.name"
            )

    def trials(self) -> tuple[Trial, ...]:
        """What was recorded, in order, up to the first gap."""
        found: dict[int, Trial] = {}
        for frozen in self._study.get_trials(deepcopy=False):
            if "trial" in frozen.user_attrs:
                trial = Trial.from_json(json.loads(frozen.user_attrs["trial"]))
                if trial.number in found:  # recorded anew from here on, see run.py
                    found = {number: known for number, known in found.items() if number < trial.number}
                found[trial.number] = trial
        ordered: list[Trial] = []
        while len(ordered) in found:
            ordered.append(found[len(ordered)])
        return tuple(ordered)

    def record(self, trial: Trial) -> None:
        """Write a finished trial, whole or not at all."""
        named = self._space.named(trial.candidate.ratios)
        failed = trial.error is not None
        attributes = {
            "trial": json.dumps(trial.to_json()),
            "recovery": trial.candidate.recovery,
            "parent": trial.candidate.parent,
            "about": dict(trial.candidate.about),
            "measured": trial.candidate.measure,
            "predicted": dict(trial.predicted),
            "score_interval": [trial.score_low, trial.score_high],
            "costs": {name: f"{m.value:.6g} {m.unit} ({m.kind})" for name, m in trial.costs.items()},
        }
        self._study.add_trial(
            create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                values=None if failed else [trial.score, *(trial.costs[c].value for c in self._costs)],
                params=named,
                distributions={
                    g.name: optuna.distributions.FloatDistribution(0.0, max(g.levels[-1], 1e-9))
                    for g in self._space.groups
                },
                user_attrs=attributes | ({"error": trial.error} if failed else {"feasible": trial.feasible}),
            )
        )


def check_storage(storage: str | None) -> None:
    """Raises InputError where no study could be kept, before any time is spent on one."""
    with _usable(storage):
        _open(storage).get_all_studies()


@contextmanager
def _usable(storage: str | None) -> Iterator[None]:
    """Errors of the storage inside are the user's."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, OSError, ImportError) as error:
        first = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise InputError(f"study.storage={storage} cannot be used: {first}") from error


def _open(storage: str | None) -> optuna.storages.BaseStorage:
    """An Optuna storage by URL, in memory for None; SQLite in write-ahead mode, ten times faster a trial."""
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if not storage.startswith("sqlite:///"):
        return optuna.storages.RDBStorage(storage)
    path = Path(storage.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = _made(storage)
    sqlalchemy.event.listen(opened.engine, "connect", _write_ahead)
    opened.engine.dispose()  # connections made before the listener
    return opened


def _made(storage: str) -> optuna.storages.RDBStorage:
    """An SQLite storage, its tables made where there are none: again where another search makes them at this instant,
    which Optuna does not foresee."""
    tries = MAKING
    while True:
        try:
            return optuna.storages.RDBStorage(storage, engine_kwargs={"connect_args": {"timeout": 60}})
        except sqlalchemy.exc.DatabaseError as error:
            tries -= 1
            raced = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
            if not (raced and tries):
                raise
        time.sleep(0.2)


def _write_ahead(connection: sqlite3.Connection, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
