"""The committed figures of speed as Markdown: pruning over its floor, over `fasp` and the peers, and the pruned models.

    python benchmarks/speed/table.py

Reads floor-*.json and pruned-*.json beside this file, and the wall times of ../smollm2-p1. Runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
P1 = HERE.parent / "smollm2-p1"
YARDSTICK = "fasp"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def floors() -> str:
    rows = [
        [
            path.stem.removeprefix("floor-").removesuffix("-128x2048"),
            row["method"],
            f"{row['num_samples']} x {row['seq_len']}",
            row["spent_s"],
            *(f"{row[name]:.2f}" for name in ("over_stock_floor", "over_matmul_floor")),
        ]
        for path in sorted(HERE.glob("floor-*.json"))
        for row in read(path)
    ]
    return markdown(("model", "method", "windows", "s", "over the stock blocks", "over the matrix rate"), rows)


def against_others() -> str:
    """Wall time of a method over that of `fasp` at the same sparsity; the peers' of their own run.

    Cells whose models were not timed are left out: other work shared the cores then.
    """
    cells = [cell for cell in read(P1 / "comparison.json")["cells"] if cell["speed"] is not None]
    # Measurements that an earlier cell had made are in these in full.
    seconds = {(c["label"], c["sparsity"]): c["wall_seconds"] for c in cells}
    for line in (P1 / "peers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds[f"{row['method']} (peer)", row["sparsity"]] = row["seconds"]
    sparsities = sorted({sparsity for _, sparsity in seconds})
    rows = [
        [label] + [_over(seconds.get((label, s)), seconds.get((YARDSTICK, s))) for s in sparsities]
        for label in dict.fromkeys(label for label, _ in seconds)
    ]
    return markdown(["time over that of fasp", *(f"{sparsity:.0%}" for sparsity in sparsities)], rows)


def _over(seconds: float | None, yardstick: float | None) -> str:
    return "" if seconds is None or yardstick is None else f"{seconds / yardstick:.2f}"


def pruned() -> str:
    rows = [
        [
            row["model"],
            f"{row['parameters'] / 1e6:.1f}",
            row["batch"],
            *(f"{row[name]:.2f}" for name in ("prefill", "prefill_ideal", "decode", "decode_ideal")),
        ]
        for path in sorted(HERE.glob("pruned-*.json"))
        for row in read(path)
    ]
    return markdown(("model", "M parameters", "batch", "prefill", "ideal", "decode", "ideal"), rows)


def main() -> None:
    print("\n\n".join((floors(), against_others(), pruned())))


if __name__ == "__main__":
    main()
