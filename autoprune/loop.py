"""The loop: a strategy that knows only numbers talks with an evaluator that knows only models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from autoprune.core import Candidate, InputError, Strategy, Trial

Evaluate = Callable[[Sequence[tuple[int, Candidate]]], Iterable[Trial]]


class ReplayError(InputError):
    """A recorded trial is not the one the strategy asks for now: the record belongs to another search."""


def search(
    strategy: Strategy,
    evaluate: Evaluate,
    record: Callable[[Trial], None],
    *,
    history: Sequence[Trial] = (),
    on_batch: Callable[[int, int], None] = lambda asked, known: None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Trial, ...]:
    """Ask, evaluate, record, tell, until the strategy asks for nothing more; returns all trials in order.

    Every trial is recorded the moment it is finished. history holds the trials of an interrupted run: as long as it
    lasts, the strategy is told what was recorded instead of evaluating again.

    Raises:
        ReplayError: the strategy asks for another candidate than the one recorded under that number.
    """
    trials: list[Trial] = []
    while batch := strategy.ask():
        numbered = list(enumerate(batch, start=len(trials)))
        known = list(_replayed(numbered, history))
        on_batch(len(batch), len(known))
        told = list(known)
        for trial in evaluate(numbered[len(known) :]):
            record(trial)
            on_trial(trial)
            told.append(trial)
        strategy.tell(told)
        trials += told
    return tuple(trials)


def _replayed(numbered: Sequence[tuple[int, Candidate]], history: Sequence[Trial]) -> Iterator[Trial]:
    for number, candidate in numbered:
        if number >= len(history):
            return
        trial = history[number]
        if trial.number != number or trial.candidate != candidate:
            raise ReplayError(
                f"trial {number} was recorded for {trial.candidate}, but the strategy now asks for {candidate}: "
                "the record belongs to another search; give this one another study.name"
            )
        yield trial
