"""How long does the exact allocation take? python experiments/allocation/scale.py

Chains of groups with a third as many more couplings, pairwise costs on a staircase of width 8 and smooth ones, both
limited to half; the whole program as one MILP (scipy, HiGHS) beside the same with bounds and reduced-cost fixing.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np

from autoprune import allocate
from autoprune.core import CostForm


def instance(seed: int, groups: int, levels: int) -> tuple[list[np.ndarray], list[tuple[CostForm, float]]]:
    rng = np.random.default_rng(seed)
    widths, kept = rng.integers(16, 256, groups), 1 - np.linspace(0, 0.9, levels)
    losses = [np.sort(np.r_[0, rng.gamma(0.5, 1, levels - 1) * rng.gamma(1, 1)]) for _ in range(groups)]
    limits = []
    for step in (8, 1):
        couplings = [(a, a + 1) for a in range(groups - 1)]
        couplings += [tuple(sorted(rng.choice(groups, 2, replace=False).tolist())) for _ in range(groups // 3)]
        pairs: dict[tuple[int, int], np.ndarray] = {}
        for a, b in couplings:
            table = np.outer(np.ceil(kept * widths[a] / step) * step, np.ceil(kept * widths[b] / step) * step)
            pairs[a, b] = pairs.get((a, b), 0) + table * rng.uniform(0.5, 2)
        form = CostForm(0.0, tuple(np.zeros(levels) for _ in range(groups)), pairs)
        limits.append((form, 0.5 * allocate.cost_of(form, [0] * groups)))
    return losses, limits


def main() -> None:
    rows = []
    for groups, levels, whole_too in ((20, 10, True), (50, 10, True), (60, 16, True), (100, 10, False)):
        for seed in range(3):
            losses, limits = instance(seed, groups, levels)
            runs = []
            for small in (300, 10**9) if whole_too else (300,):
                allocate.SMALL = small
                began = time.perf_counter()
                found = allocate.allocate(losses, limits, seconds=60)
                runs.append((round(time.perf_counter() - began, 2), found.gap))
            told = "; as one program ".join(f"{seconds:.2f} s, gap {gap:.1e}" for seconds, gap in runs)
            print(f"{groups} groups x {levels} levels, seed {seed}: {told}", flush=True)
            rows += [[groups, levels, seed, i == 0, *run] for i, run in enumerate(runs)]
    with (Path(__file__).parent / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["groups", "levels", "seed", "reduced", "seconds", "gap"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
