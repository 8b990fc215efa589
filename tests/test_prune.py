from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import nn
from zoo import ZOO

from autoprune import criteria
from autoprune.core import InputError
from autoprune.keywords import positional
from autoprune.prune import RatioTable, choose_units, weights_hash
from autoprune.rows import TableGroup
from autoprune.space import trace
from autoprune.tasks.resnet import ResNet

INPUTS = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)


def network(seed: int = 0, width: int = 8, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet(depth=8, width=width, classes=classes).eval()


def table_of(model: nn.Module, ratio: float = 0.5, inputs: tuple[torch.Tensor, ...] = INPUTS) -> RatioTable:
    traced = trace(model, inputs)
    scores = criteria.l1(model, traced.slices)
    ratios = [min(g.levels, key=lambda level: abs(level - ratio)) for g in traced.space.groups]
    kept = choose_units(traced.space, scores, ratios)
    return RatioTable(
        groups=tuple(
            TableGroup(name=g.name, size=g.size, units=tuple(units.tolist()), members=g.members)
            for g, units in zip(traced.space.groups, kept, strict=True)
        ),
        architecture=traced.fingerprint,
        weights=weights_hash(model),
        budgets=({"budget": "flops_50pct", "met": True},),
        provenance={"task": "test"},
    )


def test_a_table_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    table = table_of(network())
    table.save(tmp_path / "ratios.yaml")
    assert RatioTable.load(tmp_path / "ratios.yaml") == table
    written = yaml.safe_load((tmp_path / "ratios.yaml").read_text())
    assert written["groups"]["conv1"] == {
        "size": 8,
        "kept": 4,
        "ratio": 0.5,
        "members": ["conv1", "layer1.0.conv2"],
        "units": list(table.groups[0].units),
    }


def test_on_the_same_weights_the_listed_units_are_kept() -> None:
    model = network()
    table = table_of(model)
    listed = dataclasses.replace(table.groups[0], units=(0, 1, 2, 3))
    smaller = dataclasses.replace(table, groups=(listed, *table.groups[1:])).prune(model, INPUTS)
    assert torch.equal(smaller.get_parameter("conv1.weight"), model.get_parameter("conv1.weight")[:4])


def test_reconstruction_brings_a_pruned_network_closer_and_leaves_the_model_in_its_mode() -> None:
    model = network().train()
    table, batches = table_of(model), [(torch.randn(32, 3, 16, 16), torch.zeros(32))]
    plain, refitted = (table.prune(model, INPUTS, reconstruct=shown).eval() for shown in ((), batches))
    assert model.training
    model.eval()
    with torch.no_grad():
        wanted = model(*INPUTS)
        assert (refitted(*INPUTS) - wanted).norm() < (plain(*INPUTS) - wanted).norm()


def test_on_other_weights_units_are_ranked_again() -> None:
    table, other = table_of(network(0)), network(1)
    smaller = table.prune(other, INPUTS)
    strength = criteria.l1(other, trace(other, INPUTS).slices)[0]
    chosen = np.sort(np.argsort(-strength)[:4])
    assert torch.equal(smaller.get_parameter("conv1.weight"), other.get_parameter("conv1.weight")[chosen.tolist()])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (network(width=12), "group 'conv1' has 12 units in this model, 8 in the ratio table"),
        (ZOO["vgg"].build(), "no group 'conv1' of 8 units"),
        (network(classes=7), "all groups match but other parameters"),
        (ResNet(depth=14, width=8), "group 'layer1.1.conv1' of this model is not in the ratio table"),
    ],
)
def test_another_architecture_fails_naming_the_first_difference(other: nn.Module, says: str) -> None:
    with pytest.raises(InputError, match=says):
        table_of(network()).prune(other, INPUTS)


def test_rebuild_is_bit_identical_from_a_fresh_model(tmp_path: Path) -> None:
    model = network()
    table = table_of(model)
    smaller = table.prune(model, INPUTS)
    safetensors.torch.save_model(smaller, str(tmp_path / "pruned.safetensors"))
    rebuilt = table.rebuild(network(99), INPUTS, tmp_path / "pruned.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(rebuilt(*INPUTS), smaller(*INPUTS))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = network()
    table = table_of(model)
    safetensors.torch.save_model(model, str(tmp_path / "dense.safetensors"))
    with pytest.raises(InputError, match="does not hold the weights of this pruned network"):
        table.rebuild(model, INPUTS, tmp_path / "dense.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no such thing")
    with pytest.raises(InputError, match="does not hold the weights"):
        table.rebuild(model, INPUTS, tmp_path / "damaged.safetensors")


def damaged(change: dict[str, Any]) -> str:
    row = {"size": 8, "kept": 2, "ratio": 0.75, "members": ["conv1"], "units": [1, 2]} | change
    head = {"format": 1, "architecture": "a", "weights": "w", "criterion": "l1", "grain": "channel", "budgets": []}
    return yaml.safe_dump({**head, "provenance": {}, "groups": {"conv1": row}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not YAML"),
        ("just text", "is not a ratio table of format 1"),
        ("format: 2", "is not a ratio table of format 1"),
        ("format: 1", "is damaged"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        (damaged({"units": [2, 1]}), "must keep 1 to 8 distinct ascending units"),
        (damaged({"units": []}), "must keep 1 to 8"),
        (damaged({"units": [1, 8]}), "must lie in 0..7"),
        (damaged({"units": [-1, 2]}), "must lie in 0..7"),
        (damaged({"units": [1, 2, 3]}), "must keep 1 to 8"),
        (damaged({"size": "8"}), "must keep 1 to 8"),
    ],
)
def test_a_damaged_table_is_refused_in_words(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "ratios.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        RatioTable.load(tmp_path / "ratios.yaml")


def test_an_absent_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        RatioTable.load(tmp_path / "ratios.yaml")


def test_no_pickle_anywhere() -> None:
    source = Path(criteria.__file__).parent
    for path in source.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load(" not in text, path
        assert "yaml.load(" not in text, path
        assert "allow_pickle=True" not in text, path


def test_a_table_that_keeps_none_of_a_group_is_refused() -> None:
    model = network()
    table = table_of(model)
    empty = dataclasses.replace(table, groups=(dataclasses.replace(table.groups[0], units=()), *table.groups[1:]))
    with pytest.raises(InputError, match="keeps none of the 8 units of group 'conv1'"):
        empty.prune(model, INPUTS)


class Named(nn.Module):
    """Called by keywords alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.out = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, *, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.one(one) + self.other(other)))  # type: ignore[no-any-return]


def test_a_pruned_network_is_called_as_the_given_one_is(tmp_path: Path) -> None:
    """By keywords where its inputs were given so, by position where it was made to take them so before."""
    model, inputs = Named(), {"other": torch.randn(2, 4), "one": torch.randn(2, 6)}
    adapted, ordered = positional(model, tuple(inputs)), tuple(inputs.values())
    table = table_of(adapted, inputs=ordered)
    by_name, by_place = table.prune(model, inputs), table.prune(adapted, ordered)
    assert by_name.get_parameter("one.weight").shape == (4, 6)
    with torch.no_grad():
        assert torch.equal(by_name(**inputs), by_place(*ordered))
        safetensors.torch.save_file(by_name.state_dict(), tmp_path / "pruned.safetensors")
        again = table.rebuild(model, inputs, tmp_path / "pruned.safetensors")
        again_by_place = table.rebuild(adapted, ordered, tmp_path / "pruned.safetensors")
        assert torch.equal(again(**inputs), by_name(**inputs))
        assert torch.equal(again_by_place(*ordered), by_name(**inputs))


@pytest.mark.parametrize("name", ["plain", "vgg", "resnet", "mobilenetv2"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_torch_pruning_cuts_the_widths_of_a_table(name: str, ratio: float) -> None:
    import torch_pruning

    torch.manual_seed(0)
    model, inputs = ZOO[name].build().eval(), ZOO[name].inputs()
    table = table_of(model, ratio, inputs)
    wanted = {key: tensor.shape for key, tensor in table.prune(model, inputs).state_dict().items()}
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    ratios = table.to_torch_pruning(model)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model, inputs[0], importance, pruning_ratio=0, pruning_ratio_dict=ratios
    )
    pruner.step()
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == wanted


def test_what_torch_pruning_cannot_be_told_is_refused() -> None:
    for name, says in (("heads", "group 'body.q' is of 4 units"), ("listed_split", "group 'a.0")):
        model = ZOO[name].build().eval()
        with pytest.raises(InputError, match=says):
            table_of(model, inputs=ZOO[name].inputs()).to_torch_pruning(model)
    with pytest.raises(InputError, match="this model has no layer 'conv1'"):
        table_of(network()).to_torch_pruning(ZOO["plain"].build())


def test_layers_have_the_ratio_of_their_group_or_of_all_of_theirs() -> None:
    table = table_of(network())
    layers = table.layer_ratios()
    assert (layers["conv1"], layers["layer1.0.conv2"]) == (0.5, 0.5)
    assert set(layers) == {member for g in table.groups for member in g.members}
    rows = [
        TableGroup(name=n, size=s, units=tuple(range(k)), members=("a",)) for n, s, k in (("a", 4, 1), ("a#2", 2, 2))
    ]
    assert dataclasses.replace(table, groups=tuple(rows)).layer_ratios() == {"a": 0.5}
