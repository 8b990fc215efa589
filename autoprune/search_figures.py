"""The figures of a search: how it went on, what it found at which cost, and the traces that strategies leave.

Letters: T trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoprune.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Figure, figure, legend, marks, svg
from autoprune.trialfile import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHED = 25  # episodes that a reward is averaged over
BASELINE = "one ratio widened"  # what the sensitivity strategy calls one ratio for all groups, among its finalists
MANY = 1000  # marks, which are small then
KINDS = ("failed", "measured", "fine-tuned", "before fine-tuning", "on a part of the images")
# what a cost is called; no other name becomes a part of a file's
WORDS = {
    "macs": "multiply-adds",
    "params": "parameters",
    "memory_mb": "memory",
    "rss_mb": "resident memory",
    "latency_ms": "latency",
    "energy_mj": "energy",
}
# kind of trial -> mark, colour
LOOKS = {
    "before fine-tuning": ("dot", BLUE),
    "fine-tuned": ("diamond", BLUE),
    "measured": ("square", GREEN),
    "on a part of the images": ("plus", GREY),
    "failed": ("cross", PURPLE),
}


@dataclass(frozen=True)
class Scale:
    """How scores are shown: a trial's times `sign` is the metric, that times `factor` what stands at the axis."""

    sign: float
    factor: float
    label: str

    def of_trial(self, score: float) -> float:
        return self.sign * self.factor * score

    @property
    def fraction(self) -> bool:
        return self.factor == 100.0


def scale_of(score: Mapping[str, Any], trials: Sequence[Row]) -> Scale:
    """A trial's score is higher the better; older runs do not say whether the metric is, but the signs of both do."""
    scores = [t.score for t in trials if math.isfinite(t.score)]
    dense = score.get("dense", max(scores, default=math.nan))
    turned = any(s * dense < 0 for s in scores) and not any(s * dense > 0 for s in scores)
    sign = score.get("sign", -1.0 if turned else 1.0)
    fraction = is_fraction(dense, sign)
    label = f"{score['metric']} on the search split" + (", %" if fraction else "")
    return Scale(sign=sign, factor=100.0 if fraction else 1.0, label=label)


def is_fraction(dense: float, sign: float) -> bool:
    """Whether a metric is shown in percent: the dense network's says that it is a fraction which is to be high."""
    return sign > 0 and 0 <= dense <= 1


def kind_of(trial: Row) -> str:
    """One of KINDS."""
    if trial.error:
        return "failed"
    if not trial.comparable:
        return "on a part of the images"
    if trial.measured:
        return "measured"
    return "fine-tuned" if trial.recovery == "short" else "before fine-tuning"


def best_so_far(trials: Sequence[Row], budgets: Sequence[Mapping[str, Any]]) -> list[Row | None]:
    """After each trial, that of the best score among those that keep the budgets, all images seen [T]."""
    found: list[Row | None] = []
    best: Row | None = None
    for trial in trials:
        if trial.comparable and trial.keeps(budgets) and (best is None or trial.score > best.score):
            best = trial
        found.append(best)
    return found


def progress(values: Mapping[str, Any], trials: Sequence[Row]) -> Figure:
    """Every trial's score by its number, and the best that keeps the budgets."""
    title, scale = "Search progress", scale_of(values["score"], trials)
    best = best_so_far(trials, values["budgets"])
    rows = tuple(
        (t.number, kind_of(t), t.fidelity, scale.of_trial(t.score), scale.of_trial(b.score) if b else math.nan)
        for t, b in zip(trials, best, strict=True)
    )
    drawn, axes = figure(8.2, 3.8, 1, 1)
    axis = axes[0]
    _by_kind(axis, [(row[1], row[0], row[3]) for row in rows])
    steps = [(row[0], row[4]) for row in rows if not math.isnan(row[4])]
    if steps:
        x, y = zip(*_corners(steps), strict=True)
        axis.step(x, y, where="post", color=ORANGE, linewidth=1.8, label="best within the budgets")
    if "dense" in values["score"]:
        axis.axhline(scale.factor * values["score"]["dense"], color=GREY, linestyle="--", linewidth=1.2, label="dense")
    failed = [row[0] for row in rows if row[1] == "failed"]
    low, high = axis.get_ylim()
    marks(axis, [(number, low) for number in failed], "cross", colour=PURPLE, label="failed", clipped=False)
    axis.set_ylim(low, high)
    axis.set_xlim(-0.02 * len(rows) - 0.5, 1.02 * len(rows))
    axis.set_xlabel("trial number")
    axis.locator_params("x", integer=True)
    axis.set_ylabel(scale.label)
    legend(axis, columns=4)
    says = "One mark a trial; those that failed lie on the axis."
    if any(row[1] == KINDS[-1] for row in rows):
        says += " Scores on a part of the images say less, and compare with each other only."
    heads = ("trial number", "kind", "share of the images", scale.label, f"best within the budgets: {scale.label}")
    return Figure("progress", title, says, heads, rows, svg(drawn, "progress", title))


def _corners(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points where a line of steps changes, and its end."""
    changed = [step for step, last in zip(steps[1:], steps, strict=False) if step[1] != last[1]]
    return [steps[0], *changed, steps[-1]]


def _by_kind(axis: Axes, rows: Sequence[tuple[str, float, float]], what: str = "") -> None:
    """A mark for each (kind, x, y), those that say most on top."""
    few = len(rows) <= MANY
    for kind in reversed(KINDS[1:]):
        shape, colour = LOOKS[kind]
        points = [(x, y) for known, x, y in rows if known == kind]
        alpha = 1.0 if kind in ("measured", "fine-tuned") else 0.75 if few else 0.5
        size = None if few or shape != "dot" else 2.2
        marks(axis, points, shape, colour=colour, label=f"{what}{kind}", alpha=alpha, size=size)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, score) no other undercuts and outscores, by cost; scores are better the higher."""
    found, best = [], -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def tradeoff(values: Mapping[str, Any], trials: Sequence[Row], budget: Mapping[str, Any]) -> Figure:
    """Score against one budget's cost: all trials, their Pareto front, dense, baseline and answer."""
    cost, unit = budget["cost"], budget["unit"]
    title, scale = f"Score against {WORDS[cost]}", scale_of(values["score"], trials)
    dense = values["costs"][cost]["dense"]
    known = [t for t in trials if t.comparable and math.isfinite(t.costs[cost])]
    on_front = {known[i].number for i in front([(t.costs[cost], t.score) for t in known])}
    rows: tuple[tuple[Any, ...], ...] = tuple(
        (t.number, kind_of(t), t.costs[cost], scale.of_trial(t.score), int(t.number in on_front), int(_baseline(t)))
        for t in known
    )
    heads = ("trial number", "kind", f"{cost} ({unit})", scale.label, "on the Pareto front", "one ratio for all groups")
    drawn, axes = figure(8.2, 4.4, 1, 1)
    axis = axes[0]
    _by_kind(axis, [row[1:4] for row in rows])
    line = sorted(row[2:4] for row in rows if row[4])
    if line:
        x, y = zip(*line, strict=True)
        axis.step(x, y, where="post", color=INK, linewidth=1.0, label="Pareto front")
    baseline = [row[2:4] for row in rows if row[5]]
    marks(axis, baseline, "triangle", colour=ORANGE, label="one ratio for all groups")
    if "dense" in values["score"]:
        here = [(dense, scale.factor * values["score"]["dense"])]
        marks(axis, here, "ring", colour=GREY, label="dense", size=2.2)
    answer = _answer(values, known)
    if answer is not None:
        what, here = (
            "the answer" if values["finished"] else "best so far",
            [(answer.costs[cost], scale.of_trial(answer.score))],
        )
        marks(axis, here, "ring", colour=ORANGE, label=what, size=2.2)
    final = _final(values, cost, scale)
    marks(axis, final, "star", colour=ORANGE, label="its network after training")
    axis.axvline(budget["limit"], color=ORANGE, linestyle="--", linewidth=1.2, label="limit")
    axis.set_xlabel(_named(cost, unit))
    axis.xaxis.set_major_formatter(_scaled(max(dense, budget["limit"])))
    axis.set_ylabel(scale.label)
    legend(axis, columns=4)
    says = (
        "Trials that saw all images, at their measured or else predicted cost; left of the limit the budget is kept. "
        "Marks tell what was fine-tuned from what was not yet."
    )
    if final:
        says += (
            " The answer is the trial that the strategy chose, most by the least loss; the star is its network after "
            "the final training, as it was counted or measured at the end."
        )
        rows += (("", "after the final training", *final[0], 0, 0),)
    return Figure(f"tradeoff_{cost}", title, says, heads, rows, svg(drawn, f"tradeoff_{cost}", title))


def _baseline(trial: Row) -> bool:
    return BASELINE in str(trial.about.get("finalist", ""))


def _answer(values: Mapping[str, Any], trials: Sequence[Row]) -> Row | None:
    """The trial whose network the search ended with; of an unfinished one, the best so far."""
    if not values["finished"]:
        return (best_so_far(trials, values["budgets"]) or [None])[-1]
    chosen = tuple(group["ratio"] for group in values["groups"].values())
    return next((t for t in reversed(trials) if t.measured and t.ratios == chosen), None)


def _final(values: Mapping[str, Any], cost: str, scale: Scale) -> list[tuple[float, float]]:
    """Where the final network of a finished search lies."""
    score = values["score"].get("recovered")
    if score is None or not values["finished"]:
        return []
    return [(values["costs"][cost]["measured"]["value"], scale.factor * score)]


def _named(cost: str, unit: str) -> str:
    """A cost with its unit, once where they are the same word."""
    return WORDS[cost] if WORDS[cost] == unit else f"{WORDS[cost]} in {unit}"


def _scaled(largest: float) -> Any:
    """How ticks of this size are written."""
    power = next((p for p in (1e9, 1e6, 1e3) if largest >= 10 * p), 1.0)
    letter = {1e9: "G", 1e6: "M", 1e3: "k", 1.0: ""}[power]
    return lambda value, _: f"{value / power:g}{letter}"


def rounds(values: Mapping[str, Any], trials: Sequence[Row]) -> Figure:
    """Score against the first budget's cost: the proposals of all rounds, and the way of the winners."""
    title, scale = "The winners' way", scale_of(values["score"], trials)
    budget, made = values["budgets"][0], values["rounds"]
    cost = budget["cost"]
    rows: list[tuple[Any, ...]] = []
    for each in made:
        proposed = [trials[n] for n in each["proposals"]]
        rows += [
            (each["number"], kind_of(t), t.number, t.costs[cost], scale.of_trial(t.score))
            for t in proposed
            if not t.error
        ]
    start = next((t for t in trials if not t.error and not any(t.ratios)), None)
    way = (
        []
        if start is None
        else [(0, "dense", start.number, values["costs"][cost]["dense"], scale.of_trial(start.score))]
    )
    way += [
        (each["number"], "winner", each["winner"], each["measured"][0], scale.of_trial(each["score_after"]))
        for each in made
    ]
    drawn, axes = figure(8.2, 4.2, 1, 1)
    _by_kind(axes[0], [(row[1], *row[3:]) for row in rows], "proposals, ")
    x, y = zip(*(row[3:] for row in way), strict=True)
    axes[0].plot(x, y, color=ORANGE, marker="o", markersize=5, linewidth=1.4, label="winners")
    axes[0].axvline(budget["limit"], color=ORANGE, linestyle="--", linewidth=1.2, label="limit")
    axes[0].set_xlabel(f"{_named(cost, budget['unit'])}: winners measured, proposals predicted")
    axes[0].xaxis.set_major_formatter(_scaled(max(x)))
    axes[0].set_ylabel(scale.label)
    legend(axes[0], columns=4)
    says = (
        "Each round cuts one group until a target is met: one proposal a group, the best becomes the winner, and the "
        "next round starts from it. Scores on the search split, before and after the short fine-tune."
    )
    heads = ("round", "what", "trial number", f"{cost} ({budget['unit']})", scale.label)
    return Figure("rounds", title, says, heads, (*rows, *way), svg(drawn, "rounds", title))


def rewards(episodes: Sequence[Mapping[str, Any]]) -> Figure:
    """The reward of each episode, its mean over the last SMOOTHED, and the mean of the random walks at first."""
    title = "Reward of each episode"
    paid = [walked["reward"] for walked in episodes]
    recent = [paid[max(0, i + 1 - SMOOTHED) : i + 1] for i in range(len(paid))]
    rows = tuple(
        (i, "random" if walked["sigma"] is None else "agent", walked["reward"], sum(last) / len(last))
        for i, (walked, last) in enumerate(zip(episodes, recent, strict=True))
    )
    drawn, axes = figure(8.2, 3.6, 1, 1)
    for who, shape, colour in (("random", "plus", GREY), ("agent", "dot", BLUE)):
        shown = [(row[0], row[2]) for row in rows if row[1] == who]
        marks(axes[0], shown, shape, colour=colour, label=f"{who} walks", alpha=0.6)
    x, y = [row[0] for row in rows], [row[3] for row in rows]
    axes[0].plot(x, y, color=ORANGE, linewidth=1.6, label=f"mean of the last {SMOOTHED}")
    mean = warm_up_mean(episodes)
    axes[0].axhline(mean, color=GREY, linestyle="--", linewidth=1.2, label="mean of the warm-up")
    axes[0].set_xlabel("episode")
    axes[0].set_ylabel("reward (no unit: the strategy's own)")
    legend(axes[0], columns=4)
    says = (
        "Each episode walks the groups and keeps of each what the agent says, as far as the budgets allow; the reward "
        "is paid at its end. The first walks are random, and the agent learns from all that came before."
    )
    heads = ("episode", "who walked", "reward", f"mean reward of the last {SMOOTHED} episodes")
    return Figure("rewards", title, says, heads, rows, svg(drawn, "rewards", title))


def warm_up_mean(episodes: Sequence[Mapping[str, Any]]) -> float:
    """The mean reward of an agent's random walks."""
    paid: list[float] = [walked["reward"] for walked in episodes if walked["sigma"] is None]
    return sum(paid) / len(paid)
