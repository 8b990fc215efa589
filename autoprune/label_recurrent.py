"""How labels pass through nn.LSTM, nn.GRU and nn.RNN, each followed as one operation.

All layers and directions of such a module have one hidden size, and its gates are stacked in one weight, so that hidden
unit i is i in every gate, layer and direction. With `proj_size` the projected units are alike, and are what the next
layer and the next step read; the hidden ones stay. A unit whose weights and biases are zero keeps its state at zero:
cutting it is exact.

Letters: H hidden units, O units of the output (projected or hidden).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from autoprune.recording import Recording, tensors
from autoprune.traced import GATES
from autoprune.units import Labels

KINDS = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")


def is_recurrent(module: nn.Module) -> bool:
    """Whether it is one of torch's own, whose forward is known."""
    return type(module) in (nn.LSTM, nn.GRU, nn.RNN)


def follow(rec: Recording, module: nn.RNNBase, args: tuple[Any, ...], named: Mapping[str, Any], out: Any) -> None:
    """Label what the module returned for these arguments."""
    given = dict(zip(("input", "hx"), args, strict=False)) | dict(named)
    sequence = given["input"].data if isinstance(given["input"], PackedSequence) else given["input"]
    operation, parameters = f"nn.{type(module).__name__}", dict(module.named_parameters(recurse=False))
    if not all(p in rec.sources for p in parameters.values()):
        rec.keep([sequence], f"{operation} with a weight computed from other tensors")
        return
    names = {name: rec.sources[p][0] for name, p in parameters.items()}
    hidden = _known(rec, names["weight_ih_l0"], module.hidden_size)
    outputs = _known(rec, names["weight_hr_l0"], module.proj_size) if module.proj_size else hidden
    if module.proj_size:  # torch tells that there is a projection by its size not being the hidden one
        rec.units.keep_whole(hidden, f"{operation} with proj_size, which may not come to equal hidden_size")
    steps = sequence.numel() / sequence.shape[-1] / rec.examples
    reads = rec.channel_units(rec.label(sequence), -1 % sequence.dim(), operation)
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    stacked = np.tile(hidden, GATES[module.mode])
    for layer in range(module.num_layers):
        for direction in suffixes:
            suffix = f"_l{layer}{direction}"
            sources = {kind: names[kind + suffix] for kind in KINDS if kind + suffix in names}
            ends = {"weight_ih": (stacked, reads), "weight_hh": (stacked, outputs), "weight_hr": (outputs, hidden)}
            _cell(rec, sources, ends, steps=steps, operation=operation)
        reads = np.tile(outputs, len(suffixes))
    states = tensors(given.get("hx"))
    returned, last = out
    for units, state in zip((outputs, hidden), states, strict=False):
        rec.meet([_along(units, state), rec.label(state)], tuple(state.shape), f"{operation}'s initial state")
    found = returned.data if isinstance(returned, PackedSequence) else returned
    rec.made_now(found, _along(reads, found))
    for units, state in zip((outputs, hidden), tensors(last), strict=False):
        rec.made_now(state, _along(units, state))


def _known(rec: Recording, source: str, count: int) -> Labels:
    """The units that a weight's first rows make: those of its first use, or new ones."""
    if (source, 0) in rec.slots:
        return rec.slots[source, 0][:count]
    return rec.units.fresh(count)


def _cell(
    rec: Recording,
    sources: Mapping[str, str],
    ends: Mapping[str, tuple[Labels, Labels]],
    *,
    steps: float,
    operation: str,
) -> None:
    """One direction of one layer: its parameters by kind, and the units at both dimensions of each weight."""
    for kind, source in sources.items():
        if kind not in ends:  # a bias, of what the weight of its name makes
            rec.own(source, 0, ends[kind.replace("bias", "weight")][0], operation)
            continue
        rec.made.add((source, 0))
        rec.used(source, steps)
        for dim, units in enumerate(ends[kind]):
            rec.own(source, dim, units, operation)


def _along(units: Labels, tensor: Tensor) -> Tensor:
    """The label of a tensor whose last dimension these are."""
    return torch.from_numpy(units).expand(tensor.shape)
