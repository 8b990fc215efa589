"""The dense network's measurement, kept in a folder: a search that goes on steers by the one that it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune import untrusted
from autoprune.core import InputError, Measurement, Meter
from autoprune.meters.device import Device
from autoprune.meters.profile import dense_of, path_of
from autoprune.writing import whole

if TYPE_CHECKING:
    from torch import Tensor, nn


def measured(
    meter: Meter,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    device: Device,
    facts: Mapping[str, Any],
    folder: Path | None,
) -> Measurement:
    """The measurement for these facts that the folder keeps, or a new one, kept there unless it was disturbed.

    Raises:
        InputError: the file in the folder is damaged, or the device cannot run the model.
    """
    facts = {**facts, "cost": meter.name}
    path = None if folder is None else path_of(folder, facts)
    if path is not None and path.exists():
        try:
            return Measurement.from_json(untrusted.json_of(path)["dense"])
        except untrusted.DAMAGED as error:
            raise InputError(
                f"the measurement {path} is damaged ({type(error).__name__}: {error}): delete it"
            ) from error
    found = dense_of(meter, device, model, inputs)
    if path is not None and found.decided:
        with whole(path) as temporary:
            temporary.write_text(json.dumps({"facts": facts, "dense": asdict(found)}))
    return found
