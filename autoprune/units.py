"""Unit labels in a union-find: which labels mean the same unit, and which units must stay and why.

Label 0 means "no unit". Letters: U labels handed out so far.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


class Units:
    """Labels 1..U, united when they can only be cut together."""

    def __init__(self) -> None:
        self._parent: list[int] = [0]
        self._kept_whole: dict[int, str] = {}
        self._united_by: dict[int, str] = {}
        self._resolved: Labels | None = None  # the root of every label, until something is united

    def fresh(self, count: int) -> Labels:
        """`count` new labels."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        self._resolved = None
        return np.arange(first, first + count, dtype=np.int64)

    @property
    def count(self) -> int:
        """How many labels were handed out."""
        return len(self._parent) - 1

    def find(self, label: int) -> int:
        parent = self._parent
        root = label
        while parent[root] != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    def roots(self, labels: Labels) -> Labels:
        """The representative of each label, shape kept; 0 stays 0."""
        if self._resolved is None:
            parent = np.asarray(self._parent, dtype=np.int64)
            while not np.array_equal(parent, jumped := parent[parent]):
                parent = jumped
            self._resolved = parent
        return np.asarray(self._resolved[labels])

    def unite(self, left: Labels, right: Labels, by: str = "") -> None:
        """Unite left[i] with right[i]; where only one of the two is a unit, that unit is kept whole."""
        left, right = np.broadcast_arrays(left, right)
        total = len(self._parent)
        for key in np.unique(left.astype(np.int64).ravel() * total + right.ravel()).tolist():
            a, b = divmod(key, total)
            if a and b:
                self._unite(a, b, by)
            elif a or b:
                self.keep_whole(np.array([a or b]), f"{by or 'an operation'} with a tensor whose size cannot change")

    def unite_within(self, rows: Labels, by: str = "") -> Labels:
        """Unite all labels of each row of [R, n]; returns one label a row [R]. A row that mixes units with none is
        kept whole."""
        for_each, last = rows[:, :1], rows[:, 1:]
        if last.size and (last != for_each).any():
            self.unite(np.broadcast_to(for_each, last.shape), last, by)
        return np.asarray(rows.max(axis=1)) if rows.size else np.zeros(len(rows), dtype=np.int64)

    def merges(self, left: Labels, right: Labels) -> int:
        """How many unions `unite(left, right)` would make at most: distinct pairs that are not one unit yet."""
        left, right = np.broadcast_arrays(self.roots(left), self.roots(right))
        different = left != right
        if not different.any():
            return 0
        return len(np.unique(left[different] * len(self._parent) + right[different]))

    def keep_whole(self, labels: Labels, reason: str) -> None:
        """These units cannot be cut; the first reason given stays."""
        for label in np.unique(labels).tolist():
            if label:
                self._kept_whole.setdefault(self.find(label), reason)

    def why_whole(self, label: int) -> str | None:
        return self._kept_whole.get(self.find(label))

    def all_whole(self, labels: Labels) -> bool:
        """Whether every unit among these is kept whole already."""
        return all(self.why_whole(label) is not None for label in np.unique(labels).tolist() if label)

    def united_by(self, label: int) -> str | None:
        """The last operation that united distinguishable units into this one."""
        return self._united_by.get(self.find(label))

    def _unite(self, a: int, b: int, by: str) -> None:
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        low, high = min(a, b), max(a, b)
        self._parent[high] = low
        self._resolved = None
        for notes in (self._kept_whole, self._united_by):
            if high in notes:
                notes.setdefault(low, notes.pop(high))
        if by:
            self._united_by[low] = by
