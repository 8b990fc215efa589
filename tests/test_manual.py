"""`--help` teaches by examples that are true, and calls the program what the user called it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from autoprune import cli, commands, components, manual
from autoprune.configuration import GROUPS, configured
from autoprune.core import Budget

EXAMPLES = [
    (name, line) for name, page in manual.PAGES.items() if name in commands.COMMANDS for line, _ in page.examples
]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


def test_every_command_has_a_page_and_an_aim() -> None:
    assert set(commands.COMMANDS) <= set(manual.PAGES)
    assert {page.aim for page in manual.PAGES.values()} == set(manual.AIMS)


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_every_example_is_accepted(name: str, line: str) -> None:
    command, *words = shlex.split(line)
    assert command == name
    if manual.PAGES[name].takes.startswith("RUN_DIR"):
        assert words.pop(0) == "RUN_DIR"
    if (components.CONF / f"{name}.yaml").exists():
        config = configured(name, words)
        given = config.get("budget", [])
        for text in given if isinstance(given, list) else [given]:
            Budget.parse(text)
    else:
        assert not words or words[0] in manual.PAGES[name].takes.split("|")


@pytest.mark.parametrize("command", [name for name in commands.COMMANDS if (components.CONF / f"{name}.yaml").exists()])
def test_a_page_has_examples_every_key_and_every_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, command, "--help")
    assert page.count(f"  python -m autoprune {command}") >= min(3, len(manual.PAGES[command].examples))
    for key, value in configured(command, ["ratios=x"] if command == "finetune" else []).items():
        if key in GROUPS and isinstance(value, dict) and len(components.names(key)) > 1:
            assert all(f"\n  {name} " in page for name in components.names(key))
        else:
            assert f"\n  {key}:" in page, key
    assert max(map(len, page.splitlines())) <= 130


def test_names_say_what_they_are_and_show_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for group in GROUPS:
        for name in components.names(group):
            assert len(manual.first_line(group, name)) > 10, f"{group}={name}"
    page = shown(capsys, "search", "--help", "strategy=amc")
    assert "  episodes: 400 # walks over the groups" in page
    assert "budget" not in page
    assert cli.main(["search", "--help", "strategy=magic"]) == 2
    assert "unknown strategy 'magic'" in capsys.readouterr().err


def test_the_program_is_called_what_was_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "autoprune"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "  autoprune search budget=latency_20ms\n" in shown(capsys, "search", "--help")
    assert "python -m" not in shown(capsys)
    assert cli.main(["search", "budget"]) == 2
    assert "; autoprune search --help shows every key" in capsys.readouterr().err
    assert cli._same_line(["search", "seed=1"]) == "autoprune search seed=1"
    monkeypatch.setenv("PATH", "/nowhere")  # typed with its folder
    assert cli._same_line(["search"]) == f"{script} search"
    monkeypatch.setattr(sys, "argv", ["/somewhere/autoprune/__main__.py"])
    assert cli._same_line(["search"]) == f"{sys.executable} -m autoprune search"
