"""The command line: a configuration in, Result out. No file below sees a configuration.

Exit status: 0 every budget met; 3 a budget could not be met (the closest result is written); 2 wrong input; 1 our own
failure; 130 interrupted (what was scored is kept, the line to go on is printed).
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.components import make_task
from autoprune.configuration import command_help, config_of, configured, made, save
from autoprune.core import Budget, DeviceLostError, InputError, StorageError, Task
from autoprune.crew import WorkersLostError
from autoprune.writing import is_full

if TYPE_CHECKING:
    from autoprune.report import Screen

MET, FAILED, WRONG_INPUT, NOT_MET, INTERRUPTED = 0, 1, 2, 3, 130
LONGEST = 4000  # characters of an error

HELP = """autoprune finds how much to prune from each layer of a trained PyTorch network under a hard budget.

usage: python -m autoprune COMMAND [key=value ...]

  search     find the ratios, the smaller network and the report    search budget=latency_20ms
  doctor     what can be pruned, and what stands in the way         doctor task=my_task
  train      silence units by training, for a search to start from  train regularizer=bn_l1
  compare    strategies side by side, one table and one plot        compare strategies=[random,amc]
  profile    build or refresh the device's cost table               profile device=torch_cpu
  measure    measure a finished run's network again                measure outputs/.../
  finetune   reuse a ratio table in training                        finetune ratios=outputs/.../ratios.yaml
  report     write report.html of a finished run again              report outputs/.../

python -m autoprune COMMAND --help shows every key with its default.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown command '{command}': it must be one of {', '.join(COMMANDS)}{hint}")
        if any(word in ("-h", "--help") for word in rest):
            sys.stdout.write(command_help(command))
            return 0
        return COMMANDS[command](rest)
    except InputError as error:
        sys.stderr.write(f"autoprune: {_one_line(error)}\n")
        return WRONG_INPUT
    except (DeviceLostError, StorageError, WorkersLostError) as error:
        return _cut_short(error, arguments)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nautoprune: interrupted; {_kept(command)}:\n  {_same_line(arguments)}\n")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001, the last door
        if is_full(error):
            return _cut_short(f"the disk is full: {error}", arguments)
        logging.getLogger("autoprune").error("%s", traceback.format_exc())
        if os.environ.get("AUTOPRUNE_DEBUG"):
            traceback.print_exc()
        sys.stderr.write(
            f"autoprune: failed, {type(error).__name__}: {_one_line(error) or 'no message'} "
            "(the traceback is in the run's log; AUTOPRUNE_DEBUG=1 shows it here)\n"
        )
        return FAILED


def _cut_short(why: Exception | str, arguments: Sequence[str]) -> int:
    sys.stderr.write(f"autoprune: {_one_line(why)}; {_kept(arguments[0])}:\n  {_same_line(arguments)}\n")
    return FAILED


def _one_line(error: Exception | str) -> str:
    """What an error says: as it may repeat a file's own words, without the control characters that move a terminal's
    cursor, and of no more than LONGEST characters."""
    text = " ".join(str(error)[: 100 * LONGEST].split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"


def _kept(command: str) -> str:
    """What a command that was cut short leaves, and what the same line would do."""
    resumed = command in ("search", "compare")
    return "what was scored is kept. To go on" if resumed else "nothing is kept. To begin again"


def _same_line(arguments: Sequence[str]) -> str:
    return shlex.join([sys.executable, "-m", "autoprune", *arguments])


def _search(words: Sequence[str]) -> int:
    config = configured("search", words)
    from autoprune import report, run

    budgets = _budgets(config["budget"])
    settings = _search_settings(config)
    task = _task(config)
    folder = _run_folder(config, task.name, _short_name(config["strategy"]))
    with _watched() as screen:
        result = run.search(
            task,
            budget=budgets,
            strategy=config["strategy"],
            seed=config["seed"],
            readings=folder / "readings.jsonl",
            study_name=config["study"]["name"],
            cache=config["evaluator"]["cache"],
            progress=screen,
            **settings,
        )
    report.write(result, folder)
    report.show(result, folder, task_words=_of(words, "task", "weights="))
    return MET if result.met else NOT_MET


def _search_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a search and a comparison of searches are given alike."""
    from autoprune.evaluate import Scoring
    from autoprune.recover import FineTune
    from autoprune.rounds import Final
    from autoprune.space import Space

    scoring = {k: v for k, v in config["evaluator"].items() if k != "cache"}
    scoring["short"] = made(FineTune, scoring["short"], "evaluator.short")
    return {
        "space": made(Space, config["space"], "space"),
        "scoring": made(Scoring, scoring, "evaluator"),
        "final": made(Final, config["finetune"], "finetune"),
        "profile": _profile_plan(config["profile"]),
        "criterion": config["criterion"],
        "device": config["device"],
        "energy": config["energy"],
        "workers": config["workers"],
        "tables": config["profile"]["folder"],
        "storage": config["study"]["storage"],
    }


def _compare(words: Sequence[str]) -> int:
    config = configured("compare", words)
    from autoprune import compare, report
    from autoprune.prune import weights_hash

    given = config["budget"] if isinstance(config["budget"], list) else [config["budget"]]
    budgets = [tuple(_budgets(budget)) for budget in given]
    strategies = compare.planned(config["strategies"], config["evaluations"], config["settings"])
    compare.check(budgets, config["seeds"])
    settings = _search_settings(config)
    task = _task(config)
    lists = ("budget", "strategies", "seeds", "name", "output", "settings", "workers")
    made_of = config | ({"weights": weights_hash(task.model)} if config["weights"] else {})
    identity = hashlib.sha256(repr(sorted((k, v) for k, v in made_of.items() if k not in lists)).encode()).hexdigest()[
        :8
    ]
    folder = _run_folder(config, task.name, "compare", str(config["name"] or identity))
    with _watched() as screen:
        rows = compare.compare(
            task,
            budgets=budgets,
            strategies=strategies,
            seeds=config["seeds"],
            folder=folder,
            identity=identity,
            progress=screen,
            **settings,
        )
    report.show_comparison(compare.told(rows), [folder / name for name in compare.FILES])
    wanted = len(budgets) * len(strategies) * len(config["seeds"])
    return MET if len(rows) == wanted and all(row.met for row in rows) else NOT_MET


def _doctor(words: Sequence[str]) -> int:
    config = configured("doctor", words)
    from autoprune import diagnosis, report
    from autoprune.space import Space

    space = made(Space, config["space"], "space")
    task = _task(config)
    with _watched() as screen:
        found = diagnosis.doctor(task, space, progress=screen)
    report.show_diagnosis(found)
    return MET


def _train(words: Sequence[str]) -> int:
    config = configured("train", words)
    from autoprune import report, training
    from autoprune.recover import FineTune
    from autoprune.space import Space

    plan = made(FineTune, config["training"], "training")
    space = made(Space, config["space"], "space")
    task = _task(config)
    folder = _run_folder(config, task.name, "train")
    with _watched() as screen:
        trained = training.train(
            task,
            regularizer=config["regularizer"],
            plan=plan,
            seed=config["seed"],
            space=space,
            device=config["device"],
            progress=screen,
        )
    report.write_trained(trained, folder)
    report.show_trained(trained, folder, words=_of(words, "task", "space"))
    return MET


def _profile(words: Sequence[str]) -> int:
    config = configured("profile", words)
    from autoprune import measuring, report

    plan = _profile_plan(config)
    task = _task(config)
    with _watched() as screen:
        table, traced = measuring.profile(
            task,
            device=config["device"],
            plan=plan,
            tables=config["folder"],
            max_ratio=config["max_ratio"],
            seed=config["seed"],
            progress=screen,
        )
    report.show_profile(table, traced.space)
    return MET


def _profile_plan(values: Mapping[str, Any]) -> Any:
    from autoprune.meters.profile import Profile

    return made(Profile, {k: values[k] for k in ("networks", "held_out")}, "profile")


def _finetune(words: Sequence[str]) -> int:
    config = configured("finetune", words)
    from autoprune import final, report
    from autoprune.prune import RatioTable
    from autoprune.rounds import Final

    table = RatioTable.load(config["ratios"])
    plan = made(Final, config["finetune"], "finetune")
    task = _task(config)
    folder = _run_folder(config, task.name, "finetune")
    with _watched() as screen:
        tuned = final.finetune_table(
            task,
            table,
            criterion=config["criterion"],
            final=plan,
            recovery=config["recovery"],
            recalibration=config["recalibration"],
            seed=config["seed"],
            device=config["device"],
            progress=screen,
        )
    report.write_finetuned(tuned, folder)
    report.show_finetuned(tuned, folder)
    return MET


def _measure(words: Sequence[str]) -> int:
    from autoprune import measuring, report

    if len(words) != 1:
        raise InputError(
            "measure takes one argument, the folder of a finished run: python -m autoprune measure RUN_DIR"
        )
    folder = Path(words[0])
    config = config_of(folder)
    task = _task(config)
    then, now, budgets = measuring.measured_again(task, folder, device=config["device"], seed=config["seed"] + 1)
    return MET if report.show_again(then, now, budgets) else NOT_MET


def _report(words: Sequence[str]) -> int:
    from autoprune import report

    if len(words) != 1:
        raise InputError("report takes one argument, the folder of a finished run: python -m autoprune report RUN_DIR")
    report.rewrite(Path(words[0]))
    return MET


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "search": _search,
    "doctor": _doctor,
    "train": _train,
    "compare": _compare,
    "profile": _profile,
    "finetune": _finetune,
    "measure": _measure,
    "report": _report,
}


def _task(config: Mapping[str, Any]) -> Task:
    """The task of a configuration, its model with the weights that this names, if it does."""
    task = make_task(config["task"])
    if config.get("weights") is None:
        return task
    from autoprune.weights import with_weights

    return with_weights(task, config["weights"])


def _of(words: Sequence[str], *beginnings: str) -> list[str]:
    """Those words of a command that another one needs too."""
    return [word for word in words if word.startswith(beginnings)]


def _budgets(value: Any) -> list[str]:
    texts = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    for text in texts:
        Budget.parse(text)
    return texts


def _short_name(values: Mapping[str, Any]) -> str:
    from autoprune.components import named

    return named("strategy", values).rpartition(".")[2].lower()


def _run_folder(config: dict[str, Any], task: str, what: str, name: str | None = None) -> Path:
    """A folder for this run, with the configuration and a log in it: a new one, or the one of this name."""
    base = Path(config["output"]) / task / what
    stamp, folder, count = time.strftime("%Y-%m-%d_%H-%M-%S"), Path(), 1
    _check_inside(Path(config["output"]), task, what, name or stamp)
    try:
        while name is None:
            folder = base / (stamp if count == 1 else f"{stamp}_{count}")
            try:
                folder.mkdir(parents=True, exist_ok=False)
                break
            except FileExistsError:
                if not folder.is_dir():
                    raise
                count += 1
        if name is not None:
            folder = base / name
            folder.mkdir(parents=True, exist_ok=True)
        save(config, folder / "config.yaml")
        handler = _Log(folder / "log.txt")
    except OSError as error:
        if is_full(error):
            raise StorageError(f"the disk is full: {folder} cannot be written") from error
        raise InputError(f"output={config['output']}: cannot write to {folder}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("autoprune")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    return folder


class _Log(logging.FileHandler):
    """A run's log; a run is worth more than it, so that what cannot be written is said once and left out."""

    said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        if not self.said:
            sys.stderr.write(f"the log {self.baseFilename} cannot be written ({sys.exception()}): the run goes on\n")
        self.said = True


def _check_inside(output: Path, task: str, what: str, name: str) -> None:
    """Raises InputError where a name that a run's folder is made of leads out of the folder of all runs."""
    for place, text in (("the task's name", task), ("the strategy's name", what), ("name", name)):
        if "\0" in text or Path(text).is_absolute() or ".." in Path(text).parts:
            raise InputError(f"{place} is part of a path inside output={output}: it must not hold '..', got {text!r}")


def _watched() -> Screen:
    from autoprune.report import Screen

    return Screen(logging.getLogger("autoprune"))
