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
from pathlib import Path

from structprune import Recipe, RecoverySettings, prune, recover
from structprune.assess import EvaluationRequest, SpeedRequest, side_by_side
from structprune.cli.progress import progress_observer
from structprune.cli.tables import Column, print_pairs, print_table
from structprune.memory import format_bytes
from structprune.report.picture import write_picture
from structprune.results.schema import MemoryReport
from structprune.results.side_by_side import column_rows

# Everything after the installation takes about six minutes on two cores without matrix units. `prune` chooses as many
# windows as it has time for, though never too few to fit, and `recover` gets what is left, though not less than lets it
# take a few steps; so a slow processor takes longer. No more is removed than a minute of recovery can do something
# about; docs/compare.md has larger shares.
PRUNE_SECONDS = 150
LAST_RECOVERY_STEP_SECONDS = 270
MINUTES = (0.4, 1.0)
PROMPT = "What is the capital of France, and what is it known for?"


def main() -> None:
    started = time.perf_counter()
    recipe = Recipe(
        sparsity=0.2,
        calibration="boolq",
        seq_len=512,
        sensitivity_samples=4,
        held_out=4,
        time_budget=PRUNE_SECONDS,
    )
    quality = EvaluationRequest(texts=("boolq", "sciq"), seq_len=512, max_windows=3)
    speed = SpeedRequest(prompts=(256,), repeats=5, decode_tokens=16)
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "out/smollm2")
    if output.exists() and len(sys.argv) == 1:
        shutil.rmtree(output)  # our own default directory, from an earlier run
    models = {"dense": "smollm2", "pruned": output / "pruned", "recovered": output / "recovered"}
    with progress_observer(quiet=False) as observer:
        observer.note("prune: the bundled GGUF file is read tensor by tensor")
        pruned = prune("smollm2", recipe, models["pruned"], observer, timed=True)
        left = (LAST_RECOVERY_STEP_SECONDS - (time.perf_counter() - started)) / 60
        minutes = min(max(left, MINUTES[0]), MINUTES[1])
        # In a minute there is time for a few steps: some thousand scales learn more in them than all matrices would.
        recovery = RecoverySettings(
            mode="scales",
            calibration=("boolq",),
            minutes=minutes,
            num_samples=64,
            held_out=3,
            seq_len=512,
            batch=1,
            warmup=2,
        )
        observer.note(f"recover: the pruned model learns from the dense one for {60 * minutes:.0f} seconds")
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
