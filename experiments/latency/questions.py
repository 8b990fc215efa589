"""Latency budgets, question by question: python experiments/latency/questions.py QUESTION [arguments]

    strategies [SEEDS [STRATEGIES [RECOVERY]]]      uniform,sensitivity,netadapt (or some of them, uniform first) at the
                        same measured latency, 3 seeds, where candidates get RECOVERY (reconstruct, the default, or
                        bn_recalibrate alone): test accuracy, recalibrated, reconstructed and fine-tuned
    finalists [BUDGET [SEED]]       what the sensitivity strategy chooses among: loss before training, after its short
                        fine-tune, and after one epoch
    calibrations        latency_20ms from 5 seeds: how many answers were measured before one was inside
    half                latency_50pct on the default, a MobileNetV2-style network, and (given its data) CIFAR-10
    same                the same network against itself, 40 times: how often is one called faster?
    allocator           the dense network with glibc's allocator as it comes, and keeping its memory
    loaded              latency_20ms while two processes load both cores for half of the time

Rows go to <question>.csv beside this file; `strategies` makes no row again that is there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import autoprune
from autoprune.borrowing import first, seeded
from autoprune.core import Task
from autoprune.criteria import l1
from autoprune.evaluate import Scoring
from autoprune.final import healed
from autoprune.meters.device import Device
from autoprune.meters.latency import Latency
from autoprune.prune import choose_units
from autoprune.recipe import HEALING, RECOVERY
from autoprune.reconstruct import Reconstruction
from autoprune.recover import FineTune, finetune, recalibrate
from autoprune.space import trace
from autoprune.tasks import cifar10_resnet20, fashion_mnist_resnet20

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append

HERE = Path(__file__).parent
TABLES = Path(tempfile.gettempdir()) / "autoprune_tables"
CACHE = Path(tempfile.gettempdir()) / "autoprune_cache"
BASE = "uniform"  # one ratio has few values: what its answer takes is what the others get, and 5 % that they leave
BASE_BUDGET = "latency_58pct"
STEPS = {"recalibrated": ("bn_recalibrate",), "reconstructed": HEALING}  # before any training
EPOCHS = 3  # of final fine-tunes
BUSY = "import time\nwhile 1:\n e=time.time()+{0}\n while time.time()<e: pass\n time.sleep({0})"


def strategies(count: str = "3", names: str = "uniform,sensitivity,netadapt", recovery: str = "reconstruct") -> None:
    task = fashion_mnist_resnet20.make_task(data="shipped")
    dense = correct(task.model, task)
    stages = (*STEPS, "fine-tuned")
    print(f"| seed | strategy | of dense | {' | '.join(f'{s} | against {BASE}' for s in stages)} | against dense |")
    for seed in range(int(count)):
        base = None
        for strategy in names.split(","):
            file = HERE / f"strategies_{recovery}_{seed}_{strategy}.npz"
            if not file.exists():
                budget = BASE_BUDGET if base is None else f"latency_{105 * float(base['high']):.1f}pct"
                np.savez_compressed(file, **_searched(task, strategy, budget, seed, recovery))
            found = np.load(file)
            base = found if base is None else base
            cells = [str(seed), strategy, f"{found['low']:.3f} to {found['high']:.3f}"]
            for stage in stages:
                cells += [f"{100 * found[stage].mean():.2f}", apart(found[stage], base[stage])]
            print("| " + " | ".join([*cells, apart(found["fine-tuned"], dense)]) + " |", flush=True)


def _searched(task: Task, strategy: str, budget: str, seed: int, recovery: str) -> dict[str, Any]:
    """Which test images the answer gets right, before its training and after it, and what it takes."""
    began = time.time()
    result = autoprune.search(
        task,
        budget=budget,
        strategy=strategy,
        seed=seed,
        scoring=Scoring(recovery=RECOVERY[RECOVERY.index(recovery) :]),
        final=FineTune(epochs=EPOCHS),
        tables=TABLES,
        cache=CACHE,
    )
    seconds = round(time.time() - began)
    with seeded(seed):
        batches = first(task.train, 8)
    found = {stage: correct(healed(task, result.table, batches, steps), task) for stage, steps in STEPS.items()}
    found["fine-tuned"] = correct(result.model, task)
    ms = result.measured["latency_ms"]
    values: dict[str, Any] = {"recovery": recovery, "budget": budget, "seed": seed, "strategy": strategy}
    values["met"] = result.met
    values |= {"ms": round(ms.value, 2), "low": round(ms.low, 2), "high": round(ms.high, 2)}
    values |= {"dense_ms": round(result.dense["latency_ms"].value, 2), "rounds": len(result.rounds)}
    values |= {"answers": sum(t.candidate.measure for t in result.trials), "seconds": seconds}
    append(HERE / "strategies.csv", values | {stage: round(float(right.mean()), 4) for stage, right in found.items()})
    dense = result.dense["latency_ms"].value
    return {**found, "low": ms.low / dense, "high": ms.high / dense}


def apart(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> str:
    """The paired difference in points with its 95 % interval."""
    each = 100 * (ours.astype(float) - theirs.astype(float))
    return f"{each.mean():+.2f} ± {1.96 * each.std() / np.sqrt(len(each)):.2f}"


def finalists(budget: str = "latency_47pct", seed: str = "0") -> None:
    task, number = fashion_mnist_resnet20.make_task(data="shipped"), int(seed)
    result = autoprune.search(task, budget=budget, seed=number, final=FineTune(epochs=0), tables=TABLES, cache=CACHE)
    traced = trace(task.model, task.inputs)
    importance = l1(task.model, traced.slices)
    trials = result.trials[: next(t.number for t in result.trials if t.candidate.measure)]
    for trial in (t for t in trials if "finalist" in t.candidate.about):
        kept = choose_units(result.space, importance, trial.candidate.ratios)
        model = traced.cut(task.model, kept)
        with seeded(number):
            batches = first(task.train, 4)
            Reconstruction(task.model, traced, batches).apply(model, kept)
            recalibrate(model, batches)
            before = search_loss(model, task)
            finetune(model, task.train, FineTune(epochs=1), loss=task.loss, lr=task.lr, teacher=task.model)
        values: dict[str, Any] = {"budget": budget, "seed": number, "finalist": trial.candidate.about["finalist"]}
        values |= {"before": before, "short": round(trial.loss, 4), "one_epoch": search_loss(model, task)}
        append(HERE / "finalists.csv", values)


def search_loss(model: nn.Module, task: Task) -> float:
    """Mean loss over the search split."""
    model.eval()
    with torch.inference_mode():
        losses = [(float(task.loss(model(x), y)), len(y)) for x, y in task.search]
    values, sizes = zip(*losses, strict=True)
    return round(float(np.average(values, weights=sizes)), 4)


def calibrations() -> None:
    task = fashion_mnist_resnet20.make_task(data="shipped")
    for seed in range(5):
        result = autoprune.search(
            task, budget="latency_20ms", seed=seed, final=FineTune(epochs=0), tables=TABLES, cache=CACHE
        )
        answers = [t for t in result.trials if t.candidate.measure]
        last = answers[-1]
        values: dict[str, Any] = {"seed": seed, "answers": len(answers), "feasible": last.feasible, "met": result.met}
        errors = [t.predicted["latency_ms"] / t.costs["latency_ms"].value - 1 for t in answers]
        values |= {"predicted_off": " ".join(f"{100 * e:+.1f}%" for e in errors)}
        values |= {k: round(getattr(result.measured["latency_ms"], k), 2) for k in ("value", "low", "high")}
        append(HERE / "calibrations.csv", values)


def half(data: str = "") -> None:
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from tiny import make_task

    mobile = make_task()
    batch = mobile.search[0][0].repeat(4, 1, 1, 1)  # type: ignore[index]
    tasks = [fashion_mnist_resnet20.make_task(data="shipped")]
    tasks += [Task(**{**vars(mobile), "name": "MobileNetV2-style", "inputs": (batch,)})]
    tasks += [cifar10_resnet20.make_task(data=data)] if data else []
    for task in tasks:
        result = autoprune.search(task, budget="latency_50pct", final=FineTune(epochs=1), tables=TABLES)
        ms, scores = result.measured["latency_ms"], result.scores
        values: dict[str, Any] = {
            "task": task.name,
            "met": result.met,
            "dense_ms": round(result.dense["latency_ms"].value, 2),
        }
        values |= {
            "of_dense": next(n for n in ms.notes if "of dense" in n),
            "test_dense": scores.test_dense,
            "test": scores.test_recovered,
        }
        append(HERE / "half.csv", values)


def same(times: str = "40") -> None:
    task = fashion_mnist_resnet20.make_task(data="shipped")
    device, inputs = Device(seconds=0.5, most_processes=5), (task.inputs[0][:10],)
    for i in range(int(times)):
        found = Latency(device, seed=i).ratio(task.model, task.model, inputs)
        values = {"ratio": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
        append(HERE / "same.csv", values | {"faster": found.high < 1, "slower": found.low > 1})


def allocator() -> None:
    from autoprune.meters import device

    task = fashion_mnist_resnet20.make_task(data="shipped")
    ours = device.ENVIRONMENT
    for name, environment in (("keeps", ours), ("as it comes", {"OMP_WAIT_POLICY": "PASSIVE"})) * 2:
        device.ENVIRONMENT = environment
        found = autoprune.latency(task.model, task.inputs)
        values: dict[str, Any] = {"allocator": name, "ms": round(found.value, 2)}
        append(HERE / "allocator.csv", values | {"low": round(found.low, 2), "high": round(found.high, 2)})


def loaded() -> None:
    """Runs the command itself, twice: loads of 50 ms and of 3 s."""
    for spell in ("0.05", "3"):
        others = [subprocess.Popen([sys.executable, "-c", BUSY.format(spell)]) for _ in range(2)]
        try:
            words = "search budget=latency_20ms finetune.epochs=0.1 evaluator.images=300 strategy.sweep_levels=3"
            done = subprocess.run([sys.executable, "-m", "autoprune", *words.split()], capture_output=True, text=True)
        finally:
            for other in others:
                other.kill()
        verdict = next((line for line in done.stdout.splitlines() if line.startswith("budget")), done.stderr[-200:])
        append(HERE / "loaded.csv", {"spells_s": spell, "exit": done.returncode, "said": verdict})


def correct(model: nn.Module, task: Task) -> NDArray[np.bool_]:
    """Which test images are classified correctly."""
    model.eval()
    with torch.inference_mode():
        return np.concatenate([(model(x).argmax(1) == y).numpy() for x, y in task.test])


if __name__ == "__main__":
    questions = {f.__name__: f for f in (strategies, finalists, calibrations, half, same, allocator, loaded)}
    questions[sys.argv[1]](*sys.argv[2:])
