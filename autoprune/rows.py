"""The rows of a ratio table, and their YAML."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from autoprune.core import InputError


@dataclass(frozen=True, kw_only=True)
class TableGroup:
    """One row of a ratio table: `units` are the numbers of those kept out of `size`."""

    name: str
    size: int
    units: tuple[int, ...]
    members: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return (self.size - len(self.units)) / self.size


def written(group: TableGroup, *, as_bits: bool) -> dict[str, Any]:
    """A row as plain values. as_bits: a bit for each unit, where there are very many, in place of the numbers kept."""
    return {
        "size": group.size,
        "kept": len(group.units),
        "ratio": round(group.ratio, 6),
        "members": list(group.members),
        **({"kind": "block"} if not group.units else {}),
        **({"bits": _packed(group)} if as_bits else {"units": list(group.units)}),
    }


def read(name: str, row: Mapping[str, Any], path: str | Path) -> TableGroup:
    """The row of these plain values; `path` is named where they are wrong.

    Raises:
        InputError: they break a rule. DAMAGED (untrusted.py): they are of something else.
    """
    size, place = row["size"], f"ratio table {path}: group '{name}'"
    if not isinstance(name, str) or not all(isinstance(member, str) for member in row["members"]):
        raise InputError(f"ratio table {path}: the names of group '{name}' and of its members must be text")
    units = tuple(row["units"]) if "units" in row else _unpacked(row["bits"], size, place)
    least = 0 if row.get("kind") == "block" else 1
    whole = type(size) is int and all(type(u) is int for u in units)
    if not whole or len(units) != row["kept"] or list(units) != sorted(set(units)) or not least <= len(units) <= size:
        raise InputError(f"ratio table {path}: group '{name}' must keep {least} to {size} distinct ascending units")
    if units and (units[0] < 0 or units[-1] >= size):
        raise InputError(f"ratio table {path}: units of group '{name}' must lie in 0..{size - 1}")
    return TableGroup(name=name, size=size, units=units, members=tuple(row["members"]))


def _packed(group: TableGroup) -> str:
    """Which of many units are kept, a bit each, in base64."""
    kept = np.zeros(group.size, dtype=bool)
    kept[list(group.units)] = True
    return base64.b64encode(np.packbits(kept).tobytes()).decode()


def _unpacked(bits: str, size: int, place: str) -> tuple[int, ...]:
    packed = base64.b64decode(bits, validate=True)
    if type(size) is not int or len(packed) != (size + 7) // 8:
        raise InputError(f"{place} must have a bit for each of its units, got {8 * len(packed)} for {size}")
    kept = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=size)
    return tuple(np.flatnonzero(kept).tolist())


class Dumper(yaml.SafeDumper):
    """Lists on one line, mappings in blocks: a table that people can read, and every value where it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
