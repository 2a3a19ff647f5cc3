"""One model in a process of its own: prune it, and print what was planned and what each phase took.

python benchmarks/memory/one.py llama-2-7b --method fasp --blocks 1 --into benchmarks/memory/measured.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from shapes import SHAPES
from source import write_source

from structprune import Recipe, prune
from structprune.files import write_json
from structprune.memory import release_free_memory
from structprune.solvers.elements import alps, unit


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
    parser.add_argument("--sparsity", type=float, default=None, help="0.3, or what the pattern says")
    parser.add_argument("--vocab", type=int, default=None, help="entries of the vocabulary; those of the model")
    parser.add_argument("--steps", type=int, default=None, help="of ALPS and of refits, whose memory is that of one")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other entries of the recipe")
    parser.add_argument("--memory", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", default=None, help="directory for the checkpoint and the output")
    parser.add_argument("--into", type=Path, help="JSON list of results to put this one into")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        shape = SHAPES[options.model]
        shape = replace(shape, vocab=options.vocab or shape.vocab)
        source = write_source(shape, options.blocks, Path(work) / "source")
        others: dict[str, Any] = dict(each.split("=", 1) for each in options.set)
        share = options.sparsity if options.sparsity or "pattern" in others else 0.3
        recipe = Recipe.build(
            method=options.method,
            sparsity=share,
            calibration=str(words(Path(work) / "words.txt")),
            num_samples=options.windows,
            seq_len=options.seq_len,
            dtype=options.dtype,
            memory=options.memory,
            reload_check=False,
            **others,
        )
        if options.steps is not None:
            alps.MOST_STEPS = unit.REFIT_STEPS = options.steps
        release_free_memory()
        resident = ResidentPeak()
        report = prune(source, recipe, Path(work) / "out")
        peak_rss_bytes = resident.stop()
    block = report.blocks[0]
    result = {
        "model": options.model,
        "method": " ".join([options.method, *options.set]),
        "blocks": options.blocks,
        "steps": options.steps,
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
