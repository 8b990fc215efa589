"""What a command was configured with: YAML and the words of the line through Hydra, checked, as plain values."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoprune import untrusted
from autoprune.components import CONF, bind, names
from autoprune.core import InputError
from autoprune.writing import whole

GROUPS = (
    "task",
    "space",
    "strategy",
    "criterion",
    "regularizer",
    "device",
    "energy",
    "evaluator",
    "workers",
    "finetune",
)
OWN = ("task", "strategy", "criterion", "regularizer")  # where a function of the user's has arguments of its own
FOLDERS = ("output", "folder")  # texts that null takes the place of nowhere
FREE = ("settings=", "settings.")  # of a comparison: what may have keys that no YAML names
CONFIGURED = 10_000  # values in a configuration, many times what there are
KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str, type(None)), "text"),
    list: ((list,), "a list"),
}


def configured(command: str, words: Sequence[str]) -> dict[str, Any]:
    """The command's configuration with the user's overrides, as plain values."""
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        parser = OverridesParser.create()
        own, rest = _own_functions(words, parser)
        own_values, rest = _own_values(command, rest, parser)
        if command == "compare":
            rest = ["++" + word if word.startswith(FREE) else word for word in rest]
        with initialize_config_dir(str(CONF.resolve()), version_base=None):
            config = compose(command, overrides=rest)
            defaults = _defaults(command, tuple(word for word in rest if word.partition("=")[0] in GROUPS))
        config.update(own_values)
        for group, arguments in own.items():
            if group not in config:
                raise InputError(f"{command} has no {group}: leave {group}._target_={arguments['_target_']} out")
            config[group] = arguments
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise InputError(f"{missing[0]} is not given: add {missing[0]}=VALUE to the command line")
        values: Any = OmegaConf.to_container(config, resolve=True)
        free = {"budget", *own}
        _check_kinds(values, {k: v for k, v in defaults.items() if k not in free})
    except InputError:
        raise
    except (HydraException, OmegaConfBaseException, *untrusted.DAMAGED) as error:
        raise InputError(_explained(command, words, error)) from error
    return values  # type: ignore[no-any-return]


@functools.cache
def _defaults(command: str, chosen: Sequence[str]) -> Any:
    """The plain values of a command and the YAMLs that were chosen for its groups, as they are in these."""
    from hydra import compose
    from omegaconf import OmegaConf

    return OmegaConf.to_container(compose(command, overrides=list(chosen)))


def _check_kinds(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> None:
    """Raises InputError where a number or a switch by default was given as something else, or a folder as null."""
    for key, default in defaults.items():
        given, kind = values.get(key), KINDS.get(type(default))
        if isinstance(default, dict):
            if not isinstance(given, dict):
                raise InputError(f"{prefix}{key} must be a mapping of keys, got {given!r}")
            _check_kinds(given, default, f"{prefix}{key}.")
        elif given is None and isinstance(default, str) and key in FOLDERS:
            raise InputError(f"{prefix}{key} must be a path, got null: leave it out for {key}={default}")
        elif kind and (not isinstance(given, kind[0]) or (isinstance(given, bool) and bool not in kind[0])):
            raise InputError(f"{prefix}{key} must be {kind[1]}, got {given!r}")
        elif kind is KINDS[int] and isinstance(given, int) and abs(given) >= 2**63:
            raise InputError(f"{prefix}{key} must be below 2**63, got {given}")
        elif isinstance(given, float) and math.isnan(given):
            raise InputError(f"{prefix}{key} must be a number, got {given}")


def _own_functions(words: Sequence[str], parser: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A function of the user's discards the arguments of what its group has by default and admits its own without a
    `+`."""
    found, rest = {}, list(words)
    for group in OWN:
        if any(word.startswith((f"{group}._target_=", f"+{group}._target_=")) for word in words):
            mine = [word for word in words if word.lstrip("+").startswith(f"{group}.")]
            parsed = [parser.parse_override(word) for word in mine]
            found[group] = {p.key_or_group.removeprefix(f"{group}."): p.value() for p in parsed}
            rest = [word for word in rest if word not in mine]
    return found, rest


def _own_values(command: str, words: Sequence[str], parser: Any) -> tuple[dict[str, Any], list[str]]:
    """What a command's own keys are given that have the name of a group, as `device` of finetune has: Hydra would look
    for a YAML of the group."""
    own = set(GROUPS) & set(yaml.safe_load((CONF / f"{command}.yaml").read_text()))
    mine = [word for word in words if word.partition("=")[0] in own]
    parsed = [parser.parse_override(word) for word in mine]
    return {p.key_or_group: p.value() for p in parsed}, [word for word in words if word not in mine]


def _explained(command: str, words: Sequence[str], error: Exception) -> str:
    """A configuration error in one line, with the nearest key where one was misspelt."""
    from omegaconf import OmegaConf

    known = set(_keys(OmegaConf.load(CONF / f"{command}.yaml")))
    for group in GROUPS:
        if (CONF / group).is_dir():
            known.add(group)
            for name in names(group):
                known |= {f"{group}.{key}" for key in _keys(OmegaConf.load(CONF / group / f"{name}.yaml"))}
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if "=" not in word:
            return f"'{word}' is not key=value; python -m autoprune {command} --help shows every key"
        value = word.partition("=")[2]
        if key in GROUPS and re.fullmatch(r"[\w.]+", value) and value not in names(key):
            own = f"; one of your own is {key}._target_={value}" if "." in value else ""
            near = difflib.get_close_matches(value, names(key), 1)
            hint = f"; did you mean {near[0]}?" if near else own
            return f"unknown {key} '{value}': it must be one of {', '.join(names(key))}{hint}"
        if key not in known and ("Could not override" in str(error) or "struct" in str(error)):
            near = difflib.get_close_matches(key, sorted(known), 1, 0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; see python -m autoprune {command} --help"
            return f"unknown key '{key}' in '{word}'{hint}"
    return f"cannot read {' '.join(words)}: {' '.join(str(error).split())}"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    from omegaconf import DictConfig

    for key in node:
        if key == "defaults":
            continue
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            yield from _keys(child, f"{prefix}{key}.")


def made(kind: Callable[..., Any], values: dict[str, Any], place: str) -> Any:
    """A value type from its keys; an unknown key or a wrong type is the user's error."""
    target = f"{kind.__module__}.{kind.__qualname__}"
    try:
        return bind({"_target_": target, **values}, place)()
    except TypeError as error:
        raise InputError(f"{place}: {error}; see --help for the kind of each value") from error


def save(config: Mapping[str, Any], path: Path) -> None:
    """Write a configuration as YAML, which config_of reads again."""
    from omegaconf import OmegaConf

    with whole(path) as temporary:
        OmegaConf.save(OmegaConf.create(dict(config)), temporary)


def config_of(folder: Path, parts: Sequence[str] = ("task", "device")) -> dict[str, Any]:
    """The configuration that a run left in its folder: plain values, in which `${...}` stands for nothing.

    parts: those that must be there, each with the name of a function.

    The functions that its `_target_` keys name are the user's own task and device, and are called: a folder of somebody
    else is to be looked at first, as a script of theirs would be.
    """
    try:
        values: Any = untrusted.yaml_of(folder / "config.yaml", CONFIGURED)
        _ = [{**values[part]}["_target_"] for part in parts], values["seed"]
        if type(values["seed"]) is not int:
            raise TypeError(f"seed must be a whole number, got {values['seed']!r}")
    except untrusted.DAMAGED as error:
        raise InputError(
            f"{folder} is not the folder of a search: config.yaml {type(error).__name__} {error}"
        ) from error
    return values  # type: ignore[no-any-return]
