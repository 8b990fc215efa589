"""Candidates over several processes: the same trials, whoever dies, hangs or runs out of memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ends, make_task
from torch import Tensor, nn
from zoo import cells

import autoprune
from autoprune.cli import main
from autoprune.core import Candidate, InputError, Task, Trial
from autoprune.crew import Crew, WorkersLostError
from autoprune.criteria import l1
from autoprune.evaluate import Evaluator, Scoring
from autoprune.lineage import Networks
from autoprune.recover import FineTune
from autoprune.space import trace
from autoprune.spread import DEATHS, STARTS, Spread
from autoprune.sweep import alone
from autoprune.workers import Local


class Trap(nn.Module):
    """A network that does something else where its first layer has a certain width."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.traps = model, dict[int, str]()

    def forward(self, x: Tensor) -> Tensor:
        width = next(self.model.parameters()).shape[0]
        match self.traps.get(width):
            case "raises":
                raise RuntimeError("this width is not for me")
            case "nan":
                x = x * float("nan")
            case "memory":
                torch.empty(2**34, dtype=torch.uint8)
            case "idles":
                time.sleep(0.07)
            case "hangs":
                time.sleep(1000)
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.as_tensor(self.model(x))


class Locked(list[Any]):
    """Batches that no other process can be given."""

    def __init__(self, batches: Iterable[Any]) -> None:
        super().__init__(batches)
        self.lock = threading.Lock()


def evaluator(task: Task | None = None, *, images: int = 200, shared: bool = True) -> Evaluator:
    task = make_task() if task is None else task
    traced = trace(task.model, task.inputs)
    settings: dict[str, Any] = {"budgets": (), "costs": {}, "meters": {}, "seed": 0, "cache": None}
    scoring = Scoring(images=images, recalibration=1, shared_prefix=shared)
    return Evaluator(task, traced, l1(task.model, traced.slices), scoring=scoring, **settings)


def trapped(*kinds: str, shared: bool = True) -> tuple[Evaluator, list[tuple[int, Candidate]]]:
    """An evaluator of a network with these traps, and a batch: candidates that run into them between others."""
    task = make_task()
    traced = trace(task.model, task.inputs)
    first = next(iter(dict(task.model.named_parameters())))
    g = next(i for i, pieces in enumerate(traced.slices) if any((p.tensor, p.role) == (first, "out") for p in pieces))
    group = traced.space.groups[g]
    traps = {group.kept(group.levels[i]): kind for i, kind in enumerate(kinds, start=1)}
    made = evaluator(replace(task, model=Trap(task.model).eval()), shared=shared)
    made.dense_model.__dict__["traps"] = traps  # the trace has seen none
    fatal = [
        Candidate(ratios=made.traced.space.ratios(alone(made.traced.space, (g, i)))) for i in range(1, len(kinds) + 1)
    ]
    others = [c for _, c in swept(made, 1) if c not in fatal][:4]
    return made, list(enumerate([*others[:2], *fatal, *others[2:]]))


def swept(made: Evaluator, count: int = 2) -> list[tuple[int, Candidate]]:
    space = made.traced.space
    asked = [Candidate(ratios=space.ratios(alone(space, cell))) for cell in cells(space, count)]
    return list(enumerate([Candidate(ratios=space.dense()), *asked]))


def told(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    """All of the trials but how long they took."""
    return [(t.number, t.candidate, t.score, t.loss, t.loss_change, t.costs, t.error) for t in trials]


def spread(made: Evaluator, crew: Crew, batch: Sequence[tuple[int, Candidate]]) -> list[Trial]:
    with Spread(made, crew) as evaluate:
        return list(evaluate(batch))


def children(of: int) -> list[int]:
    """The workers of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == of and b"autoprune.workers" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return sorted(found)


# ------------------------------------------------------------------------------------------------ the same trials


@pytest.mark.slow
def test_workers_give_the_trials_of_one_process() -> None:
    serial, over = evaluator(), evaluator()
    batch = swept(serial)
    batch.append((len(batch), replace(batch[-1][1], recovery="short")))
    expected = list(serial(batch))
    assert told(spread(over, Local(count=2), batch)) == told(expected)
    assert over.evaluations == serial.evaluations == len(batch)
    assert over.shared > 0.3 * serial.shared > 0
    assert not children(os.getpid())


@pytest.mark.slow
def test_a_search_finds_the_same_whatever_the_number_of_workers() -> None:
    settings: dict[str, Any] = {"strategy": "netadapt", "budget": "flops_50pct", "scoring": Scoring(images=200)}
    here, there = (
        autoprune.search(make_task(), **settings, final=FineTune(epochs=0), workers=workers)
        for workers in ("serial", Local(count=4))
    )
    assert told(there.trials) == told(here.trials)
    assert there.table.groups == here.table.groups
    assert there.scores == here.scores


def test_the_users_threads_are_left_as_they_were() -> None:
    made, before = evaluator(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = [torch.get_num_threads() for _ in made(swept(made)[:2])]
        assert seen == [2, 2]
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- deaths and other ends


@pytest.mark.slow
def test_what_kills_its_workers_fails_and_what_is_beside_it_does_not() -> None:
    made, batch = trapped("dies")
    alike, _ = trapped("raises")
    expected = list(alike(batch))
    trials = spread(made, Local(count=2), batch)
    assert trials[2].error == f"{DEATHS} workers were lost on it alone; of the last, its worker was killed by SIGKILL"
    assert told([t for t in trials if not t.error]) == told([t for t in expected if not t.error])
    assert [t.number for t in trials if t.error] == [t.number for t in expected if t.error] == [2]


@pytest.mark.slow
def test_what_hangs_raises_or_runs_out_of_memory_fails_with_its_reason() -> None:
    made, batch = trapped("hangs", "raises", "nan", "memory")
    alike, _ = trapped(*4 * ["raises"])
    expected = list(alike(batch))
    began = time.monotonic()
    trials = spread(made, Local(count=2, limit_s=5, memory_mb=1000), batch)
    assert [t.number for t in trials if t.error] == [t.number for t in expected if t.error] == [2, 3, 4, 5]
    hung, raised, nan, memory = (str(t.error) for t in trials[2:6])
    assert hung == "it took longer than limit_s=5 and was killed"
    assert raised == "RuntimeError: this width is not for me"
    assert nan.startswith("FloatingPointError")
    assert "memory" in memory
    assert 5 <= trials[2].seconds <= 7
    assert told([t for t in trials if not t.error]) == told([t for t in expected if not t.error])
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.long
def test_a_limit_that_only_single_candidates_keep_ends_scoring_together(caplog: pytest.LogCaptureFixture) -> None:
    made, batch = trapped()
    made.dense_model.__dict__["traps"] = dict.fromkeys(range(1000), "idles")  # each alone for one second or two
    with Spread(made, Local(count=1, limit_s=2)) as evaluate:
        first, second = list(evaluate(batch)), list(evaluate(batch))
    assert not [t.error for t in first if t.error]
    assert told(first) == told(second)
    killed, alone_from_now_on = (record.message for record in caplog.records)
    assert killed == "its worker was killed at its limit; 4 candidates go to others"
    assert alone_from_now_on.startswith("limit_s=2 is enough for each candidate but not for those")


@pytest.mark.slow
@pytest.mark.long
def test_what_came_while_a_trial_was_recorded_is_not_late() -> None:
    made = evaluator()
    batch = [(n, replace(c, recovery="short")) for n, c in swept(made, 1)[:3]]
    with Spread(made, Local(count=2, limit_s=4)) as evaluate:
        trials = []
        for trial in evaluate(batch):
            trials.append(trial)
            time.sleep(7)  # a database that has to be waited for
    assert not [t.error for t in trials if t.error]


@pytest.mark.slow
def test_a_worker_without_memory_for_its_parcel_is_lost_and_nothing_hangs() -> None:
    made, _ = trapped()
    made.remember((), Networks(None))
    parent = swept(made)[1][1]
    made.healer.known[0] = parent
    assert made.healer.networks is not None
    made.healer.networks.add(made._digest(parent), {"large": torch.zeros(64 * 2**20)})
    child = replace(parent, parent=0)
    (trial,) = spread(made, Local(count=1, memory_mb=200), [(1, child)])
    assert str(trial.error).startswith(f"{DEATHS} workers were lost on it alone")


@pytest.mark.slow
def test_a_worker_that_is_killed_from_without_costs_nothing_but_time() -> None:
    made = evaluator()
    batch = [(n, replace(c, recovery="short")) for n, c in swept(made, 1)[:6]]
    with Spread(made, Local(count=2)) as evaluate:
        trials = []
        for trial in evaluate(batch):
            trials.append(trial)
            if len(trials) < 3:
                os.kill(children(os.getpid())[0], signal.SIGKILL)
    assert told(trials) == told(list(evaluator()(batch)))


@pytest.mark.slow
def test_workers_end_with_who_started_them(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(
        "import os, signal\n"
        "from test_workers import evaluator, swept, Spread, Local\n"
        "made = evaluator()\n"
        "with Spread(made, Local(count=2)) as evaluate:\n"
        "    trials = evaluate(swept(made))\n"
        "    next(trials)\n"
        "    print('begun', flush=True)\n"
        "    signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    workers = children(process.pid)
    assert workers
    process.kill()
    process.wait()
    assert all(ends(pid) for pid in workers)


# ---------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_sent_is_an_input_error() -> None:
    made = evaluator(replace(make_task(), train=Locked(make_task().train)))
    with pytest.raises(InputError, match=r"cannot be sent to another process.*workers=serial"):
        spread(made, Local(count=1), swept(made)[:1])


@pytest.mark.slow
def test_what_a_worker_cannot_read_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passing.py").write_text("def loss(output, target):\n    return output.sum()\n")
    monkeypatch.syspath_prepend(tmp_path)
    import passing  # type: ignore[import-not-found]

    made = evaluator(replace(make_task(), loss=passing.loss))
    (tmp_path / "passing.py").unlink()
    with pytest.raises(InputError, match=r"another process cannot evaluate this task \(ModuleNotFoundError"):
        spread(made, Local(count=1), swept(made)[:1])


def test_workers_that_never_come_up_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluator()
    monkeypatch.setattr("autoprune.workers.START", "raise SystemExit(7)")
    with pytest.raises(WorkersLostError, match=rf"{STARTS} workers in a row.*ended with status 7"):
        spread(made, Local(count=2), swept(made)[:3])
    assert not children(os.getpid())


def test_a_worker_that_hangs_before_it_is_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluator()
    monkeypatch.setattr("autoprune.workers.START", "import time; time.sleep(1000)")
    monkeypatch.setattr("autoprune.spread.START_S", 0.2)
    with pytest.raises(WorkersLostError, match=rf"{STARTS} workers in a row.*killed at its limit"):
        spread(made, Local(count=2), swept(made)[:3])
    assert not children(os.getpid())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["workers=local", "workers.count=0"], "count must be a whole number, 1 or more, got count=0"),
        (["workers=local", "workers.limit_s=-1"], "limit_s must be null or above 0, got limit_s=-1"),
        (["workers=local", "workers.memory_mb=0"], "memory_mb must be null or above 0, got memory_mb=0"),
        (["workers=ray", "workers.gpus=-1"], "gpus >= 0 must hold, got gpus=-1"),
        (["workers=slurm"], "slurm"),
        (["evaluator.threads=0"], "threads must be a whole number, 1 or more, got threads=0"),
    ],
)
def test_wrong_settings_are_refused(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", *words]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert len(said.splitlines()) == 1
