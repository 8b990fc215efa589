"""The command line: every wrong input is one clear line and exit 2; exit statuses; help."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch

from autoprune import RatioTable, cli, commands, console, report, telling
from autoprune.configuration import config_of
from autoprune.core import Budget, DeviceLostError, Measurement
from autoprune.prune import weights_hash
from autoprune.tasks import fashion_mnist_resnet20

QUICK = (
    "budget=flops_50pct task._target_=tiny.make_task evaluator.images=200 evaluator.recalibration=1 "
    "strategy.sweep_levels=2 strategy.refinements=0 evaluator.short.epochs=0.1 finetune.epochs=0.1"
).split()
UNIFORM = (
    "budget=flops_50pct task._target_=tiny.make_task strategy=uniform evaluator.images=200 evaluator.short.epochs=0.1 "
    "finetune.epochs=0.1"
).split()


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """The shipped images are slow to decompress, and nothing changes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist_resnet20, "_shipped", functools.cache(fashion_mnist_resnet20._shipped))
        yield


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(words)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


MODULE = """
import torch
from autoprune import Task
def raises(): raise RuntimeError("disk on fire")
def wrong(): return {"model": None}
def needs(depth): return depth
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fly", "unknown command 'fly'"),
        ("serch", "did you mean search?"),
        (
            "search strategy=magic",
            "it must be one of amc, amc_paper, global, netadapt, optuna, random, sensitivity, uniform",
        ),
        ("search task=imagenet", "it must be one of cifar10_resnet20"),
        ("search criterion=l3", "it must be one of apoz"),
        ("search criterion=lp criterion.p=much", "criterion.p must be a number, got 'much'"),
        (
            "search task=my_task.make_task budget=flops_50pct",
            "it must be one of cifar10_resnet20, fashion_mnist_resnet20; one of your own is "
            "task._target_=my_task.make_task",
        ),
        ("search strategy=sensitivty budget=flops_50pct", "; did you mean sensitivity?"),
        (
            "search +criterion.redcue=max task._target_=tiny.make_task budget=flops_50pct",
            "criterion has no setting 'redcue'",
        ),
        (
            "search criterion.reduce=median budget=latency_20ms task._target_=tiny.make_task profile.folder=a_file",
            "criterion.reduce must be one of mean, max, sum, first, got 'median'",
        ),
        (
            "search criterion=apoz evaluator.recalibration=0 task._target_=tiny.make_task budget=flops_50pct",
            "criterion=apoz needs one training batch or more, got none",
        ),
        ("search budget=latency_20", "budget 'latency_20': the unit is missing"),
        ("search budget=latency_-5ms", "must be above 0, got -5"),
        ("search budget=flops_150pct", "at most 100, got 150"),
        ("search budget=speed_20ms", "unknown cost 'speed'"),
        ("search budget=energy_50kWh", "unknown unit 'kWh', for energy it must be one of pct, uJ, mJ, J"),
        ("search energy.word_pj=-1", "energy: word_pj must be a finite number of at least 0, got -1"),
        ("search energy.word_pj=much", "energy.word_pj must be a number, got 'much'"),
        ("search energy=none", "it must be one of horowitz_45nm"),
        ("search budget=[latency_20ms,latency_50pct]", "both in ms and relative to dense"),
        ("search device=quantum", "it must be one of onnxruntime, openvino"),
        ("search device.thread=2", "did you mean 'device.threads'?"),
        ("search settings.amc.agent=sac", "unknown key 'settings.amc.agent'"),
        ("search strategy=amc strategy.hidden=64", "strategy.hidden must be a list, got 64"),
        ("search strategy=optuna strategy.options=5", "strategy.options must be a mapping of keyword arguments, got 5"),
        ("search device.threads=0", "device=torch_cpu: threads >= 1 must hold, got threads=0"),
        ("search device.threads=two", "device.threads must be a whole number, got 'two'"),
        ("search device._target_=tiny.make_task", "tiny.make_task does not take these arguments"),
        ("search profile.networks=3", "networks must be >= 8"),
        (
            "search budget=latency_20ms task._target_=tiny.make_task profile.folder=a_file",
            "profile.folder=a_file cannot be written",
        ),
        ("profile device.place=warp task._target_=tiny.make_task", "device=torch_cpu is not there"),
        ("profile held_out=0", "held_out >= 1"),
        ("profile networks", "'networks' is not key=value"),
        ("search budget=[]", "budget is empty"),
        ("search budjet=flops_50pct", "unknown key 'budjet' in 'budjet=flops_50pct'; did you mean 'budget'?"),
        ("search evaluator.imags=3", "did you mean 'evaluator.images'?"),
        ("search strategy.sweep_level=3", "did you mean 'strategy.sweep_levels'?"),
        ("search output=5", "output must be text, got 5"),
        ("search study.storage=5", "study.storage must be text"),
        ("search evaluator.cache=5", "evaluator.cache must be text"),
        ("search finetune.momentum=-1", "0 <= momentum < 1 must hold, got momentum=-1"),
        ("search strategy=uniform strategy.attempts=0", "attempts >= 1 must hold"),
        (
            "search strategy.recovery=shrot task._target_=tiny.make_task budget=flops_50pct",
            "recovery must be one of short, probe, none",
        ),
        ("search task._target_=tiny.make_task evaluator.cache=a_file", "evaluator.cache=a_file cannot be written"),
        ("search +strategy.magic=3", "does not take these arguments"),
        ("search budget", "'budget' is not key=value"),
        ("search seed=[1", "seed=[1"),
        ("search seed=one", "seed must be a whole number, got 'one'"),
        ("search seed=-1", "seed must be a whole number of 0 or more, got -1"),
        ("search evaluator.images=many", "evaluator.images must be a whole number, got 'many'"),
        ("search evaluator.images=1", "evaluator: images >= 2 must hold, got images=1"),
        ("search evaluator.precision=half", "evaluator: precision must be float32 or bfloat16, got precision=half"),
        ("search finetune.epochs=-1", "epochs >= 0 must hold, got epochs=-1"),
        ("search space.levels=1", "levels >= 2 must hold"),
        ("search strategy.sweep_levels=0", "sweep_levels >= 1 must hold"),
        ("search task.data=nowhere", "nowhere/train-images-idx3-ubyte.gz cannot be read: No such file"),
        ("search task.data=damaged", "train-images-idx3-ubyte.gz cannot be read"),
        ("search task.checkpoint=nowhere.safetensors task.data=shipped", "task.checkpoint=nowhere.safetensors cannot"),
        ("search task.checkpoint=other.safetensors task.data=shipped", "does not fit the model"),
        ("search task.checkpoint=damaged.safetensors task.data=shipped", "cannot be read"),
        ("search task.checkpoint=nan.safetensors task.data=shipped", "hold NaN or infinity, first in 'conv1.weight'"),
        ("search weights=nowhere.safetensors task.data=shipped", "weights=nowhere.safetensors cannot be read"),
        (
            "compare weights=other.safetensors task.data=shipped",
            "weights=other.safetensors does not fit the model",
        ),
        ("doctor weights=damaged.safetensors task.data=shipped", "weights=damaged.safetensors cannot be read"),
        ("train weights=nan.safetensors task.data=shipped", "hold NaN or infinity, first in 'conv1.weight'"),
        ("profile weights=x", "unknown key 'weights'"),
        ("search weights=5 task.data=shipped", "weights=5 cannot be read"),
        ("train regularizer=l0", "it must be one of bn_l1, group_lasso"),
        ("train regularizer.strength=much", "regularizer.strength must be a number, got 'much'"),
        ("train regularizer.strength=-1 task._target_=tiny.make_task", "strength must be a number of 0 or more, got"),
        ("train regularizer._target_=mine.raises task._target_=tiny.make_task", "mine.raises does not take these"),
        ("train training.epochs=-1", "epochs >= 0 must hold, got epochs=-1"),
        ("train training.epochs=1e-5 task._target_=tiny.make_task", "are no step at all; give more epochs"),
        ("train device=warp task._target_=tiny.make_task", "device=warp is not there"),
        ("search task=cifar10_resnet20", "task.data is not given"),
        ("search task=cifar10_resnet20 task.data=nowhere.npz", "task.data=nowhere.npz"),
        ("search task=cifar10_resnet20 task.data=damaged.npz", "is no npz with x_train"),
        ("search task=cifar10_resnet20 task.data=small.npz", "the official set has 50000"),
        ("search task._target_=nothing.make_task", "there is no module 'nothing'"),
        ("search task._target_=mine.nothing", "has no function or class 'nothing'"),
        ("search task._target_=make_task", "must be a dotted path"),
        ("search task._target_=mine.raises", "mine.raises raised RuntimeError: disk on fire (mine.py:4)"),
        ("search task._target_=mine.wrong", "returned dict, it must return an autoprune.Task"),
        ("search task._target_=mine.needs", "missing a required argument: 'depth'"),
        ("search task._target_=mine.needs task.deep=3", "it takes depth"),
        ("search task._target_=broken.make_task", "importing broken raised SyntaxError"),
        ("search task.data=shipped output=a_file", "cannot write to a_file"),
        *((f"{name} output=null", "output must be a path, got null") for name in ("search", "train", "dashboard")),
        ("profile folder=null", "folder must be a path, got null: leave it out for folder=outputs/tables"),
        ("search task._target_=tiny.make_task study.storage=sqlite:///a_file/x.db", "cannot be used"),
        ("search task._target_=tiny.make_task study.storage=sqlite:///mine.py", "file is not a database"),
        ("search task._target_=tiny.make_task study.storage=oracle://x", "cannot be used"),
        ("search task._target_=tiny.make_task evaluator.device=warp", "device=warp is not there"),
        ("finetune", "ratios is not given: add ratios=VALUE"),
        ("finetune ratios=5", "ratios must be text"),
        ("finetune ratios=nowhere.yaml", "ratio table nowhere.yaml: No such file"),
        ("finetune ratios=mine.py", "is not"),
        ("measure", "measure takes one argument"),
        ("measure nowhere", "nowhere is not the folder of a search"),
        ("export", "export takes the folder of a finished run first"),
        ("search device=ssh", "device.host is not given: add device.host=VALUE"),
        (
            "search device=onnxruntime device.place=TPU budget=latency_50pct task._target_=tiny.make_task",
            "is not there",
        ),
        ("search device.runtime=tflite", "runtime must be one of torch, onnxruntime, openvino, got 'tflite'"),
        ("search device.statistic=mean", "statistic must be one of p50, p90, p99, got 'mean'"),
        ("report", "report takes one argument"),
        ("report nowhere", "nowhere holds no finished search"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_2(
    words: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.py").write_text(MODULE)
    Path("broken.py").write_text("def make_task(:\n")
    Path("a_file").write_text("")
    Path("damaged").mkdir()
    Path("damaged/train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b not gzip")
    Path("damaged.npz").write_bytes(b"PK\x03\x04 not a zip")
    Path("damaged.safetensors").write_bytes(b"\xff" * 64)
    if "small" in words:
        x, y = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
        np.savez("small.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    if "nan" in words or "other" in words:
        from autoprune.tasks.resnet import ResNet

        with torch.no_grad():
            model = ResNet(channels=1)
            model.conv1.weight[0] = float("nan")
        safetensors.torch.save_file(model.state_dict(), "nan.safetensors")
        safetensors.torch.save_file(ResNet(channels=3).state_dict(), "other.safetensors")
    for name in ("mine", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    status, _, err = run(capsys, *shlex.split(words))
    assert status == 2, err
    assert says in err
    errors = [line for line in err.splitlines() if line.startswith("autoprune: ")]
    assert errors == err.splitlines()[-1:], err
    assert "Traceback" not in err


def test_help_answers_at_once_and_names_every_command() -> None:
    began = time.perf_counter()
    shown = subprocess.run([sys.executable, "-m", "autoprune", "--help"], capture_output=True, text=True, check=True)
    print(f"--help: {time.perf_counter() - began:.2f} s")  # noqa: T201
    for command in commands.COMMANDS:
        assert f"\n  {command} " in shown.stdout
    program = "import sys; from autoprune.cli import main; main(['--help']); print('torch' in sys.modules)"
    light = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert light.stdout.strip().endswith("False"), "--help imports torch"


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"python -m autoprune {command}" in out
    assert "--json" in out
    shown = {
        "search": "epochs: 3",
        "profile": "held_out: 30",
        "doctor": "channel  ",
        "finetune": "epochs: 3",
        "compare": "evaluations: 200",
        "train": "lr_fraction: 0.25",
        "completion": "bash|zsh|fish",
        "dashboard": "port: 8080",
    }
    assert shown.get(command, "RUN_DIR") in out


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[:2] == (0, cli.HELP)


def test_a_search_ends_with_0_and_a_reuse_of_its_table_too(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "search", *QUICK)
    assert status == 0, err
    assert "met" in out
    (folder,) = Path("outputs/tiny/sensitivity").iterdir()
    assert re.findall(r"^\w+: +python -m autoprune (.*)", out, re.M) == [
        f"finetune ratios={folder}/ratios.yaml task._target_=tiny.make_task",
        f"export {folder} format=onnx",
        "dashboard",
    ]
    (kept,) = Path("outputs/artifacts").iterdir()  # what the dashboard shows
    assert kept.read_text() == (folder / "report.html").read_text()
    assert json.loads((folder / "result.json").read_text())["budgets"][0]["met"] is True
    assert (folder / "config.yaml").exists()
    assert "groups of" in (folder / "log.txt").read_text()
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert run(capsys, "report", str(folder)) == (0, f"report: {folder}/report.html\n", "")
    assert (folder / "report.html").read_text() == before
    told = json.loads(run(capsys, "report", str(folder), "--json")[1])
    assert told == {"folder": str(folder), "report": f"{folder}/report.html"}

    status, out, err = run(
        capsys, "finetune", f"ratios={folder}/ratios.yaml", "task._target_=tiny.make_task", "finetune.epochs=0.2"
    )
    assert status == 0, err
    assert "pruned and fine-tuned" in " ".join(out.split())
    status, _, err = run(
        capsys, "finetune", f"ratios={folder}/ratios.yaml", "task=fashion_mnist_resnet20", "task.data=shipped"
    )
    assert status == 2
    assert "no group '0.0' of 8 units: it is another architecture" in err


@pytest.mark.slow
def test_a_search_starts_from_what_a_training_left(capsys: pytest.CaptureFixture[str]) -> None:
    given = "task._target_=tiny.make_task task.name=sparse training.epochs=1".split()
    given += ["training.lr_fraction=1", "regularizer.strength=0.2"]
    status, out, err = run(capsys, "train", *given)
    assert status == 0, err
    (folder,) = Path("outputs/sparse/train").iterdir()
    values = json.loads((folder / "result.json").read_text())
    assert values["near_zero_before"] == 0
    assert values["near_zero_after"] == sum(g["after"] for g in values["groups"].values()) / 124 > 0
    assert f"{100 * values['near_zero_after']:.2f} % after" in out
    (line,) = re.findall(r"next:  python -m autoprune (.*)", out)
    assert line == (
        f"search weights={folder}/trained.safetensors criterion=bn_scale task._target_=tiny.make_task task.name=sparse"
    )

    status, out, err = run(capsys, *shlex.split(line), *UNIFORM[:1], *UNIFORM[2:])
    assert status == 0, err
    (found,) = Path("outputs/sparse/uniform").iterdir()
    table, tensors = RatioTable.load(found / "ratios.yaml"), safetensors.torch.load_file(folder / "trained.safetensors")
    (group,) = [g for g in table.groups if g.name == "1.body.0.0"]
    assert int(tensors["1.body.0.1.weight"].abs().argmin()) not in group.units
    again = commands._task(config_of(found)).model  # what measure takes for the dense network
    assert all(torch.equal(tensors[name], tensor) for name, tensor in again.state_dict().items())
    assert weights_hash(again) == table.weights != weights_hash(tiny.make_task().model)

    (line,) = re.findall(r"reuse: +python -m autoprune (.*)", out)
    status, out, err = run(capsys, *shlex.split(line), "finetune.epochs=0.1", "--json")
    assert status == 0, err
    (tuned,) = Path("outputs/sparse/finetune").iterdir()
    told = json.loads(out)
    assert told["folder"] == str(tuned)
    assert told["costs"]["params"]["measured"]["value"] < told["costs"]["params"]["dense"]["value"]
    assert RatioTable.load(tuned / "ratios.yaml") == table


@pytest.mark.slow
def test_a_budget_below_the_smallest_network_ends_with_3_and_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "search", *UNIFORM, "budget=flops_1pct")
    assert status == 3
    assert "not met" in out
    (folder,) = Path("outputs/tiny/uniform").iterdir()
    values = json.loads((folder / "result.json").read_text())
    assert values["budgets"][0]["met"] is False
    assert (folder / "ratios.yaml").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("unheeding")
def test_a_profile_is_kept_and_found_by_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    quick = "device.processes=2 device.most_processes=2 device.samples=6 device.seconds=0.2 device.repeats=0".split()
    small = ["networks=8", "held_out=2", "task._target_=tiny.make_task"]
    status, out, _ = run(capsys, "profile", *small, *quick)
    assert status == 0
    assert "error on 2 networks" in out
    assert all(heading in out for heading in ("step", "widths worth keeping"))
    (table,) = Path("outputs/tables").iterdir()
    status, out, err = run(capsys, "search", *UNIFORM, "budget=latency_10s", *quick)
    assert status == 0, err
    assert "budget latency_10s" in out
    assert "error on 2 networks it was not fitted to" in err
    assert "kept in outputs/tables" in err
    assert list(Path("outputs/tables").iterdir()) == [table]
    assert "keeps latency_10s already" in err
    assert "nothing was pruned, as the dense network keeps every budget" in " ".join(out.split())
    (folder,) = Path("outputs/tiny/uniform").iterdir()
    page = (folder / "report.html").read_text()
    assert "Nothing was pruned: the dense network keeps every budget." in page
    assert "the search found it better so" not in page
    assert "Pruned and fine-tuned" not in page
    values = json.loads((folder / "result.json").read_text())
    assert values["device"].startswith("torch_cpu: ")
    assert values["budgets"][0]["met"] is True

    status, out, err = run(capsys, "measure", str(folder))
    assert status == 0, err
    now = float(out.partition("now: ")[2].partition(" ")[0])
    assert 0.5 < now / values["budgets"][0]["value"] < 2
    assert "apart: " in out
    assert "budget latency_10s: met" in out


def test_a_lost_device_is_exit_1_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise DeviceLostError("device=board was lost: Connection refused")

    monkeypatch.setattr("autoprune.evaluate.Evaluator.measured", lost)
    status, _, err = run(capsys, "search", *UNIFORM)
    assert status == 1
    told, line = err.splitlines()[-2:]
    assert told == "autoprune: device=board was lost: Connection refused; what was scored is kept. To go on:"
    assert line.endswith(shlex.join(["-m", "autoprune", "search", *UNIFORM]))


def test_a_named_study_of_another_search_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "search", "-q", *UNIFORM, "study.name=mine", "--json")
    assert (status, err) == (0, "")
    (folder,) = Path("outputs/tiny/uniform").iterdir()
    assert json.loads(out) == json.loads((folder / "result.json").read_text()) | {"folder": str(folder)}
    status, out, err = run(capsys, "search", "--json", *UNIFORM, "study.name=mine", "budget=flops_70pct")
    assert status == 2
    assert 'budgets was ["flops_50pct"], is ["flops_70pct"]' in err
    assert err.splitlines()[-1] == "autoprune: " + json.loads(out)["error"]


def test_a_lost_search_is_told_to_a_program_with_the_line_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.COMMANDS, "search", pressed)
    status, out, err = run(capsys, "search", "--json", "seed=1")
    assert status == 130
    told = json.loads(out)
    assert told["error"] == "interrupted; what was scored is kept. To go on"
    assert told["again"].endswith("-m autoprune search --json seed=1")
    assert err.splitlines() == ["", f"autoprune: {told['error']}:", f"  {told['again']}"]


def test_what_is_not_a_number_is_null_to_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    telling.write_json({"a": math.nan, "b": [1.5, -math.inf], "c": (None, {"d": np.int64(2)})})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": [None, {"d": 2}]}


def test_a_second_measurement_is_told_in_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    then, now = (
        Measurement(value=value, unit="ms", low=value - 1, high=value + 1, kind="measured", notes=("[quiet]",))
        for value in (10.0, 12.0)
    )
    budgets = {"latency_20ms": Budget("latency_ms", 20.0, "ms"), "latency_5ms": Budget("latency_ms", 5.0, "ms")}
    lines = ["apart: +20.0 %", "budget latency_20ms: met", "budget latency_5ms: not met"]
    assert not console.show_again(then, now, budgets)
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["then: 10 [9, 11] ms ([quiet])", "now: 12 [11, 13] ms ([quiet])", *lines]
    with telling.told(telling.Telling(quiet=True)):
        console.show_again(then, now, budgets)
    assert capsys.readouterr().out.splitlines() == lines
    with telling.told(telling.Telling(json=True)):
        assert console.show_again(then, now, {})
    told = json.loads(capsys.readouterr().out)
    assert (told["then"]["value"], told["now"]["high"], told["budgets"]) == (10.0, 13.0, [])
    assert told["apart"] == pytest.approx(0.2)


@pytest.mark.slow
def test_a_second_measurement_is_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "search", *UNIFORM)
    assert status == 0, err
    (folder,) = Path("outputs/tiny/uniform").iterdir()
    asked = json.loads((folder / "result.json").read_text())["budgets"][0]["asked"]
    now = Measurement(value=12.0, unit="ms", low=11.0, high=13.0, kind="measured")
    for limit in (20.0, 5.0):
        report.write_again(folder, now, {asked: Budget("latency_ms", limit, "ms")})
    kept = json.loads((folder / "result.json").read_text())["measured_again"]
    assert [again["budgets"] for again in kept] == [{asked: True}, {asked: False}]
    page = (folder / "report.html").read_text()
    assert re.findall(r"Measured again [\d: -]+: 12 \[11, 13\] \S+ <strong>(.*)</strong>", page) == ["met", "not met"]


def test_a_search_that_is_unfinished_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    command = ["python", "-m", "autoprune", "search", "budget=[flops_50pct,params_60pct]"]
    Path("run/outset.json").write_text(json.dumps({"command": command}))
    for line in (["export", "run", "format=onnx"], ["measure", "run"]):
        status, _, err = run(capsys, *line)
        assert status == 2
        assert "run is of a search that is unfinished: go on with " + shlex.join(command) in err


def test_what_cannot_be_kept_is_shown_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = Measurement(value=12.0, unit="ms", low=11.0, high=13.0, kind="measured")
    budgets = {"latency_20ms": Budget("latency_ms", 20.0, "ms")}
    monkeypatch.setattr("autoprune.measuring.measured_again", lambda *_, **__: (now, now, budgets))
    Path("old").mkdir()  # a run of before there was trials.csv
    Path("old/result.json").write_text("{}")
    config = {
        "task": {"_target_": "tiny.make_task"},
        "device": {"_target_": "autoprune.meters.device.Device"},
        "seed": 0,
    }
    Path("old/config.yaml").write_text(json.dumps(config))
    status, out, err = run(capsys, "measure", "old")
    assert (status, out.splitlines()[-1]) == (0, "budget latency_20ms: met")
    assert err.startswith("autoprune: what was measured is not kept in the report of old: ")


@pytest.mark.slow
def test_trials_of_an_earlier_run_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "search", *UNIFORM)
    assert status == 0
    assert "again:" not in out, "it is decided"
    assert re.search(
        r"^\d+ trials? \(1 evaluated, 0 from the cache, 0 failed; 0% of the forward passes saved", out, re.M
    )
    _, again, _ = run(capsys, "search", *UNIFORM)
    assert re.search(r"^\d+ trials? \(1 of an earlier run, 0 evaluated, 0 from the cache, 0 failed", again, re.M)


def test_our_own_failure_is_exit_1_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("our fault")

    monkeypatch.setattr("autoprune.loop.search", broken)
    status, _, err = run(capsys, "search", *UNIFORM)
    assert status == 1
    assert "failed, ZeroDivisionError: our fault" in err
    assert "Traceback" not in err
    (folder,) = Path("outputs/tiny/uniform").iterdir()
    assert "Traceback" in (folder / "log.txt").read_text()


def test_a_user_task_takes_its_own_arguments_without_a_plus(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "search", *UNIFORM, "task.name=renamed", "task.seed=0")
    assert status == 0, err
    assert Path("outputs/renamed/uniform").is_dir()


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_scored_and_the_printed_line_resumes() -> None:
    import sqlite3

    line = [sys.executable, "-m", "autoprune", "search", "budget=flops_50pct", "task.data=shipped"]
    line += [
        "finetune.epochs=0.1",
        "evaluator.short.epochs=0",
        "strategy.sweep=grid",
        "strategy.sweep_levels=1",
        "strategy.refinements=0",
        "evaluator.images=300",
        "evaluator.cache=null",
    ]

    def heeding() -> None:
        """A shell starts what runs in its background deaf to Ctrl-C, and all that comes of it."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, **pipes, env=os.environ.copy(), preexec_fn=heeding)

    def count() -> int:
        """Looks, and no more: Optuna's own reader would make the tables, in a race with the search."""
        try:
            with contextlib.closing(sqlite3.connect("file:outputs/studies.db?mode=ro", uri=True)) as database:
                return int(database.execute("SELECT count(*) FROM trials").fetchone()[0])
        except sqlite3.OperationalError:
            return 0

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and count() < 8:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "what was scored is kept" in err
    kept = count()
    assert kept >= 8
    printed = shlex.split(err.strip().splitlines()[-1])
    resumed = subprocess.run(printed, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{kept} trials are not scored again" in " ".join(resumed.stderr.split())
    results = [json.loads(p.read_text()) for p in Path("outputs").rglob("result.json")]
    assert len(results) == 1
    search = results[0]["search"]
    assert search["evaluations"] + search["cache_hits"] == search["trials"] - kept
    assert search["cache_hits"] == 1  # the answer, which was a finalist


@pytest.mark.slow
def test_the_doctor_says_what_can_be_pruned_and_what_stands_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "doctor", "task._target_=tiny.make_task")
    assert status == 0, err
    assert "left whole" in out
    assert "it is the model's output" in out
    assert re.search(r"\d+ groups of \d+ units, traced and proven in", out)
    assert re.search(r"in layers that some group cuts: [\d.]+ % of MACs, [\d.]+ % of parameters", out)
    status, verdict, err = run(capsys, "doctor", "--quiet", "task._target_=tiny.make_task")
    assert (status, err) == (0, "")
    assert 0 < len(verdict.splitlines()) < 5
    assert set(re.sub(r"in [\d.]+ s", "", verdict).splitlines()) <= set(re.sub(r"in [\d.]+ s", "", out).splitlines())
    status, told, _ = run(capsys, "doctor", "task._target_=tiny.make_task", "--json")
    assert status == 0
    groups = json.loads(told)["groups"]
    assert f"{len(groups)} groups of {sum(group['size'] for group in groups.values())} units" in out
    status, _, err = run(capsys, "doctor", "space.levels=1")
    assert status == 2
    assert "autoprune: space: levels >= 2 must hold" in err


def test_a_command_is_written_down_without_its_password() -> None:
    url = "postgresql+psycopg://me:secret@host/studies"
    for word in (f"study.storage={url}", f"study.storage='{url}?host=%2Frun'"):
        told = commands._told("search", ["seed=1", word])
        assert told == ["python", "-m", "autoprune", "search", "seed=1", word.replace("secret", "***")]
    words = [f"++study.storage={url}", f"study={{storage: {url}}}"]
    assert commands._told("search", words)[4:] == [word.replace("secret", "***") for word in words]
    query = commands._told("search", ["study.storage=postgresql://host/db?password=secret&user=me"])[-1]
    assert query == "study.storage=postgresql://host/db?password=***&user=me"
    plain = ["study.storage=sqlite:///my%20.db", "budget=flops_50pct", "task.url=http://host/a?b=1&a=2"]
    assert commands._told("search", plain)[3:] == ["search", *plain]
