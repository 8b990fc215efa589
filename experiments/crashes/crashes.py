"""Is anything lost when processes are killed? python experiments/crashes/crashes.py

Searches of every strategy under a counted budget, on a small network trained on Fashion-MNIST, each compared with the
same search undisturbed. `main`: the searching process is killed (SIGKILL) at a random instant, started again, killed
again, until it has been killed so many times; then it may end. `workers`: one of two workers is killed at random
instants while the search goes on. After every death the study is read: no trial that was committed may be missing or
changed, none may be there twice, none may stand as running. In the end the table must be that of the undisturbed
search. Rows go to results.csv.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import optuna

HERE = Path(__file__).parent
TESTS = HERE.parents[1] / "tests"
STRATEGIES: dict[str, dict[str, Any]] = {
    "uniform": {"_target_": "autoprune.strategies.uniform.Uniform"},
    "sensitivity": {"_target_": "autoprune.strategies.sensitivity.Sensitivity"},
    "netadapt": {"_target_": "autoprune.strategies.netadapt.NetAdapt"},
    "amc": {"_target_": "autoprune.strategies.amc.Amc", "episodes": 60, "warm_up": 30},
    "random": {"_target_": "autoprune.strategies.random_search.RandomSearch", "episodes": 60},
    "optuna": {"_target_": "autoprune.strategies.optuna_sampler.OptunaSampler", "episodes": 60},
}
DEATHS = {"main": 30, "workers": 100}  # over all strategies

Record = dict[int, str]


def search(strategy: str, workers: int, storage: str) -> None:
    """In a process of its own: a search whose table is printed."""
    sys.path.insert(0, str(TESTS))
    from tiny import make_task

    import autoprune
    from autoprune.evaluate import Scoring
    from autoprune.recover import FineTune
    from autoprune.workers import Local, Serial

    found = autoprune.search(
        make_task(),
        budget="flops_50pct",
        strategy=STRATEGIES[strategy],
        scoring=Scoring(images=500),
        final=FineTune(epochs=0.5),
        storage=storage,
        study_name=strategy,
        workers=Local(count=workers) if workers else Serial(),
    )
    digest = hashlib.sha256(repr([(g.name, g.units) for g in found.table.groups]).encode()).hexdigest()
    print(json.dumps({"table": digest, "trials": len(found.trials), "score": found.scores.test_recovered}), flush=True)


def started(strategy: str, workers: int, storage: str) -> subprocess.Popen[str]:
    words = [sys.executable, __file__, strategy, str(workers), storage]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def answer(process: subprocess.Popen[str]) -> Any:
    said, _ = process.communicate()
    assert process.returncode == 0, f"ended with {process.returncode}"
    return json.loads(said.splitlines()[-1])


def record(storage: str, study: str) -> Record:
    """What the study holds of every trial, but how long it took."""
    if study not in optuna.study.get_all_study_names(storage):
        return {}
    found: Record = {}
    for frozen in optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False):
        assert frozen.state.is_finished(), f"trial {frozen.number} stands as {frozen.state}"
        values = json.loads(frozen.user_attrs["trial"])
        assert values["number"] not in found, f"trial {values['number']} is there twice"
        found[values["number"]] = json.dumps({k: v for k, v in values.items() if not k.startswith("seconds")})
    return found


def kept(before: Record, after: Record) -> None:
    for number, trial in before.items():
        assert after.get(number) == trial, f"trial {number} was lost or changed"


def main_killed(strategy: str, deaths: int, rng: random.Random, undisturbed_s: float) -> tuple[Any, int]:
    with tempfile.TemporaryDirectory() as folder:
        storage, known, killed = f"sqlite:///{folder}/studies.db", Record(), 0
        while killed < deaths:
            process = started(strategy, 0, storage)
            time.sleep(rng.uniform(0.3, 1.0) * undisturbed_s / 2 if killed % 2 else rng.uniform(0, undisturbed_s))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            now = record(storage, strategy)
            kept(known, now)
            known = now
        found = answer(started(strategy, 0, storage))
        kept(known, record(storage, strategy))
    return found, killed


def workers_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found += [int(entry.name)] * (b"autoprune.workers" in (entry / "cmdline").read_bytes())
        except (OSError, IndexError):
            continue  # it has just ended
    return found


def workers_killed(strategy: str, deaths: int, rng: random.Random) -> tuple[Any, int]:
    killed = 0
    found: Any = None
    while killed < deaths:
        with tempfile.TemporaryDirectory() as folder:
            storage = f"sqlite:///{folder}/studies.db"
            process, over = started(strategy, 2, storage), threading.Event()

            def kill(process: subprocess.Popen[str] = process, over: threading.Event = over) -> None:
                nonlocal killed
                while not over.wait(rng.expovariate(1 / 6)):
                    if workers := workers_of(process.pid):
                        os.kill(rng.choice(workers), signal.SIGKILL)
                        killed += 1

            thread = threading.Thread(target=kill)
            thread.start()
            try:
                now = answer(process)
            finally:
                over.set()
                thread.join()
            assert len(record(storage, strategy)) == now["trials"]
        assert found in (None, now)
        found = now
    return found, killed


def main() -> None:
    rows = []
    for number, strategy in enumerate(STRATEGIES):
        rng = random.Random(number)
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            expected = answer(started(strategy, 0, f"sqlite:///{folder}/studies.db"))
            seconds = time.monotonic() - began
        ends = {"main": main_killed(strategy, DEATHS["main"] // len(STRATEGIES), rng, seconds)}
        if strategy != "uniform":  # which has nothing for workers to do
            ends["workers"] = workers_killed(strategy, DEATHS["workers"] // (len(STRATEGIES) - 1), rng)
        for killed, (found, times) in ends.items():
            row = {"strategy": strategy, "killed": killed, "times": times, "trials": found["trials"]}
            rows.append(row | {"same": found == expected})
            print(rows[-1], flush=True)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert all(row["same"] for row in rows)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        search(sys.argv[1], int(sys.argv[2]), sys.argv[3])
