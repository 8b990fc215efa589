"""How an answer is pruned and trained: the published schedule, rounds, silence, and the weights that it begins from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

import autoprune
from autoprune import RatioTable, Task
from autoprune.borrowing import seeded
from autoprune.core import InputError, Past, Silent
from autoprune.criteria import l1
from autoprune.final import FineTuned, finetune_table
from autoprune.prune import weights_hash
from autoprune.recover import FineTune
from autoprune.rounds import Final, PolynomialDecay, everything, narrowed
from autoprune.rows import TableGroup
from autoprune.space import Space, trace
from autoprune.testing.worlds import random_state
from autoprune.traced import tensors_of

QUICK = Final(epochs=3, teach=0.0)


def network(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 3),
        ).eval()


def splits(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 1, 8, 8, generator=draw), torch.arange(16) % 3) for _ in range(count)]


def task_of(model: nn.Module | None = None, **change: Any) -> Task:
    plain = Task(
        name="small",
        model=network() if model is None else model,
        inputs=(splits(1)[0][0][:1],),
        train=splits(),
        search=splits(),
        test=splits(),
        loss=F.cross_entropy,
        metric=MulticlassAccuracy(3, average="micro"),
        lr=0.1,
    )
    return replace(plain, **change)


def table_of(task: Task, kept: tuple[int, ...] = (3, 6), grain: str = "channel") -> RatioTable:
    traced = trace(task.model, task.inputs, Space(grain=(grain,)))
    units = narrowed(
        traced.space,
        l1(task.model, traced.slices),
        [1 - n / g.size for n, g in zip(kept, traced.space.groups, strict=True)],
        everything(traced.space),
    )
    groups = (
        TableGroup(name=g.name, size=g.size, units=tuple(row.tolist()), members=g.members)
        for g, row in zip(traced.space.groups, units, strict=True)
    )
    return RatioTable(
        groups=tuple(groups), architecture=traced.fingerprint, weights=weights_hash(task.model), grain=grain
    )


def tuned(final: FineTune, task: Task | None = None, **settings: Any) -> FineTuned:
    task = task or task_of()
    return finetune_table(task, table_of(task), final=final, **settings)


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_gradual_ratio_is_the_published_cubic_at_every_step() -> None:
    """Equation 1 of arXiv 1710.01878: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3."""
    first, last, t_0, n, dt = 0.2, 0.9, 40, 12, 25
    decay = PolynomialDecay(first, last, t_0, t_0 + n * dt, frequency=dt)
    steps = np.arange(500)
    inside = np.clip(steps, t_0, t_0 + n * dt)
    published = last + (first - last) * (1 - (inside - t_0) / (n * dt)) ** 3
    assert max(abs(decay(int(t)) - s) for t, s in zip(steps, published, strict=True)) <= 1e-9
    assert [t for t in range(500) if decay.due(t)] == [t_0 + i * dt for i in range(n + 1)]
    by_default = Final(epochs=1).decay(80)
    assert (by_default.begin_step, by_default.end_step, by_default.frequency) == (0, 60, 6)
    linear = PolynomialDecay(0.0, 1.0, 0, 10, power=1.0, frequency=3)
    assert [linear(t) for t in range(11)] == pytest.approx([t / 10 for t in range(11)], abs=1e-12)
    assert [t for t in range(20) if linear.due(t)] == [0, 3, 6, 9, 10], "and at its end"


def test_one_round_is_one_shot() -> None:
    at_once = tuned(QUICK)
    one_round = tuned(replace(QUICK, pruning="iterative", rounds=1))
    assert same(at_once.model, one_round.model)
    assert at_once.table == one_round.table
    assert same(at_once.model, tuned(FineTune(epochs=3, teach=0.0)).model), "as of a plain fine-tune"


class Stages(Silent):
    def __init__(self) -> None:
        self.steps: list[int | None] = []

    def stage(self, name: str, steps: int | None) -> None:
        if name.startswith("fine-tuning"):
            self.steps.append(steps)


def test_rounds_share_the_steps_and_rank_anew() -> None:
    watched = Stages()
    found = tuned(replace(QUICK, epochs=2.75, lr_fraction=1.0, pruning="iterative", rounds=3), progress=watched)
    assert watched.steps == [3, 4, 4], "11 steps"
    assert [len(g.units) for g in found.table.groups] == [3, 6]
    assert [tuple(p.shape) for p in found.model.parameters() if p.dim() == 4] == [(3, 1, 3, 3), (6, 3, 3, 3)]
    assert found.table.groups != table_of(task_of()).groups, "what was learnt changes which units matter"
    rebuilt = found.table.traced(network(), task_of().inputs).cut(network(), found.table.kept)
    rebuilt.load_state_dict(found.model.state_dict())


def test_what_is_gone_stays_gone_however_it_ranks() -> None:
    space = trace(network(), task_of().inputs).space
    first = (np.array([0, 2, 5, 7]), np.arange(12))
    scores = [np.array([1.0, 9, 3, 9, 9, 2, 9, 2]), np.arange(12.0)]
    assert [row.tolist() for row in narrowed(space, scores, (5 / 8, 10 / 12), first)] == [[2, 5, 7], [10, 11]]


def test_silent_units_are_as_good_as_gone() -> None:
    for grain in ("channel", "weight"):
        task = task_of()
        traced = trace(task.model, task.inputs, Space(grain=(grain,)))
        scores = l1(task.model, traced.slices)
        kept = narrowed(traced.space, scores, [0.4] * len(traced.space.groups), everything(traced.space))
        silent = network()
        traced.silence(silent, kept)
        x = splits()[0][0]
        with torch.no_grad():
            assert torch.allclose(silent(x), traced.cut(task.model, kept)(x), atol=1e-6)


def test_gradual_pruning_follows_its_schedule_and_ends_at_the_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    from autoprune.traced import TracedModel

    silenced: list[tuple[int, ...]] = []
    plain = TracedModel.silence

    def silence(self: TracedModel, model: nn.Module, kept: Any) -> None:
        silenced.append(tuple(len(units) for units in kept))
        plain(self, model, kept)
        weights = [p for p in model.parameters() if p.dim() == 4]
        alive = tuple(int((w.flatten(1).abs().sum(1) > 0).sum()) for w in weights)
        assert alive == silenced[-1]

    monkeypatch.setattr(TracedModel, "silence", silence)
    plan = replace(QUICK, lr_fraction=1.0, pruning="gradual", initial=0.2, begin_step=2, end_step=10, frequency=3)
    found = tuned(plan)
    decay = PolynomialDecay(0.2, 1.0, 2, 10, frequency=3)
    widths, now = [], (8, 12)
    for step in range(13):
        if step in (2, 5, 8, 10):
            now = (8 - round(decay(step) * (1 - 3 / 8) * 8), 12 - round(decay(step) * (1 - 6 / 12) * 12))
        widths.append(now)
    assert silenced == widths
    assert widths[-1] == (3, 6)
    assert [len(g.units) for g in found.table.groups] == [3, 6]
    assert found.model[0].weight.shape == (3, 1, 3, 3)  # type: ignore[index]


def test_gradual_pruning_of_weights_keeps_the_masks() -> None:
    task = task_of()
    table = table_of(task, (36, 400, 20), grain="weight")
    found = finetune_table(task, table, final=replace(QUICK, pruning="gradual", frequency=2))
    zeros = [int((m.weight == 0).sum()) for m in found.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert zeros == [72 - 36, 864 - 400, 36 - 20]


def test_early_weights_are_gone_back_to() -> None:
    task = task_of(past=Past(epochs=6, schedule=lambda done: 1 - done, early=network(5)))
    found = tuned(replace(QUICK, epochs=0, weights="early"), task)
    expected = found.table.traced(task.model, task.inputs).cut(network(5), found.table.kept)
    assert same(found.model, expected)
    assert found.table == table_of(task), "the units are those of the trained network"
    with pytest.raises(InputError, match="which the task does not give"):
        tuned(replace(QUICK, weights="early"))
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(InputError, match="of another architecture"):
        tuned(replace(QUICK, weights="early"), replace(task, past=Past(epochs=6, schedule=float, early=other)))


def test_fresh_weights_are_drawn_by_the_seed() -> None:
    before = random_state()
    one, again, other = (
        tuned(replace(QUICK, epochs=0, weights="scratch"), seed=seed).model.state_dict() for seed in (7, 7, 8)
    )
    assert random_state() == before
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    assert torch.equal(one["1.running_mean"], torch.zeros(3))
    assert one["0.weight"].abs().max() <= 1 / 3 + 1e-6, "as nn.Conv2d draws"

    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(network())
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(InputError, match=r"the model \(Scaled\) has the parameter scale and no reset_parameters"):
        tuned(replace(QUICK, weights="scratch"), task_of(Scaled().eval()))


def test_fresh_weights_are_fresh_behind_masks_and_leave_what_is_frozen() -> None:
    task = task_of()
    found = finetune_table(
        task, table_of(task, (36, 400, 20), "weight"), final=replace(QUICK, epochs=0, weights="scratch"), seed=7
    )
    before = network().state_dict()
    for name, tensor in found.model.state_dict().items():
        if name.endswith("weight_orig"):
            assert not torch.isclose(tensor, before[name.removesuffix("_orig")]).any(), name
    frozen = network()
    frozen[0].requires_grad_(False)  # type: ignore[index]
    kept = tuned(replace(QUICK, epochs=0, weights="scratch"), task_of(frozen), seed=7)
    units = kept.table.groups[0].units
    assert torch.equal(kept.model[0].weight, before["0.weight"][list(units)])  # type: ignore[index]
    assert not torch.equal(kept.model[8].weight, before["8.weight"][:, list(kept.table.groups[1].units)])  # type: ignore[index]


class Unsized:
    """A split without a length, that draws from the global generator."""

    def __iter__(self) -> Any:
        for x, y in splits():
            yield x + 0 * torch.rand(1), y


def test_no_global_generator_is_left_changed() -> None:
    before = random_state()
    for way in ({}, {"pruning": "iterative", "rounds": 2}, {"pruning": "gradual"}, {"weights": "scratch"}):
        tuned(replace(QUICK, epochs=1, **way), task_of(train=Unsized()))
        assert random_state() == before, way


def test_what_cannot_be_trained_is_refused_before_the_search() -> None:
    stages: list[str] = []

    class Counted(Silent):
        def stage(self, name: str, steps: int | None) -> None:
            stages.append(name)

    wrong: list[dict[str, Any]] = [
        {"weights": "early"},
        {"schedule": "rewound"},
        {"pruning": "gradual", "end_step": 50},
    ]
    for change in wrong:
        with pytest.raises(InputError, match=r"finetune|fine-tune"):
            autoprune.search(task_of(), budget="params_60pct", final=replace(QUICK, **change), progress=Counted())
    rewound = autoprune.Scoring(images=64, recovery=[{"finetune": {"steps": 2, "schedule": "rewound"}}])
    with pytest.raises(InputError, match="which the task does not say"):
        autoprune.search(task_of(), budget="params_60pct", scoring=rewound, progress=Counted())
    assert set(stages) == {"tracing"}
    for epochs, schedule in ((0, float), (3, None), (3, lambda done: -1.0)):
        with pytest.raises(InputError, match=r"past\.(epochs|schedule)"):
            autoprune.search(task_of(past=Past(epochs=epochs, schedule=schedule)), budget="params_60pct")  # type: ignore[arg-type]


def test_a_criterion_sees_the_network_as_it_is_used() -> None:
    modes: list[bool] = []

    def watching(model: nn.Module, groups: Any, **given: Any) -> Any:
        modes.append(model.training)
        return l1(model, groups, **given)

    from autoprune.prune import ranking

    task = task_of()
    traced = trace(task.model, task.inputs)
    model = network().train()
    ranking(traced, watching, batches=splits(), loss=task.loss, seed=0)(model)
    assert modes == [False]
    assert model.training


def rates(final: Final, task: Task, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seen: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *given: Any, **named: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watched)
        tuned(final, task)
    return seen


def test_a_rewound_rate_is_that_of_the_models_last_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(past=Past(epochs=10, schedule=lambda done: (1 - done) ** 2))
    seen = rates(replace(QUICK, schedule="rewound", epochs=2.5), task, monkeypatch)
    original = [0.1 * (1 - step / 40) ** 2 for step in range(40)]  # ten epochs of four batches
    assert seen == pytest.approx(original[-10:])
    given = replace(QUICK, epochs=2.5, lr_fraction=0.5, warm_up=0.0)
    flat = replace(task, past=Past(epochs=10, schedule=lambda done: 0.5))
    level = [tuned(replace(given, schedule=way), flat).model for way in ("constant", "rewound")]
    assert same(*level), "nothing but the rate"
    twice = rates(replace(QUICK, schedule="rewound", epochs=2.5, pruning="iterative", rounds=2), task, monkeypatch)
    assert twice == pytest.approx(original[-5:] * 2), "each round goes back as far as it goes on"
    constant = rates(replace(QUICK, schedule="constant", warm_up=0.5, epochs=1), task, monkeypatch)
    assert constant == pytest.approx([0.1 * 0.1 * x for x in (1 / 3, 2 / 3, 1, 1)])
    with pytest.raises(InputError, match="takes the last epochs of the 10 that the model was trained for, got 11"):
        tuned(replace(QUICK, schedule="rewound", epochs=11), task)
    with pytest.raises(InputError, match="which the task does not say"):
        tuned(replace(QUICK, schedule="rewound"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pruning": "slow"}, "pruning must be one of one_shot, iterative, gradual"),
        ({"weights": "old"}, "weights must be one of trained, early, scratch"),
        ({"rounds": 0}, "rounds must be a whole number, 1 or more"),
        ({"initial": 1.0}, r"initial must be a number in \[0, 1\)"),
        ({"begin_step": 5, "end_step": 5}, "end_step must be a whole number above begin_step"),
        ({"power": 0}, "power must be a number above 0"),
        ({"frequency": 1.5}, "frequency must be a whole number"),
        ({"pruning": "gradual", "weights": "scratch"}, "weights must be trained where pruning=gradual"),
        ({"steps": 0}, "steps must be a whole number, 1 or more, or null"),
        ({"schedule": "step"}, "schedule must be one of cosine, constant, rewound"),
    ],
)
def test_a_training_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(QUICK, **wrong)


def test_a_schedule_beyond_the_training_is_refused() -> None:
    with pytest.raises(InputError, match="must lie within the 12 steps of the training, got 0 and 13"):
        tuned(replace(QUICK, pruning="gradual", end_step=13))


class Named(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.body = network(seed)

    def forward(self, *, pixels: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(pixels) * scale[:, None]}


def own_loss(output: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(output["logits"], target["label"], reduction="none").square().mean()


class OwnMetric(MulticlassAccuracy):
    def update(self, output: Any, target: Any) -> None:
        super().update(output["logits"], target["label"])


def test_a_users_own_loss_and_batches_with_names_go_all_ways() -> None:
    def named(batches: Any) -> list[Any]:
        return [({"pixels": x, "scale": torch.ones(len(x))}, {"label": y}) for x, y in batches]

    task = task_of(
        Named().eval(),
        inputs={"pixels": splits()[0][0][:1], "scale": torch.ones(1)},
        train=named(splits()),
        search=named(splits()),
        test=named(splits()),
        loss=own_loss,
        metric=OwnMetric(3, average="micro"),
        past=Past(epochs=6, schedule=lambda done: 1 - done, early=Named(5).eval()),
    )
    recovery: list[Any] = ["reconstruct", {"finetune": {"steps": 2}}, "bn_recalibrate", {"distill": {"steps": 2}}]
    ways = (
        {"pruning": "iterative", "rounds": 2, "teach": 0.5},
        {"pruning": "gradual", "frequency": 2},
        {"weights": "early", "schedule": "rewound"},
        {"weights": "scratch"},
    )
    for way in ways:
        result = autoprune.search(
            task,
            budget="params_60pct",
            strategy="uniform",
            scoring=autoprune.Scoring(images=64, recovery=recovery),
            final=replace(QUICK, **way),
        )
        assert result.met
        output = result.model(pixels=splits()[0][0], scale=torch.ones(16))
        assert output["logits"].shape == (16, 3)
        widths = [len(g.units) for g in result.table.groups]
        assert [m.out_channels for m in result.model.modules() if isinstance(m, nn.Conv2d)] == widths
        fresh = result.table.prune(task.model, task.inputs)
        assert [tuple(t.shape) for _, t in tensors_of(fresh)] == [tuple(t.shape) for _, t in tensors_of(result.model)]
