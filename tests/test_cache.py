"""The scores that searches share."""

from __future__ import annotations

import os
from pathlib import Path

from autoprune.cache import read_cached, trim, write_cached
from autoprune.scores import Scored

SCORED = Scored(score=0.5, scores=(0.4, 0.6), losses=(1.0, 2.0), sizes=(1.0, 1.0))


def _filled(folder: Path, count: int) -> list[Path]:
    """Files, the first of which were used longest ago."""
    paths = [folder / f"{i:032x}.json" for i in range(count)]
    for i, path in enumerate(paths):
        write_cached(path, SCORED)
        os.utime(path, (1000 + i, 1000 + i))
    return paths


def test_what_was_not_used_for_longest_is_forgotten(tmp_path: Path) -> None:
    paths = _filled(tmp_path, 30)
    assert read_cached(paths[0], 2) == SCORED  # used again
    trim(tmp_path, 20)
    left = {path for path in paths if path.exists()}
    assert left == {paths[0], *paths[-17:]}


def test_few_are_all_kept(tmp_path: Path) -> None:
    paths = _filled(tmp_path, 20)
    (tmp_path / "other.txt").write_text("not ours")
    trim(tmp_path, 20)
    assert all(path.exists() for path in paths)
    trim(tmp_path / "absent", 20)


def test_no_file_is_touched_that_is_no_score(tmp_path: Path) -> None:
    _filled(tmp_path, 5)
    others = [tmp_path / "annotations.json", tmp_path / f"{7:016x}.json"]
    for other in others:
        other.write_text("not ours")
        os.utime(other, (1, 1))
    trim(tmp_path, 2)
    assert all(other.exists() for other in others)
