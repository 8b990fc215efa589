"""Cost models: a cost predicted from ratios alone, and as tables for the exact allocation.

Letters: G groups, L levels of one group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from autoprune.core import CostForm, PruningSpace, Term, Trial, amount_of

if TYPE_CHECKING:
    from autoprune.core import Floats


@dataclass(frozen=True)
class CountedCost:
    """A cost that is a sum of products of widths: scale x the largest of `alternatives` + offset.

    MACs and parameters have one alternative; memory has one for each instant that can be the peak. The offset makes
    the dense prediction equal the dense count (operations that do not depend on any group).
    """

    name: str
    unit: str
    space: PruningSpace
    alternatives: tuple[tuple[Term, ...], ...]
    offset: float = 0.0
    scale: float = 1.0

    def predict(self, ratios: Sequence[float]) -> float:
        kept = self.space.kept(ratios)
        largest = max(amount_of(terms, kept) for terms in self.alternatives)
        return self.scale * (largest + self.offset)

    def anchored(self, dense: float) -> CountedCost:
        """The same model shifted so that the dense prediction is `dense`."""
        return replace(self, offset=self.offset + dense / self.scale - self.predict(self.space.dense()) / self.scale)

    def scaled(self, dense: float) -> CountedCost:
        """The same model multiplied so that the dense prediction is `dense`."""
        return replace(self, scale=self.scale * dense / self.predict(self.space.dense()))

    def calibrated(self, trials: Sequence[Trial]) -> CountedCost:
        """Scaled so that the upper end of the last decided cost among these trials, not predicted, is predicted."""
        for trial in reversed(trials):
            known = trial.costs.get(self.name)
            if known is not None and known.kind != "predicted" and known.decided:
                plain = replace(self, scale=1.0).predict(trial.candidate.ratios)
                return replace(self, scale=known.high / plain)
        return self

    def tables(self) -> tuple[CostForm, ...]:
        return tuple(self._form(terms) for terms in self.alternatives)

    def _form(self, terms: Sequence[Term]) -> CostForm:
        """Expand the products into a constant, single groups and pairs of groups, over level indices; those of each
        block apart."""
        by_gate: dict[int | None, list[Term]] = defaultdict(list)
        for term in terms:
            by_gate[term.gate].append(term)
        plain = self._expanded(by_gate.pop(None, []), self.offset)
        return replace(plain, gated={b: self._expanded(own, 0.0) for b, own in by_gate.items() if b is not None})

    def _expanded(self, terms: Sequence[Term], constant: float) -> CostForm:
        widths = [np.array([g.kept(r) for r in g.levels], dtype=np.float64) for g in self.space.groups]
        unary = [np.zeros(len(w)) for w in widths]
        pairs: dict[tuple[int, int], Floats] = defaultdict(lambda: np.zeros(()))
        for term in terms:
            (left, lefts), (right, rights) = term.left, term.right
            constant += term.scale * left * right
            for a, of in lefts.items():
                unary[a] = unary[a] + term.scale * of * right * widths[a]
            for b, of in rights.items():
                unary[b] = unary[b] + term.scale * of * left * widths[b]
            for a, of_a in lefts.items():
                for b, of_b in rights.items():
                    product = term.scale * of_a * of_b * np.outer(widths[a], widths[b])
                    if a == b:
                        unary[a] = unary[a] + np.diag(product)
                    elif a < b:
                        pairs[a, b] = pairs[a, b] + product
                    else:
                        pairs[b, a] = pairs[b, a] + product.T
        scaled = {key: table * self.scale for key, table in pairs.items()}
        return CostForm(constant * self.scale, tuple(u * self.scale for u in unary), scaled)


class AddedCost(CountedCost):
    """A counted cost beside something of unknown size, as memory beside a runtime's own: what is measured moves the
    offset and leaves the slope."""

    def calibrated(self, trials: Sequence[Trial]) -> AddedCost:
        """Shifted so that the upper end of the last measurement among these trials is predicted."""
        for trial in reversed(trials):
            known = trial.costs.get(self.name)
            if known is not None and known.kind != "predicted" and known.decided:
                return replace(self, offset=self.offset + known.high - self.predict(trial.candidate.ratios))
        return self
