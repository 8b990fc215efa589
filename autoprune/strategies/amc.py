"""AMC: an agent walks the layers and learns by trial how much to keep of each, under a budget that it cannot exceed.

He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018, arXiv 1802.03494; agent:
Lillicrap et al., "Continuous control with deep reinforcement learning" (DDPG), ICLR 2016, arXiv 1509.02971. One step a
group, one episode a candidate (pruning_env.py); random walks first, then the actor's choice with noise that decays.
Every transition of an episode is paid the episode's reward (section 3.2), less a moving average.

Deviations from the paper and its public code (mit-han-lab/amc); `amc_paper` in conf/strategy/ undoes the first five,
which is what it takes to learn in a few hundred episodes (experiments/amc):
- least: walks are bounded from below too, so that they end at the budget and not far inside it.
- credit: the critic learns what a choice came to at the end (Monte Carlo) instead of looking ahead to its own estimate.
- index: the agent sees the group's number as a unit vector beside the eleven features.
- The actor learns as fast as the critic (1e-3, paper 1e-4), and the noise decays by 0.99 an episode (paper 0.95).
- Hidden layers are 64 wide (paper 300): a third less time at about the same regret (experiments/amc).
- What is remembered of an action is what the bound made of it.
- The agent is Stable-Baselines3's: `ddpg`, or `td3` and `sac` by the same walk, noise and memory.
- A walk that was scored before is not scored again; its reward is remembered.
- A walk that fails is paid what is as far below the worst as that is below the best.
- The best few walks are fine-tuned briefly, and the best of them is measured (finalists.py); the paper takes the best
  walk. A limit that is missed by measurement calibrates the cost model, and what was walked is bounded again.
- allocations: walks to the exact allocations of a sensitivity sweep come first, for the agent to learn from. stages:
  budgets that begin wide and tighten. The paper has neither, and neither is on by default.

Letters: G groups, L levels of one group, T transitions.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import truncnorm

from autoprune import sweep
from autoprune.agent import Agent, Learner, Walk
from autoprune.allocate import InfeasibleError, allocate
from autoprune.bound import Bound, Levels
from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    PruningSpace,
    Recovery,
    Scripted,
    Trial,
    check_recovery,
    check_rules,
)
from autoprune.finalists import Conversation, Ending
from autoprune.pruning_env import REWARDS, LayerPruningEnv, penalty


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One walk: its number from 0, the trial that scored it, its reward, the noise's sigma (None: a random walk)."""

    number: int
    trial: int
    reward: float
    sigma: float | None


class Amc(Scripted):
    """See the module's docstring.

    episodes: walks in all, of which the first warm_up >= 1 are random. batch: walks that go out together, all by the
    same actor. agent: "ddpg", "td3" or "sac". reward: see LayerPruningEnv. proxy: the recovery that walks are scored
    after. least: see Bound. allocations: fractions > 0 of the limits, at each of which an exact allocation is walked to
    before the first episode. stages: fractions >= 1 of the limits, each for an equal part of the episodes, in turn.
    finalists, attempts, recovery: see finalists.py.

    The agent's settings: hidden, widths of the hidden layers of actor and critic; actor_lr, critic_lr > 0; tau in
    (0, 1], how fast the target networks follow; discount in [0, 1]; batch_size, memory >= 1, in transitions; updates
    >= 0, gradient steps a transition; baseline in [0, 1], how fast the moving average of rewards follows, 0 for none;
    credit: "every_step", each transition is paid the reward and the critic looks ahead (paper), or "monte_carlo", each
    is paid the reward and nothing beyond it is looked at; index: "scalar", the group's number as the observation has it
    (paper), or "one_hot", a unit vector beside it. sigma > 0, decay in (0, 1]: the noise after the warm-up, a truncated
    normal distribution around the actor's choice, and what it is multiplied by after each episode.

    Raises:
        InputError: a setting is out of its range.
    """

    def __init__(
        self,
        space: PruningSpace,
        budgets: Sequence[Budget],
        costs: Mapping[str, CostModel],
        *,
        seed: int = 0,
        episodes: int = 400,
        warm_up: int = 100,
        batch: int = 1,
        agent: Literal["ddpg", "td3", "sac"] = "ddpg",
        reward: Literal["accuracy", "accuracy_guaranteed"] = "accuracy",
        hidden: Sequence[int] = (64, 64),
        actor_lr: float = 1e-3,
        critic_lr: float = 1e-3,
        tau: float = 0.01,
        discount: float = 1.0,
        batch_size: int = 64,
        memory: int = 2000,
        updates: int = 1,
        baseline: float = 0.5,
        credit: Literal["every_step", "monte_carlo"] = "monte_carlo",
        index: Literal["scalar", "one_hot"] = "one_hot",
        sigma: float = 0.5,
        decay: float = 0.99,
        proxy: Recovery = "probe",
        least: float = 0.95,
        allocations: Sequence[float] = (),
        stages: Sequence[float] = (1.0,),
        finalists: int = 3,
        attempts: int = 4,
        recovery: Recovery = "short",
    ) -> None:
        self._learner = Learner(
            kind=agent,
            hidden=tuple(hidden),
            actor_lr=actor_lr,
            critic_lr=critic_lr,
            tau=tau,
            discount=discount,
            batch_size=batch_size,
            memory=memory,
            updates=updates,
            baseline=baseline,
            credit=credit,
            index=index,
        )
        rules = {
            "episodes >= 1": episodes >= 1,
            "1 <= warm_up <= episodes": 1 <= warm_up <= episodes,
            "batch >= 1": batch >= 1,
            f"reward must be one of {', '.join(REWARDS)}": reward in REWARDS,
            "sigma > 0": sigma > 0,
            "0 < decay <= 1": 0 < decay <= 1,
            "0 <= least <= 1": 0 <= least <= 1,
            "least must be 0 with reward=accuracy_guaranteed, which looks for the smallest network": least == 0
            or reward == "accuracy",
            "allocations must be fractions > 0": all(fraction > 0 for fraction in allocations),
            "stages must be fractions >= 1, at least one": bool(stages) and all(factor >= 1 for factor in stages),
        }
        given: dict[str, object] = {
            "episodes": episodes,
            "warm_up": warm_up,
            "batch": batch,
            "reward": reward,
            "sigma": sigma,
        }
        given |= {"decay": decay, "least": least, "allocations": allocations, "stages": stages}
        check_rules("amc", rules, given)
        check_recovery(proxy)
        self.space, self.budgets, self.costs, self.seed = space, tuple(budgets), dict(costs), seed
        self.episodes, self.warm_up, self.batch, self.reward = episodes, warm_up, batch, reward
        self.sigma, self.decay = sigma, decay
        self.least = least
        self.allocations, self.stages = tuple(allocations), tuple(stages)
        self.proxy: Recovery = proxy
        self.walked: tuple[Episode, ...] = ()
        self._scored: dict[Levels, Trial] = {}
        self._ending = Ending(
            strategy="amc",
            space=space,
            budgets=self.budgets,
            costs=self.costs,
            finalists=finalists,
            attempts=attempts,
            recovery=recovery,
        )
        super().__init__(self._converse())

    def _converse(self) -> Conversation:
        if not (self.budgets and Bound(self.space, self.budgets, self.costs).reachable):
            yield from self._ending.smallest()
            return
        env = self._env(1.0)
        agent = Agent(self._learner, env, seed=self.seed)
        free = self._env(1.0, least=0.0)
        for levels in (yield from self._allocated()):
            yield from self._lived(env, agent, [_walked_to(free, levels)], number=None)
        for numbers, factor in self._batches():
            here = self._env(factor)
            yield from self._lived(env, agent, [self._walk(here, agent, n) for n in numbers], number=numbers[0])
            if numbers[-1] + 1 >= self.warm_up:
                agent.train(len(numbers) * len(self.space.groups), number=numbers[0])
        yield from self._ending.best(self._scored, lambda trial: env.paid(trial.score, trial.candidate.ratios))

    def _batches(self) -> Iterator[tuple[range, float]]:
        """Episodes that go out together, with their stage's multiple of the limits; a batch ends with the warm-up, and
        with a stage."""
        share = self.episodes / len(self.stages)
        borders = [round(share * stage) for stage in range(len(self.stages) + 1)]
        start = 0
        while start < self.episodes:
            stage = max(n for n in range(len(self.stages)) if borders[n] <= start)
            end = min(b for b in (start + self.batch, borders[stage + 1], self.warm_up, self.episodes) if b > start)
            yield range(start, end), self.stages[stage]
            start = end

    def _env(self, factor: float, least: float | None = None) -> LayerPruningEnv:
        """The environment under this multiple of the limits; it is paid from outside."""
        least = self.least if least is None else least
        budgets = [replace(budget, limit=factor * budget.limit) for budget in self.budgets]
        return LayerPruningEnv(
            self.space, budgets, self.costs, evaluate=lambda _: math.nan, reward=self.reward, least=least
        )

    def _lived(self, env: LayerPruningEnv, agent: Agent, walks: Sequence[Walk], *, number: int | None) -> Conversation:
        """Score what these walks came to, and remember them. number: of the first episode; None of no episode."""
        if unseen := dict.fromkeys(walk.levels for walk in walks if walk.levels not in self._scored):
            trials = yield [Candidate(ratios=env.bound.space.ratios(n), recovery=self.proxy) for n in unseen]
            self._scored |= zip(unseen, trials, strict=True)
        for place, walk in enumerate(walks):
            reward = self._paid(env, walk.levels)
            agent.remember(walk, reward)
            if number is not None:
                trial = self._scored[walk.levels].number
                made = Episode(number=number + place, trial=trial, reward=reward, sigma=walk.sigma)
                self.walked = (*self.walked, made)

    def _walk(self, env: LayerPruningEnv, agent: Agent, number: int) -> Walk:
        """An episode: random in the warm-up, then the actor's choice with noise, sigma x decay^(episodes since)."""
        rng = np.random.default_rng([self.seed, number])
        later = number - self.warm_up
        if later < 0:
            return Walk.through(env, lambda group, seen: float(rng.uniform()))
        sigma = self.sigma * self.decay**later
        return Walk.through(env, lambda group, seen: _noisy(agent.action(seen), sigma, rng), sigma)

    def _paid(self, env: LayerPruningEnv, levels: Levels) -> float:
        """The reward of a walk; one that failed is paid what is as far below the worst as that is below the best."""
        trial = self._scored[levels]
        if trial.error is None:
            return env.paid(trial.score, trial.candidate.ratios)
        return penalty([env.paid(t.score, t.candidate.ratios) for t in self._scored.values() if t.error is None])

    def _allocated(self) -> Generator[list[Candidate], Sequence[Trial], list[Levels]]:
        """The exact allocations that were asked for, on the loss increases of a sweep."""
        if not self.allocations:
            return []
        losses = yield from sweep.bisected(self.space, recovery=self.proxy)
        found: list[Levels] = []
        for fraction in self.allocations:
            limits = [(f, fraction * b.limit) for b in self.budgets for f in self.costs[b.cost].tables()]
            with suppress(InfeasibleError):
                found.append(allocate(losses, limits).levels)
        return found


def _walked_to(env: LayerPruningEnv, levels: Levels) -> Walk:
    """The walk that wishes for these levels."""
    return Walk.through(env, lambda group, seen: env.action_for(group, levels[group]))


def _noisy(action: float, sigma: float, rng: np.random.Generator) -> float:
    """A draw from the normal distribution around an action, truncated to [0, 1] (section 3.2)."""
    low, high = -action / sigma, (1 - action) / sigma
    return float(truncnorm.rvs(low, high, loc=action, scale=sigma, random_state=rng))
