"""Protocol P1: prune SmolLM2-135M with several methods on the same windows and test each on the same text.

Calibration: windows of 1024 tokens drawn without replacement (seed 0) from the tokenised training text cut into
consecutive windows. Test: the first consecutive windows of 1024 tokens of the validation text. No special tokens.

    python benchmarks/p1.py --data DIR [--methods fasp wanda-sp] [--sparsities 0.3] [--num-samples 48] [--windows 16]

DIR holds wikitext2/train-1mb.raw.txt and wikitext2/valid.raw.txt (default: STRUCTPRUNE_TEST_DATA, else the data beside
the checkout). Results are appended as JSON lines to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from structprune import Recipe, prune
from structprune.api import evaluate
from structprune.cli.progress import progress_observer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--methods", nargs="+", default=["wanda-sp", "fasp", "structprune"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3])
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("out/p1.jsonl"))
    arguments = parser.parse_args()
    train = arguments.data / "wikitext2" / "train-1mb.raw.txt"
    valid = arguments.data / "wikitext2" / "valid.raw.txt"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)

    def record(row: dict[str, object]) -> None:
        print(json.dumps(row))
        with arguments.output.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    test = {"seq_len": 1024, "max_windows": arguments.windows}
    record({"method": "dense", "sparsity": 0.0, **evaluate("smollm2", valid, **test).to_dict(), "text": valid.name})
    for sparsity in arguments.sparsities:
        for method in arguments.methods:
            recipe = Recipe(
                method=method,
                sparsity=sparsity,
                calibration=str(train),
                num_samples=arguments.num_samples,
                seq_len=1024,
                multiple_of=1,
            )
            with tempfile.TemporaryDirectory() as folder, progress_observer(quiet=False) as observer:
                started = time.perf_counter()
                report = prune("smollm2", recipe, Path(folder) / "out", observer)
                seconds = time.perf_counter() - started
                result = evaluate(Path(folder) / "out", valid, **test)
            row = {"method": method, "sparsity": sparsity, "removed": report.size.removed_share_of_scope}
            record(
                {
                    **row,
                    **result.to_dict(),
                    "text": valid.name,
                    "calibration": train.name,
                    "windows": arguments.num_samples,
                    "seconds": seconds,
                    "compute_dtype": report.compute_dtype,
                    "peak_bytes": report.memory.measured_peak_bytes,
                }
            )


if __name__ == "__main__":
    main()
