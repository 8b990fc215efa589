"""The rows that experiments keep: one CSV a question, appended to as they are made."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def rows(path: Path) -> list[dict[str, str]]:
    """Those that are there, in order."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Add a row, and print it.

    Raises:
        ValueError: the rows that are there have other columns.
    """
    new = not path.exists()
    if not new and (earlier := next(csv.reader(path.open(newline="")), [])) != list(values):
        raise ValueError(f"{path} has columns {earlier}, the new row {list(values)}: move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(values))
        if new:
            writer.writeheader()
        writer.writerow(values)
    print(dict(values), flush=True)
