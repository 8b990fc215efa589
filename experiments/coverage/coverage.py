"""What the tracer finds in the networks people have: python experiments/coverage/coverage.py [NAME_CONTAINS]

Each network in a process of its own with a limit on time; rows go to coverage.csv, and a row that is there is not made
again. Columns: groups, the share of the MACs in layers that some group cuts, whether the groups together were proven
once more on the model's own weights, what was refused and why, seconds; the same for Torch-Pruning's graph, each of its
groups cut by its own code and compared with masking (peer.py).
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import networks
from records import append, rows

from autoprune.core import amount_of
from autoprune.diagnosis import prunable
from autoprune.space import trace

FILE = Path(__file__).parent / "coverage.csv"
LIMIT = 600  # seconds a network
FORK = multiprocessing.get_context("fork")


COLUMNS = "params groups prunable macs_at_half params_at_half refused reasons seconds error".split()


def ours(name: str) -> dict[str, Any]:
    """Trace one network and cut half of every group."""
    network = networks()[name]
    torch.manual_seed(0)
    model, inputs = network.build().eval(), network.inputs()
    began = time.perf_counter()
    traced = trace(model, inputs)
    seconds = time.perf_counter() - began
    sizes = [g.size for g in traced.space.groups]
    kept = [np.arange(max(1, g.size // 2)) for g in traced.space.groups]
    smaller = traced.cut(copy.deepcopy(model), kept)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    half = amount_of(traced.macs, [len(units) for units in kept]) / amount_of(traced.macs, sizes)
    reasons = {r.reason for r in traced.space.refused}
    return {
        "params": before,
        "groups": len(traced.space.groups),
        "prunable": round(prunable(traced.macs, sizes), 4),
        "macs_at_half": round(half, 4),
        "params_at_half": round(after / before, 4),
        "refused": len(traced.space.refused),
        "reasons": " | ".join(sorted(reasons)),
        "seconds": round(seconds, 2),
    }


def alone(side: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    """What a side finds, asked in a process of its own."""
    here, there = FORK.Pipe(duplex=False)

    def work() -> None:
        try:
            there.send(side(name))
        except Exception as error:  # noqa: BLE001, a row for every network
            there.send({"error": f"{type(error).__name__}: {error}"[:300]})

    process = FORK.Process(target=work)
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv() if here.poll(LIMIT) else {"error": f"more than {LIMIT} s"}
    except EOFError:
        found = {"error": "the process died"}
    process.kill()
    process.join()
    return found


def main(part: str) -> None:
    for name, network in networks().items():
        if part in name and not any(row["network"] == name for row in rows(FILE)):
            values: dict[str, Any] = {"network": name, "family": network.family} | dict.fromkeys(COLUMNS, "")
            append(FILE, values | alone(ours, name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1] if len(sys.argv) > 1 else "")
