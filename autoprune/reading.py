"""A split of a task, read once and for so long: what is kept of it, and what its examples are, by hash.

Letters: N examples.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from autoprune.borrowing import arguments, fingerprint, seeded, to_device
from autoprune.core import InputError

MOST = 100_000  # examples of a split that are hashed


@dataclass(frozen=True, kw_only=True)
class Reading:
    """batches: the first, as many as were asked for, on the CPU. sizes: examples in each batch. examples: hashes of
    all their inputs. whole: the split was read to its end. repeats: the first two batches are the same under the same
    seed. steady: and under another one. drawn: not their order alone is drawn but what their examples are, or that is
    not known, as the split was not read to its end."""

    batches: tuple[Any, ...]
    sizes: tuple[int, ...]
    examples: frozenset[bytes]
    whole: bool
    repeats: bool
    steady: bool
    drawn: bool

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
    prints = [[fingerprint(batch) for batch in beginning] for beginning in (first, again, other)]
    return Reading(
        batches=tuple(batches),
        sizes=tuple(sizes),
        examples=frozenset(examples),
        whole=whole,
        repeats=prints[0] == prints[1],
        steady=prints[0] == prints[2],
        drawn=_drawn(other, examples) if whole else prints[0] != prints[2],
    )


def _hashes(inputs: tuple[Tensor, ...]) -> list[bytes]:
    """Of each example's inputs [N].

    Raises:
        InputError: the inputs are of different N.
    """
    columns = [x.detach().cpu().contiguous() for x in inputs]
    if len(lengths := sorted({len(x) for x in columns})) > 1:
        raise InputError(f"the inputs of a batch hold {' and '.join(map(str, lengths))} examples, not as many each")
    rows = [x.view(len(x), -1).view(torch.uint8).numpy() for x in columns]  # numpy has no bfloat16
    return [
        hashlib.blake2b(b"".join(row[i].tobytes() for row in rows), digest_size=12).digest() for i in range(lengths[0])
    ]


def _drawn(batches: list[Any], known: set[bytes]) -> bool:
    """Whether they hold examples that another reading of the whole split did not."""
    return any(example not in known for batch in batches for example in _hashes(arguments(batch[0])))


def _beginning(split: Any, seed: int) -> list[Any]:
    """Its first two batches."""
    with seeded(seed):
        return [tuple(batch) for batch in islice(iter(split), 2)]
