"""The scores that searches share: a file each, named by everything that it depends on, and so many of them at most.

Any number of searches write at once: a file is there whole or not at all, and two that write the same one write the
same. What is damaged, by a machine that went down say, is made again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from autoprune import untrusted
from autoprune.core import StorageError
from autoprune.scores import Scored
from autoprune.writing import whole

LOG = logging.getLogger("autoprune")
FILES = 50_000  # of one or two KB, in a folder
SCORE = re.compile(r"[0-9a-f]{32}\.json")  # what else lies there is not ours to delete


def trim(folder: Path, files: int = FILES) -> None:
    """Forget the scores whose use lies back furthest, so many being left: a tenth at a time of what is allowed, so that
    the next searches need not."""
    found: list[tuple[float, str]] = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # another search forgot it
                if SCORE.fullmatch(entry.name):
                    found.append((entry.stat().st_mtime, entry.path))
    if len(found) > files:
        for _, path in sorted(found)[: len(found) - files + files // 10]:
            with suppress(OSError):
                os.unlink(path)


def read_cached(path: Path | None, parts: int) -> Scored | None:
    """What was written there of so many parts; None where nothing was, or, with a line in the log, where it is
    damaged."""
    if path is None:
        return None
    try:
        values = untrusted.json_of(path)
        found = Scored(
            score=float(values["score"]),
            scores=tuple(map(float, values["scores"])),
            losses=tuple(map(float, values["losses"])),
            sizes=tuple(map(float, values["sizes"])),
        )
        if {len(found.scores), len(found.losses), len(found.sizes)} != {parts}:
            raise ValueError(f"it must be of {parts} parts")
        if not all(map(math.isfinite, (found.score, *found.losses, *found.sizes))) or min(found.sizes) <= 0:
            raise ValueError("its numbers must be finite, its sizes above 0")
    except FileNotFoundError:
        return None
    except untrusted.DAMAGED as error:
        LOG.warning("the cached score %s is damaged (%s: %s) and made again", path, type(error).__name__, error)
        return None
    with suppress(OSError):  # of another user
        os.utime(path)  # used now
    return found


def write_cached(path: Path | None, scored: Scored) -> None:
    """Keep scores; where that cannot be done the log says so."""
    if path is None:
        return
    try:
        with whole(path, lasting=False) as temporary:
            temporary.write_text(json.dumps(asdict(scored)))
    except (OSError, StorageError) as error:  # a score is worth more than its copy
        LOG.warning("the cache in %s cannot be written: %s", path.parent, error)
