"""What Torch-Pruning 1.6.1 finds in a network, and what of it is right.

Its dependency graph is built once; of each of its groups half of the channels are cut by its own functions, in a copy
of the network, which must then run and give what the whole network gives with the same slices set to zero. A
layer counts if some group that passes cuts it. Output layers, which its users name, are not held against it: a group
that changes the output's shape fails, it is not wrong.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from models import networks
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.borrowing import arguments
from autoprune.keywords import positional
from autoprune.probe import in_double, randomise, settle
from autoprune.tracing import record

COLUMNS = "groups proven wrong fails weights graph_seconds seconds error".split()
SECONDS = 120  # for the groups of one network; what was not tried then counts as not proven
DOUBLE = 3e8  # MACs of a pass that is made in double precision


def theirs(name: str) -> dict[str, Any]:
    """Build the graph of one network, cut every group."""
    network = networks()[name]
    torch.manual_seed(0)
    model: nn.Module = network.build().eval()
    given = network.inputs()
    if isinstance(given, Mapping):
        model = positional(model, tuple(given))
    inputs = tuple(given.values()) if isinstance(given, Mapping) else given
    began = time.perf_counter()
    randomise(model, np.random.default_rng(0))
    settle(model, inputs, np.random.default_rng(1))
    macs = macs_by_weight(model, arguments(inputs))
    if sum(macs.values()) * len(inputs[0]) < DOUBLE:
        return found(*in_double(model, inputs), macs, began)
    row = found(model, inputs, macs, began)
    return found(*in_double(model, inputs), macs, time.perf_counter()) if row["wrong"] else row  # or it is rounding


def macs_by_weight(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """MACs an input of each weight's contractions, by the weight's name: what both sides' shares are of."""
    weights = dict(model.named_parameters())
    macs: dict[str, float] = {}
    for use in record(model, inputs, {}).contractions:
        macs[use.weight] = macs.get(use.weight, 0.0) + use.positions * weights[use.weight].numel()
    return macs


def share_of(macs: Mapping[str, float], cut: Container[str]) -> float:
    """Of these MACs those of weights that are cut."""
    return round(sum(n for name, n in macs.items() if name in cut) / max(sum(macs.values()), 1.0), 4)


def found(model: nn.Module, inputs: tuple[Tensor, ...], macs: Mapping[str, float], began: float) -> dict[str, Any]:
    """The row of a network; macs: of each weight."""
    graph_began = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=tuple(arguments(inputs)))
    graph_seconds = time.perf_counter() - graph_began
    cut: set[str] = set()
    verdicts = {"proven": 0, "wrong": 0, "fails": 0}
    count, late = 0, ""
    for group in graph.get_all_groups():
        count += 1
        if time.perf_counter() - began > SECONDS:
            late = f"more than {SECONDS} s"
            continue
        verdict, tensors = judged(model, inputs, graph, group)
        verdicts[verdict] += 1
        cut |= tensors if verdict == "proven" else set()
    return {
        "groups": count,
        **verdicts,
        "weights": share_of(macs, cut),
        "graph_seconds": round(graph_seconds, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "error": late,
    }


def judged(model: nn.Module, inputs: tuple[Tensor, ...], graph: Any, group: Any) -> tuple[str, set[str]]:
    """Whether a group is proven, wrong, or fails; and the tensors that it cuts."""
    try:
        smaller, gone = halved(model, graph, group)
        with torch.no_grad():
            ours = tree_leaves(smaller(*arguments(inputs)))
            with masked(model, gone):
                whole = tree_leaves(model(*arguments(inputs)))
    except Exception:  # noqa: BLE001, foreign code on both sides
        return "fails", set()
    for a, b in zip(ours, whole, strict=True):
        if isinstance(a, Tensor):
            if a.shape != b.shape:
                return "fails", set()
            if not float((a - b).abs().max()) <= (1e-5 if a.dtype == torch.float64 else 1e-3) * float(b.abs().max()):
                return "wrong", set()
    return "proven", {name for name, _ in gone}


@contextmanager
def masked(model: nn.Module, gone: Mapping[tuple[str, int], list[int]]) -> Iterator[None]:
    """Inside, these slices are zero; afterwards they are back."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    earlier = [(tensors[name], tensors[name].clone()) for name in {name for name, _ in gone}]
    try:
        for (name, dim), positions in gone.items():
            tensors[name].index_fill_(dim, torch.tensor(positions), 0.0)
        yield
    finally:
        for tensor, values in earlier:
            tensor.copy_(values)


def halved(model: nn.Module, graph: Any, group: Any) -> tuple[nn.Module, Mapping[tuple[str, int], list[int]]]:
    """A copy without half of the group's channels, evenly of each part of a grouped layer; and which slices went."""
    root, prune = group[0].dep.target.module, group[0].dep.handler
    channels = graph.get_out_channels(root)
    parts = [
        m.groups for m in (d.target.module for d, _ in group) if isinstance(m, nn.Conv2d) and m.groups < len(m.weight)
    ]
    width = channels // math.lcm(1, *parts)
    wanted = [i for i in range(channels) if i % width < width // 2]
    group = graph.get_pruning_group(root, prune, wanted)
    if not wanted or not graph.check_pruning_group(group):
        raise ValueError("too few channels")
    smaller = copy.deepcopy(model)
    names = {id(module): name for name, module in model.named_modules()}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    gone: dict[tuple[str, int], list[int]] = {}
    for dep, hybrid in group:
        positions = [int(getattr(i, "idx", i)) for i in hybrid]
        dep.handler.__self__.pruning_dim = dep.target.pruning_dim
        if id(dep.target.module) in names:
            name = names[id(dep.target.module)]
            module = smaller.get_submodule(name)
            before = shapes(module)
            dep.handler(module, positions)
            for own, shape in shapes(module).items():
                note(gone, f"{name}.{own}" if name else own, before[own], shape, positions)
        elif id(dep.target.module) in parameters:
            name = parameters[id(dep.target.module)]
            holder, _, own = name.rpartition(".")
            old = smaller.get_parameter(name)
            new = dep.handler(old, positions)
            setattr(smaller.get_submodule(holder), own, new)
            note(gone, name, tuple(old.shape), tuple(new.shape), positions)
    return smaller, gone


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in own}


def note(
    gone: dict[tuple[str, int], list[int]],
    name: str,
    before: tuple[int, ...],
    after: tuple[int, ...],
    positions: list[int],
) -> None:
    """Which slices of a tensor went: those at the positions, of the dimension that became smaller by as many."""
    for dim, (a, b) in enumerate(zip(before, after, strict=True)):
        if a - b == len(positions):
            gone.setdefault((name, dim), []).extend(positions)
        elif a != b:  # an input dimension of a grouped layer: the same places in each part
            gone.setdefault((name, dim), []).extend(i for i in positions if i < a)
