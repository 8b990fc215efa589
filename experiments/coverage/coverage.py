"""What the tracer finds in the networks people have: python experiments/coverage/coverage.py [NAME_CONTAINS]

Each network in a process of its own with a limit on time; rows go to coverage.csv, and a row that is there is not made
again. Columns: groups, the share of the MACs in layers that some group cuts, whether the groups together were proven
once more on the model's own weights, what was refused and why, seconds; the same for Torch-Pruning's graph, each of its
groups cut by its own code and compared with masking (peer.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append, rows

from autoprune.core import Term, Width

FILE = Path(__file__).parent / "coverage.csv"
LIMIT = 600  # seconds a network


COLUMNS = "params groups prunable macs_at_half params_at_half refused reasons seconds error".split()


def total(terms: Sequence[Term], sizes: Sequence[int]) -> float:
    def width(side: Width) -> float:
        return side[0] + sum(each * sizes[g] for g, each in side[1].items())

    return sum(term.scale * width(term.left) * width(term.right) for term in terms)


def ours(name: str) -> dict[str, Any]:
    """Trace one network and cut half of every group."""
    import copy

    import numpy as np
    import torch
    from models import networks

    from autoprune.space import trace

    network = networks()[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, inputs = network.build().eval(), network.inputs()
    began = time.perf_counter()
    traced = trace(model, inputs)
    seconds = time.perf_counter() - began
    sizes = [g.size for g in traced.space.groups]
    dense = total(traced.macs, sizes)
    touched = total([term for term in traced.macs if term.left[1] or term.right[1]], sizes)
    kept = [np.arange(max(1, g.size // 2)) for g in traced.space.groups]
    smaller = traced.cut(copy.deepcopy(model), kept)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    half = total(traced.macs, [len(units) for units in kept])
    reasons = {r.reason for r in traced.space.refused}
    return {
        "params": before,
        "groups": len(traced.space.groups),
        "prunable": round(touched / dense, 4),
        "macs_at_half": round(half / dense, 4),
        "params_at_half": round(after / before, 4),
        "refused": len(traced.space.refused),
        "reasons": " | ".join(sorted(reasons)),
        "seconds": round(seconds, 2),
    }


def main(part: str) -> None:
    from models import networks

    for name, network in networks().items():
        if part not in name or any(row["network"] == name for row in rows(FILE)):
            continue
        values: dict[str, Any] = {"network": name, "family": network.family} | dict.fromkeys(COLUMNS, "")
        for side in ("ours",):
            command = [sys.executable, __file__, "--one", side, name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
                values |= json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
                if done.returncode:
                    values["error"] = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]
            except subprocess.TimeoutExpired:
                values["error"] = f"more than {LIMIT} s"
        append(FILE, values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(ours(sys.argv[3])))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "")
