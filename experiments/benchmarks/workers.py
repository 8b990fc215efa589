"""What do workers gain, and what is overhead? python experiments/benchmarks/workers.py

Forty candidates of the shipped ResNet-20 (Fashion-MNIST), healed and scored on 1000 images, each alone and recorded
in an SQLite study: in one process, over one worker and over two, in turns in one run, one thread each. Overhead is what
is not inside of the candidates' own forward passes, as a share of the seconds of all workers; starting them, which a
search does once, stands beside it. Memory is what the coordinating process takes at most, above a process that has
imported torch: the packages, the task's own data and model, and all. Rows go to results/workers.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).parent / "results" / "workers.json"
COUNT = 42
MEMORY = """
import json
import sys
import torch
from pathlib import Path
def peak():  # getrusage's would be that of the process that started this one, where that was larger
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])
before = peak()
import autoprune
from autoprune.tasks.fashion_mnist_resnet20 import make_task
imports = peak()
make_task(data="shipped")
task = peak()
sys.path.insert(0, {here!r})
from workers import over, setting
from autoprune.workers import Local
over(setting(), Local(count=2), 8)
print(json.dumps({{"packages": imports - before, "task": task - imports, "all": peak() - before}}))
"""


def setting() -> Any:
    """An evaluator, and as many candidates as anybody wants."""
    from autoprune.criteria import l1
    from autoprune.evaluate import Evaluator, Scoring
    from autoprune.space import trace
    from autoprune.tasks.fashion_mnist_resnet20 import make_task

    task = make_task(data="shipped")
    traced = trace(task.model, task.inputs)
    settings: dict[str, Any] = {"budgets": (), "costs": {}, "meters": {}, "seed": 0, "cache": None}
    importance = l1(task.model, traced.slices)
    made = Evaluator(task, traced, importance, scoring=Scoring(shared_prefix=False), **settings)
    made.identity  # noqa: B018, what a search has found before its first candidate
    return made


def over(made: Any, crew: Any, count: int) -> dict[str, Any]:
    """Seconds until the first trial, and from there to the last; and of these, inside of forward passes."""
    from autoprune import spread
    from autoprune.core import Candidate
    from autoprune.study import Study

    space = made.traced.space
    made._scored.clear()  # it knows what it scored before
    asked = [
        Candidate(ratios=tuple(g.levels[(i + j) % len(g.levels)] for j, g in enumerate(space.groups)))
        for i in range(count)
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        Study(f"sqlite:///{folder}/studies.db", "x", fingerprint={}, space=space, budgets=()) as study,
        spread.over(made, crew) as evaluate,
    ):
        began, forward = time.perf_counter(), 0.0
        first = began
        for number, trial in enumerate(evaluate(list(enumerate(asked)))):
            assert trial.error is None
            study.record(trial)
            if number < 2:  # a worker each has come up
                first = time.perf_counter()
            else:
                forward += trial.seconds_in_forward
        seconds = time.perf_counter() - first
    return {"starting_s": first - began, "seconds": seconds, "forward_s": forward}


def main() -> None:
    from autoprune.workers import Local, Serial

    torch.set_num_threads(1)
    made = setting()
    crews = {"one process": Serial(), "one worker": Local(count=1), "two workers": Local(count=2)}
    best: dict[str, Any] = {}
    for _ in range(2):  # in turns, so that what disturbs the machine disturbs all
        for name, crew in crews.items():
            row = over(made, crew, COUNT)
            if name not in best or row["seconds"] < best[name]["seconds"]:
                best[name] = row
    for name, row in best.items():
        hands = 2 if name == "two workers" else 1
        row["overhead"] = round(1 - row["forward_s"] / (hands * row["seconds"]), 4)
        row["s_a_candidate"] = round(row["forward_s"] / (COUNT - 2), 3)
        print(name, row, flush=True)
    code = MEMORY.format(here=str(Path(__file__).parent))
    said = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = {
        **best,
        "speed_up": best["one worker"]["seconds"] / best["two workers"]["seconds"],
        "coordinator_mb": {part: round(kb / 1024) for part, kb in json.loads(said).items()},
    }
    print({"speed_up": rows["speed_up"], "coordinator_mb": rows["coordinator_mb"]})
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
