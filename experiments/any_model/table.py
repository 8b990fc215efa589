"""The searches under outputs/ as a table: python table.py"""

from __future__ import annotations

import json
from pathlib import Path


def main() -> None:
    print("| task | budget | reached | met | metric | dense, test | pruned, test | trials | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path in sorted(Path("outputs").glob("*/*/*/result.json")):
        found = json.loads(path.read_text())
        (budget,), score, search = found["budgets"], found["score"], found["search"]
        reached = f"{budget['value'] / found['costs'][budget['cost']]['dense']:.3f} of dense"
        metric, dense, pruned = (score[key] for key in ("metric", "test_dense", "test_recovered"))
        row = (found["task"], budget["asked"], reached, "yes" if budget["met"] else "no", metric)
        print(f"| {' | '.join(row)} | {dense:.4f} | {pruned:.4f} | {search['trials']} | {search['seconds']:.0f} |")


if __name__ == "__main__":
    main()
