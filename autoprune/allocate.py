"""Exact allocation: one level a group so that the summed loss is least and every cost keeps its limit; and, as the
baseline, one ratio for all.

A multiple-choice knapsack with costs of single groups and of pairs of groups, solved as a mixed-integer program by
HiGHS (scipy). A pair's cost is linearised exactly by its marginals y[i, j] >= 0 with sum_j y = x_a[i] and sum_i y =
x_b[j] (the local polytope; Savchynskyy, "Discrete graphical models", 2019, section 4.1); with x binary y is the
product. What counts only while a block is kept is z >= 0 with z >= its cost - its largest cost x [the block is gone].
Large programs are first made small without losing exactness: the linear relaxation gives a lower bound and
reduced costs, a program over the levels near its solution an upper bound, and every level whose reduced cost exceeds
the distance between the two cannot be in the best allocation (reduced-cost fixing; Nemhauser & Wolsey, 1988, II.5.3).

Letters: G groups, L levels of one group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, vstack

from autoprune.borrowing import silent
from autoprune.core import CostForm, PruningSpace
from autoprune.units import Labels

if TYPE_CHECKING:
    from autoprune.core import Floats


EVENNESS = (0.125, 0.25, 0.5)  # weights of `charged` that a search does well to try
SMALL = 300  # levels in all; below that the whole program solves at once


@dataclass(frozen=True)
class Allocation:
    """Level indices, one a group; the summed loss; whether it is proven best to within `gap` (a fraction)."""

    levels: tuple[int, ...]
    loss: float
    gap: float


class InfeasibleError(Exception):
    """No choice of levels keeps every limit."""


def cost_of(form: CostForm, levels: Sequence[int]) -> float:
    """The cost of a choice of levels."""
    single = sum(float(u[i]) for u, i in zip(form.unary, levels, strict=True))
    pairs = sum(float(t[levels[a], levels[b]]) for (a, b), t in form.pairs.items())
    return form.constant + single + pairs + sum(cost_of(f, levels) for b, f in form.gated.items() if levels[b] == 0)


def charged(space: PruningSpace, losses: Sequence[Floats], weight: float) -> list[Floats]:
    """Losses [L] a group with a charge on ratios, quadratic, so that it spreads what is cut over the groups: weight x
    ratio squared x the groups' mean loss at the deepest level that could be scored."""
    deepest = [row[np.isfinite(row)][-1] for row in losses if np.isfinite(row[1:]).any()]
    scale = weight * abs(float(np.mean(deepest))) if deepest else 0.0
    return [row + scale * np.square(g.levels) for g, row in zip(space.groups, losses, strict=True)]


def within(losses: Sequence[Floats], least: Sequence[int], most: Sequence[int]) -> list[Floats]:
    """Losses [L] a group that bar, being infinite there, every level below `least` and above `most`."""
    rows = [row.copy() for row in losses]
    for row, low, high in zip(rows, least, most, strict=True):
        row[:low] = row[high + 1 :] = np.inf
    return rows


def first_inside(
    choices: Iterable[tuple[int, ...]], keeps: Callable[[tuple[int, ...]], bool], losses: Sequence[Floats] = ()
) -> tuple[int, ...]:
    """The first of these choices of level indices that `keeps` every limit.

    losses: [L] a group, as of `allocate`: an infinite entry is a level that may not be taken.

    Raises:
        InfeasibleError: none does.
    """
    for levels in choices:
        if all(np.isfinite(row[i]) for row, i in zip(losses, levels, strict=False)) and keeps(levels):
            return levels
    raise InfeasibleError


def evenly(
    space: PruningSpace, keeps: Callable[[tuple[int, ...]], bool], losses: Sequence[Floats] = ()
) -> tuple[int, ...]:
    """The baseline: the first of `common_ratios`; see `first_inside`."""
    return first_inside(common_ratios(space), keeps, losses)


def globally(
    space: PruningSpace, keeps: Callable[[tuple[int, ...]], bool], losses: Sequence[Floats] = ()
) -> tuple[int, ...]:
    """As `evenly`, one threshold of importance standing for one ratio: the first of `common_thresholds`."""
    return first_inside(common_thresholds(space), keeps, losses)


def common_ratios(space: PruningSpace) -> Iterator[tuple[int, ...]]:
    """Level indices nearest above one common ratio, from the least ratio to the largest; a group that has no such level
    gives its deepest. Of the blocks, that share of them goes, evenly spread over the depth."""
    blocks = [i for i, group in enumerate(space.groups) if group.kind == "block"]
    widths = {level for group in space.groups if group.kind != "block" for level in group.levels}
    for common in sorted(widths | {k / len(blocks) for k in range(len(blocks) + 1) if blocks}):
        count = round(common * len(blocks))
        out = {blocks[int((k + 0.5) * len(blocks) / count)] for k in range(count)}
        each = ((i for i, ratio in enumerate(g.levels) if ratio >= common) for g in space.groups)
        levels = tuple(next(i, len(g.levels) - 1) for i, g in zip(each, space.groups, strict=True))
        yield tuple(int(g in out) if g in blocks else level for g, level in enumerate(levels))


def common_thresholds(space: PruningSpace) -> Iterator[tuple[int, ...]]:
    """Level indices of the space's thresholds, from the least that is removed to the most."""
    for ratios in space.thresholds:
        yield tuple(g.levels.index(ratio) for g, ratio in zip(space.groups, ratios, strict=True))


def allocate(
    losses: Sequence[Floats], limits: Sequence[tuple[CostForm, float]], *, seconds: float = 30.0, gap: float = 1e-6
) -> Allocation:
    """The levels of least total loss with every form at most its limit.

    losses: [L] a group; an infinite entry is a level that may not be taken. seconds: time limit, after which the best
    allocation found is returned with its remaining gap.

    Raises:
        InfeasibleError: no choice keeps all limits (or none was found in time).
    """
    tightened = list(limits)
    for _ in range(5):
        found = _solved(losses, tightened, seconds, gap)
        over = [cost_of(form, found.levels) - limit for form, limit in limits]
        if max(over) <= 0:
            return found
        # the solver's tolerance let a limit pass by a hair: ask for that hair, and one more
        tightened = [
            (form, inner - 2 * max(0.0, past) - (1e-9 * abs(inner) if past > 0 else 0.0))
            for (form, inner), past in zip(tightened, over, strict=True)
        ]
    raise InfeasibleError


def _solved(
    losses: Sequence[Floats], limits: Sequence[tuple[CostForm, float]], seconds: float, gap: float
) -> Allocation:
    choices = [np.flatnonzero(np.isfinite(row)) for row in losses]
    if not all(len(levels) for levels in choices):
        raise InfeasibleError
    began = time.perf_counter()
    losses = [np.asarray(row, dtype=np.float64) for row in losses]
    limits = [(_reduced(form), limit) for form, limit in limits]
    if sum(len(levels) for levels in choices) > SMALL:
        relaxed = _Program(losses, limits, choices).relax()
        near = [_neighbours(support, levels) for support, levels in zip(relaxed.support, choices, strict=True)]
        try:
            bound = _Program(losses, limits, near).solve(seconds / 3, gap).loss
        except InfeasibleError:
            bound = np.inf
        room = bound - relaxed.loss + 1e-9 * max(1.0, abs(bound))
        choices = [levels[cost <= room] for levels, cost in zip(choices, relaxed.reduced_costs, strict=True)]
    return _Program(losses, limits, choices).solve(seconds - (time.perf_counter() - began), gap)


@dataclass(frozen=True)
class _Relaxed:
    """The linear relaxation: its loss, and of each group the levels it uses and the reduced cost of every level."""

    loss: float
    support: list[Labels]
    reduced_costs: list[Floats]


class _Program:
    """The mixed-integer program over the chosen levels of each group: x of every level, then y of every pair."""

    def __init__(
        self, losses: Sequence[Floats], limits: Sequence[tuple[CostForm, float]], choices: Sequence[Labels]
    ) -> None:
        self.choices = choices
        self.losses = losses
        self.limits = [(_restricted(form, choices), limit) for form, limit in limits]
        forms = [part for form, _ in self.limits for part in (form, *form.gated.values())]
        self.keys = sorted({key for form in forms for key in form.pairs})
        self.sizes = [len(levels) for levels in choices]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        pair_sizes = [self.sizes[a] * self.sizes[b] for a, b in self.keys]
        self.pair_starts = self.starts[-1] + np.concatenate([[0], np.cumsum(pair_sizes)]).astype(int)
        gates = [(number, block) for number, (form, _) in enumerate(self.limits) for block in form.gated]
        self.gates = {gate: int(self.pair_starts[-1]) + i for i, gate in enumerate(gates)}  # the place of each z
        self.count = int(self.pair_starts[-1]) + len(gates)
        self.upper = np.ones(self.count)
        self.upper[int(self.pair_starts[-1]) :] = np.inf
        self.objective = np.zeros(self.count)
        flat = np.concatenate([row[levels] for row, levels in zip(losses, choices, strict=True)])
        self.scale = max(float(np.abs(flat).max()), 1e-12)
        self.objective[: len(flat)] = flat / self.scale
        self.equalities = [self._one_level_each(), *([self._marginals()] if self.keys else [])]
        self.inequalities = [self._within(number) for number in range(len(self.limits))]
        self.inequalities += [self._counted(number, block) for number, block in gates]

    def solve(self, seconds: float, gap: float) -> Allocation:
        integrality = np.zeros(self.count)
        integrality[: self.starts[-1]] = 1
        with silent():
            found = milp(
                self.objective,
                constraints=[*self.equalities, *self.inequalities],
                integrality=integrality,
                bounds=Bounds(0, self.upper),
                options={"time_limit": max(seconds, 1.0), "mip_rel_gap": gap},
            )
        if found.x is None:
            raise InfeasibleError
        levels = tuple(int(levels[np.argmax(x)]) for levels, x in zip(self.choices, self._split(found.x), strict=True))
        loss = float(sum(row[i] for row, i in zip(self.losses, levels, strict=True)))
        return Allocation(levels, loss, float(found.mip_gap or 0.0))

    def relax(self) -> _Relaxed:
        found = linprog(
            self.objective,
            A_eq=vstack([c.A for c in self.equalities]),
            b_eq=np.concatenate([np.broadcast_to(c.ub, c.A.shape[0]) for c in self.equalities]),
            A_ub=vstack([c.A for c in self.inequalities]),
            b_ub=np.concatenate([np.atleast_1d(c.ub) for c in self.inequalities]),
            bounds=np.stack([np.zeros(self.count), self.upper], axis=1),
            method="highs-ds",  # a vertex: interior solutions have no useful reduced costs
        )
        if found.x is None:
            raise InfeasibleError
        support = [np.flatnonzero(x > 1e-9) for x in self._split(found.x)]
        return _Relaxed(found.fun * self.scale, support, [c * self.scale for c in self._split(found.lower.marginals)])

    def _split(self, values: Floats) -> list[Floats]:
        return np.split(values[: self.starts[-1]], self.starts[1:-1])

    def _one_level_each(self) -> LinearConstraint:
        total = int(self.starts[-1])
        rows = np.repeat(np.arange(len(self.sizes)), self.sizes)
        matrix = coo_array((np.ones(total), (rows, np.arange(total))), shape=(len(self.sizes), self.count))
        return LinearConstraint(matrix.tocsr(), 1, 1)

    def _marginals(self) -> LinearConstraint:
        rows, columns, values, row = [], [], [], 0
        for (a, b), start in zip(self.keys, self.pair_starts, strict=False):
            y = int(start) + np.arange(self.sizes[a] * self.sizes[b]).reshape(self.sizes[a], self.sizes[b])
            for group, table in ((a, y), (b, y.T)):
                n = len(table)
                rows += [np.repeat(row + np.arange(n), table.shape[1]), row + np.arange(n)]
                columns += [table.ravel(), int(self.starts[group]) + np.arange(n)]
                values += [np.ones(table.size), -np.ones(n)]
                row += n
        entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        return LinearConstraint(coo_array(entries, shape=(row, self.count)).tocsr(), 0, 0)

    def _within(self, number: int) -> LinearConstraint:
        """The form at most its limit, divided by it: the solver's absolute tolerance then means the same everywhere."""
        form, limit = self.limits[number]
        row, scale = self._row(form), max(abs(limit), 1e-12)
        for block in form.gated:
            row[self.gates[number, block]] = scale  # z is a fraction of the limit
        return LinearConstraint(coo_array(row[None, :] / scale).tocsr(), -np.inf, (limit - form.constant) / scale)

    def _counted(self, number: int, block: int) -> LinearConstraint:
        """z at least what a block costs while it is kept."""
        form, limit = self.limits[number]
        own, scale = form.gated[block], max(abs(limit), 1e-12)
        row = self._row(own)
        places = int(self.starts[block]) + np.flatnonzero(self.choices[block] > 0)
        row[places] -= _largest(own)
        row[self.gates[number, block]] = -scale
        return LinearConstraint(coo_array(row[None, :] / scale).tocsr(), -np.inf, -own.constant / scale)

    def _row(self, form: CostForm) -> Floats:
        """What the form adds of every variable."""
        row = np.zeros(self.count)
        row[: int(self.starts[-1])] = np.concatenate(form.unary)
        for key, start in zip(self.keys, self.pair_starts, strict=False):
            if key in form.pairs:
                row[int(start) : int(start) + form.pairs[key].size] = form.pairs[key].ravel()
        return row


def _largest(form: CostForm) -> float:
    """A bound on the form from above."""
    return form.constant + sum(float(u.max()) for u in form.unary) + sum(float(t.max()) for t in form.pairs.values())


def _neighbours(support: Labels, levels: Labels) -> Labels:
    """The levels used and one on either side of each."""
    around = np.concatenate([support - 1, support, support + 1])
    near: Labels = levels[np.unique(around[(around >= 0) & (around < len(levels))])]
    return near


def _restricted(form: CostForm, choices: Sequence[Labels]) -> CostForm:
    unary = tuple(u[levels] for u, levels in zip(form.unary, choices, strict=True))
    pairs = {(a, b): t[np.ix_(choices[a], choices[b])] for (a, b), t in form.pairs.items()}
    return CostForm(form.constant, unary, pairs, {b: _restricted(own, choices) for b, own in form.gated.items()})


def _reduced(form: CostForm) -> CostForm:
    """The same cost with the additive part of each pair's table moved into the single groups: a tighter program."""
    constant, unary, pairs = form.constant, [np.array(u, dtype=np.float64) for u in form.unary], {}
    for (a, b), table in form.pairs.items():
        rows = table.min(axis=1)
        rest = table - rows[:, None]
        columns = rest.min(axis=0)
        rest = rest - columns[None, :]
        unary[a] = unary[a] + rows
        unary[b] = unary[b] + columns
        if rest.any():
            pairs[a, b] = rest
    return CostForm(constant, tuple(unary), pairs, {b: _reduced(own) for b, own in form.gated.items()})
