"""What one candidate takes of the common network's outputs, instead of computing it: see shared_prefix.py.

Whole outputs are the same numbers by construction. Rows of an output are those that a narrower layer gives, but for the
order in which it may add up: a candidate takes them only where, on its first batch of a shape, they were its own to the
bit. So it comes to the same in whatever company.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.handing import Outputs, Positions, handing_back, narrowed, same, shortened


class Reuse:
    """whole: modules whose outputs are the same, and whether anything that then still runs reads them. narrower: the
    same of more modules, where some outputs are what is left of them at `positions`."""

    def __init__(
        self,
        whole: Mapping[str, bool],
        narrower: Mapping[str, bool],
        positions: Mapping[str, Sequence[Positions]],
    ) -> None:
        self.whole, self._narrower, self._positions = whole, narrower, positions
        self._shown: set[Hashable] = set()

    @property
    def narrower(self) -> Mapping[str, bool]:
        """What is taken at last: empty where nothing more than whole outputs is."""
        return self._narrower if self._positions else {}

    def read(self) -> dict[str, bool]:
        """All that may be taken, and whether it is read."""
        more = self.narrower
        return {name: self.whole.get(name, False) or more.get(name, False) for name in {**self.whole, **more}}

    def asked(self, batch: Hashable) -> Mapping[str, bool]:
        """What is taken on a batch of this kind, or compared with."""
        return self._narrower if batch in self._shown and self._positions else self.read()

    def refuse(self) -> None:
        """Take whole outputs alone from now on."""
        self._positions = {}

    def settled(self, batch: Hashable) -> bool:
        """Whether a batch of this kind runs without what is narrower."""
        return bool(self._positions) and batch in self._shown

    @contextmanager
    def taking(self, model: nn.Module, outputs: Outputs, batch: Hashable) -> Iterator[None]:
        """Inside, the candidate runs once, on a batch of this kind."""
        if self.settled(batch):
            with handing_back(model, {name: self._narrowed(name, outputs[name]) for name in self._narrower}):
                yield
            return
        whole = {name: outputs[name] for name in self.whole if name in outputs}
        compared = [name for name in self._positions if self._narrower[name]]
        found: dict[str, bool] = {}
        with handing_back(model, whole), ExitStack() as hooks:
            for name in compared:
                theirs = self._narrowed(name, outputs[name])
                hook = model.get_submodule(name).register_forward_hook(_comparing(found, name, theirs))
                hooks.callback(hook.remove)
            yield
        if all(found.get(name, False) for name in compared):
            self._shown.add(batch)
        else:
            self.refuse()

    def _narrowed(self, name: str, output: Callable[[], Any]) -> Callable[[], Any]:
        if name not in self._positions:
            return output
        take, positions = (narrowed if self._narrower[name] else shortened), self._positions[name]
        return lambda: take(output(), positions)


def kind(inputs: Any, stage: str) -> Hashable:
    """Of batches on which the same is computed in the same order."""
    leaves = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return stage, *((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves)


def _comparing(found: dict[str, bool], name: str, theirs: Callable[[], Any]) -> Callable[..., None]:
    def compare(module: nn.Module, given: Any, output: Any) -> None:
        found[name] = same(output, theirs())

    return compare
