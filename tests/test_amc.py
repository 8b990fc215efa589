from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from test_run import QUICK as BRIEF
from test_run import searched
from tiny import make_task
from zoo import ZOO

import autoprune
from autoprune import console, report
from autoprune.allocate import allocate
from autoprune.bound import Bound
from autoprune.core import Budget, Candidate, CostModel, InputError, PruningSpace, Trial
from autoprune.evaluate import Scoring
from autoprune.loop import search
from autoprune.meters.table import CountedCost
from autoprune.pruning_env import FEATURES, LayerPruningEnv
from autoprune.space import Space, trace
from autoprune.strategies.amc import Amc
from autoprune.testing import World, answer

QUICK: dict[str, Any] = {"episodes": 40, "warm_up": 20, "hidden": (16, 16)}


def env_of(world: World, **settings: Any) -> LayerPruningEnv:
    return LayerPruningEnv(
        world.space, world.budgets, world.costs, evaluate=lambda ratios: 1 - world.loss(ratios), **settings
    )


def walked(env: LayerPruningEnv, actions: Iterable[float]) -> tuple[tuple[int, ...], float]:
    env.reset()
    for action in actions:
        _, reward, done, _, info = env.step(np.array([action], dtype=np.float32))
    assert done
    return info["levels"], reward


# ------------------------------------------------------------------------------------------------- the environment


def test_gymnasium_accepts_the_environment() -> None:
    check_env(env_of(World(0)), skip_render_check=True)


@pytest.mark.parametrize("least", [0.0, 0.95])
@pytest.mark.parametrize("limit", [0.15, 0.5, 0.9])
def test_every_episode_ends_inside_the_budget(limit: float, least: float) -> None:
    world, rng = World(3, limit=limit), np.random.default_rng(0)
    env = env_of(world, least=least)
    for _ in range(100):
        levels, _ = walked(env, rng.uniform(size=8))
        assert env.bound.keeps(levels)


def real_space(name: str) -> tuple[PruningSpace, CostModel]:
    """The space of a network of the zoo, or of a chain of 40 groups, and its MACs."""
    if name == "40 groups":
        world = World(0, groups=40)
        return world.space, world.costs["macs"]
    traced = trace(ZOO[name].build().eval(), ZOO[name].inputs(), Space(levels=8))
    return traced.space, CountedCost("macs", "MACs", traced.space, (traced.macs,))


@pytest.mark.parametrize(
    "name",
    ["vgg", "resnet", "mobilenetv2", "densenet", pytest.param("40 groups", marks=[pytest.mark.slow, pytest.mark.long])],
)
def test_a_thousand_random_episodes_end_inside_the_budget(name: str) -> None:
    """Plain, residual, depthwise, concat, and many groups; with the paper's bound and with ours."""
    space, macs = real_space(name)
    budget, rng = Budget("macs", 0.5 * macs.predict(space.dense()), "MACs"), np.random.default_rng(0)
    for least in (0.0, 0.95):
        env = LayerPruningEnv(space, (budget,), {"macs": macs}, evaluate=lambda ratios: 0.0, least=least)
        for _ in range(500):
            levels, _ = walked(env, rng.uniform(size=len(space.groups)))
            assert macs.predict(env.bound.space.ratios(levels)) <= budget.limit
        kept, _ = walked(env, [1.0] * len(space.groups))
        larger = [(*kept[:g], level - 1, *kept[g + 1 :]) for g, level in enumerate(kept) if level]
        assert larger
        assert not any(env.bound.keeps(levels) for levels in larger), "one level more of any group would have fitted"


def test_an_agent_that_keeps_everything_ends_within_one_level_of_the_budget() -> None:
    env = env_of(World(1))
    levels, _ = walked(env, [1.0] * 8)
    assert env.bound.keeps(levels)
    for group, level in enumerate(levels):
        if level:
            assert not env.bound.keeps((*levels[:group], level - 1, *levels[group + 1 :]))
    assert any(levels)


def test_an_agent_that_keeps_nothing_still_uses_the_budget_where_it_has_to() -> None:
    free, held = (env_of(World(1), least=least) for least in (0.0, 0.9))
    assert free.bound.use(walked(free, [0.0] * 8)[0]) < 0.5
    assert 0.9 <= held.bound.use(walked(held, [0.0] * 8)[0]) <= 1


def test_the_reward_is_paid_at_the_end_for_the_network_that_was_walked_to() -> None:
    world = World(2)
    env = env_of(world)
    env.reset()
    steps = [env.step(np.array([0.7], dtype=np.float32)) for _ in range(8)]
    assert [reward for _, reward, *_ in steps[:-1]] == [0.0] * 7
    assert [done for _, _, done, *_ in steps] == [False] * 7 + [True]
    assert steps[-1][1] == 1 - world.loss(steps[-1][4]["ratios"])


def test_observations_tell_what_is_saved_and_what_still_can_be() -> None:
    world = World(2)
    env, macs = env_of(world), world.costs["macs"]
    dense = macs.predict(world.space.dense())
    first, _ = env.reset()
    seen = dict(zip(FEATURES, first, strict=True))
    smallest = macs.predict([g.levels[-1] for g in world.space.groups])
    assert (seen["index"], seen["reduced"], seen["last"]) == (0, 0, 1)
    assert seen["rest"] == pytest.approx(1 - smallest / dense)
    after = dict(zip(FEATURES, env.step(np.array([0.0], dtype=np.float32))[0], strict=True))
    cut = macs.predict((world.space.groups[0].levels[-1], *world.space.dense()[1:]))
    assert after["index"] == pytest.approx(1 / 7)
    assert after["reduced"] == pytest.approx(1 - cut / dense)
    assert after["last"] == 0


def test_rewards_are_those_of_the_paper() -> None:
    world = World(2)
    env = env_of(world, reward="accuracy_guaranteed")
    ratios = tuple(g.levels[-1] for g in world.space.groups)
    assert env.paid(0.9, ratios) == pytest.approx(-0.1 * np.log(world.costs["macs"].predict(ratios)))
    assert env_of(world).paid(0.9, ratios) == 0.9
    with pytest.raises(InputError, match=r"it must be at most 1, got 31\.5"):
        env.paid(31.5, ratios)


def test_the_smallest_network_that_keeps_accuracy_is_smaller_than_the_budget_asks() -> None:
    world = World(0, limit=0.9)
    _, trials = played(world, reward="accuracy_guaranteed", least=0.0, episodes=60)
    assert answer(trials).costs["macs"].value < 0.8 * world.budgets[0].limit


def test_a_failed_episode_is_paid_less_than_any_other() -> None:
    world = World(0)
    fails = iter([False, False, True])
    env = LayerPruningEnv(
        world.space, world.budgets, world.costs, evaluate=lambda r: None if next(fails) else 1 - world.loss(r)
    )
    first, second, failed = (walked(env, [keep] * 8)[1] for keep in (0.9, 0.3, 0.6))
    assert failed == pytest.approx(2 * min(first, second) - max(first, second) - 0.001)


def test_what_cannot_be_walked_is_refused() -> None:
    world = World(2)
    with pytest.raises(InputError, match="reward must be one of accuracy, accuracy_guaranteed, got 'speed'"):
        env_of(world, reward="speed")
    with pytest.raises(InputError, match=r"the smallest network takes .* times what a budget allows"):
        env_of(World(2, limit=1e-4))
    with pytest.raises(InputError, match="budgets is empty"):
        LayerPruningEnv(world.space, (), world.costs, evaluate=lambda ratios: 0.0)


def test_a_bound_takes_the_wish_where_it_is_open() -> None:
    world = World(4, limit=0.9)
    bound = Bound(world.space, world.budgets, world.costs)
    deep = tuple(len(g.levels) - 2 for g in world.space.groups)
    assert bound.walked(deep) == deep
    assert bound.walked((0,) * 8) != (0,) * 8


# ---------------------------------------------------------------------------------------------------- the strategy


def played(world: World, history: Sequence[Trial] = (), **settings: Any) -> tuple[Amc, tuple[Trial, ...]]:
    strategy = Amc(world.space, world.budgets, world.costs, **{**QUICK, **settings})
    return strategy, search(strategy, world.evaluate, lambda trial: None, history=history)


@pytest.mark.parametrize("agent", ["ddpg", "td3", "sac"])
def test_every_agent_walks_by_its_name_alone(agent: str) -> None:
    strategy, trials = played(World(0), agent=agent)
    assert len(strategy.walked) == 40
    assert answer(trials).feasible


def test_random_walks_come_first_and_noise_decays() -> None:
    strategy, _ = played(World(0))
    sigmas = [episode.sigma for episode in strategy.walked]
    assert sigmas[:20] == [None] * 20
    assert sigmas[20:] == pytest.approx([0.5 * 0.99**i for i in range(20)])


def test_no_candidate_is_scored_twice() -> None:
    strategy, trials = played(World(0), sigma=0.01)
    scored = [t.candidate.ratios for t in trials if t.candidate.recovery == "probe"]
    assert len(scored) == len(set(scored))
    assert len(scored) < 40, "an agent with hardly any noise walks the same way again"
    for episode in strategy.walked:
        assert episode.reward == trials[episode.trial].score


def test_the_batch_changes_nothing_before_the_agent_has_learnt() -> None:
    one, four = (played(World(0), batch=batch)[0].walked[:20] for batch in (1, 4))
    assert [e.reward for e in one] == [e.reward for e in four]


@pytest.mark.slow
def test_the_agent_learns() -> None:
    """Noise that decays around a choice never learnt betters random walks too: what is learnt is the difference."""
    gained = []
    for seed in range(3):
        learnt, not_learnt = (
            played(World(seed), episodes=160, warm_up=60, hidden=(64, 64), updates=updates)[0].walked[-30:]
            for updates in (1, 0)
        )
        gained.append(np.mean([e.reward for e in learnt]) - np.mean([e.reward for e in not_learnt]))
    assert np.mean(gained) > 0.03


def test_a_batch_ends_with_the_warm_up_and_with_a_stage() -> None:
    strategy, _ = played(World(0), episodes=30, warm_up=5, batch=8, stages=(1.2, 1.1, 1.0))
    batches = list(strategy._batches())
    assert [(numbers[0], numbers[-1], factor) for numbers, factor in batches] == [
        (0, 4, 1.2),
        (5, 9, 1.2),
        (10, 17, 1.1),
        (18, 19, 1.1),
        (20, 27, 1.0),
        (28, 29, 1.0),
    ]


@pytest.mark.slow
def test_interrupted_at_any_episode_it_goes_on_the_same() -> None:
    whole, trials = played(World(5))
    for cut in (7, 25, len(trials) - 2):
        again, resumed = played(World(5), history=trials[:cut])
        assert again.walked == whole.walked
        assert [t.candidate for t in resumed] == [t.candidate for t in trials]


def test_another_seed_walks_otherwise() -> None:
    one, other = (played(World(0), seed=seed)[0].walked for seed in (3, 4))
    assert [e.reward for e in one] != [e.reward for e in other]


def test_a_walk_that_fails_is_paid_less_than_any_other() -> None:
    world = World(5)
    world.fails = lambda ratios: ratios[0] > 0.3
    strategy, trials = played(world)
    failed = [e.reward for e in strategy.walked if trials[e.trial].error is not None]
    whole = [e.reward for e in strategy.walked if trials[e.trial].error is None]
    assert failed
    assert max(failed[5:]) < min(whole)


def test_where_nothing_can_be_measured_the_smallest_network_is_the_last_try() -> None:
    world = World(5)
    smallest = tuple(g.levels[-1] for g in world.space.groups)

    def evaluate(batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        for trial in world.evaluate(batch):
            broken = trial.candidate.measure and trial.candidate.ratios != smallest
            yield dataclasses.replace(trial, error="RuntimeError: no device" if broken else None)

    strategy = Amc(world.space, world.budgets, world.costs, **QUICK)
    trials = search(strategy, evaluate, lambda trial: None)
    assert trials[-1].candidate.measure
    assert trials[-1].candidate.ratios == smallest


def test_allocations_are_walked_to_before_the_first_episode() -> None:
    world = World(0)
    _, trials = played(world, allocations=(1.0, 0.8))
    scored = [t.candidate.ratios for t in trials if t.candidate.recovery == "probe"]
    limits = [(form, world.budgets[0].limit) for form in world.costs["macs"].tables()]
    losses = [
        np.array([world.loss((*world.space.dense()[:g], r, *world.space.dense()[g + 1 :])) for r in group.levels])
        for g, group in enumerate(world.space.groups)
    ]
    best = allocate(losses, limits).levels
    ratios = tuple(g.levels[i] for g, i in zip(world.space.groups, best, strict=True))
    first = next(i for i, each in enumerate(scored) if sum(ratio > 0 for ratio in each) > 1)  # after the sweep
    near = min(sum(a != b for a, b in zip(ratios, other, strict=True)) for other in scored[first : first + 2])
    assert near <= 3, "the allocation on the sweep is close to the one on the true losses"
    assert answer(trials).loss < answer(played(world)[1]).loss


def test_budgets_that_tighten_end_at_the_budget() -> None:
    """Walks of a wide stage score higher, and are no finalists for that."""
    world = World(0)
    strategy, trials = played(world, stages=(1.6, 1.0), least=0.9)
    walked = {t.candidate.ratios for t in trials if t.candidate.recovery == "probe"}
    assert {t.candidate.ratios for t in trials if "phase" in t.candidate.about} <= walked
    macs = world.costs["macs"]
    uses = [macs.predict(trials[e.trial].candidate.ratios) / world.budgets[0].limit for e in strategy.walked]
    assert max(uses[:20]) > 1
    assert max(uses[20:]) <= 1
    assert answer(trials).feasible


def test_a_missed_measurement_is_bounded_anew() -> None:
    world = World(0, bias=0.05)
    world.budgets = (dataclasses.replace(world.budgets[0], limit=world.budgets[0].limit / 1.05),)
    _, trials = played(world, least=0.97)
    measured = [t for t in trials if t.candidate.measure]
    assert measured[0].feasible is False
    assert measured[-1].feasible


@pytest.mark.slow
def test_a_search_by_its_name_shows_its_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = {"_target_": "autoprune.strategies.amc.Amc", "episodes": 10, "warm_up": 5, "hidden": [16]}
    result = searched(make_task(), budget="flops_50pct", strategy=strategy, final=BRIEF)
    assert result.met
    assert len(result.episodes) == 10
    report.write(result, tmp_path)
    console.show(result, tmp_path)
    assert "Episodes" in (tmp_path / "report.html").read_text()
    assert "in the warm-up (mean)" in capsys.readouterr().out


def test_the_environment_of_a_task_pays_what_its_network_scores() -> None:
    task = make_task()
    env = autoprune.environment(task, budget="flops_50pct", scoring=Scoring(images=100, recalibration=1))
    actions = [0.6] * len(env.space.groups)
    levels, reward = walked(env, actions)
    assert 0.1 < reward <= 1
    assert walked(env, actions) == (levels, reward)
    assert env.bound.keeps(levels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 0}, "amc: episodes >= 1 must hold, got episodes=0"),
        ({"warm_up": 50}, "amc: 1 <= warm_up <= episodes must hold, got warm_up=50"),
        ({"agent": "ppo"}, "amc: agent must be ddpg, td3 or sac, got agent=ppo"),
        ({"reward": "speed"}, "amc: reward must be one of accuracy, accuracy_guaranteed, got reward=speed"),
        ({"credit": "none"}, "amc: credit must be one of every_step, monte_carlo, got credit=none"),
        ({"tau": 0.0}, "amc: 0 < tau <= 1 must hold, got tau=0.0"),
        ({"hidden": ()}, r"amc: hidden must be widths >= 1, got hidden=\(\)"),
        ({"reward": "accuracy_guaranteed"}, "amc: least must be 0 with reward=accuracy_guaranteed.*, got least=0.95"),
        ({"stages": ()}, r"amc: stages must be fractions >= 1, at least one, got stages=\(\)"),
        ({"finalists": 0}, "amc: finalists >= 1 must hold, got finalists=0"),
        ({"recovery": "long"}, "recovery must be one of short, probe, none, got 'long'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    world = World(0)
    with pytest.raises(InputError, match=message):
        Amc(world.space, world.budgets, world.costs, **{**QUICK, **settings})
