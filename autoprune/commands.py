"""The commands of the command line: a configuration in, files and a last screen out, and the exit status."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.components import make_task
from autoprune.configuration import config_of, configured, made
from autoprune.core import Budget, InputError, Task
from autoprune.runfolder import check_finished, run_folder
from autoprune.telling import telling

if TYPE_CHECKING:
    from autoprune.outset import Outset
    from autoprune.screen import Screen

MET, WRONG_INPUT, NOT_MET = 0, 2, 3


def _search(words: Sequence[str]) -> int:
    config = configured("search", words)
    from autoprune import console, dashboard, report, run

    budgets = _budgets(config["budget"])
    settings = _search_settings(config)
    task = _task(config)
    folder = run_folder(config, task.name, _short_name(config["strategy"]))
    command = _told("search", words)
    with _watched(lambda outset: report.begin(outset, folder, command)) as screen:
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
    report.write(result, folder, command)
    if result.storage and result.study:
        storage = config["study"]["storage"]
        dashboard.attach(folder / "report.html", storage=storage, study=result.study, output=config["output"])
    console.show(result, folder, command=command, task_words=_of(words, "task", "weights="))
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
    from autoprune import compare, console
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
    folder = run_folder(config, task.name, "compare", str(config["name"] or identity))
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
    console.show_comparison(compare.told(rows), [folder / name for name in compare.FILES], rows)
    wanted = len(budgets) * len(strategies) * len(config["seeds"])
    return MET if len(rows) == wanted and all(row.met for row in rows) else NOT_MET


def _doctor(words: Sequence[str]) -> int:
    config = configured("doctor", words)
    from autoprune import console, diagnosis
    from autoprune.checkup import Plan
    from autoprune.space import Space

    space = made(Space, config["space"], "space")
    plan = made(Plan, {key: config[key] for key in ("images", "seconds", "seed")}, "doctor")
    with _watched() as screen:
        found = diagnosis.examine(
            lambda: _task(config),
            space=space,
            device=config["device"],
            storage=config["study"]["storage"],
            output=Path(config["output"]),
            plan=plan,
            progress=screen,
        )
    console.show_examination(found)
    if found.failed and telling().json:
        return WRONG_INPUT  # it is in the object
    if found.failed:
        raise InputError("; ".join(f"{finding.what}: {finding.detail}" for finding in found.failed))
    return MET


def _train(words: Sequence[str]) -> int:
    config = configured("train", words)
    from autoprune import console, report, training
    from autoprune.recover import FineTune
    from autoprune.space import Space

    plan = made(FineTune, config["training"], "training")
    space = made(Space, config["space"], "space")
    task = _task(config)
    folder = run_folder(config, task.name, "train")
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
    console.show_trained(trained, folder, words=_of(words, "task", "space"))
    return MET


def _profile(words: Sequence[str]) -> int:
    config = configured("profile", words)
    from autoprune import console, measuring

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
    console.show_profile(table, traced.space)
    return MET


def _profile_plan(values: Mapping[str, Any]) -> Any:
    from autoprune.meters.profile import Profile

    return made(Profile, {k: values[k] for k in ("networks", "held_out")}, "profile")


def _finetune(words: Sequence[str]) -> int:
    config = configured("finetune", words)
    from autoprune import console, final, report
    from autoprune.prune import RatioTable
    from autoprune.rounds import Final

    table = RatioTable.load(config["ratios"])
    plan = made(Final, config["finetune"], "finetune")
    task = _task(config)
    folder = run_folder(config, task.name, "finetune")
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
    console.show_finetuned(tuned, folder)
    return MET


def _measure(words: Sequence[str]) -> int:
    from autoprune import console, measuring, report

    if len(words) != 1:
        raise InputError(
            "measure takes one argument, the folder of a finished run: python -m autoprune measure RUN_DIR"
        )
    folder = Path(words[0])
    check_finished(folder)
    config = config_of(folder)
    task = _task(config)
    then, now, budgets = measuring.measured_again(task, folder, device=config["device"], seed=config["seed"] + 1)
    met = console.show_again(then, now, budgets)
    try:
        report.write_again(folder, now, budgets)
    except (InputError, OSError) as error:  # it was measured all the same
        sys.stderr.write(f"autoprune: what was measured is not kept in the report of {folder}: {error}\n")
    return MET if met else NOT_MET


def _export(words: Sequence[str]) -> int:
    if not words or ("=" in words[0] and not Path(words[0]).is_dir()):
        raise InputError(
            "export takes the folder of a finished run first: python -m autoprune export RUN_DIR format=onnx"
        )
    settings = configured("export", words[1:])
    from autoprune import console, exporting

    folder, output = Path(words[0]), settings.pop("output")
    plan = made(exporting.Plan, settings, "export")
    if not isinstance(output, str | None):
        raise InputError(f"output must be a path, got {output!r}")
    check_finished(folder)
    task = _task(config_of(folder, ("task",)))
    console.show_exported(exporting.export_run(task, folder, plan, output=output), folder)
    return MET


def _report(words: Sequence[str]) -> int:
    from autoprune import console, report

    if len(words) != 1:
        raise InputError("report takes one argument, the folder of a run: python -m autoprune report RUN_DIR")
    report.rewrite(Path(words[0]))
    console.show_report(Path(words[0]))
    return MET


def _dashboard(words: Sequence[str]) -> int:
    config = configured("dashboard", words)
    from autoprune import console, dashboard

    storage = config["study"]["storage"]
    dashboard.serve(
        storage,
        artifacts=dashboard.artifacts_of(storage or "", config["output"]),
        host=config["host"],
        port=config["port"],
        browse=config["open"],
        listening=console.show_dashboard,
    )
    return MET


def _completion(words: Sequence[str]) -> int:
    from autoprune.completion import SHELLS, script

    if len(words) != 1 or words[0] not in SHELLS:
        raise InputError(
            f"completion takes the name of a shell, one of {', '.join(SHELLS)}, got {' '.join(words) or 'none'}: "
            "python -m autoprune completion --help"
        )
    sys.stdout.write(script(words[0], COMMANDS))
    return MET


def _task(config: Mapping[str, Any]) -> Task:
    """The task of a configuration, its model with the weights that this names, if it does."""
    task = make_task(config["task"])
    if config.get("weights") is None:
        return task
    from autoprune.weights import with_weights

    return with_weights(task, config["weights"])


def _told(command: str, words: Sequence[str]) -> list[str]:
    """The words of a command as they are written down: without the password of a database, wherever its URL stands."""
    from autoprune.storage import HIDDEN, shown

    def told(found: re.Match[str]) -> str:
        hidden = shown(found[0])
        return hidden if HIDDEN in hidden else found[0]

    written = [re.sub(r"[a-z]\w*(\+\w+)?://[^'\"]*[^'\"}\]]", told, word) for word in words]
    return ["python", "-m", "autoprune", command, *written]


def _of(words: Sequence[str], *beginnings: str) -> list[str]:
    """Those words of a command that another one needs too."""
    return [word for word in words if word.lstrip("+~").startswith(beginnings)]


def _budgets(value: Any) -> list[str]:
    texts = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    for text in texts:
        Budget.parse(text)
    return texts


def _short_name(values: Mapping[str, Any]) -> str:
    from autoprune.components import named

    return named("strategy", values).rpartition(".")[2].lower()


def _watched(begun: Callable[[Outset], None] = lambda outset: None) -> Screen:
    from autoprune.screen import Screen

    return Screen(logging.getLogger("autoprune"), begun=begun, quiet=telling().quiet)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "search": _search,
    "doctor": _doctor,
    "train": _train,
    "compare": _compare,
    "profile": _profile,
    "finetune": _finetune,
    "measure": _measure,
    "export": _export,
    "report": _report,
    "dashboard": _dashboard,
    "completion": _completion,
}
