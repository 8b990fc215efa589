"""Candidates over actors of a Ray cluster: the same trials, whoever dies or hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_workers import spread, told, trapped

from autoprune.spread import DEATHS
from autoprune.workers import Ray

if find_spec("ray") is None or find_spec("amdsmi") is not None:
    pytest.skip("Ray is not here, or does not import", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
PORT = 6397


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret of a cluster of our own."""
    (tmp_path / "token").write_text("0123456789abcdef0123456789abcdef")
    for name, value in {
        "AUTH_MODE": "token",
        "AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "USAGE_STATS_ENABLED": "0",
    }.items():
        monkeypatch.setenv(f"RAY_{name}", value)


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Two nodes of one slot each, as two machines would be started, on this one."""
    ray, address = [sys.executable, "-m", "ray.scripts.scripts"], f"127.0.0.1:{PORT}"
    nodes = [["--head", f"--port={PORT}", "--include-dashboard=false"], [f"--address={address}"]]
    try:
        for words in nodes:
            subprocess.run([*ray, "start", "--num-cpus=1", *words], check=True, capture_output=True)
        yield address
    finally:
        subprocess.run([*ray, "stop", "--force"], check=True, capture_output=True)


def test_actors_that_die_or_hang_fail_alone_and_all_else_is_as_in_one_process() -> None:
    made, batch = trapped("dies", "hangs")
    alike, _ = trapped("raises", "raises")
    expected = list(alike(batch))
    trials = spread(made, Ray(count=2, limit_s=8), batch)
    assert [t.number for t in trials if t.error] == [t.number for t in expected if t.error] == [2, 3]
    assert str(trials[2].error).startswith(f"{DEATHS} workers were lost on it alone")
    assert trials[3].error == "it took longer than limit_s=8 and was killed"
    assert told([t for t in trials if not t.error]) == told([t for t in expected if not t.error])


TWO_NODES = """
import sys
from test_workers import evaluator, spread, swept, told
from autoprune.core import InputError
from autoprune.workers import Ray

made = evaluator()
batch = swept(made, 1)
for count in map(int, sys.argv[2:]):
    try:
        trials = spread(made, Ray(count=count, address=sys.argv[1]), batch)
        print(told(trials) == told(list(evaluator()(batch))))
    except InputError as error:
        print(error)
"""


@pytest.mark.usefixtures("token")
def test_two_nodes_give_the_trials_of_one_process_to_who_has_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*counts: str) -> list[str]:
        words = [sys.executable, "-c", TWO_NODES, address, *counts]
        return subprocess.run(words, env=os.environ, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()

    with cluster() as address:
        room = "the cluster has room for 2 workers of 1 CPUs and 0 GPUs, got count=3: add nodes, or workers.count=2"
        assert search("3", "2") == [f"workers=ray: {room}", "True"]
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another" + 25 * "0")
        (line,) = search("1")
    assert line.startswith(f"workers=ray: the cluster at address={address} cannot be reached")
