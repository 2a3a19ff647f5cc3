"""Which widths the kernels like: time per channel of a gated MLP over the number of its channels.

One thread, CPU time of that thread, widths in turn and medians over rounds, so that other work on the machine counts as
little as can be. `loss` is the time over what the dense width's time per channel would give.

    python benchmarks/speed/widths.py [--hidden 576] [--dense 1536] [--keep 0.9 0.7 0.5] [--tokens 512 1]

Shape suffixes: T tokens, D hidden size, I channels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear, silu

MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)


def once(x_TD: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> float:
    start = time.thread_time()
    linear(silu(linear(x_TD, gate_ID)) * linear(x_TD, up_ID), down_DI)
    return time.thread_time() - start


def widths_of(dense: int, keep: float) -> dict[int, int]:
    """Multiple -> the width that is that multiple, and no larger one, nearest to the share kept; odd for 1."""
    result: dict[int, int] = {}
    for multiple in MULTIPLES:
        count = max(1, round(keep * dense / multiple))
        if multiple < MULTIPLES[-1] and count % 2 == 0:
            count -= 1
        result[multiple] = count * multiple
    return result


@torch.no_grad()
def measure(hidden: int, dense: int, widths: list[int], tokens: int, dtype: torch.dtype, rounds: int) -> list[float]:
    """Median seconds of every width, the dense one last."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.05).to(dtype)

    x_TD = normal(tokens, hidden)
    weights = [(normal(width, hidden), normal(width, hidden), normal(hidden, width)) for width in [*widths, dense]]
    times: list[list[float]] = [[] for _ in weights]
    # Few tokens are over so soon that the clock would see little.
    repeats = max(1, 512 // tokens // 8)
    for index in range(rounds + 2):
        for each, found in zip(weights, times, strict=True):
            spent = sum(once(x_TD, *each) for _ in range(repeats)) / repeats
            if index >= 2:
                found.append(spent)
    return [statistics.median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dense", type=int, default=1536)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, float | int | str]] = []
    table = Table("dtype", "tokens", "kept", *(f"x{multiple}" for multiple in MULTIPLES))
    for name in arguments.dtypes:
        for tokens in arguments.tokens:
            for keep in arguments.keep:
                widths = widths_of(arguments.dense, keep)
                *times, dense_s = measure(
                    arguments.hidden,
                    arguments.dense,
                    list(widths.values()),
                    tokens,
                    getattr(torch, name),
                    arguments.rounds,
                )
                losses = [
                    seconds / (dense_s * width / arguments.dense)
                    for seconds, width in zip(times, widths.values(), strict=True)
                ]
                table.add_row(name, str(tokens), f"{keep:.0%}", *(f"{loss:.2f}" for loss in losses))
                for (multiple, width), loss in zip(widths.items(), losses, strict=True):
                    rows.append(
                        {
                            "dtype": name,
                            "tokens": tokens,
                            "kept": keep,
                            "multiple": multiple,
                            "width": width,
                            "loss": round(loss, 4),
                        }
                    )
    Console().print(table)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
