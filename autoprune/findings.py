"""What a check-up finds: a fact, whether it stands in the way of a search, and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """area: "environment", "storage" or "task". status: "failed" where a search would be refused, or come to nothing;
    "warning" where it would run, and its result may not be what is hoped for. way_out: what to do; "" where nothing."""

    area: str
    what: str
    detail: str
    status: Status = "ok"
    way_out: str = ""


def guarded(area: str, what: str, look: Callable[[], Iterable[Finding]], *, way_out: str = "") -> list[Finding]:
    """What a look finds; that it failed, with the error, where it cannot be taken."""
    try:
        return list(look())
    except Exception as error:  # noqa: BLE001, what the user's code raises is what is found
        text = " ".join(str(error).split())[:300] or "no message"
        text = "".join(letter if letter.isprintable() else "?" for letter in text)  # none moves a terminal's cursor
        said = text if type(error).__name__ == "InputError" else f"{type(error).__name__}: {text}"
        return [Finding(area=area, what=what, detail=said, status="failed", way_out=way_out)]
