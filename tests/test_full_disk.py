"""A real disk of a few pages that gets full at every moment in turn: one error that names the path, nothing half
written, and the same call goes on once there is room."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study import study_of, trial
from torch import nn

from autoprune import cli, report
from autoprune.borrowing import check_writable
from autoprune.cache import read_cached, write_cached
from autoprune.compare import Row, _append, read
from autoprune.core import Candidate, Measurement, StorageError
from autoprune.lineage import Networks
from autoprune.result import Result
from autoprune.scores import Scored
from autoprune.storage import check_storage
from autoprune.writing import append, whole


class Disk:
    """A disk of its own at a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, kib: int) -> Path:
        """A new, empty one."""
        self.close()
        if self._mount(f"size={kib}k"):
            pytest.skip("no disk can be mounted here")
        return self.folder

    def free(self) -> None:
        """There is room again."""
        assert self._mount("remount,size=100m") == 0

    def close(self) -> None:
        if os.path.ismount(self.folder):
            subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def _mount(self, options: str) -> int:
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(line, capture_output=True, check=False).returncode


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    made.folder.mkdir()
    yield made
    made.close()


def test_a_file_is_whole_or_as_it_was(disk: Disk) -> None:
    path = disk.of(64) / "file"
    with whole(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(StorageError, match=f"the disk is full: {path} cannot be written"), whole(path) as temporary:
        temporary.write_text("new" * 100_000)
    with pytest.raises(ZeroDivisionError), whole(path) as temporary:
        temporary.write_text(str(1 / 0))
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("file", "old")]
    with pytest.raises(FileNotFoundError), whole(path.parent / "none" / "file") as temporary:
        temporary.write_text("")


def test_what_is_added_to_a_file_is_added_whole_or_not_at_all(disk: Disk) -> None:
    path = disk.of(64) / "file"
    append(path, "first\n")
    with pytest.raises(StorageError, match=f"the disk is full: {path} cannot be written"):
        append(path, "second" * 20_000)
    append(path, "third\n")
    assert path.read_text() == "first\nthird\n"


def test_a_comparison_is_read_after_the_row_that_did_not_fit(disk: Disk) -> None:
    others: dict[str, Any] = {"budget": "b", "strategy": "s", "seed": 0, "met": True, "trials": 1, "made_of": "x"}
    row = Row(**dict.fromkeys(Row.__annotations__, 0.5) | others)
    file = disk.of(8) / "comparison.csv"
    for _ in range(20):
        _append(file, row)
    (file.parent / "filler").write_bytes(b"x" * 4096)

    def fill() -> None:
        for _ in range(1000):
            _append(file, row)

    with pytest.raises(StorageError, match=f"{file} cannot be written"):
        fill()
    assert set(read(file)) == {row}
    assert len(read(file)) > 20


def test_copies_are_left_out_where_they_do_not_fit(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """A score is worth more than its copy in the cache, a network is made again."""
    folder, network = disk.of(16), nn.Linear(100, 100)
    scored = Scored(score=0.5, scores=(0.5,) * 9, losses=(1.0,) * 9, sizes=(1.0,) * 9)
    write_cached(folder / "fits.json", scored)
    networks = Networks(folder / "networks")
    networks.put("digest", network)
    assert "networks cannot be kept" in caplog.text
    found = networks.get("digest")
    assert found is not None
    assert torch.equal(found["weight"], network.weight)
    write_cached(folder / "fits_not.json", dataclasses.replace(scored, scores=(0.5,) * 9000))
    assert f"the cache in {folder} cannot be written" in caplog.text
    assert read_cached(folder / "fits.json", len(scored.scores)) == scored
    assert [p.name for p in folder.rglob("*.*")] == ["fits.json"]


def test_a_study_goes_on_from_all_that_was_recorded(disk: Disk) -> None:
    """Where there is no room for the tables, for the journal, for the study, and for the trials to come."""
    wanted, ends = tuple(map(trial, range(30))), []
    for kib in (4, 16, 200, 270, 340):
        path = disk.of(kib) / "studies.db"
        url, recorded = f"sqlite:///{path}", 0
        try:
            check_storage(url)
            with study_of(url) as study:
                for each in wanted:
                    study.record(each)
                    recorded += 1
        except StorageError as error:
            ends.append((kib, str(error).partition(" (")[0], recorded))
        disk.free()
        with study_of(url) as study:
            known = study.trials()
            assert known == wanted[: len(known)]
            assert len(known) >= recorded, "of what was recorded nothing is lost"
            for each in wanted[len(known) :]:
                study.record(each)
        with study_of(url) as study:
            assert study.trials() == wanted
    assert {said for _, said, _ in ends} == {f"the disk is full: {path} cannot be written"}
    assert [recorded > 0 for _, _, recorded in ends] == [False, False, False, True, True], ends


@pytest.fixture(scope="module")
def result() -> Result:
    from test_run import searched

    return searched(strategy="uniform")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_the_files_of_a_run_are_whole_or_not_there(disk: Disk, result: Result, tmp_path: Path) -> None:
    reference = tmp_path / "whole"
    reference.mkdir()
    report.write(result, reference)
    needed = files_in(reference)
    stopped_at = set()
    for kib in range(4, 2000, 4):
        folder = disk.of(kib)
        (folder / "filler").write_bytes(b"x" * 4096)
        try:
            report.write(result, folder)
        except StorageError as error:
            named = [name for name in needed if str(error) == f"the disk is full: {folder / name} cannot be written"]
            stopped_at |= set(named)
            assert len(named) == 1
        (folder / "filler").unlink()
        written = files_in(folder)
        assert written.items() <= needed.items(), kib
        if written == needed:
            break
    assert stopped_at == set(needed), "each was the first that did not fit"
    assert written == needed


def test_a_folder_on_a_full_disk_is_no_wrong_input(disk: Disk) -> None:
    folder = disk.of(4)
    (folder / "filler").write_bytes(b"x" * 4096)
    (folder / "there").touch()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (folder / "there").write_text("full")
    check_writable(folder, "evaluator.cache")  # an empty file takes no page
    with pytest.raises(StorageError, match=f"the disk is full: {folder}/studies.db cannot be written"):
        check_storage(f"sqlite:///{folder}/studies.db")


class Appending:
    """A meter that keeps its readings."""

    name, unit = "latency_ms", "ms"

    def __init__(self, path: Path, write: Callable[[Path, str], object]) -> None:
        self.path, self.write = path, write

    def measure(self, model: nn.Module, inputs: Any) -> Measurement:
        self.write(self.path, "reading" * 10_000)
        raise AssertionError("it fitted")


@pytest.mark.parametrize("write", [append, Path.write_text], ids=["ours", "a task's"])
def test_a_full_disk_is_no_failed_candidate(disk: Disk, write: Callable[[Path, str], object]) -> None:
    from test_evaluate import evaluator

    ours = evaluator()
    ours.meters = {**ours.meters, "latency_ms": Appending(disk.of(4) / "readings.jsonl", write)}
    with pytest.raises(StorageError, match="the disk is full"):
        list(ours([(0, Candidate(ratios=ours.traced.space.dense(), recovery="none", measure=True))]))


def test_a_full_disk_ends_a_comparison(
    disk: Disk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_compare import SMALL

    def searched(*_: object, **__: object) -> None:
        append(disk.of(4) / "file", "x" * 10_000)

    monkeypatch.setattr("autoprune.run.search", searched)
    assert cli.main(["compare", *SMALL.split(), "seeds=[0]"]) == 1
    assert "autoprune: the disk is full: " in capsys.readouterr().err


LINE = (
    "search budget=flops_50pct task._target_=tiny.make_task strategy=netadapt strategy.initial=0.2 strategy.screen=1 "
    "evaluator.images=200 evaluator.recalibration=1 evaluator.short.epochs=0.05 finetune.epochs=0.1"
).split()


@pytest.mark.slow
def test_a_search_on_a_full_disk_ends_in_one_line_and_goes_on(
    disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def searched(**places: Path) -> tuple[int, str]:
        at = {"output": tmp_path, "study": tmp_path, "cache": tmp_path} | places
        words = [f"output={at['output']}/runs", f"study.storage=sqlite:///{at['study']}/studies.db"]
        status = cli.main([*LINE, *words, f"evaluator.cache={at['cache']}/cache"])
        return status, capsys.readouterr().err

    assert searched()[0] == 0
    expected = [path.read_bytes() for path in tmp_path.rglob("ratios.yaml")]
    cases: list[tuple[tuple[str, ...], int, int]] = [
        (("output",), 4, 1),
        (("cache",), 8, 0),
        (("output", "study", "cache"), 250, 1),
    ]
    for what, kib, ends in cases:
        place = disk.of(kib)
        status, err = searched(**dict.fromkeys(what, place))
        told = [line for line in err.splitlines() if line.startswith("autoprune: ")]
        assert status == ends, (what, kib, err)
        assert len(told) == ends
        assert all(f"the disk is full: {place}/" in line for line in told)
        assert all(line.endswith("; what was scored is kept. To go on:") for line in told)
        assert "Traceback" not in err
        assert not list(place.rglob("*.tmp"))
        disk.free()
        status, err = searched(**dict.fromkeys(what, place))
        assert status == 0, err
        newest = max(Path(place if "output" in what else tmp_path).rglob("ratios.yaml"))
        assert [newest.read_bytes()] == expected, (what, kib)
