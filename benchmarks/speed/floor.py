"""How far each method is from the least that it must compute.

Floor = the products of one forward pass of the calibration tokens through the blocks, and of the Gram matrices of the
consumers in scope, or where single weights go of all inputs of the maps, at the rates that this machine reaches in the
same run for these very shapes: once as floating-point operations over the measured matrix rate (`matmul`), once as the
stock blocks take, norms and activations too (`stock`). The rates are taken before and after each pruning and averaged;
each pruning has a process of its own, so that its memory is that of a command. With `--clock cpu` seconds are those of
the process, which other work on the machine changes less than those of the wall; take one thread with it.

    python benchmarks/speed/floor.py [--methods fasp structprune] [--calibration FILE] [--num-samples 48]
        [--seq-len 1024] [--multiple-of N] [--pattern 2:4] [--dtype bfloat16] [--device cpu] [--clock wall]
        [--output FILE]

Shape suffixes: B windows, S positions, T tokens, D hidden size, I inputs of a consumer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from structprune import Recipe, prune
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.loading import load_model
from structprune.statistics import GramAccumulator

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
BATCH_TOKENS = 2048
# What is summed: the inputs of the consumer, or one map of each input of a block.
CONSUMERS, INPUTS = ["mlp.down_proj"], ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Seconds for all calibration tokens."""

    matmul_s: float
    """Products of the forward pass at the matrix rate."""
    stock_s: float
    """The stock blocks as they are."""
    gram_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Times what one device does."""

    clock: Callable[[], float]
    device: torch.device

    def seconds(self, work: Callable[[], Any], repeats: int = 8) -> float:
        work()
        start = self._now()
        for _ in range(repeats):
            work()
        return (self._now() - start) / repeats

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


@torch.no_grad()
def floor_of(model: Any, consumers: list[str], num_samples: int, seq_len: int, watch: Watch) -> Floor:
    """Of the model's own shapes, in its dtype, where it is. All blocks are alike."""
    layer, num_blocks = model.model.layers[0], len(model.model.layers)
    dtype = next(model.parameters()).dtype
    tokens = num_samples * seq_len
    windows = max(1, BATCH_TOKENS // seq_len)
    batch = windows * seq_len
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    inputs = {linear.in_features: torch.randn(batch, linear.in_features).to(watch.device, dtype) for linear in linears}

    def products() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    product_s = watch.seconds(products) / batch
    config = model.config
    # Scores and their sums of values: each position with itself and those before it, on average half of all.
    attention_flops = 2 * 2 * seq_len / 2 * config.num_attention_heads * layer.self_attn.head_dim
    product_flops = sum(2 * linear.weight.numel() for linear in linears)
    matmul_s = product_s * (1 + attention_flops / product_flops)

    ids_BS = torch.randint(0, config.vocab_size, (windows, seq_len), device=watch.device)
    hidden_BSD = model.model.embed_tokens(ids_BS)
    rotary = model.model.rotary_emb(hidden_BSD, torch.arange(seq_len, device=watch.device)[None])

    def stock() -> None:
        layer(hidden_BSD, position_embeddings=rotary, attention_mask=None)

    stock_s = watch.seconds(stock) / batch
    gram_s = 0.0
    for name in consumers:
        size = layer.get_submodule(name).in_features
        accumulator, x_TI = GramAccumulator(size, watch.device), inputs[size]
        gram_s += watch.seconds(lambda a=accumulator, x=x_TI: a.update(x)) / batch
    scale = tokens * num_blocks
    return Floor(matmul_s=matmul_s * scale, stock_s=stock_s * scale, gram_s=gram_s * scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What one pruning took."""

    seconds: float
    planned_bytes: int
    measured_bytes: int


def pruned(model: str, recipe: Recipe, clock: str) -> Pruned:
    start = CLOCKS[clock]()
    with tempfile.TemporaryDirectory() as folder:
        report = prune(model, recipe, Path(folder) / "out")
    assert report.compute_dtype == recipe.dtype, f"the floor is of {recipe.dtype}, the run of {report.compute_dtype}"
    return Pruned(
        seconds=CLOCKS[clock]() - start,
        planned_bytes=report.memory.planned_peak_bytes,
        measured_bytes=report.memory.measured_peak_bytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    parser.add_argument("--calibration", type=Path, default=data / "wikitext2" / "train-1mb.raw.txt")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=["fasp", "structprune"])
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--multiple-of", type=int, help="of the kept widths; default: the recipe's")
    parser.add_argument("--pattern", help="single weights go, by this pattern")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    watch = Watch(clock=CLOCKS[arguments.clock], device=torch.device(arguments.device))
    reader = open_model(arguments.model)

    def sample() -> Floor:
        model = load_model(reader, watch.device, getattr(torch, arguments.dtype)).requires_grad_(False)
        summed = CONSUMERS if arguments.pattern is None else INPUTS
        return floor_of(model, summed, arguments.num_samples, arguments.seq_len, watch)

    rows: list[dict[str, Any]] = []
    for method in arguments.methods:
        asked = {"multiple_of": arguments.multiple_of} if arguments.pattern is None else {"pattern": arguments.pattern}
        if arguments.pattern is None or arguments.pattern.startswith("unstructured"):
            asked["sparsity"] = arguments.sparsity
        recipe = Recipe.build(
            method=method,
            num_samples=arguments.num_samples,
            seq_len=arguments.seq_len,
            calibration=str(arguments.calibration),
            dtype=arguments.dtype,
            device=arguments.device,
            reload_check=False,
            **asked,
        )
        floors = [sample()]
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found = process.submit(pruned, arguments.model, recipe, arguments.clock).result()
        floors.append(sample())
        matmul, stock, gram = (
            sum(getattr(each, name) for each in floors) / len(floors) for name in ("matmul_s", "stock_s", "gram_s")
        )
        rows.append(
            {
                "method": method,
                "pattern": arguments.pattern,
                "dtype": arguments.dtype,
                "device": arguments.device,
                "clock": arguments.clock,
                "threads": torch.get_num_threads(),
                "num_samples": arguments.num_samples,
                "seq_len": arguments.seq_len,
                "multiple_of": arguments.multiple_of,
                "spent_s": round(found.seconds, 2),
                "matmul_s": round(matmul, 2),
                "stock_s": round(stock, 2),
                "gram_s": round(gram, 2),
                "over_matmul_floor": round(found.seconds / (matmul + gram), 3),
                "over_stock_floor": round(found.seconds / (stock + gram), 3),
                "planned_mib": round(found.planned_bytes / 2**20, 1),
                "measured_mib": round(found.measured_bytes / 2**20, 1),
            }
        )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
