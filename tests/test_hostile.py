"""Damaged and hostile inputs, at every door that something from outside comes through: each is refused in one clear
line, or, where what it holds can be made again, left aside with a line in the log; nothing in it is run."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import shlex
import sqlite3
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from test_prune import INPUTS, damaged, table_of
from torch import nn

import autoprune.meters
from autoprune import cli, compare, measuring, untrusted
from autoprune.cache import read_cached, write_cached
from autoprune.core import Budget, Candidate, Group, InputError, Measurement, PruningSpace, Task, Trial
from autoprune.lineage import Networks, folder_beside
from autoprune.meters import answers, kept, profile
from autoprune.meters.device import Device, Worker
from autoprune.meters.fitted import Sample, Shape
from autoprune.meters.profile import CostTable
from autoprune.prune import RatioTable
from autoprune.scores import Scored
from autoprune.study import Study
from autoprune.tasks.shipped import load_weights
from autoprune.weights import fill


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv1": nn.Conv2d(3, 8, 1), "relu": nn.ReLU(), "conv2": nn.Conv2d(8, 4, 1)}
    return nn.Sequential(OrderedDict(layers)).eval()


RAN = "code_ran"  # what a payload would leave


class Payload:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (RAN,)


PICKLED = pickle.dumps({"weight": Payload()})
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def _nothing_ran() -> Any:
    yield
    assert not Path(RAN).exists(), "code from the input was run"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command line is refused with: one line, exit 2."""
    status = cli.main(words)
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("autoprune: ")]
    assert status == 2, err
    assert "Traceback" not in err
    assert told == err.splitlines()[-1:], err
    assert told[0].isprintable()
    assert len(told[0]) <= cli.LONGEST + 50
    return told[0]


def put(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# -------------------------------------------------------------------------------------------------- ratio tables


def with_row(**change: Any) -> str:
    return damaged(change)


def with_head(key: str, text: str) -> str:
    """The table with this text for the value of a key."""
    values = yaml.safe_load(damaged({})) | {key: "HERE"}
    return yaml.safe_dump(values).replace("HERE", text)


RATIOS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is not a ratio table"),
    "not text": (b"\xff\xfe\x00binary", "is not YAML that can be read"),
    "a pickle": (PICKLED, "is not YAML that can be read"),
    "a tag that calls": (f"!!python/object/apply:os.mkdir ['{RAN}']", "could not determine a constructor"),
    "a tag that makes": (f"format: !!python/object/new:os.mkdir ['{RAN}']", "could not determine a constructor"),
    "a tag that imports": ("format: !!python/name:os.system", "could not determine a constructor"),
    "a billion laughs": (LAUGHS, "it must hold no alias, got *a0"),
    "a merge of aliases": ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "it must hold no alias, got *a"),
    "a value in itself": ("a: &a [*a]", "it must hold no alias"),
    "nested deeply": (DEEP, "nested at most 32 deep"),
    "nested deeply in lines": ("- " * 5000, "nested at most 32 deep"),
    "a number of base 60": (with_head("weights", "1" + ":59" * 50_000), "a number must have at most 1000 digits"),
    "a number of many digits": (with_row(size="N").replace("size: N", "size: " + "9" * 5000), "at most 1000 digits"),
    "a date that is none": (with_head("weights", "2001-99-99"), "is not YAML that can be read"),
    "a time that is none": (with_head("weights", "!!timestamp soon"), "is not YAML that can be read"),
    "a whole number that is none": (with_head("format", "!!int one"), "is not YAML that can be read"),
    "two documents": (f"{damaged({})}---\n{damaged({})}", "is not YAML that can be read"),
    "a key that is a list": ("? [a]\n: b", "is not YAML that can be read"),
    "control characters": (f'"\\e[2J{RAN}": 1', "is not a ratio table"),
    "a truncated table": (damaged({})[:-70], "ratios.yaml"),
    "groups that are a list": (with_head("groups", "[]"), "is damaged: AttributeError"),
    "groups that are numbers": (with_head("groups", "{a: 1}"), "is damaged: TypeError"),
    "budgets that are text": (with_head("budgets", "abc"), "is damaged: ValueError"),
    "a provenance that is text": (with_head("provenance", "abc"), "is damaged: ValueError"),
    "a name that is no text": (with_head("groups", "{1: {size: 2, units: [0], kept: 1, members: []}}"), "must be text"),
    "a name that moves the cursor": (
        with_row(size=-1).replace("conv1:", '"\\e[2J\\nconv1":'),
        "must keep 1 to -1 distinct ascending units",
    ),
    "a negative size": (with_row(size=-8), "must keep 1 to -8"),
    "a size that is a switch": (with_row(size=True, kept=1, units=[0]), "must keep 1 to True"),
    "a size that is a fraction": (with_row(size=8.0), "must keep 1 to 8.0"),
    "bits of a huge size": (
        with_row(size=10**12, bits="gA==", units=None).replace("units: null", ""),
        "a bit for each",
    ),
    "bits of a negative size": (
        with_row(size=-1, bits="gA==", units=None).replace("units: null", ""),
        "a bit for each",
    ),
    "bits that are no base64": (with_row(size=8, bits="%%%%", units=None).replace("units: null", ""), "is damaged"),
    "units that are a path": (with_row(units="../../etc/passwd"), "distinct ascending units"),
    "units that are switches": (with_row(units=[False, True]), "distinct ascending units"),
    "members that are paths of paths": (with_row(members=[["../.."]]), "must be text"),
}


@pytest.mark.parametrize("name", RATIOS)
def test_a_ratio_table_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, says = RATIOS[name]
    put("ratios.yaml", content)
    told = refused(capsys, "finetune", "ratios=ratios.yaml")
    assert says in told
    assert "ratios.yaml" in told


def test_a_table_for_another_place_than_the_model_is_refused() -> None:
    """A path for a group, and numbers that no network has: the model is asked, never the file system."""
    model = network()
    for name, size in (("../../etc/passwd", 8), ("conv1", 10**9)):
        put("ratios.yaml", with_row(size=size).replace("conv1:", f"{name}:"))
        with pytest.raises(InputError, match="it is another architecture"):
            RatioTable.load("ratios.yaml").prune(model, INPUTS)
    put("ratios.yaml", with_row(size=10**9).replace("grain: channel", "grain: n_m"))
    with pytest.raises(InputError):
        RatioTable.load("ratios.yaml").prune(model, INPUTS)
    put("ratios.yaml", with_row().replace("grain: channel", "grain: os.system"))
    with pytest.raises(InputError, match="grain must be one or several of"):
        RatioTable.load("ratios.yaml").prune(model, INPUTS)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_not_waited_for(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = "/dev/zero" if kind == "device" else "ratios.yaml"
    if kind == "folder":
        Path(path).mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    says = "Is a directory" if kind == "folder" else "it must be a regular file"
    assert says in refused(capsys, "finetune", f"ratios={path}")
    Path("run").mkdir()
    Path("run/config.yaml").symlink_to(Path(path).absolute())
    assert says in refused(capsys, "measure", "run")


# ------------------------------------------------------------------------------------------------------- weights


def safe(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, of a length that may be a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int = 0, end: int = 4, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HUGE = 2**40
WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no safetensors file"),
    "a pickle": (PICKLED, "no safetensors file"),
    "an archive of PyTorch": (b"PK\x03\x04" + PICKLED, "no safetensors file"),
    "a header of exabytes": (safe({}, length=2**63), "its header must have at most"),
    "a header past the end": (safe({}, length=10_000), "no safetensors file"),
    "a header that is no JSON": (safe(b"{" * 100), "no safetensors file"),
    "a header nested deeply": (safe(b'{"a":' * 50_000), "no safetensors file"),
    "a header that is no text": (safe(b"\xff" * 64), "no safetensors file"),
    "a tensor past the end": (safe({"conv1.weight": entry([1 << 30], 0, 1 << 32)}), "no safetensors file"),
    "sizes that do not agree": (safe({"conv1.weight": entry([100])}, b"1234"), "no safetensors file"),
    "a shape that overflows": (safe({"conv1.weight": entry([HUGE, HUGE])}, b"1234"), "no safetensors file"),
    "a negative shape": (safe({"conv1.weight": entry([-1])}, b"1234"), "no safetensors file"),
    "offsets that run back": (safe({"conv1.weight": entry([1], 8, 4)}, b"1" * 8), "no safetensors file"),
    "a hole": (safe({"conv1.weight": entry([1], 4, 8)}, b"1" * 8), "no safetensors file"),
    "two tensors in one place": (
        safe({"conv1.weight": entry([1]), "conv1.bias": entry([1])}, b"1" * 4),
        "no safetensors file",
    ),
    "an unknown type": (safe({"conv1.weight": entry([1], dtype="OBJ")}, b"1" * 4), "no safetensors file"),
    "another shape": (safe({"conv1.weight": entry([1])}, b"1" * 4), "its 'conv1.weight' is [1], the network's"),
    "no bytes": (safe({"conv1.weight": entry([0, 2**62], 0, 0)}), "its 'conv1.weight' is [0, "),
    "another name": (safe({"../../evil": entry([1])}, b"1" * 4), "it has a tensor '../../evil', the network has none"),
    "no tensor": (safe({}), "Error(s) in loading state_dict"),
}


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, RatioTable, bytes]:
    model = network()
    table = table_of(model)
    return model, table, safetensors.torch.save(table.prune(model, INPUTS).state_dict())


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_refused(name: str, pruned: tuple[nn.Module, RatioTable, bytes]) -> None:
    content, says = WEIGHTS[name]
    path = put("pruned.safetensors", content)
    model, table, _ = pruned
    with pytest.raises(InputError, match=r"pruned\.safetensors does not hold the weights") as told:
        table.rebuild(model, INPUTS, path)
    assert says in str(told.value)
    with pytest.raises(
        InputError, match=r"task\.checkpoint=pruned\.safetensors (cannot be read|does not fit the model)"
    ):
        load_weights(copy.deepcopy(model), "", str(path))
    with pytest.raises(InputError, match=r"^weights=pruned\.safetensors (cannot be read|does not fit the model)"):
        fill(copy.deepcopy(model), path, "weights")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_truncated_weights_are_refused(keep: float, pruned: tuple[nn.Module, RatioTable, bytes]) -> None:
    model, table, content = pruned
    path = put("pruned.safetensors", content[: int(keep * len(content))])
    with pytest.raises(InputError, match="no safetensors file"):
        table.rebuild(model, INPUTS, path)
    put("pruned.safetensors", content)
    table.rebuild(model, INPUTS, path)


@pytest.mark.parametrize("name", [*WEIGHTS, "another checksum", "larger than the dense network"])
def test_a_kept_network_is_left_aside_with_a_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    networks, model = Networks(Path("kept")), nn.Conv2d(2, 2, 1)
    networks.put("good", model)
    within = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert networks.get("good", within) is not None
    if name in WEIGHTS:
        put("kept/bad.safetensors", WEIGHTS[name][0])
    else:
        other = model if name == "another checksum" else nn.Conv2d(2, 3, 1)
        networks.put("bad", other)
    if name == "another checksum":
        tensors = safetensors.torch.load_file("kept/bad.safetensors")
        safetensors.torch.save_file(tensors, "kept/bad.safetensors", {"sha256": "0"})
    assert networks.get("bad", within) is None
    assert "bad.safetensors is damaged" in caplog.text
    assert "made again" in caplog.text


# ---------------------------------------------------------------------------------------------------------- data


def npy(shape: Any, data: bytes = b"", descr: str = "'|u1'", version: int = 1) -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (63 - len(head) % 64) + b"\n"
    length = struct.pack("<H", len(head)) if version == 1 else struct.pack("<I", len(head))
    return b"\x93NUMPY" + bytes([version, 0]) + length + head + data


def npz(x_train: bytes, **more: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"x_train": x_train, **more}.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def encrypted() -> bytes:
    content = bytearray(npz(npy((1,), b"1")))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def lying() -> bytes:
    """Ten megabytes that are said to be 200 bytes."""
    content = bytearray(npz(npy((10_000_000,), bytes(10_000_000))))
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = struct.pack("<I", 200)
    return bytes(content)


DATA: dict[str, tuple[bytes, str]] = {
    "a pickle": (PICKLED, "not a zip file"),
    "one array": (npy((HUGE,)), "not a zip file"),
    "a truncated archive": (npz(npy((9,), b"1" * 9))[:-30], "not a zip file"),
    "an array of objects": (npz(objects()), "Object arrays cannot be loaded"),
    "a shape of terabytes": (npz(npy((HUGE,))), "x_train must have at most 153,600,000 bytes"),
    "a negative shape": (npz(npy((-1, 32))), "x_train must have at most"),
    "a shape that overflows": (npz(npy((2**40, 2**40, 2**40))), "x_train must have at most"),
    "a shape that is code": (npz(npy(f"__import__('os').mkdir('{RAN}')")), "is no npz with x_train"),
    "a type that is code": (npz(npy((1,), descr=f"__import__('os').mkdir('{RAN}')")), "is no npz with x_train"),
    "a header of a later version": (npz(npy((1,), b"1", version=9)), "is no npz with x_train"),
    "an array that ends early": (npz(npy((1000,), b"1")), "is no npz with x_train"),
    "no array of that name": (npz(npy((1,), b"1")), "y_train"),
    "an array that is larger than it says": (lying(), "is no npz with x_train"),
    "an encrypted array": (encrypted(), "encrypted"),
}


@pytest.mark.parametrize("name", DATA)
def test_an_archive_of_arrays_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, says = DATA[name]
    put("data.npz", content)
    told = refused(capsys, "search", "task=cifar10_resnet20", "task.data=data.npz")
    assert "task.data=data.npz is no npz with x_train" in told
    assert says in told


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(gzip.compress(b"1" * 1000)[:-8], "ended before", id="one cut short"),
        pytest.param(gzip.compress(b"1" * 1000) + b"more", "Not a gzipped file", id="one with more behind it"),
        pytest.param(PICKLED, "Not a gzipped file", id="a pickle renamed"),
    ],
)
def test_a_zipped_file_is_refused(content: bytes, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data").mkdir()
    put("data/train-images-idx3-ubyte.gz", content)
    told = refused(capsys, "search", "task.data=data")
    assert "task.data: data/train-images-idx3-ubyte.gz cannot be read" in told
    assert says in told


def test_a_record_file_that_does_not_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data").mkdir()
    Path("data/data_batch_1.bin").symlink_to("/dev/zero")
    assert "regular file" in refused(capsys, "search", "task=cifar10_resnet20", "task.data=data")
    Path("data/data_batch_1.bin").unlink()
    with Path("data/data_batch_1.bin").open("wb") as file:
        file.truncate(2**40)
    assert "at most 30,730,000 bytes" in refused(capsys, "search", "task=cifar10_resnet20", "task.data=data")


# ---------------------------------------------------------------------------------------------------- a run's folder

CONFIG = "task: {_target_: tiny.make_task}\ndevice: {_target_: autoprune.meters.device.Device}\nseed: 0\n"
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "a tag that calls": (f"{CONFIG}x: !!python/object/apply:os.mkdir ['{RAN}']", "could not determine a constructor"),
    "a billion laughs": (LAUGHS + CONFIG, "it must hold no alias"),
    "nested deeply": (f"{CONFIG}x: {DEEP}", "nested at most 32 deep"),
    "many values": (f"{CONFIG}x: [{'1,' * 20_000}]", "at most 10,000 values"),
    "a list": ("[1, 2]", "is not the folder of a search"),
    "a task that is text": (CONFIG.replace("{_target_: tiny.make_task}", "evil"), "is not the folder of a search"),
    "a seed that is text": (CONFIG.replace("seed: 0", "seed: ${oc.env:HOME}"), "seed must be a whole number"),
    "a pickle": (PICKLED, "is not the folder of a search"),
    "a variable of the environment": (
        CONFIG.replace("tiny.make_task", '"${oc.env:SECRET}.make_task"'),
        "task._target_=${oc.env:SECRET}.make_task",
    ),
    "a module that is a path": (CONFIG.replace("tiny.make_task", "../../evil"), "task._target_=../../evil"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_refused(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    content, says = CONFIGS[name]
    Path("run").mkdir()
    put("run/config.yaml", content)
    told = refused(capsys, "measure", "run")
    assert says in told
    assert "hunter2" not in told


GROUPS = {"conv1": {"size": 8, "kept": 4, "ratio": 0.5}}
LATENCY = asdict(Measurement(value=5.0, unit="ms", low=4.0, high=6.0, kind="measured", notes=("5 processes",)))
RESULT: dict[str, Any] = {
    "task": "t",
    "strategy": "s",
    "seed": 0,
    "device": "d",
    "budgets": [
        {"asked": "latency_5ms", "cost": "latency_ms", "limit": 5.0, "unit": "ms", "met": True, "value": 5.0}
        | {"low": 4.0, "high": 6.0}
    ],
    "score": {"metric": "accuracy", "test_dense": 0.9, "test_recovered": 0.8},
    "costs": {"latency_ms": {"dense": 10.0, "predicted": 5.0, "measured": LATENCY}},
    "groups": GROUPS,
    "findings": {},
    "refused": {},
    "versions": {},
    "notes": [],
    "search": {"trials": 1, "evaluations": 1, "cache_hits": 0, "failed": 0, "shared": 0.0, "seconds": 1.0}
    | {"study": "s", "storage": None},
}
TRIALS = "number,recovery,parent,about,error,loss_change,loss_change_low,loss_change_high,ratio:conv1\n"
TRIALS += "0,probe,,,,0.1,0.0,0.2,0.5\n"


def with_result(**change: Any) -> str:
    return json.dumps({**RESULT, **change})


EPISODES = [{"reward": 1.0, "sigma": 0.5}]
RESULTS: dict[str, tuple[str | bytes, str]] = {
    "a truncated result": (json.dumps(RESULT)[:-50], TRIALS),
    "a pickle": (PICKLED, TRIALS),
    "nested deeply": (DEEP, TRIALS),
    "a number of many digits": (json.dumps(RESULT).replace('"seed": 0', '"seed": ' + "9" * 5000), TRIALS),
    "a list": ("[]", TRIALS),
    "a dense cost of nothing": (json.dumps(RESULT).replace('"dense": 10.0', '"dense": 0'), TRIALS),
    "a cost that is not a number": (json.dumps(RESULT).replace('"dense": 10.0', '"dense": "much"'), TRIALS),
    "a cost that is a path": (
        json.dumps(RESULT).replace("latency_ms", "../evil"),
        TRIALS.replace("number,", "score,number,").replace("0,probe", "0.5,0,probe"),
    ),
    "a winner who is not there": (with_result(rounds=[{"winner": 99, "proposals": []}]), TRIALS),
    "episodes without a beginning": (with_result(episodes=EPISODES), TRIALS),
    "held-out networks of infinite time": (with_result(cost_table={"held_out": [[1e999, 1]], "answers": []}), TRIALS),
    "a short row": (json.dumps(RESULT), TRIALS + "1\n"),
    "a field of a megabyte": (json.dumps(RESULT), TRIALS + "x" * 2**20 + "," * 8 + "\n"),
    "a ratio that is none": (json.dumps(RESULT), TRIALS.replace("0.5\n", "rm -rf\n")),
    "rows that are binary": (json.dumps(RESULT), "\udcff\udcfe"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result, trials = RESULTS[name]
    Path("run").mkdir()
    put("run/result.json", result)
    put("run/trials.csv", trials.encode(errors="surrogateescape"))
    assert "run holds no finished search" in refused(capsys, "report", "run")
    assert not Path("run/report.html").exists()


def test_what_the_results_are_damaged_from_is_whole() -> None:
    Path("run").mkdir()
    put("run/result.json", json.dumps(RESULT))
    put("run/trials.csv", TRIALS)
    assert cli.main(["report", "run"]) == 0
    assert "Sensitivity" in Path("run/report.html").read_text()


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="its lists and mappings are nested too deeply"):
        untrusted.json_of(put("result.json", DEEP))
    with pytest.raises(ValueError, match="line 3 must have 9 cells as the first, it has 1"):
        untrusted.rows_of(put("trials.csv", TRIALS + "1\n"))


def test_a_page_shows_markup_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>"
    Path("run").mkdir()
    put("run/result.json", with_result(task=evil, groups={evil: GROUPS["conv1"]}, findings={evil: evil}, notes=[evil]))
    put("run/trials.csv", TRIALS.replace("conv1", evil))
    assert cli.main(["report", "run"]) == 0, capsys.readouterr().err
    assert "<script" not in Path("run/report.html").read_text()


def test_a_page_shows_formulas_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    put("run/result.json", with_result(groups={"$\\frac{$": GROUPS["conv1"]}))
    put("run/trials.csv", TRIALS.replace("conv1", "$\\frac{$"))
    assert cli.main(["report", "run"]) == 0, capsys.readouterr().err
    assert Path("run/report.html").read_text().count("$\\frac{$") == 3  # two figures and the table


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"dense": 10.0', '"dense": NaN'),
        ('"dense": 10.0', '"dense": -1'),
        ('"limit": 5.0', '"limit": "[/red]"'),
        ('"value": 5.0, "unit"', '"value": 0, "unit"'),
        ('"low": 4.0, "high": 6.0, "samples"', '"low": 6.0, "high": 4.0, "samples"'),
        ('"notes": ["5 processes"]', '"notes": [5]'),
        ('"kind": "measured"', '"kind": "made up"'),
    ],
)
def test_a_latency_of_a_run_is_refused(old: str, new: str, pruned: tuple[nn.Module, RatioTable, bytes]) -> None:
    model, table, content = pruned
    table.save("ratios.yaml")
    put("pruned.safetensors", content)
    put("result.json", json.dumps(RESULT).replace(old, new))
    assert new in Path("result.json").read_text()
    task = Task(model=model, inputs=INPUTS, **dict.fromkeys(TASK))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no run that measured a latency"):
        measuring.measured_again(task, Path())


TASK = ("name", "train", "search", "test", "loss", "metric", "lr")


def test_markup_in_a_budget_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    from autoprune.console import show_again

    then = Measurement(value=5, unit="ms", low=4, high=6, kind="measured", notes=("[/red]",))
    assert show_again(then, then, {"[/red]": Budget("latency_ms", 7, "ms")})
    assert "budget [/red]: met" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ what is kept between runs

HEAD = ",".join(compare.Row.__annotations__) + "\n"
ROW = "flops_50pct,random,0,True,0.9,0.9,0.8,0.9,10,3.0,2.5,2.0,0.9,0.8,0.9,,,,abc\n"


@pytest.mark.parametrize(
    "content",
    [
        PICKLED,
        (HEAD + ROW[:-20]).encode(),
        (HEAD + ROW.replace("True", "maybe")).encode(),
        (HEAD + ROW.replace("0.8", "nan")).encode(),
        (HEAD + ROW.replace("10,", "9" * 5000 + ",")).encode(),
        (HEAD + "x" * 2**20 + ROW).encode(),
        HEAD.replace("seed", "../../seed").encode() + ROW.encode(),
    ],
)
def test_a_comparison_is_refused(content: bytes) -> None:
    assert len(compare.read(put("comparison.csv", HEAD + ROW))) == 1
    with pytest.raises(InputError, match=r"comparison\.csv is of no comparison"):
        compare.read(put("comparison.csv", content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        PICKLED,
        DEEP.encode(),
        b"[]",
        b'{"score": NaN, "scores": [1, 1], "losses": [1, 1], "sizes": [1, 1]}',
        b'{"score": 1, "scores": [1, 1], "losses": [1, 1e999], "sizes": [1, 1]}',
        b'{"score": 1, "scores": [1, 1], "losses": [1, 1], "sizes": [1, -1]}',
        b'{"score": 1, "scores": [1], "losses": [1], "sizes": [1]}',
        b'{"score": 1, "scores": "ab", "losses": [1, 1], "sizes": [1, 1]}',
        b'{"score": 1, "scores": [1, 1], "losses": [1, 1], "sizes": [1, ' + b"9" * 5000 + b"]}",
    ],
)
def test_a_cached_score_is_left_aside_with_a_line(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    good = Scored(0.5, (0.4, 0.6), (1.0, 2.0), (10.0, 10.0))
    write_cached(Path("score.json"), good)
    assert read_cached(Path("score.json"), 2) == good
    assert read_cached(Path("absent.json"), 2) is None
    assert not caplog.text
    assert read_cached(put("score.json", content), 2) is None
    assert "score.json is damaged" in caplog.text


def costs() -> CostTable:
    shape = Shape(operator="Conv2d", kind="c", sides=((0.0, {0: 1.0}), (3.0, {})), work=9.0)
    samples = tuple(Sample((n,), 1.0 + n, {"conv1": 0.5}) for n in range(1, 10))
    return CostTable(
        dense=Measurement.exact(9.0, "ms", "measured"),
        samples=samples,
        held_out=3,
        shapes={"conv1": shape},
        by="network",
        facts={"device": "here"},
    )


COSTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda v: [],
    "another schema": lambda v: v | {"schema": 99},
    "facts of another device": lambda v: v | {"facts": {"device": "there"}},
    "no samples": lambda v: v | {"samples": []},
    "more held out than there are": lambda v: v | {"held_out": 10**9},
    "a time that is infinite": lambda v: v | {"samples": [*v["samples"][1:], v["samples"][0] | {"total": 1e999}]},
    "a time below 0": lambda v: v | {"samples": [*v["samples"][1:], v["samples"][0] | {"total": -1}]},
    "a width that is a word": lambda v: v | {"samples": [*v["samples"][1:], v["samples"][0] | {"kept": ["x"]}]},
    "a layer without a shape": lambda v: v | {"shapes": {}},
    "a side of no group": lambda v: (
        v | {"shapes": {"conv1": v["shapes"]["conv1"] | {"sides": [[0, [[7, 1]]], [3, []]]}}}
    ),
    "a gate of no group": lambda v: v | {"shapes": {"conv1": v["shapes"]["conv1"] | {"gate": -1}}},
    "a dense time that is none": lambda v: v | {"dense": v["dense"] | {"value": None}},
    "a way to fit that is none": lambda v: v | {"by": "os.system"},
}


@pytest.mark.parametrize("name", [*COSTS, "nested deeply", "a pickle", "of another number of groups"])
def test_a_cost_table_is_refused(name: str) -> None:
    table = costs()
    path = profile.save(Path(), table)
    assert profile.load(Path(), table.facts, 1) == table
    if name in COSTS:
        put(str(path), json.dumps(COSTS[name](table.to_json())))
    if name in ("nested deeply", "a pickle"):
        put(str(path), DEEP if name == "nested deeply" else PICKLED)
    with pytest.raises(InputError, match=rf"the cost table {path.name} is damaged .*: delete it"):
        profile.load(Path(), table.facts, 2 if name == "of another number of groups" else 1)


@pytest.mark.parametrize("content", [DEEP, '{"dense": {"value": NaN}}', json.dumps({"dense": LATENCY | {"low": 9}})])
def test_a_kept_measurement_is_refused(content: str) -> None:
    class Absent:
        name, unit = "rss_mb", "MB"

        def measure(self, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Measurement:
            raise AssertionError

    put(str(profile.path_of(Path(), {"cost": "rss_mb"})), content)
    with pytest.raises(InputError, match=r"the measurement .* is damaged .*: delete it"):
        kept.measured(Absent(), network(), INPUTS, device=Device(), facts={}, folder=Path())


# ----------------------------------------------------------------------------------------------------- the study

SPACE = PruningSpace((Group(name="a", size=8, levels=(0.0, 0.5)),))
MACS = Measurement.exact(5.0, "MACs", "counted")
TRIAL = Trial(
    number=0,
    candidate=Candidate(ratios=(0.5,)),
    score=0.5,
    score_low=0.4,
    score_high=0.6,
    loss=1.0,
    costs={"macs": MACS},
    feasible=True,
)


def opened() -> Study:
    return Study(
        "sqlite:///studies.db", "mine", fingerprint={"a": 1}, space=SPACE, budgets=[Budget("macs", 6.0, "MACs")]
    )


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with contextlib.chdir(tmp_path_factory.mktemp("study")):
        with opened() as study:
            study.record(TRIAL)
        with opened() as study:
            assert study.trials() == (TRIAL,)
        with contextlib.closing(sqlite3.connect("studies.db")) as file:
            file.execute("VACUUM INTO 'whole.db'")
        return Path("whole.db").read_bytes()


def trial(**change: Any) -> str:
    return json.dumps(json.dumps(TRIAL.to_json() | change))


def candidate(**change: Any) -> str:
    return trial(candidate=TRIAL.to_json()["candidate"] | change)


IN_TRIAL = "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'trial'"
IN_STUDY = "UPDATE study_user_attributes SET value_json = ? WHERE key = 'fingerprint'"
ROWS: dict[str, tuple[str, str]] = {
    "cut short": (IN_TRIAL, json.dumps(json.dumps(TRIAL.to_json())[:-20])),
    "nested deeply": (IN_TRIAL, json.dumps(DEEP)),
    "a list": (IN_TRIAL, json.dumps("[]")),
    "a number for a trial": (IN_TRIAL, "5"),
    "an unknown key": (IN_TRIAL, trial(evil=1)),
    "a score that is not a number": (IN_TRIAL, trial(score=float("nan"))),
    "a loss that is infinite": (IN_TRIAL, trial(loss=1e999)),
    "a loss of many digits": (IN_TRIAL, json.dumps(json.dumps(TRIAL.to_json()).replace("1.0", "9" * 5000))),
    "a score that is a word": (IN_TRIAL, trial(score="best")),
    "a number below 0": (IN_TRIAL, trial(number=-1)),
    "a number that is a list": (IN_TRIAL, trial(number=[0])),
    "no cost": (IN_TRIAL, trial(costs={})),
    "a cost that is infinite": (IN_TRIAL, trial(costs={"macs": asdict(MACS) | {"value": 1e999}})),
    "ratios that are words": (IN_TRIAL, candidate(ratios=["../.."])),
    "a recovery that is none": (IN_TRIAL, candidate(recovery="os.system")),
    "a fidelity of 2": (IN_TRIAL, candidate(fidelity=2)),
    "an attribute that is no JSON": (IN_TRIAL, "{"),
    "a fingerprint that is no JSON": (IN_STUDY, "{"),
    "a fingerprint that is a list": (IN_STUDY, "[1]"),
    "a state that is none": ("UPDATE trials SET state = ?", "WEIRD"),
    "a distribution that is none": ("UPDATE trial_params SET distribution_json = ?", "{}"),
    "a direction that is none": ("UPDATE study_directions SET direction = ?", "SIDEWAYS"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_damaged_study_is_refused(name: str, database: bytes) -> None:
    put("studies.db", database)
    statement, value = ROWS[name]
    with contextlib.closing(sqlite3.connect("studies.db")) as file:
        assert file.execute(statement, (value,)).rowcount > 0
        file.commit()
    unreadable = name.endswith(("no JSON", "that is none")) and name != "a recovery that is none"
    says = "cannot be used: " if unreadable else "is damaged"
    with pytest.raises(InputError, match=rf"sqlite:///studies\.db {says}"), opened() as study:
        study.trials()


@pytest.mark.parametrize("keep", [50, 100, 5000, 60_000])
def test_a_truncated_database_is_refused(keep: int, database: bytes) -> None:
    put("studies.db", database[:keep])
    damaged = pytest.raises(InputError, match=r"study\.storage=sqlite:///studies\.db cannot be used: ")
    with damaged, opened() as study:
        study.trials()


@pytest.mark.parametrize("words", ["sqlite:////dev/null/x.db", "sqlite:///folder", "sqlite:///pipe", "sqlite:///a\0b"])
def test_a_storage_that_is_none_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from autoprune.storage import check_storage

    Path("folder").mkdir()
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="cannot be used"):
        check_storage(words)


def test_the_name_of_a_study_is_no_path() -> None:
    for name in ("../../evil", "/evil", "..", "a\0b", "evil" * 1000):
        folder = folder_beside("sqlite:///kept/studies.db", name)
        assert folder is not None
        assert folder.parent == Path("kept/studies_weights")
        assert len(folder.name) < 150
        assert folder.name.isprintable()


# ------------------------------------------------------------------------------------------------- the command line

EASY = """
import torch
from torchmetrics.classification import MulticlassAccuracy
from autoprune import Task
def make_task(name="easy"):
    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]
    return Task(name=name, model=torch.nn.Linear(3, 2), inputs=(torch.zeros(2, 3),), train=batches, search=batches,
                test=batches, loss=torch.nn.functional.cross_entropy, metric=MulticlassAccuracy(2), lr=0.1)
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("search task._target_=easy.make_task task.name=../../evil", "the task's name is part of a path"),
        ("search task._target_=easy.make_task task.name=/evil", "the task's name is part of a path"),
        ("compare task._target_=easy.make_task name=../../../evil", "name is part of a path"),
        ("search device=../../evil", "evil"),
        ("search task=../../evil", "evil"),
        ("search seed=${seed}", "seed"),
        ("search seed=${oc.env:NOT_THERE}", "NOT_THERE"),
        ("search task.data=${oc.decode:[${oc.env:NOT_THERE}]}", "NOT_THERE"),
        ("search 'seed=${oops:1}'", "oops"),
        ("search budget=macs_" + "9" * 400 + "M", "the limit must be finite"),
        ("search seed=" + "9" * 5000, "seed"),
        ("search profile.networks=" + "9" * 30, "profile.networks must be below 2**63"),
        ("search finetune.epochs=nan", "finetune.epochs must be a number, got nan"),
        ("search finetune.epochs=inf", "fine-tune: epochs must be finite, got epochs=inf"),
        ("search task._target_=easy.make_task budget=flops_50pct seed=" + "9" * 30, "seed must be below 2**63"),
        ("search budget=" + "[" * 2000, "cannot read"),
        ("search " + "x" * 100_000 + "=1", "cannot read"),
        ("measure run\0", "is not the folder of a search"),
        ("report run\0", "holds no finished search"),
        ("finetune ratios=a\0b", "cannot read"),
    ],
)
def test_a_command_line_is_refused(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    put("easy.py", EASY)
    told = refused(capsys, *shlex.split(words))
    assert says in told
    assert not list(Path().absolute().parent.rglob("*evil*"))


# ------------------------------------------------------------------------------------------------- the device

STARTED = {"pid": 1, "machine": "m", "runtime": "r", "threads": 1, "processor": "p"}
TIMES = {"wall_ms": [1.0] * 5, "cpu_ms": [1.0] * 5, "stable": True, "narrow": True}
TIME: dict[str, Any] = {"do": "time", "models": [{}], "plan": {"block": 5}}


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ({"do": "start"}, []),
        ({"do": "start"}, STARTED | {"processor": b"bytes"}),
        ({"do": "start"}, {"pid": 1}),
        ({"do": "peak", "models": [{}]}, {"peak_mb": float("nan"), "reset": True}),
        ({"do": "peak", "models": [{}]}, {"peak_mb": "-1", "reset": True}),
        (TIME, {"precision": ["f32"], "rows": []}),
        (TIME, {"precision": ["f32"], "rows": [TIMES, TIMES]}),
        (TIME, {"precision": ["f32"], "rows": [TIMES | {"wall_ms": [1.0] * 4}]}),
        (TIME, {"precision": ["f32"], "rows": [TIMES | {"wall_ms": [1.0] * 4, "cpu_ms": [1.0] * 4}]}),
        (TIME, {"precision": ["f32"], "rows": [TIMES | {"wall_ms": [-1.0] * 5}]}),
        (TIME, {"precision": ["f32"], "rows": [TIMES | {"wall_ms": ["1"] * 5}]}),
        (TIME | {"layers_of": {}}, {"precision": ["f32"], "rows": [TIMES], "layers": {"a": float("inf")}}),
        ({"do": "energy", "models": [{}], "plan": {}}, {"counter": "c", "why": "", "rows": [TIMES | {"mj": [None]}]}),
    ],
)
def test_an_answer_of_a_device_is_refused(message: dict[str, Any], answer: Any) -> None:
    answers.check({"do": "start"}, STARTED)
    answers.check(TIME, {"precision": ["f32"], "rows": [TIMES]})
    with pytest.raises(ValueError, match=r"instead of|missing or not of its kind|rows"):
        answers.check(message, answer)


def test_a_device_that_lies_is_refused_and_runs_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process at the other end: it asks for code to be run here, then answers with nonsense."""
    code = f"import os; os.mkdir({str(Path(RAN).absolute())!r})"
    source = f"""
from execnet.gateway_base import Message, dumps_internal
for message in channel:
    channel.gateway._send(Message.CHANNEL_EXEC, 99, dumps_internal(({code!r}, None, None, {{}})))
    channel.send({{"pid": 1, "processor": ["no text"]}})
"""
    lying = types.ModuleType("lying")
    lying.__file__ = str(put("lying.py", source))
    monkeypatch.setitem(sys.modules, "autoprune.meters.worker", lying)
    monkeypatch.setattr(autoprune.meters, "worker", lying, raising=False)
    with pytest.raises(InputError, match="'machine' is missing or not of its kind"):
        Worker(Device())


# --------------------------------------------------------------------------------------------- memory and time

HEAVY = r"""
import gzip, io, json, resource, sys, time, zipfile
from pathlib import Path

import numpy as np
import test_hostile as t
from autoprune import untrusted
from autoprune.core import InputError
from autoprune.prune import RatioTable
from autoprune.tasks.cifar10_resnet20 import make_task as cifar10
from autoprune.tasks.fashion_mnist_resnet20 import make_task as fashion

model = t.network()
table = t.table_of(model)
table.prune(model, t.INPUTS)
MB = 2**20


def sparse(path, size, head=b""):
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def zipped(path, size):
    path.write_bytes(gzip.compress(bytes(MB)) * (size // MB))


def archive(path, size, head):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        with made.open("x_train.npy", "w", force_zip64=True) as file:
            file.write(head)
            for _ in range(size // MB):
                file.write(bytes(MB))


Path("idx").mkdir()
zipped(Path("idx/train-images-idx3-ubyte.gz"), 2000 * MB)
archive("bomb.npz", 800 * MB, t.npy((800 * MB,)))
archive("header.npz", 800 * MB, b"\x93NUMPY\x02\x00\xff\xff\xff\x7f")
sparse("sparse.safetensors", 2**40, t.safe({"conv1.weight": t.entry([2**38], 0, 2**40 - 4096)} | {"__metadata__": {}}))
names = {f"t{i}": t.entry([0], 0, 0) for i in range(400_000)}
Path("header.safetensors").write_bytes(t.safe(names))
Path("ones.yaml").write_text("[" + "1," * 30_000_000)
Path("maps.yaml").write_text("- {}\n" * 600_000)
Path("most.yaml").write_text("- {}\n" * 499_000)
Path("text.yaml").write_text("a: " + "x" * 65 * MB)
Path("deep.yaml").write_text("{a: " * 10_000_000)
Path("laughs.yaml").write_text(t.LAUGHS)
Path("bits.yaml").write_text(t.with_row(size=10**13, bits="gA==", units=None).replace("units: null", ""))
sparse("sparse.yaml", 2**40)
Path("maps.json").write_text("[" + "{}," * 20_000_000 + "{}]")
Path("most.json").write_text("[" + "{}," * 990_000 + "{")
Path("deep.json").write_text('{"a":' * 10_000_000)
sparse("sparse.json", 2**40)
Path("wide.csv").write_text("a," * 1_000_000 + "\n" + "1\n" * 100_000)
Path("long.csv").write_text("a\n" + "1\n" * 10_000_000)
Path("many.csv").write_text("a," * 30_000_000)

DOORS = {
    "idx": lambda path: fashion(data=path),
    "npz": lambda path: cifar10(data=path),
    "safetensors": lambda path: table.rebuild(model, t.INPUTS, path),
    "yaml": RatioTable.load,
    "json": untrusted.json_of,
    "csv": untrusted.rows_of,
}
print(json.dumps({"names": sorted(p.name for p in Path().iterdir())}))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * MB,) * 2)
for path in sorted(Path().iterdir()):
    began = time.perf_counter()
    try:
        DOORS[path.suffix[1:] or path.name](str(path))
        said = None
    except ValueError as error:  # InputError is one
        said = str(error)
    print(json.dumps({"name": path.name, "said": said, "s": time.perf_counter() - began}), flush=True)
"""


@pytest.mark.slow
def test_memory_and_time_are_bounded() -> None:
    """All in one process that may take 700 MB more than it has: bombs of gigabytes, files of a terabyte, lists of
    lists, and as many values as are still read."""
    done = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    head, *rows = map(json.loads, done.stdout.splitlines())
    print("\n".join(f"{row['name']}: {row['s']:.2f} s, {row['said']}" for row in rows))  # noqa: T201
    assert [row["name"] for row in rows] == head["names"]
    for row in rows:
        assert row["said"], row
        assert "\n" not in row["said"], row
        assert "emory" not in row["said"], row
        assert row["s"] < 20, row
