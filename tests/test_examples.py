"""A ratio table in two kinds of training, a loop of one's own being the README's: each example, in a process and a
folder of its own, is given the YAML of a table that was made here, trains an epoch, ends with the table's widths."""

from __future__ import annotations

import ast
import importlib
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_prune import table_of
from torch import nn

from autoprune.keywords import positional

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def trained(script: str, model: nn.Module, inputs: Any, folder: Path) -> tuple[dict[str, int], float]:
    """The widths and the loss that an example ends with, on a table of about half of all widths; and its own widths."""
    by_name = isinstance(inputs, Mapping)
    given = tuple(inputs.values()) if by_name else inputs
    table = table_of(positional(model, tuple(inputs)) if by_name else model, inputs=given)
    table.save(folder / "ratios.yaml")
    line = [sys.executable, str(EXAMPLES / script), "ratios.yaml"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    widths, loss = (text.partition(": ")[2] for text in done.stdout.strip().splitlines()[-2:])
    found: dict[str, int] = ast.literal_eval(widths)
    layers = dict(table.prune(model, inputs).named_modules())
    assert found == {name: getattr(layers[name], "out_channels", None) or layers[name].out_features for name in found}
    members = {member for group in table.groups for member in group.members}
    assert {name for name, width in found.items() if width < len(model.get_parameter(f"{name}.weight"))} == members
    return found, float(loss)


@pytest.mark.slow
def test_lightning_keeps_the_widths(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    task = importlib.import_module("my_module").make_task()
    widths, loss = trained("lightning_callback.py", task.model, task.inputs, tmp_path)
    assert widths == {"0": 8, "4": 17}
    assert loss < math.log(4)  # of a guess among four


@pytest.mark.slow
def test_the_trainer_of_hugging_face_keeps_the_widths(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    example = importlib.import_module("hf_trainer")
    widths, loss = trained("hf_trainer.py", example.make_model(), example.example(), tmp_path)
    assert widths["bert.encoder.layer.1.attention.self.query"] == 16
    assert loss < math.log(2) + 0.05
