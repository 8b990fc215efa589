"""The README's commands and code do what it says."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune import commands
from autoprune.configuration import configured

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted({m.split("#")[0].strip() for m in re.findall(r"python -m (autoprune [^\n`&|]*)", README)})
PLACEHOLDERS = ("…", "PATH", "RUN_DIR", "--help")


def test_there_are_commands_to_run() -> None:
    assert any("my_module.make_task" in c for c in COMMANDS)
    assert "autoprune search budget=latency_20ms" in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(word in c for word in PLACEHOLDERS)])
def test_every_command_is_accepted(command: str) -> None:
    _, name, *words = shlex.split(command)
    assert name in commands.COMMANDS
    configured(name, words)


def test_python_blocks_are_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    for block in blocks:
        assert ast.parse(block).body


def test_the_two_commands_are_marked_for_ci() -> None:
    block = re.search(r"<!-- two commands -->\s*```bash\n(.*?)```", README, re.S)
    assert block
    assert len(block.group(1).strip().splitlines()) == 2


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.slow
def test_any_agent_learns_on_the_environment() -> None:
    line = [sys.executable, str(ROOT / "examples" / "ppo_on_the_environment.py")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"accuracy 0\.\d+ on the search split", done.stdout)
    assert "layer3.2.conv1" in done.stdout


@pytest.mark.slow
def test_the_readmes_own_model_is_searched_and_its_table_reused(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "my_module.py", tmp_path)
    (command,) = [c for c in COMMANDS if c.startswith("autoprune search") and "my_module.make_task" in c]
    done = subprocess.run([sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "budget params_40pct" in done.stdout
    assert "met" in done.stdout


@pytest.mark.slow
def test_the_training_loop_example_runs(tmp_path: Path) -> None:
    words = "search strategy=uniform budget=flops_50pct task.data=shipped".split()
    words += ["evaluator.short.epochs=0", "finetune.epochs=0.05"]
    assert subprocess.run([sys.executable, "-m", "autoprune", *words], cwd=tmp_path, check=False).returncode == 0
    (table,) = tmp_path.rglob("ratios.yaml")
    line = [sys.executable, str(ROOT / "examples" / "train_with_table.py"), str(table)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rpartition(": ")[2]) < 1.0
