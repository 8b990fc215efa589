from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import make_task
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassCohenKappa

from autoprune.core import Candidate, CostModel, InputError, Measurement, Meter, Past, Task, Trial
from autoprune.costs import COUNTING, counted, counted_models
from autoprune.criteria import Scores, l1
from autoprune.evaluate import Evaluator, Scoring
from autoprune.healer import Healer
from autoprune.meters.counts import Macs
from autoprune.recipe import RECOVERY
from autoprune.recover import FineTune
from autoprune.scores import (
    CHUNKS,
    Sample,
    Scored,
    answer,
    drawn,
    interval,
    losses_by_image,
    score,
    stratified,
    subset,
)
from autoprune.space import Space, trace
from autoprune.traced import TracedModel


def _known(task: Task) -> tuple[TracedModel, tuple[Scores, ...], Mapping[str, CostModel]]:
    traced = trace(task.model, task.inputs, Space(levels=6))
    return traced, l1(task.model, traced.slices), counted_models(task, traced, counted(task.model, task.inputs))


@functools.cache
def _tiny() -> tuple[TracedModel, tuple[Scores, ...], Mapping[str, CostModel]]:
    return _known(make_task())


def evaluator(
    cache: Path | None = None, seed: int = 0, healing: Sequence[Any] = RECOVERY, shared: bool = True, **change: Any
) -> Evaluator:
    task = replace(make_task(), **change)
    traced, scores, costs = _known(task) if "model" in change else _tiny()
    return Evaluator(
        task,
        traced,
        scores,
        budgets=(),
        costs=costs,
        meters=COUNTING,
        scoring=Scoring(
            images=400,
            recalibration=2,
            recovery=healing,
            short=FineTune(epochs=0.3, teach=0.0),
            shared_prefix=shared,
        ),
        seed=seed,
        cache=cache,
    )


def scored(candidate: Candidate, **settings: Any) -> Trial:
    (trial,) = evaluator(**settings)([(0, candidate)])
    assert trial.error is None
    return trial


def half(recovery: str) -> Candidate:
    levels = evaluator().traced.space.groups
    return Candidate(ratios=tuple(g.levels[3] for g in levels), recovery=recovery)  # type: ignore[arg-type]


def test_every_step_of_recovery_helps() -> None:
    none, probe, short = (scored(half(r)) for r in ("none", "probe", "short"))
    assert none.loss > probe.loss > short.loss
    assert none.score < short.score


def test_reconstruction_helps_beyond_recalibration() -> None:
    neither, *each = (
        scored(half("probe"), healing=steps)
        for steps in ((), ("bn_recalibrate",), ("reconstruct",), ("reconstruct", "bn_recalibrate"))
    )
    assert neither.loss == scored(half("none")).loss
    recalibrated, rebuilt, both = each
    assert neither.loss > recalibrated.loss > both.loss
    assert neither.loss > rebuilt.loss > both.loss


def healed(recovery: Sequence[Any], how: str = "short", **short: Any) -> dict[str, torch.Tensor]:
    """The network of a candidate that this recovery healed; with settings of its short fine-tunes."""
    ours = _patient()
    plan = replace(ours.scoring, recovery=recovery, short=replace(ours.scoring.short, **short))
    ours.healer.care = replace(ours.healer.care, recipe=plan.recipe)
    return ours.recovered(half(how)).state_dict()


@functools.cache
def _patient() -> Evaluator:
    return evaluator()


def alike(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_each_step_does_its_own_and_nothing_else() -> None:
    cut, statistics = healed([]), {"running_mean", "running_var", "num_batches_tracked"}

    def changed(recovery: Sequence[Any], how: str = "short") -> set[str]:
        found = healed(recovery, how)
        return {name.rpartition(".")[2] for name in cut if not torch.equal(cut[name], found[name])}

    assert changed(["bn_recalibrate"]) == statistics
    assert changed(["reconstruct"]) == {"weight"}
    assert changed(["bn_recalibrate", "reconstruct"]) == {"weight"} | statistics
    assert changed(["finetune", "distill"], "probe") == set(), "what trains is for the short recovery"
    assert changed(["finetune"]) == {"weight", "bias"} | statistics


def test_the_order_of_the_steps_is_kept() -> None:
    three = {"finetune": {"steps": 3}}
    after, before = healed([three, "bn_recalibrate"]), healed(["bn_recalibrate", three])
    assert not alike(after, before)
    seen = next(tensor for name, tensor in after.items() if name.endswith("tracked"))
    assert seen == 2, "its two batches are what was seen last"
    assert alike(healed(["bn_recalibrate", three], teach=0.7), before), "a fine-tune has no teacher"


def test_scores_after_a_rewound_rate_are_of_that_past(tmp_path: Path) -> None:
    def loss(power: int, kept: Path | None = tmp_path) -> float:
        past = Past(epochs=30, schedule=lambda done: (1 - done) ** power)
        ours = evaluator(kept, healing=[{"finetune": {"steps": 2, "schedule": "rewound"}}], past=past)
        (trial,) = ours([(0, half("short"))])
        assert trial.error is None
        return trial.loss

    assert loss(1) == loss(1, None)
    assert loss(3) == loss(3, None) != loss(1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_recalibration_in_a_row_changes_nothing() -> None:
    scoring = Scoring(recovery=["reconstruct", "bn_recalibrate", "distill", "bn_recalibrate"])
    assert scoring.recipe.shareable
    assert [step.name for step in scoring.recipe.of_recovery("probe")] == ["reconstruct", "bn_recalibrate"]
    assert len(scoring.recipe.of_recovery("short")) == 4
    assert not Scoring(recovery=["bn_recalibrate", "reconstruct"]).recipe.shareable


def test_lessons_are_of_distill_alone() -> None:
    settings: dict[str, Any] = {"steps": 3, "teach": 0.5, "temperature": 2.0}
    taught = healed([{"distill": settings}])
    assert not alike(taught, healed([{"finetune": {"steps": 3}}]))
    assert not alike(taught, healed([{"distill": settings | {"temperature": 8.0}}]))
    assert alike(taught, healed(["distill"], **settings)), "by default as evaluator.short says"
    assert alike(healed([{"distill": settings | {"teach": 0.0}}]), healed([{"finetune": {"steps": 3}}]))


def test_the_dense_candidate_is_not_changed_by_reconstruction() -> None:
    dense = Candidate(ratios=evaluator().traced.space.dense(), recovery="probe")
    assert scored(dense, healing=("reconstruct",)).loss == scored(replace(dense, recovery="none")).loss


@pytest.mark.parametrize(
    "wrong",
    [
        "reconstruct",
        ("reconstructed",),
        ("reconstruct", "short"),
        [["reconstruct"]],
        [{"finetune": 100}],
        [{"finetune": {}, "distill": {}}],
        [None],
    ],
)
def test_a_recovery_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="recovery must be a list of reconstruct, bn_recalibrate, finetune, distill"):
        Scoring(recovery=wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["reconstruct", "reconstruct"], "recovery must have reconstruct once at most"),
        (["distill", "reconstruct"], "recovery must have reconstruct before what trains, which it would undo"),
        ([{"bn_recalibrate": {"steps": 3}}], "recovery: bn_recalibrate has no setting 'steps': it takes no setting"),
        ([{"finetune": {"teach": 0.5}}], "recovery: finetune has no setting 'teach': it takes epochs, steps, "),
        ([{"distill": {"step": 3}}], "recovery: distill has no setting 'step'"),
        ([{"distill": {"steps": 0}}], "recovery: distill: fine-tune: steps must be a whole number, 1 or more"),
        (
            [{"finetune": {"lr_fraction": "fast"}}],
            "recovery: finetune: fine-tune: lr_fraction must be finite, got lr_fraction=fast",
        ),
    ],
)
def test_a_recovery_that_goes_nowhere_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^evaluator.*{message}"):
        Scoring(recovery=wrong)


class Twofold(Macs):
    """Counts once, and at a glance says twice as much."""

    def glance(self) -> Meter:
        class Double(Macs):
            def measure(self, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Measurement:
                found = super().measure(model, inputs)
                return replace(found, value=2 * found.value)

        return Double()


def test_a_glance_is_taken_by_the_meters_that_know_how() -> None:
    ours = evaluator()
    ours.meters = {"macs": Twofold(), "params": COUNTING["params"]}
    dense = Candidate(ratios=ours.traced.space.dense(), recovery="none", measure=True)
    whole, brief = (t.costs for t in ours([(0, dense), (1, replace(dense, glance=True))]))
    assert brief["macs"].value == 2 * whole["macs"].value
    assert brief["params"] == whole["params"]


def test_the_dense_candidate_changes_nothing() -> None:
    dense = scored(Candidate(ratios=evaluator().traced.space.dense(), recovery="none"))
    assert dense.loss_change is not None
    assert dense.loss_change.value == 0
    assert dense.score_low < dense.score < dense.score_high


def test_the_paired_interval_is_narrower_than_that_of_the_loss() -> None:
    space = evaluator().traced.space
    one = tuple(g.levels[1] if i == 0 else 0.0 for i, g in enumerate(space.groups))
    ours = evaluator()
    (trial,) = ours([(0, Candidate(ratios=one))])
    assert trial.loss_change is not None
    unpaired = interval(ours.dense().losses)[1]
    assert trial.loss_change.high - trial.loss_change.value < unpaired / 2


def test_costs_are_predicted_until_they_are_asked_to_be_measured() -> None:
    predicted, counted = (
        scored(half("none")),
        scored(Candidate(ratios=half("none").ratios, recovery="none", measure=True)),
    )
    assert {m.kind for m in predicted.costs.values()} == {"predicted"}
    assert {m.kind for m in counted.costs.values()} == {"counted"}
    assert predicted.costs["params"].value == pytest.approx(counted.costs["params"].value)


def test_candidates_in_any_order_score_the_same() -> None:
    ours = evaluator()
    space = ours.traced.space
    batch = [(i, Candidate(ratios=tuple(g.levels[i] for g in space.groups), recovery="short")) for i in (1, 2, 3)]
    forward = {t.number: t.score for t in ours(batch)}
    backward = {t.number: t.score for t in evaluator()(batch[::-1])}
    assert forward == backward


def test_a_candidate_outside_the_space_is_a_failed_trial() -> None:
    (trial,) = evaluator()([(0, Candidate(ratios=(0.123,) * len(evaluator().traced.space.groups)))])
    assert trial.error is not None
    assert "is not a level of" in trial.error
    assert math.isnan(trial.score)


def test_a_loss_that_is_not_finite_is_a_failed_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = evaluator()

    def poisoned(candidate: Candidate) -> nn.Module:
        model = ours.healer.cut(candidate.ratios)
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model

    monkeypatch.setattr(ours, "recovered", poisoned)
    (trial,) = ours([(0, half("probe"))])
    assert trial.error == "FloatingPointError: the loss on the search split is not finite"


def test_the_cache_key_holds_what_the_score_depends_on(tmp_path: Path) -> None:
    from torchmetrics.classification import MulticlassAccuracy

    def key(recovery: str = "probe", seed: int = 0, **change: Any) -> Path | None:
        return evaluator(tmp_path, seed, **change)._cache_path(half(recovery))

    others = [
        key("short"),
        key(seed=1),
        key(lr=0.2),
        key(loss=lambda o, t: 7 * F.cross_entropy(o, t)),
        key(metric=MulticlassAccuracy(10, average="micro", top_k=3)),
        key(train=make_task().train[5:]),  # type: ignore[index]
        key(search=make_task().search[1:]),  # type: ignore[index]
        key(model=make_task(seed=1).model),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key()


def test_a_subset_has_every_class_in_proportion_in_every_chunk() -> None:
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    chosen = labels[torch.from_numpy(stratified(labels, 1000, 400, seed=1))]
    counts = torch.bincount(chosen, minlength=3)
    assert torch.all((counts - torch.tensor([240, 120, 40])).abs() <= 1)
    for chunk in chosen.tensor_split(4):
        assert torch.all((torch.bincount(chunk, minlength=3) - torch.tensor([60, 30, 10])).abs() <= 2)


def test_a_subset_repeats_and_has_no_image_twice() -> None:
    batches = [(torch.arange(100.0).view(-1, 1) + 100 * i, torch.arange(100) % 5) for i in range(3)]
    first, second = subset(batches, 120, 0), subset(batches, 120, 0)
    images = torch.cat([x[0] for x, _ in first])
    assert len(first) == CHUNKS
    assert len(images.unique()) == 120
    assert torch.equal(images, torch.cat([x[0] for x, _ in second]))


def test_targets_may_be_lists_of_one_entry_an_image() -> None:
    batches = [(torch.arange(4.0).view(-1, 1) + 4 * i, [{"box": 4 * i + j} for j in range(4)]) for i in range(3)]
    for (images,), targets in subset(batches, 12, 0):
        assert [t["box"] for t in targets] == images.ravel().tolist()


def test_the_interval_is_students() -> None:
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert high == pytest.approx(3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2)
    assert low == -high


@pytest.mark.slow
def test_candidates_come_to_the_same_together_and_alone(tmp_path: Path) -> None:
    """Those cut from the dense network, and a parent's children."""
    together, alone = evaluator(tmp_path), evaluator(shared=False)
    space = together.traced.space
    ratios = [tuple(g.levels[1] for g in space.groups)]
    ratios += [(*ratios[0][:g], group.levels[-1], *ratios[0][g + 1 :]) for g, group in enumerate(space.groups)]
    rounds: list[list[Candidate]] = [
        [Candidate(ratios=r, recovery=k) for k in ("probe", "none") for r in ratios],
        [Candidate(ratios=ratios[0], recovery="short")],
        [Candidate(ratios=r, parent=2 * len(ratios)) for r in ratios],
    ]
    for batch in rounds:
        first = 2 * len(ratios) * (batch is not rounds[0]) + (batch is rounds[2])
        trials = [list(ours(list(enumerate(batch, start=first)))) for ours in (together, alone)]
        assert not [t.error for t in trials[0] + trials[1] if t.error]
        assert [t.loss for t in trials[0]] == pytest.approx([t.loss for t in trials[1]], rel=1e-5)
        assert [t.score for t in trials[0]] == [t.score for t in trials[1]]
        assert all(0 < t.seconds_in_forward <= t.seconds for t in trials[0] + trials[1])
    assert together.shared > 0.3
    assert alone.shared == 0
    again = evaluator(tmp_path)
    assert all(t.cached for t in again(list(enumerate(rounds[0]))))
    assert together.identity == alone.identity


@pytest.mark.parametrize("shared", [False, True])
def test_scores_in_bfloat16_are_nearly_those_in_float32(shared: bool) -> None:
    exact, rough = evaluator(shared=shared), evaluator(shared=shared)
    rough.scoring = replace(rough.scoring, precision="bfloat16")
    groups = exact.traced.space.groups
    batch = [
        Candidate(ratios=tuple(h.levels[level] if h is g else 0.0 for h in groups)) for g in groups for level in (2, -1)
    ]
    ours, theirs = ([t.loss for t in each(list(enumerate(batch)))] for each in (rough, exact))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours != theirs
    assert spearmanr(ours, theirs).statistic > 0.95
    assert rough.identity != exact.identity
    assert rough.shared == pytest.approx(exact.shared, abs=0.01)
    assert (rough.shared > 0.2) == shared


def test_outputs_that_cannot_be_made_float32_again_are_refused() -> None:
    @dataclass
    class Out:
        logits: torch.Tensor

    class Wrapping(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return Out(super().forward(x))

    with pytest.raises(InputError, match="precision=bfloat16 takes outputs in tuples, lists and mappings"):
        answer(Wrapping(2, 2), (torch.zeros(1, 2),), "bfloat16", torch.device("cpu"))


def test_a_part_without_a_score_is_no_obstacle_to_resuming(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = evaluator()
    plain = ours.scored

    def gappy(*given: Any) -> Scored:
        scored = plain(*given)
        return replace(scored, scores=(math.nan, *scored.scores[1:]))

    monkeypatch.setattr(ours, "scored", gappy)
    (trial,) = ours([(0, half("probe"))])
    assert trial.error is None
    assert trial.parts == ()
    assert Trial.from_json(json.loads(json.dumps(trial.to_json()))).loss == trial.loss


def test_parts_add_up_to_score_and_loss() -> None:
    (trial,) = evaluator()([(0, half("probe"))])
    score, loss = np.sum(trial.parts, axis=0)
    assert score == pytest.approx(trial.score, rel=1e-5)
    assert loss == pytest.approx(trial.loss, rel=1e-5)


@pytest.mark.parametrize("images", [20, 40, 200])
def test_no_part_is_of_one_image(images: int) -> None:
    losses = np.random.default_rng(0).exponential(1, 500)
    sample = drawn([(torch.zeros(500, 1), torch.zeros(500))], losses, images, seed=0)
    assert min(part for parts in sample.parts for part in parts) >= 2
    assert sum(sample.weights) == pytest.approx(500)


class Column(nn.Module):
    """A network whose answers are known: one column of its inputs."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, int(self.number)]


def test_fewer_images_are_those_that_decide() -> None:
    """Most images are certain, and a cut changes the others in proportion."""
    rng = np.random.default_rng(0)
    dense = np.exp(2 * rng.normal(size=2000))
    cut = dense * (1 + 0.3 * rng.normal(1, 1, size=2000))
    x = torch.from_numpy(np.stack([dense, cut], 1)).float()
    chunks = [((part,), torch.zeros(len(part))) for part in x.split(100)]
    task = replace(make_task(), loss=lambda output, target: output.mean(), metric=MeanSquaredError())

    def increase(losses: Any, seed: int) -> float:
        sample = drawn(chunks, losses, 200, seed)
        return score(Column(1), sample, task).loss - score(Column(0), sample, task).loss

    whole = float((cut - dense).mean())
    losses = losses_by_image(Column(0), Sample.of(chunks), task)
    assert losses is not None
    np.testing.assert_allclose(losses, dense, rtol=1e-5)
    by_loss, evenly = (np.array([increase(key, seed) for seed in range(40)]) for key in (losses, np.ones(2000)))
    assert by_loss.mean() == pytest.approx(whole, rel=0.05)
    assert np.std(by_loss - whole) < 0.4 * np.std(evenly - whole)


def test_a_drawn_sample_stands_for_all_images() -> None:
    ours = evaluator()
    losses = losses_by_image(ours.dense_model, Sample.of(ours.chunks), ours.task)
    assert losses is not None
    assert losses.mean() == pytest.approx(ours.dense().loss, rel=1e-4)
    samples = [drawn(ours.chunks, losses, 80, seed) for seed in range(40)]
    for sample in samples:
        assert sum(sample.weights) == pytest.approx(400)
        assert sum(map(sum, sample.parts)) == sum(len(y) for _, y in sample.batches) == 80
        assert len(sample.weights) == sum(map(len, sample.parts))
    found = [score(ours.dense_model, sample, ours.task) for sample in samples]
    assert np.mean([s.loss for s in found]) == pytest.approx(ours.dense().loss, rel=0.1)
    assert np.mean([s.score for s in found]) == pytest.approx(ours.dense().score, abs=0.02)
    within = [abs(s.score - ours.dense().score) <= x.interval(s.scores)[1] for s, x in zip(found, samples, strict=True)]
    assert np.mean(within) > 0.8


def test_a_loss_that_is_not_a_mean_over_images_takes_the_first_chunks() -> None:
    def spread(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target) + output.std()

    ours = evaluator(loss=spread)
    (trial,) = ours([(0, Candidate(ratios=ours.traced.space.dense(), fidelity=0.2, recovery="none"))])
    assert trial.error is None
    assert trial.loss == pytest.approx(score(ours.dense_model, Sample.of(ours.chunks[:4]), ours.task).loss)


def test_each_fidelity_has_its_own_scores_in_the_cache(tmp_path: Path) -> None:
    dense = Candidate(ratios=evaluator().traced.space.dense(), recovery="none")
    few, whole, again = evaluator(tmp_path)(
        [(0, replace(dense, fidelity=0.2)), (1, dense), (2, replace(dense, fidelity=0.2))]
    )
    assert few.loss != whole.loss
    assert again.cached
    assert again.loss == few.loss


@pytest.mark.parametrize("fidelity", [0.0, 1.5, -1.0])
def test_a_fidelity_that_is_no_fraction_is_refused(fidelity: float) -> None:
    with pytest.raises(InputError, match="0 < fidelity <= 1"):
        Candidate(ratios=(0.0,), fidelity=fidelity)


def test_a_constant_has_no_interval_and_few_images_are_all_taken() -> None:
    sample = drawn(evaluator().chunks, np.ones(400), 80, 0)
    assert sample.interval([1.0] * len(sample.weights)) == pytest.approx((0.0, 0.0))
    ours = evaluator()
    ours.chunks = ours.chunks[:1]
    trials = list(ours([(0, replace(half("none"), fidelity=f)) for f in (0.2, 1.0)]))
    assert trials[0].loss == trials[1].loss


def test_a_metric_that_some_parts_have_no_value_of_is_that_of_all_images() -> None:
    kappa = MulticlassCohenKappa(10)
    ours = evaluator(metric=kappa)
    (trial,) = ours([(0, Candidate(ratios=ours.traced.space.dense(), fidelity=0.2, recovery="none"))])
    assert trial.error is None
    assert math.isfinite(trial.score)


def test_a_failure_does_not_run_the_blocks_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.shared_prefix.BLOCK", 2)
    ours = evaluator()
    plain, made = Healer._cut, []

    def fragile(self: Healer, *args: Any, **how: Any) -> Any:
        *_, kept = args
        made.append(how)
        if len(kept[0]) < 0.6 * self.traced.space.groups[0].size:
            raise MemoryError("no room")
        return plain(self, *args, **how)

    monkeypatch.setattr(Healer, "_cut", fragile)
    groups = ours.traced.space.groups
    cuts = [tuple(g.levels[-1] if i == k else 0.0 for i, g in enumerate(groups)) for k in range(len(groups))]
    trials = ours([(n, Candidate(ratios=ratios)) for n, ratios in enumerate(cuts)])
    assert next(trials).error == "MemoryError: no room"
    assert len(made) == 1 + 2 + 1, "the common network, the first block, and the one that failed again"
    assert [t.error for t in trials] == [None] * (len(cuts) - 1)


def test_what_was_scored_is_not_scored_again_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = evaluator()
    ratios = tuple(g.levels[1] for g in made.traced.space.groups)
    scored = Candidate(ratios=ratios, recovery="short", about={"finalist": "sweep"})
    other = Candidate(ratios=ratios, recovery="short", fidelity=0.5)
    first, second = made([(0, scored), (1, other)])
    monkeypatch.setattr(made, "recovered", None)
    measured, again = made([(2, replace(scored, measure=True, about={})), (3, other)])
    assert (measured.score, measured.loss, measured.loss_change) == (first.score, first.loss, first.loss_change)
    assert (again.score, again.loss) == (second.score, second.loss) != (first.score, first.loss)
    assert (made.evaluations, made.hits) == (2, 2)
    resumed = evaluator()
    resumed.remember((first, second), None)
    monkeypatch.setattr(resumed, "recovered", None)
    (replayed,) = resumed([(2, replace(scored, measure=True))])
    assert (replayed.number, replayed.cached, replayed.loss) == (2, True, first.loss)
