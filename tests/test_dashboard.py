"""The dashboard: a study with a hundred groups and its report, served to this machine, in a browser, until Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard import get_note, save_note
from test_live import outset, trial

from autoprune import cli, dashboard
from autoprune.storage import leave, open_storage
from autoprune.study import Study

pytestmark = pytest.mark.xdist_group("dashboard")  # one server for all
CHROMIUM = Path("/usr/bin/chromium")
NAME, GROUPS = "tiny uniform flops_50pct seed 0 (12345678)", 100


def kept_study(folder: Path, trials: int = 12) -> str:
    """A study of so many trials in a storage of this folder, and its URL."""
    storage, of = f"sqlite:///{folder}/studies.db", outset(GROUPS)
    with Study(storage, NAME, fingerprint={"task": "tiny"}, space=of.space, budgets=of.budgets) as study:
        study.describe(dataclasses.replace(of, storage=storage, versions={"torch": "2"}))
        for n in range(trials):
            study.record(trial(n, 0.8 + n / 1000, 400.0 + 10 * n, 0.25 * (n % 4), groups=GROUPS))
    return storage


def report(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "report.html").write_text(text)
    return folder / "report.html"


def test_a_report_is_kept_with_its_study_and_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    storage = kept_study(tmp_path, 1)
    for text in ("first", "second"):
        dashboard.attach(report(tmp_path / text, text), storage=storage, study=NAME, output="elsewhere")
        (file,) = (tmp_path / "artifacts").iterdir()
        assert file.read_text() == text
    opened = open_storage(storage)
    study = optuna.load_study(study_name=NAME, storage=opened)
    assert study.user_attrs["folder"] == str(tmp_path / "second")
    assert get_note(study).endswith(f"/{file.name}) ({tmp_path / 'second'})")
    save_note(study, "mine")
    (meta,) = optuna.artifacts.get_all_artifact_meta(study)
    assert (meta.artifact_id, meta.filename, meta.mimetype) == (file.name, "report.html", "text/html")
    opened.set_study_system_attr(study._study_id, f"artifacts:{file.name}", json.dumps(None))  # deleted there
    file.unlink()
    leave(opened)
    dashboard.attach(report(tmp_path / "third", "third"), storage=storage, study=NAME, output="elsewhere")
    assert [f.read_text() for f in (tmp_path / "artifacts").iterdir()] == ["third"]
    opened = open_storage(storage)
    assert get_note(optuna.load_study(study_name=NAME, storage=opened)) == "mine"
    leave(opened)


def test_a_report_that_cannot_be_kept_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage, made = kept_study(tmp_path, 1), report(tmp_path / "run", "text")
    for storage_, name in ((storage, "deleted"), ("oracle://x", NAME)):
        dashboard.attach(made, storage=storage_, study=name, output=tmp_path)
    (tmp_path / "artifacts").write_text("")
    dashboard.attach(made, storage=storage, study=NAME, output=tmp_path)
    assert [r.levelname for r in caplog.records if "could not be attached" in r.message] == ["WARNING"] * 3


def test_reports_lie_beside_a_file_and_in_the_output_folder_for_a_server() -> None:
    assert dashboard.artifacts_of("sqlite:///a/b/studies.db", "outputs") == Path("a/b/artifacts")
    assert dashboard.artifacts_of("postgresql+psycopg://user@host/db", "outputs") == Path("outputs/artifacts")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "there is no file outputs/studies.db: search first, or give study.storage=URL"),
        ("study.storage=null", "studies that are kept in memory cannot be shown"),
        ("study.storage=sqlite:///text", "file is not a database"),
        ("study.storage=sqlite:///empty", "holds no studies: it must be a database of Optuna's"),
        ("study.storage=oracle://x", "cannot be used"),
        ("study.storage=postgresql://me:abc/db", "study.storage=postgresql://me:abc/db cannot be used: "),
        ("port=70000", "0 <= port <= 65535 must hold, got port=70000"),
        ("port=http", "port must be a whole number"),
        ("host=null", "host must be a name or an address, got host=None"),
        ("host=", "host must be a name or an address, got host="),
        ("hosst=x", "did you mean 'host'?"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_makes_nothing(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text").write_text("no database, but long enough to be looked at as if it were one" * 20)
    Path("empty").write_text("")
    before = sorted(Path().iterdir())
    assert cli.main(["dashboard", *words.split(), "open=false"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert sorted(Path().iterdir()) == before
    assert Path("empty").read_text() == ""


@pytest.fixture
def _until_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes the moment that it listens."""

    def pressed(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("socketserver.BaseServer.serve_forever", pressed)
    monkeypatch.setattr(dashboard, "_application", lambda opened, artifacts: None)


@pytest.mark.usefixtures("_until_listening")
@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_an_address_that_others_reach_is_warned_of(
    host: str, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"study.storage={kept_study(tmp_path, 1)}", f"host={host}", "port=0", "open=false"]
    assert cli.main(["dashboard", *words]) == 0
    shown = capsys.readouterr()
    assert ("has no password" in shown.err) is warned
    assert f"http://{host}:" in shown.out
    assert cli.main(["dashboard", "-q", *words]) == 0
    assert ("has no password" in capsys.readouterr().err) is warned


@pytest.mark.usefixtures("_until_listening")
def test_a_browser_is_opened_on_a_desktop_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("webbrowser.open", opened.put)
    words = ["dashboard", f"study.storage={kept_study(tmp_path, 1)}", "port=0"]
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    assert cli.main(words) == 0
    monkeypatch.setenv("DISPLAY", ":0")
    assert cli.main([*words, "open=false"]) == 0
    assert opened.empty()
    assert cli.main(words) == 0
    assert opened.get(timeout=5).endswith("/dashboard")


def test_without_the_dashboard_the_way_to_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    assert cli.main(["dashboard", f"study.storage={kept_study(tmp_path, 1)}", "port=0"]) == 2
    assert "pip install 'autoprune[dashboard]'" in capsys.readouterr().err


@dataclasses.dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    root: str
    storage: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    storage = kept_study(folder)
    page = "<!doctype html><title>a report</title><h1>what was found</h1>"
    dashboard.attach(report(folder / "run", page), storage=storage, study=NAME, output="elsewhere")
    line = [sys.executable, "-m", "autoprune", "dashboard", f"study.storage={storage}", "port=0", "--json"]

    def heeding() -> None:
        """A shell starts what runs in its background deaf to Ctrl-C, and all that comes of it."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    assert process.stdout is not None
    told = process.stdout.readline()
    try:
        assert told, process.communicate()[1]
        values = json.loads(told)
        assert values["studies"] == 1
        yield Served(process, values["url"], values["url"].removesuffix("/dashboard"), storage)
    finally:
        process.kill()
        process.wait()


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return bytes(reply.read())


def test_the_study_and_its_report_are_served(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    (study,) = json.loads(fetched(f"{served.root}/api/studies"))["study_summaries"]
    assert study["study_name"] == NAME
    assert study["directions"] == ["maximize", "minimize"]
    about = {row["key"]: row["value"] for row in study["user_attrs"]}
    assert (about["task"], about["budget"], about["device"]) == ("tiny", "flops_50pct", "cpu, 1 thread")
    detail = json.loads(fetched(f"{served.root}/api/studies/{study['study_id']}?after=0"))
    assert len(detail["trials"]) == 12
    assert len(detail["trials"][0]["params"]) == GROUPS
    assert detail["objective_names"] == ["score", "macs"]
    (artifact,) = detail["artifacts"]
    assert artifact["filename"] == "report.html"
    page = fetched(f"{served.root}/artifacts/{study['study_id']}/{artifact['artifact_id']}")
    assert b"<h1>what was found</h1>" in page
    port = served.root.rpartition(":")[2]
    assert cli.main(["dashboard", f"study.storage={served.storage}", f"port={port}"]) == 2
    assert f"port={port} of 127.0.0.1 is taken: give another, or port=0 for a free one" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no Chromium")
def test_a_browser_shows_it_and_asks_no_other_host(served: Served, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    (study,) = json.loads(fetched(f"{served.root}/api/studies"))["study_summaries"]
    asked: list[str] = []
    wrong: list[Any] = []
    with (
        playwright.sync_playwright() as p,
        contextlib.closing(p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])) as browser,
    ):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(served.url)
        page.get_by_text(NAME).first.wait_for(timeout=30_000)
        page.goto(f"{served.root}/dashboard/studies/{study['study_id']}")
        page.locator(".js-plotly-plot .point").first.wait_for(timeout=30_000)
        assert page.locator(".js-plotly-plot .point").count() >= 12
        page.wait_for_timeout(1500)
        page.screenshot(path=tmp_path / "dashboard.png")
        page.goto(f"{served.root}/dashboard/studies/{study['study_id']}/note")
        page.get_by_text("The report of this search").click()
        page.get_by_text("what was found").wait_for(timeout=30_000)
    assert (tmp_path / "dashboard.png").stat().st_size > 10_000
    assert wrong == []
    assert [url for url in asked if not url.startswith((served.root, "data:", "blob:"))] == []


def test_ctrl_c_is_heeded_from_the_moment_its_address_is_told(tmp_path: Path) -> None:
    told: list[str] = []

    def interrupted(url: str, *_: Any) -> None:
        told.append(url)
        signal.raise_signal(signal.SIGINT)

    kept = kept_study(tmp_path, 1)
    dashboard.serve(kept, artifacts=tmp_path, host="127.0.0.1", port=0, browse=False, listening=interrupted)
    (url,) = told
    with pytest.raises(urllib.error.URLError):
        fetched(url)


def test_ctrl_c_ends_it_with_0(served: Served) -> None:
    served.process.send_signal(signal.SIGINT)
    _, err = served.process.communicate(timeout=20)
    assert (served.process.returncode, err) == (0, "")
    with pytest.raises(urllib.error.URLError):
        fetched(served.root)
