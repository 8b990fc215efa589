"""An agent of Stable-Baselines3's that is driven from outside: it acts, remembers walks, and trains when it is told to.

Letters: G groups, T transitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.borrowing import seeded
from autoprune.bound import Levels
from autoprune.core import check_rules
from autoprune.pruning_env import FEATURES, LayerPruningEnv, Observation

if TYPE_CHECKING:
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

CREDITS = ("every_step", "monte_carlo")


@dataclass(frozen=True)
class Walk:
    """What an episode went through: observations [G + 1], actions as the bound left them [G], the levels it ended with
    [G], its noise."""

    seen: tuple[Observation, ...]
    actions: tuple[float, ...]
    levels: Levels
    sigma: float | None

    @staticmethod
    def through(env: LayerPruningEnv, choose: Callable[[int, Observation], float], sigma: float | None = None) -> Walk:
        """An episode in which choose(group, observation) gives the actions."""
        seen, info = env.reset()
        observations, actions = [seen], []
        for group in range(len(env.space.groups)):
            seen, _, _, _, info = env.step(np.array([choose(group, seen)], dtype=np.float32))
            actions.append(float(seen[FEATURES.index("last")]))
            observations.append(seen)
        return Walk(tuple(observations), tuple(actions), info["levels"], sigma)


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The settings of an agent, see Amc."""

    kind: str
    hidden: tuple[int, ...]
    actor_lr: float
    critic_lr: float
    tau: float
    discount: float
    batch_size: int
    memory: int
    updates: int
    baseline: float
    credit: str
    index: str

    def __post_init__(self) -> None:
        rules = {
            "agent must be ddpg, td3 or sac": self.kind in ("ddpg", "td3", "sac"),
            "hidden must be widths >= 1": bool(self.hidden) and all(width >= 1 for width in self.hidden),
            "actor_lr > 0": self.actor_lr > 0,
            "critic_lr > 0": self.critic_lr > 0,
            "0 < tau <= 1": 0 < self.tau <= 1,
            "0 <= discount <= 1": 0 <= self.discount <= 1,
            "batch_size >= 1": self.batch_size >= 1,
            "memory >= 1": self.memory >= 1,
            "updates >= 0": self.updates >= 0,
            "0 <= baseline <= 1": 0 <= self.baseline <= 1,
            f"credit must be one of {', '.join(CREDITS)}": self.credit in CREDITS,
            "index must be scalar or one_hot": self.index in ("scalar", "one_hot"),
        }
        check_rules("amc", rules, {**vars(self), "agent": self.kind})


class Agent:
    """A Stable-Baselines3 agent that is driven from outside: it acts, remembers walks, and trains when it is told to.

    What it draws is keyed by the seed and the number of the walk; the global generators are left as they were.
    """

    def __init__(self, learner: Learner, env: LayerPruningEnv, *, seed: int) -> None:
        import stable_baselines3
        from stable_baselines3.common.logger import Logger

        self._learner, self._seed = learner, seed
        kind = getattr(stable_baselines3, learner.kind.upper())
        policy: dict[str, Any] = {"net_arch": list(learner.hidden)}
        if learner.index == "one_hot":
            policy["features_extractor_class"] = _indexed(len(env.space.groups))
        with seeded(_key(seed, 0)):
            self._model: OffPolicyAlgorithm = kind(
                "MlpPolicy",
                env,
                learning_rate=learner.critic_lr,
                buffer_size=learner.memory,
                batch_size=learner.batch_size,
                tau=learner.tau,
                gamma=learner.discount,
                policy_kwargs=policy,
                replay_buffer_class=_centred_memory(learner.baseline),
                device="cpu",
            )
        self._model.set_logger(Logger(None, []))
        self._keep_two_rates()

    def _keep_two_rates(self) -> None:
        """Actor and critic learn at rates of their own, which Stable-Baselines3 would make one before every step."""
        policy: Any = self._model.policy
        for group in policy.actor.optimizer.param_groups:
            group["lr"] = self._learner.actor_lr
        self._model._update_learning_rate = lambda optimizers: None  # type: ignore[method-assign]

    def action(self, seen: Observation) -> float:
        """What the actor would do, in [0, 1]."""
        chosen, _ = self._model.predict(seen, deterministic=True)
        return float(chosen[0])

    def remember(self, walk: Walk, reward: float) -> None:
        """Every transition of a walk, paid its reward."""
        memory, last = self._model.replay_buffer, len(walk.actions) - 1
        assert memory is not None
        for t, action in enumerate(walk.actions):
            taken = self._model.policy.scale_action(np.array([[action]], dtype=np.float32))
            done = t == last or self._learner.credit == "monte_carlo"
            memory.add(walk.seen[t][None], walk.seen[t + 1][None], taken, np.array([reward]), np.array([done]), [{}])

    def train(self, transitions: int, *, number: int) -> None:
        """Gradient steps for so many new transitions; number: of the walk they follow."""
        if count := transitions * self._learner.updates:
            with seeded(_key(self._seed, number + 1)):
                self._model.train(count, self._learner.batch_size)


def _centred_memory(baseline: float) -> type[ReplayBuffer]:
    """A replay memory whose rewards are less their moving average over the batches drawn (section 3.2)."""
    from stable_baselines3.common.buffers import ReplayBuffer

    class Centred(ReplayBuffer):
        average: float | None = None

        def _normalize_reward(self, reward: Any, env: Any = None) -> Any:  # type: ignore[override]
            mean = float(reward.mean())
            self.average = mean if self.average is None else self.average + baseline * (mean - self.average)
            return reward - (self.average if baseline else 0.0)

    return Centred


def _indexed(groups: int) -> type[BaseFeaturesExtractor]:
    """What goes before the agent's networks: the observation, and a unit vector [G] of the group's number, as steps of
    a single number are hard to tell apart."""
    import torch
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Indexed(BaseFeaturesExtractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space, len(FEATURES) + groups)

        def forward(self, seen: torch.Tensor) -> torch.Tensor:
            number = (seen[:, 0] * (groups - 1)).round().long()
            return torch.cat([seen, torch.nn.functional.one_hot(number, groups).to(seen.dtype)], dim=1)

    return Indexed


def _key(seed: int, number: int) -> int:
    """A seed of the search's and a number."""
    return int(np.random.default_rng([seed, number, 1]).integers(2**31))
