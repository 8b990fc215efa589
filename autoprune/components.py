"""Find what a name or a `_target_` stands for: Hydra's `_target_` in a YAML is the only registry."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from autoprune.core import InputError, Task

_HERE = Path(__file__).parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"  # in the wheel; in the repository
Kind = TypeVar("Kind")


def names(group: str) -> list[str]:
    """The components of a configuration group that ship, such as names("strategy")."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def spec(group: str, name: str) -> dict[str, Any]:
    """The content of conf/<group>/<name>.yaml: `_target_` and its keyword arguments."""
    if name not in names(group):
        raise InputError(f"unknown {group} '{name}': it must be one of {', '.join(names(group))}")
    return dict(yaml.safe_load((CONF / group / f"{name}.yaml").read_text()))


def locate(target: str, place: str) -> Callable[..., Any]:
    """The object at a dotted path; modules in the current directory are found too.

    Raises:
        InputError: there is no such module or name, or importing it failed; place says where it was asked for.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, name = str(target).rpartition(".")
    if not module or not name:
        raise InputError(f"{place}._target_={target} must be a dotted path such as my_module.make_task")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{place}._target_={target}: there is no module '{error.name}' in the current directory or installed"
        ) from error
    except Exception as error:
        raise InputError(f"{place}._target_={target}: importing {module} raised {described(error)}") from error
    if not callable(getattr(found, name, None)):
        raise InputError(f"{place}._target_={target}: module {module} has no function or class '{name}'")
    return getattr(found, name)  # type: ignore[no-any-return]


def bind(values: Mapping[str, Any], place: str, *given: object, **named: object) -> Callable[..., Any]:
    """A call of values["_target_"] with the other values as keyword arguments, checked against its signature.

    given and named are what the caller will pass besides. Raises InputError for a key that it does not take.
    """
    keywords = {k: v for k, v in values.items() if k != "_target_"}
    if "_target_" not in values:
        raise InputError(f"{place} has no _target_: choose {place}=<name> or {place}._target_=module.function")
    function = locate(values["_target_"], place)
    try:
        inspect.signature(function).bind(*given, **named, **keywords)
    except TypeError as error:
        accepted = [p for p in inspect.signature(function).parameters if p not in named][len(given) :]
        raise InputError(
            f"{place}: {values['_target_']} does not take these arguments ({error}); "
            f"it takes {', '.join(accepted) or 'none'}"
        ) from error
    return lambda *args, **rest: function(*args, **rest, **keywords)


def chosen(group: str, value: str | Mapping[str, Any]) -> dict[str, Any]:
    """A component given by its name in conf/, or by its `_target_` and keyword arguments."""
    return spec(group, value) if isinstance(value, str) else dict(value)


def built(kind: type[Kind], group: str, value: str | Mapping[str, Any] | Kind) -> Kind:
    """The value of a name in a folder of conf/, or of a mapping with `_target_`.

    Raises:
        InputError: there is no such name, or what it makes is of another kind.
    """
    if isinstance(value, kind):
        return value
    made = bind(chosen(group, value), group)()  # type: ignore[arg-type]
    if not isinstance(made, kind):
        raise InputError(f"{group}: {value} gives a {type(made).__name__}, it must be an autoprune {kind.__name__}")
    return made


def named(group: str, values: Mapping[str, Any]) -> str:
    """The name in conf/ of the component with these values, else of the first with this target, else the target."""
    target, shipped = str(values["_target_"]), {name: spec(group, name) for name in names(group)}
    alike = (name for name, own in shipped.items() if own["_target_"] == target)
    return next((name for name, own in shipped.items() if own == dict(values)), next(alike, target))


def make_task(values: Mapping[str, Any]) -> Task:
    """Call a task function.

    Raises:
        InputError: it raised, or returned something else than an autoprune.Task.
    """
    make = bind(values, "task")
    try:
        task = make()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"task: {values['_target_']} raised {described(error)}") from error
    if not isinstance(task, Task):
        raise InputError(f"task: {values['_target_']} returned {type(task).__name__}, it must return an autoprune.Task")
    return task


def described(error: BaseException) -> str:
    """An exception of foreign code in one line: its type, its first line, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}{place}"
