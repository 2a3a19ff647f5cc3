"""How much faster pruned models are, beside the ideal: the share of floating-point operations that is gone.

    python benchmarks/speed/pruned.py CHECKPOINT ... [--against smollm2] [--batch 1 16] [--output FILE]

Each checkpoint is timed by `structprune bench` in turn with the dense model, in a process of its own. The ideal counts
the matrix products of the same prompt and of one decoded token behind it (torch's FLOP counter, eager attention), the
dense model's over the pruned one's. Rows of an earlier call stay in FILE, unless the directory's name is the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.loading import load_model
from structprune.files import write_json


@torch.no_grad()
def operations(model: str, prompt_tokens: int) -> tuple[int, int]:
    """Floating-point operations of one prompt, and of the token behind it."""
    loaded: Any = load_model(open_model(model), torch.device("cpu"), torch.bfloat16)
    loaded.set_attn_implementation("eager")
    cache = DynamicCache(config=loaded.config)
    found: list[int] = []
    for length in (prompt_tokens, 1):
        ids_1S = torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            loaded(input_ids=ids_1S, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(counter.get_total_flops())
    return found[0], found[1]


def bench(model: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "structprune", "bench", model, "--against", options.against, "--json", "--quiet"]
    command += [part for size in options.batch for part in ("--batch", str(size))]
    command += ["--prompt", str(options.prompt), "--decode", str(options.decode), "--repeats", str(options.repeats)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--against", default="smollm2")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dense = operations(options.against, options.prompt)
    rows: list[dict[str, Any]] = []
    if options.output is not None and options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))
    for model in options.models:
        name = Path(model).name
        ideal = [round(d / p, 3) for d, p in zip(dense, operations(model, options.prompt), strict=True)]
        found = bench(model, options)
        rows = [row for row in rows if row["model"] != name]
        for point in found["models"][0]["points"]:
            rows.append(
                {
                    "model": name,
                    "parameters": found["models"][0]["parameters"],
                    "dtype": found["dtype"],
                    "machine": found["machine"],
                    "batch": point["batch"],
                    "prompt_tokens": point["prompt_tokens"],
                    "prefill_ideal": ideal[0],
                    "prefill": round(point["prefill_ratio"], 3),
                    "decode_ideal": ideal[1],
                    "decode": round(point["decode_ratio"], 3),
                }
            )
        if options.output is not None:
            write_json(options.output, rows)
    table = Table("model", "parameters", "batch", "prefill", "ideal", "decode", "ideal")
    for row in rows:
        names = ("model", "parameters", "batch", "prefill", "prefill_ideal", "decode", "decode_ideal")
        table.add_row(*(str(row[name]) for name in names))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
