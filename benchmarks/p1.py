"""Protocol P1: prune SmolLM2-135M with several methods on the same windows and test each on the same text.

Calibration: windows of 1024 tokens drawn without replacement (seed 0) from the tokenised training text cut into
consecutive windows. Test: the first consecutive windows of 1024 tokens of the validation text. No special tokens. A
second domain that no run was calibrated on: the reference manual that comes with the interpreter (pydoc_data.topics).

    python benchmarks/p1.py --data DIR [--methods fasp wanda-sp] [--sparsities 0.3] [--num-samples 48] [--windows 16]
                            [--set allocator=uniform target=local ...]

DIR holds wikitext2/train-1mb.raw.txt and wikitext2/valid.raw.txt (default: STRUCTPRUNE_TEST_DATA, else the data beside
the checkout). `--set` changes recipe fields, for ablations. Results are appended as JSON lines to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

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
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--output", type=Path, default=Path("out/p1.jsonl"))
    arguments = parser.parse_args()
    train = arguments.data / "wikitext2" / "train-1mb.raw.txt"
    valid = arguments.data / "wikitext2" / "valid.raw.txt"
    changes = {name: yaml.safe_load(value) for name, value in (entry.split("=", 1) for entry in arguments.set)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)

    def record(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        with arguments.output.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        manual = Path(folder) / "python-reference.txt"
        manual.write_text("\n\n".join(text for _, text in sorted(topics.items())), encoding="utf-8")

        def perplexities(model: str | Path) -> dict[str, float]:
            test = {"seq_len": 1024, "max_windows": arguments.windows}
            return {f"perplexity {path.name}": evaluate(model, path, **test).perplexity for path in (valid, manual)}

        record({"method": "dense", "sparsity": 0.0, **perplexities("smollm2"), "windows": arguments.windows})
        for sparsity in arguments.sparsities:
            for method in arguments.methods:
                settings = {
                    "method": method,
                    "sparsity": sparsity,
                    "calibration": str(train),
                    "num_samples": arguments.num_samples,
                    "seq_len": 1024,
                    "multiple_of": 1,
                    **changes,
                }
                output = Path(folder) / "out"
                with progress_observer(quiet=False) as observer:
                    started = time.perf_counter()
                    report = prune("smollm2", Recipe.build(**settings), output, observer)
                    seconds = time.perf_counter() - started
                row = {"method": method, "sparsity": sparsity, "changes": changes, **perplexities(output)}
                record(
                    {
                        **row,
                        "windows": arguments.windows,
                        "removed": report.size.removed_share_of_scope,
                        "calibration": train.name,
                        "calibration_windows": report.calibration.num_windows,
                        "seconds": seconds,
                        "compute_dtype": report.compute_dtype,
                        "planned_bytes": report.memory.planned_peak_bytes,
                        "peak_bytes": report.memory.measured_peak_bytes,
                        "kept": {
                            kind: [b.kept_units for b in report.blocks if b.kind == kind]
                            for kind in dict.fromkeys(b.kind for b in report.blocks)
                        },
                    }
                )
                shutil.rmtree(output)


if __name__ == "__main__":
    main()
