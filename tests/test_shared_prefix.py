"""Candidates scored together come to what they come to alone, and run less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric
from zoo import ZOO, MobileNetV2

from autoprune.core import Task
from autoprune.dependence import Dependence
from autoprune.probe import randomise
from autoprune.recover import recalibrate
from autoprune.scores import Sample, Scored, score
from autoprune.shared_prefix import Outcome, SharedPrefix
from autoprune.space import Space, trace
from autoprune.traced import TracedModel
from autoprune.units import Labels


class Size(MeanMetric):
    """Of the outputs, on average."""

    def update(self, output: Any, target: Tensor) -> None:  # type: ignore[override]
        super().update(size(output, target))


def size(output: Any, target: Tensor) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.square().mean() for leaf in leaves]).sum() + target.sum()


class Together:
    """A model, its candidates of one changed group each, and both ways of scoring them."""

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Tensor, ...]], space: Space = Space()) -> None:
        self.model = model.eval()
        self.traced = trace(model, batches[0], space)
        randomise(self.model, np.random.default_rng(3))
        self.batches = [(batch, torch.zeros(2)) for batch in batches]
        self.task = Task(
            name="together",
            model=self.model,
            inputs=batches[0],
            train=self.batches,
            search=self.batches,
            test=self.batches,
            loss=size,
            metric=Size(),
            lr=0.1,
        )
        self.prefix = SharedPrefix(self.traced, self.model, self.task)

    def together(self, *, recalibrated: bool | int = False) -> dict[int, Outcome]:
        found: dict[int, Outcome] = {}
        batches = self.batches[: int(recalibrated)]
        for block in self.prefix.scored(self.candidates(), self.make, Sample.of(self.batches), batches):
            found |= {number: outcome for number, outcome in block.items() if outcome is not None}
        return found

    def candidates(self) -> dict[int, list[Labels]]:
        found = []
        for g, group in enumerate(self.traced.space.groups):
            for width in sorted({group.kept(group.levels[-1]), group.kept(group.levels[len(group.levels) // 2])}):
                kept = [np.arange(other.size) for other in self.traced.space.groups]
                kept[g] = np.sort(np.random.default_rng(g).choice(group.size, width, replace=False))
                found.append(kept)
        return dict(enumerate(found))

    def make(self, kept: Sequence[Labels]) -> nn.Module:
        return self.traced.cut(self.model, kept, sharing=True).eval()

    def alone(self, kept: Sequence[Labels], *, recalibrated: bool | int) -> Scored:
        model = self.traced.cut(self.model, kept).eval()
        recalibrate(model, self.batches[: int(recalibrated)])
        return score(model, Sample.of(self.batches), self.task)

    def compare(self, *, recalibrated: bool) -> int:
        """How many were scored together, each as alone."""
        candidates = self.candidates()
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        found = self.together(recalibrated=recalibrated)
        for number, outcome in found.items():
            alone = self.alone(candidates[number], recalibrated=recalibrated)
            assert outcome.scored.losses == pytest.approx(alone.losses, rel=1e-5, abs=1e-7)
            assert outcome.scored.score == pytest.approx(alone.score, rel=1e-5, abs=1e-7)
        assert all(torch.equal(before[name], tensor) for name, tensor in self.model.state_dict().items())
        return len(found)


# what these could reuse is less than WORTHWHILE, or not safe to
ALONE = {"plain", "grouped", "super_resolution", "lstm_projected", "gru", "tied", "unet", "shared", "unknown"}
ALONE |= {"group_normed", "group_normed_by_one", "listed_split", "fixed_split"}


@pytest.mark.parametrize("recalibrated", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_scored_together_as_alone(name: str, recalibrated: bool) -> None:
    specimen = ZOO[name]
    torch.manual_seed(0)
    both = Together(specimen.build(), [specimen.inputs(2) for _ in range(3)])
    assert both.compare(recalibrated=recalibrated) == (0 if name in ALONE else len(both.candidates()))


def images(count: int = 3, side: int = 8) -> list[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, side, side, generator=draw),) for _ in range(count)]


class Counted(nn.Conv2d):
    """Counts the examples that it sees."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.seen += len(x)
        return super().forward(x)


class InPlace(nn.Module):
    """Activations that write over their inputs, one of which is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Counted(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.second = nn.Sequential(Counted(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.act = nn.ReLU(inplace=True)
        self.third = nn.Sequential(Counted(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.fourth = Counted(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        self.act(y)  # what it returns is not read: y is
        z = self.third(y)
        z += y
        return torch.as_tensor(self.head(self.fourth(z).mean((2, 3))))


def test_what_is_written_in_place_is_right_and_the_prefix_does_not_run() -> None:
    both = Together(InPlace(), images())
    Counted.seen = 0
    count = len(both.together())
    assert count == len(both.candidates()) == 2 * 3
    first = 2 * (4 + 3 + 1) + 4  # of convolutions, on a batch of four images: what differs, and once what is common
    other = 2 * (3 + 2 + 0) + 4  # those that only lose rows do not run once it is shown that they give the same
    assert Counted.seen == 4 * (first + 2 * other + 2 * 4), "and the first of two groups once in full"
    assert both.compare(recalibrated=False) == both.compare(recalibrated=True) == count
    assert both.prefix.saved / 3 == pytest.approx(2 * 0.67 + 2 * 0.07 - 0.67, abs=0.05)


def test_blocks_that_are_left_out() -> None:
    model = MobileNetV2(classes=4, channels=3)
    both = Together(model, images(side=16), Space(grain=("channel", "block")))
    assert any(g.kind == "block" for g in both.traced.space.groups)
    assert both.compare(recalibrated=True) == len(both.candidates())


def test_what_the_recording_missed_is_found_out_and_left_alone() -> None:
    both = Together(InPlace(), images())
    both.prefix._dependence._calls["third"].groups = 0  # as if it depended on nothing
    assert both.compare(recalibrated=False) == 2, "the last group alone has it before the difference"
    assert both.compare(recalibrated=True) <= 2, "and it is remembered"


def test_an_unchanged_network_is_compared_too() -> None:
    """A hook on what is handed back would run twice on its output."""
    both = Together(InPlace(), images())
    whole = [np.arange(g.size) for g in both.traced.space.groups]
    both.model.get_submodule("head").register_forward_hook(lambda module, given, output: output / 4)
    candidates = {n: list(kept) for n, kept in enumerate([whole, *both.candidates().values()])}
    (block,) = both.prefix.scored(candidates, both.make, Sample.of(both.batches))
    assert block[0] is None
    assert both.prefix._refuted


def test_what_a_hook_listens_to_runs() -> None:
    model = InPlace().eval()
    traced = trace(model, images()[0])
    model.get_submodule("first.0").register_forward_hook(lambda *_: None)
    (last,) = (g for g, group in enumerate(traced.space.groups) if group.name.startswith("fourth"))
    assert set(Dependence(traced, model, images()[0]).reusable([last])) >= {"first.1", "second", "third"}
    assert not {"first", "first.0"} & set(Dependence(traced, model, images()[0]).reusable([last]))


class Borrowed(InPlace):
    """One stage holds the normalisation that another place runs, or runs it a second time past its call."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.again = again
        self.first.add_module("post", nn.Identity() if again else nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.Sequential(*list(self.first)[:3])(x) if not self.again else self.first(x)
        y = self.third(self.second(x))
        y = self.first[1].forward(y) if self.again else self.first.get_submodule("post")(y)
        return torch.as_tensor(self.head(self.fourth(y).mean((2, 3))))


@pytest.mark.parametrize("again", [False, True])
def test_statistics_are_those_of_where_a_norm_runs(again: bool) -> None:
    both = Together(Borrowed(again=again), images())
    both.compare(recalibrated=False)
    assert (both.compare(recalibrated=True) == 0) == again


class Deciding(nn.Module):
    """What one branch gives decides in Python what the other does."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        self.branch = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.side, self.head = nn.Sequential(nn.Conv2d(3, 32, 5, padding=2), nn.ReLU()), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x).mean((2, 3))
        if self.read == "tolist":
            value = sum(y.flatten().tolist())
        elif self.read == "numpy":
            value = float(y.detach().numpy().sum())
        else:
            value = float(len(y[y > 0]))
        side = self.side(x * (2.0 if value > 0.1 else 1.0)).mean((2, 3))
        return torch.as_tensor(self.head(torch.cat([y, side], 1)))


@pytest.mark.parametrize("read", ["tolist", "numpy", "length"])
def test_what_python_reads_decides_all_that_follows(read: str) -> None:
    model = Deciding(read).eval()
    traced = trace(model, images()[0])
    inner = [g for g, group in enumerate(traced.space.groups) if group.name.startswith("branch.0")]
    assert inner
    assert set(Dependence(traced, model, images()[0]).reusable(inner)) == set()


def test_a_module_whose_inside_is_read_from_without_runs() -> None:
    class Tapped(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            inner = self.second[0](self.first(x))
            return torch.as_tensor(self.head(self.fourth(self.third(self.second[1](inner)) + inner).mean((2, 3))))

    class Aside(nn.Sequential):
        kept: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self[0](x)
            return torch.as_tensor(self[1](self.kept))

    class Reading(InPlace):
        def __init__(self) -> None:
            super().__init__()
            self.second = Aside(*self.second)

        def forward(self, x: Tensor) -> Tensor:
            y = self.third(self.second(self.first(x))) + self.second.kept
            return torch.as_tensor(self.head(self.fourth(y).mean((2, 3))))

    for kind, seconds in ((Tapped, {"second.0", "second.1"}), (Reading, {"second.0", "second.1"})):
        model = kind().eval()
        traced = trace(Tapped().eval(), images()[0])
        (last,) = (g for g, group in enumerate(traced.space.groups) if group.name.startswith("fourth"))
        found = Dependence(traced, model, images()[0]).reusable([last])
        assert {name for name in found if name.startswith("second")} == seconds


def test_networks_take_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Together(InPlace(), images())
    sample, count = Sample.of(both.batches), len(both.candidates())
    assert [len(block) for block in both.prefix.scored(both.candidates(), both.make, sample)] == [count]
    monkeypatch.setattr("autoprune.shared_prefix.KEPT", 1)
    assert [len(block) for block in both.prefix.scored(both.candidates(), both.make, sample)] == [1] * count


def test_buffers_that_candidates_write_are_their_own() -> None:
    class Observing(InPlace):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("largest", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("largest").copy_(torch.maximum(self.get_buffer("largest"), x.max()))
            return super().forward(x)

    both = Together(InPlace(), images())
    model = Observing().eval()
    smaller = both.traced.cut(model, both.candidates()[0], sharing=True)
    smaller(images()[0][0])
    assert float(model.get_buffer("largest")) == 0
    assert smaller.get_parameter("head.weight").data_ptr() == model.get_parameter("head.weight").data_ptr()


class Fragile(InPlace):
    """Fails while it runs with a narrow first convolution, once it is armed."""

    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed and len(self.get_parameter("first.0.weight")) < 8:
            raise MemoryError("no room")
        return super().forward(x)


def test_a_candidate_that_fails_does_not_take_the_others_along() -> None:
    both = Together(Fragile(), images())
    both.model.armed = True  # type: ignore[assignment]
    outcomes = both.together(recalibrated=True)
    failed = set(both.candidates()) - set(outcomes)
    narrow = {n for n, kept in both.candidates().items() if len(both.make(kept).get_parameter("first.0.weight")) < 8}
    assert failed == narrow != set()
    for n, outcome in outcomes.items():
        alone = both.alone(both.candidates()[n], recalibrated=True)
        assert outcome.scored.losses == pytest.approx(alone.losses, rel=1e-5)


def test_candidates_that_share_nothing_are_left_alone() -> None:
    both = Together(InPlace(), images())
    groups = both.traced.space.groups
    kept = {n: [np.arange(n, g.size) for g in groups] for n in (1, 2, 3)}
    assert list(both.prefix.scored(kept, both.make, Sample.of(both.batches))) == []


def test_a_norm_that_runs_twice_mixes_statistics_and_is_not_shared() -> None:
    class Twice(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            self.second(self.first(x) + 1)
            return super().forward(x)

    both = Together(Twice(), images())
    assert both.compare(recalibrated=False) >= 0
    assert both.together(recalibrated=True) == {}


def test_dependence_goes_where_tensors_go() -> None:
    torch.manual_seed(0)
    model = InPlace().eval()
    traced: TracedModel = trace(model, images()[0])
    found = Dependence(traced, model, images()[0])
    (last,) = (g for g, group in enumerate(traced.space.groups) if group.name.startswith("fourth"))
    assert found.reusable([last]) == {"first": False, "second": True, "third": True}, "act writes to what it is given"
    assert set(found.reusable(range(len(traced.space.groups)))) == set()
    assert found.written("second")
    assert not found.written("fourth")
    assert found.share(["first", "second", "third", "fourth"]) > 0.99


class Straight(InPlace):
    """One after the other, each a group."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.fourth(self.third(self.second(self.first(x)))).mean((2, 3))))


@pytest.mark.parametrize("batches", [0, 1, 3])
@pytest.mark.parametrize("build", [InPlace, Straight, ZOO["resnet"].build])
def test_what_only_loses_rows_is_the_same_to_the_bit(build: Callable[[], nn.Module], batches: int) -> None:
    """So a candidate comes to the same whatever is scored beside it, and a search that is resumed goes on as it was."""
    torch.manual_seed(0)
    both = Together(build(), images())
    candidates = both.candidates()
    found = both.together(recalibrated=batches)
    assert len(found) == len(candidates)
    for number, outcome in found.items():
        alone = both.alone(candidates[number], recalibrated=batches)
        assert (outcome.scored.losses, outcome.scored.scores) == (alone.losses, alone.scores)


def test_what_only_loses_rows_runs_on_the_first_batch_of_a_shape() -> None:
    both = Together(Straight(), [*images(), (torch.randn(3, 3, 8, 8),)])
    first, other = 2 * (4 + 3 + 2 + 1) + 4, 2 * (3 + 2 + 1 + 0) + 4
    Counted.seen = 0
    both.together()
    assert Counted.seen == 4 * (first + 2 * other) + 3 * first + 4 * 3 * 4, "and the first of three groups once in full"
    Counted.seen = 0
    both.together(recalibrated=3)
    assert Counted.seen == 2 * 4 * (first + 2 * other) + 3 * first


def test_rows_that_are_not_the_candidates_own_are_not_taken() -> None:
    both = Together(Straight(), images())
    both.prefix._dependence._calls["third"].values = 0  # as if it lost rows alone, whatever is cut
    candidates = both.candidates()
    for batches in (0, 3):
        found = both.together(recalibrated=batches)
        assert len(found) == len(candidates)
        for number, outcome in found.items():
            assert outcome.scored.losses == both.alone(candidates[number], recalibrated=batches).losses


class BySeven(nn.Module):
    """Mixes the channels of seven examples, and of no other number."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True) if len(x) == 7 else x


def test_rows_are_compared_on_each_shape_of_batch() -> None:
    model = Straight()
    model.first.append(BySeven())
    both = Together(model, [*images(), (torch.randn(7, 3, 8, 8),)])
    candidates = both.candidates()
    of_first = {n for n, kept in candidates.items() if "first.0.weight" in both.traced.removed(kept)}
    assert of_first
    for batches in (0, 4):
        found = both.together(recalibrated=batches)
        assert found.keys() == candidates.keys() - (of_first if batches else set()), "whose statistics lack batches"
        for number, outcome in found.items():
            assert outcome.scored.losses == both.alone(candidates[number], recalibrated=batches).losses


def test_a_candidate_that_keeps_more_than_most() -> None:
    both = Together(Straight(), images())
    narrow = [np.arange(g.size // 2) for g in both.traced.space.groups]
    candidates = {g: [*narrow[:g], np.arange(g + 2), *narrow[g + 1 :]] for g in range(len(narrow))}
    candidates[9] = [np.arange(g.size) if i else narrow[0] for i, g in enumerate(both.traced.space.groups)]
    candidates[10] = [*narrow[:-1], np.arange(both.traced.space.groups[-1].size)]
    outcomes: dict[int, Outcome | None] = {}
    for block in both.prefix.scored(candidates, both.make, Sample.of(both.batches), both.batches):
        outcomes |= block
    assert outcomes.keys() == candidates.keys()
    for number, outcome in outcomes.items():
        assert outcome is not None
        assert outcome.scored.losses == both.alone(candidates[number], recalibrated=3).losses
