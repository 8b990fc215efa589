"""What README.md and docs/ say is true: each command and each snippet is run, each key and link is there.

A command of autoprune is run in this process, on a small task and with SMALL words after its own; RUN_DIR and TRAIN_DIR
are folders of a finished search and of a training. What stands after `<!-- not run: why -->` is not run, but its
commands have to be accepted; after `<!-- needs: package.name -->` it is run where that is there. The Python blocks of a
page share one namespace, which a `<!-- setup ... -->` that readers do not see may fill; one that begins with the name
of a file is that file to the others of its page.
"""

from __future__ import annotations

import ast
import contextlib
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown import LANGUAGES, ROOT, Block, anchors, blocks, links, pages, spans

from autoprune import RatioTable, cli, commands
from autoprune.components import CONF, names
from autoprune.configuration import GROUPS, configured
from autoprune.core import InputError

PAGES = pages()
BLOCKS = [block for page, text in PAGES.items() for block in blocks(page, text)]
FOLDERS = ("RUN_DIR", "TRAIN_DIR")
PLACEHOLDERS = (*FOLDERS, "…", "PATH", "URL", "COMMAND", "--help")
OWN = "task._target_=my_module.make_task"
SCORED = ["evaluator.images=64", "evaluator.short.epochs=0.1", "evaluator.cache=null", "finetune.epochs=0.05"]
SMALL = {
    "search": SCORED,
    "compare": [*SCORED, "evaluations=6", "seeds=[0]", "settings.amc.warm_up=4"],
    "train": ["training.epochs=0.1"],
    "finetune": ["finetune.epochs=0.05"],
    "profile": ["networks=8", "held_out=2"],
}
STRATEGIES = {
    "amc": ["strategy.episodes=6", "strategy.warm_up=4"],
    "netadapt": ["strategy.initial=0.3"],
    "optuna": ["strategy.episodes=6"],
    "random": ["strategy.episodes=6"],
}
QUICK_DEVICE = ["processes=2", "most_processes=2", "samples=6", "seconds=0.05", "repeats=1"]
TABLE = ["profile.networks=8", "profile.held_out=2"]
MEASURED = re.compile(r"(latency|rss|energy)_|^autoprune (profile|measure)\b|^python -m pytest|^python examples/ppo")
WHOLE = re.compile(r"autoprune (search|compare|train|finetune)\b(?!.*(-h\b|--help|--cfg))")


def is_ours(command: str) -> bool:
    return command.startswith(("autoprune ", "python -m autoprune ", "eval "))


def is_there(block: Block) -> bool:
    """Whether what a block needs, a package or a part of one, can be imported."""
    try:
        return all(pkgutil.resolve_name(mark[6:].strip()) for mark in block.marks if mark.startswith("needs:"))
    except (ImportError, AttributeError):
        return False


def our_words(command: str) -> list[str]:
    """A command of autoprune without what starts it."""
    inner = re.sub(r"^eval '?\$\((.*)\)'?$", r"\1", command)
    return shlex.split(re.sub(r"^(python -m )?autoprune ", "", inner))


def runnable() -> Iterator[object]:
    """The commands that are run: slow are whole searches and trainings, and what measures or starts processes, which is
    long on pages but the README."""
    for block in BLOCKS:
        if block.language != "bash" or block.why_not or "two commands" in block.marks:
            continue
        for number, command in enumerate(block.commands()):
            line = command.removeprefix("python -m ") if is_ours(command) else command
            slower = bool(MEASURED.search(line)) or "slow" in block.marks
            marks = [pytest.mark.slow] if slower or WHOLE.search(line) else []
            marks += [pytest.mark.long] if slower and block.page != "README.md" else []
            yield pytest.param(block, command, id=f"{block.place}+{number}", marks=marks)


def small(name: str, words: Sequence[str]) -> list[str]:
    """The words of a documented command, on a small task and with what makes it quick."""
    kept = [word for word in words if not word.startswith(("task=", "task.data="))]
    if not (CONF / f"{name}.yaml").is_file():
        return kept
    groups = {
        next(iter(entry)) for entry in _yaml(CONF / f"{name}.yaml").get("defaults", []) if isinstance(entry, dict)
    }
    if "task" in groups and not any(word.startswith("task.") for word in kept):
        kept.append(OWN)
    chosen = dict(word.split("=", 1) for word in kept if "=" in word)
    kept += SMALL.get(name, []) + STRATEGIES.get(chosen.get("strategy", ""), []) * (name == "search")
    if "device" in groups:
        kept += [f"device.{word}" for word in QUICK_DEVICE] + TABLE * (name in ("search", "compare"))
    return kept


def _yaml(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, unheeding: None) -> dict[str, Path]:
    """A finished search and a finished training of the example's model, for all that begins with one."""
    home = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(home):
        shutil.copy(ROOT / "examples" / "my_module.py", home)
        made = "search strategy=uniform budget=params_40pct", "train regularizer=bn_l1"
        for words in map(str.split, made):
            assert cli.main([words[0], *small(words[0], words[1:])]) == 0
    (run,), (trained,) = home.rglob("ratios.yaml"), home.rglob("trained.safetensors")
    return {"RUN_DIR": run.parent, "TRAIN_DIR": trained.parent}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, unheeding: None) -> Path:
    """A finished search that measured a latency, for `measure`."""
    home = tmp_path_factory.mktemp("measured")
    with contextlib.chdir(home):
        shutil.copy(ROOT / "examples" / "my_module.py", home)
        words = small("search", ["strategy=uniform", "budget=latency_99pct"])
        assert cli.main(["search", *words]) in (0, 3)
    (run,) = home.rglob("ratios.yaml")
    return run.parent


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the test has the examples in it, and what is imported from there is forgotten afterwards."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "examples" / "my_module.py", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
    yield
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write_files(page: str, folder: Path) -> None:
    """The files that a page shows."""
    for block in BLOCKS:
        if block.page == page and block.language == "python" and block.file:
            (folder / block.file).write_text(block.text)


@pytest.mark.parametrize(("block", "command"), runnable())
@pytest.mark.usefixtures("own_modules", "unheeding")
def test_every_command_runs(
    block: Block,
    command: str,
    folders: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_files(block.page, tmp_path)
    there = dict(folders)
    if is_ours(command) and our_words(command)[0] == "measure":
        there["RUN_DIR"] = request.getfixturevalue("measured")
    for placeholder, folder in there.items():
        command = command.replace(placeholder, str(folder))
    if is_ours(command):
        name, *words = our_words(command)
        status = cli.main([name, *small(name, words)])
        may_be_undecided = name == "compare" or any(MEASURED.search(word) for word in words) or name == "measure"
        assert status == 0 or (status == 3 and may_be_undecided), capsys.readouterr().err
    elif command.startswith("python -m pytest"):
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    elif command.startswith("python "):
        _, script, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
    else:
        raise AssertionError(f"{block.place}: no way to run {command!r}: write <!-- not run: why --> before the block")


@pytest.mark.parametrize("page", sorted({b.page for b in BLOCKS if b.language == "python" and not b.why_not}))
@pytest.mark.usefixtures("own_modules", "unheeding")
def test_every_snippet_runs(page: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """From top to bottom, as one who types them in would."""
    write_files(page, tmp_path)
    for name in ("ratios.yaml", "pruned.safetensors"):
        shutil.copy(folders["RUN_DIR"] / name, tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    ran = []
    for block in BLOCKS:
        if block.page == page and block.language in ("setup", "python") and not block.why_not and is_there(block):
            code = "\n" * (block.line - 1) + block.text  # so that a traceback tells the page's line
            exec(compile(code, str(ROOT / page), "exec"), namespace)
            ran.append(block.language)
    assert "python" in ran, "what all blocks of the page need is not installed"


def test_there_is_something_to_run() -> None:
    assert len(list(runnable())) >= 30
    assert sum(block.language == "python" for block in BLOCKS) >= 12


def refusal(command: str) -> str:
    """Why autoprune does not take a command's words; "" where it does."""
    name, *words = our_words(command)
    if name.isupper():
        return ""
    if name not in commands.COMMANDS:
        return f"there is no command {name}"
    try:
        if not any(word in command for word in PLACEHOLDERS) and (CONF / f"{name}.yaml").is_file():
            configured(name, words)
    except InputError as error:
        return str(error)
    return ""


SAID = [(block.place, line) for block in BLOCKS if block.language == "bash" for line in block.commands()]
SAID += [(page, span) for page, text in PAGES.items() for span in spans(text)]


@pytest.mark.parametrize("command", sorted({said for _, said in SAID if is_ours(said)}))
@pytest.mark.usefixtures("own_modules")
def test_every_command_is_accepted_as_it_is_written(command: str) -> None:
    assert refusal(command) == ""


def _keys(values: object, prefix: str) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def known_keys() -> set[str]:
    """Every key of conf/, as it is written on a command line."""
    known = {key for path in CONF.glob("*.yaml") for key in _keys(_yaml(path), "")}
    for path in CONF.glob("*/*.yaml"):
        known |= {path.parent.name, *_keys(_yaml(path), f"{path.parent.name}.")}
    return known


def test_every_key_that_is_named_is_there() -> None:
    known, free = known_keys(), ("task.", "settings.", "strategy._target_", "criterion._target_")
    first = {key.partition(".")[0] for key in known}
    for place, said in SAID:
        for word in said.split():
            key, equals, value = word.strip("'\"").partition("=")
            dotted = re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) and key.partition(".")[0] in GROUPS
            if key.startswith(free) or not ((equals and key.partition(".")[0] in first) or dotted):
                continue
            assert key in known, f"{place}: there is no key {key}"
            if key in GROUPS and re.fullmatch(r"\w+", value) and (CONF / key).is_dir() and key != "device":
                assert value in names(key), f"{place}: there is no {key}={value}"


def test_blocks_are_fenced_and_of_a_known_language() -> None:
    for block in BLOCKS:
        assert block.language in (*LANGUAGES, "setup"), f"{block.place}: nobody runs {block.language or 'nothing'}"
        if block.language == "python":
            assert ast.parse(block.text).body, block.place
    for page, text in PAGES.items():
        assert text.count("```") % 2 == 0, page
        assert not re.search(r"^    (autoprune|python|pip) ", text, re.M), f"{page}: an indented command is not run"


def test_the_two_commands_are_marked_for_ci() -> None:
    (block,) = [block for block in BLOCKS if "two commands" in block.marks]
    assert block.page == "README.md"
    assert len(block.text.strip().splitlines()) == 2
    assert block.text.splitlines()[0].endswith("python -m autoprune search budget=latency_20ms")


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in links(text):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(there.read_text()), f"{page}: {target}"


def test_the_readme_is_two_screens_and_leads_to_every_page() -> None:
    seen = re.sub(r"<!--.*?-->\n", "", PAGES["README.md"], flags=re.S)
    assert len(seen.splitlines()) <= 130
    index = links(PAGES["docs/README.md"])
    assert {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} - {"README.md"} <= set(index)
    assert "docs/README.md" in links(PAGES["README.md"])


def test_limits_name_what_of_the_field_is_not_here() -> None:
    limits = PAGES["README.md"].partition("## Limits")[2].lower()
    for absent in ("hashing", "pattern", "kernel", "initialisation", "set", "l0"):
        assert absent in limits


@pytest.mark.slow
def test_any_agent_learns_on_the_environment() -> None:
    line = [sys.executable, str(ROOT / "examples" / "ppo_on_the_environment.py")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"accuracy 0\.\d+ on the search split", done.stdout)
    assert "layer3.2.conv1" in done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_the_training_loop_example_runs(tmp_path: Path) -> None:
    words = "search strategy=uniform budget=flops_50pct task.data=shipped".split()
    words += ["evaluator.short.epochs=0", "finetune.epochs=0.05"]
    assert subprocess.run([sys.executable, "-m", "autoprune", *words], cwd=tmp_path, check=False).returncode == 0
    (table,) = tmp_path.rglob("ratios.yaml")
    line = [sys.executable, str(ROOT / "examples" / "train_with_table.py"), str(table)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"loss after one epoch: (.*)", done.stdout)[0]) < 1.0
    widths = ast.literal_eval(re.findall(r"widths: (.*)", done.stdout)[0])
    groups = RatioTable.load(table).groups
    assert {member: len(g.units) for g in groups for member in g.members} == widths
