"""The network that proofs are made on: a model's structure with random weights, on which no difference hides."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.borrowing import arguments
from autoprune.traced import tensors_of


def randomise(model: nn.Module, rng: np.random.Generator) -> None:
    """Random weights and statistics of sane size, so that no difference hides behind a zero. Other buffers, which may
    be masks or tables, stay."""
    with torch.no_grad():
        for name, tensor in tensors_of(model):
            ours = isinstance(tensor, nn.Parameter) or name.endswith(("running_mean", "running_var"))
            if not ours or not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if tensor.dim() > 1:
                fan_in = tensor.numel() / tensor.shape[0]
                values = rng.standard_normal(tensor.shape) * math.sqrt(2 / max(fan_in, 1.0))
            elif name.endswith(("bias", "mean")):
                values = rng.standard_normal(tensor.shape) * 0.1
            elif isinstance(tensor, nn.Parameter) or name.endswith("var"):
                values = rng.uniform(0.5, 1.5, tensor.shape)
            else:
                continue
            tensor.copy_(torch.from_numpy(np.asarray(values)).to(tensor.dtype))


def settle(model: nn.Module, inputs: tuple[Tensor, ...], rng: np.random.Generator) -> None:
    """Statistics of batch normalisations that are near those of the inputs, so that a deep network with random weights
    neither explodes nor dies out, which would drown a proof in rounding; left as they are where it cannot run so."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(m, m.momentum, {name: tensor.clone() for name, tensor in m.named_buffers()}) for m in norms]
    try:
        with torch.no_grad():
            for norm in norms:
                norm.train()
                norm.momentum = 1.0
            model(*arguments(inputs))
            for norm in norms:
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_var.clamp_(min=1e-3).mul_(torch.from_numpy(rng.uniform(0.5, 2, norm.num_features)))
                shift = torch.from_numpy(rng.standard_normal(norm.num_features) * 0.2).to(norm.running_mean)
                norm.running_mean.add_(shift * norm.running_var.sqrt())
    except Exception:  # noqa: BLE001, one value a channel is too few, or the model is foreign code
        for norm, _, buffers in before:
            for name, tensor in buffers.items():
                norm.get_buffer(name).copy_(tensor)
    finally:
        for norm, momentum, _ in before:
            norm.eval()
            norm.momentum = momentum


def in_double(probe: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The probe in double precision, where the smallest error shows; as it is, if it does not run so."""
    exact = copy.deepcopy(probe).double()
    doubled = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    try:
        with torch.no_grad():
            exact(*arguments(doubled))
    except Exception:  # noqa: BLE001, the model is foreign code
        return probe, inputs
    return exact, doubled
