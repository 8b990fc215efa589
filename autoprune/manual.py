"""What `--help` prints: what a command does, worked examples, its keys, and the names that these may have.

A command needs one entry in PAGES; one without is shown with its keys alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import yaml

from autoprune.components import CONF, names, spec

MODULE, SCRIPT = "python -m autoprune", "autoprune"  # the two ways in
FLAGS = (
    ("-q, --quiet", "on the screen errors, warnings and the verdict alone"),
    ("--json", 'the last screen as one JSON object on the standard output; an error as {"error": ...}'),
)
AIMS = ("find", "understand", "reuse", "set up")


@dataclass(frozen=True, kw_only=True)
class Page:
    """aim: its place in the overview. line: there, what it does in a few words. does: the same in two lines. takes:
    what follows the command. examples: worked ones, without the program, and what each is for; the first is in the
    overview."""

    aim: str
    line: str
    does: str
    examples: tuple[tuple[str, str], ...]
    takes: str = "[key=value ...]"


PAGES = {
    "search": Page(
        aim="find",
        line="find the ratios, the smaller network and the report",
        does="Finds how much to prune from each layer under hard budgets, fine-tunes the smaller one and measures it.\n"
        "The same line goes on where it was interrupted. Exit status 3: a budget could not be met.",
        examples=(
            ("search budget=latency_20ms", "20 ms on this machine's CPU, of the default task"),
            (
                "search budget=flops_50pct strategy=uniform task.data=shipped",
                "a first look: the baseline, counted costs",
            ),
            ("search budget=[latency_50pct,params_300k] strategy=netadapt", "two budgets at once, another strategy"),
            ("search task._target_=my_module.make_task task.width=16 budget=params_40pct", "a model of your own"),
            ("search budget=latency_15ms device=onnxruntime device.threads=2", "as ONNX Runtime executes it"),
        ),
    ),
    "compare": Page(
        aim="find",
        line="strategies side by side, one table and one plot",
        does="Searches for each budget, strategy and seed with as many candidates each: one table, one plot.\n"
        "The same line goes on where it was interrupted, or adds to the same table.",
        examples=(
            ("compare strategies=[random,amc]", "two strategies at half of the FLOPs, three seeds"),
            ("compare budget=[flops_50pct,flops_30pct] seeds=[0,1]", "all of the default ones, at two budgets"),
            ("compare strategies=[amc] settings.amc.agent=sac evaluations=100", "with a setting of one strategy"),
        ),
    ),
    "train": Page(
        aim="find",
        line="silence units by training, for a search to start from",
        does="Trains the task's model on, with a regularizer that drives whole units to zero, and writes its weights.\n"
        "The last line that it prints is the search that starts from them.",
        examples=(
            ("train regularizer=bn_l1", "hold the scales of batch normalisation down"),
            ("train regularizer=group_lasso regularizer.strength=0.001 training.epochs=10", "harder, and for longer"),
            ("train task._target_=my_module.make_task device=cuda", "a model of your own, on a GPU"),
        ),
    ),
    "doctor": Page(
        aim="understand",
        line="what may stand in a search's way, and the way out",
        does="Looks at this machine, the device, the storage and the task: does it train, does its score repeat,\n"
        "how noisy is it, what can be pruned. Each finding has its way out. Exit status 2: one would stop a search.",
        examples=(
            ("doctor task._target_=my_module.make_task", "a model of your own"),
            ("doctor", "this machine, and the default task"),
            ("doctor device=ssh device.host=user@board", "is that board there, and can its runtime take the model?"),
            ("doctor study.storage=postgresql://me@server/studies", "is that database there?"),
            ("doctor space=block", "which residual blocks can be left out"),
        ),
    ),
    "profile": Page(
        aim="understand",
        line="build or refresh the device's cost table",
        does="Measures whole networks on a device, fits its cost table, and tells the table's error on others.\n"
        "A search with a latency budget does it by itself where there is none.",
        examples=(
            ("profile device=torch_cpu", "of the default task's model, on this machine's CPU"),
            ("profile device=onnxruntime networks=50", "as ONNX Runtime executes it, on more networks"),
            ("profile task._target_=my_module.make_task device=openvino", "a model of your own, on OpenVINO"),
        ),
    ),
    "measure": Page(
        aim="understand",
        line="measure a finished run's network again",
        does="Measures a finished run's network again, in new processes, beside the dense one, and says whether its\n"
        "latency budgets are still met. Exit status 3: one is not.",
        examples=(("measure RUN_DIR", "RUN_DIR is what the last screen of the search calls its files"),),
        takes="RUN_DIR",
    ),
    "report": Page(
        aim="understand",
        line="write report.html again, of an unfinished run too",
        does="Writes report.html of a run again, from what the run left in its folder;\n"
        "of one that was interrupted, from what the study has of its trials.",
        examples=(("report RUN_DIR", "RUN_DIR is what the last screen of the search calls its files"),),
        takes="RUN_DIR",
    ),
    "dashboard": Page(
        aim="understand",
        line="look at all studies in the browser",
        does="Starts optuna-dashboard on the storage of the studies, on this machine alone, and opens the browser.",
        examples=(
            ("dashboard", "the studies of outputs/studies.db"),
            ("dashboard study.storage=sqlite:///mine.db port=0 open=false", "another database, at a free port"),
        ),
    ),
    "finetune": Page(
        aim="reuse",
        line="reuse a ratio table in training",
        does="Prunes the task's model by the ratio table of an earlier search and trains it: on the same weights the\n"
        "same units go, on others of the same architecture they are ranked again.",
        examples=(
            ("finetune ratios=RUN_DIR/ratios.yaml", "of the default task's model"),
            ("finetune ratios=RUN_DIR/ratios.yaml finetune.epochs=10 device=cuda", "for longer, on a GPU"),
            ("finetune ratios=RUN_DIR/ratios.yaml finetune.pruning=gradual", "prune during the training"),
        ),
    ),
    "export": Page(
        aim="reuse",
        line="the pruned network for another runtime",
        does="Writes a finished run's pruned network for another runtime, and checks it there against PyTorch.",
        examples=(
            ("export RUN_DIR format=onnx", "for ONNX Runtime, OpenVINO, TensorRT and others"),
            ("export RUN_DIR format=torch batch=fixed", "a program of torch.export, for the example's batch alone"),
            (
                "export RUN_DIR format=safetensors output=small.safetensors",
                "the weights alone",
            ),
        ),
        takes="RUN_DIR [key=value ...]",
    ),
    "completion": Page(
        aim="set up",
        line="complete commands, keys and names in your shell",
        does="Prints a script by which bash, zsh or fish completes the commands, keys and names of `autoprune`.",
        examples=(
            ("completion bash", 'in ~/.bashrc: eval "$(autoprune completion bash)"'),
            ("completion zsh", 'in ~/.zshrc: eval "$(autoprune completion zsh)"'),
            ("completion fish", "in ~/.config/fish/config.fish: autoprune completion fish | source"),
        ),
        takes="bash|zsh|fish",
    ),
}


def program() -> str:
    """What was typed to start this process, up to the command."""
    started = Path(sys.argv[0])
    if started.stem != SCRIPT or not started.name.startswith(SCRIPT):
        return MODULE
    found = shutil.which(SCRIPT)
    return SCRIPT if found and Path(found).resolve() == started.resolve() else str(started)


def as_typed(text: str) -> str:
    """A text that names the program, with the one that was typed."""
    return text.replace(MODULE, program())


def overview(commands: Iterable[str]) -> str:
    """Every command in a line, with an example."""
    listed = list(commands)
    lines = [
        "autoprune finds how much to prune from each layer of a trained PyTorch network under a hard budget.\n",
        f"usage: {MODULE} COMMAND [key=value ...]",
    ]
    for aim in AIMS:
        own = {name: PAGES[name] for name in listed if name in PAGES and PAGES[name].aim == aim}
        lines += ["", aim, *(f"  {name:<12}{page.line:<56}{page.examples[0][0]}" for name, page in own.items())]
    lines += [f"  {name}" for name in listed if name not in PAGES]
    lines += ["", *_flags(), "", f"{MODULE} COMMAND --help shows worked examples, and every key with its default."]
    return "\n".join(lines) + "\n"


def page(command: str, words: Sequence[str] = ()) -> str:
    """What a command does, examples, its keys and the names that it may be given; of words such as strategy=amc, only
    the keys of those.

    Raises:
        InputError: there is no such name.
    """
    groups = _groups(command)
    asked = [(key, name) for key, _, name in (word.partition("=") for word in words) if key in groups and name]
    if asked:
        return "\n".join(_choice(group, name) for group, name in asked)
    known = PAGES.get(command)
    lines = [f"usage: {MODULE} {command} {known.takes if known else '[key=value ...]'}", ""]
    if known:
        lines += [known.does, "", "examples"]
        for words_, why in known.examples:
            lines += [f"  # {why}", f"  {MODULE} {words_}"]
        lines.append("")
    if keys := _keys(command, groups):
        lines += ["keys", *keys, ""]
    several = {group: name for group, name in groups.items() if len(names(group)) > 1}
    for group, default in several.items():
        lines.append(f"{group}={default}, or another of")
        lines += [f"  {name:<23}{first_line(group, name)}" for name in names(group)]
        lines.append("")
    if several:
        group = "strategy" if "strategy" in several else list(several)[-1]
        lines.append(f"{MODULE} {command} --help {group}={several[group]} shows the keys of that one.")
    if "task" in groups:
        lines.append("A task of your own: task._target_=my_module.make_task task.argument=value")
    return "\n".join([*lines, *([] if lines[-1] == "" else [""]), *_flags()]) + "\n"


def _flags() -> list[str]:
    return [f"{flag:<14}{does}" for flag, does in FLAGS]


def first_line(group: str, name: str) -> str:
    """What the YAML of a name says of it, without the YAML's comment mark."""
    line = (CONF / group / f"{name}.yaml").read_text().partition("\n")[0]
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def _groups(command: str) -> dict[str, str]:
    """The groups that a command's configuration is made of, and the name of each by default."""
    path = CONF / f"{command}.yaml"
    listed = (yaml.safe_load(path.read_text()) or {}).get("defaults", []) if path.exists() else []
    return {group: name for entry in listed if isinstance(entry, dict) for group, name in entry.items()}


def _keys(command: str, groups: Iterable[str]) -> list[str]:
    """The keys of a command's YAML as they are written there, and of the groups that have one YAML only."""
    path = CONF / f"{command}.yaml"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    if "defaults:" in lines:
        after = lines[lines.index("defaults:") + 1 :]
        lines = after[len(list(takewhile(lambda line: line.startswith((" ", "-")), after))) :]
    else:
        lines = lines[len(list(takewhile(lambda line: line.startswith("#"), lines))) :]
    for group in groups:
        if len(names(group)) == 1:
            own = (CONF / group / f"{names(group)[0]}.yaml").read_text().splitlines()
            lines += ["", f"{group}:", *(f"  {line}" for line in own if not line.startswith("_target_"))]
    return [f"  {line}".rstrip() for line in lines if line.strip()]


def _choice(group: str, name: str) -> str:
    spec(group, name)
    head, _, rest = (CONF / group / f"{name}.yaml").read_text().partition("\n")
    return f"{head}\n{group}: # ={name}\n" + "".join(f"  {line}\n" for line in rest.splitlines())
