"""Follow unit labels through every ATen operation of one forward pass (DESIGN: "which units must be cut together").

Beside each activation an int64 label tensor of its shape says which unit each element belongs to, 0 for none. Layout
operations are applied to the labels as they are; contractions end labels on the weight's input dimension and start
fresh ones on its output dimension; elementwise operations unite the labels that meet. What an operation cannot carry
exactly keeps its units whole, with that operation as the reason. Nothing here is trusted: `space.trace` proves it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoprune import label_contractions as contractions
from autoprune import label_rules as rules
from autoprune.dispatch import Watching
from autoprune.label_recurrent import follow, is_recurrent
from autoprune.recording import Place, Recording, counted, tensors

Rule = Callable[[Recording, Any, str, dict[str, Any], Any], Any]
NAMED: Mapping[str, Rule] = {
    "addmm": contractions.addmm,
    "as_strided": rules.as_strided,
    "baddbmm": contractions.baddbmm,
    "bmm": contractions.bmm,
    "cat": rules.cat,
    "channel_shuffle": rules.channel_shuffle,
    "constant_pad_nd": rules.constant_pad_nd,
    "convolution": contractions.convolution,
    "copy": rules.copy,
    "embedding": contractions.embedding,
    "glu": rules.glu,
    "linear": contractions.linear,
    "mm": contractions.mm,
    "native_channel_shuffle": rules.channel_shuffle,
    "native_group_norm": rules.native_group_norm,
    "index_select": rules.index_select,
    "gather": rules.gather,
    "pixel_shuffle": rules.pixel_shuffle,
    "roll": rules.roll,
    "select": rules.select,
    "slice": rules.slice_,
    "split": rules.split,
    "split_with_sizes": rules.split,
    "stack": rules.stack,
}
RESHAPE = frozenset("view _unsafe_view reshape unflatten flatten _reshape_alias".split())
LAYOUT = frozenset(
    "t transpose permute unsqueeze squeeze expand alias detach clone contiguous _to_copy lift_fresh unbind flip repeat "
    "pixel_unshuffle movedim swapaxes diagonal rot90".split()
)
FAMILIES: tuple[tuple[frozenset[str], Rule], ...] = (
    (RESHAPE, rules.reshape),
    (LAYOUT, rules.layout),
    (frozenset("zeros_like ones_like empty_like full_like rand_like randn_like".split()), rules.alike),
    (
        frozenset(
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm".split()
        ),
        rules.batch_norm,
    ),
    (frozenset("native_layer_norm _fused_rms_norm rms_norm".split()), rules.layer_norm),
    (
        frozenset(
            "mean sum amax amin max min var std var_mean prod norm linalg_vector_norm logsumexp any all argmax argmin"
            "".split()
        ),
        rules.reduce,
    ),
    (frozenset("_softmax _log_softmax softmax log_softmax cumsum sort".split()), rules.along),
    (
        frozenset("hardswish hardsigmoid hardtanh leaky_relu elu _prelu_kernel dropout native_dropout".split()),
        rules.pointwise,
    ),
)
SPATIAL = ("max_pool", "avg_pool", "adaptive_", "_adaptive_", "upsample_", "reflection_pad", "replication_pad")
COPIES = frozenset("_to_copy contiguous lift_fresh clone".split())
TURNS = frozenset("t transpose permute detach alias".split())
OF_PARAMETERS = RESHAPE | LAYOUT | {"select", "slice", "split", "split_with_sizes", "index", "index_select"}


def record(model: nn.Module, inputs: tuple[Tensor, ...], readings: Mapping[Place, int]) -> Recording:
    """Run the model once in evaluation mode and follow its labels.

    readings: by a site's place which of its readings to take (0, the one that leaves most units, if absent).
    """
    recording = Recording(model, len(inputs[0]), readings)
    tracer = _Tracer(recording)
    modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [m.register_forward_pre_hook(_entered(recording, name)) for name, m in modules]
    recurrent = [m for m in model.modules() if is_recurrent(m)]
    handles += [m.register_forward_pre_hook(_within(recording)) for m in recurrent]
    handles += [m.register_forward_hook(_followed(recording), with_kwargs=True) for m in recurrent]
    handles += [m.register_forward_hook(_left(recording, tracer), always_call=True) for _, m in modules]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused layer would hide the linear layers inside
    try:
        with torch.no_grad(), tracer:
            outputs = model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for handle in handles:
            handle.remove()
    for output in tensors(outputs):
        recording.keep_label(recording.label(output), "it is the model's output")
    return recording


def _entered(recording: Recording, name: str) -> Callable[..., None]:
    return lambda module, args: recording.stack.append(name)


def _left(recording: Recording, tracer: _Tracer) -> Callable[..., None]:
    def leave(module: nn.Module, args: object, output: object) -> None:
        ended = recording.stack.pop()
        for tensor in tensors(output):
            tracer.handed_on(tensor, ended)

    return leave


def _within(recording: Recording) -> Callable[..., None]:
    def enter(module: nn.Module, args: object) -> None:
        recording.inside += 1

    return enter


def _followed(recording: Recording) -> Callable[..., None]:
    def leave(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        assert isinstance(module, nn.RNNBase)
        follow(recording, module, args, named, output)
        recording.inside -= 1

    return leave


class _Tracer(Watching):
    """Sees every ATen operation, lets it run, and finds the rule for its labels."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self._alive: dict[int, int] = {}
        recording.remember = self._remember_storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.recording.operations += 1
        if self.recording.inside:
            return out
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        self._follow(func, given, out)
        for tensor in tensors(out):
            self._remember_storage(tensor)
        return out

    def _follow(self, func: Any, given: dict[str, Any], out: Any) -> None:
        rec = self.recording
        name = func._schema.name.removeprefix("aten::")
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.removesuffix("_") if in_place else name
        operands = tensors(list(given.values()))
        if operands and all(t in rec.sources or t in rec.computed for t in operands):
            self._parameters_only(func, name, given, out)
        elif (rule := _rule(func, name)) is not None:
            self._store(out, rule(rec, func, name, given, out), in_place)
        else:
            rec.keep(operands, f"aten.{name}")
            self._store(out, None, in_place)

    def _parameters_only(self, func: Any, name: str, given: dict[str, Any], out: Any) -> None:
        """A view of a parameter is still that parameter; anything else is a tensor computed from parameters."""
        rec = self.recording
        if name in OF_PARAMETERS and given.get("self") in rec.sources:
            if name in COPIES:
                rec.sources[out] = rec.sources[given["self"]]
                return
            kinds = ("self", "dtype", "device", "layout", "memory_format", "non_blocking")
            rest = {k: v for k, v in given.items() if k not in kinds}
            if name in TURNS and (order := rec.order(given["self"])) is not None:
                told_apart = torch.empty([2 + d for d in range(len(order))], device="meta")
                rec.sources[out] = (
                    rec.sources[given["self"]][0],
                    tuple(order[n - 2] for n in func(told_apart, **rest).shape),
                )
                return
            source, index = rec.source(given["self"])
            for tensor, part in zip(tensors(out), tensors(func(index, **rest)), strict=True):
                rec.sources[tensor] = (source, part)
        else:
            for tensor in tensors(out):
                rec.sources.pop(tensor, None)  # of an operation in place
                rec.computed[tensor] = True

    def _store(self, out: Any, labels: Any, in_place: bool) -> None:
        given = list(labels) if isinstance(labels, list | tuple) else [labels]
        for i, tensor in enumerate(tensors(out)):
            label = given[i] if i < len(given) else None
            if label is None or tuple(label.shape) != tuple(tensor.shape):
                label = torch.zeros(tensor.shape, dtype=torch.int64)
            known = self.recording.label(tensor) if in_place else label
            if in_place and all(known.stride(d) or n < 2 for d, n in enumerate(known.shape)):
                known.copy_(label)  # so that what this is a view of sees it too
            else:
                self.recording.labels[tensor] = label

    def _remember_storage(self, tensor: Tensor) -> None:
        rec, storage = self.recording, tensor.untyped_storage()
        if tensor in rec.sources or tensor.numel() == 0 or storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = len(rec.storages)
        rec.lifetimes.append((True, len(rec.storages)))
        rec.storages.append((*counted(rec.label(tensor)), tensor.element_size()))
        rec.places.append(rec.running)
        weakref.finalize(storage, self._forget_storage, storage._cdata)

    def handed_on(self, tensor: Tensor, ended: str) -> None:
        """A module that has ended returns this: if it was made inside, it lives on in the module around it."""
        ordinal, places = self._alive.get(tensor.untyped_storage()._cdata), self.recording.places
        if ordinal is not None and f"{places[ordinal]}.".startswith(f"{ended}." if ended else ""):
            places[ordinal] = self.recording.running

    def _forget_storage(self, key: int) -> None:
        self.recording.lifetimes.append((False, self._alive.pop(key)))


def _rule(func: Any, name: str) -> Rule | None:
    if name in NAMED:
        return NAMED[name]
    for names, rule in FAMILIES:
        if name in names:
            return rule
    if name.startswith(SPATIAL):
        return rules.spatial
    if name.startswith("_scaled_dot_product"):
        return contractions.attention
    return rules.pointwise if torch.Tag.pointwise in func.tags else None
