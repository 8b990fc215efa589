"""What a cut network goes through before it is scored: a list of steps, in this order, as `evaluator.recovery` has it.

    reconstruct     layers that read pruned units are refitted by least squares (reconstruct.py)
    bn_recalibrate  batch normalisation statistics are taken anew (recover.recalibrate)
    finetune        the task's own loss (recover.finetune)
    distill         the task's loss and the dense model's lessons (recover.finetune with a teacher)

The first two, which do not train, heal; they are all that a candidate gets whose recovery is "probe" (core.Candidate).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from autoprune.borrowing import seeded
from autoprune.core import InputError, Recovery, Task, check_rules
from autoprune.recover import FineTune, check_past

HEALING = ("reconstruct", "bn_recalibrate")
TRAINING = ("finetune", "distill")
RECOVERY = (*HEALING, "distill")
Entry = str | Mapping[str, Mapping[str, Any] | None]  # a step's name, or its name with settings of its fine-tune


@dataclass(frozen=True)
class Step:
    """One step of a recovery. plan: of those that train."""

    name: str
    plan: FineTune | None = None


@dataclass(frozen=True)
class Recipe:
    """The steps of a recovery."""

    steps: tuple[Step, ...]

    @staticmethod
    def of(place: str, recovery: Sequence[Entry], short: FineTune) -> Recipe:
        """From a list of names, those that train being alone or with settings: {"finetune": {"steps": 100}}. What they
        do not say is as of `short`; `finetune` has no teacher, whatever that says.

        Raises:
            InputError: this is no list of steps, or one of them stands where it cannot.
        """
        kinds = (*HEALING, *TRAINING)
        rule = f"recovery must be a list of {', '.join(kinds)}"
        pairs = [_pair(entry) for entry in recovery] if isinstance(recovery, list | tuple) else [None]
        known = all(pair is not None and pair[0] in kinds for pair in pairs)
        check_rules(place, {rule: known}, {"recovery": recovery})
        steps = tuple(_step(place, *pair, short) for pair in pairs if pair)
        names = [step.name for step in steps]
        trained = next((i for i, name in enumerate(names) if name in TRAINING), len(names))
        rules = {
            "recovery must have reconstruct once at most": names.count("reconstruct") <= 1,
            "recovery must have reconstruct before what trains, which it would undo": "reconstruct"
            not in names[trained:],
        }
        check_rules(place, rules, {"recovery": recovery})
        return Recipe(steps)

    def of_recovery(self, recovery: Recovery) -> tuple[Step, ...]:
        """What a candidate with this recovery gets."""
        if recovery == "short":
            return self.steps
        healing = [step for step in self.steps if step.name in HEALING] if recovery == "probe" else []
        return tuple(step for step, _ in groupby(healing))  # a second recalibration in a row changes nothing

    def check_task(self, task: Task) -> None:
        """Raises InputError where a step cannot be taken on this task."""
        for step in self.steps:
            if step.plan and step.plan.schedule == "rewound":
                with seeded(0):
                    check_past(task.past, step.plan, task.train)

    @property
    def shareable(self) -> bool:
        """Whether candidates that are not trained may be scored together: what is recalibrated is refitted before."""
        names = [step.name for step in self.of_recovery("probe")]
        return names == [name for name in HEALING if name in names]


def check_healing(place: str, recovery: Sequence[str]) -> None:
    """Raises InputError unless this is a list of steps of HEALING, each at most once."""
    rule = f"recovery must be a list of {', '.join(HEALING)}, each at most once"
    kept = isinstance(recovery, list | tuple) and all(recovery.count(s) == 1 and s in HEALING for s in recovery)
    check_rules(place, {rule: kept}, {"recovery": recovery})


def _pair(entry: Any) -> tuple[str, Mapping[str, Any]] | None:
    """A step's name and its settings; None where this is no step."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, settings),) = entry.items()
        return (name, settings or {}) if settings is None or isinstance(settings, Mapping) else None
    return None


def _step(place: str, name: str, settings: Mapping[str, Any], short: FineTune) -> Step:
    where, known = f"{place}.recovery: {name}", [field.name for field in fields(FineTune)]
    if name in HEALING:
        known = []
    elif name == "finetune":
        known.remove("teach")
    if unknown := sorted(set(settings) - set(known), key=str):
        takes = f"takes {', '.join(known)}" if known else "takes no setting"
        raise InputError(f"{where} has no setting '{unknown[0]}': it {takes}")
    if name in HEALING:
        return Step(name)
    given = {"steps": None} | dict(settings) if "epochs" in settings else dict(settings)
    if name == "finetune":
        given["teach"] = 0.0
    try:
        return Step(name, replace(short, **given))
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error
