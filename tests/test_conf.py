"""Every YAML of conf/ stands for something that can be built, and every key is one that its target takes."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoprune import components
from autoprune.configuration import GROUPS, configured
from autoprune.core import InputError
from autoprune.evaluate import Scoring
from autoprune.exporting import Plan
from autoprune.final import FINAL
from autoprune.measuring import device_of
from autoprune.meters.device import Device
from autoprune.meters.profile import Profile
from autoprune.recover import FineTune
from autoprune.regularizers import RANKED_BY
from autoprune.rounds import Final
from autoprune.space import Space
from autoprune.testing import World
from autoprune.training import SPARSE

FILES = sorted(components.CONF.rglob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def test_all_groups_are_known_to_the_command_line() -> None:
    assert {p.parent.name for p in FILES if p.parent != components.CONF} == set(GROUPS)


COMPONENTS = ("task", "strategy", "criterion", "regularizer")


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in COMPONENTS], ids=str)
def test_every_component_takes_the_keys_of_its_yaml(path: Path) -> None:
    values = read(path)
    function = components.locate(values.pop("_target_"), path.stem)
    accepted = inspect.signature(function).parameters
    assert set(values) <= set(accepted)
    required = {n for n, p in accepted.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    assert required <= set(values) | {"batches", "loss", "seed"}


@pytest.mark.parametrize("name", [name for name in components.names("strategy") if name != "amc_paper"])
def test_every_strategy_is_built_with_the_defaults_of_its_class(name: str) -> None:
    world, values = World(0), components.spec("strategy", name)
    components.bind(values, "strategy", (), (), {}, seed=0)(world.space, world.budgets, world.costs, seed=0)
    signature = inspect.signature(components.locate(values["_target_"], "strategy")).parameters
    for key, value in values.items():
        if key != "_target_":
            assert signature[key].default == (tuple(value) if isinstance(value, list) else value), f"{name}.{key}"


def test_the_papers_amc_differs_where_it_is_said_to() -> None:
    ours, papers = components.spec("strategy", "amc"), components.spec("strategy", "amc_paper")
    different = {key: papers[key] for key in ours if ours[key] != papers[key]}
    paper = {
        "actor_lr": 1e-4,
        "credit": "every_step",
        "index": "scalar",
        "decay": 0.95,
        "hidden": [300, 300],
        "least": 0.0,
    }
    assert different == paper
    assert components.named("strategy", papers) == "amc_paper"
    assert components.named("strategy", ours | {"episodes": 10}) == "amc"
    world = World(0)
    components.bind(papers, "strategy", (), (), {}, seed=0)(world.space, world.budgets, world.costs, seed=0)


@pytest.mark.parametrize("name", components.names("criterion"))
def test_every_criterion_yaml_has_all_settings_of_its_function_and_their_defaults(name: str) -> None:
    values = components.spec("criterion", name)
    signature = inspect.signature(components.locate(values.pop("_target_"), "criterion")).parameters
    settings = {n: p.default for n, p in signature.items() if p.kind is p.KEYWORD_ONLY}
    assert values == {n: default for n, default in settings.items() if n not in ("batches", "loss", "seed")}


@pytest.mark.parametrize("name", components.names("regularizer"))
def test_every_regularizer_yaml_has_all_settings_of_its_function_and_their_defaults(name: str) -> None:
    values = components.spec("regularizer", name)
    signature = inspect.signature(components.locate(values.pop("_target_"), "regularizer")).parameters
    assert values == {n: p.default for n, p in signature.items() if p.kind is p.KEYWORD_ONLY}


def test_a_regularizer_goes_with_a_criterion_that_there_is() -> None:
    assert set(RANKED_BY) == set(components.names("regularizer"))
    assert set(RANKED_BY.values()) <= set(components.names("criterion"))


@pytest.mark.parametrize("name", components.names("task"))
def test_every_task_yaml_has_the_defaults_of_its_function(name: str) -> None:
    values = components.spec("task", name)
    signature = inspect.signature(components.locate(values["_target_"], "task")).parameters
    for key, value in values.items():
        if key != "_target_" and value != "???":
            assert signature[key].default == (tuple(value) if isinstance(value, list) else value), f"{name}.{key}"


def test_value_types_have_the_defaults_of_their_yaml() -> None:
    evaluator = read(components.CONF / "evaluator" / "default.yaml")
    scoring = Scoring()
    assert (evaluator["images"], evaluator["recalibration"]) == (scoring.images, scoring.recalibration)
    assert FineTune(**evaluator["short"]) == scoring.short
    assert tuple(evaluator["recovery"]) == scoring.recovery
    assert Final(**read(components.CONF / "finetune" / "default.yaml")) == FINAL
    assert FineTune(**read(components.CONF / "train.yaml")["training"]) == SPARSE
    assert Plan(**{k: v for k, v in read(components.CONF / "export.yaml").items() if k != "output"}) == Plan()
    search, profile = (read(components.CONF / f"{name}.yaml") for name in ("search", "profile"))
    assert read(components.CONF / "space" / "channel.yaml") == {**vars(Space()), "grain": list(Space().grain)}
    assert search["profile"] == {"folder": "outputs/tables", **dataclasses.asdict(Profile())}
    assert (profile["folder"], profile["networks"]) == ("outputs/tables", Profile().networks)
    assert Device(**{k: v for k, v in components.spec("device", "torch_cpu").items() if k != "_target_"}) == Device()


@pytest.mark.parametrize("name", components.names("device"))
def test_every_device_yaml_is_named_after_itself(name: str) -> None:
    assert device_of(name).name == name


@pytest.mark.parametrize("command", ["search", "compare", "profile", "finetune", "train"])
def test_every_command_composes(command: str) -> None:
    words = ["ratios=x.yaml"] if command == "finetune" else []
    assert configured(command, words)["task"]["_target_"].endswith("fashion_mnist_resnet20.make_task")


@pytest.mark.parametrize("words", ["finetune ratios=x.yaml device=cuda", "train device=cuda"])
def test_a_value_may_have_the_name_of_a_group(words: str) -> None:
    command, *rest = words.split()
    assert configured(command, rest)["device"] == "cuda"
    with pytest.raises(InputError, match="device must be text, got 5"):
        configured(command, [*rest, "device=5"])


def test_a_function_of_ones_own_gets_its_own_arguments_alone() -> None:
    words = ["strategy=random", "strategy._target_=mine.Halves", "strategy.depth=0.5", "criterion._target_=mine.ranks"]
    values = configured("search", words)
    assert values["strategy"] == {"_target_": "mine.Halves", "depth": 0.5}
    assert values["criterion"] == {"_target_": "mine.ranks"}
    with pytest.raises(InputError, match=r"compare has no strategy: leave strategy\._target_=mine\.Halves out"):
        configured("compare", ["strategy._target_=mine.Halves"])
