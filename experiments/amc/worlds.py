"""What makes AMC learn, and what it buys: python experiments/amc/worlds.py regret|options [SEEDS]

regret     on made-up networks whose optimum is known: how far each strategy's answer is from it, and how often it is
           ahead of uniform, of random search and of its own warm-up
options    AMC with one setting changed at a time, from the paper's to ours and beyond; nothing else differs

A world is a chain of 8 groups of 8 levels (autoprune.testing.World). Its optimum is the least loss of all 8^8 networks
that keep the budget. 400 candidates each, where a strategy counts them. Rows go to <question>.csv beside this file.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoprune import components
from autoprune.strategies.amc import Amc
from autoprune.testing import World, answer

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append, rows

HERE = Path(__file__).parent
EPISODES = 400
LAST = 50  # episodes that are compared with the warm-up
STRATEGIES = ("uniform", "random", "optuna", "optuna by score", "sensitivity", "netadapt", "amc_paper", "amc")
WIDE = {"hidden": (300, 300)}
PAPER: dict[str, Any] = WIDE | {"least": 0.0, "credit": "every_step"}
PAPER |= {"index": "scalar", "actor_lr": 1e-4, "decay": 0.95}
OPTIONS: dict[str, dict[str, Any]] = {
    "the paper's settings": PAPER,
    "+ least=0.95": PAPER | {"least": 0.95},
    "+ index=one_hot": PAPER | {"least": 0.95, "index": "one_hot"},
    "+ decay=0.99": PAPER | {"least": 0.95, "index": "one_hot", "decay": 0.99},
    "+ actor_lr=1e-3": PAPER | {"least": 0.95, "index": "one_hot", "decay": 0.99, "actor_lr": 1e-3},
    "+ credit=monte_carlo": WIDE,
    "+ hidden=[64,64], the default": {},
    "300 wide, updates=0, which learns nothing": WIDE | {"updates": 0},
    "300 wide, updates=4": WIDE | {"updates": 4},
    "300 wide, warm_up=50": WIDE | {"warm_up": 50},
    "300 wide, agent=td3": WIDE | {"agent": "td3"},
    "300 wide, agent=sac": WIDE | {"agent": "sac"},
    "300 wide, allocations=[1.0,0.9,0.8]": WIDE | {"allocations": (1.0, 0.9, 0.8)},
    "300 wide, stages=[1.5,1.2,1.0]": WIDE | {"stages": (1.5, 1.2, 1.0)},
}


def best(world: World) -> float:
    """The least loss of all networks that keep the budget as it is counted."""
    size = len(world.space.groups)
    levels = np.indices([len(g.levels) for g in world.space.groups]).reshape(size, -1)
    ratios = np.stack([np.asarray(g.levels)[row] for g, row in zip(world.space.groups, levels, strict=True)])
    loss = 0.3 + (world.weights[:, None] * ratios ** world.powers[:, None]).sum(0)
    loss += 0.05 * (ratios[1:] * ratios[:-1]).sum(0)
    (form,) = world.costs["macs"].tables()
    cost = form.constant + sum(u[row] for u, row in zip(form.unary, levels, strict=True))
    for (a, b), table in form.pairs.items():
        cost = cost + table[levels[a], levels[b]]
    return float(loss[cost * (1 + world.bias) <= world.budgets[0].limit].min())


def built(name: str, world: World, seed: int, **settings: Any) -> Any:
    values = components.spec("strategy", name.partition(" ")[0]) | settings
    values |= {"objective": "score"} if name.endswith("by score") else {}
    values |= {"episodes": EPISODES} if "episodes" in values else {}
    build = components.bind(values, "strategy", (), (), {}, seed=seed)
    return build(world.space, world.budgets, world.costs, seed=seed)


def played(world: World, strategy: Any) -> dict[str, Any]:
    """The answer's loss, and of an agent how much better it is paid at last than in its warm-up."""
    began = time.time()
    found: dict[str, Any] = {"loss": answer(world.play(strategy)).loss}
    if isinstance(strategy, Amc):
        rewards = [walk.reward for walk in strategy.walked]
        random = [walk.reward for walk in strategy.walked if walk.sigma is None]
        found["gained"] = round(statistics.mean(rewards[-LAST:]) - statistics.mean(random), 4)
    return found | {"seconds": round(time.time() - began, 1)}


def regret(seeds: int) -> None:
    file, optimum = HERE / "regret.csv", {}
    for seed in range(seeds):
        optimum[seed] = best(World(seed))
        for name in STRATEGIES:
            if not any(r["strategy"] == name and int(r["seed"]) == seed for r in rows(file)):
                world = World(seed)
                row = {"strategy": name, "seed": seed, "loss": 0.0, "gained": "", "seconds": 0.0}
                append(file, row | played(world, built(name, world, seed)))
    losses = {(r["strategy"], int(r["seed"])): float(r["loss"]) for r in rows(file)}
    print("| | mean regret | largest | ahead of uniform | of random | of its warm-up | s |\n" + "|---" * 7 + "|")
    for name in STRATEGIES:
        each = [losses[name, seed] - optimum[seed] for seed in range(seeds)]
        own = [r for r in rows(file) if r["strategy"] == name and int(r["seed"]) < seeds]
        gained = [float(r["gained"]) > 0 for r in own if r["gained"]]
        cells = [f"{statistics.mean(each):.4f}", f"{max(each):.4f}"]
        cells += [str(sum(losses[name, s] < losses[other, s] for s in range(seeds))) for other in ("uniform", "random")]
        cells += [str(sum(gained)) if gained else "", f"{statistics.mean(float(r['seconds']) for r in own):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def options(seeds: int) -> None:
    file = HERE / "options.csv"
    for seed in range(seeds):
        for option, settings in OPTIONS.items():
            if not any(r["option"] == option and int(r["seed"]) == seed for r in rows(file)):
                world = World(seed)
                found = played(world, built("amc", world, seed, **settings))
                append(file, {"option": option, "seed": seed, **found, "regret": round(found["loss"] - best(world), 5)})
    print("| | mean regret | largest | gained on the warm-up | s |\n" + "|---" * 5 + "|")
    for option in OPTIONS:
        own = [r for r in rows(file) if r["option"] == option and int(r["seed"]) < seeds]
        print(f"| {option} | {' | '.join(_means(own))} |")


def _means(own: Sequence[dict[str, str]]) -> list[str]:
    each = {key: [float(r[key]) for r in own] for key in ("regret", "gained", "seconds")}
    mean = {key: statistics.mean(values) for key, values in each.items()}
    return [f"{mean['regret']:.4f}", f"{max(each['regret']):.4f}", f"{mean['gained']:+.3f}", f"{mean['seconds']:.1f}"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"regret": regret, "options": options}[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 10)
