"""The O(N) reference: global structured pruning with the whole model in memory, on the windows of StructPrune.

Whole-model forward and autograd give the Grams and the output sensitivities of all blocks at once; every unit of every
block gets its price with the same removal order; one sorted list over the whole model decides what goes; the blocks are
refitted as StructPrune does. Nothing of the engine is used: no survey, no allocator, no streaming, no block loop.

    python benchmarks/global_reference.py [--data DIR] [--sparsities 0.3 0.5]

Protocol P1 (benchmarks/p1.py), MLP channels only. Shape suffixes: N windows, S positions, D hidden, T tokens, U units.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.sources.resolve import open_model
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.sampler import draw_tokens
from structprune.calibration.context import SourceContext, draw_windows
from structprune.engine.run.calibration import window_start
from structprune.evaluation.perplexity import perplexity, text_windows
from structprune.memory import PeakMeter
from structprune.methods.structprune import STRUCTPRUNE
from structprune.scores.selection import keep_greedy, removal_path
from structprune.solvers.least_squares import least_squares
from structprune.types import LayerProblem, Moments

DAMPING = 1e-2
NUM_SURVEYED = 24
MIN_RETENTION = 0.1


def statistics(model: Any, ids_NS: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gram of every down_proj's input and E[g g^T] at its output, both over the first few windows."""
    layers = model.model.layers
    grams = [torch.zeros(layer.mlp.down_proj.in_features, layer.mlp.down_proj.in_features) for layer in layers]
    outputs: dict[int, Tensor] = {}

    def hooks(index: int) -> list[Any]:
        down = layers[index].mlp.down_proj

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TI = args[0].detach().flatten(0, -2)
            grams[index].addmm_(x_TI.T, x_TI)

        def after(_: nn.Module, __: object, output: Tensor) -> None:
            outputs[index] = output

        return [down.register_forward_pre_hook(before), down.register_forward_hook(after)]

    handles = [handle for index in range(len(layers)) for handle in hooks(index)]
    hidden = model.config.hidden_size
    sensitivities = [torch.zeros(hidden, hidden, dtype=torch.float64) for _ in layers]
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings()
    for ids_S in ids_NS[:NUM_SURVEYED]:
        # The weights need no gradient; the embedded tokens do, so that the graph reaches every block.
        hidden_BSD = embedding(ids_S[None]).detach().requires_grad_(True)
        logits_TV = model(inputs_embeds=hidden_BSD).logits[0, :-1].float()
        labels_T = torch.cat([draw_tokens(part.detach(), generator)[:, 0] for part in logits_TV.split(32)])
        loss = nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
        gradients = torch.autograd.grad(loss, [outputs[i] for i in range(len(layers))])
        for total, gradient_BSD in zip(sensitivities, gradients, strict=True):
            g_TD = gradient_BSD[0].double()
            total += g_TD.T @ g_TD
    for handle in handles:
        handle.remove()
    num_tokens = ids_NS[:NUM_SURVEYED].numel()
    return grams, [(total / num_tokens).float() for total in sensitivities]


@torch.no_grad()
def grams_of(model: Any, ids_NS: Tensor) -> list[Tensor]:
    """Sum of x x^T of every down_proj's input, float32."""
    found: list[Tensor] = []

    def keep(gram_II: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TI = args[0].flatten(0, -2).float()
            gram_II.addmm_(x_TI.T, x_TI)

        return hook

    for layer in model.model.layers:
        down = layer.mlp.down_proj
        found.append(torch.zeros(down.in_features, down.in_features))
        down.register_forward_pre_hook(keep(found[-1]))
    for ids_S in ids_NS:
        model.model(input_ids=ids_S[None])
    return found


def calibration_windows(directory: Path, data: Path, num_samples: int) -> Tensor:
    """Protocol P1's windows of the training text, (N, S)."""

    def no_sampling(*_: int) -> Tensor:
        raise AssertionError("the text comes from a file")

    encode = TextEncoder(directory).encode
    context = SourceContext(encode=encode, sample=no_sampling, num_samples=num_samples, seq_len=1024, seed=0)
    train = (data / "wikitext2" / "train-1mb.raw.txt").read_text(encoding="utf-8")
    return draw_windows(train, "train-1mb", context).ids_NS


def problem(weight_OI: Tensor, sensitivity_OO: Tensor, fit: Moments, held_out: Moments | None = None) -> LayerProblem:
    return LayerProblem(
        weight_OI=weight_OI,
        fit=fit,
        held_out=held_out,
        width=1,
        damping=DAMPING,
        producer_norms_MU=torch.ones(1, weight_OI.shape[1]),
        sensitivity_OO=sensitivity_OO,
    )


def global_ranking(costs: list[Tensor], sparsity: float) -> list[int]:
    """Units to keep per block: one list of all removals, cheapest first, each block's in its own order."""
    entries: list[tuple[float, int]] = []
    for block, cost_U in enumerate(costs):
        # A removal cannot come before those that precede it in its block, so it is priced at the dearest of them.
        allowed = len(cost_U) - max(1, math.ceil(MIN_RETENTION * len(cost_U)))
        dearest_U = torch.cummax(cost_U, 0).values
        entries += [(price, block) for price in dearest_U[:allowed].tolist()]
    entries.sort(key=lambda entry: entry[0])
    total = sum(len(cost_U) for cost_U in costs)
    kept = [len(cost_U) for cost_U in costs]
    for _, block in entries[: math.ceil(sparsity * total - 1e-6)]:
        kept[block] -= 1
    return kept


@torch.no_grad()
def refit(model: Any, ids_NS: Tensor, kept: list[int], sensitivities: list[Tensor]) -> None:
    """Prune block after block in place: selection, then least squares against the dense stream with chosen ridges."""
    positions = torch.arange(ids_NS.shape[1])[None]
    dense_NSD = model.get_input_embeddings()(ids_NS)
    pruned_NSD = dense_NSD.clone()
    rotary = model.model.rotary_emb(dense_NSD[:1], positions)
    num_fit = len(ids_NS) - max(1, len(ids_NS) // 4)
    for layer, num_keep, sensitivity_OO in zip(model.model.layers, kept, sensitivities, strict=True):

        def attention(hidden_BSD: Tensor, layer: Any = layer) -> Tensor:
            normed_BSD = layer.input_layernorm(hidden_BSD)
            added_BSD, _ = layer.self_attn(normed_BSD, position_embeddings=rotary, attention_mask=None)
            return hidden_BSD + added_BSD

        def inner(hidden_BSD: Tensor, layer: Any = layer) -> Tensor:
            x_BSD = layer.post_attention_layernorm(hidden_BSD)
            return layer.mlp.act_fn(layer.mlp.gate_proj(x_BSD)) * layer.mlp.up_proj(x_BSD)

        parts: list[Moments] = []
        down = layer.mlp.down_proj
        for windows in (range(num_fit), range(num_fit, len(ids_NS))):
            gram_II = torch.zeros(down.in_features, down.in_features)
            target_OI = torch.zeros(down.out_features, down.in_features)
            energy = 0.0
            for n in windows:
                dense_BSD = attention(dense_NSD[n : n + 1])
                dense_NSD[n] = (dense_BSD + down(inner(dense_BSD)))[0]
                residual_BSD = attention(pruned_NSD[n : n + 1])
                x_TI = inner(residual_BSD)[0]
                y_TO = dense_NSD[n] - residual_BSD[0]
                gram_II.addmm_(x_TI.T, x_TI)
                target_OI.addmm_(y_TO.T, x_TI)
                energy += float(y_TO.square().sum(dtype=torch.float64))
                pruned_NSD[n] = residual_BSD[0]
            num_tokens = len(windows) * ids_NS.shape[1]
            parts.append(Moments(gram_II=gram_II, num_tokens=num_tokens, target_OI=target_OI, target_energy=energy))
        solved = problem(down.weight, sensitivity_OO, *parts)
        solved = replace(solved, shrinkage=STRUCTPRUNE.shrinkage)
        keep_U = keep_greedy(solved, num_keep)
        weight_OK = least_squares(solved, keep_U).weight_OK
        down.weight.data.zero_()
        down.weight.data[:, keep_U] = weight_OK
        for n in range(len(ids_NS)):
            pruned_NSD[n] += down(inner(pruned_NSD[n : n + 1]))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3])
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--output", type=Path, default=Path("out/global_reference.jsonl"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    reader = open_model("smollm2")
    encoder = TextEncoder(reader.directory)
    ids_NS = calibration_windows(reader.directory, arguments.data, arguments.num_samples)
    valid = arguments.data / "wikitext2" / "valid.raw.txt"
    for sparsity in arguments.sparsities:
        started = time.perf_counter()
        with PeakMeter() as meter:
            model = load_model(reader, torch.device("cpu"), torch.float32)
            model.requires_grad_(False)
            grams, sensitivities = statistics(model, ids_NS)
            costs: list[Tensor] = []
            for layer, gram_II, sensitivity_OO in zip(model.model.layers, grams, sensitivities, strict=True):
                moments = Moments(gram_II=gram_II, num_tokens=ids_NS[:NUM_SURVEYED].numel())
                single = problem(layer.mlp.down_proj.weight, sensitivity_OO, moments)
                costs.append(removal_path(single, single.num_units).cost)
            kept = global_ranking(costs, sparsity)
            refit(model, ids_NS, kept, sensitivities)
            seconds = time.perf_counter() - started
            peak = meter.peak_so_far()
        text = valid.read_text(encoding="utf-8")
        start, positions = window_start(encoder, "auto"), model.config.max_position_embeddings
        windows_NS = text_windows(positions, encoder, text, str(valid), 1024, 16, start)
        result = perplexity(model, windows_NS, str(valid))
        row = {
            "method": "global reference",
            "sparsity": sparsity,
            "perplexity": result.perplexity,
            "seconds": seconds,
            "peak_bytes": peak,
            "kept": kept,
        }
        print(json.dumps(row))
        with arguments.output.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
