"""Another machine through ssh: a real sshd on loopback with keys of its own, lost and found again."""

from __future__ import annotations

import ast
import getpass
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ends, make_task
from torch import nn

from autoprune import cli
from autoprune.core import DeviceLostError, InputError
from autoprune.meters.device import Device, Worker, WorkerLostError, started, warm
from autoprune.meters.latency import Latency
from autoprune.meters.profile import dense_of
from autoprune.meters.wire import packed

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
pytestmark = pytest.mark.skipif(not Path(SSHD).exists(), reason="there is no sshd: apt-get install openssh-server")
ONCE = {"samples": 6, "width": 1.0, "seconds": 0.1, "block": 2, "settle": False, "seed": 0}
MODEL, INPUTS = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (torch.randn(2, 3, 16, 16),)


@dataclass
class Server:
    """An sshd of the test's own, that can be stopped and started again."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        line = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self.process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError("sshd did not start")

    def stop(self) -> None:
        """Ends the server and every connection it made."""
        assert self.process is not None
        subprocess.run(["pkill", "-KILL", "-P", str(self.process.pid)], check=False)
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def words(self, known_hosts: str = "known_hosts") -> str:
        return f"-p {self.port} -i {self.folder}/user_key -o UserKnownHostsFile={self.folder}/{known_hosts} -F none"

    def device(self, **change: Any) -> Device:
        defaults: dict[str, Any] = {"runtime": "onnxruntime", "place": "CPUExecutionProvider", "python": sys.executable}
        defaults |= {"processes": 2, "most_processes": 2, "samples": 6, "seconds": 0.2, "repeats": 0, "limit_s": 20.0}
        host = f"{getpass.getuser()}@127.0.0.1"
        return Device(**{"name": "board", "host": host, "ssh": self.words(), **defaults, **change})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host_key", "user_key", "other_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    for name, key in (("known_hosts", "host_key"), ("wrong_hosts", "other_key")):
        content = (folder / f"{key}.pub").read_text().split()
        (folder / name).write_text(f"[127.0.0.1]:{port} {content[0]} {content[1]}\n")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nPermitRootLogin yes\nUsePAM no\n"
        "MaxStartups 100\n"
    )
    try:
        Path("/run/sshd").mkdir(exist_ok=True)
    except PermissionError:
        pytest.skip("sshd wants the folder /run/sshd, which only root can make")
    running = Server(folder, port)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits of a second or more, noted instead of made."""
    waits: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: waits.append(s) if s >= 1 else sleep(s))
    return waits


def question(plan: dict[str, Any] = ONCE) -> dict[str, Any]:
    return {"do": "time", "models": [packed(MODEL, INPUTS, "onnxruntime")], "plan": plan}


def test_the_far_side_needs_nothing_of_ours() -> None:
    from autoprune.meters import worker

    tree = ast.parse(Path(str(worker.__file__)).read_text())
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith("autoprune") for name in names)


@pytest.mark.parametrize(
    ("runtime", "place"), [("onnxruntime", "CPUExecutionProvider"), ("openvino", "CPU")], ids=lambda x: str(x)
)
def test_a_remote_reading_is_a_reading(server: Server, runtime: str, place: str) -> None:
    pytest.importorskip(runtime)
    found = Latency(server.device(runtime=runtime, place=place)).measure(MODEL, INPUTS)
    assert found.kind == "measured"
    assert 0 < found.low <= found.value <= found.high
    assert "board: " in found.device
    assert runtime in found.device
    assert any("f32" in note or "tensor(float)" in note for note in found.notes), "the precision is stated"


def test_the_model_never_travels_as_a_pickle(server: Server) -> None:
    assert set(packed(MODEL, INPUTS, "onnxruntime")) == {"onnx", "inputs"}
    with pytest.raises(InputError, match="runtime=torch would need a pickled model"):
        server.device(runtime="torch", place="cpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ssh": "wrong_hosts"}, "Host key verification failed"),
        ({"host": "nobody@127.0.0.1"}, "Permission denied"),
        ({"python": "/nowhere/python3"}, "nowhere|EOF|closed"),
        ({"python": "bare_python"}, "No module named 'onnxruntime'"),
        ({"runtime": "openvino", "place": "NPU"}, "no device NPU, only CPU"),
        ({"place": "TensorrtExecutionProvider"}, "no execution provider TensorrtExecutionProvider"),
    ],
    ids=["host key", "user", "python", "runtime", "device", "provider"],
)
def test_a_device_that_is_not_there_is_one_clear_line(server: Server, change: dict[str, str], reason: str) -> None:
    if "ssh" in change:
        change = {"ssh": server.words(change["ssh"])}
    if change.get("python") == "bare_python":
        bare = server.folder / "bare_python"
        bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        bare.chmod(0o755)
        change = {"python": str(bare)}
    if change.get("runtime") == "openvino":
        pytest.importorskip("openvino")
    with pytest.raises(InputError, match=f"device=board is not there: .*({reason})") as caught:
        started(server.device(name="board", **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["-oProxyCommand=touch/tmp/x", "board\t-oProxyCommand=x", "my board"])
def test_a_host_is_no_option(host: str) -> None:
    with pytest.raises(InputError, match="host must be as ssh knows it"):
        Device(name="board", host=host, runtime="onnxruntime")


def test_a_login_that_never_ends_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = server.folder / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 30\n")
    silent.chmod(0o755)
    monkeypatch.setattr("autoprune.meters.device.START_LIMIT_S", 1.5)
    with pytest.raises(InputError, match=r"device=board is not there: .*no Python answered within 1.5 s"):
        started(server.device(python=str(silent)))


def test_a_model_that_the_runtime_there_cannot_run_is_refused(server: Server) -> None:
    device = server.device(runtime="openvino", place="CPU", dtype="fp33")
    pytest.importorskip("openvino")
    with pytest.raises(InputError, match=r"device=board cannot run this model .*fp33"):
        dense_of(Latency(device), device, MODEL, INPUTS)


def test_an_unreachable_host_ends_the_command_before_any_search(
    server: Server, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["device=ssh", "device.host=127.0.0.1", "device.ssh=-p 1", "budget=latency_50pct", "task.data=shipped"]
    assert cli.main(["search", *words]) == 2
    error = capfd.readouterr().err
    (line,) = (x for x in error.splitlines() if x.startswith("autoprune:"))
    assert "device=ssh is not there" in line
    assert "Connection refused" in line
    assert "scoring" not in error
    assert "Traceback" not in error


def test_a_model_that_does_not_export_is_refused() -> None:
    class Unexportable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)  # type: ignore[no-any-return]

    with pytest.raises(InputError, match="cannot be exported to ONNX, which this device's runtime needs"):
        packed(Unexportable(), INPUTS, "onnxruntime")


def during(action: Callable[[], object], seconds: float) -> None:
    import threading

    threading.Timer(seconds, action).start()


LONG = {**ONCE, "samples": 10**9, "seconds": 1.5}


def test_a_remote_worker_that_is_killed_is_replaced(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with warm(server.device()) as worker, caplog.at_level(logging.WARNING, "autoprune"):
        pid = worker._started().pid
        assert pid is not None
        during(lambda: subprocess.run(["kill", "-9", str(pid)], check=False), 0.3)
        assert worker.ask(question(LONG))["rows"]
    assert caplog.text.count("another one is started") == 1
    assert len(caplog.records) == 1


def test_a_cut_connection_is_made_again(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with warm(server.device()) as worker, caplog.at_level(logging.WARNING, "autoprune"):
        worker._started()
        during(server.restart, 0.3)
        assert worker.ask(question(LONG))["rows"]
    assert caplog.text.count("another one is started") == 1


def test_a_machine_that_stays_away_is_lost(
    server: Server, caplog: pytest.LogCaptureFixture, quick_waits: list[float]
) -> None:
    device = server.device(reconnects=2)
    started(device).close()
    server.stop()
    try:
        with pytest.raises(DeviceLostError, match=r"device=board was lost: .*Connection refused"):
            Latency(device).measure(MODEL, INPUTS)
        assert quick_waits == [1, 2], "tried again after longer and longer waits"
    finally:
        server.start()


def test_a_hanging_remote_process_ends_itself(server: Server) -> None:
    worker = Worker(server.device())
    pid, began = worker.pid, time.perf_counter()
    with pytest.raises(WorkerLostError, match="no answer within 1 s and was killed"):
        worker.ask(question({**ONCE, "samples": 10**9, "seconds": 60.0}), limit_s=1.0)
    assert time.perf_counter() - began < 5.0
    assert pid is not None
    assert ends(pid)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["connection", pytest.param("worker", marks=pytest.mark.long)])
def test_a_search_survives_a_loss_within_a_round(server: Server, tmp_path: Path, harm: str) -> None:
    """The connection is cut, or the worker killed, while a round's winner is measured: the search goes on, no trial is
    lost or counted twice, the log has one line about it."""
    import autoprune
    from autoprune.evaluate import Scoring
    from autoprune.meters.profile import Profile
    from autoprune.recover import FineTune

    quick = FineTune(epochs=1)
    log = logging.getLogger("autoprune")
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    plain = make_task()
    task = replace(plain, inputs=(plain.search[0][0].repeat(4, 1, 1, 1),))  # type: ignore[index]
    ask = Worker.ask
    harmed: list[int] = []

    def harming(self: Worker, message: Any, **limit: Any) -> Any:
        if message.get("plan", {}).get("settle") and len(message["models"]) == 2 and not harmed:
            harmed.append(self.pid or 0)
            kill = ["kill", "-9", str(self.pid)]
            during(server.restart if harm == "connection" else lambda: subprocess.run(kill, check=False), 0.2)
        return ask(self, message, **limit)

    Worker.ask = harming  # type: ignore[method-assign]
    try:
        result = autoprune.search(
            task,
            budget="latency_80pct",
            strategy={"_target_": "autoprune.strategies.netadapt.NetAdapt", "start": "dense"},
            device=server.device(limit_s=60.0),
            profile=Profile(networks=12, held_out=4),
            tables=tmp_path,
            scoring=Scoring(images=200, short=quick),
            final=quick,
        )
    finally:
        Worker.ask = ask  # type: ignore[method-assign]
        log.removeHandler(handler)
    assert harmed
    measured = [t for t in result.trials if t.candidate.measure]
    assert {made["winner"] for made in result.rounds} <= {t.number for t in measured}
    assert len({t.candidate.ratios for t in measured}) == len(measured), "each was measured once"
    assert [t.number for t in result.trials] == list(range(len(result.trials)))
    assert not any(t.error for t in result.trials)
    assert result.measured["latency_ms"].kind == "measured"
    assert len(lines) == 1
    assert "another one is started" in lines[0]
