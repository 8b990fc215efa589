"""How an answer comes to its ratios while it is trained: at once, in rounds, or step by step; and from which weights.

At once, the network is cut, healed and fine-tuned. In rounds, an equal part of what is to go goes in each, the units
being ranked anew by the weights that the last round came to (Han et al., NIPS 2015, arXiv 1506.02626). Gradually, units
fall silent during one training as `PolynomialDecay` says, and are cut out at its end. The weights that a round begins
from may also be those that the network had early in its own training (weight rewinding; Frankle and Carbin, ICLR 2019,
arXiv 1803.03635; Renda et al., arXiv 2003.02389), or fresh ones (Liu et al., "Rethinking the Value of Network Pruning",
ICLR 2019, arXiv 1810.05270). Ours: all rounds together take as many steps as one training.

Letters: G groups, U units of one group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import nn

from autoprune.borrowing import seeded
from autoprune.core import InputError, PruningSpace, Task, check_rules, is_number
from autoprune.criteria import Scores
from autoprune.recover import FineTune, check_past
from autoprune.traced import TracedModel, fingerprint, tensors_of, with_tensors
from autoprune.units import Labels

PRUNINGS = ("one_shot", "iterative", "gradual")
WEIGHTS = ("trained", "early", "scratch")


@dataclass(frozen=True)
class PolynomialDecay:
    """The ratio at a step: initial_ratio up to begin_step, final_ratio from end_step on, and between the two

        final + (initial - final) (1 - (step - begin) / (end - begin)) ^ power

    Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, equation 1, as TensorFlow's toolkit has it: units are
    removed every `frequency` steps from begin_step on. Ours: at end_step too, whatever the frequency.
    """

    initial_ratio: float
    final_ratio: float
    begin_step: int
    end_step: int
    power: float = 3.0
    frequency: int = 100

    def __call__(self, step: int) -> float:
        done = min(max((step - self.begin_step) / (self.end_step - self.begin_step), 0.0), 1.0)
        return float(self.final_ratio + (self.initial_ratio - self.final_ratio) * (1 - done) ** self.power)

    def due(self, step: int) -> bool:
        """Whether units are removed after this many steps."""
        since = step - self.begin_step
        return step == self.end_step or (self.begin_step <= step < self.end_step and since % self.frequency == 0)


@dataclass(frozen=True, kw_only=True)
class Final(FineTune):
    """The final training of an answer.

    pruning: "one_shot", "iterative" in so many `rounds`, or "gradual", from the share `initial` of each group's ratio
    to all of it, from begin_step to end_step (None: three quarters of the steps), by `power`, every `frequency` steps
    (None: ten times in all). weights: what training begins from, those "trained", the task's "early" ones (Task.past),
    or "scratch": fresh ones, but for modules that are frozen.

    Raises:
        InputError: a setting is out of its range, or two do not go together.
    """

    pruning: str = "one_shot"
    rounds: int = 3
    initial: float = 0.0
    begin_step: int = 0
    end_step: int | None = None
    power: float = 3.0
    frequency: int | None = None
    weights: str = "trained"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = {name: type(getattr(self, name)) is int for name in ("rounds", "begin_step")}
        end = self.end_step
        rules = {
            f"pruning must be one of {', '.join(PRUNINGS)}": self.pruning in PRUNINGS,
            f"weights must be one of {', '.join(WEIGHTS)}": self.weights in WEIGHTS,
            "rounds must be a whole number, 1 or more": whole["rounds"] and self.rounds >= 1,
            "initial must be a number in [0, 1)": is_number(self.initial) and 0 <= self.initial < 1,
            "begin_step must be a whole number, 0 or more": whole["begin_step"] and self.begin_step >= 0,
            "end_step must be a whole number above begin_step, or null": end is None
            or (type(end) is int and end > self.begin_step),
            "power must be a number above 0": is_number(self.power) and self.power > 0,
            "frequency must be a whole number, 1 or more, or null": self.frequency is None
            or (type(self.frequency) is int and self.frequency >= 1),
            "weights must be trained where pruning=gradual, which begins from the whole network": self.pruning
            != "gradual"
            or self.weights == "trained",
        }
        check_rules("finetune", rules, vars(self))

    @staticmethod
    def of(plan: FineTune) -> Final:
        """The same fine-tune, at once from the trained weights where it says nothing else."""
        return plan if isinstance(plan, Final) else Final(**{f.name: getattr(plan, f.name) for f in fields(FineTune)})

    @property
    def at_once(self) -> bool:
        """Whether all that goes goes before any training."""
        return self.pruning != "gradual" and self.whole_rounds == 1

    @property
    def whole_rounds(self) -> int:
        """How often the network is cut before it is trained."""
        return self.rounds if self.pruning == "iterative" else 1

    def decay(self, steps: int) -> PolynomialDecay:
        """The share of each ratio after each of so many steps.

        Raises:
            InputError: it would end after them.
        """
        end = max(self.begin_step + 1, round(0.75 * steps)) if self.end_step is None else self.end_step
        if end > steps:
            raise InputError(
                f"finetune: begin_step and end_step must lie within the {steps} steps of the training, got "
                f"{self.begin_step} and {end}"
            )
        often = self.frequency or max(1, (end - self.begin_step) // 10)
        return PolynomialDecay(self.initial, 1.0, self.begin_step, end, self.power, often)


Heal = Callable[[nn.Module, Sequence[Labels], nn.Module], None]
Tune = Callable[[nn.Module, FineTune, int, Callable[[int], None]], None]


@dataclass(frozen=True)
class Pruner:
    """What makes an answer's network of the dense one.

    scores: the dense network's units' importance [U] a group; rank: that of any network of its shape. heal(model, kept,
    source): heals, in place, what was cut from source. tune(model, plan, round, after): trains in place, `after` being
    called after each step with their number.
    """

    task: Task
    traced: TracedModel
    dense: nn.Module
    scores: Sequence[Scores]
    rank: Callable[[nn.Module], Sequence[Scores]]
    heal: Heal
    tune: Tune
    seed: int

    def pruned(self, ratios: Sequence[float], plan: Final) -> tuple[nn.Module, tuple[Labels, ...]]:
        """The network at these ratios [G], trained, and the units that it keeps.

        Raises:
            FloatingPointError: the loss is no longer finite.
            InputError: the plan does not fit the task.
        """
        with seeded(self.seed):  # a split may have to be read to be counted
            total = plan.total(self.task.train)
        if plan.pruning == "gradual" and total:
            return self._gradually(ratios, plan, total)
        return self._in_rounds(ratios, plan, total)

    def _in_rounds(self, ratios: Sequence[float], plan: Final, total: int) -> tuple[nn.Module, tuple[Labels, ...]]:
        count, space = plan.whole_rounds, self.traced.space
        source, model, scores = self.dense, self.dense, self.scores
        kept = everything(space)
        for number in range(count):
            if number:
                source = self.traced.spread(self.dense, dict(tensors_of(model)), kept).eval()
                scores = self.rank(source)
            kept = narrowed(space, scores, [(number + 1) / count * ratio for ratio in ratios], kept)
            model = self._begun(source, kept, plan.weights)
            steps = total * (number + 1) // count - total * number // count
            if steps:
                self.tune(model, replace(plan, steps=steps), number, lambda done: None)
        return model, kept

    def _begun(self, source: nn.Module, kept: Sequence[Labels], weights: str) -> nn.Module:
        if weights == "trained":
            model = self.traced.cut(source, kept).eval()
            self.heal(model, kept, source)
            return model
        if weights == "scratch":
            with seeded(self.seed):
                if self.traced.narrows:  # as a module of this width is made
                    model = self.traced.cut(self.dense, kept).eval()
                    forget(model)
                    return model
                fresh = copy.deepcopy(self.dense)
                forget(fresh)
                return self.traced.cut(fresh, kept).eval()
        early = early_of(self.task, self.traced)
        device = next(self.dense.parameters()).device
        tensors = {name: tensor.detach().to(device, copy=True) for name, tensor in tensors_of(early)}
        return self.traced.cut(with_tensors(self.dense, tensors), kept).eval()

    def _gradually(self, ratios: Sequence[float], plan: Final, total: int) -> tuple[nn.Module, tuple[Labels, ...]]:
        space, model = self.traced.space, copy.deepcopy(self.dense)
        decay = plan.decay(total)
        kept = everything(space)

        def after(step: int) -> None:
            nonlocal kept
            if decay.due(step):
                kept = narrowed(space, self.rank(model), [decay(step) * ratio for ratio in ratios], kept)
            self.traced.silence(model, kept)

        after(0)
        self.tune(model, plan, 0, after)
        return self.traced.cut(model, kept).eval(), kept


def everything(space: PruningSpace) -> tuple[Labels, ...]:
    """All units of each group."""
    return tuple(np.arange(group.size) for group in space.groups)


def narrowed(
    space: PruningSpace, scores: Sequence[Scores], ratios: Sequence[float], kept: Sequence[Labels]
) -> tuple[Labels, ...]:
    """Of the units that are kept, those that each group still keeps at these ratios [G]: the most important, the first
    among equals."""
    found = []
    for row, width, left in zip(scores, space.kept(ratios), kept, strict=True):
        order = np.argsort(-row[left], kind="stable")
        found.append(np.sort(left[order[: min(width, len(left))]]))
    return tuple(found)


def check_final(plan: Final, task: Task, traced: TracedModel) -> None:
    """Raises InputError where a task's model cannot be trained so."""
    with seeded(0):
        total = plan.total(task.train)
        if plan.schedule == "rewound" and total:
            check_past(task.past, replace(plan, steps=math.ceil(total / plan.whole_rounds)), task.train)
    if plan.pruning == "gradual" and total:
        plan.decay(total)
    if plan.weights == "early":
        early_of(task, traced)
    if plan.weights == "scratch":
        fresh_modules(task.model)


def early_of(task: Task, traced: TracedModel) -> nn.Module:
    """The network as it was early in its training.

    Raises:
        InputError: the task does not give it, or gives one of another architecture.
    """
    early = None if task.past is None else task.past.early
    if early is None:
        raise InputError(
            "finetune: weights=early are those that the network had early in its training, which the task does not "
            "give: Task(past=Past(early=…, …)), or weights=trained"
        )
    if fingerprint(early) != traced.fingerprint:
        raise InputError("finetune: weights=early: Task.past.early is of another architecture than the model")
    return early


def forget(model: nn.Module) -> None:
    """Draw parameters anew, in place, as each module does when it is made. Modules that are frozen keep theirs, unless
    the whole model is: it is trained all the same (recover.finetune).

    Raises:
        InputError: a module has parameters and does not say how.
    """
    with torch.no_grad():
        for draw in fresh_modules(model):
            draw()


def fresh_modules(model: nn.Module) -> list[Callable[[], object]]:
    """What draws the parameters of each module anew; raises as `forget`."""
    frozen, found = not any(p.requires_grad for p in model.parameters()), []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or not (frozen or any(p.requires_grad for p in own.values())):
            continue
        ways = (getattr(module, way, None) for way in ("reset_parameters", "_reset_parameters"))
        draw = next(filter(callable, ways), None)
        if draw is None:
            raise InputError(
                f"finetune: weights=scratch: {name or 'the model'} ({type(module).__name__}) has the parameter "
                f"{next(iter(own))} and no reset_parameters() that draws it anew: add one, or weights=trained"
            )
        found.append(draw)
    return found
