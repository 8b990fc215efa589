"""Costs that are counted, not measured: MACs, parameters, memory. Exact, so their intervals have no width."""

from __future__ import annotations

import logging
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.borrowing import arguments, evaluating, seeded
from autoprune.core import Measurement
from autoprune.dispatch import Watching


def _attention(inputs: list[Any], outputs: list[Any]) -> float:
    """[..., T, D] queries against [..., S, D] keys, and what that weighs of [..., S, E] values."""
    query, key, value = (value.type().sizes() for value in inputs[:3])
    return float(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _recurrent(inputs: list[Any], outputs: list[Any]) -> float:
    """Every weight matrix once a step."""
    sequence = inputs[0].type().sizes()
    weights = next(v for v in inputs if v.type().kind() == "ListType" and _matrices(v))
    return float(math.prod(sequence[:-1]) * sum(_matrices(weights)))


def _matrices(tensors: Any) -> list[int]:
    """Elements of those of a list's tensors that are matrices, where the list was made of parameters."""
    sizes = [value.type().sizes() for value in tensors.node().inputs()]
    return [math.prod(size) for size in sizes if size is not None and len(size) == 2]


OTHERS = {"scaled_dot_product_attention": _attention}
OTHERS |= dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent)


class Macs:
    """Multiply-accumulates an example of the forward pass, counted by fvcore.

    fvcore calls them flops; it counts convolutions, matrix products, normalisations and some resampling, and is taught
    here to count attention kernels and recurrent layers by their matrix products; of a layer whose weight is masked,
    the share that the mask leaves. The operations it saw but does not count are in the notes (activations, additions,
    pooling by `mean`). 1 MAC is 2 FLOPs.
    """

    name, unit = "macs", "MACs"

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        from fvcore.nn import FlopCountAnalysis  # slow to import

        logger = logging.getLogger("fvcore.nn.jit_analysis")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with torch.no_grad(), evaluating(model), seeded(0):
                analysis = FlopCountAnalysis(model, arguments(tuple(x[:1] for x in inputs)))
                analysis.set_op_handle(**{f"aten::{name}": count for name, count in OTHERS.items()})
                analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
                analysis.tracer_warnings("none")
                total = float(analysis.total())
                each = analysis.by_module()
                total -= sum(
                    each[m.rpartition(".")[0]] * float((k == 0).float().mean()) for m, k in masks(model).items()
                )
                skipped = tuple(f"{name} x{count} not counted" for name, count in analysis.unsupported_ops().items())
        finally:
            logger.setLevel(level)
        return Measurement.exact(total, self.unit, "counted", skipped)


class Params:
    """Parameters, shared ones once, without those that torch.nn.utils.prune masks."""

    name, unit = "params", "parameters"

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        masked = sum(int((mask == 0).sum()) for mask in masks(model).values())
        return Measurement.exact(float(sum(p.numel() for p in model.parameters()) - masked), self.unit, "counted")


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of torch.nn.utils.prune, by the name of the tensor that each masks."""
    parameters = dict(model.named_parameters())
    named = ((name.removesuffix("_mask"), mask) for name, mask in model.named_buffers() if name.endswith("_mask"))
    return {name: mask for name, mask in named if f"{name}_orig" in parameters}


class Memory:
    """Megabytes (1e6 bytes) of weights and buffers, and of the activations alive at the peak of one forward pass on
    the example inputs without gradients, the inputs themselves left out. Counted from the tensors' lifetimes in
    PyTorch's eager execution, without the allocator's overhead or scratch space."""

    name, unit = "memory_mb", "MB"

    def measure(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Measurement:
        weights, live = weight_bytes(model), activation_bytes(model, inputs)
        notes = (f"weights {weights / 1e6:.3f} MB, peak activations {live.peak / 1e6:.3f} MB",)
        return Measurement.exact((weights + live.peak) / 1e6, self.unit, "counted", notes)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def activation_bytes(model: nn.Module, inputs: tuple[Tensor, ...]) -> LiveBytes:
    """Bytes of what one forward pass on the example inputs makes, the model untouched."""
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused layer hides the tensors inside
    examples = arguments(inputs)
    live = LiveBytes(model, examples)
    try:
        with torch.no_grad(), evaluating(model), seeded(0), live:
            model(*examples)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    return live


class LiveBytes(Watching):
    """Bytes of the storages made by operations: `now` alive, the largest sum seen (`peak`), and of all (`total`). Of a
    recurrent module what it returns, as of one operation."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.total = 0
        self._hooks: list[Any] = []
        self._inside = 0  # recurrent modules, whose scratch space depends on the kernel
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                self._hooks += [
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave),
                ]
        self._known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *inputs]}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._inside:
            self._count(out)
        return out

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _enter(self, module: nn.Module, args: object) -> None:
        self._inside += 1

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self._inside -= 1
        self._count(output)

    def _count(self, made: object) -> None:
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage, size = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
                self._known.add(storage._cdata)
                self.now += size
                self.total += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


COUNTED: dict[str, type[Macs] | type[Params] | type[Memory]] = {m.name: m for m in (Macs, Params, Memory)}
