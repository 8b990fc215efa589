"""The files of a run: what is taken away from a search, a fine-tune or a training."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from autoprune import untrusted
from autoprune.core import InputError, Measurement, PruningSpace, Trial
from autoprune.page import RATIO, html
from autoprune.writing import whole

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
    _write_trials(folder / "trials.csv", result.trials, result.space)
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


def rewrite(folder: Path) -> None:
    """Write report.html from the result.json and trials.csv of a finished run.

    Raises:
        InputError: the folder holds no finished run.
    """
    try:
        page = html(untrusted.json_of(folder / "result.json"), untrusted.rows_of(folder / "trials.csv"))
    except (TemplateError, *untrusted.DAMAGED) as error:
        raise InputError(f"{folder} holds no finished search: {type(error).__name__}: {error}") from error
    with whole(folder / "report.html") as temporary:
        temporary.write_text(page)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def _write_weights(model: nn.Module, path: Path) -> None:
    import safetensors.torch

    with whole(path) as temporary:
        safetensors.torch.save_model(copy.deepcopy(model).cpu(), str(temporary))


def _write_trials(path: Path, trials: Sequence[Trial], space: PruningSpace) -> None:
    costs = sorted({name for trial in trials for name in trial.costs})
    predicted = sorted({name for trial in trials for name in trial.predicted})
    with whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        head = ["number", "recovery", "parent", "about", "score", "score_low", "score_high", "loss", "loss_change"]
        head += ["loss_change_low", "loss_change_high", *costs, *(f"predicted {c}" for c in predicted), "measured"]
        head += ["feasible", "cached", "seconds", "error"]
        writer.writerow([*head, *(RATIO + g.name for g in space.groups)])
        for t in trials:
            change = t.loss_change or Measurement.exact(math.nan, "loss", "measured")
            row: list[object] = [
                t.number,
                t.candidate.recovery,
                "" if t.candidate.parent is None else t.candidate.parent,
                json.dumps(dict(t.candidate.about), separators=(",", ":")) if t.candidate.about else "",
                t.score,
                t.score_low,
                t.score_high,
                t.loss,
                change.value,
                change.low,
            ]
            row += [change.high, *(t.costs[c].value if c in t.costs else "" for c in costs)]
            row += [t.predicted.get(c, "") for c in predicted]
            row += [
                t.candidate.measure,
                "" if t.feasible is None else t.feasible,
                t.cached,
                round(t.seconds, 4),
                t.error or "",
            ]
            writer.writerow([*row, *t.candidate.ratios])
