"""From ratios to a smaller network, and the ratio table that people keep.

Letters: G groups, U units of one group.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from autoprune import criteria, untrusted
from autoprune.borrowing import evaluating, seeded
from autoprune.core import InputError, PruningSpace
from autoprune.keywords import named, unnamed
from autoprune.reconstruct import Reconstruction
from autoprune.rows import Dumper, TableGroup, read, written
from autoprune.space import Space, trace
from autoprune.traced import TracedModel
from autoprune.units import Labels
from autoprune.writing import whole

FORMAT = 1
Inputs = tuple[Tensor, ...] | Tensor | Mapping[str, Tensor]  # what a model is called with


def choose_units(space: PruningSpace, scores: Sequence[criteria.Scores], ratios: Sequence[float]) -> tuple[Labels, ...]:
    """The units each group keeps at these ratios, ascending: the most important, the first among equals."""
    return tuple(_strongest(s, width) for s, width in zip(scores, space.kept(ratios), strict=True))


def importance(
    traced: TracedModel,
    model: nn.Module,
    criterion: criteria.Criterion,
    *,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    seed: int,
) -> tuple[criteria.Scores, ...]:
    """How important each unit of each group [U] is; a block, being alone, is not compared."""
    sliced = [pieces for pieces in traced.slices if pieces]
    scores = iter(criterion(model, sliced, batches=batches, loss=loss, seed=seed) if sliced else ())
    return tuple(next(scores) if pieces else np.ones(1) for pieces in traced.slices)


def ranking(
    traced: TracedModel,
    criterion: criteria.Criterion,
    *,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    seed: int,
) -> Callable[[nn.Module], tuple[criteria.Scores, ...]]:
    """`importance` as a function of a model of the traced shape, on whatever device."""

    def rank(model: nn.Module) -> tuple[criteria.Scores, ...]:
        here = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
        with seeded(seed), evaluating(here):
            return importance(traced, here, criterion, batches=batches, loss=loss, seed=seed)

    return rank


def _strongest(importance: criteria.Scores, width: int) -> Labels:
    return np.sort(np.argsort(-importance, kind="stable")[:width])


def weights_hash(model: nn.Module) -> str:
    """sha256 of all parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class RatioTable:
    """How much to prune from each group of one architecture, with where that comes from.

    architecture: fingerprint of the dense model's parameter names and shapes; weights: hash of its values.
    budgets: what was asked and reached, one mapping a budget. grain: what the units are, as of autoprune.space.Space,
    several joined by "+".
    """

    groups: tuple[TableGroup, ...]
    architecture: str
    weights: str
    criterion: str = "l1"
    grain: str = "channel"
    budgets: tuple[Mapping[str, Any], ...] = ()
    provenance: Mapping[str, Any] | None = None

    def save(self, path: str | Path) -> None:
        """Write the table as YAML, the same bytes for the same table."""
        values = {
            "format": FORMAT,
            "architecture": self.architecture,
            "weights": self.weights,
            "criterion": self.criterion,
            "grain": self.grain,
            "budgets": [dict(b) for b in self.budgets],
            "provenance": dict(self.provenance or {}),
            "groups": {g.name: written(g, as_bits=self.grain == "weight") for g in self.groups},
        }
        with whole(Path(path)) as temporary:
            temporary.write_text(yaml.dump(values, Dumper=Dumper, sort_keys=False, width=110))

    @staticmethod
    def load(path: str | Path) -> RatioTable:
        """Read a table.

        Raises:
            InputError: no such file, or not a ratio table of this format.
        """
        try:
            values = untrusted.yaml_of(path)
        except OSError as error:
            raise InputError(f"ratio table {path}: {error.strerror or error}") from error
        except untrusted.DAMAGED as error:
            raise InputError(f"ratio table {path} is not YAML that can be read: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(f"{path} is not a ratio table of format {FORMAT}; give the ratios.yaml of a search")
        try:
            return RatioTable(
                groups=tuple(read(name, row, path) for name, row in values["groups"].items()),
                architecture=str(values["architecture"]),
                weights=str(values["weights"]),
                criterion=str(values["criterion"]),
                grain=str(values["grain"]),
                budgets=tuple(dict(budget) for budget in values["budgets"]),
                provenance=dict(values["provenance"] or {}),
            )
        except InputError:
            raise
        except untrusted.DAMAGED as error:
            raise InputError(f"ratio table {path} is damaged: {type(error).__name__} {error}") from error

    def prune(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        criterion: criteria.Criterion = criteria.l1,
        batches: Iterable[Any] = (),
        loss: Callable[[Any, Any], Tensor] | None = None,
        reconstruct: Iterable[Any] = (),
    ) -> nn.Module:
        """A smaller copy of the model; the model itself is not touched.

        On the weights the table was made from, the very units it lists are kept; on other weights of the same
        architecture the units are ranked again by `criterion` (batches and loss are for those that need gradients).

        reconstruct: a few training batches (inputs, target); on what they show, layers that read pruned units are
        refitted by least squares (reconstruct.py). It loses much less before any training, and less after it. Batch
        normalisation statistics are left to the training.

        Raises:
            InputError: another architecture; the message names the first group that does not match.
        """
        by_name = isinstance(inputs, Mapping)
        model, inputs, (batches, reconstruct) = unnamed(model, inputs, batches, reconstruct)
        traced, shown = self.traced(model, inputs), list(reconstruct)
        table = self._ranked(traced, model, criterion, batches, loss)
        smaller = traced.cut(model, table.kept)
        if shown and traced.narrows:
            Reconstruction(model, traced, shown).apply(smaller, table.kept)
        return named(smaller) if by_name else smaller

    @property
    def kept(self) -> tuple[Labels, ...]:
        """The units that each group keeps, ascending."""
        return tuple(np.array(g.units, dtype=np.int64) for g in self.groups)

    def layer_ratios(self) -> dict[str, float]:
        """Layer -> its ratio, which is what other tools are told; of one with units of several groups, of them all.
        Units that are in no group count nothing: a layer of which some stay whole loses a smaller share."""
        layers = {member: [g for g in self.groups if member in g.members] for g in self.groups for member in g.members}
        sizes = {name: (sum(g.size for g in of), sum(len(g.units) for g in of)) for name, of in layers.items()}
        return {name: (size - kept) / size for name, (size, kept) in sizes.items()}

    def to_torch_pruning(self, model: nn.Module) -> dict[nn.Module, float]:
        """The pruning_ratio_dict by which a pruner of Torch-Pruning (1.6.1) cuts this model to the table's widths, with
        pruning_ratio=0, without which it cuts the layers that are not in the table too. Which units go is the pruner's
        choice. It rounds widths down, so that each ratio is less than the table's by a millionth.

        Raises:
            InputError: another architecture, or units that are not the channels of a convolution or linear layer.
        """
        ratios = {}
        for group in self.groups:
            for name in group.members:
                try:
                    layer: Any = model.get_submodule(name)
                except AttributeError:
                    raise InputError(f"this model has no layer '{name}': it is another architecture") from None
                width = getattr(layer, "out_channels", getattr(layer, "out_features", None))
                if self.grain != "channel" or width != group.size or layer in ratios:
                    raise InputError(
                        f"group '{group.name}' is of {group.size} units of {self.grain}, layer '{name}' has {width} "
                        "channels: Torch-Pruning is told of whole layers' channels alone; RatioTable.prune cuts all"
                    )
                ratios[layer] = max(group.ratio - 1e-6, 0.0)
        return ratios

    def keeping(self, kept: Sequence[Labels]) -> RatioTable:
        """The same table with these units of each group."""
        groups = zip(self.groups, kept, strict=True)
        return replace(self, groups=tuple(replace(g, units=tuple(units.tolist())) for g, units in groups))

    def fitted(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        criterion: criteria.Criterion = criteria.l1,
        batches: Iterable[Any] = (),
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> RatioTable:
        """The same widths with the units that this model keeps: itself on the weights it was made from.

        Raises:
            InputError: another architecture; the message names the first group that does not match.
        """
        model, inputs, (batches,) = unnamed(model, inputs, batches)
        return self._ranked(self.traced(model, inputs), model, criterion, batches, loss)

    def _ranked(
        self,
        traced: TracedModel,
        model: nn.Module,
        criterion: criteria.Criterion,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor] | None,
    ) -> RatioTable:
        if weights_hash(model) == self.weights:
            return self
        scores = importance(traced, model, criterion, batches=batches, loss=loss or _no_loss, seed=0)
        kept = [_strongest(s, len(g.units)) for g, s in zip(self.groups, scores, strict=True)]
        return replace(self.keeping(kept), weights=weights_hash(model), budgets=())

    def rebuild(self, model: nn.Module, inputs: Inputs, weights: str | Path) -> nn.Module:
        """The pruned network from any model of the dense architecture and the pruned weights (safetensors).

        Raises:
            InputError: another architecture, or weights that do not fit the pruned network.
        """
        by_name = isinstance(inputs, Mapping)
        model, inputs, _ = unnamed(model, inputs)
        traced = self.traced(model, inputs)
        smaller = traced.cut(model, [np.arange(len(g.units)) for g in self.groups])
        try:
            untrusted.check_tensors(weights, {name: t.shape for name, t in smaller.state_dict().items()})
            safetensors.torch.load_model(smaller, weights)
        except (RuntimeError, *untrusted.DAMAGED) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"{weights} does not hold the weights of this pruned network: {first}") from error
        return named(smaller) if by_name else smaller

    def traced(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> TracedModel:
        """A model of the dense architecture, traced.

        Raises:
            InputError: another architecture; the message names the first group that does not match.
        """
        per_row = self.groups[0].size if self.grain == "n_m" and self.groups else Space.m
        traced = trace(model, inputs, Space(grain=tuple(self.grain.split("+")), m=per_row))
        found = {g.name: g for g in traced.space.groups}
        for row in self.groups:
            group = found.get(row.name)
            if group is None:
                raise InputError(
                    f"this model has no group '{row.name}' of {row.size} units: it is another architecture"
                )
            if group.size != row.size:
                raise InputError(
                    f"group '{row.name}' has {group.size} units in this model, {row.size} in the ratio table: "
                    "it is another architecture"
                )
            if not row.units and group.kind != "block":
                raise InputError(f"the ratio table keeps none of the {row.size} units of group '{row.name}'")
        if len(found) != len(self.groups):
            extra = next(name for name in found if name not in {g.name for g in self.groups})
            raise InputError(f"group '{extra}' of this model is not in the ratio table: it is another architecture")
        if traced.fingerprint != self.architecture:
            raise InputError(
                "all groups match but other parameters of this model have other names or shapes than those "
                f"of the ratio table (architecture {traced.fingerprint}, table {self.architecture})"
            )
        order = {g.name: i for i, g in enumerate(traced.space.groups)}
        if [order[g.name] for g in self.groups] != list(range(len(self.groups))):
            raise InputError("the groups of the ratio table are in another order: it is another architecture")
        return traced


def _no_loss(output: Any, target: Any) -> Tensor:
    raise InputError("this criterion needs gradients: pass batches= and loss= to RatioTable.prune")
