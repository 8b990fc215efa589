"""What a cut network gets before it is scored: recalibrated normalisation, a fine-tune, the dense model's lessons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from autoprune.borrowing import arguments, evaluating, fingerprint, to_device
from autoprune.core import InputError, Past, check_rules, is_number

SCHEDULES = ("cosine", "constant", "rewound")
FOREIGN = 1.25  # so many times a model's loss where statistics of the data at hand do not go with its weights


def recalibrate(model: nn.Module, batches: Sequence[Any]) -> None:
    """Re-estimate the batch normalisation statistics of `model`, in place, as averages over these batches.

    The statistics of the wide network are wrong for the cut one; this alone restores most of the accuracy
    (EagleEye; Li et al., ECCV 2020, arXiv 2007.02491). Nothing else changes; without such layers nothing happens.
    """
    norms = norms_of(model)
    if not norms or not batches:
        return
    model.eval()
    with torch.no_grad(), averaging(norms):
        for inputs, _ in batches:
            model(*arguments(inputs))


@contextmanager
def averaging(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Inside, the statistics of these normalisations become plain averages over the batches that they see, by which
    they normalise meanwhile; afterwards they are in evaluation mode."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def norms_of(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Those that keep statistics."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.track_running_stats]


def anchored(model: nn.Module, batches: Sequence[Any], loss: Callable[[Any, Any], Tensor]) -> nn.Module:
    """The model itself, or a copy that gives the same outputs with statistics that are those of these batches.

    A published network that is used on pictures of another kind normalises by statistics of other data, which belong
    to its weights: with those of the data at hand, its loss on them is many times higher. Recalibration and training
    put these in all the same. In the copy, each normalisation has the mean m and deviation s that its inputs have in
    the model, and scale and shift g' = g s/s0, b' = b + g (m - m0)/s0 make up for it; new statistics then change
    nothing. Normalisations without scale and shift stay as they are.
    """
    if not _foreign(model, batches, loss):
        return model
    copied = copy.deepcopy(model).eval()
    norms = [norm for norm in norms_of(copied) if norm.affine]
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {norm: [] for norm in norms}

    def see(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        seen[norm].append(torch.var_mean(x, [d for d in range(x.dim()) if d != 1]))

    hooks = [norm.register_forward_pre_hook(see) for norm in norms]
    with torch.no_grad():
        for inputs, _ in batches:
            copied(*arguments(inputs))
        for hook in hooks:
            hook.remove()
        for norm in (norm for norm in norms if seen[norm]):
            var, mean = (torch.stack(part).mean(0) for part in zip(*seen[norm], strict=True))
            older_mean, older_var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            slope = norm.weight / torch.sqrt(older_var + norm.eps)
            norm.bias.add_(slope * (mean - older_mean))
            norm.weight.copy_(slope * torch.sqrt(var + norm.eps))
            older_mean.copy_(mean)
            older_var.copy_(var)
    return copied


def _foreign(model: nn.Module, batches: Sequence[Any], loss: Callable[[Any, Any], Tensor]) -> bool:
    if not norms_of(model) or not batches:
        return False
    own = copy.deepcopy(model)
    recalibrate(own, batches)
    return _loss(own, batches, loss) > FOREIGN * _loss(model, batches, loss) + 0.01


def _loss(model: nn.Module, batches: Sequence[Any], loss: Callable[[Any, Any], Tensor]) -> float:
    with torch.no_grad(), evaluating(model):
        return float(np.mean([float(loss(model(*arguments(inputs)), target)) for inputs, target in batches]))


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """A fine-tune: `epochs` (may be a fraction), or `steps` whatever the epochs, at the task's learning rate x
    lr_fraction.

    schedule: the learning rate falls to 0 as a "cosine", stays "constant", or is "rewound": the very one that the
    model was trained with over its last so many epochs, lr_fraction and warm_up not applying (learning rate rewinding;
    Renda et al., ICLR 2020, arXiv 2003.02389). teach: weight in [0, 1] of the dense model's lessons against the task's
    loss (Hinton et al., arXiv 1503.02531, at `temperature`, for class logits; mean squared difference for other
    outputs). warm_up: fraction of the steps over which the learning rate rises linearly.
    """

    epochs: float
    steps: int | None = None
    lr_fraction: float = 0.1
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warm_up: float = 0.1
    teach: float = 0.5
    temperature: float = 3.0

    def __post_init__(self) -> None:
        numbers = ("epochs", "lr_fraction", "momentum", "weight_decay", "warm_up", "teach", "temperature")
        rules = {f"{name} must be finite": is_number(getattr(self, name)) for name in numbers}
        check_rules("fine-tune", rules, vars(self))
        rules = {
            "epochs >= 0": self.epochs >= 0,
            "steps must be a whole number, 1 or more, or null for epochs": self.steps is None
            or (type(self.steps) is int and self.steps >= 1),
            f"schedule must be one of {', '.join(SCHEDULES)}": self.schedule in SCHEDULES,
            "lr_fraction > 0": self.lr_fraction > 0,
            "0 <= momentum < 1": 0 <= self.momentum < 1,
            "weight_decay >= 0": self.weight_decay >= 0,
            "0 <= warm_up <= 1": 0 <= self.warm_up <= 1,
            "0 <= teach <= 1": 0 <= self.teach <= 1,
            "temperature > 0": self.temperature > 0,
        }
        check_rules("fine-tune", rules, vars(self))

    def total(self, train: Iterable[Any]) -> int:
        """Its steps on this training split.

        Raises:
            InputError: it has epochs, but too few for one step.
        """
        if self.steps is not None:
            return self.steps
        per_epoch = _length(train) if self.epochs else 0
        total = round(self.epochs * per_epoch)
        if self.epochs and not total:
            raise InputError(
                f"fine-tune: {self.epochs} epochs of {per_epoch} batches are no step at all; give more epochs"
            )
        return total


def shorter(plan: FineTune, fraction: float, train: Iterable[Any]) -> FineTune:
    """The same with a fraction of its steps, one at least."""
    if fraction == 1:
        return plan
    total = plan.total(train)
    return replace(plan, steps=max(1, round(fraction * total))) if total else plan


class Teacher:
    """The dense model as a teacher: its outputs, without gradients.

    What it says of a batch is remembered, up to so many bytes in all: computed once for many networks that are trained
    on the same batches.
    """

    def __init__(self, model: nn.Module, *, remembered: int = 0) -> None:
        self._model = copy.deepcopy(model).eval()
        self._device = next(self._model.parameters()).device
        self._said: dict[str, Any] = {}
        self._room = remembered

    def __call__(self, inputs: Any) -> Any:
        batch = fingerprint(inputs) if self._said or self._room else ""
        if batch in self._said:
            return self._said[batch]
        with torch.no_grad():
            lesson = self._model(*arguments(inputs, self._device))
        size = sum(leaf.nbytes for leaf in tree_leaves(lesson) if isinstance(leaf, Tensor))
        if size <= self._room:
            self._room -= size
            self._said[batch] = lesson
        return lesson


def finetune(
    model: nn.Module,
    train: Iterable[Any],
    plan: FineTune,
    *,
    loss: Callable[[Any, Any], Tensor],
    lr: float,
    past: Past | None = None,
    teacher: nn.Module | Teacher | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train `model` in place and leave it in evaluation mode. Draws come from the global generators: seed them.

    Running statistics that remember more steps than a tenth of the fine-tune (EfficientNet's: 100) would be those of
    weights long past: while it lasts they follow faster, at most as fast as PyTorch's default, 10 steps.

    past: what a rewound schedule goes back to. penalty(model) is added to the loss, a scalar. on_step(done, total) is
    called after each step.

    Raises:
        FloatingPointError: the loss is no longer finite.
        InputError: it has epochs, but no step; or its schedule is rewound and the past unknown, or shorter.
    """
    total = plan.total(train)
    if total == 0:
        return
    if not any(p.requires_grad for p in model.parameters()):
        model.requires_grad_()  # a network frozen for inference heals all the same
    peak = lr if plan.schedule == "rewound" else lr * plan.lr_fraction
    optimizer = torch.optim.SGD(
        model.parameters(), peak, momentum=plan.momentum, weight_decay=plan.weight_decay, nesterov=plan.momentum > 0
    )
    schedule = _schedule(optimizer, plan, total, past, train)
    wise = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
    device = next(model.parameters()).device
    model.train()
    with _following(model, total):
        for step, (inputs, target) in enumerate(_endless(train), start=1):
            target = to_device(target, device)
            output = model(*arguments(inputs, device))
            value = loss(output, target)
            if wise is not None and plan.teach > 0:
                value = (1 - plan.teach) * value + plan.teach * _distance(output, wise(inputs), plan.temperature)
            if penalty is not None:
                value = value + penalty(model)
            if not torch.isfinite(value):
                raise FloatingPointError(f"the loss became {value.item()} at step {step} of the fine-tune")
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            on_step(step, total)
            if step == total:
                break
    model.eval()


def _schedule(
    optimizer: torch.optim.Optimizer, plan: FineTune, total: int, past: Past | None, train: Iterable[Any]
) -> torch.optim.lr_scheduler.LRScheduler:
    if plan.schedule == "rewound":
        begin = check_past(past, plan, train)
        rate = past.schedule  # type: ignore[union-attr]
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(begin + (1 - begin) * step / total))
    warm = max(1, round(plan.warm_up * total)) if plan.warm_up else 0
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warm + 1), 1.0, warm) if warm else None
    then: torch.optim.lr_scheduler.LRScheduler
    if plan.schedule == "constant":
        then = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    else:
        then = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warm))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, then], [warm]) if rise else then


def check_past(past: Past | None, plan: FineTune, train: Iterable[Any]) -> float:
    """The fraction of its training that the model had behind it where a rewound schedule begins.

    Raises:
        InputError: it is not known how the model was trained, or the fine-tune takes longer than that.
    """
    if past is None:
        raise InputError(
            "fine-tune: schedule=rewound goes back to how the model was trained, which the task does not say: give "
            "Task(past=Past(epochs=…, schedule=…)), or schedule=cosine"
        )
    done = plan.total(train) / (past.epochs * _length(train))
    if done > 1 + 1e-9:
        raise InputError(
            f"fine-tune: schedule=rewound takes the last epochs of the {past.epochs:g} that the model was trained for, "
            f"got {done * past.epochs:g}"
        )
    return max(0.0, 1 - done)


@contextmanager
def _following(model: nn.Module, steps: int) -> Iterator[None]:
    """Within, normalisation statistics keep up with weights that are trained for so many steps."""
    momenta = [(norm, norm.momentum) for norm in norms_of(model)]
    for norm, momentum in momenta:  # None: an average over all that was ever seen
        norm.momentum = momentum if momentum == 0 else max(momentum or 0.0, min(0.1, 10 / steps))
    try:
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum


def _distance(output: Any, lesson: Any, temperature: float) -> Tensor:
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1:
        log_p, log_q = F.log_softmax(output / temperature, 1), F.log_softmax(lesson / temperature, 1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
    if isinstance(output, Tensor):
        return F.mse_loss(output, lesson)
    pairs = list(zip(tree_leaves(output), tree_leaves(lesson), strict=False))
    alike = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape]
    taught = [_distance(a, b, temperature) for a, b in alike if a.is_floating_point()]
    if not taught:
        raise InputError(
            "the model returns something else in training than in evaluation, which the dense network cannot teach: "
            "set teach=0 where it is to be trained: evaluator.short, evaluator.recovery, finetune"
        )
    return torch.stack(taught).mean()


def _length(train: Iterable[Any]) -> int:
    try:
        return len(train)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in train)


def _endless(train: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in train:
            empty = False
            yield batch
        if empty:
            raise InputError("the training split holds no batch when it is read again: give a list or a DataLoader")
