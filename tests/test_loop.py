from __future__ import annotations

import pytest

from autoprune.core import Candidate, Trial
from autoprune.loop import ReplayError, search
from autoprune.strategies.sensitivity import Sensitivity
from autoprune.testing import World


def strategy(world: World) -> Sensitivity:
    return Sensitivity(world.space, world.budgets, world.costs)


def test_every_trial_is_recorded_as_it_finishes() -> None:
    """A crash in the middle of a batch loses nothing that was finished."""
    world = World(0)
    recorded: list[Trial] = []

    def crashing(batch):  # type: ignore[no-untyped-def]
        for trial in world.evaluate(batch):
            if trial.number == 7:
                raise KeyboardInterrupt
            yield trial

    with pytest.raises(KeyboardInterrupt):
        search(strategy(world), crashing, recorded.append)
    assert [t.number for t in recorded] == list(range(7))


def test_a_replayed_search_evaluates_only_what_is_new() -> None:
    world = World(0)
    whole = world.play(strategy(world))
    evaluated: list[int] = []

    def counting(batch):  # type: ignore[no-untyped-def]
        for trial in world.evaluate(batch):
            evaluated.append(trial.number)
            yield trial

    again = search(strategy(world), counting, lambda trial: None, history=whole[:20])
    assert evaluated == list(range(20, len(whole)))
    assert [t.candidate for t in again] == [t.candidate for t in whole]


def test_a_record_of_another_search_stops_loudly() -> None:
    world = World(0)
    wrong = [Trial(number=0, candidate=Candidate(ratios=tuple(g.levels[1] for g in world.space.groups)))]
    with pytest.raises(ReplayError, match="the record belongs to another search"):
        search(strategy(world), world.evaluate, lambda trial: None, history=wrong)


def test_golden_conversations() -> None:
    """The first twenty candidates of each strategy on a fixed world, and the last where no network's arithmetic
    decides it, which differs between processors; a change here is a change of behaviour."""
    import json
    from pathlib import Path

    from autoprune import components

    golden = json.loads((Path(__file__).parent / "golden" / "conversations.json").read_text())
    for name, expected in golden["strategies"].items():
        world = World(**golden["world"])
        settings = components.spec("strategy", name) | expected.get("settings", {})
        build = components.bind(settings, "strategy", (), (), {}, seed=0)
        trials = [t.candidate for t in world.play(build(world.space, world.budgets, world.costs, seed=0))]
        found = [[list(world.space.kept(c.ratios)), c.recovery, c.measure] for c in trials]
        assert found[:20] == expected["first"], name
        assert found[-1] == expected.get("last", found[-1]), name
