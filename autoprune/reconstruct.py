"""Least-squares reconstruction: a layer that reads pruned units is refitted to give, from those that are kept, what it
gave in the dense network.

He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, arXiv 1707.06168, section
3.1, step (ii), which AMC scores its candidates after (arXiv 1802.03494). Of a layer with weights W that reads X in the
dense network, the weights V on the kept columns K, the others being R, are

    argmin |X W' - X_K V'|^2 + ridge |V - W_K|^2,   V' = W_K' + (G_KK + ridge)^-1 G_KR W_R',   G = X' X

so G is summed up once, and a candidate takes one small solve a layer. The ridge is ours: what the samples do not tell,
of an input that is always zero or a layer that was never seen at work, stays as it was.

Letters: N samples, I inputs of a layer (channels x kernel positions), O outputs, K kept and R removed inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.borrowing import arguments, evaluating
from autoprune.core import Slice
from autoprune.traced import TracedModel
from autoprune.units import Labels

POSITIONS = 16  # of an image, at which a convolution's input is sampled
RIDGE = 1e-4  # of G's mean diagonal
STOCK = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)
MOST = 5000  # inputs of a layer; G of more takes gigabytes


class Reconstruction:
    """The Gram matrices of all layers that read prunable units: `nn.Linear`, and `nn.Conv1d` and `nn.Conv2d` of one
    group that pad with zeros, of at most MOST inputs. Other layers are left as they are cut.

    Raises:
        whatever the model raises on these batches.
    """

    def __init__(self, model: nn.Module, traced: TracedModel, batches: Sequence[Any], *, seed: int = 0) -> None:
        self._traced = traced
        seen = grams(model, traced.slices, batches, seed=seed)
        self._weights = {name: weight for name, (weight, _) in seen.items()}
        self._grams = {name: gram for name, (_, gram) in seen.items()}

    @torch.no_grad()
    def apply(self, smaller: nn.Module, kept: Sequence[Labels]) -> None:
        """Refit, in place, a network that `traced` cut from the model to these units; its other weights stay."""
        removed, parameters = self._traced.removed(kept), dict(smaller.named_parameters())
        for name, weight in self._weights.items():
            gone = removed.get(name, {})
            if 1 not in gone or name not in parameters:  # it reads all that it did, or its block was left out
                continue
            rows = np.setdiff1d(np.arange(weight.shape[0]), gone.get(0, ()))
            keeps = np.setdiff1d(np.arange(weight.shape[1]), gone[1])
            dense = weight[torch.from_numpy(rows).to(weight.device)].flatten(1)
            found = solved(self._grams[name], dense, _spread(keeps, weight), _spread(np.unique(gone[1]), weight))
            parameters[name].copy_(found.view_as(parameters[name]))


def grams(
    model: nn.Module, groups: Sequence[Sequence[Slice]], batches: Iterable[Any], *, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight of each layer that reads units of these groups and can be refitted, and its Gram matrix G [I, I]."""
    readers = {piece.tensor for pieces in groups for piece in pieces if piece.role == "in"}
    weights = {n: p.detach() for n, p in model.named_parameters() if n in readers and _refits(model, n)}
    found = {name: (weight, _empty(weight)) for name, weight in weights.items()}
    others: set[str] = set()  # whose layers make something else of their weights
    generator = torch.Generator().manual_seed(seed)
    device = next((weight.device for weight in weights.values()), None)
    with torch.no_grad(), evaluating(model), ExitStack() as hooks:
        for name, (_, gram) in found.items():
            layer, left_out = model.get_submodule(name.rpartition(".")[0]), partial(others.add, name)
            hooks.enter_context(_summing(layer, gram, generator, left_out))
        for inputs, _ in batches:
            model(*arguments(inputs, device))
    return {name: seen for name, seen in found.items() if name not in others}


def solved(gram: Tensor, weight: Tensor, kept: Tensor, removed: Tensor) -> Tensor:
    """The weights [O, K] on the columns kept [K] that come closest to weight [O, I] on these and the removed [R]; gram
    [I, I]."""
    ridge = RIDGE * (float(gram.diagonal().mean()) or 1.0)
    ours = gram[kept][:, kept] + ridge * torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    lost = gram[kept][:, removed] @ weight[:, removed].T.to(gram.dtype)
    found: Tensor = weight[:, kept] + torch.linalg.solve(ours, lost).T
    return found.to(weight.dtype)


def windows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer multiplies its flattened weight with, at each place of its output: [images, rows, columns, I...],
    the last dimensions in the weight's order. A view of the inputs, padded."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), -1, 1, inputs.shape[-1])
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    flat = (1,) * (2 - len(layer.kernel_size))  # a signal is an image of one row
    kernel, stride, dilation = flat + layer.kernel_size, flat + layer.stride, flat + layer.dilation
    padding = (0,) * len(flat) + tuple(int(size) for size in layer.padding)
    images = inputs if inputs.dim() == 4 else inputs.unsqueeze(2)
    images = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    sizes = [(images.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)]
    image, channel, *steps = images.stride()
    between = [steps[d] * stride[d] for d in (0, 1)], [steps[d] * dilation[d] for d in (0, 1)]
    return images.as_strided(
        (len(images), *sizes, images.shape[1], *kernel), (image, *between[0], channel, *between[1])
    )


@contextmanager
def _summing(
    layer: nn.Module, gram: Tensor, generator: torch.Generator, left_out: Callable[[], None]
) -> Iterator[None]:
    """While this is open, what the layer reads is sampled and added to its Gram matrix; it is `left_out` where a
    forward of its own gives something else than its weight times that."""
    stock = type(layer).forward in STOCK

    def hook(module: nn.Module, given: tuple[Tensor, ...], named: Mapping[str, Tensor], output: Tensor) -> None:
        inputs = given[0] if given else named["input"]
        dims = module.get_parameter("weight").dim()
        batched = inputs.dim() == dims or (isinstance(module, nn.Linear) and inputs.dim() > dims)
        if not batched or inputs.numel() == 0:
            return
        if not stock and not _plain(module, inputs, output):
            left_out()
            return
        seen = windows(module, inputs)
        places = torch.randperm(seen.shape[1] * seen.shape[2], generator=generator)[:POSITIONS].to(seen.device)
        samples = seen[:, places // seen.shape[2], places % seen.shape[2]].flatten(2).flatten(0, 1)
        samples = samples.to(gram.dtype)  # before the product, which autocast would make one of halves
        gram.add_(samples.T @ samples)

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _refits(model: nn.Module, weight: str) -> bool:
    """Whether this weight's layer is one that is refitted, and the only one that has it."""
    layer, name = model.get_submodule(weight.rpartition(".")[0]), weight.rpartition(".")[2]
    if name != "weight" or math.prod(model.get_parameter(weight).shape[1:]) > MOST:
        return False
    if sum(p is layer.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        return False
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return False
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        stock = type(layer)._conv_forward in (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward)
        return stock and layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return True


def _plain(layer: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    """Whether a layer gave its weight times what it read, and its bias."""
    if isinstance(layer, nn.Linear):
        product = F.linear(inputs, layer.weight, layer.bias)
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        product = layer._conv_forward(inputs, layer.weight, layer.bias)
    return product.shape == output.shape and torch.allclose(product, output, rtol=1e-4, atol=1e-5)


def _empty(weight: Tensor) -> Tensor:
    inputs = math.prod(weight.shape[1:])
    return torch.zeros(inputs, inputs, dtype=torch.float64, device=weight.device)


def _spread(columns: Labels, weight: Tensor) -> Tensor:
    """The columns of the flattened weight [K] that belong to these inputs of the layer."""
    each = math.prod(weight.shape[2:])
    places = columns[:, None] * each + np.arange(each)
    return torch.from_numpy(places.ravel()).to(weight.device)
