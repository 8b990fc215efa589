"""Reports in a browser: no error, nothing asked of anybody, marks in every figure, no page wider than a phone."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoprune import cli, report
from autoprune.core import Trial
from autoprune.screen import Screen
from autoprune.storage import check_storage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

MOST_BYTES = 8 * 10**6
MOST_MS = 3000
THEMES: tuple[tuple[Any, int], ...] = (("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400))
# what a page tells of itself: how wide it is, and how many marks each figure has
LOOK = """() => ({
  wide: document.documentElement.scrollWidth, ink: getComputedStyle(document.body).color,
  marks: [...document.querySelectorAll('figure')].map(f => f.querySelectorAll('svg path, svg use, svg rect').length),
  axes: [...document.querySelectorAll('figure svg')].map(s => [...s.querySelectorAll('text')].map(t => t.textContent)),
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def looked_at(browser: Any, page: Path, themes: tuple[tuple[Any, int], ...] = THEMES) -> list[dict[str, Any]]:
    """What the page tells of itself in each theme and width; a screenshot of each is kept beside it."""
    found = []
    for theme, width in themes:
        tab = browser.new_page(color_scheme=theme, viewport={"width": width, "height": 900})
        troubles: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message, seen=troubles: seen.append(message.text))
        tab.on("pageerror", lambda error, seen=troubles: seen.append(str(error)))
        tab.on("request", lambda request, seen=asked: seen.append(request.url))
        tab.goto(page.as_uri())
        told = tab.evaluate(LOOK)
        told["ms"] = tab.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
        tab.screenshot(path=page.with_name(f"{theme}_{width}.png"), full_page=page.stat().st_size < 10**6)
        tab.close()
        assert troubles == []
        assert asked == [page.as_uri()]
        assert told["wide"] <= width, "the page itself is not scrolled sideways"
        assert told["marks"], "there are figures"
        assert min(told["marks"]) > 5
        found.append(told)
    assert len({told["ink"] for told in found}) == len({theme for theme, _ in themes})
    return found


def synthetic(folder: Path, *, groups: int, trials: int, **more: Any) -> None:
    """The files of a run with numbers that were drawn: every ratio of each trial, a sweep of every group first."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    names = [f"features.{i // 3}.conv{i % 3}" for i in range(groups)]
    share = draw.dirichlet(np.ones(groups))
    chosen = draw.uniform(0, 0.8, groups).round(3)
    rows = []
    for number in range(trials):
        ratios, about, fidelity = draw.uniform(0, 0.9, groups).round(4), "", 1.0
        if number == 0:
            ratios = np.zeros(groups)
        elif number <= 4 * groups:
            ratios, fidelity = np.zeros(groups), 0.2
            ratios[(number - 1) // 4] = 0.2 * (1 + (number - 1) % 4)
        elif number == trials - 2:
            ratios, about = np.full(groups, 0.5), '{"finalist":"one ratio widened"}'
        elif number == trials - 1:
            ratios = chosen
        cost = 1e9 * float(1 - share @ ratios)
        change = float(share @ ratios**2) + 0.02 * draw.random()
        score = max(0.1, 0.92 - 0.5 * change)
        failed = number > 4 * groups and number % 31 == 0
        rows.append(
            {
                "number": number,
                "recovery": "short" if about or number == trials - 1 else "probe" if number else "none",
                "parent": "",
                "about": about,
                "score": "nan" if failed else score,
                "score_low": score - 0.01,
                "score_high": score + 0.01,
                "loss": 1 - score,
                "loss_change": change,
                "loss_change_low": change - 0.01,
                "loss_change_high": change + 0.01,
                "macs": "" if failed else cost,
                "latency_ms": "" if failed else 20 * cost / 1e9 + draw.normal(0, 0.1),
                "measured": number == trials - 1,
                "feasible": "",
                "error": "MemoryError: no room" if failed else "",
                "fidelity": fidelity,
                **{f"ratio:{name}": ratio for name, ratio in zip(names, ratios, strict=True)},
            }
        )
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    answer = rows[-1]

    def measured(cost: str, unit: str) -> dict[str, Any]:
        value = answer[cost]
        return {"value": value, "low": 0.99 * value, "high": 1.01 * value, "unit": unit, "kind": "measured"} | {
            "samples": 5,
            "notes": ["5 processes"],
        }

    units = {"macs": "MACs", "latency_ms": "ms"}
    of_dense = {"macs": 1e9, "latency_ms": 20.0}
    values: dict[str, Any] = {
        "schema": 1,
        "task": "synthetic",
        "strategy": "sensitivity",
        "seed": 0,
        "device": "cpu, 1 thread",
        "versions": {"autoprune": "0.1.0", "torch": "2.6"},
        "notes": ["numbers that were drawn"],
        "command": ["python", "-m", "autoprune", "search", "budget=latency_12ms", "task.name=a name"],
        "score": {"metric": "MulticlassAccuracy", "dense": 0.92, "test_dense": 0.915, "test_recovered": 0.901},
        "costs": {
            name: {
                "dense": dense,
                "unit": units[name],
                "predicted": answer[name],
                "measured": measured(name, units[name]),
            }
            for name, dense in of_dense.items()
        },
        "budgets": [
            {
                "asked": f"{name}_60pct",
                "cost": name,
                "limit": 0.6 * dense,
                "unit": units[name],
                "met": True if answer[name] < 0.59 * dense else None,
            }
            | {key: measured(name, units[name])[key] for key in ("value", "low", "high")}
            for name, dense in of_dense.items()
        ],
        "search": {"study": "synthetic", "storage": "postgresql://me:hunter2@host/db", "trials": trials}
        | {"evaluations": trials, "cache_hits": 0, "failed": 3, "shared": 0.4, "seconds": 99.0},
        "groups": {
            name: {"size": 64, "kept": 64 - round(64 * ratio), "ratio": ratio, "kinds": ["Conv2d", "BatchNorm2d"]}
            | {
                "members": [name, f"{name}.norm"],
                "macs": [part, part * (1 - ratio)],
                "params": [part, part * (1 - ratio)],
            }
            for name, ratio, part in zip(names, chosen.tolist(), share.tolist(), strict=True)
        },
        "refused": {"classifier": "it is the model's output"},
        "findings": {names[0]: "insensitive"},
        "layers": [{"name": name, "dense_ms": 0.4, "pruned_ms": 0.3} for name in names],
        "cost_table": {"held_out": [[t, t * 1.03] for t in np.linspace(4, 20, 20)], "answers": []},
        "rounds": [],
        "episodes": [],
    }
    (folder / "result.json").write_text(json.dumps({**values, **more}))


QUICK = "search task._target_=tiny.make_task task.name=tiny budget=flops_50pct finetune.epochs=0.2".split()
QUICK += "evaluator.images=300 evaluator.recalibration=2 evaluator.short.epochs=0.2 strategy.sweep=grid".split()
QUICK += ["strategy.sweep_levels=3"]


def test_figures_are_drawn_from_their_data(tmp_path: Path) -> None:
    """As many marks as rows, at the places that the numbers say."""
    synthetic(tmp_path / "run", groups=6, trials=200)
    report.rewrite(tmp_path / "run")
    with (tmp_path / "run" / "figures" / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    drawn = ET.parse(tmp_path / "run" / "figures" / "progress.svg").getroot()
    paths = [element.get("d", "") for element in drawn.iter("{http://www.w3.org/2000/svg}path")]
    dots = next(path for path in paths if path.count("h0") > 5)
    before = [row for row in rows if row["kind"] == "before fine-tuning"]
    assert dots.count("M") == len(before)
    places = np.array([[float(n) for n in dot.split()] for dot in dots.replace("h0", "").split("M")[1:]])
    score = "MulticlassAccuracy on the search split, %"
    numbers = np.array([[float(row["trial number"]), float(row[score])] for row in before])
    for axis, sign in ((0, 1), (1, -1)):
        assert np.corrcoef(places[:, axis], numbers[:, axis])[0, 1] * sign > 0.9999
    failed = [row for row in rows if row["kind"] == "failed"]
    assert failed
    assert all(row[score] == "" for row in failed)
    costs = {
        row["trial number"]: float(row["macs (MACs)"]) for row in _rows(tmp_path / "run/figures/tradeoff_macs.csv")
    }
    kept = [row for row in before if costs[row["trial number"]] <= 0.6e9]
    best = f"best within the budgets: {score}"
    assert float(rows[-3][best]) == max(float(row[score]) for row in kept if int(row["trial number"]) <= 197)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_traces_are_seen(browser: Any, tmp_path: Path) -> None:
    one = {"number": 1, "targets": [6e8, 9.0], "proposals": [30, 32, 33], "winner": 34, "predicted": [6e8, 9.0]}
    one |= {"measured": [6e8, 9.0], "score_before": 0.7, "score_after": 0.8}
    walks = [{"number": i, "trial": i, "reward": 0.5 + i / 500, "sigma": 0.5 if i > 20 else None} for i in range(120)]
    folder = tmp_path / "run"
    synthetic(folder, groups=6, trials=200, rounds=[one], episodes=walks)
    lines = (folder / "trials.csv").read_text().replace("34,probe,,,", '34,probe,,"{""group"": ""features.0.conv0""}",')
    (folder / "trials.csv").write_text(lines)
    report.rewrite(folder)
    told = looked_at(browser, folder / "report.html")
    assert len(told[0]["marks"]) == 9
    page = (folder / "report.html").read_text()
    assert "hunter2" not in page
    assert "python -m autoprune search budget=latency_12ms &#39;task.name=a name&#39;" in page


@pytest.mark.slow
def test_ten_thousand_trials_of_a_hundred_groups(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    synthetic(folder, groups=100, trials=10_000)
    report.rewrite(folder)
    assert (folder / "report.html").stat().st_size < MOST_BYTES
    for told in looked_at(browser, folder / "report.html", (("light", 1280), ("dark", 400))):
        assert told["ms"] < MOST_MS


def interrupted(trials: int) -> Path:
    """The folder of a search that was stopped after so many trials."""

    class Impatient(Screen):
        steps = 0

        def scored(self, trial: Trial) -> None:
            super().scored(trial)
            self.steps += 1
            if self.steps == trials:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoprune.screen.Screen", Impatient)
        assert cli.main(QUICK) == cli.INTERRUPTED
    (folder,) = Path("outputs/tiny/sensitivity").iterdir()
    return folder.resolve()


@pytest.mark.slow
def test_a_search_is_seen_unfinished_and_finished(browser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(17)
    before = dumped(Path("outputs/studies.db"))
    assert cli.main(["report", str(folder)]) == 0, capsys.readouterr().err
    assert dumped(Path("outputs/studies.db")) == before
    looked_at(browser, folder / "report.html", THEMES[1:3])
    page = " ".join((folder / "report.html").read_text().split())
    assert "This run is unfinished." in page
    assert "17 trials are recorded; no network has been chosen" in page
    assert "python -m autoprune search task._target_=tiny.make_task" in page
    assert [row["number"] for row in _rows(folder / "trials.csv")] == [str(n) for n in range(17)]

    assert cli.main(QUICK) == 0
    (finished,) = (path.resolve() for path in Path("outputs/tiny/sensitivity").iterdir() if path.resolve() != folder)
    for known, now in zip(_rows(folder / "trials.csv"), _rows(finished / "trials.csv"), strict=False):
        assert known.items() <= now.items()
    told = looked_at(browser, finished / "report.html")
    names = {"ratios", "tradeoff_macs", "progress", "sensitivity"}
    files = {path.name for path in (finished / "figures").iterdir()}
    assert files == {f"{name}.{ending}" for name in names for ending in ("svg", "csv")}
    assert len(told[0]["marks"]) == len(names)
    words = ["".join(texts) for texts in told[0]["axes"]]
    units = (
        "fraction of units removed",
        "multiply-adds in MACs",
        "trial number",
        "MulticlassAccuracy on the search split, %",
    )
    assert all(any(unit in text for text in words) for unit in units)
    assert "unfinished" not in (finished / "report.html").read_text()


def dumped(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as opened:
        return list(opened.iterdump())


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        (None, "kept in memory (study.storage=null) and is gone"),
        ("sqlite:///none/studies.db", "there is no file none/studies.db"),
        ("sqlite:///other.db", "there is no study 'mine' in sqlite:///other.db"),
        ("sqlite:///empty.db", "study.storage=sqlite:///empty.db cannot be used: "),
        ("sqlite:///text.db", "study.storage=sqlite:///text.db cannot be used: file is not a database"),
        ("nonsense", "study.storage=nonsense cannot be used"),
    ],
)
def test_a_study_that_is_gone_is_named_and_none_is_made(
    storage: str | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_storage("sqlite:///other.db")
    Path("empty.db").touch()
    Path("text.db").write_text("no database" * 100)
    Path("run").mkdir()
    outset = {"search": {"study": "mine", "storage": storage}, "budgets": [], "groups": {}}
    Path("run/outset.json").write_text(json.dumps(outset))
    there = sorted(Path().iterdir())
    assert cli.main(["report", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("autoprune: run is unfinished, and its study cannot be read: ")
    assert says in error
    assert error.count("\n") == 1
    assert sorted(Path().iterdir()) == there
    assert [path.name for path in Path("run").iterdir()] == ["outset.json"]
    assert Path("empty.db").stat().st_size == 0
