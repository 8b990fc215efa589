from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from test_run import searched

from autoprune import report
from autoprune.core import (
    Budget,
    Candidate,
    CostModel,
    InputError,
    Measurement,
    PruningSpace,
    Silent,
    Strategy,
    Trial,
)
from autoprune.lineage import folder_beside
from autoprune.loop import search
from autoprune.page import amount, html, percent
from autoprune.result import Result
from autoprune.strategies.netadapt import NetAdapt
from autoprune.testing import StrategyContract, World, answer


class TestNetAdapt(StrategyContract):
    def make(
        self, space: PruningSpace, budgets: Sequence[Budget], costs: Mapping[str, CostModel], *, seed: int
    ) -> Strategy:
        return NetAdapt(space, budgets, costs, seed=seed, start="dense")


@pytest.mark.slow
@pytest.mark.long
class TestNetAdaptByRatio(StrategyContract):
    def make(
        self, space: PruningSpace, budgets: Sequence[Budget], costs: Mapping[str, CostModel], *, seed: int
    ) -> Strategy:
        return NetAdapt(space, budgets, costs, seed=seed, rule="ratio", screen=0, start_at=0.5)


def played(
    world: World, evaluate: Any = None, start: Literal["dense", "allocation"] = "dense", **settings: Any
) -> tuple[NetAdapt, tuple[Trial, ...]]:
    """As in the paper where nothing else is said."""
    settings = {"rule": "accuracy", **settings}
    strategy = NetAdapt(world.space, world.budgets, world.costs, start=start, **settings)
    return strategy, search(strategy, evaluate or world.evaluate, lambda trial: None)


# --------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("initial", "decay"), [(0.05, 0.98), (0.025, 0.96), (0.2, 0.7)])
def test_targets_are_the_papers_schedule(initial: float, decay: float) -> None:
    """Algorithm 1: Con_i = Res_i - dR_i, the reductions being initial, initial x decay, ... of the dense cost."""
    world = World(1, levels=15, bias=0.0, limit=0.6)
    strategy, trials = played(world, initial=initial, decay=decay)
    dense = resource = world.costs["macs"].predict(world.space.dense())
    reduction = initial * dense
    assert len(strategy.trace) >= 2
    for made in strategy.trace:
        constraint = resource - reduction
        if constraint < world.budgets[0].limit:
            constraint = world.budgets[0].limit
        assert made.targets[0] == pytest.approx(constraint, rel=1e-9)
        resource = world.costs["macs"].predict(trials[made.winner].candidate.ratios)
        assert made.measured[0] == pytest.approx(resource, rel=1e-9)
        assert resource <= constraint * (1 + 1e-9)
        reduction *= decay
    assert resource <= world.budgets[0].limit


def test_every_proposal_is_the_least_cut_of_one_group_that_meets_the_target() -> None:
    world = World(2, bias=0.0)
    strategy, trials = played(world, screen=0)
    cost, levels = world.costs["macs"], [g.levels for g in world.space.groups]
    before = world.space.dense()
    for made in strategy.trace:
        proposed = {}
        for number in made.proposals:
            ratios = trials[number].candidate.ratios
            (group,) = [g for g in range(len(levels)) if ratios[g] != before[g]]
            proposed[group] = ratios[group]
        for g, ratio in enumerate(before):
            reaching = [
                level
                for level in levels[g]
                if level > ratio and cost.predict((*before[:g], level, *before[g + 1 :])) <= made.targets[0]
            ]
            assert proposed.get(g) == (min(reaching) if reaching else None)
        before = trials[made.winner].candidate.ratios


def test_two_budgets_have_a_target_each() -> None:
    world = World(3)
    budget = world.budgets[0]
    loose = Budget("macs", 1.2 * budget.limit, "MACs")
    strategy = NetAdapt(world.space, (budget, loose), world.costs, start="dense")
    world.play(strategy)
    first, last = strategy.trace[0].targets, strategy.trace[-1].targets
    assert first[0] == first[1] > loose.limit
    assert last == (budget.limit, loose.limit)


@pytest.mark.parametrize(
    ("settings", "reaches"),
    [({"initial": 0.02, "decay": 0.95}, "40 %"), ({"initial": 0.01, "decay": 0.98}, "50 %")],
)
def test_a_schedule_that_falls_short_is_refused(settings: dict[str, Any], reaches: str) -> None:
    world = World(0, limit=0.3, bias=0.0)
    with pytest.raises(InputError) as caught:
        NetAdapt(world.space, world.budgets, world.costs, **({"start": "dense"} | settings))
    assert f"reduce macs by {reaches} of the dense network's in all, and 70 % must go" in str(caught.value)
    wanted = float(str(caught.value).split("at least ")[1].split(",")[0])
    found, _ = played(world, **(settings | {"initial": wanted}))
    assert found.trace[-1].measured[0] <= world.budgets[0].limit


def test_from_an_allocation_less_is_left_to_reduce() -> None:
    world = World(0, limit=0.5, bias=0.0)
    short: dict[str, Any] = {"initial": 0.02, "decay": 0.93}  # 28 % in all
    with pytest.raises(InputError, match=r"28.57 %"):
        played(world, **short)
    _, trials = played(world, start="allocation", **short)
    assert answer(trials).feasible


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"initial": 0.0}, "0 < initial < 1 must hold, got initial=0.0"),
        ({"decay": 1.1}, "0 < decay <= 1 must hold, got decay=1.1"),
        ({"rule": "best"}, "rule must be loss, accuracy or ratio, got rule=best"),
        ({"screen": -1}, "screen >= 0 must hold, got screen=-1"),
        ({"start": "warm"}, "start must be dense or allocation, got start=warm"),
        ({"start_at": 1.0}, "0 < start_at < 1 must hold, got start_at=1.0"),
        ({"attempts": 0}, "attempts >= 1 must hold, got attempts=0"),
        ({"recovery": "long"}, "recovery must be one of"),
    ],
)
def test_settings_are_checked_without_a_budget(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        NetAdapt(World(0).space, (), {}, **setting)
    NetAdapt(World(0).space, (), {})


# ----------------------------------------------------------------------------------------------------------- the rounds


def scored(world: World, score: Any) -> Any:
    """The world with scores of our own making: score(candidate)."""

    def evaluate(batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        for trial in world.evaluate(batch):
            yield dataclasses.replace(trial, score=score(trial.candidate))

    return evaluate


def cut_in_first_round(strategy: NetAdapt, trials: Sequence[Trial]) -> int:
    ratios = trials[strategy.trace[0].winner].candidate.ratios
    (group,) = [g for g, ratio in enumerate(ratios) if ratio > 0]
    return group


def test_the_rules_choose_the_highest_score_and_the_least_loss_per_cost_saved() -> None:
    world = World(4, bias=0.0)
    cost = world.costs["macs"]
    strategy, trials = played(world, screen=0, initial=0.1)
    dense, proposals = trials[0], [trials[n] for n in strategy.trace[0].proposals]
    saved = [cost.predict(world.space.dense()) - cost.predict(t.candidate.ratios) for t in proposals]
    # the one that saves most loses a little more than all others: most accurate is any other, best ratio is this one
    most = proposals[int(np.argmax(saved))].candidate.ratios

    def score(candidate: Candidate) -> float:
        return 0.9 if candidate.ratios == dense.candidate.ratios else 0.88999 if candidate.ratios == most else 0.89

    ratio, by_ratio = played(world, scored(world, score), screen=0, initial=0.1, rule="ratio")
    accuracy, by_accuracy = played(world, scored(world, score), screen=0, initial=0.1, rule="accuracy")
    assert by_ratio[ratio.trace[0].winner].candidate.ratios == most
    winner = by_accuracy[accuracy.trace[0].winner]
    assert winner.score == 0.89
    assert winner.loss == min(t.loss for t in proposals if t.candidate.ratios != most)  # equal scores: the loss


def test_the_rule_of_least_loss_does_not_ask_for_accuracy() -> None:
    world = World(4, bias=0.0)

    def score(candidate: Candidate) -> float:
        return 0.5 + 0.4 * max(candidate.ratios)  # the deeper a cut the better, which the loss knows better

    strategy, trials = played(world, scored(world, score), screen=0, rule="loss")
    assert len(strategy.trace) > 1
    for made in strategy.trace:
        assert trials[made.winner].loss == min(trials[n].loss for n in made.proposals)
    by_accuracy, others = played(world, scored(world, score), screen=0)
    assert trials[strategy.trace[0].winner].loss < others[by_accuracy.trace[0].winner].loss


def test_screening_fine_tunes_only_the_best_after_recalibration() -> None:
    world = World(5)
    favourite = 3

    def score(candidate: Candidate) -> float:
        """Group 3 recalibrates badly and would heal best; 5 and 6 recalibrate best, of which 6 heals better."""
        group = candidate.about.get("group")
        healed = candidate.recovery == "short"
        table = {f"g{favourite}": (0.1, 0.9), "g5": (0.7, 0.5), "g6": (0.6, 0.8)}
        return table.get(str(group), (0.2, 0.3))[healed]

    everyone, all_trials = played(world, scored(world, score), screen=0)
    few, trials = played(world, scored(world, score), screen=2)
    assert cut_in_first_round(everyone, all_trials) == favourite
    assert cut_in_first_round(few, trials) == 6
    first = [trials[n].candidate for n in few.trace[0].proposals]
    assert [c.recovery for c in first].count("short") == 2
    assert {c.about["group"] for c in first if c.recovery == "short"} == {"g5", "g6"}
    assert (few.trace[0].score_before, few.trace[0].score_after) == (0.6, 0.8)
    assert (everyone.trace[0].score_before, everyone.trace[0].score_after) == (0.1, 0.9)


def test_proposals_start_from_the_last_winner_and_say_what_they_are() -> None:
    strategy, trials = played(World(6))
    parent = None
    for made in strategy.trace:
        for number in (*made.proposals, made.winner):
            candidate = trials[number].candidate
            assert candidate.parent == parent
            assert (candidate.about["round"], candidate.about["target macs"]) == (made.number, made.targets[0])
        assert trials[made.winner].candidate.measure
        parent = made.winner


def test_a_failed_proposal_drops_its_group_for_the_round_only() -> None:
    """Where the short fine-tune of the favourite fails in round 1, another wins; later it may win all the same."""
    world = World(7)

    def evaluate(batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        for trial in world.evaluate(batch):
            about = trial.candidate.about
            if about.get("group") == "g2" and about["round"] == 1 and trial.candidate.recovery == "short":
                yield Trial(number=trial.number, candidate=trial.candidate, error="FloatingPointError: nan")
            else:
                yield dataclasses.replace(trial, score=0.9 if about.get("group") == "g2" else trial.score)

    strategy, trials = played(world, evaluate, screen=1)
    groups = [trials[made.winner].candidate.about["group"] for made in strategy.trace]
    assert groups[0] != "g2"
    assert groups[1] == "g2"
    assert answer(trials).feasible


def test_a_winner_that_cannot_be_measured_makes_room_for_the_next() -> None:
    world = World(8)

    def evaluate(batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        for trial in world.evaluate(batch):
            failing = trial.candidate.measure and trial.candidate.about.get("group") == "g1"
            error = "MeasuringError: it was killed" if failing else None
            yield dataclasses.replace(trial, error=error)

    plain, plain_trials = played(world)
    assert "g1" in {plain_trials[made.winner].candidate.about["group"] for made in plain.trace}
    strategy, trials = played(world, evaluate)
    assert "g1" not in {trials[made.winner].candidate.about["group"] for made in strategy.trace}
    assert answer(trials).feasible


def test_where_no_fine_tune_succeeds_the_lesser_recovery_is_taken() -> None:
    world = World(9)

    def evaluate(batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        for trial in world.evaluate(batch):
            error = "FloatingPointError: nan" if trial.candidate.recovery == "short" else None
            yield dataclasses.replace(trial, error=error)

    _, trials = played(world, evaluate)
    assert answer(trials).candidate.recovery == "probe"


def test_no_group_reaches_alone_so_the_nearest_goes_deepest() -> None:
    world = World(2, limit=0.35, bias=0.0)
    strategy, trials = played(world, initial=0.6, decay=0.9)
    assert answer(trials).feasible
    first = trials[strategy.trace[0].winner].candidate.ratios
    deepest = [tuple(h.levels[-1] if h is g else 0.0 for h in world.space.groups) for g in world.space.groups]
    assert first == min(deepest, key=world.costs["macs"].predict)


def measured_as(world: World, high: float, *, decided: bool = True, only: Literal["glances", "all"] = "all") -> Any:
    """Measured values with an interval that reaches `high` times the value."""

    def evaluate(batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        for trial in world.evaluate(batch):
            cost = trial.costs["macs"]
            if trial.candidate.measure and (only == "all" or trial.candidate.glance):
                cost = dataclasses.replace(
                    cost, low=cost.value / high, high=cost.value * high, kind="measured", decided=decided
                )
            yield dataclasses.replace(trial, costs={"macs": cost}, feasible=world.budgets[0].met(cost))

    return evaluate


def test_steps_go_by_the_value_and_the_end_by_the_upper_end() -> None:
    """A wide interval makes no round overshoot its target, and the answer's whole interval is within the budget."""
    world = World(1, levels=15, bias=0.0, limit=0.6)
    exact, _ = played(world)
    wide, trials = played(world, measured_as(world, 1.04))
    limit = world.budgets[0].limit
    above = [m for m in wide.trace if m.targets[0] > limit]
    assert len(above) >= 2
    assert [m.targets for m in above] == [m.targets for m in exact.trace[: len(above)]]
    assert [m.measured for m in above] == [m.measured for m in exact.trace[: len(above)]]
    found = answer(trials)
    assert found.costs["macs"].high <= limit
    assert found.costs["macs"].value >= 0.85 * limit


def test_far_from_the_limit_a_glance_will_do() -> None:
    """Winners are measured in earnest from where a limit is near, and never anything else; a glance moves the next
    target and calibrates nothing."""
    world = World(1, levels=15, bias=0.0, limit=0.6)
    strategy, trials = played(world)
    winners = [trials[made.winner] for made in strategy.trace]
    glanced = [winner.candidate.glance for winner in winners]
    assert glanced == sorted(glanced, reverse=True), "at first glances, then none"
    assert sum(glanced) >= 4
    assert not any(glanced[-2:]), "the last step goes by a measured interval, and ends by one"
    assert not any(t.candidate.glance for t in trials if not t.candidate.measure)
    limit = world.budgets[0].limit
    assert all(t.costs["macs"].value > limit for t in winners if t.candidate.glance)

    wide, _ = played(world, measured_as(world, 1.5, only="glances"))
    assert [made.measured for made in wide.trace] == [made.measured for made in strategy.trace]


def test_undecided_measurements_end_the_search_only_at_the_limit() -> None:
    """On the way there predictions stand for them, so that the rounds are those of an undisturbed search."""
    world = World(1, levels=15, bias=0.0, limit=0.6)
    exact, _ = played(world)
    strategy, trials = played(world, measured_as(world, 2.0, decided=False))
    limit = world.budgets[0].limit
    assert [m.targets[0] for m in strategy.trace] == pytest.approx([m.targets[0] for m in exact.trace], rel=1e-12)
    assert strategy.trace[-1].targets[0] == limit
    assert trials[-1].candidate.measure
    assert trials[-1].feasible is None
    assert trials[-1].costs["macs"].value <= limit


def test_a_budget_that_stays_exceeded_is_given_up_after_some_attempts() -> None:
    """A device whose cost never falls below the limit, whatever the cost model has learnt."""
    world = World(1, limit=0.5)
    limit = world.budgets[0].limit

    def evaluate(batch: Iterable[tuple[int, Candidate]]) -> Iterator[Trial]:
        for trial in world.evaluate(batch):
            cost = trial.costs["macs"]
            if trial.candidate.measure:
                cost = Measurement.exact(max(cost.value, 1.001 * limit), "MACs", "counted")
            yield dataclasses.replace(trial, costs={"macs": cost}, feasible=world.budgets[0].met(cost))

    strategy, _ = played(world, evaluate, attempts=3)
    assert sum(made.targets[0] == limit for made in strategy.trace) == 3


def test_an_unreachable_budget_costs_no_rounds() -> None:
    world = World(4, limit=1e-4)
    strategy, trials = played(world)
    assert len(trials) == 1
    assert not strategy.trace


def test_an_allocation_saves_rounds() -> None:
    world = World(3, levels=15)
    dense, _ = played(world)
    allocated, trials = played(world, start="allocation", start_at=0.7)
    assert allocated.trace[0].number == 0
    assert allocated.trace[0].measured[0] <= allocated.trace[0].targets[0] * 1.04
    assert len(allocated.trace) - 1 < len(dense.trace)
    assert trials[allocated.trace[1].winner].candidate.parent == allocated.trace[0].winner


def test_after_a_sweep_cuts_of_several_groups_compete() -> None:
    """Allocations beyond the last winner: they meet the round's target, and one wins where it scores best."""
    world = World(3, levels=15)
    strategy, trials = played(world, start="allocation", start_at=0.5, screen=0)
    several = [t for t in trials if t.candidate.about.get("group") == "several"]
    for trial in several:
        parent = trials[trial.candidate.parent or 0].candidate.ratios
        assert sum(a != b for a, b in zip(trial.candidate.ratios, parent, strict=True)) > 1
        assert trial.costs["macs"].value <= float(trial.candidate.about["target macs"]) * (1 + world.bias + 1e-9)
    compared = {n for made in strategy.trace[1:] for n in made.proposals}
    assert {t.number for t in several} & compared
    assert any(trials[made.winner].candidate.about["group"] == "several" for made in strategy.trace[1:])


def test_a_warm_start_is_the_allocation_that_recovers_best() -> None:
    world = World(3, levels=15)
    strategy, trials = played(world, start="allocation")
    compared = [trials[n] for n in strategy.trace[0].proposals]
    assert len(compared) > 2
    assert trials[strategy.trace[0].winner].loss == min(t.loss for t in compared)


# -------------------------------------------------------------------------------------------------------- real searches


def netadapt(**settings: Any) -> dict[str, Any]:
    return {
        "_target_": "autoprune.strategies.netadapt.NetAdapt",
        "initial": 0.15,
        "screen": 2,
        "start": "dense",
    } | settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return searched(strategy=netadapt(), storage=f"sqlite:///{tmp_path_factory.mktemp('whole')}/studies.db")


@pytest.mark.slow
def test_a_search_by_name_meets_its_budget() -> None:
    result = searched(strategy="netadapt", budget="flops_50pct")
    assert result.met
    assert result.measured["macs"].value <= 0.5 * result.dense["macs"].value
    assert math.isfinite(result.scores.recovered)


@pytest.mark.slow
def test_same_seed_twice_is_identical(whole: Result) -> None:
    second = searched(strategy=netadapt())  # in memory, too
    assert whole.met
    assert second.table == whole.table
    assert second.rounds == whole.rounds
    assert [(t.candidate, t.score, t.loss) for t in second.trials] == [
        (t.candidate, t.score, t.loss) for t in whole.trials
    ]
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))


def test_a_schedule_that_falls_short_leaves_no_study(tmp_path: Path) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path}/studies.db"
    with pytest.raises(InputError, match="reduce macs by 40 %"):
        searched(strategy=netadapt(initial=0.02, decay=0.95), storage=storage)
    assert not optuna.get_all_study_names(storage)


class StopsAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True], ids=["networks kept", "networks lost"])
def test_a_search_interrupted_within_a_round_goes_on(
    whole: Result, lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_lineage import count_fine_tunes

    made = count_fine_tunes(monkeypatch)
    storage = f"sqlite:///{tmp_path}/studies.db"
    stop = whole.rounds[1]["proposals"][-1]  # one fine-tune of the second round is done, one is left
    with pytest.raises(KeyboardInterrupt):
        searched(strategy=netadapt(), storage=storage, progress=StopsAfter(stop))
    folder = folder_beside(storage, whole.study)
    assert folder is not None
    if lost:
        for path in folder.iterdir():
            path.unlink()
    done = len(made)
    resumed = searched(strategy=netadapt(), storage=storage)
    assert resumed.evaluations == whole.evaluations - sum(not trial.cached for trial in whole.trials[:stop])
    assert [(t.candidate, t.score, t.loss) for t in resumed.trials] == [
        (t.candidate, t.score, t.loss) for t in whole.trials
    ]
    assert resumed.rounds == whole.rounds
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    if not lost:
        fine_tuned = {(t.candidate.ratios, t.candidate.parent) for t in whole.trials if t.candidate.recovery == "short"}
        assert len(made) == len(fine_tuned)
        assert done < len(made)


def test_the_trace_is_in_the_files_and_in_the_study(whole: Result, tmp_path: Path) -> None:
    import csv

    import optuna

    report.write(whole, tmp_path)
    values = json.loads((tmp_path / "result.json").read_text())
    assert [r["number"] for r in values["rounds"]] == [r["number"] for r in whole.rounds]
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = values["rounds"][-1]
    row = rows[last["winner"]]
    assert int(row["parent"]) == values["rounds"][-2]["winner"]
    assert json.loads(row["about"])["round"] == last["number"]
    assert float(row["score"]) == last["score_after"]
    assert float(row["macs"]) == last["measured"][0]
    assert (rows[0]["parent"], rows[0]["about"]) == ("", "")
    study = optuna.load_study(study_name=whole.study, storage=str(whole.storage))
    attributes = study.trials[last["winner"]].user_attrs
    assert attributes["about"]["parent"] == int(row["parent"])
    assert json.loads(row["about"]).items() <= attributes["about"].items()
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Rounds</h2>" in page
    assert page.count("<svg") == 4  # ratios, trade-off, progress, rounds
    for made in values["rounds"]:
        assert f"<td>{made['number']}</td>" in page
    assert f"<td>{percent(last['score_after'])}</td></tr>" in page
    lower, _ = html(values | {"score": values["score"] | {"sign": -1.0}}, rows)
    assert f"<td>{amount(-last['score_after'])}</td></tr>" in lower, "of a metric that is better the lower"
