"""What is installed is what works: the wheel from another directory, and the dashboard on the default storage."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_runs_a_users_model_from_another_directory(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "dist").glob("autoprune-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "conf/search.yaml",
        "conf/strategy/sensitivity.yaml",
        "tasks/data/fashion_mnist.npz",
        "report.html.j2",
    ):
        assert f"autoprune/{needed}" in held
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    home = tmp_path / "elsewhere"
    home.mkdir()
    shutil.copy(ROOT / "examples" / "my_module.py", home)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = [sys.executable, "-c", "import autoprune; print(autoprune.__file__)"]
    found = subprocess.run(where, cwd=home, env=environment, capture_output=True, text=True, check=True)
    assert str(tmp_path / "site") in found.stdout
    line = "-m autoprune search task._target_=my_module.make_task task.width=8 budget=[flops_60pct,params_50pct]"
    done = subprocess.run(
        [sys.executable, *line.split()], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (result,) = home.rglob("result.json")
    assert [b["met"] for b in json.loads(result.read_text())["budgets"]] == [True, True]


@pytest.mark.slow
@pytest.mark.long
def test_the_dashboard_serves_the_study(tmp_path: Path) -> None:
    words = (
        "search budget=flops_50pct task._target_=tiny.make_task strategy.sweep_levels=2 evaluator.images=200".split()
    )
    assert subprocess.run([sys.executable, "-m", "autoprune", *words], check=False).returncode == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "autoprune", "dashboard", f"port={port}", "open=false"]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        studies = _answer(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
        assert "tiny sensitivity flops_50pct seed 0" in studies[0]["study_name"]
        detail = _answer(f"http://127.0.0.1:{port}/api/studies/{studies[0]['study_id']}?after=0")
        trials = detail["trials"]
        assert len(trials) > 10
        assert {p["name"] for p in trials[0]["params"]} == {"0.0", "1.body.0.0", "1.body.2", "2.body.0.0", "3.0"}
        assert len(trials[0]["values"]) == 2
        assert [artifact["filename"] for artifact in detail["artifacts"]] == ["report.html"]
    finally:
        server.terminate()
        server.wait(timeout=10)


def _answer(url: str) -> dict:  # type: ignore[type-arg]
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return dict(json.load(reply))
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"{url} does not answer")
