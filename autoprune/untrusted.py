"""Files that anyone may have made: nothing in them is run, and how much they may take is known before they are read.

Each function raises OSError where there is no such file and ValueError, with the rule, where it breaks one. Contents
that have the right form may still be of something else: DAMAGED is what taking them apart raises.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import math
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import yaml
from numpy.typing import NDArray

MB = 2**20
TEXT = 64 * MB  # of JSON, CSV or YAML
VALUES = 2_000_000  # in a JSON file, a few hundred bytes of memory each
NODES = 500_000  # in a YAML file, which takes more of each
ROWS, CELLS = 200_000, 10_000_000  # in a CSV file
DEPTH = 32  # of lists and mappings in YAML; what Python's own recursion allows in JSON
HEADER = 16 * MB  # of safetensors: the names and shapes
WIDEST = 16  # bytes of a number in a tensor
NUMBER = 1000  # characters
DAMAGED = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    csv.Error,
    safetensors.SafetensorError,
)
COMPRESSED = (EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)  # broken, encrypted, unknown


class MisfitError(ValueError):
    """Tensors that are not those of the network that they are for."""


def content(path: str | Path, most: int = TEXT) -> bytes:
    """The bytes of a file that holds no more than `most`."""
    with _regular(path).open("rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it must hold at most {most:,} bytes")
    return found


def json_of(path: str | Path) -> Any:
    """What a JSON file holds, of at most TEXT bytes and VALUES values."""
    found = content(path)
    _check_count(found, b",[{", VALUES)
    try:
        return json.loads(found)
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deeply") from None


def rows_of(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its first, of at most TEXT bytes, ROWS rows and CELLS cells."""
    found = content(path)
    _check_count(found, b"\n\r", 2 * ROWS)
    _check_count(found, b",\n\r", CELLS)
    rows = csv.reader(io.StringIO(found.decode(), newline=""))
    head, named = next(rows, []), []
    for row in rows:
        if len(row) != len(head):  # a short row would be as large in memory as the first is long
            raise ValueError(f"line {rows.line_num} must have {len(head)} cells as the first, it has {len(row)}")
        named.append(dict(zip(head, row, strict=True)))
    return named


def yaml_of(path: str | Path, most: int = NODES) -> Any:
    """What a YAML file holds, of at most TEXT bytes and `most` nodes: plain values, each written out where it is."""
    text = content(path).decode()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=loader), most)
        return loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _check_events(events: Any, most: int) -> None:
    nodes = depth = 0
    for event in events:
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):  # one may stand for many that stand for many
            raise ValueError(f"it must hold no alias, got *{event.anchor}")
        if depth > DEPTH:
            raise ValueError(f"its lists and mappings must be nested at most {DEPTH} deep")
        if nodes > most:
            raise ValueError(f"it must hold at most {most:,} values")
        digits = event.value if isinstance(event, yaml.ScalarEvent) and len(event.value) > NUMBER else ""
        if re.fullmatch(r"[-+\d_:.]+", digits):  # one of base 60, 1:1:1, takes the square of its length
            raise ValueError(f"a number must have at most {NUMBER} digits, one has {len(digits):,}")


def shapes_of(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, whose header has at most HEADER bytes; no tensor is read."""
    with _regular(path).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > HEADER:
        raise ValueError(f"it is no safetensors file: its header must have at most {HEADER:,} bytes, got {header:,}")
    try:
        with safetensors.safe_open(str(path), "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is no safetensors file: {error}") from error


def check_tensors(path: str | Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises MisfitError unless all tensors of a safetensors file are among these, by name and shape."""
    size, most = _regular(path).stat().st_size, HEADER + WIDEST * sum(map(math.prod, shapes.values()))
    if size > most:
        raise MisfitError(f"it has {size:,} bytes, the network at most {most:,}")
    for name, shape in shapes_of(path).items():
        if name not in shapes:
            raise MisfitError(f"it has a tensor '{name}', the network has none")
        if shape != tuple(shapes[name]):
            raise MisfitError(f"its '{name}' is {list(shape)}, the network's {list(shapes[name])}")


def arrays_of(path: str | Path, most: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """The arrays of these names in an npz, each of at most so many bytes."""
    try:
        with zipfile.ZipFile(_regular(path)) as archive:
            return {name: _array(archive, name, limit) for name, limit in most.items()}
    except COMPRESSED as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _array(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any]:
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > most + MB:  # no more than this is ever unpacked
        raise ValueError(f"{name} must have at most {most:,} bytes, it has {member.file_size:,}")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[version](file)
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > most:
        raise ValueError(f"{name} must have at most {most:,} bytes, its shape {list(shape)} of {dtype} is not so")
    with archive.open(member) as file:
        found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return found


def unzipped(path: str | Path, most: int) -> bytes:
    """What a gzip file unpacks to, of at most so many bytes."""
    try:
        with gzip.open(_regular(path)) as file:
            found = file.read(most + 1)
    except COMPRESSED as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if len(found) > most:
        raise ValueError(f"it must unpack to at most {most:,} bytes")
    return found


def _regular(path: str | Path) -> Path:
    """The path of a file that ends, which a device or a pipe may not."""
    found = Path(path)
    if not stat.S_ISREG(mode := found.stat().st_mode) and not stat.S_ISDIR(mode):  # opening a folder says so
        raise ValueError("it must be a regular file")
    return found


def _check_count(found: bytes, marks: bytes, most: int) -> None:
    count = sum(found.count(bytes([mark])) for mark in marks)
    if count > most:
        raise ValueError(f"it must hold at most {most:,} values")
