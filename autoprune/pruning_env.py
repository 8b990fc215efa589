"""Pruning as a Gymnasium environment: one step a group, one episode a candidate (AMC).

He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018, arXiv 1802.03494,
section 3. The action is how much of a group to keep; the action bound (bound.py) sees to it that every episode ends
inside the budgets; the reward is paid at the end. Any Gymnasium agent can learn on it.

Deviations from the paper:
- A step is a group of coupled layers. Its layer of most MACs stands for it in the observation; its cost is what the
  group alone can save.
- Cost features are of the budget that is tightest beside the dense network, whatever it limits.
- The accuracy-guaranteed reward takes the logarithm of any cost, in its smallest unit (bytes, ns, nJ), so that a
  network of less than a millisecond does not turn its sign.
- The last action is the one that the bound made of it.
- least: a bound from below as well; 0, the paper's, for none.

Letters: G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from autoprune.bound import Bound, Levels
from autoprune.core import COST_UNITS, Budget, CostModel, InputError, Layer, PruningSpace

FEATURES = ("index", "units_out", "units_in", "height", "width", "stride", "kernel", "cost", "reduced", "rest", "last")
SMALLEST_UNITS = {"ms": 1e6, "mJ": 1e6, "MB": 1e6}  # how many ns, nJ, bytes
LEAST_PENALTY = 0.001
REWARDS = ("accuracy", "accuracy_guaranteed")

Observation = NDArray[np.float32]  # [11], each in [0, 1]
Action = NDArray[np.float32]  # [1], in [0, 1]


class LayerPruningEnv(gymnasium.Env[Observation, Action]):
    """Walks the groups of a space and keeps of each what the action says, as far as the budgets allow.

    evaluate: ratios, one a group -> score, higher is better, or None if it failed; asked once an episode. reward:
    "accuracy", the score itself, or "accuracy_guaranteed", -(1 - score) x log(cost), the cost being the first budget's
    (paper, section 3.3). least: see Bound.

    Observation [11] in [0, 1], see FEATURES: the group's number, its units, its layer's units read, height and width of
    what it makes, stride, kernel; what the group alone can save, what is saved so far and what later groups can still
    save, as fractions of the dense network's cost; the last action. Action [1] in [0, 1]: 1 keeps every unit of the
    group, 0 as few as its deepest level does; the nearest level is taken, or the first deeper one that the bound leaves
    open. The last step's `info` holds "levels" and "ratios".

    Raises:
        InputError: there are no budgets, or the smallest network is predicted to exceed one; an unknown reward.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012, Gymnasium's own way

    def __init__(
        self,
        space: PruningSpace,
        budgets: Sequence[Budget],
        costs: Mapping[str, CostModel],
        *,
        evaluate: Callable[[tuple[float, ...]], float | None],
        reward: str = "accuracy",
        least: float = 0.0,
    ) -> None:
        self.bound, self.space = Bound(space, budgets, costs, least=least), space
        self.evaluate, self.reward = evaluate, reward
        self._check()
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (len(FEATURES),), np.float32)
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
        dense = (0,) * len(space.groups)
        tightest = min(budgets, key=lambda b: b.limit / costs[b.cost].predict(space.dense()))
        self._cost = costs[tightest.cost]
        self._dense_cost = self._cost.predict(space.dense())
        self._shapes = _shapes(space)
        self._savings = [self._saved((*dense[:g], self.bound.deepest[g], *dense[g + 1 :])) for g in range(len(dense))]
        self._rewards: list[float] = []
        self._chosen: Levels = ()
        self._last = 1.0

    def _check(self) -> None:
        if self.reward not in REWARDS:
            raise InputError(f"reward must be one of {', '.join(REWARDS)}, got '{self.reward}'")
        if not self.bound.budgets:
            raise InputError(
                "LayerPruningEnv: budgets is empty: give at least one, such as Budget.parse('flops_50pct')"
            )
        if not self.bound.reachable:
            raise InputError(
                f"LayerPruningEnv: the smallest network takes {self.bound.use(self.bound.deepest):.3g} times what a "
                "budget allows: give a larger limit, or deeper levels"
            )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Back to the first group. The environment itself draws nothing: the seed is Gymnasium's."""
        super().reset(seed=seed, options=options)
        self._chosen, self._last = (), 1.0
        return self._observed(), {}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Choose the next group's level; after the last group the reward, else 0."""
        wish = self._wished(float(np.clip(np.asarray(action).reshape(-1)[0], 0.0, 1.0)))
        level = self.bound.opened(self._chosen, wish)
        self._last = self.action_for(len(self._chosen), level)
        self._chosen = (*self._chosen, level)
        if len(self._chosen) < len(self.space.groups):
            return self._observed(), 0.0, False, False, {}
        ratios = self.bound.space.ratios(self._chosen)
        score = self.evaluate(ratios)
        value = penalty(self._rewards) if score is None else self.paid(score, ratios)
        if score is not None:
            self._rewards.append(value)
        return self._observed(), value, True, False, {"levels": self._chosen, "ratios": ratios}

    def paid(self, score: float, ratios: Sequence[float]) -> float:
        """The reward of a network with this score. A score below 0 is an error with its sign turned.

        Raises:
            InputError: the reward is of an error, and the score is above 1, so that 1 - score is none.
        """
        if self.reward == "accuracy":
            return score
        if score > 1:
            raise InputError(
                f"reward=accuracy_guaranteed takes 1 - score for the error, so it must be at most 1, got {score:.4g}: "
                "give the task a metric in [0, 1], or use reward=accuracy"
            )
        cost = self.bound.budgets[0].cost
        amount = self.bound.costs[cost].predict(ratios) * SMALLEST_UNITS.get(COST_UNITS[cost], 1.0)
        return -(1 - score if score >= 0 else -score) * math.log(amount)

    def action_for(self, group: int, level: int) -> float:
        """The action that wishes for a level of a group: the inverse of what `step` does."""
        deepest = self.space.groups[group].levels[-1]
        return 1 - self.space.groups[group].levels[level] / deepest if deepest else 1.0

    def _wished(self, keep: float) -> int:
        levels = self.space.groups[len(self._chosen)].levels
        return int(np.argmin(np.abs(np.asarray(levels) - (1 - keep) * levels[-1])))

    def _saved(self, levels: Levels) -> float:
        """What these levels save of the tightest budget's cost, as a fraction of the dense network's."""
        return 1 - self._cost.predict(self.bound.space.ratios(levels)) / self._dense_cost

    def _observed(self) -> Observation:
        count, done = len(self.space.groups), len(self._chosen)
        here = min(done, count - 1)  # after the last step the last group is seen once more
        reduced = self._saved((*self._chosen, *(0,) * (count - done)))
        rest = self._saved((*self._chosen, *self.bound.deepest[done:])) - reduced
        values = [here / max(1, count - 1), *self._shapes[here], self._savings[here], reduced, rest, self._last]
        seen: Observation = np.clip(np.asarray(values), 0.0, 1.0).astype(np.float32)
        return seen


def penalty(rewards: Collection[float]) -> float:
    """What a walk that failed is paid: as far below the worst as that is below the best, and below it in any case."""
    return 2 * min(rewards, default=0.0) - max(rewards, default=0.0) - LEAST_PENALTY


def _shapes(space: PruningSpace) -> NDArray[np.float64]:
    """[G, 6]: units, units read, height, width, stride and kernel of each group, as fractions of the largest."""
    rows = []
    for group in space.groups:
        largest: Layer | None = max(group.layers, key=lambda layer: layer.macs, default=None)
        read = (0, 0, 0, 0, 0) if largest is None else _read(largest)
        rows.append((group.size, *read))
    table = np.asarray(rows, dtype=np.float64)
    shares: NDArray[np.float64] = table / np.maximum(table.max(axis=0), 1)
    return shares


def _read(layer: Layer) -> tuple[int, int, int, int, int]:
    return layer.units_in, layer.height, layer.width, layer.stride, layer.kernel
