"""What the tracer finds in the networks people have: python experiments/coverage/coverage.py [NAME_CONTAINS]

Each network in a process of its own with a limit on time; rows go to coverage.csv, and a row that is there is not made
again. Columns: groups (each proven), the share of the MACs in layers that some group cuts (`prunable`), the same of the
MACs of weights alone (`weights`: what Torch-Pruning's rows have too), what is left with half of every group, what was
refused and why, seconds. Torch-Pruning's rows in peer.csv: see peer.py. Then the table.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import peer
from models import networks
from records import append, rows

from autoprune.borrowing import arguments
from autoprune.core import amount_of
from autoprune.diagnosis import prunable
from autoprune.keywords import positional
from autoprune.space import trace

FILE, PEER = (Path(__file__).parent / f"{name}.csv" for name in ("coverage", "peer"))
LIMIT = 600  # seconds a network
FORK = multiprocessing.get_context("fork")


COLUMNS = "params groups prunable weights macs_at_half params_at_half refused reasons seconds error".split()


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
    flat = positional(model, tuple(inputs)) if isinstance(inputs, Mapping) else model
    given = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
    macs = peer.macs_by_weight(flat, arguments(given))
    return {
        "params": before,
        "groups": len(traced.space.groups),
        "prunable": round(prunable(traced.macs, sizes), 4),
        "weights": peer.share_of(macs, {s.tensor for slices in traced.slices for s in slices}),
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
    for file, columns, side in ((FILE, COLUMNS, ours), (PEER, peer.COLUMNS, peer.theirs)):
        for name, network in networks().items():
            if part in name and not any(row["network"] == name for row in rows(file)):
                values: dict[str, Any] = {"network": name, "family": network.family} | dict.fromkeys(columns, "")
                append(file, values | alone(side, name))
    table()


def table() -> None:
    """What the rows come to, by package."""
    ours, theirs = ({row["network"]: row for row in rows(file)} for file in (FILE, PEER))
    print(
        "| package | networks | more than half of the MACs prunable | median s | Torch-Pruning: more than half, proven "
        "| groups wrong in | fails on |\n|---|---|---|---|---|---|---|"
    )
    for family in [*dict.fromkeys(row["family"] for row in ours.values()), ""]:
        own = [row for row in ours.values() if family in row["family"]]
        other = [theirs[row["network"]] for row in own if row["network"] in theirs]
        most = sum(float(row["prunable"] or 0) > 0.5 for row in own)
        most_of_theirs = sum(share(row) > 0.5 for row in other)
        seconds = statistics.median(float(row["seconds"] or LIMIT) for row in own)
        wrong, broken = sum(row["wrong"] not in ("", "0") for row in other), sum(not row["groups"] for row in other)
        counts = f"{len(own)} | {most} | {seconds:.1f} | {most_of_theirs} of {len(other)} | {wrong} | {broken}"
        print(f"| {family or 'all'} | {counts} |")
    for name, row in ours.items():
        if name in theirs and share(theirs[name]) > share(row) + 1e-3:
            print(f"{name}: Torch-Pruning proves {100 * share(theirs[name]):.1f} %, we {100 * share(row):.1f} %")


def share(row: Mapping[str, str]) -> float:
    """Of the MACs of weights: the same for both sides."""
    return float(row["weights"] or 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1] if len(sys.argv) > 1 else "")
