"""One budget on several devices.

    python experiments/devices/side_by_side.py [--strategy netadapt] [--ssh HOST "SSH ARGUMENTS"]

Searches the default task under latency_50pct on PyTorch, ONNX Runtime, OpenVINO and, where a host is given, ONNX
Runtime through ssh, and prints the units that each keeps side by side. Rows go to devices.csv; a device that has its
row is not searched again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import autoprune
from autoprune.measuring import device_of
from autoprune.recover import FineTune
from autoprune.tasks import fashion_mnist_resnet20

sys.path.insert(0, str(Path(__file__).parents[1]))
from records import append, rows

HERE = Path(__file__).parent
FILE = HERE / "devices.csv"
TABLES = Path(tempfile.gettempdir()) / "autoprune_tables"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="netadapt")
    parser.add_argument("--ssh", nargs=2, metavar=("HOST", "ARGUMENTS"))
    chosen = parser.parse_args()
    devices = {name: device_of(name) for name in ("torch_cpu", "onnxruntime", "openvino")}
    if chosen.ssh:
        there = {"name": "ssh", "host": chosen.ssh[0], "ssh": chosen.ssh[1], "python": sys.executable}
        devices["ssh"] = replace(devices["onnxruntime"], **there)
    task = fashion_mnist_resnet20.make_task(data="shipped")
    for name, device in devices.items():
        if any(row["device"] == name and row["strategy"] == chosen.strategy for row in rows(FILE)):
            continue
        began = time.time()
        result = autoprune.search(
            task,
            budget="latency_50pct",
            strategy=chosen.strategy,
            device=device,
            tables=TABLES,
            storage=f"sqlite:///{tempfile.gettempdir()}/autoprune_devices.db",
            final=FineTune(epochs=1),
        )
        ms = result.measured["latency_ms"]
        kept = {g.name: k for g, k in zip(result.space.groups, result.space.kept(result.ratios), strict=True)}
        values: dict[str, Any] = {"device": name, "strategy": chosen.strategy, "met": result.met}
        values |= {
            "dense_ms": round(result.dense["latency_ms"].value, 2),
            "of_dense": next(n for n in ms.notes if "of dense" in n),
        }
        values |= {"macs": result.measured["macs"].value, "test_dense": result.scores.test_dense}
        values |= {
            "test": result.scores.test_recovered,
            "seconds": round(time.time() - began),
            "kept": json.dumps(kept),
        }
        append(FILE, values)
    print("\n".join(side_by_side([row for row in rows(FILE) if row["strategy"] == chosen.strategy])))


def side_by_side(found: list[dict[str, str]]) -> list[str]:
    """A table of the units kept, one column a device."""
    kept = [json.loads(row["kept"]) for row in found]
    lines = ["| group | " + " | ".join(row["device"] for row in found) + " |", "|---" * (1 + len(found)) + "|"]
    lines += [f"| {group} | " + " | ".join(str(k[group]) for k in kept) + " |" for group in kept[0]]
    told: dict[str, Callable[[dict[str, str]], str]] = {
        "MACs of dense": lambda row: f"{float(row['macs']) / 31.33e6:.0%}",
        "dense, ms": lambda row: row["dense_ms"],
        "of dense, measured": lambda row: row["of_dense"].partition(" of dense")[0],
        "budget met": lambda row: row["met"],
        "test accuracy, %": lambda row: f"{100 * float(row['test']):.2f}",
        "seconds, cost table included": lambda row: row["seconds"],
    }
    return lines + [f"| {what} | " + " | ".join(map(tell, found)) + " |" for what, tell in told.items()]


if __name__ == "__main__":
    main()
