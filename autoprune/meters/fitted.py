"""A measured cost predicted from widths: every layer's own function of its input and output width, fitted to whole
networks on the device: to what each layer took inside them, or to what each network took, where layers are fused or
that predicts better.

Kernels work on blocks of channels, so a cost is a stair with slopes between: a layer's cost is a non-negative
combination of products phi_i(out) x phi_j(in), where phi holds 1, the width, the width rounded up to 8, 16 and 32, and
whether (and how much) it is no multiple of 4, 8 or 16 or is below 16, as such widths may take slower kernels. Layers of
one kind and shape share their coefficients (non-negative least squares on relative errors; Lawson & Hanson 1974). What
the network takes beyond its layers (activations, additions) is a constant and a slope for each group.

Whole networks are fewer than coefficients. Fitted to them, a layer has few of these products (FEW), and all layers of
one operator share what a product costs per unit of their work; of the first few products (PLAIN) a layer has a cost of
its own beyond that, held small by a ridge (OWN; experiments/latency).

Letters: G groups, L levels of one group, F features, S samples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from scipy.optimize import nnls

from autoprune.core import CostForm, Group, PruningSpace, Trial, Width, width_of

if TYPE_CHECKING:
    from autoprune.core import Floats

BLOCKS = (8, 16, 32)
RAGGED = (4, 8, 16)
NARROW = 16
By = Literal["network", "layers"]
FOLDS = 4
# (of the output, of the input) width, in the words of features()
FEW = (
    *(("width", "width"), ("width", "1"), ("1", "width"), ("up to 8", "up to 8"), ("up to 16", "up to 16")),
    *((f"ragged {b} x width", "width") for b in RAGGED),
    *(("width", f"ragged {b} x width") for b in RAGGED),
    *(("ragged 4 x width", "1"), ("1", "ragged 4 x width"), ("width", "narrow x width"), ("1", "narrow x width")),
    *(("wide ragged 4 x width", "width"), ("width", "wide ragged 4 x width")),
    *(("wide ragged 4 x width", "1"), ("1", "wide ragged 4 x width")),
)
PLAIN = 5  # of FEW, those that know no ragged widths
OWN = 1.0  # the ridge, relative to what a sample weighs
STEADY = 0.75  # of the widths worth keeping: that many on multiples of a block make it the step
NOTICEABLE = 0.03  # of a group's range: a narrower width that gains less is no step


Alike = tuple[str, tuple[float, float]]  # what a layer is, its dense output and input width


@dataclass(frozen=True)
class Shape:
    """What the cost of a layer depends on besides the device.

    operator: the type of the module, grouped convolutions apart. kind: the module as a whole and the shape that it is
    given; layers of one kind share their coefficients. sides: its output and input width by the units kept. work: MACs
    for each unit of the output and of the input, places of the output x weights of the kernel. gate: the block that it
    is in and goes with, by its group's index.
    """

    operator: str
    kind: str
    sides: tuple[Width, Width]
    work: float
    gate: int | None = None


@dataclass(frozen=True)
class Sample:
    """One network measured: units kept of each group, its milliseconds, and those of each layer."""

    kept: tuple[int, ...]
    total: float
    layers: Mapping[str, float]


@dataclass(frozen=True)
class LayerCost:
    """One layer: its output and input width by the units kept, its dense widths, its coefficients [F, F], and the block
    that it goes with."""

    name: str
    sides: tuple[Width, Width]
    dense: tuple[float, float]
    coefficients: Floats = field(repr=False)
    gate: int | None = None

    def at(self, out: float, into: float) -> float:
        return float(phi(out, self.dense[0]) @ self.coefficients @ phi(into, self.dense[1]))

    def of(self, kept: Sequence[int]) -> float:
        return self.at(*(width_of(side, kept) for side in self.sides))


def features(width: float, dense: float) -> dict[str, float]:
    """phi of a width, F values by name; which there are depends on the dense width alone."""
    found = {"1": 1.0, "width": width}
    found |= {f"up to {block}": block * math.ceil(width / block) for block in BLOCKS if block <= dense}
    for block in RAGGED:
        if block <= dense:
            ragged = float(width % block != 0)
            found |= {f"ragged {block}": ragged, f"ragged {block} x width": ragged * width}
    if dense >= NARROW:
        narrow = float(width < NARROW)
        found |= {"narrow": narrow, "narrow x width": narrow * width}
        found["wide ragged 4 x width"] = (1 - narrow) * float(width % 4 != 0) * width
    return found


def phi(width: float, dense: float) -> Floats:
    """The same as a vector [F]."""
    return np.array(list(features(width, dense).values()))


@dataclass(frozen=True)
class FittedCost:
    """A cost model (autoprune.core.CostModel) that was fitted to measurements.

    layers: what each layer costs; base: a constant and a slope for each group [1 + G]. around: the units kept where
    layers that depend on more than two groups are linearised. scale: what calibration multiplies everything by.
    """

    name: str
    unit: str
    space: PruningSpace
    layers: tuple[LayerCost, ...]
    base: tuple[float, ...]
    around: tuple[int, ...]
    scale: float = 1.0

    def predict(self, ratios: Sequence[float]) -> float:
        return self.at_widths(self.space.kept(ratios))

    def at_widths(self, kept: Sequence[int]) -> float:
        """The cost with these units kept of each group."""
        fixed = self.base[0] + float(np.dot(self.base[1:], kept))
        there = (layer for layer in self.layers if layer.gate is None or kept[layer.gate])
        return self.scale * (fixed + sum(layer.of(kept) for layer in there))

    def anchored(self, dense: float) -> FittedCost:
        """The same model scaled so that the dense prediction is `dense`."""
        return replace(self, scale=self.scale * dense / self.at_widths([g.size for g in self.space.groups]))

    def calibrated(self, trials: Sequence[Trial]) -> FittedCost:
        """Scaled so that the upper end of the last measurement among these trials is predicted, and linear there."""
        for trial in reversed(trials):
            known = trial.costs.get(self.name)
            if known is not None and known.kind != "predicted" and known.decided:
                kept = self.space.kept(trial.candidate.ratios)
                return replace(self, scale=self.scale * known.high / self.at_widths(kept), around=kept)
        return self

    def tables(self) -> tuple[CostForm, ...]:
        gates = {layer.gate for layer in self.layers if layer.gate is not None}
        gated = {b: self._form([layer for layer in self.layers if layer.gate == b]) for b in sorted(gates)}
        plain = self._form([layer for layer in self.layers if layer.gate is None], self.base)
        return (replace(plain, gated=gated),)

    def _form(self, layers: Sequence[LayerCost], base: Sequence[float] = ()) -> CostForm:
        """What some of the layers, and the base, come to."""
        widths = [[g.kept(r) for r in g.levels] for g in self.space.groups]
        base = base or (0.0,) * (len(widths) + 1)
        constant = self.scale * base[0]
        unary = [self.scale * slope * np.array(w, dtype=np.float64) for slope, w in zip(base[1:], widths, strict=True)]
        pairs: dict[tuple[int, int], Floats] = {}
        for layer in layers:
            for groups, times in _parts(layer):
                grid = self.scale * times * self._grid(layer, groups, widths)
                if len(groups) == 0:
                    constant += float(grid)
                elif len(groups) == 1:
                    unary[groups[0]] = unary[groups[0]] + grid
                else:
                    pairs[groups[0], groups[1]] = pairs.get((groups[0], groups[1]), 0.0) + grid
        return CostForm(constant, tuple(unary), pairs)

    def _grid(self, layer: LayerCost, groups: Sequence[int], widths: Sequence[Sequence[int]]) -> Floats:
        """What a layer costs at every combination of these groups' levels, the other groups being where the model is
        linearised; one dimension a group."""
        grid = np.empty([len(widths[g]) for g in groups])
        kept = list(self.around)
        for index in np.ndindex(grid.shape):
            for g, i in zip(groups, index, strict=True):
                kept[g] = widths[g][i]
            grid[index] = layer.of(kept)
        return grid


def _parts(layer: LayerCost) -> list[tuple[tuple[int, ...], float]]:
    """A layer's cost as a sum of tables over at most two groups, (ascending groups, times), the others being held.

    Exact up to two groups. A concatenation on one side takes each of its groups with the group on the other side and
    subtracts what is counted again and again; with several groups on both sides each is taken alone.
    """
    out, into = (set(side[1]) for side in layer.sides)
    everyone = out | into
    if len(everyone) <= 2:
        return [(tuple(sorted(everyone)), 1.0)]
    few, many = sorted((out, into), key=len)
    if len(few) > 1:
        few, many = set(), everyone
    many = many - few
    return [*((tuple(sorted({g, *few})), 1.0) for g in sorted(many)), (tuple(few), 1.0 - len(many))]


def fit(
    samples: Sequence[Sample], shapes: Mapping[str, Shape], space: PruningSpace, *, name: str, unit: str, by: By
) -> FittedCost:
    """Fit layers, by name, and base to samples [S], of which the first is the dense network.

    by: whether to what each layer took, or to what each network took.
    """
    dense = [g.size for g in space.groups]
    alike: dict[Alike, list[str]] = defaultdict(list)
    for layer, shape in shapes.items():
        out, into = (width_of(side, dense) for side in shape.sides)
        alike[shape.kind, (out, into)].append(layer)
    plain = FittedCost(name, unit, space, (), (0.0,) * (len(dense) + 1), tuple(dense))
    ways = {"layers": _fit_to_layers, "network": _fit_to_networks}
    return ways[by](plain, samples, shapes, alike)


def better(samples: Sequence[Sample], shapes: Mapping[str, Shape], space: PruningSpace) -> By:
    """The way of fitting with the smaller median error on networks left out, in four folds."""
    if not all(layer in s.layers for layer, shape in shapes.items() for s in samples if _there(shape, s.kept)):
        return "network"
    errors = {}
    for by in get_args(By):
        found = []
        for fold in range(FOLDS):
            left_out = [s for i, s in enumerate(samples) if i and i % FOLDS == fold]
            rest = [s for i, s in enumerate(samples) if not i or i % FOLDS != fold]
            fitted = fit(rest, shapes, space, name="", unit="", by=by)
            found += [abs(fitted.at_widths(s.kept) / s.total - 1) for s in left_out]
        errors[by] = float(np.median(found))
    return min(errors, key=lambda by: errors[by])


def _fit_to_layers(
    plain: FittedCost, samples: Sequence[Sample], shapes: Mapping[str, Shape], alike: Mapping[Alike, Sequence[str]]
) -> FittedCost:
    layers = []
    for (_, full), names in alike.items():
        rows = [(sample, layer) for sample in samples for layer in names if layer in sample.layers]
        design = np.array([_products(shapes[layer], full, sample.kept) for sample, layer in rows])
        coefficients = _relative_nnls(design, np.array([sample.layers[layer] for sample, layer in rows]))
        layers += [_layer(n, shapes[n], full, coefficients) for n in names]
    known = replace(plain, layers=tuple(layers))
    totals = np.array([sample.total for sample in samples])
    beyond = totals - np.array([known.at_widths(sample.kept) for sample in samples])
    design = np.array([(1.0, *sample.kept) for sample in samples])
    return replace(known, base=tuple(_relative_nnls(design, beyond, totals).tolist()))


def _fit_to_networks(
    plain: FittedCost, samples: Sequence[Sample], shapes: Mapping[str, Shape], alike: Mapping[Alike, Sequence[str]]
) -> FittedCost:
    """Columns: the base, what all layers of one operator share, what those of one kind have of their own."""
    shared: dict[str, Floats] = {}
    own, few = [], {kind: _few_products(kind[1]) for kind in alike}
    for kind, names in alike.items():
        column = np.zeros([len(samples), len(FEW)])
        places = list(few[kind])
        for layer in names:
            there = [(row, s) for row, s in zip(column, samples, strict=True) if _there(shapes[layer], s.kept)]
            for row, sample in there:
                row[places] += _products(shapes[layer], kind[1], sample.kept)[list(few[kind].values())]
        own.append(column[:, :PLAIN])
        shape = shapes[names[0]]
        shared[shape.operator] = shared.get(shape.operator, 0.0) + shape.work * column
    base = np.array([(1.0, *sample.kept) for sample in samples])
    design = np.hstack([base, *shared.values(), *own])
    ridge = np.repeat([0.0, OWN], [design.shape[1] - PLAIN * len(own), PLAIN * len(own)])
    found = _relative_nnls(design, np.array([sample.total for sample in samples]), ridge=ridge)
    bases, together, alone = np.split(found, [base.shape[1], len(found) - PLAIN * len(own)])
    each = dict(zip(shared, together.reshape(len(shared), len(FEW)), strict=True))
    layers = []
    for (kind, names), part in zip(alike.items(), alone.reshape(len(own), PLAIN), strict=True):
        coefficients = np.zeros(math.prod(len(phi(w, w)) for w in kind[1]))
        costs = shapes[names[0]].work * each[shapes[names[0]].operator]
        costs[:PLAIN] += part
        coefficients[list(few[kind].values())] = costs[list(few[kind])]
        layers += [_layer(n, shapes[n], kind[1], coefficients) for n in names]
    return replace(plain, layers=tuple(layers), base=tuple(bases.tolist()))


def _layer(name: str, shape: Shape, full: tuple[float, float], coefficients: Floats) -> LayerCost:
    return LayerCost(name, shape.sides, full, coefficients.reshape([len(phi(w, w)) for w in full]), shape.gate)


def _there(shape: Shape, kept: Sequence[int]) -> bool:
    """Whether a layer runs, its block being kept."""
    return shape.gate is None or kept[shape.gate] > 0


def _few_products(full: tuple[float, float]) -> dict[int, int]:
    """Places in FEW that a layer has -> where they are among all its products."""
    out, into = (list(features(width, width)) for width in full)
    return {
        place: out.index(a) * len(into) + into.index(b) for place, (a, b) in enumerate(FEW) if a in out and b in into
    }


def _products(shape: Shape, full: Sequence[float], kept: Sequence[int]) -> Floats:
    out, into = (phi(width_of(side, kept), dense) for side, dense in zip(shape.sides, full, strict=True))
    return np.outer(out, into).ravel()


def _relative_nnls(design: Floats, target: Floats, size: Floats | None = None, ridge: Floats | None = None) -> Floats:
    """Non-negative least squares of the errors relative to `size` (the target itself by default). ridge: what each
    column's coefficient weighs where the column's largest value is as large as a typical target."""
    weights = 1.0 / np.maximum(size if size is not None else target, 1e-9)
    scale = np.abs(design).max(axis=0)
    used = np.flatnonzero(scale)  # what no sample has costs nothing
    rows, aims = design[:, used] / scale[used] * weights[:, None], target * weights
    if ridge is not None:
        rows, aims = np.vstack([rows, np.diag(ridge[used] * weights.mean())]), np.append(aims, np.zeros(len(used)))
    found = np.zeros(len(scale))
    found[used] = nnls(rows, aims, maxiter=30 * rows.shape[1])[0] / scale[used]
    return found


def stair_levels(cost: FittedCost, space: PruningSpace, most: int, round_to: int = 1) -> dict[str, tuple[float, ...]]:
    """Levels for each group that the cost makes worth having: a width is one if every wider width costs clearly more,
    in the dense network or in one of half its widths. Where more than `most` are, multiples of the least block that
    leaves room for all of them, and others between those whose costs lie furthest apart.

    A group that the cost does not depend on keeps its levels, and a block its two.
    """
    contexts = [[g.size for g in space.groups], [max(1, g.size // 2) for g in space.groups]]
    found = {}
    for i, group in enumerate(space.groups):
        if group.kind == "block":
            continue
        worth: dict[int, float] = {}
        for context in contexts:
            worth |= _steps(cost, context, i, group, round_to)
        if len(worth) > 1:
            found[group.name] = tuple((group.size - w) / group.size for w in _spread(worth, most))
    return found


def step_of(widths: Sequence[int]) -> int:
    """The largest of BLOCKS and 4 that three quarters of the widths between the deepest and the full one (both are
    always there) are multiples of; 1 where none is, or nothing lies between."""
    between = sorted(widths)[1:-1]
    blocks = (
        b for b in sorted({*BLOCKS, 4}, reverse=True) if sum(w % b == 0 for w in between) >= STEADY * len(between)
    )
    return next(blocks, 1) if between else 1


def _steps(cost: FittedCost, context: Sequence[int], index: int, group: Group, round_to: int) -> dict[int, float]:
    """Width -> cost relative to the full width's, for the widths where the stair goes down."""
    kept = list(context)
    floor, step = group.kept(group.levels[-1]), round_to if group.size >= 2 * round_to else 1
    stairs: dict[int, float] = {}
    for kept[index] in range(group.size, floor - 1, -1):
        if kept[index] in (group.size, floor) or kept[index] % step == 0:
            stairs[kept[index]] = cost.at_widths(kept)
    top = stairs[group.size]
    least = NOTICEABLE * (top - min(stairs.values()))
    worth, lowest = {group.size: 1.0}, top
    for width, value in stairs.items():
        if value < lowest - least:
            worth[width], lowest = value / top, value
    return worth


def _spread(worth: Mapping[int, float], most: int) -> list[int]:
    """At most so many of the widths (but two), descending, the full one and the deepest among them."""
    widths = sorted(worth, reverse=True)
    if len(widths) <= most:
        return widths
    ends = {widths[0], widths[-1]}
    rounds = (ends | {w for w in widths if w % 2**power == 0} for power in range(2, 64))
    kept = next(chosen for chosen in rounds if len(chosen) <= max(most, 2))
    while len(kept) < most:
        costs = np.sort([worth[w] for w in kept])
        left = [w for w in widths if w not in kept]
        above = np.searchsorted(costs, [worth[w] for w in left]).clip(1, len(costs) - 1)
        gaps = costs[above] - costs[above - 1]  # that each width lies in
        middle = (costs[above] + costs[above - 1]) / 2
        kept.add(min(zip(-gaps, np.abs([worth[w] for w in left] - middle), left, strict=True))[2])
    return sorted(kept, reverse=True)
