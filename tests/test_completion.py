"""Shell completion, asked of the shells themselves; those that are not here are skipped."""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoprune import cli, commands, components
from autoprune.completion import SHELLS, script

RUN = "outputs/tiny/uniform/2026-01-31_12-00-00/"
BASH = """
source {script}
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_autoprune
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
compdef() {{ }}; _files() {{ }}
compadd() {{ local offered="${{@[-1]}}"; print -rl -- ${{(P)offered}} }}
source {script}
words=({words}); CURRENT=${{#words}}; PREFIX="${{words[-1]}}"
_autoprune
"""


@functools.cache
def written(shell: str) -> str:
    return script(shell, commands.COMMANDS)


def offers(shell: str, line: str) -> list[str]:
    """What a shell offers at the end of a line, as it would be typed; bash from its last '=' on."""
    name = f"completion.{shell}"
    Path(name).write_text(written(shell))
    if shell == "bash":
        words = " ".join(shlex.quote(word) for word in line.replace("=", " = ").split(" ") if word)
        words += " ''" * line.endswith((" ", "="))
        program = BASH.format(script=name, line=shlex.quote(line), words=words)
    elif shell == "zsh":
        program = ZSH.format(script=name, words=" ".join(map(shlex.quote, line.split(" "))))
    else:
        program = f"source {name}; complete -C {shlex.quote(line)}"
    done = subprocess.run([shell, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert not done.stderr, done.stderr
    found = [offer.partition("\t")[0] for offer in done.stdout.splitlines()]
    return [] if found == [""] else found  # printf's own line


@pytest.fixture(params=SHELLS)
def complete(request: pytest.FixtureRequest) -> Callable[[str], list[str]]:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")

    def of(line: str) -> list[str]:
        return [offer.rpartition("=")[2] or offer for offer in offers(request.param, line)]

    return of


def test_commands_keys_and_names_are_completed(complete: Callable[[str], list[str]]) -> None:
    assert set(complete("autoprune ")) == {*commands.COMMANDS, "--help"}
    assert complete("autoprune se") == ["search"]
    assert {"budget=", "strategy=", "strategy.", "study.", "seed=", "--help", "--json", "--quiet"} <= set(
        complete("autoprune search ")
    )
    assert not any("sweep" in offer for offer in complete("autoprune search "))
    for group in ("strategy", "criterion", "device", "space", "workers", "task"):
        assert set(complete(f"autoprune search seed=1 {group}=")) == set(components.names(group))
    assert set(complete("autoprune train regularizer=")) == set(components.names("regularizer"))
    assert complete("autoprune search strategy=sens") == ["sensitivity"]
    assert set(complete("autoprune search budget=la")) == {"latency_", "latency_50pct"}
    assert {"evaluator.short.epochs=", "evaluator.short.steps="} <= set(complete("autoprune search evaluator.short."))
    assert complete("autoprune search strategy.evenn") == ["strategy.evenness="]  # of one strategy's own
    assert set(complete("autoprune completion ")) == {*SHELLS, "--help"}
    assert complete("autoprune profile budget=") == []
    assert complete("autoprune search --j") == ["--json"]


def test_folders_of_runs_and_files_are_completed(complete: Callable[[str], list[str]]) -> None:
    for folder, file in ((RUN, "result.json"), (RUN.replace("12", "13"), "outset.json")):
        Path(folder).mkdir(parents=True)
        (Path(folder) / file).touch()
    assert {RUN, RUN.replace("12", "13")} <= set(complete("autoprune report "))
    assert complete(f"autoprune measure {RUN[:-4]}")[:1] == [RUN]
    assert RUN not in complete("autoprune search ")


def test_bash_offers_files_where_a_path_is_due() -> None:
    """`compopt -o default` is what does: it is called for a path, and for what follows a key only of a path's key."""
    Path("completion.bash").write_text(written("bash"))
    for line, due in {
        "export outputs/any": True,
        "export outputs/any format=": False,
        "export outputs/any output=": True,
        "search weights=": True,
        "search strategy=": False,
    }.items():
        words = line.replace("=", " = ")
        program = f"""source completion.bash; compopt() {{ [[ "$2" == default ]] && echo files; }}
            COMP_LINE='autoprune {line}'; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=(autoprune {words} '')
            COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _autoprune"""
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, timeout=60)
        assert ("files" in done.stdout) == due, line


def test_the_script_is_printed_without_torch_and_a_wrong_shell_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys; from autoprune.cli import main; main(['completion', 'bash']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "complete -F _autoprune autoprune" in done.stdout
    assert cli.main(["completion", "csh"]) == 2
    assert "one of bash, zsh, fish, got csh" in capsys.readouterr().err
