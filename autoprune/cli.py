"""The command line: a configuration in, Result out. No file below sees a configuration.

Exit status: 0 every budget met; 3 a budget could not be met (the closest result is written); 2 wrong input; 1 our own
failure; 130 interrupted (what was scored is kept, the line to go on is printed).
"""

from __future__ import annotations

import difflib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from autoprune import manual
from autoprune.commands import COMMANDS, WRONG_INPUT
from autoprune.core import DeviceLostError, InputError, MismatchError, StorageError
from autoprune.crew import WorkersLostError
from autoprune.telling import Telling, of_line, told, write_json
from autoprune.writing import is_full

FAILED, INTERRUPTED = 1, 130
LONGEST = 4000  # characters of an error

HELP = manual.overview(COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(manual.as_typed(HELP))
        return 0
    command, *words = arguments
    asked, rest = of_line(words)
    try:
        with told(asked):
            return _run(command, rest)
    except InputError as error:
        return _ended(asked, WRONG_INPUT, manual.as_typed(_one_line(error)))
    except MismatchError as error:
        return _ended(asked, FAILED, _one_line(error))
    except (DeviceLostError, StorageError, WorkersLostError) as error:
        return _cut_short(asked, error, arguments)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        logging.getLogger("autoprune").warning("interrupted")
        return _ended(asked, INTERRUPTED, f"interrupted; {_kept(command)}", _same_line(arguments))
    except Exception as error:  # noqa: BLE001, the last door
        if is_full(error):
            return _cut_short(asked, f"the disk is full: {error}", arguments)
        logging.getLogger("autoprune").error("%s", traceback.format_exc())
        if os.environ.get("AUTOPRUNE_DEBUG"):
            traceback.print_exc()
        what = f"failed, {type(error).__name__}: {_one_line(error) or 'no message'}"
        return _ended(asked, FAILED, f"{what} (the traceback is in the run's log; AUTOPRUNE_DEBUG=1 shows it here)")


def _run(command: str, words: Sequence[str]) -> int:
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"unknown command '{command}': it must be one of {', '.join(COMMANDS)}{hint}")
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(manual.as_typed(manual.page(command, words)))
        return 0
    return COMMANDS[command](words)


def _ended(asked: Telling, status: int, why: str, again: str = "") -> int:
    """Say in one line why a command ended early, and the line to go on with, if there is one."""
    sys.stderr.write(f"autoprune: {why}:\n  {again}\n" if again else f"autoprune: {why}\n")
    if asked.json:
        write_json({"error": why} | ({"again": again} if again else {}))
    return status


def _cut_short(asked: Telling, why: Exception | str, arguments: Sequence[str]) -> int:
    return _ended(asked, FAILED, f"{_one_line(why)}; {_kept(arguments[0])}", _same_line(arguments))


def _one_line(error: Exception | str) -> str:
    """What an error says: as it may repeat a file's own words, without the control characters that move a terminal's
    cursor, and of no more than LONGEST characters."""
    text = " ".join(str(error)[: 100 * LONGEST].split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"


def _kept(command: str) -> str:
    """What a command that was cut short leaves, and what the same line would do."""
    resumed = command in ("search", "compare")
    return "what was scored is kept. To go on" if resumed else "nothing is kept. To begin again"


def _same_line(arguments: Sequence[str]) -> str:
    typed = manual.program()
    return shlex.join(
        [sys.executable, "-m", "autoprune", *arguments] if typed == manual.MODULE else [typed, *arguments]
    )
