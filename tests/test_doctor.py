"""The doctor names what is wrong with a task, a machine and a storage, and leaves all of them as they were."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import json
import os
import random
import sqlite3
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from autoprune import InputError, Task, cli, diagnosis, surroundings
from autoprune.borrowing import seeded
from autoprune.checkup import Plan, check_up
from autoprune.diagnosis import examine
from autoprune.findings import Finding
from autoprune.meters.device import Device
from autoprune.recover import FineTune, finetune
from autoprune.stock import stock

CLASSES = 4


class Net(nn.Module):
    """Two convolutions and a classifier. always: dropout in evaluation mode too. idle: a layer that nothing reads."""

    def __init__(self, *, always: float = 0.0, idle: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, CLASSES)
        self.always = always
        if idle:
            self.idle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(x))))).mean((2, 3))
        return self.last(F.dropout(x, self.always, training=True) if self.always else x)  # type: ignore[no-any-return]


class Shuffled:
    """Batches in an order that is drawn at each reading, from the global generator or from one of its own."""

    def __init__(self, batches: list[Any], own: bool = False) -> None:
        self.batches, self.generator = batches, torch.Generator().manual_seed(0) if own else None

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i] for i in torch.randperm(len(self.batches), generator=self.generator).tolist())


def images(count: int, seed: int, size: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Classes are textures of noise that one layer can tell, but not surely."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    x = torch.randn(count, 1, 6, 6, generator=draw) + 0.7 * labels.view(-1, 1, 1, 1)
    return list(zip(x.split(size), labels.split(size), strict=True))


@functools.cache
def trained() -> nn.Module:
    with seeded(0):
        model = Net()
        plan = FineTune(epochs=3, lr_fraction=1, teach=0)
        finetune(model, images(800, 1), plan, loss=F.cross_entropy, lr=0.1)
    return model.train()


def task(**changes: Any) -> Task:
    search = images(400, 2)
    given = Task(
        name="toy",
        model=copy.deepcopy(trained()),
        inputs=(search[0][0][:1],),
        train=images(800, 1),
        search=search,
        test=images(200, 3),
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(CLASSES, average="micro"),
        lr=0.1,
    )
    return replace(given, **changes)


def checked(own: Task, *, device: Device | None = None, **plan: Any) -> dict[str, Finding]:
    try:
        traced = diagnosis.doctor(own).traced
    except InputError:
        traced = None
    found = check_up(own, traced, Plan(**({"images": 400} | plan)), device)
    return {finding.what: finding for finding in found}


def test_a_sound_task_has_nothing_to_mend_and_is_left_as_it_was() -> None:
    own = task(train=Shuffled(images(800, 1)))
    before = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    modes = [module.training for module in own.model.modules()]
    states = (random.getstate(), torch.get_rng_state(), str(np.random.get_state()))
    found = checked(own, images=300)
    status = {finding.what: finding.status for finding in found.values()}
    assert {what for what, its in status.items() if its != "ok"} <= {"noise"}, found
    assert {"runs", "train", "search", "test", "repeats", "score", "noise", "trained", "learns", "learns cut"} <= set(
        status
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in own.model.state_dict().items())
    assert [module.training for module in own.model.modules()] == modes
    assert all(p.grad is None for p in own.model.parameters())
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    assert states[2] == str(np.random.get_state())
    assert "400 examples in batches of 40, in one order" in found["search"].detail
    assert "augmented or shuffled" in found["train"].detail
    numbers = [float(word) for word in found["learns cut"].detail.split() if word.replace(".", "").isdigit()]
    assert numbers[1] < numbers[0]  # the loss of the network with every group halved falls


DETACHED = {"loss": lambda output, target: F.cross_entropy(output.detach(), target)}
WRONG: dict[str, tuple[Any, str, str, str]] = {
    "draws in evaluation": (lambda: {"model": Net(always=0.5)}, "repeats", "warning", "F.dropout"),
    "scores differ": (lambda: {"model": Net(always=0.5)}, "score", "warning", "another one the second time"),
    "shuffled search": (lambda: {"search": Shuffled(images(400, 2))}, "search", "warning", "shuffle=False"),
    "own generator": (lambda: {"train": Shuffled(images(400, 1), own=True)}, "train", "warning", "not the same twice"),
    "one left over": (lambda: {"train": images(401, 1)}, "train", "warning", "drop_last=True"),
    "one by one": (lambda: {"train": images(40, 1, 1)}, "train", "warning", "give larger batches"),
    "noise": (lambda: {"model": copy.deepcopy(trained())}, "noise", "warning", "hold out more, search has 400"),
    "a mask for all": (
        lambda: {name: [((x, torch.ones(1)), y) for x, y in images(80, 1)] for name in ("train", "search", "test")},
        "search",
        "failed",
        "hold 1 and 40 examples",
    ),
    "sizes": (lambda: {"search": images(40, 2) + images(60, 4, 30)}, "search", "warning", "batches of several sizes"),
    "learnt by heart": (
        lambda: {"train": images(400, 2) + images(400, 1)},
        "apart from train",
        "warning",
        "400 of 400",
    ),
    "chosen by": (lambda: {"test": images(400, 2)[:1]}, "apart from test", "warning", "40 of 400 images"),
    "untrained": (lambda: {"model": Net()}, "trained", "warning", "looks untrained"),
    "diverges": (lambda: {"lr": 1e30}, "learns", "failed", "lower Task.lr"),
    "nothing to learn": (lambda: DETACHED, "learns", "failed", "does not require grad"),
    "an idle layer": (
        lambda: {"model": Net(idle=True)},
        "learns",
        "warning",
        "no gradient reaches idle.weight, idle.bias",
    ),
    "few images": (lambda: {"search": images(80, 2)}, "score", "warning", "400 were asked for"),
    "no batch": (lambda: {"search": []}, "runs", "failed", "search holds no batch"),
    "read once": (lambda: {"train": iter(images(80, 1))}, "runs", "failed", "can be read only once"),
    "not run": (lambda: {"model": nn.Linear(2, 2)}, "runs", "failed", "the model fails on a search batch"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_way_out(case: str) -> None:
    changes, what, status, says = WRONG[case]
    with seeded(0):
        found = checked(task(**changes()))[what]
    assert found.status == status, found
    assert says in f"{found.detail} {found.way_out}"
    assert found.way_out or "apart" not in what


class Cache:
    """No tensor, and each prints otherwise."""


class Caching(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "cache": Cache()}


class OfLogits(MulticlassAccuracy):
    def update(self, output: Any, target: Tensor) -> None:
        super().update(output["logits"], target)


class OnMany(MulticlassAccuracy):
    """Accuracy, and no number on few images."""

    def compute(self) -> Tensor:
        found: list[Any] = [self.tp, self.fn]
        return super().compute() if sum(int(part.sum()) for part in found) > 100 else torch.tensor(torch.nan)


class Noisy:
    """The same images, with noise that is drawn anew."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return ((x + 0.01 * torch.randn_like(x), y) for x, y in self.batches)


def logits_loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], target)


def test_what_is_sound_though_uncommon_is_not_found_wrong() -> None:
    model = Caching()
    model.load_state_dict(trained().state_dict())
    own = task(model=model, loss=logits_loss, metric=OfLogits(CLASSES, average="micro"))
    assert checked(own)["repeats"].status == "ok"

    found = checked(task(metric=OnMany(CLASSES, average="micro"), search=images(400, 2, 200)))
    assert (found["score"].status, found["noise"].status) == ("ok", "ok")
    assert "not defined on 20 images" in found["noise"].detail

    with seeded(0):
        plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, CLASSES)).bfloat16()
    splits = {name: [(x.bfloat16(), y) for x, y in images(81, seed)] for seed, name in enumerate(("train", "search"))}
    halved = checked(task(model=plain, inputs=(splits["search"][0][0][:1],), **splits), images=81)
    assert halved["train"].status == "ok", "one example is left over, but no normalisation learns from it"
    assert halved["apart from train"].detail == "none of 81 images of search is among 81 of train"


def test_that_augmented_splits_are_apart_is_not_claimed() -> None:
    assert "cannot be told" in checked(task(train=Noisy(images(400, 2))))["apart from train"].detail
    assert "400 of 400" in checked(task(train=Shuffled(images(400, 2))))["apart from train"].detail


def test_no_more_images_are_asked_for_than_there_are() -> None:
    few, more = (checked(task(search=images(4000, 2)), images=count)["noise"].way_out for count in (1000, 400))
    assert not few or few.startswith("evaluator.images=")
    asked = int(more.partition("=")[2].partition(" ")[0])
    assert 400 < asked <= 4000


class Slow(Net):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Slow.passes += 1
        return super().forward(x)


def test_of_a_large_network_one_batch_is_tried_where_the_time_is_up() -> None:
    model = Slow()
    model.load_state_dict(trained().state_dict())
    found = checked(task(model=model, search=images(400, 2)), images=400, seconds=1e-6)
    assert " in 1 steps at a tenth" in found["learns"].detail
    assert "% of 40 images right" in found["trained"].detail
    hurried, Slow.passes = Slow.passes, 0
    checked(task(model=model), images=400)
    assert hurried < Slow.passes / 2


def test_noise_is_the_interval_of_the_paired_difference() -> None:
    own = task()
    found = checked(own, images=400)["noise"]
    (said,) = (float(word) for word in found.detail.split("below ")[1].split()[:1])
    traced = diagnosis.doctor(own).traced
    groups = traced.space.groups
    assert len(groups) == 2
    name = found.detail.partition("; of ")[2].partition(" ")[0]
    kept = [np.arange(8) for _ in groups]
    (which,) = (i for i, g in enumerate(groups) if g.name == name)
    weight = own.model.get_parameter(f"{name}.weight").detach().abs().sum((1, 2, 3))
    kept[which] = np.sort(np.argsort(-weight.numpy(), kind="stable")[:4])
    cut = traced.cut(copy.deepcopy(own.model).eval(), kept).eval()
    norm: Any = cut.get_submodule("norm")
    norm.reset_running_stats()
    norm.momentum = None
    norm.train()
    with torch.no_grad():
        for x, _ in list(own.train)[:2]:
            cut(x)
    cut.eval()
    dense = copy.deepcopy(own.model).eval()
    x, y = (torch.cat(part) for part in zip(*own.search, strict=True))
    with torch.no_grad():
        difference = ((cut(x).argmax(1) == y).double() - (dense(x).argmax(1) == y).double()).numpy()
    expected = 100 * stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
    assert said == pytest.approx(expected, rel=0.4)  # of 20 parts, and of single images
    assert found.status == ("ok" if said < 1 else "warning")


def test_a_runtime_that_takes_onnx_is_given_the_network() -> None:
    pytest.importorskip("onnxscript")
    found = checked(task(), device=Device(name="board", runtime="onnxruntime", place="CPUExecutionProvider"))["export"]
    assert found.status == "ok"
    assert "ONNX of" in found.detail


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that answers at once."""
    answer = {"counter": "", "why": "zeus is not installed there", "facts": {"runtime": "torch", "processor": "a chip"}}
    monkeypatch.setattr(surroundings, "fresh", lambda device, message: answer)


@pytest.mark.usefixtures("near")
def test_a_task_that_cannot_be_made_leaves_the_rest_to_be_looked_at() -> None:
    def make() -> Task:
        raise RuntimeError("no such\x1b[2J data")

    found = examine(make, storage="sqlite:///outputs/studies.db")
    (failed,) = found.failed
    assert (failed.area, failed.what, failed.detail) == ("task", "task", "RuntimeError: no such?[2J data")
    assert found.diagnosis is None
    assert {finding.area for finding in found.findings} == {"environment", "storage", "task"}
    assert not Path("outputs").exists(), "looking makes nothing"


@pytest.mark.usefixtures("near")
def test_a_model_of_which_nothing_can_be_pruned_is_a_failed_finding() -> None:
    found = examine(lambda: task(model=nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))))
    assert "prunable" in [finding.what for finding in found.failed]
    assert any("it is the model's output" in finding.detail for finding in found.failed)


@pytest.mark.usefixtures("near")
def test_the_threads_of_a_board_are_not_sought_here() -> None:
    board = {"runtime": "onnxruntime", "place": "CPUExecutionProvider", "threads": 4096}
    for host, said in (("user@board", False), ("", True)):
        found = examine(lambda: task(model=nn.Linear(2, 2)), device=Device(name="board", host=host, **board))  # type: ignore
        assert any("device.threads=4096 is more" in finding.way_out for finding in found.findings) == said


@pytest.mark.usefixtures("near")
def test_the_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, Finding]:
        return {finding.what: finding for finding in surroundings.environment(Path("a/b"), threads=1)}

    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    quiet = found()
    assert quiet["processor"].status == "ok"
    assert str(torch.__version__) in quiet["torch"].detail
    assert "not there yet" in quiet["output"].detail
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 0.0, 0.0))
    assert "may be undecided" in found()["processor"].way_out
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(10**9, 10**9, 10**6))
    assert found()["output"].status == "warning"
    monkeypatch.setattr("importlib.metadata.version", lambda name: importlib.metadata.Distribution.from_name("absent"))
    assert found()["onnxruntime"].detail == "installed by a package of another name"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert found()["zeus"].way_out == "for measured energy: pip install 'autoprune[energy]'"
    Path("a").touch()
    assert found()["output"].status == "failed"
    assert not Path("a").is_dir()


def test_a_device_that_is_not_there_or_does_not_answer_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    def refused(device: Device, message: Any) -> Any:
        raise InputError("device=board is not there: Connection refused")

    monkeypatch.setattr(surroundings, "fresh", refused)
    (found,), device = surroundings.device(lambda: Device(name="board"))
    assert (found.status, found.detail) == ("failed", "device=board is not there: Connection refused")
    assert device is not None
    monkeypatch.setattr(surroundings, "fresh", lambda device, message: time.sleep(5))
    monkeypatch.setattr(surroundings, "DEVICE_S", 0.1)
    (found,), _ = surroundings.device(lambda: Device(name="board"))
    assert "has not answered within 0.1 s" in found.detail
    (found,), device = surroundings.device(lambda: Device(name="board", threads=0))
    assert "threads >= 1" in found.detail
    assert device is None


def test_a_storage_is_looked_at_and_not_made() -> None:
    missing = stock("sqlite:///outputs/studies.db")[0]
    assert missing.status == "ok"
    assert "nor is its folder outputs" in missing.detail
    assert not Path("outputs").exists()

    study = optuna.create_study(storage="sqlite:///mine.db")
    for value in (1.0, 2.0, 3.0):
        study.add_trial(optuna.trial.create_trial(value=value))
    with contextlib.closing(sqlite3.connect("mine.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
    there = sorted(os.listdir())
    found = stock("sqlite:///mine.db")
    assert found[0].status == "ok"
    assert "mine.db: 1 studies, 3 trials" in found[0].detail
    assert sorted(os.listdir()) == there

    assert stock("sqlite+pysqlite:///other.db")[0].detail == "other.db is not there yet: the first search makes it"
    assert "in memory" in stock("sqlite://")[0].detail
    assert sorted(os.listdir()) == there

    Path("text.db").write_text("this is no database, and was never one" * 100)
    assert stock("sqlite:///text.db")[0].status == "failed"
    assert stock("sqlite:///text.db/studies.db")[0].status == "failed"
    assert stock("nonsense")[0].status == "failed"
    assert stock(None)[0].status == "warning"
    absent = stock("postgresql+psycopg://me:secret@127.0.0.1:1/studies")[0]
    assert absent.status == "failed"
    assert "secret" not in absent.detail


def test_a_shared_disk_is_said_to_have_doubtful_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.stock._filesystem", lambda place: "nfs4")
    assert [finding.status for finding in stock("sqlite:///studies.db")] == ["ok", "warning"]


@pytest.mark.usefixtures("near")
def test_the_command_tells_failures_by_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    Path("toys.py").write_text(
        "import test_doctor\n"
        "def make_task(**changes): return test_doctor.task(**changes)\n"
        "def broken(): raise RuntimeError('disk on fire')\n"
    )
    assert cli.main(["doctor", "task._target_=toys.make_task", "images=300"]) == 0
    out = capsys.readouterr().out
    assert "✓ runs: toy" in out
    assert "0 in the way of a search" in out
    assert cli.main(["doctor", "task._target_=toys.broken"]) == 2
    shown = capsys.readouterr()
    assert "✗ task: task: toys.broken raised RuntimeError: disk on fire" in shown.out
    assert "✓ python" in shown.out
    assert shown.err.splitlines()[-1].startswith("autoprune: task: task: toys.broken raised")
    assert cli.main(["doctor", "task._target_=toys.broken", "--json"]) == 2
    values = json.loads(capsys.readouterr().out)
    told = {finding["what"]: finding["status"] for finding in values["findings"]}
    assert (told["task"], told["python"]) == ("failed", "ok")
    assert cli.main(["doctor", "images=1"]) == 2
    assert "doctor: images >= 2 must hold, got images=1" in capsys.readouterr().err
