"""A split of a task, read once and for so long: what is kept of it, and what its examples are, by hash.

Letters: N examples.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from autoprune.borrowing import arguments, fingerprint, seeded, to_device

MOST = 100_000  # examples of a split that are hashed


@dataclass(frozen=True, kw_only=True)
class Reading:
    """batches: the first, as many as were asked for, on the CPU. sizes: examples in each batch. examples: hashes of
    all their inputs. whole: the split was read to its end. repeats: the first two batches are the same under the same
    seed. steady: and under another one."""

    batches: tuple[Any, ...]
    sizes: tuple[int, ...]
    examples: frozenset[bytes]
    whole: bool
    repeats: bool
    steady: bool

    @property
    def count(self) -> int:
        """Examples that were read."""
        return sum(self.sizes)


def read(split: Any, *, keep: int, seconds: float, seed: int) -> Reading:
    """Read a split, keeping the batches of its first `keep` examples. The draws of its order and augmentation come from
    this seed, and the global generators are left as they were."""
    end = time.monotonic() + seconds
    batches: list[Any] = []
    sizes: list[int] = []
    examples: set[bytes] = set()
    whole = True
    with seeded(seed):
        for batch in split:
            inputs = arguments(batch[0])
            if sum(sizes) < keep:
                batches.append(to_device(tuple(batch), "cpu"))
            sizes.append(len(inputs[0]))
            examples.update(_hashes(inputs))
            if time.monotonic() > end or len(examples) > MOST:
                whole = False
                break
    first, again, other = (_beginning(split, own) for own in (seed, seed, seed + 1))
    return Reading(
        batches=tuple(batches),
        sizes=tuple(sizes),
        examples=frozenset(examples),
        whole=whole,
        repeats=first == again,
        steady=first == other,
    )


def _hashes(inputs: tuple[Any, ...]) -> list[bytes]:
    """Of each example's inputs [N]."""
    columns = [x.detach().cpu().contiguous().numpy() for x in inputs if isinstance(x, Tensor)]
    return [
        hashlib.blake2b(b"".join(column[i].tobytes() for column in columns), digest_size=12).digest()
        for i in range(len(columns[0]))
    ]


def _beginning(split: Any, seed: int) -> list[str]:
    with seeded(seed):
        return [fingerprint(tuple(batch)) for batch in islice(iter(split), 2)]
