from __future__ import annotations

import ctypes
import itertools
import math
import sys
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from autoprune.allocate import InfeasibleError, allocate, cost_of
from autoprune.borrowing import silent
from autoprune.core import CostForm

Floats = NDArray[np.float64]


def instance(seed: int) -> tuple[list[Floats], list[tuple[CostForm, float]]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, int(rng.integers(2, 6)))
    losses = [rng.random(n) for n in sizes]
    if seed % 3 == 0:
        losses[0][-1] = np.inf
    forms = []
    for _ in range(int(rng.integers(1, 3))):
        pairs = {
            (a, b): rng.normal(size=(sizes[a], sizes[b]))
            for a, b in itertools.combinations(range(len(sizes)), 2)
            if rng.random() < 0.5
        }
        forms.append(CostForm(float(rng.normal()), tuple(rng.normal(size=n) for n in sizes), pairs))
    costs = [[cost_of(f, c) for c in itertools.product(*map(range, sizes))] for f in forms]
    return losses, [(f, float(np.quantile(c, 0.35))) for f, c in zip(forms, costs, strict=True)]


def brute_force(losses: list[Floats], limits: list[tuple[CostForm, float]]) -> float:
    best = math.inf
    for levels in itertools.product(*(range(len(row)) for row in losses)):
        if all(cost_of(form, levels) <= limit for form, limit in limits):
            best = min(best, sum(row[i] for row, i in zip(losses, levels, strict=True)))
    return best


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_equals_brute_force(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if first >= 100:  # the path of large programs, with bounds and fixing, on small ones too
        monkeypatch.setattr("autoprune.allocate.SMALL", 0)
    for seed in range(first, first + 20):
        losses, limits = instance(seed)
        best = brute_force(losses, limits)
        if math.isinf(best):
            with pytest.raises(InfeasibleError):
                allocate(losses, limits)
            continue
        found = allocate(losses, limits)
        assert found.loss == pytest.approx(best, abs=1e-9)
        assert all(cost_of(form, found.levels) <= limit for form, limit in limits)


def large(seed: int, groups: int = 60, levels: int = 16) -> tuple[list[Floats], list[tuple[CostForm, float]]]:
    """A chain with twenty more couplings, one cost a staircase of width 8, one smooth, both limited to half."""
    rng = np.random.default_rng(seed)
    widths = rng.integers(16, 256, groups)
    kept = 1 - np.linspace(0, 0.9, levels)
    losses = [np.sort(np.r_[0, rng.gamma(0.5, 1, levels - 1) * rng.gamma(1, 1)]) for _ in range(groups)]
    forms = []
    for step in (8, 1):
        couplings = [(a, a + 1) for a in range(groups - 1)]
        couplings += [tuple(sorted(rng.choice(groups, 2, replace=False).tolist())) for _ in range(20)]
        pairs: dict[tuple[int, int], Floats] = {}
        for a, b in couplings:
            table = np.outer(np.ceil(kept * widths[a] / step) * step, np.ceil(kept * widths[b] / step) * step)
            pairs[a, b] = pairs.get((a, b), 0) + table * rng.uniform(0.5, 2)
        forms.append(CostForm(0.0, tuple(np.zeros(levels) for _ in range(groups)), pairs))
    return losses, [(f, 0.5 * cost_of(f, [0] * groups)) for f in forms]


def test_sixty_groups_with_pairs_and_two_budgets_are_solved_to_optimality() -> None:
    losses, limits = large(0)
    began = time.perf_counter()
    found = allocate(losses, limits)
    print(f"60 groups x 16 levels, 79 pairs, 2 budgets: {time.perf_counter() - began:.2f} s, gap {found.gap:.1e}")  # noqa: T201
    assert found.gap <= 1e-6
    assert all(cost_of(form, found.levels) <= limit for form, limit in limits)


def test_a_limit_of_a_large_count_is_kept_to_the_last_one() -> None:
    """Integer costs of 1e8 and more: the solver's relative tolerance alone would let dozens pass."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = [np.sort(rng.integers(1, 10**8, 6))[::-1].astype(float) for _ in range(5)]
        form = CostForm(0.0, tuple(costs), {})
        some = [int(i) for i in rng.integers(0, 6, 5)]
        limit = cost_of(form, some) - 1
        losses = [np.sort(rng.random(6)) for _ in range(5)]
        try:
            assert cost_of(form, allocate(losses, [(form, limit)]).levels) <= limit
        except InfeasibleError:
            assert sum(c[-1] for c in costs) > limit


def test_no_level_allowed_is_infeasible() -> None:
    form = CostForm(0.0, (np.zeros(2),), {})
    with pytest.raises(InfeasibleError):
        allocate([np.array([np.inf, np.inf])], [(form, 1.0)])
    with pytest.raises(InfeasibleError):
        allocate([np.array([0.0, 1.0])], [(form, -1.0)])


def test_what_a_library_prints_past_python_is_not_seen(capfd: pytest.CaptureFixture[str]) -> None:
    """As HiGHS does, of some solutions: what reads our output would stumble over it."""
    library = ctypes.CDLL(None)
    sys.stdout.write("before\n")
    with silent():
        library.puts(b"inside")
    library.puts(b"after")
    library.fflush(None)
    sys.stdout.write("and then\n")
    assert capfd.readouterr().out.splitlines() == ["before", "after", "and then"]
