"""Prune the bundled SmolLM2-135M and print what it cost: the whole product on a real model, without a download.

    python examples/bundled_model.py [OUTPUT]

The text is the Wikipedia passages of BoolQ: nine tenths to calibrate on, the last tenth for the perplexity.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from structprune import Recipe, prune
from structprune.api import evaluate
from structprune.architectures.sources.resolve import resolve_model
from structprune.architectures.stock.loading import load_model
from structprune.calibration.sources.boolq import split_texts
from structprune.cli.progress import progress_observer
from structprune.cli.tables import print_pairs
from structprune.evaluation.speed import speed_pair
from structprune.memory import format_bytes

# Chosen so that everything after the installation takes less than six minutes on two cores.
RECIPE = Recipe(method="fasp", sparsity=0.3, calibration="boolq", num_samples=40, seq_len=512)
EVAL_SEQ_LEN, EVAL_WINDOWS = 1024, 8
PROMPT = "The capital of France is"


def main() -> None:
    started = time.perf_counter()
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "out/smollm2-fasp-30")
    if output.exists() and len(sys.argv) == 1:
        shutil.rmtree(output)  # our own default directory, from an earlier run
    print("reading the bundled GGUF (converted once, then cached) ...", file=sys.stderr)
    dense_directory = resolve_model("smollm2")
    with progress_observer(quiet=False) as observer:
        report = prune("smollm2", RECIPE, output, observer)

    print("evaluating both models ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "boolq-heldout.txt"
        text.write_text(split_texts()[1], encoding="utf-8")
        options = {"seq_len": EVAL_SEQ_LEN, "max_windows": EVAL_WINDOWS, "dtype": report.compute_dtype}
        before = evaluate(dense_directory, text, **options)
        after = evaluate(output, text, **options)

    # Stock transformers, no code of ours: this is what a user of the result does.
    from transformers import AutoTokenizer

    dtype = getattr(torch, report.compute_dtype)
    models = {
        name: load_model(path, torch.device("cpu"), dtype)
        for name, path in (("dense", dense_directory), ("pruned", output))
    }
    speed = speed_pair(models)
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = models["pruned"].generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    dense, pruned = speed["dense"], speed["pruned"]
    size, memory = report.size, report.memory

    def change(a: float, b: float) -> str:
        return f"{a:,.1f} -> {b:,.1f} ({b / a:.2f}x)"

    print_pairs(
        f"SmolLM2-135M (dequantised), {report.method}: {size.removed_share_of_scope:.2%} of the MLP parameters removed",
        [
            (
                "parameters",
                f"{size.parameters_before:,} -> {size.parameters_after:,} (-{size.removed_share_of_model:.1%})",
            ),
            ("of the blocks' parameters", f"-{size.removed_share_of_blocks:.1%}"),
            ("bytes on disk", f"{format_bytes(size.bytes_before)} -> {format_bytes(size.bytes_after)}"),
            (
                "perplexity",
                f"{before.perplexity:.2f} -> {after.perplexity:.2f} (BoolQ passages held out, "
                f"{before.num_windows} windows of {before.seq_len} tokens)",
            ),
            (
                "prefill tokens/s",
                f"{change(dense.prefill_tokens_per_s, pruned.prefill_tokens_per_s)}, {dense.prompt_tokens} tokens",
            ),
            ("decode tokens/s", f"{change(dense.decode_tokens_per_s, pruned.decode_tokens_per_s)}, batch 1"),
            (
                "pruning wall time",
                f"{report.wall_seconds:.1f} s ({RECIPE.num_samples} windows of {RECIPE.seq_len} tokens)",
            ),
            ("whole run", f"{time.perf_counter() - started:.1f} s"),
            (
                "peak memory of pruning",
                f"planned {format_bytes(memory.planned_peak_bytes)}, "
                f"measured {format_bytes(memory.measured_peak_bytes)}",
            ),
            ("written to", str(output)),
            ("it says", tokenizer.decode(ids[0], skip_special_tokens=True)),
        ],
    )


if __name__ == "__main__":
    main()
