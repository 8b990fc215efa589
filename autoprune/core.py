"""The words of autoprune: value types that every other module speaks, and the protocols of what can be swapped.

Standard library only. Letters: G groups, L levels of one group.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torchmetrics import Metric

    from autoprune.outset import Outset

    Floats = NDArray[np.float64]

Recovery = Literal["none", "probe", "short"]
RECOVERIES: tuple[Recovery, ...] = ("short", "probe", "none")  # from most to least
Kind = Literal["counted", "predicted", "measured", "modelled"]


class InputError(ValueError):
    """What the user gave breaks a rule. The message is one line: the rule, the value, the place, the way out."""


def check_rules(place: str, rules: Mapping[str, bool], given: Mapping[str, object]) -> None:
    """Raises InputError for the first rule that is not kept; of its words the first that was given is what is wrong."""
    for rule, kept in rules.items():
        if not kept:
            name = next(word for word in rule.replace(",", " ").split() if word in given)
            raise InputError(f"{place}: {rule}{' must hold' * ('must' not in rule)}, got {name}={given[name]}")


class DeviceLostError(RuntimeError):
    """The device that costs are measured on was lost and could not be reached again: nothing more can be decided, and
    what was scored is kept."""


class MismatchError(RuntimeError):
    """A file that computes something else than the network that was exported to it."""


class StorageError(RuntimeError):
    """What a search must keep cannot be kept: a disk is full, or the study's database was lost. What was scored before
    is kept."""


# ------------------------------------------------------------------------------------------------- what can be cut


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution or linear layer as a strategy sees it: sizes in channels and pixels, MACs an example."""

    name: str
    units_in: int
    units_out: int
    kernel: int
    stride: int
    height: int
    width: int
    macs: float


Kinds = Literal["channel", "head", "block", "weight", "n_m"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """`size` alike units that share one ratio; `levels` are the ratios it may take, ascending, the first 0.0.

    kind: what its units are. A "block" is one unit that stays or goes, named after the module that is then left out;
    its levels are 0.0 and 1.0, where every other group keeps a unit at least.
    """

    name: str
    size: int
    levels: tuple[float, ...]
    layers: tuple[Layer, ...] = ()
    members: tuple[str, ...] = ()
    kind: Kinds = "channel"

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        some_stay = self.kind == "block" or (bool(self.levels) and self.levels[-1] < 1)
        if not self.levels or self.levels[0] != 0.0 or not rising or not some_stay:
            raise ValueError(f"levels of {self.name} must rise from 0.0 and stay below 1, got {self.levels}")

    def kept(self, ratio: float) -> int:
        """Units left at this ratio: size - round(ratio * size)."""
        return self.size - round(ratio * self.size)


@dataclass(frozen=True)
class Refusal:
    """Units that stay whole: the layer that makes them, and the operation that stands in the way."""

    name: str
    reason: str


@dataclass(frozen=True)
class PruningSpace:
    """The ordered groups of one model (G of them), and what was refused.

    thresholds: of single weights the candidates [G] that one threshold of magnitude over all groups together leads to,
    from the least that is removed to the most; else empty.
    importance: of every group how important its units are by the criterion, ascending [U], so that at a ratio the first
    of them are gone; see `ranked`. Empty where that is not known yet, and of single weights, of which there are many.
    """

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...] = ()
    thresholds: tuple[tuple[float, ...], ...] = ()
    importance: tuple[tuple[float, ...], ...] = ()

    def dense(self) -> tuple[float, ...]:
        """The candidate that removes nothing."""
        return (0.0,) * len(self.groups)

    def check(self, ratios: Sequence[float]) -> tuple[float, ...]:
        """The ratios as a tuple if each is a level of its group.

        Raises:
            ValueError: a wrong count, or a ratio that is no level; the message names the group.
        """
        if len(ratios) != len(self.groups):
            raise ValueError(f"{len(self.groups)} groups but {len(ratios)} ratios")
        for group, ratio in zip(self.groups, ratios, strict=True):
            if ratio not in group.levels:
                raise ValueError(f"{ratio} is not a level of {group.name}; its levels are {group.levels}")
        return tuple(ratios)

    def ratios(self, levels: Sequence[int]) -> tuple[float, ...]:
        """The candidate at these level indices, one a group."""
        return tuple(group.levels[i] for group, i in zip(self.groups, levels, strict=True))

    def named(self, ratios: Sequence[float]) -> dict[str, float]:
        """Group name -> ratio."""
        return {group.name: ratio for group, ratio in zip(self.groups, ratios, strict=True)}

    def kept(self, ratios: Sequence[float]) -> tuple[int, ...]:
        """Units left in each group."""
        return tuple(group.kept(ratio) for group, ratio in zip(self.groups, ratios, strict=True))

    def block_of(self, module: str) -> int | None:
        """The block that a module is in, by its group's index; None if it is in none that can be left out."""
        inside = (i for i, g in enumerate(self.groups) if g.kind == "block" and f"{module}.".startswith(f"{g.name}."))
        return next(inside, None)

    def with_levels(self, levels: Mapping[str, Sequence[float]]) -> PruningSpace:
        """The same space with other levels for the groups named."""
        groups = (dataclasses.replace(g, levels=tuple(levels.get(g.name, g.levels))) for g in self.groups)
        return dataclasses.replace(self, groups=tuple(groups))

    def ranked(self, importance: Sequence[Iterable[float]]) -> PruningSpace:
        """The same space with the importance of each group's units, [U] a group in any order; a space that has
        thresholds is left as it is."""
        if self.thresholds:
            return self
        ascending = (tuple(sorted(map(float, scores))) for scores in importance)
        return dataclasses.replace(self, importance=tuple(ascending))


FLAT = -1  # in place of a dimension


@dataclass(frozen=True)
class Slice:
    """What a group owns in one parameter or buffer: unit u owns positions[u] ([U, P] in all) along dim, or, where dim
    is FLAT, of the flattened tensor.

    role: "out" where a layer's weight makes the unit, "in" where a weight reads it, "with" for what goes with it
    (bias, normalisation, scale).
    """

    tensor: str
    dim: int
    role: Literal["out", "in", "with"]
    positions: NDArray[np.int64]


# how wide a dimension is by the units kept: width[0] + sum of width[1][g] x kept[g]
Width = tuple[float, Mapping[int, float]]


@dataclass(frozen=True)
class Term:
    """scale x the width of left x the width of right, while the block `gate` (a group's index) is kept if there is
    one."""

    scale: float
    left: Width
    right: Width
    gate: int | None = None


# ------------------------------------------------------------------------------------------------ what is asked, told


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a strategy asks to be tried: one ratio per group, how to heal it, whether to measure.

    recovery: "none" cuts and scores; "probe" heals without training (reconstruction, batch normalisation statistics);
    "short" fine-tunes briefly as well.
    glance: a measurement is to steer by and will decide nothing, so that few processes are enough.
    parent: number of an earlier trial whose recovered network this one is cut from; None for the dense network.
    fidelity: fraction in (0, 1] of the images it is scored on, of the batches it is healed with, and of the steps of a
    short fine-tune.
    about: what the strategy says of it for people (a round, a target); it changes nothing about the evaluation.
    """

    ratios: tuple[float, ...]
    recovery: Recovery = "probe"
    measure: bool = False
    glance: bool = False
    parent: int | None = None
    fidelity: float = 1.0
    about: Mapping[str, float | str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_recovery(self.recovery)
        check_rules("candidate", {"0 < fidelity <= 1": 0 < self.fidelity <= 1}, {"fidelity": self.fidelity})


def check_recovery(recovery: str) -> None:
    """Raises InputError unless this is a kind of recovery."""
    if recovery not in RECOVERIES:
        raise InputError(f"recovery must be one of {', '.join(RECOVERIES)}, got '{recovery}'")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A cost with its unit and 95 % interval; `kind` says whether it was counted, predicted, measured or modelled.

    decided: False where a measurement was disturbed: the truth lies in the interval, but the value says nothing.
    """

    value: float
    unit: str
    low: float
    high: float
    samples: int = 1
    device: str = ""
    kind: Kind = "counted"
    notes: tuple[str, ...] = ()
    decided: bool = True

    @staticmethod
    def exact(value: float, unit: str, kind: Kind, notes: tuple[str, ...] = ()) -> Measurement:
        return Measurement(value=value, unit=unit, low=value, high=value, kind=kind, notes=notes)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Measurement:
        """Raises KeyError, TypeError or ValueError where the values are of no measurement."""
        found = Measurement(**{**values, "notes": tuple(values["notes"])})
        if not (is_number(found.value) and type(found.low) in NUMBERS and type(found.high) in NUMBERS):
            raise ValueError(f"a value must be a finite number, got {found.value} [{found.low}, {found.high}]")
        if not found.low <= found.high or found.kind not in get_args(Kind):
            raise ValueError(f"no measurement has {found.kind} [{found.low}, {found.high}]")
        if not all(isinstance(text, str) for text in (found.unit, found.device, *found.notes)):
            raise TypeError("unit, device and notes must be text")
        return found


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate and what became of it.

    score is the task's metric on the search split, higher is better; loss the task's loss on the same images, lower is
    better. The intervals (95 %) are of the images drawn; `loss_change` is the paired difference from the dense model on
    the same images, much narrower than either loss. parts [K]: what each part of the images adds to score and to loss,
    to six digits, empty where a part has no score; trials of one fidelity have the same parts, of which two in a row
    are alike. costs: as predicted, or counted and measured where the candidate asked for it; `predicted` then holds
    what had been expected. feasible: None while a budgeted cost is only predicted or its measurement was disturbed.
    """

    number: int
    candidate: Candidate
    score: float = math.nan
    score_low: float = math.nan
    score_high: float = math.nan
    loss: float = math.nan
    loss_change: Measurement | None = None
    parts: tuple[tuple[float, float], ...] = ()
    costs: Mapping[str, Measurement] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    feasible: bool | None = None
    seconds: float = 0.0
    seconds_in_forward: float = 0.0
    cached: bool = False
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Trial:
        """Raises KeyError, TypeError, AttributeError or ValueError where the values are of no trial."""
        candidate = values["candidate"]
        change = values["loss_change"]
        found = Trial(
            **{
                **values,
                "candidate": Candidate(**{**candidate, "ratios": tuple(candidate["ratios"])}),
                "loss_change": None if change is None else Measurement.from_json(change),
                "parts": tuple((score, loss) for score, loss in values["parts"]),
                "costs": {name: Measurement.from_json(m) for name, m in values["costs"].items()},
            }
        )
        if type(found.number) is not int or found.number < 0:
            raise ValueError(f"a trial's number must be a whole number of 0 or more, got {found.number!r}")
        scored = (found.score, found.loss) if found.error is None else ()
        times = (found.seconds, found.seconds_in_forward)
        parts = (number for part in found.parts for number in part)
        numbers = (*scored, *times, *found.candidate.ratios, *found.predicted.values(), *parts)
        if wrong := [number for number in numbers if not is_number(number)]:
            raise ValueError(f"trial {found.number} must hold finite numbers, got {wrong[0]!r}")
        return found


NUMBERS = (int, float)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no switch."""
    return type(value) in NUMBERS and math.isfinite(value)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- what it costs

COST_UNITS = {
    "macs": "MACs",
    "params": "parameters",
    "memory_mb": "MB",
    "rss_mb": "MB",
    "latency_ms": "ms",
    "energy_mj": "mJ",
}
_COUNT_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_SIZE_UNITS = {"KB": 1e-3, "MB": 1.0, "GB": 1e3}
# the word in a budget -> (cost, {unit: how many of the cost's own unit})
_BUDGET_WORDS: dict[str, tuple[str, dict[str, float]]] = {
    "macs": ("macs", _COUNT_UNITS),
    "flops": ("macs", {unit: scale / 2 for unit, scale in _COUNT_UNITS.items()}),
    "params": ("params", _COUNT_UNITS),
    "memory": ("memory_mb", _SIZE_UNITS),
    "rss": ("rss_mb", _SIZE_UNITS),
    "latency": ("latency_ms", {"us": 1e-3, "ms": 1.0, "s": 1e3}),
    "energy": ("energy_mj", {"uJ": 1e-3, "mJ": 1.0, "J": 1e3}),
}
BUDGET_WORDS = tuple(_BUDGET_WORDS)


@dataclass(frozen=True)
class Budget:
    """A hard limit on one cost. unit is "dense" (limit is a fraction of the dense model) or the cost's own unit."""

    cost: str
    limit: float
    unit: str

    @staticmethod
    def parse(text: str) -> Budget:
        """`<cost>_<number><unit>`, as in flops_50pct, macs_20M, params_300k, memory_2MB, latency_20ms.

        Raises:
            InputError: the text is no budget; the message says which part is wrong and what it may be.
        """
        example = "write a budget like flops_50pct, macs_20M, params_300k, memory_2MB or latency_20ms"
        match = re.fullmatch(r"([A-Za-z]+)_(-?[0-9.]+)([A-Za-z]*)", str(text).strip())
        if match is None:
            raise InputError(f"budget '{text}' is not <cost>_<number><unit>: {example}")
        word, number, unit = match.groups()
        if word not in _BUDGET_WORDS:
            raise InputError(f"budget '{text}': unknown cost '{word}', it must be one of {', '.join(_BUDGET_WORDS)}")
        cost, units = _BUDGET_WORDS[word]
        if unit != "pct" and unit not in units:
            known = ", ".join(u for u in ("pct", *units) if u)
            problem = f"unknown unit '{unit}'" if unit else "the unit is missing"
            raise InputError(f"budget '{text}': {problem}, for {word} it must be one of {known}")
        try:
            value = float(number)
        except ValueError:
            raise InputError(f"budget '{text}': '{number}' is not a number; {example}") from None
        if value <= 0:
            raise InputError(f"budget '{text}': the limit must be above 0, got {number}; {example}")
        if math.isinf(value * units.get(unit, 1)):
            raise InputError(f"budget: the limit must be finite, got {word} of {len(number)} digits; {example}")
        if unit == "pct":
            if value > 100:
                raise InputError(f"budget '{text}': a percentage of the dense model must be at most 100, got {number}")
            return Budget(cost, value / 100, "dense")
        return Budget(cost, value * units[unit], COST_UNITS[cost])

    def resolve(self, dense: Mapping[str, Measurement]) -> Budget:
        """The same budget in the cost's own unit, a fraction being taken of the dense model's value."""
        if self.unit != "dense":
            return self
        return Budget(self.cost, self.limit * dense[self.cost].value, COST_UNITS[self.cost])

    def slack(self, cost: Measurement) -> float:
        """How far the whole interval lies below the limit, in the cost's unit; negative if it does not."""
        return self.limit - cost.high

    def met(self, cost: Measurement) -> bool | None:
        """True or False once counted, measured or modelled; None for a prediction, which decides nothing, and for a
        disturbed measurement whose interval holds the limit."""
        within = self.slack(cost) >= 0
        undecided = not cost.decided and not within and cost.low <= self.limit
        return None if cost.kind == "predicted" or undecided else within


def all_met(budgets: Sequence[Budget], costs: Mapping[str, Measurement]) -> bool | None:
    """True if every budget is met, False if one is exceeded, None while that is undecided."""
    verdicts = [b.met(costs[b.cost]) for b in budgets]
    return False if False in verdicts else None if None in verdicts else True


@dataclass(frozen=True)
class CostForm:
    """constant + sum over groups of unary[g][level] + sum over pairs of pairs[a, b][level of a, level of b] + of every
    block b that is kept, being at level 0, gated[b], which is nowhere negative and has nothing gated."""

    constant: float
    unary: tuple[Floats, ...]
    pairs: Mapping[tuple[int, int], Floats]
    gated: Mapping[int, CostForm] = field(default_factory=dict)


def width_of(width: Width, kept: Sequence[int]) -> float:
    """A width with these units kept of each group."""
    fixed, of = width
    return fixed + sum(each * kept[g] for g, each in of.items())


def amount_of(terms: Sequence[Term], kept: Sequence[int]) -> float:
    """The sum of terms with these units kept of each group."""
    there = (term for term in terms if term.gate is None or kept[term.gate])
    return sum(term.scale * width_of(term.left, kept) * width_of(term.right, kept) for term in there)


class CostModel(Protocol):
    """Predicts one cost from ratios, without running the model.

    `tables` gives the cost as the largest of one or more forms over level indices (a peak is a maximum over time).
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str: ...

    def predict(self, ratios: Sequence[float]) -> float: ...

    def tables(self) -> tuple[CostForm, ...]: ...

    def calibrated(self, trials: Sequence[Trial]) -> CostModel: ...


class Meter(Protocol):
    """Finds one cost of a model by counting or measuring it on the example inputs."""

    name: str
    unit: str

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement: ...


@runtime_checkable
class Glancing(Protocol):
    """A meter that can also take a quick reading, to steer by: its interval says how little that decides."""

    def glance(self) -> Meter: ...


class Strategy(Protocol):
    """Proposes candidates in batches and learns from their trials; it sees numbers only, never a model."""

    def ask(self) -> Sequence[Candidate]:
        """The next batch; empty when the search is finished."""
        ...

    def tell(self, trials: Sequence[Trial]) -> None:
        """The trials of the last batch, in its order."""
        ...


@dataclass(frozen=True)
class Finding:
    """What a strategy has to say of one group, for the report, in a word or two."""

    group: str
    what: str


class Scripted:
    """A strategy that is written as one generator, which yields batches and is sent their trials; see Strategy."""

    def __init__(self, script: Generator[list[Candidate], Sequence[Trial], Any]) -> None:
        self._script = script
        self._batch = next(script)

    def ask(self) -> Sequence[Candidate]:
        return self._batch

    def tell(self, trials: Sequence[Trial]) -> None:
        try:
            self._batch = self._script.send(trials)
        except StopIteration:
            self._batch = []


class Progress(Protocol):
    """Who watches a search: a stage begins with so many steps (None: unknown), steps are made, something is said."""

    def stage(self, name: str, steps: int | None) -> None: ...

    def step(self) -> None: ...

    def say(self, line: str) -> None: ...

    def begun(self, outset: Outset) -> None:
        """The first candidate comes next."""

    def scored(self, trial: Trial) -> None:
        """A trial was finished, or is known of an earlier run."""


class Silent:
    """Nobody watches."""

    def stage(self, name: str, steps: int | None) -> None: ...

    def step(self) -> None: ...

    def say(self, line: str) -> None: ...

    def begun(self, outset: Outset) -> None: ...

    def scored(self, trial: Trial) -> None: ...


# ------------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True, kw_only=True)
class Past:
    """How a task's model was trained, for a training that goes back to it (Renda et al., arXiv 2003.02389): `epochs` in
    all, and the learning rate as a fraction of Task.lr at a fraction in [0, 1] of them. early: the same network as it
    was early on, or before."""

    epochs: float
    schedule: Callable[[float], float]
    early: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trained model with its data: all that a search needs to know of the user's problem.

    inputs is an example of what the model is called with, the first dimension of each tensor being the batch: a tuple
    of positional arguments, or a mapping of keyword arguments. train, search and test are iterables of (inputs, target)
    batches that can be iterated again and again; inputs is a tensor or a tuple of tensors, or a mapping where the
    example is one. search is held out of the model's training
    and is all that a search looks at; test is read once, for the final report. loss(output, target) is a scalar.
    metric is a torchmetrics.Metric updated with (output, target); its `higher_is_better` gives its direction.
    lr is the learning rate the model was trained with at its highest; recovery uses a fraction of it. past: how it was
    trained, where that is known.
    """

    name: str
    model: nn.Module
    inputs: Any
    train: Iterable[Any]
    search: Iterable[Any]
    test: Iterable[Any]
    loss: Callable[[Any, Any], Tensor]
    metric: Metric
    lr: float
    past: Past | None = None
    notes: tuple[str, ...] = ()
