"""The files of a run: what is taken away from a search, a fine-tune or a training."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from autoprune import trialfile, unfinished, untrusted
from autoprune.core import Budget, InputError, Measurement
from autoprune.page import html
from autoprune.writing import room, whole

if TYPE_CHECKING:
    from torch import nn

    from autoprune.final import FineTuned
    from autoprune.outset import Outset
    from autoprune.result import Result
    from autoprune.training import Trained


def begin(outset: Outset, folder: Path, command: Sequence[str] = ()) -> None:
    """Write what a search begins with into its folder, so that a report of it can be made while it is unfinished."""
    _write_json(folder / "outset.json", outset.to_json() | {"command": list(command)})


def write(result: Result, folder: Path, command: Sequence[str] = ()) -> None:
    """Write a search's files into its folder. command: the words that the search was started with."""
    result.table.save(folder / "ratios.yaml")
    _write_json(folder / "result.json", result.to_json() | {"command": list(command)})
    trialfile.write(folder / "trials.csv", result.trials, [group.name for group in result.space.groups])
    _write_weights(result.model, folder / "pruned.safetensors")
    rewrite(folder)


def write_finetuned(tuned: FineTuned, folder: Path) -> None:
    """Write a fine-tune's files into its folder."""
    tuned.table.save(folder / "ratios.yaml")
    _write_weights(tuned.model, folder / "pruned.safetensors")
    values = {k: v for k, v in vars(tuned).items() if k not in ("table", "model", "dense", "measured")}
    costs = {name: {"dense": asdict(tuned.dense[name]), "measured": asdict(m)} for name, m in tuned.measured.items()}
    _write_json(folder / "result.json", values | {"costs": costs})


def write_trained(trained: Trained, folder: Path) -> None:
    """Write a training's files into its folder."""
    _write_weights(trained.model, folder / "trained.safetensors")
    values = {k: v for k, v in vars(trained).items() if k not in ("model", "groups")}
    shares = {f"near_zero_{when}": trained.share(when) for when in ("before", "after")}
    groups = {name: asdict(group) for name, group in trained.groups.items()}
    _write_json(folder / "result.json", values | shares | {"groups": groups})


def write_again(folder: Path, now: Measurement, budgets: Mapping[str, Budget]) -> None:
    """Add a second measurement to a finished run's result.json, and so to its report."""
    values = untrusted.json_of(folder / "result.json")
    again = asdict(now) | {"budgets": {asked: budget.met(now) for asked, budget in budgets.items()}}
    again["when"] = time.strftime("%Y-%m-%d %H:%M")
    _write_json(folder / "result.json", values | {"measured_again": [*values.get("measured_again", []), again]})
    rewrite(folder)


def rewrite(folder: Path) -> None:
    """Write report.html and the figures of a run from its result.json and trials.csv. Of one that is unfinished, from
    its outset.json and the trials in its study, which become its trials.csv.

    Raises:
        InputError: the folder holds no run, or what an unfinished one recorded is not to be had.
    """
    try:
        if (folder / "outset.json").exists() and not (folder / "result.json").exists():
            values, trials = unfinished.so_far(folder)
            trialfile.write(folder / "trials.csv", trials, list(values["groups"]))
        else:
            values = untrusted.json_of(folder / "result.json")
        text, figures = html(values, untrusted.rows_of(folder / "trials.csv"))
    except InputError as error:
        raise InputError(f"{folder} is unfinished, and its study cannot be read: {error}") from error
    except (TemplateError, *untrusted.DAMAGED) as error:
        raise InputError(f"{folder} holds no finished search: {type(error).__name__}: {error}") from error
    with room(folder / "figures"):
        (folder / "figures").mkdir(exist_ok=True)
    for figure in figures:
        for ending, content in (("svg", figure.svg), ("csv", figure.csv())):
            with whole(folder / "figures" / f"{figure.name}.{ending}", lasting=False) as temporary:
                temporary.write_text(content, newline="")
    with whole(folder / "report.html") as temporary:
        temporary.write_text(text)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def _write_weights(model: nn.Module, path: Path) -> None:
    import safetensors.torch

    with whole(path) as temporary:
        safetensors.torch.save_model(copy.deepcopy(model).cpu(), str(temporary))
