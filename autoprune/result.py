"""What a search ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from autoprune.core import Measurement, Trial
from autoprune.outset import Outset
from autoprune.prune import RatioTable


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The task's metric, in its own sign. dense, pruned (after the search's recovery; before all training where the
    answer was chosen on a part of the images) and recovered (after the final fine-tune) on the search split's subset;
    test_* on the test split, read once, as are top1_* and top5_*, see final.Tested."""

    metric: str
    dense: float
    pruned: float
    recovered: float
    test_dense: float
    test_recovered: float
    top1_dense: float | None
    top1_recovered: float | None
    top5_dense: float | None
    top5_recovered: float | None


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of one layer in the dense and in the final network."""

    name: str
    dense_ms: float
    pruned_ms: float


@dataclass(frozen=True, kw_only=True)
class Result(Outset):
    """The ratio table, the smaller network, and the record of how they were found.

    predicted, measured: every cost as predicted for the answer, and of the final network.
    findings: what the strategy has to say of single groups. rounds, episodes: its trace, where it has one
    (strategies.netadapt's Round, strategies.amc's Episode). held_out: (predicted, measured) ms of the networks that
    tell the cost table's error. layers: what each takes before and after. seconds_searching: from the
    first trial to the last, earlier ones of a resumed search as they were. met: whether every budget is kept by
    measurement.
    """

    table: RatioTable
    model: nn.Module
    ratios: tuple[float, ...]
    trials: tuple[Trial, ...]
    scores: Scores
    predicted: Mapping[str, float]
    measured: Mapping[str, Measurement]
    evaluations: int
    cache_hits: int
    shared: float
    seconds: float
    seconds_searching: float
    findings: Mapping[str, str]
    rounds: tuple[Mapping[str, Any], ...]
    episodes: tuple[Mapping[str, Any], ...]
    held_out: tuple[tuple[float, float], ...]
    layers: tuple[LayerTime, ...]

    @property
    def met(self) -> bool:
        return all(b.met(self.measured[b.cost]) for b in self.budgets)

    @property
    def compression(self) -> float:
        """The compression ratio: the dense network's parameters by the final one's, masked weights not counted."""
        return self.dense["params"].value / self.measured["params"].value

    @property
    def theoretical_speed_up(self) -> float:
        """The dense network's multiply-adds by the final one's, masked weights not counted."""
        return self.dense["macs"].value / self.measured["macs"].value

    def _answers(self) -> list[dict[str, Any]]:
        """Predicted against measured, for the trials that were measured."""
        return [
            {"trial": t.number, "cost": name, "predicted": t.predicted[name], "measured": m.value}
            for t in self.trials
            for name, m in t.costs.items()
            if m.kind == "measured" and name in t.predicted
        ]

    def to_json(self) -> dict[str, Any]:
        """The content of result.json."""
        values = super().to_json()
        for name, row in values["costs"].items():
            row |= {"predicted": self.predicted[name], "measured": asdict(self.measured[name])}
        for row, b in zip(values["budgets"], self.budgets, strict=True):
            m = self.measured[b.cost]
            row |= {"value": m.value, "low": m.low, "high": m.high, "kind": m.kind, "met": b.met(m)}
        values["search"] |= {
            "trials": len(self.trials),
            "failed": sum(t.error is not None for t in self.trials),
            "evaluations": self.evaluations,
            "cache_hits": self.cache_hits,
            "shared": self.shared,
            "seconds": self.seconds,
            "seconds_searching": self.seconds_searching,
            "seconds_in_forward": sum(t.seconds_in_forward for t in self.trials),
        }
        return values | {
            "score": asdict(self.scores) | {"sign": self.sign},
            "groups": self.groups(self.ratios),
            "findings": dict(self.findings),
            "rounds": [dict(made) for made in self.rounds],
            "episodes": [dict(walked) for walked in self.episodes],
            "cost_table": {"held_out": [list(pair) for pair in self.held_out], "answers": self._answers()},
            "layers": [asdict(layer) for layer in self.layers],
        }
