"""What a study keeps, for whom, and what it survives."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy.orm import Session

from autoprune import cli, lease, storage
from autoprune.core import (
    Budget,
    Candidate,
    Group,
    InputError,
    Measurement,
    PruningSpace,
    Silent,
    StorageError,
    Trial,
)
from autoprune.lease import Lease
from autoprune.storage import check_storage, open_storage, shown
from autoprune.study import Study, recorded

SPACE = PruningSpace((Group(name="g", size=2, levels=(0.0, 0.5)),))


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def study_of(url: str | None, name: str = "mine", **settings: Any) -> Study:
    defaults: dict[str, Any] = {"fingerprint": {"seed": 0}, "space": SPACE, "budgets": (Budget("macs", 10.0, "macs"),)}
    return Study(url, name, **(defaults | settings))


def trial(number: int, **more: Any) -> Trial:
    known: dict[str, Any] = dict.fromkeys(("score", "score_low", "score_high", "loss"), number / 100)
    cost = {"macs": Measurement.exact(5.0, "macs", "counted")}
    return Trial(number=number, candidate=Candidate(ratios=(0.5,)), costs=cost, **known, **more)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


def test_searches_may_make_the_same_storage_at_once(tmp_path: Path) -> None:
    """Three of four would lose Optuna's race for its tables."""
    together = threading.Barrier(4)

    def opened(number: int) -> None:
        together.wait()
        check_storage(f"sqlite:///{tmp_path / 'studies.db'}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(opened, range(4)))


def test_a_trial_that_was_written_twice_counts_once(url: str) -> None:
    with study_of(url) as study:
        for number in (0, 1, 2, 1, 3):
            study.record(trial(number))
        assert study.trials() == tuple(map(trial, range(4)))
        study.record(trial(1, seconds=9.0))  # that is another: everything after it is scored anew
        assert study.trials() == (trial(0), trial(1, seconds=9.0))


def test_what_was_recorded_is_read_while_a_search_goes_on(url: str) -> None:
    with study_of(url) as study:
        for number in (0, 1, 3):
            study.record(trial(number))
        assert recorded(url, "mine", ["macs"]) == (trial(0), trial(1))
        with pytest.raises(InputError, match=r"trial 0 of study 'mine' in .* is damaged .*it has no latency_ms"):
            recorded(url, "mine", ["latency_ms"])
        study.record(trial(2))
        assert recorded(url, "mine", ["macs"]) == study.trials() == tuple(map(trial, range(4)))
    with pytest.raises(InputError, match="there is no study 'yours' in"):
        recorded(url, "yours", ["macs"])


def test_a_trial_is_written_as_optuna_writes_it(tmp_path: Path) -> None:
    """Ours asks for nothing before it writes, theirs does."""
    theirs = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/theirs.db")
    ours = open_storage(f"sqlite:///{tmp_path}/ours.db")
    made = create_trial(
        state=TrialState.COMPLETE,
        values=[0.5, math.inf],
        params={"a": 0.25, "b": 0.0},
        distributions={name: FloatDistribution(0, 0.5) for name in "ab"},
        user_attrs={"trial": "x" * 3000, "about": {"deep": [1, None]}, "feasible": None},
        system_attrs={"any": 1},
    )
    read = []
    for opened in (theirs, ours):
        study = opened.create_new_study([StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE], "s")
        numbers = [opened.create_new_trial(study, made) for _ in range(3)]
        found = opened.get_all_trials(study)
        assert [t.number for t in found] == [0, 1, 2]
        read.append([(opened.get_trial(number), found) for number in numbers])
    assert read[0] == read[1]


def test_optuna_compares_what_was_scored_on_all_images(url: str) -> None:
    asked: list[dict[str, Any]] = [{"fidelity": 0.2}, {}, {"fidelity": 0.2, "measure": True}]
    with study_of(url) as study:
        for number, more in enumerate(asked):
            study.record(replace(trial(number), candidate=Candidate(ratios=(0.5,), **more)))
        study.record(Trial(number=3, candidate=Candidate(ratios=(0.5,)), error="RuntimeError: no"))
    kept = optuna.load_study(study_name="mine", storage=url)
    assert [t.state for t in kept.trials] == [
        TrialState.PRUNED,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.FAIL,
    ]
    assert {t.number for t in kept.best_trials} <= {1, 2}


@pytest.fixture
def heeding() -> Iterator[None]:
    """A shell starts what runs in its background deaf to Ctrl-C, and all that comes of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_a_trial_to_be_written(url: str, heeding: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a transaction it would leave the lock to a connection that nobody has any more."""
    pressed, added = signal.getsignal(signal.SIGINT), Session.add

    def pressing(*args: Any) -> None:
        added(*args)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.undo()

    with study_of(url) as study:
        study.record(trial(0))
        monkeypatch.setattr(Session, "add", pressing)
        with pytest.raises(KeyboardInterrupt):
            study.record(trial(1))
        assert study.trials() == (trial(0), trial(1))
    assert signal.getsignal(signal.SIGINT) == pressed


def test_ctrl_c_while_a_study_is_opened_lets_it_go(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Lease.take

    def pressing(self: Lease, say: Any) -> None:
        plain(self, say)
        raise KeyboardInterrupt

    monkeypatch.setattr(Lease, "take", pressing)
    with pytest.raises(KeyboardInterrupt):
        study_of(url)
    monkeypatch.undo()
    study_of(url).close()


def test_the_second_ctrl_c_does_not_wait(heeding: None) -> None:
    def pressing() -> None:
        with storage.unbroken():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(1)

    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        pressing()
    assert not reached


def test_a_password_is_not_shown() -> None:
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert shown("sqlite:///outputs/studies.db") == "sqlite:///outputs/studies.db"
    with pytest.raises(InputError, match=r"study\.storage=mysql\+nothing://me:\*\*\*@host/db cannot be used"):
        check_storage("mysql+nothing://me:secret@host/db")


# ------------------------------------------------------------------------------------------- one search at a time


def test_a_second_search_is_refused_with_what_the_first_is(url: str) -> None:
    with study_of(url):
        says = (
            rf"study 'mine' in {url} is being searched already, by host \S+, process {os.getpid()}, "
            rf"since {time.strftime('%Y-%m-%d')} [\d:]+ \S+: wait until that search has ended, or choose another "
            r"study\.name"
        )
        with pytest.raises(InputError, match=says):
            study_of(url)
        with study_of(url, "another"), pytest.raises(InputError, match=r"'another' in .* is being searched already"):
            study_of(url, "another")
    with study_of(url) as study:
        assert study.trials() == ()


def test_a_refused_study_is_not_held(url: str) -> None:
    with study_of(url):
        pass
    with pytest.raises(InputError, match="seed was 0, is 1"):
        study_of(url, fingerprint={"seed": 1})
    with study_of(url):
        pass


def test_a_search_whose_storage_was_out_of_reach_at_its_end_may_be_begun_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same process, a notebook's."""
    monkeypatch.setattr(storage, "LOCKED_S", 0.1)
    study = study_of(url)
    with locked(url):
        study.close()
    with study_of(url) as again:
        again.record(trial(0))
        assert again.trials() == (trial(0),)


def test_studies_in_memory_are_ones_own() -> None:
    with study_of(None) as one, study_of(None) as other:
        one.record(trial(0))
        assert other.trials() == ()


@pytest.fixture
def holding(url: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that searches the study."""
    program = (
        "import sys, time; from test_study import study_of\nwith study_of(sys.argv[1]):\n"
        " print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_killed_search_is_taken_over_at_once(url: str, holding: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError, match=f"process {holding.pid}"):
        study_of(url)
    holding.send_signal(signal.SIGKILL)  # nobody waits for it: its process number is still taken
    time.sleep(0.2)
    began, heard = time.monotonic(), Heard()
    with study_of(url, progress=heard) as study:
        study.record(trial(0))
    assert time.monotonic() - began < 3
    assert not heard.lines


def test_a_process_number_that_was_given_again_is_not_the_search(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(lease, "_began", lambda pid: "before this process")
        study_of(url)
    with study_of(url) as taken_over:
        taken_over.record(trial(0))
        assert taken_over.trials() == (trial(0),)


def test_a_search_elsewhere_is_refused_while_it_lives(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.3)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    with study_of(url):
        monkeypatch.setattr(lease, "_machine", lambda: "elsewhere")
        with pytest.raises(InputError, match="is being searched already"):
            study_of(url)


def test_a_search_elsewhere_that_fell_silent_is_taken_over(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "QUIET_S", 0.5)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    with study_of(url) as first:
        first.record(trial(0))
        monkeypatch.setattr(lease, "_machine", lambda: "elsewhere")
        heard = Heard()
        with study_of(url, progress=heard) as second:
            assert re.search(r"was left by host .*: waiting up to 0 s for a sign of life", heard.lines[0])
            assert second.trials() == (trial(0),)
            with pytest.raises(StorageError, match=r"study 'mine' in .* is searched by another now, by host"):
                first.record(trial(1))
            second.record(trial(1))
        assert second.trials() == (trial(0), trial(1))


def test_the_second_of_two_commands_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from test_cli import UNIFORM

    words = ["search", *UNIFORM, "study.name=mine"]
    assert cli.main(words) == 0
    opened = open_storage("sqlite:///outputs/studies.db")
    hold = Lease(opened.engine, opened.get_study_id_from_name("mine"), "'mine'")  # type: ignore[attr-defined]
    hold.take(print)
    capsys.readouterr()
    assert cli.main(words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("autoprune: study 'mine' in sqlite:///outputs/studies.db is being searched already, by host")
    hold.let_go()


# ------------------------------------------------------------------------------------------------- out of reach


def locked(url: str) -> Any:
    import sqlite3

    connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    return closing(connection)


def test_a_locked_study_is_waited_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOCKED_S", 0.2)
    heard = Heard()
    with study_of(url, progress=heard) as study:
        with locked(url) as connection:
            threading.Timer(1.0, connection.rollback).start()
            study.record(trial(0))
        study.record(trial(1))
        assert study.trials() == (trial(0), trial(1))
        assert len(study._study.get_trials()) == 2
    asked, back = heard.lines
    assert asked == (
        f"the study's storage {url} cannot be reached (database is locked): waiting, trying again for up to 10 minutes"
    )
    assert re.fullmatch(r"the study's storage can be reached again after \d s: the search goes on", back)


def test_a_storage_that_stays_away_ends_the_search(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOCKED_S", 0.1)
    monkeypatch.setattr(storage, "PATIENCE_S", 0.5)
    with study_of(url) as study:
        with locked(url), pytest.raises(StorageError, match=r"could not be reached for .* \(database is locked\)"):
            study.record(trial(0))
        assert study.trials() == ()


@pytest.mark.slow
def test_a_storage_that_is_gone_ends_the_search(url: str) -> None:
    import sqlite3

    with study_of(url) as study:
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            connection.execute("DROP TABLE trials")
        with pytest.raises(StorageError, match=r"the study's storage sqlite:.* failed: .*no such table"):
            study.record(trial(0))


@pytest.mark.slow
def test_a_command_whose_storage_is_lost_is_exit_1_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LOCKED_S", 0.1)
    from test_cli import UNIFORM

    monkeypatch.setattr(storage, "PATIENCE_S", 0.3)
    plain: Any = Study.record
    held: list[Any] = []

    def then_locked(self: Study, given: Trial) -> None:
        if given.number == 3 and not held:
            held.append(locked("sqlite:///outputs/studies.db"))
        plain(self, given)

    monkeypatch.setattr(Study, "record", then_locked)
    kept = [word for word in UNIFORM if not word.startswith("strategy")]
    words = ["search", *kept, "strategy=random", "strategy.episodes=6", "strategy.finalists=1"]
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    told, line = err.splitlines()[-2:]
    assert told.startswith("autoprune: the study's storage sqlite:///outputs/studies.db could not be reached for")
    assert told.endswith("; what was scored is kept. To go on:")
    assert "search" in line
    held[0].thing.close()
    assert cli.main(words) == 0
    assert "3 trials are not scored again" in " ".join(capsys.readouterr().err.split())
