"""Networks cut from a parent's: the right tensors, really used, kept while they are needed, else made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate import evaluator
from torch import nn
from zoo import ZOO

from autoprune.core import Candidate, Trial
from autoprune.evaluate import Evaluator
from autoprune.lineage import Networks, check_nested, folder_beside
from autoprune.probe import randomise
from autoprune.proof import _masked
from autoprune.reconstruct import Reconstruction
from autoprune.space import trace
from autoprune.traced import TracedModel, tensors_of
from autoprune.units import Labels


def nested(traced: TracedModel, seed: int) -> tuple[list[Labels], list[Labels]]:
    """Random units of every group for a parent, and fewer of them for its child."""
    rng = np.random.default_rng(seed)

    def some(units: Labels) -> Labels:
        return np.sort(rng.choice(units, max(1, round(0.7 * len(units))), replace=False))

    older = [some(np.arange(g.size)) for g in traced.space.groups]
    return older, [some(units) for units in older]


def cut_from(
    traced: TracedModel, dense: nn.Module, parent: nn.Module, older: Sequence[Labels], kept: Sequence[Labels]
) -> nn.Module:
    return traced.cut(traced.spread(dense, dict(tensors_of(parent)), older), kept).eval()


@pytest.mark.parametrize("name", ZOO)
def test_a_child_of_a_parent_that_learnt_nothing_is_cut_from_the_dense_network(name: str) -> None:
    """Bit for bit."""
    specimen = ZOO[name]
    model = specimen.build().eval()
    traced = trace(model, specimen.inputs())
    older, kept = nested(traced, 0)
    child = cut_from(traced, model, traced.cut(model, older), older, kept)
    direct = traced.cut(model, kept)
    for (left, a), (right, b) in zip(tensors_of(child), tensors_of(direct), strict=True):
        assert left == right
        assert torch.equal(a, b), left


@pytest.mark.parametrize("name", ZOO)
def test_cutting_a_recovered_parent_equals_masking_it(name: str) -> None:
    specimen = ZOO[name]
    model = specimen.build().eval()
    traced = trace(model, specimen.inputs())
    model.double()
    older, kept = nested(traced, 1)
    parent = traced.cut(model, older)
    randomise(parent, np.random.default_rng(7))  # it has learnt since it was cut
    inputs = tuple(x.double() for x in specimen.inputs(3))
    whole = traced.spread(model, dict(tensors_of(parent)), older).eval()
    child = cut_from(traced, model, parent, older, kept)
    with torch.no_grad():
        torch.testing.assert_close(whole(*inputs), parent.eval()(*inputs), rtol=1e-9, atol=1e-9)
        with _masked(whole, traced, kept):
            torch.testing.assert_close(child(*inputs), whole(*inputs), rtol=1e-9, atol=1e-9)


def test_a_child_cannot_keep_what_its_parent_lost() -> None:
    specimen = ZOO["plain"]
    model = specimen.build()
    traced = trace(model, specimen.inputs())
    older = [np.arange(1, g.size) for g in traced.space.groups]
    kept = [older[0], np.array([0, 3])]
    with pytest.raises(ValueError, match=r"group '1\.0' is to keep unit 0, which its parent has lost"):
        check_nested(traced.space, older, kept)


# ------------------------------------------------------------------------------------------------------- the evaluator


def at(ours: Evaluator, level: int, recovery: str, **more: Any) -> Candidate:
    ratios = tuple(g.levels[level] for g in ours.traced.space.groups)
    return Candidate(ratios=ratios, recovery=recovery, **more)  # type: ignore[arg-type]


def keeping(folder: Path | None, history: tuple[Trial, ...] = (), **settings: Any) -> Evaluator:
    ours = evaluator(**settings)
    ours.remember(history, Networks(folder))
    return ours


def family(ours: Evaluator) -> tuple[Candidate, Candidate, Candidate]:
    """A parent, its child and its grandchild."""
    return at(ours, 1, "short"), at(ours, 2, "short", parent=0), at(ours, 3, "short", parent=1)


def state(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for _, tensor in tensors_of(model)]


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(left), state(right), strict=True))


def count_fine_tunes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from autoprune import healer
    from autoprune.recover import finetune

    made: list[int] = []

    def counted(model: nn.Module, *given: Any, **named: Any) -> None:
        made.append(1)
        finetune(model, *given, **named)

    monkeypatch.setattr(healer, "finetune", counted)
    return made


def test_a_child_starts_from_its_parents_weights() -> None:
    ours = keeping(None)
    parent, child = at(ours, 1, "short"), at(ours, 2, "none", parent=0)
    (_, inherits) = ours([(0, parent), (1, child)])
    (orphan,) = evaluator()([(0, at(ours, 2, "none"))])
    assert inherits.error is None
    assert inherits.loss != orphan.loss
    learnt, older, kept = ours.recovered(parent), ours.healer.units(parent.ratios), ours.healer.units(child.ratios)
    assert same(ours.recovered(child), cut_from(ours.traced, ours.dense_model, learnt, older, kept))


def test_a_child_is_reconstructed_from_what_its_parent_has_learnt() -> None:
    ours = keeping(None, healing=("reconstruct",))
    parents, orphan = (at(ours, 1, "short"), at(ours, 2, "short")), at(ours, 3, "probe")
    list(ours([(0, parents[0]), (1, parents[1]), (2, orphan)]))
    kept = ours.healer.units(orphan.ratios)
    for number, parent in enumerate(parents):  # one after the other, each another source than the last
        older = ours.healer.units(parent.ratios)
        learnt = ours.traced.spread(ours.dense_model, dict(tensors_of(ours.recovered(parent))), older)
        child = ours.traced.cut(learnt, kept).eval()
        Reconstruction(learnt, ours.traced, ours.recalibration, seed=ours.seed).apply(child, kept)
        assert same(ours.recovered(replace(orphan, parent=number)), child)


@pytest.mark.parametrize("beside", [True, False], ids=["folder", "memory"])
def test_asked_again_costs_no_second_fine_tune(beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_fine_tunes(monkeypatch)
    ours = keeping(tmp_path if beside else None)
    parent, child, grandchild = family(ours)
    first = [*ours([(0, parent)]), *ours([(1, child)])]
    assert len(made) == 2
    again = list(ours([(2, at(ours, 2, "short", parent=0, measure=True, about={"round": 1}))]))
    assert len(made) == 2
    assert (again[0].score, again[0].loss) == (first[1].score, first[1].loss)
    assert {m.kind for m in again[0].costs.values()} == {"counted"}
    list(ours([(3, grandchild)]))
    assert len(made) == 3


def test_what_is_lost_or_damaged_is_made_again_bit_for_bit(tmp_path: Path) -> None:
    ours = keeping(tmp_path)
    parent, child, grandchild = family(ours)
    trials = [t for number, c in enumerate((parent, child, grandchild)) for t in ours([(number, c)])]
    network = ours.recovered(grandchild)
    for harm in ("delete", "truncate", "flip"):
        for path in tmp_path.iterdir():
            content = bytearray(path.read_bytes())
            if harm == "delete":
                path.unlink()
            elif harm == "truncate":
                path.write_bytes(content[: len(content) // 2])
            else:
                content[-5] ^= 0xFF
                path.write_bytes(content)
        resumed = keeping(tmp_path, tuple(trials))
        assert resumed.healer.stored(grandchild) is None, harm
        assert same(resumed.recovered(grandchild), network), harm
        assert resumed.healer.stored(grandchild) is not None, harm
        (again,) = keeping(tmp_path, tuple(trials[:2]))([(2, grandchild)])
        assert (again.score, again.loss) == (trials[2].score, trials[2].loss), harm


def test_without_a_store_a_chain_is_made_from_the_start() -> None:
    ours, kept = evaluator(), keeping(None)
    batch = list(enumerate(family(ours)))
    assert [t.loss for t in ours(batch)] == [t.loss for t in kept(batch)]


def test_networks_of_earlier_batches_go_when_they_are_no_parents(tmp_path: Path) -> None:
    ours = keeping(tmp_path)
    first = [at(ours, level, "short") for level in (1, 2)]
    list(ours(list(enumerate(first))))
    assert len(list(tmp_path.iterdir())) == 2
    child = at(ours, 2, "short", parent=0)
    list(ours([(2, child)]))
    assert {p.stem for p in tmp_path.iterdir()} == {ours._digest(first[0]), ours._digest(child)}
    resumed = keeping(tmp_path, (Trial(number=0, candidate=first[0]), Trial(number=2, candidate=child)))
    list(resumed([(3, at(ours, 3, "short", parent=0))]))  # the rest of an interrupted batch keeps its siblings
    assert ours._digest(child) in {p.stem for p in tmp_path.iterdir()}


def test_a_parent_that_cannot_be_is_a_failed_trial() -> None:
    ours = keeping(None)
    narrow, wide = at(ours, 3, "none"), at(ours, 1, "none", parent=0)
    _, wider, stranger = ours([(0, narrow), (1, wide), (2, at(ours, 3, "none", parent=99))])
    assert wider.error is not None
    assert "which its parent has lost" in wider.error
    assert stranger.error == "ValueError: parent 99 is not among the trials so far"


def test_the_digest_holds_the_parents() -> None:
    ours = evaluator()
    ours.remember([Trial(number=n, candidate=at(ours, n + 1, r)) for n, r in enumerate(("short", "probe"))], None)
    child = at(ours, 3, "short")
    digests = {ours._digest(child)} | {ours._digest(at(ours, 3, "short", parent=p)) for p in (0, 1)}
    assert len(digests) == 3
    assert ours._digest(at(ours, 3, "short", parent=0, measure=True, about={"round": 1})) in digests


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    networks = Networks(tmp_path / "file")
    model = nn.Linear(2, 2)
    networks.put("a", model)
    found = networks.get("a")
    assert found is not None
    assert torch.equal(found["weight"], model.weight)


def test_half_written_networks_go_with_the_rest(tmp_path: Path) -> None:
    networks = Networks(tmp_path)
    for digest in ("mine", "theirs"):
        networks.put(digest, torch.nn.Linear(2, 2))
    (tmp_path / "theirs.4711.tmp").write_bytes(b"half")
    networks.retain({"mine"})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_where_networks_lie() -> None:
    assert folder_beside(None, "s") is None
    assert folder_beside("sqlite:///:memory:", "s") is None
    assert folder_beside("postgresql://host/db", "s") is None
    one, other = (folder_beside("sqlite:///outputs/studies.db", name) for name in ("a b", "a/b"))
    assert one is not None
    assert other is not None
    assert one.parent == Path("outputs/studies_weights")
    assert one != other
    assert "/" not in other.name
