"""One model in a process of its own: prune it, and print what was planned and what each phase took.

python benchmarks/memory/one.py llama-2-7b --method fasp --blocks 1 --into benchmarks/memory/measured.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
from shapes import SHAPES
from source import write_source

from structprune import Recipe, prune
from structprune.files import write_json
from structprune.memory import release_free_memory


class ResidentPeak:
    """Highest resident memory of this process, libraries and all, sampled every 20 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.bytes


def words(path: Path) -> Path:
    """Invented words, seeded: enough for any number of windows that is asked for here."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(500)]
    path.write_text("\n".join(" ".join(rng.choices(vocabulary, k=12)) + "." for _ in range(4000)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--method", default="fasp")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--memory", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", default=None, help="directory for the checkpoint and the output")
    parser.add_argument("--into", type=Path, help="JSON list of results to put this one into")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        source = write_source(SHAPES[options.model], options.blocks, Path(work) / "source")
        recipe = Recipe.build(
            method=options.method,
            sparsity=options.sparsity,
            calibration=str(words(Path(work) / "words.txt")),
            num_samples=options.windows,
            seq_len=options.seq_len,
            dtype=options.dtype,
            memory=options.memory,
            reload_check=False,
        )
        release_free_memory()
        resident = ResidentPeak()
        report = prune(source, recipe, Path(work) / "out")
        peak_rss_bytes = resident.stop()
    block = report.blocks[0]
    result = {
        "model": options.model,
        "method": options.method,
        "blocks": options.blocks,
        "tokens": options.windows * options.seq_len,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "budget_bytes": report.memory.budget_bytes,
        "planned_peak_bytes": report.memory.planned_peak_bytes,
        "measured_peak_bytes": report.memory.measured_peak_bytes,
        "planned_phases": report.memory.phases,
        "measured_phases": report.memory.measured_phases,
        "peak_rss_bytes": peak_rss_bytes,
        "kept_units": block.kept_units,
        "error": block.error,
        "seconds": report.wall_seconds,
    }
    print(json.dumps(result))
    if options.into is not None:
        _keep(result, options.into)


def _keep(result: dict[str, Any], path: Path) -> None:
    """Put the result among those in `path`, for that of an earlier run of this model and method."""
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    runs = [run for run in runs if (run["model"], run["method"]) != (result["model"], result["method"])]
    write_json(path, [*runs, result])


if __name__ == "__main__":
    main()
