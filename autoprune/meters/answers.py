"""What a measuring process may answer, which may run on somebody else's machine: numbers and words of the kinds that
were asked for. execnet reads no pickle, and runs nothing that comes from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autoprune.core import is_number


def check(message: Mapping[str, Any], answer: Any) -> None:
    """Raises ValueError where the answer is none to this message; one that is an error in words is."""
    if not isinstance(answer, dict):
        raise ValueError(f"{type(answer).__name__} instead of a mapping")
    if "error" in answer:
        return
    kinds = dict(KINDS[message["do"]])
    if "layers_of" in message:
        kinds["layers"] = _layers
    if "models" not in message or (message["do"] == "energy" and not answer.get("counter")):
        kinds = {key: is_right for key, is_right in kinds.items() if key not in ("rows", "precision")}
    for key, is_right in kinds.items():
        if key not in answer or not is_right(answer[key]):
            raise ValueError(f"'{key}' is missing or not of its kind")
    if "rows" not in kinds:
        return
    if len(answer["rows"]) != len(message["models"]):
        raise ValueError(f"{len(answer['rows'])} rows for {len(message['models'])} networks")
    block = message["plan"].get("block", 1)
    if any(len(row["wall_ms"]) % block for row in answer["rows"]):
        raise ValueError(f"rows that are not of whole blocks of {block} passes")


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _above_0(value: Any) -> bool:
    return is_number(value) and value > 0


def _list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and bool(value) and all(map(is_right, value))


def _layers(value: Any) -> bool:
    return type(value) is dict and all(type(k) is str and is_number(v) and v >= 0 for k, v in value.items())


def _timed(row: Any) -> bool:
    """Of one network: as many readings of both clocks, and whether they are good."""
    if type(row) is not dict or any(type(row.get(key)) is not bool for key in ("stable", "narrow")):
        return False
    return _clocked(row)


def _clocked(row: Mapping[str, Any]) -> bool:
    wall, cpu = row.get("wall_ms"), row.get("cpu_ms")
    return _list_of(_above_0)(wall) and _list_of(is_number)(cpu) and len(wall) == len(cpu)  # type: ignore[arg-type]


def _metered(row: Any) -> bool:
    return type(row) is dict and _clocked(row) and _list_of(is_number)(row.get("mj"))


KINDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "start": {"pid": _is(int), "machine": _is(str), "runtime": _is(str), "threads": _is(int), "processor": _is(str)},
    "counter": {"counter": _is(str), "why": _is(str)},
    "energy": {"counter": _is(str), "why": _is(str), "rows": _list_of(_metered)},
    "peak": {"peak_mb": _above_0, "reset": _is(bool)},
    "time": {"precision": _list_of(_is(str)), "rows": _list_of(_timed)},
}
