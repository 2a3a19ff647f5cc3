"""Prune the bundled SmolLM2-135M, let it recover, and print what both cost: a real model, without a download.

    python examples/bundled_model.py [OUTPUT]

The texts come with the set-up. The first nine tenths of BoolQ's Wikipedia passages calibrate and teach; perplexity is
measured on the last tenth and, as another domain, on paragraphs of science textbooks (SciQ).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import timeit
from dataclasses import dataclass
from pathlib import Path

import torch

from structprune import Recipe, RecoverySettings, prune, recover
from structprune.assess import EvaluationRequest, SpeedRequest, side_by_side
from structprune.cli.progress import progress_observer
from structprune.cli.tables import Column, print_pairs, print_table
from structprune.memory import format_bytes
from structprune.report.picture import write_picture
from structprune.results.schema import MemoryReport
from structprune.results.side_by_side import column_rows

# Chosen so that everything after the installation takes about six minutes on two cores without matrix units, and no
# more is removed than a minute of recovery can do something about; docs/compare.md has larger shares. Slow processors
# get fewer windows, as few as a run is not warned of (8 tokens for each of 1,536 channels), and still take longer.
FAST_PRODUCTS = 150e9
"""Float32 operations a second; two cores of a first-generation EPYC do 65e9, of a third-generation one 100e9."""


@dataclass(frozen=True)
class Amount:
    """How much text the demonstration uses."""

    windows: int
    """Of 512 tokens, to calibrate on."""
    gradient_windows: int
    held_out: int
    minutes: float
    """For the steps of the recovery."""
    seq_len: int
    """Tokens of a window that teaches or tests, and of the prompt that is timed."""
    test_windows: int
    repeats: int


AMPLE = Amount(windows=64, gradient_windows=8, held_out=4, minutes=0.8, seq_len=512, test_windows=3, repeats=2)
LEAN = Amount(windows=24, gradient_windows=2, held_out=2, minutes=0.5, seq_len=256, test_windows=2, repeats=1)
PROMPT = "What is the capital of France, and what is it known for?"


def affordable() -> Amount:
    """Time a product, the best of five, and choose."""
    a, b = torch.ones(1024, 1536), torch.ones(1536, 1024)
    seconds = min(timeit.repeat(lambda: a @ b, number=1, repeat=5))
    return AMPLE if 2 * 1024 * 1536 * 1024 / seconds > FAST_PRODUCTS else LEAN


def main() -> None:
    started = time.perf_counter()
    amount = affordable()
    recipe = Recipe(
        sparsity=0.2,
        calibration="boolq",
        num_samples=amount.windows,
        seq_len=512,
        sensitivity_samples=amount.gradient_windows,
        held_out=amount.held_out,
    )
    # In a minute there is time for a few steps: some thousand scales learn more in them than all the matrices would.
    recovery = RecoverySettings(
        mode="scales",
        calibration=("boolq",),
        minutes=amount.minutes,
        num_samples=64,
        held_out=2,
        seq_len=amount.seq_len,
        batch=1,
        warmup=2,
    )
    quality = EvaluationRequest(texts=("boolq", "sciq"), seq_len=amount.seq_len, max_windows=amount.test_windows)
    speed = SpeedRequest(prompts=(amount.seq_len,), repeats=amount.repeats, decode_tokens=16)
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "out/smollm2")
    if output.exists() and len(sys.argv) == 1:
        shutil.rmtree(output)  # our own default directory, from an earlier run
    models = {"dense": "smollm2", "pruned": output / "pruned", "recovered": output / "recovered"}
    with progress_observer(quiet=False) as observer:
        observer.note(f"this machine's products are {'fast' if amount is AMPLE else 'slow'}: {amount.windows} windows")
        observer.note("prune: the bundled GGUF file is read tensor by tensor")
        pruned = prune("smollm2", recipe, models["pruned"], observer)
        observer.note("recover: the pruned model learns from the dense one for most of a minute")
        recovered = recover(models["pruned"], "smollm2", recovery, models["recovered"], observer)
        columns = side_by_side(models, PROMPT, quality, speed, observer=observer)
    write_picture(output / "demo.svg", "SmolLM2-135M, dense, pruned and recovered", columns, pruned)

    def peak(memory: MemoryReport) -> str:
        return f"{format_bytes(memory.planned_peak_bytes)}, {format_bytes(memory.measured_peak_bytes)}"

    title = (
        f"SmolLM2-135M: {pruned.method} removed {pruned.size.removed_share_of_scope:.1%} of the MLP parameters in "
        f"{pruned.wall_seconds:.0f} s, recover took {recovered.wall_seconds:.0f} s"
    )
    memory = ("peak memory: planned, measured", "", peak(pruned.memory), peak(recovered.memory))
    header = [Column(name=""), *(Column(name=name) for name in models)]
    legend = "The source is a file in four bits; what is pruned is written in bfloat16, as wide as the weights need."
    print_table(title, header, [*column_rows(columns), memory], legend=[legend])
    print_pairs(
        PROMPT,
        [
            *((one.name, one.says) for one in columns),
            ("model", str(models["recovered"])),
            ("page", str(models["pruned"] / "pruning_report.html")),
            ("picture", str(output / "demo.svg")),
            ("whole run", f"{time.perf_counter() - started:.0f} s, {sum(os.times()[:4]):.0f} s of the processors"),
        ],
    )


if __name__ == "__main__":
    main()
