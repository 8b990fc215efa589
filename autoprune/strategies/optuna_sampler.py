"""Any sampler of Optuna as a strategy: its parameters are the groups' ratios.

Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019. objective="pareto": samplers
see the score and the predicted cost of every budget, and lack nothing to draw the whole front of score against cost;
budgets are constraints. objective="score": the score alone, and every candidate is walked inside the budgets first
(bound.py), so that nothing is spent outside.

Letters: G groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optuna
from optuna.distributions import IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autoprune.bound import Bound, Levels
from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    InputError,
    PruningSpace,
    Recovery,
    Scripted,
    Trial,
    check_recovery,
    check_rules,
)
from autoprune.finalists import Conversation, Ending


class OptunaSampler(Scripted):
    """See the module's docstring.

    sampler: a class of optuna.samplers by its name; options: its keyword arguments. episodes: candidates in all, batch
    of them at a time. proxy: the recovery that they are scored after. finalists, attempts, recovery: see finalists.py.

    Raises:
        InputError: a setting is out of its range, or Optuna has no such sampler, or it does not take these options.
    """

    def __init__(
        self,
        space: PruningSpace,
        budgets: Sequence[Budget],
        costs: Mapping[str, CostModel],
        *,
        seed: int = 0,
        sampler: str = "TPESampler",
        options: Mapping[str, Any] | None = None,
        objective: Literal["pareto", "score"] = "pareto",
        episodes: int = 400,
        batch: int = 1,
        proxy: Recovery = "probe",
        finalists: int = 3,
        attempts: int = 4,
        recovery: Recovery = "short",
    ) -> None:
        rules = {
            "objective must be pareto or score": objective in ("pareto", "score"),
            "episodes >= 1": episodes >= 1,
            "batch >= 1": batch >= 1,
        }
        given = {"objective": objective, "episodes": episodes, "batch": batch}
        check_rules("optuna", rules, given)
        check_recovery(proxy)
        self.space, self.budgets, self.costs = space, tuple(budgets), dict(costs)
        self.objective, self.episodes, self.batch = objective, episodes, batch
        self.proxy: Recovery = proxy
        self._ending = Ending(
            strategy="optuna",
            space=space,
            budgets=self.budgets,
            costs=self.costs,
            finalists=finalists,
            attempts=attempts,
            recovery=recovery,
        )
        self._sampler = _sampler(sampler, seed, options or {})
        super().__init__(self._converse())

    def _converse(self) -> Conversation:
        bound = Bound(self.space, self.budgets, self.costs)
        if not (self.budgets and bound.reachable):
            yield from self._ending.smallest()
            return
        aims = len(self.budgets) if self.objective == "pareto" else 0
        directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * aims]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(directions=directions, sampler=self._sampler)
        scored: dict[Levels, Trial] = {}
        for start in range(0, self.episodes, self.batch):
            asked = [self._asked(study) for _ in range(min(self.batch, self.episodes - start))]
            drawn = [self._levels(bound, trial.params) for trial in asked]
            unseen = [levels for levels in dict.fromkeys(drawn) if levels not in scored]
            if unseen:
                trials = yield [Candidate(ratios=bound.space.ratios(n), recovery=self.proxy) for n in unseen]
                scored |= zip(unseen, trials, strict=True)
            for trial, levels in zip(asked, drawn, strict=True):
                self._tell(study, trial, scored[levels], self._uses(bound, levels))
        yield from self._ending.best(scored)

    def _asked(self, study: optuna.Study) -> optuna.Trial:
        """Raises InputError where the sampler cannot draw such parameters, or not for so many objectives."""
        try:
            return study.ask(self._distributions())
        except (ValueError, NotImplementedError, ImportError) as error:
            raise InputError(
                f"optuna: {type(self._sampler).__name__} cannot be used with objective={self.objective}: {error}"
            ) from error

    def _distributions(self) -> dict[str, Any]:
        return {group.name: IntDistribution(0, max(1, len(group.levels) - 1)) for group in self.space.groups}

    def _levels(self, bound: Bound, params: Mapping[str, int]) -> Levels:
        drawn = tuple(min(params[g.name], deepest) for g, deepest in zip(self.space.groups, bound.deepest, strict=True))
        return bound.walked(drawn) if self.objective == "score" else drawn

    def _uses(self, bound: Bound, levels: Levels) -> list[float]:
        """The fraction of every limit [B] that a network is predicted to take."""
        return [self.costs[b.cost].predict(bound.space.ratios(levels)) / b.limit for b in self.budgets]

    def _tell(self, study: optuna.Study, asked: optuna.Trial, trial: Trial, uses: Sequence[float]) -> None:
        for number, use in enumerate(uses):
            asked.set_constraint(f"{number} {self.budgets[number].cost}", use - 1)
        if trial.error is not None:
            study.tell(asked, state=TrialState.FAIL)
        else:
            study.tell(asked, [trial.score, *(uses if self.objective == "pareto" else ())])


def _sampler(name: str, seed: int, options: Mapping[str, Any]) -> optuna.samplers.BaseSampler:
    """A sampler by its class's name, seeded where it draws."""
    kind = getattr(optuna.samplers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, optuna.samplers.BaseSampler)):
        known = [n for n in dir(optuna.samplers) if n.endswith("Sampler") and n != "BaseSampler"]
        raise InputError(f"optuna: there is no sampler '{name}': strategy.sampler must be one of {', '.join(known)}")
    if not isinstance(options, Mapping):
        raise InputError(f"optuna: strategy.options must be a mapping of keyword arguments, got {options!r}")
    draws = "seed" in inspect.signature(kind).parameters
    try:
        return kind(**({"seed": seed % 2**32} if draws else {}) | dict(options))
    except (TypeError, ValueError) as error:
        raise InputError(f"optuna: {name} does not take strategy.options={dict(options)}: {error}") from error
