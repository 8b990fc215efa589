"""The tracer against masking computed another way, against Torch-Pruning, and against a sabotaged proof."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import ZOO, C2f, MobileNetV2

from autoprune.core import InputError
from autoprune.label_rules import _blocks
from autoprune.space import Space, trace
from autoprune.tasks.resnet import ResNet
from autoprune.traced import TracedModel


def built(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = ZOO[name].build().eval()
    for module in model.modules():  # statistics and scales as after training, so that no unit is trivially alike
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def result(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """All that the model returns, in one row for each example."""
    outputs = [x for x in tree_leaves(model(*inputs)) if isinstance(x, torch.Tensor)]
    return torch.cat([x.flatten(1) for x in outputs], 1)


def masked_by_consumers(model: nn.Module, traced: TracedModel, kept: list[Any]) -> nn.Module:
    """Full size, with only the weights that *read* removed units set to zero: independent of what makes them."""
    masked = copy.deepcopy(model)
    tensors = dict(masked.named_parameters())
    for group, pieces, units in zip(traced.space.groups, traced.slices, kept, strict=True):
        gone = np.setdiff1d(np.arange(group.size), units)
        for piece in pieces:
            if piece.role == "in" and len(gone):
                index = torch.from_numpy(piece.positions[gone].ravel())
                with torch.no_grad():
                    tensors[piece.tensor].index_fill_(piece.dim, index, 0.0)
    return masked


@pytest.mark.parametrize("name", ZOO)
def test_the_groups_are_those_expected(name: str) -> None:
    traced = trace(built(name), ZOO[name].inputs())
    assert {g.name: g.size for g in traced.space.groups} == ZOO[name].groups


READ_BY_WEIGHTS = sorted(set(ZOO) - {"tied"})  # whose embedding is read by itself


@pytest.mark.parametrize("name", READ_BY_WEIGHTS)
def test_every_group_cut_alone_equals_masking_what_reads_it(name: str) -> None:
    model, inputs = built(name), ZOO[name].inputs(3)
    traced = trace(model, inputs)
    rng = np.random.default_rng(0)
    for g, group in enumerate(traced.space.groups):
        kept = [np.arange(other.size) for other in traced.space.groups]
        kept[g] = np.sort(rng.choice(group.size, max(1, group.size // 2), replace=False))
        with torch.no_grad():
            cut = result(traced.cut(model, kept), inputs)
            masked = result(masked_by_consumers(model, traced, kept), inputs)
            dense = result(model, inputs)
        scale = float(masked.abs().max())
        assert float((cut - masked).abs().max()) <= 1e-5 * scale, group.name
        assert float((dense - masked).abs().max()) > 1e-4 * scale, f"removing units of {group.name} changes nothing"


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(READ_BY_WEIGHTS), seed=st.integers(0, 10**6))
def test_any_units_of_all_groups_together_equal_masking(name: str, seed: int) -> None:
    model, inputs = built(name, seed), ZOO[name].inputs(2)
    traced = trace(model, inputs)
    rng = np.random.default_rng(seed)
    kept = []
    for group in traced.space.groups:
        widths = [group.kept(level) for level in group.levels]
        kept.append(np.sort(rng.choice(group.size, int(rng.choice(widths)), replace=False)))
    with torch.no_grad():
        cut, masked = (
            result(each, inputs) for each in (traced.cut(model, kept), masked_by_consumers(model, traced, kept))
        )
    assert float((cut - masked).abs().max()) <= 1e-5 * float(masked.abs().max()) + 1e-7


def test_a_tied_embedding_loses_the_same_columns_where_it_reads() -> None:
    model, inputs = built("tied"), ZOO["tied"].inputs(2)
    traced = trace(model, inputs)
    kept = [np.array([1, 2, 5, 11]), np.arange(24)]
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.get_parameter("embedding.weight")[:, np.setdiff1d(np.arange(12), kept[0])] = 0.0
        masked.get_parameter("down.weight")[np.setdiff1d(np.arange(12), kept[0])] = 0.0
        masked.get_parameter("down.bias")[np.setdiff1d(np.arange(12), kept[0])] = 0.0
        torch.testing.assert_close(result(traced.cut(model, kept), inputs), result(masked, inputs))


def test_a_model_called_by_keywords_is_traced_as_it_is() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * scale)  # type: ignore[no-any-return]

    model, inputs = Named().eval(), {"scale": torch.rand(4, 1), "x": torch.randn(4, 6)}
    traced = trace(model, inputs)
    assert [(g.name, g.size) for g in traced.space.groups] == [("a", 8)]
    smaller = traced.cut(model, [np.array([0, 3])])
    assert type(smaller) is Named
    assert smaller(**inputs).shape == (4, 3)


@pytest.mark.parametrize("name", ZOO)
def test_nothing_removed_is_bit_identical_and_the_model_untouched(name: str) -> None:
    model, inputs = built(name), ZOO[name].inputs()
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, inputs)
    copied = traced.cut(model, [np.arange(g.size) for g in traced.space.groups])
    with torch.no_grad():
        assert torch.equal(result(copied, inputs), result(model, inputs))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    shared = {t.data_ptr() for t in model.parameters()} & {t.data_ptr() for t in copied.parameters()}
    assert not shared


@pytest.mark.parametrize(
    "name", ["plain", "vgg", "resnet", "mobilenetv2", "densenet", "squeeze_excite", "auto_encoder"]
)
def test_parameters_are_those_torch_pruning_leaves(name: str) -> None:
    """Torch-Pruning, where it is right, removes the same parameters for the same units."""
    import torch_pruning as tp

    model, inputs = built(name), ZOO[name].inputs()
    traced = trace(model, inputs)
    for g, group in enumerate(traced.space.groups):
        theirs = copy.deepcopy(model)
        graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=inputs[0])
        layer = theirs.get_submodule(group.members[0])
        prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
        graph.get_pruning_group(layer, prune, idxs=[0, 1]).prune()
        kept = [np.arange(other.size) for other in traced.space.groups]
        kept[g] = np.arange(2, group.size)
        ours = traced.cut(model, kept)
        assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {
            k: tuple(v.shape) for k, v in theirs.state_dict().items()
        }, group.name
        with torch.no_grad():
            assert torch.allclose(ours(*inputs), theirs(*inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer", "operation"),
    [
        ("vit_block", "patch", "aten.native_layer_norm"),
        ("group_normed_by_one", "a", "aten.native_group_norm"),
        ("unknown", "a.0", "aten.cumprod"),
        ("plain", "4", "the model's output"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_operation(name: str, layer: str, operation: str) -> None:
    refused = {r.name: r.reason for r in trace(built(name), ZOO[name].inputs()).space.refused}
    assert operation in refused[layer]


def test_a_wrong_group_does_not_pass_the_proof() -> None:
    """Shift the positions that one group owns in its reader: the proof must see it."""
    from autoprune.proof import _check

    model, inputs = built("plain"), ZOO["plain"].inputs(2)
    traced = trace(model, inputs)
    assert _check(model, inputs, traced, [0, 1], 0) is None
    first = list(traced.slices[0])
    reader = next(i for i, piece in enumerate(first) if piece.role == "in")
    first[reader] = dataclasses.replace(first[reader], positions=np.roll(first[reader].positions, 1, axis=0))
    wrong = dataclasses.replace(traced, slices=(tuple(first), *traced.slices[1:]))
    assert "differs from masking" in str(_check(model, inputs, wrong, [0], 0))


def test_a_hard_coded_view_is_refused_by_name() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6 * 144, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x)).view(-1, 864))  # type: ignore[no-any-return]

    traced = trace(Fixed(), (torch.randn(1, 3, 16, 16),))
    assert [g.name for g in traced.space.groups] == ["a"]
    reason = next(r.reason for r in traced.space.refused if r.name == "b")
    assert "does not run" in reason or "aten.view" in reason


def test_sizes_kept_in_attributes_follow_the_cut() -> None:
    model = C2f(cached=True).eval()
    traced = trace(model, ZOO["c2f"].inputs())
    kept = [np.arange(g.size) for g in traced.space.groups]
    kept[[g.name for g in traced.space.groups].index("cv1.0")] = np.array([1, 4, 6])
    assert traced.cut(model, kept).c == 3
    assert model.c == 8


def test_depthwise_sizes_follow_the_cut() -> None:
    model = MobileNetV2().eval()
    traced = trace(model, ZOO["mobilenetv2"].inputs())
    names = [g.name for g in traced.space.groups]
    kept = [np.arange(g.size) for g in traced.space.groups]
    kept[names.index("1.body.0.0")] = np.arange(5)
    depthwise = traced.cut(model, kept).get_submodule("1.body.1.0")
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (5, 5, 5)


@pytest.mark.parametrize(("round_to", "max_ratio"), [(1, 0.9), (4, 0.9), (8, 0.5)])
def test_levels_respect_rounding_and_floor(round_to: int, max_ratio: float) -> None:
    traced = trace(
        ResNet(depth=8), (torch.randn(1, 3, 16, 16),), Space(levels=6, round_to=round_to, max_ratio=max_ratio)
    )
    for group in traced.space.groups:
        assert 2 <= len(group.levels) <= 6
        for level in group.levels:
            assert group.kept(level) % round_to == 0
            assert level <= max_ratio + 1e-9
            assert group.kept(level) == pytest.approx(group.size * (1 - level))


def test_a_model_with_nothing_to_prune_says_why() -> None:
    with pytest.raises(InputError, match="nothing in this model can be pruned: 0: it is the model's output"):
        trace(nn.Sequential(nn.Linear(4, 2)), (torch.randn(1, 4),))


def test_a_model_that_does_not_run_on_its_inputs_says_so() -> None:
    with pytest.raises(InputError, match=r"does not run on task\.inputs"):
        trace(ResNet(depth=8), (torch.randn(1, 1, 16, 16),))


def test_blocks_pair_dimensions_of_equal_products() -> None:
    assert list(_blocks((2, 8, 4, 4), (2, 2, 4, 16))) == [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    assert list(_blocks((6, 4), (2, 3, 4))) == [([0], [0, 1]), ([1], [2])]


def test_levels_stop_where_the_model_breaks() -> None:
    """squeeze() swallows a channel dimension of one: that width is not offered."""

    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.adaptive_avg_pool2d(self.a(x), 1).squeeze())  # type: ignore[no-any-return]

    traced = trace(Squeezed(), (torch.randn(2, 3, 8, 8),))
    assert [g.kept(g.levels[-1]) for g in traced.space.groups] == [2]


def test_a_model_that_works_in_place_on_its_input_is_traced_and_nothing_is_changed() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return self.head(self.b(torch.relu(self.a(x))).mean((2, 3)))  # type: ignore[no-any-return]

    inputs = torch.randn(2, 3, 8, 8)
    before = inputs.clone()
    traced = trace(Normalising(), (inputs,))
    assert {g.name for g in traced.space.groups} == {"a", "b"}
    assert torch.equal(inputs, before)


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> object:
            return dataclasses.make_dataclass("Output", ["logits"])(self.a(x))

    with pytest.raises(InputError, match="returns Output, which cannot be compared"):
        trace(Opaque(), (torch.randn(1, 3, 8, 8),))


def test_an_attribute_that_only_happens_to_match_is_left() -> None:
    model = C2f(cached=True)
    model.num_classes = 8  # type: ignore[assignment]
    traced = trace(model.eval(), ZOO["c2f"].inputs())
    assert [(link.module, link.attribute) for link in traced.attributes] == [("", "c")]


def test_weights_stored_input_first_have_the_right_roles() -> None:
    class InputFirst(nn.Module):
        """As GPT-2's Conv1D: x @ w with w [in, out]."""

        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.w1) @ self.w2

    (group,) = trace(InputFirst(), (torch.randn(2, 6),)).slices
    assert {(p.tensor, p.dim, p.role) for p in group} == {("w1", 1, "out"), ("w2", 0, "in")}


def test_torchs_compiler_stays_out() -> None:
    """It takes two seconds to import and 95 MB, and torch would import it for any mode that sees operations."""
    code = """
import sys
from test_space import built
from zoo import ZOO
from autoprune.meters.counts import activation_bytes
from autoprune.space import trace
model, inputs = built("resnet"), ZOO["resnet"].inputs(2)
trace(model, inputs)
activation_bytes(model, inputs)
assert "torch._dynamo" not in sys.modules
assert "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
