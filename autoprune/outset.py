"""What is known of a search before its first candidate: what is asked of which network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoprune.core import Budget, Measurement, PruningSpace, Term, amount_of
from autoprune.traced import TracedModel

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a group lies in the network: its layers, their kinds (names of classes), and for "macs" and "params" the
    terms of what it cuts. A layer between two groups counts for both."""

    members: tuple[str, ...]
    kinds: tuple[str, ...]
    terms: Mapping[str, tuple[Term, ...]]


@dataclass(frozen=True, kw_only=True)
class Outset:
    """What a search begins with.

    device: what costs are measured on, or, where all are counted, what candidates are scored on. dense: every cost of
    the dense network; dense_score: its score on the search split, in the metric's own sign. sign: 1, or -1 where
    the metric is better the lower: a trial's score times this is in the metric's own. asked: the budgets as they
    were given. parts: of every group, by its name. study: "" where the dense network keeps every budget and nothing
    was searched. storage: of the study, without its password.
    """

    task: str
    strategy: str
    seed: int
    device: str
    metric: str
    dense_score: float
    sign: float
    dense: Mapping[str, Measurement]
    budgets: tuple[Budget, ...]
    asked: tuple[str, ...]
    space: PruningSpace
    parts: Mapping[str, Part]
    study: str
    storage: str | None
    versions: Mapping[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of outset.json, a part of that of result.json."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "strategy": self.strategy,
            "seed": self.seed,
            "device": self.device,
            "versions": dict(self.versions),
            "score": {"metric": self.metric, "dense": self.dense_score, "sign": self.sign},
            "costs": {name: {"dense": dense.value, "unit": dense.unit} for name, dense in self.dense.items()},
            "budgets": [
                {"asked": asked, "cost": b.cost, "limit": b.limit, "unit": b.unit}
                for asked, b in zip(self.asked, self.budgets, strict=True)
            ],
            "search": {"study": self.study, "storage": self.storage},
            "groups": self.groups(self.space.dense()),
            "refused": {r.name: r.reason for r in self.space.refused},
            "notes": list(self.notes),
        }

    def groups(self, ratios: Sequence[float]) -> dict[str, dict[str, Any]]:
        """What result.json says of each group at these ratios. "macs" and "params": of the layers that it cuts, as
        fractions of the dense network's, before and after."""
        whole, kept = self.space.kept(self.space.dense()), self.space.kept(ratios)
        found = {}
        for group, width, ratio in zip(self.space.groups, kept, ratios, strict=True):
            part = self.parts[group.name]
            row = {"size": group.size, "kept": width, "ratio": ratio}
            shares = {
                cost: [amount_of(terms, widths) / self.dense[cost].value for widths in (whole, kept)]
                for cost, terms in part.terms.items()
            }
            found[group.name] = row | {"kinds": list(part.kinds), "members": list(part.members)} | shares
        return found


def parts_of(traced: TracedModel, model: nn.Module) -> dict[str, Part]:
    """Where each group of a traced model lies in the network."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    found = {}
    for i, group in enumerate(traced.space.groups):
        terms = {
            cost: tuple(t for t in all_terms if i in t.left[1] or i in t.right[1] or i == t.gate)
            for cost, all_terms in (("macs", traced.macs), ("params", traced.params))
        }
        named = dict.fromkeys(kinds[member] for member in group.members if member in kinds)
        found[group.name] = Part(members=group.members, kinds=tuple(named), terms=terms)
    return found
