"""Is a task what a search needs, beyond that it runs: do its data stay apart and repeat, does its network repeat, learn
and differ by more than noise? Everything is tried on copies, on a few batches, and for so long.

Letters: N images, C classes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune import criteria
from autoprune.borrowing import arguments, evaluating, fingerprint, seeded
from autoprune.checks import check_seed, check_task
from autoprune.core import Task, check_rules
from autoprune.findings import Finding, Status, guarded
from autoprune.meters.device import Device
from autoprune.meters.wire import packed
from autoprune.prune import choose_units, ranking
from autoprune.reading import MOST, Reading, read
from autoprune.recover import FineTune, finetune, norms_of, recalibrate
from autoprune.scores import Sample, Scored, interval, score, subset
from autoprune.traced import TracedModel

AREA = "task"
STEPS, LOOKED = 8, 4  # of a trial training, and batches that a loss or what is known is read off
TRAINED = 2000  # examples of the training split that are kept for it
COARSE = 0.01  # of the score: a difference that a search should see
WORSE = 1.5  # times its loss, after which a trial training is said to have hurt


@dataclass(frozen=True, kw_only=True)
class Plan:
    """images: of the search split, that a search is to score on. seconds: at most, for each thing that is tried; one
    batch of each is tried in any case."""

    images: int = 1000
    seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_rules("doctor", {"images >= 2": self.images >= 2, "seconds > 0": self.seconds > 0}, vars(self))
        check_seed(self.seed)


def check_up(
    task: Task, traced: TracedModel | None, plan: Plan = Plan(), device: Device | None = None
) -> list[Finding]:
    """Of a task with positional inputs. traced: its model's units, where it could be traced. device: that the network
    is to be taken by, where it is there. The task is left as it is, and so are the global random generators.
    """
    runs = guarded(AREA, "runs", lambda: _runs(task), way_out="autoprune.Task's docstring says what each part is")
    found = list(runs)
    splits: dict[str, Reading] = {}
    for name in ("train", "search", "test"):
        found += guarded(AREA, name, lambda name=name: _split(task, name, plan, splits))  # type: ignore[misc]
    found += guarded(AREA, "apart", lambda: _apart(task, splits))
    if runs[0].status == "failed" or "search" not in splits:
        return found
    own = copy.deepcopy(task.model).cpu().eval()
    found += guarded(AREA, "repeats", lambda: _repeats(task, own, splits["search"]))
    found += guarded(AREA, "score", lambda: _score(task, own, traced, splits, plan))
    found += guarded(AREA, "trained", lambda: _trained(own, splits["search"], plan))
    if "train" in splits:
        given = splits["train"].batches
        found += guarded(AREA, "learns", lambda: _learns("learns", "the network", task, own, given, plan))
        if traced is not None and traced.space.groups:
            found += guarded(AREA, "learns cut", lambda: _learns_cut(task, own, traced, given, plan))
    if device is not None and device.runtime != "torch":
        found += guarded(AREA, "export", lambda: _exports(task, device), way_out="or device=torch_cpu")
    return found


def _found(what: str, detail: str, status: Status = "ok", way_out: str = "") -> Finding:
    return Finding(area=AREA, what=what, detail=detail, status=status, way_out=way_out)


def _runs(task: Task) -> Iterator[Finding]:
    check_task(task)
    count = sum(p.numel() for p in task.model.parameters())
    yield _found("runs", f"{task.name}: {count:,} parameters; a batch goes through model, loss and metric")


def _split(task: Task, name: str, plan: Plan, splits: dict[str, Reading]) -> Iterator[Finding]:
    """Its size, its batches, and whether its order is drawn by the seed alone; nothing of one that cannot be read."""
    if hasattr(getattr(task, name), "__next__"):
        return
    keep = {"train": TRAINED, "search": plan.images, "test": 0}[name]
    split = splits[name] = read(getattr(task, name), keep=keep, seconds=plan.seconds / 3, seed=plan.seed)
    if not split.sizes:
        del splits[name]
        return
    sizes = sorted(set(split.sizes[:-1])) or [split.sizes[0]]
    read_ = "" if split.whole else f" in the first {plan.seconds / 3:.0f} s"
    last = f", the last of {split.sizes[-1]}" if split.sizes[-1] != sizes[-1] else ""
    of = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    detail = f"{split.count:,} examples{read_} in batches of {of}{last}"
    if name == "train" and split.sizes[-1] == 1 and norms_of(task.model):
        give = "larger batches" if sizes == [1] else "DataLoader(drop_last=True)"
        way_out = f"give {give}: batch normalisation cannot learn from one example"
        yield _found(name, detail, "warning", way_out)
    elif not split.repeats:
        way_out = (
            "its order or augmentation is not drawn from torch's global generator: give a DataLoader no generator of "
            "its own, else no search can be repeated or resumed"
        )
        yield _found(name, f"{detail}; not the same twice under one seed", "warning", way_out)
    elif name != "train" and not split.steady:
        way_out = f"give {name} shuffle=False and no augmentation: candidates are compared on the same images"
        yield _found(name, f"{detail}; shuffled or augmented", "warning", way_out)
    elif len(sizes) > 1:
        way_out = "give batches of one size: their last digits depend on it"
        yield _found(name, f"{detail}; batches of several sizes", "warning", way_out)
    else:
        yield _found(name, f"{detail}, {'augmented or shuffled' if not split.steady else 'in one order'}")


def _apart(task: Task, splits: dict[str, Reading]) -> Iterator[Finding]:
    """Whether the search split's images are among those that the network is trained or tested on."""
    if "search" not in splits:
        return
    own = splits["search"].examples
    for name, way_out in (
        ("train", "hold the search split out of the training: a search would favour what was learnt by heart"),
        ("test", "give a test split of its own: the score that is reported would be one that was chosen by"),
    ):
        if name not in splits:
            continue
        shared, seen = len(own & splits[name].examples), len(splits[name].examples)
        if shared or getattr(task, name) is task.search:
            detail = f"{shared} of {len(own)} images of search are in {name} too"
            yield _found(f"apart from {name}", detail, "warning", way_out)
        elif splits[name].drawn or splits["search"].drawn:
            detail = f"whether an image of search is in {name} too cannot be told of what is drawn at each reading"
            yield _found(f"apart from {name}", detail)
        else:
            yield _found(f"apart from {name}", f"none of {len(own)} images of search is among {seen:,} of {name}")


def _repeats(task: Task, model: nn.Module, split: Reading) -> Iterator[Finding]:
    """Whether the network gives the same output twice."""
    given = arguments(split.batches[0][0])
    with torch.no_grad():
        outputs = []
        for seed in (0, 1):
            with seeded(seed):
                output = tree_leaves(model(*(x.clone() for x in given)))
                outputs.append(fingerprint([leaf for leaf in output if isinstance(leaf, Tensor)]))
    if outputs[0] == outputs[1]:
        yield _found("repeats", "the network gives the same output twice in evaluation mode")
    else:
        way_out = "something draws in evaluation mode: give F.dropout(training=self.training), and the like"
        yield _found("repeats", "the network gives two outputs for one input in evaluation mode", "warning", way_out)


def _score(
    task: Task, model: nn.Module, traced: TracedModel | None, splits: Mapping[str, Reading], plan: Plan
) -> Iterator[Finding]:
    """The dense network's score, whether it repeats, and what difference between candidates its images can tell."""
    split = splits["search"]
    with seeded(plan.seed):
        chunks = subset(split.batches, plan.images, plan.seed)
    began = time.perf_counter()
    with torch.inference_mode(), seeded(plan.seed):  # no score yet: it may need more images
        model(*arguments(chunks[0][0]))
    each = time.perf_counter() - began
    sample = Sample.of(chunks[: max(2, min(len(chunks), int(plan.seconds / (4 * each + 1e-9))))])
    images, asked = int(sum(sample.weights)), plan.images
    dense, again = (_seeded_score(model, sample, task, seed) for seed in (plan.seed, plan.seed + 1))
    half = interval(dense.scores)[1] if len(dense.scores) > 1 else math.inf
    metric = type(task.metric).__name__
    give = f" ± {_points(half, dense)}" if math.isfinite(half) else ""
    detail = f"{metric} {dense.score:.4g}{give} on {images} images of search"
    if not np.array_equal(dense.scores, again.scores, equal_nan=True):
        yield _found("score", f"{detail}; another one the second time", "warning", "see repeats: what draws in it?")
    elif split.count < asked and split.whole:
        way_out = f"hold out more, or give evaluator.images={split.count}"
        yield _found("score", f"{detail}; {asked} were asked for, and there are no more", "warning", way_out)
    else:
        yield _found("score", f"{detail}{' (95 %)' * bool(give)}, the same twice")
    if traced is not None and traced.space.groups and len(dense.scores) > 1:
        yield _noise(task, model, traced, sample, dense, splits, plan)


def _noise(
    task: Task,
    model: nn.Module,
    traced: TracedModel,
    sample: Sample,
    dense: Scored,
    splits: Mapping[str, Reading],
    plan: Plan,
) -> Finding:
    """How wide the interval of a difference on the same images is: that of the dense network and of it with one group
    halved, the one of median MACs, as candidates differ where a search decides."""
    groups, images = traced.space.groups, int(sum(sample.weights))
    chosen = sorted(range(len(groups)), key=lambda i: sum(layer.macs for layer in groups[i].layers))[len(groups) // 2]
    ratios = [_nearest(group.levels, 0.5) if i == chosen else 0.0 for i, group in enumerate(groups)]
    cut = _cut(task, model, traced, ratios, plan.seed)
    with seeded(plan.seed):
        recalibrate(cut, splits["train"].batches[:2] if "train" in splits else ())
    scores = _seeded_score(cut, sample, task, plan.seed).scores
    half = interval(np.subtract(scores, dense.scores))[1]
    if not math.isfinite(half):
        return _found(
            "noise", f"cannot be told: {type(task.metric).__name__} is not defined on {images // len(scores)} images"
        )
    what = f"{groups[chosen].name} at {1 - ratios[chosen]:.0%} beside the dense network"
    detail = f"with {images} images a difference below {_points(half, dense)} is noise (95 %; of {what})"
    if half <= COARSE * abs(dense.score):
        return _found("noise", detail)
    factor, split = (half / (COARSE * abs(dense.score) + 1e-12)) ** 2, splits["search"]
    needed = math.ceil(min(images * factor, MOST) / 100) * 100
    if needed >= MOST:
        way_out = f"more than {MOST:,} images would be needed to tell 1 % of the score apart"
    elif split.whole and needed > split.count:
        way_out = f"{needed:,} images would tell 1 % of the score apart: hold out more, search has {split.count:,}"
    else:
        way_out = f"evaluator.images={needed} would tell 1 % of the score apart"
    return _found("noise", detail, "warning", way_out)


def _points(difference: float, dense: Scored) -> str:
    """A difference of scores, in hundredths where scores are fractions."""
    return f"{100 * difference:.2g} points" if 0 <= dense.score <= 1 else f"{difference:.3g}"


def _seeded_score(model: nn.Module, sample: Sample, task: Task, seed: int) -> Scored:
    with seeded(seed):
        return score(model, sample, task)


def _trained(model: nn.Module, split: Reading, plan: Plan) -> Iterator[Finding]:
    """Whether a classifier knows more than which class is the commonest."""
    outputs, targets, end = [], [], time.monotonic() + plan.seconds / 4
    with torch.no_grad(), seeded(0):
        for inputs, target in split.batches[:LOOKED]:
            outputs.append(model(*arguments(inputs)))
            targets.append(target)
            if time.monotonic() > end:
                break
    if not all(_classifies(o, t) for o, t in zip(outputs, targets, strict=True)):
        yield _found("trained", "whether the network is trained cannot be told of what it gives")
        return
    wanted = torch.cat(targets)
    right = float((torch.cat([o.argmax(1) for o in outputs]) == wanted).float().mean())
    common = float(wanted.bincount().max()) / len(wanted)
    spread = 2 * math.sqrt(common * (1 - common) / len(wanted))
    detail = f"{right:.1%} of {len(wanted)} images right, {common:.1%} by the commonest class alone"
    if right > common + spread:
        yield _found("trained", detail)
    else:
        way_out = "give trained weights (weights=FILE.safetensors): what to prune is read off what was learnt"
        yield _found("trained", f"{detail}: the network looks untrained", "warning", way_out)


def _classifies(output: Any, target: Any) -> bool:
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or target.is_floating_point():
        return False
    return output.dim() == 2 and output.shape[1] > 1 and target.dim() == 1 and bool((target >= 0).all())


class _Enough(Exception):  # noqa: N818, nothing went wrong
    """The time of a trial training is up."""


def _learns(
    what: str, which: str, task: Task, model: nn.Module, batches: Sequence[Any], plan: Plan
) -> Iterator[Finding]:
    """A few steps of training of a copy of `model`, at a fine-tune's learning rate."""
    tried, given = copy.deepcopy(model), list(batches[:STEPS])
    losses, done = _losses(task, tried, given[:LOOKED], plan.seconds / 4), 0
    looked, before, end = given[: len(losses)], float(np.mean(losses)), time.monotonic() + plan.seconds / 4
    weights = {name: p.detach().clone() for name, p in tried.named_parameters()}

    def step(number: int, total: int) -> None:
        nonlocal done
        done = number
        if time.monotonic() > end:
            raise _Enough

    quick = FineTune(epochs=1, steps=STEPS, teach=0)
    try:
        with seeded(plan.seed):
            finetune(tried, given, quick, loss=task.loss, lr=task.lr, on_step=step)
    except _Enough:
        pass
    except FloatingPointError as error:
        yield _found(what, f"{which}: {error}", "failed", f"lower Task.lr, now {task.lr:g}")
        return
    after = float(np.mean(_losses(task, tried.eval(), looked, math.inf)))
    detail = f"{which}: loss {before:.4g} -> {after:.4g} in {done} steps at a tenth of lr={task.lr:g}"
    if not math.isfinite(after) or not all(bool(torch.isfinite(t).all()) for t in tried.state_dict().values()):
        yield _found(what, f"{detail}; weights are no longer finite", "failed", f"lower Task.lr, now {task.lr:g}")
    elif all(torch.equal(weights[name], p) for name, p in tried.named_parameters()):
        yield _found(what, f"{detail}; no weight moved", "failed", "does the loss depend on the output, undetached?")
    elif missed := [n for n, p in tried.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]:
        names = f"{', '.join(missed[:3])}{f' and {len(missed) - 3} more' if len(missed) > 3 else ''}"
        way_out = "is that part used at all? what no gradient reaches does not heal"
        yield _found(what, f"{detail}; no gradient reaches {names}", "warning", way_out)
    elif after > WORSE * before + 0.01:
        way_out = f"is Task.lr, {task.lr:g}, what the network was trained with, and is its loss the task's?"
        yield _found(what, detail, "warning", way_out)
    else:
        yield _found(what, detail)


def _learns_cut(
    task: Task, model: nn.Module, traced: TracedModel, batches: Sequence[Any], plan: Plan
) -> Iterator[Finding]:
    halves = [_nearest(group.levels, 0.5) for group in traced.space.groups]
    cut = _cut(task, model, traced, halves, plan.seed)
    with seeded(plan.seed):
        recalibrate(cut, batches[:2])
    yield from _learns("learns cut", "every group halved", task, cut, batches, plan)


def _cut(task: Task, model: nn.Module, traced: TracedModel, ratios: Sequence[float], seed: int) -> nn.Module:
    rank = ranking(traced, criteria.l1, batches=(), loss=task.loss, seed=seed)
    return traced.cut(model, choose_units(traced.space, rank(model), ratios)).eval()


def _nearest(levels: Sequence[float], ratio: float) -> float:
    return min(levels, key=lambda level: abs(level - ratio))


def _losses(task: Task, model: nn.Module, batches: Sequence[Any], seconds: float) -> list[float]:
    """Of each batch, as far as the time goes; of the first in any case."""
    found, end = list[float](), time.monotonic() + seconds
    with torch.no_grad(), evaluating(model), seeded(0):
        for inputs, target in batches:
            found.append(float(task.loss(model(*arguments(inputs)), target)))
            if time.monotonic() > end:
                break
    return found


def _exports(task: Task, device: Device) -> Iterator[Finding]:
    content = packed(task.model, task.inputs, device.runtime)
    yield _found("export", f"ONNX of {len(content['onnx']) / 1e6:.1f} MB for {device.runtime}")
