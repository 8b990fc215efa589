"""Networks that candidates start from: cut from a parent's, and kept by what they depend on.

A network that is not there, or is damaged, is made again by whoever asks for it; losing one costs time and nothing
else.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from autoprune import untrusted
from autoprune.core import PruningSpace, StorageError
from autoprune.traced import tensors_of
from autoprune.units import Labels
from autoprune.writing import whole

LOG = logging.getLogger("autoprune")
SQLITE = "sqlite:///"


def folder_beside(storage: str | None, study: str) -> Path | None:
    """Where a study's networks are kept: beside a local SQLite file; None, in memory, for any other storage."""
    if storage is None or not storage.startswith(SQLITE) or ":memory:" in storage:
        return None
    path = Path(storage.removeprefix(SQLITE))
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", study)[:100]
    digest = hashlib.sha256(study.encode()).hexdigest()[:8]  # two names may become one when made safe
    return path.parent / f"{path.stem}_weights" / f"{safe}_{digest}"


class Networks:
    """Tensors of networks by a digest of all that they depend on: safetensors in a folder, or in memory without."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, Mapping[str, Tensor]] = {}

    def in_memory(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Those that no folder holds."""
        return dict(self._memory)

    def get(self, digest: str, within: Mapping[str, Sequence[int]] | None = None) -> Mapping[str, Tensor] | None:
        """What was put; None where it is absent or, with a line in the log, damaged.

        within: the shapes of the network that it was cut from, which it cannot exceed.
        """
        if digest in self._memory or self.folder is None:
            return self._memory.get(digest)
        path = self.folder / f"{digest}.safetensors"
        try:
            for name, shape in untrusted.shapes_of(path).items():
                most = shape if within is None else within.get(name, ())
                if len(shape) != len(most) or any(a > b for a, b in zip(shape, most, strict=True)):
                    raise ValueError(f"'{name}' {list(shape)} is not cut from {list(most)}")
            with safetensors.safe_open(str(path), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
                if (file.metadata() or {}).get("sha256") != _checksum(tensors):
                    raise ValueError("its checksum is another")
        except FileNotFoundError:
            return None
        except (RuntimeError, *untrusted.DAMAGED) as error:
            LOG.warning("the network kept in %s is damaged (%s) and made again", path, error)
            return None
        return tensors

    def put(self, digest: str, network: nn.Module) -> None:
        """Keep a copy of a network's tensors; in memory where the folder cannot be written."""
        self.add(digest, {name: t.detach().cpu().clone().contiguous() for name, t in tensors_of(network)})

    def add(self, digest: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors of a network, as `put` does."""
        if self.folder is None:
            self._memory[digest] = tensors
            return
        path = self.folder / f"{digest}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as temporary:
                safetensors.torch.save_file(dict(tensors), temporary, {"sha256": _checksum(tensors)})
        except (OSError, StorageError, safetensors.SafetensorError) as error:
            LOG.warning("networks cannot be kept in %s (%s): they stay in memory", self.folder, error)
            self._memory[digest] = tensors

    def retain(self, digests: Collection[str]) -> None:
        """Delete every network but these."""
        self._memory = {digest: tensors for digest, tensors in self._memory.items() if digest in digests}
        for path in self.folder.glob("*.*") if self.folder is not None else ():
            if path.name.partition(".")[0] not in digests:  # what a killed process left half written too
                path.unlink(missing_ok=True)


def check_nested(space: PruningSpace, older: Sequence[Labels], kept: Sequence[Labels]) -> None:
    """Raises ValueError where a unit is to be kept that the parent, which holds the units `older`, has lost."""
    for group, had, keeps in zip(space.groups, older, kept, strict=True):
        if lost := sorted(set(keeps.tolist()) - set(had.tolist())):
            raise ValueError(
                f"group '{group.name}' is to keep unit {lost[0]}, which its parent has lost ({len(keeps)} units of the "
                f"parent's {len(had)}): a child's ratios must be at least its parent's"
            )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(repr((name, tensors[name].dtype, tuple(tensors[name].shape))).encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
