"""How much of the lost log perplexity each mode of `structprune recover` gives back in the same time, on SmolLM2-135M.

    python benchmarks/recover/run.py -o out/recover [--sparsities 0.3 0.5] [--modes stream blocks lora] [--minutes 2 4]
                                     [options of structprune recover]

Students: `structprune` with the settings of protocol P1 (benchmarks/p1.py), made once, or put there as
OUT/student-SPARSITY. Each number of minutes is a run of its own, whose learning rate falls over them. Text to learn
from: all windows of the training text, in a seeded order. Tests: those of P1, the first 16 windows of 1024 tokens of
WikiText-2 validation and of the interpreter's reference manual. Share of the loss given back:
(log before - log after) / (log before - log dense).
Mode lora needs `peft`. Run again, it goes on; the result is OUT/recover.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from structprune.files import write_json

ROOT = Path(__file__).parents[2]
WINDOWS = ["--seq-len", "1024"]


def structprune(*arguments: object) -> None:
    """Run the command line in a process of its own; raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "structprune", *map(str, arguments)], check=True)


def perplexities(model: object, texts: dict[str, Path]) -> dict[str, float]:
    """Of the first 16 windows of each text."""
    command = [sys.executable, "-m", "structprune", "eval", str(model), *WINDOWS, "--max-windows", "16", "--json"]
    command += ["--text", *map(str, texts.values())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)["texts"]
    return {name: row["perplexity"] for name, row in zip(texts, found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--modes", nargs="+", default=["stream", "blocks", "lora"])
    parser.add_argument("--minutes", nargs="+", type=float, default=[2, 4])
    given, others = parser.parse_known_args()
    output: Path = given.output
    output.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", ROOT.parent / "shared" / "data")) / "wikitext2"
    manual = output / "manual.txt"
    manual.write_text("\n\n".join(text for _, text in sorted(topics.items())), encoding="utf-8")
    texts = {"wikitext2": data / "valid.raw.txt", "manual": manual}
    train = ["--calibration", data / "train-1mb.raw.txt"]
    path = output / "recover.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def measure(key: str, model: object, **others: object) -> None:
        result[key] = {**perplexities(model, texts), **others}
        write_json(path, result)

    if "dense" not in result:
        measure("dense", "smollm2")
    for sparsity in given.sparsities:
        student = output / f"student-{sparsity:g}"
        if not student.exists():
            settings = ["--recipe", ROOT / "recipes" / "smollm2-p1.yaml", "--method", "structprune"]
            structprune("prune", "smollm2", "-o", student, *settings, *train, "--sparsity", sparsity)
        if f"{sparsity:g}" not in result:
            measure(f"{sparsity:g}", student)
        for mode, minutes in itertools.product(given.modes, given.minutes):
            key, recovered = f"{sparsity:g} {mode} {minutes:g}", output / f"{mode}-{sparsity:g}-{minutes:g}"
            if key in result:
                continue
            started = time.perf_counter()
            if not recovered.exists():
                limit = ["--minutes", minutes, "--mode", mode]
                structprune(
                    "recover", student, "--teacher", "smollm2", "-o", recovered, *train, *limit, *WINDOWS, *others
                )
            report = json.loads((recovered / "recovery_report.json").read_text(encoding="utf-8"))
            wall = time.perf_counter() - started
            measure(key, recovered, tokens=report["tokens"], train_seconds=report["train_seconds"], wall_seconds=wall)
    for key, row in result.items():
        shares = ""
        if " " in key:
            before, dense = result[key.split()[0]], result["dense"]
            lost = {n: math.log(before[n] / row[n]) / math.log(before[n] / dense[n]) for n in texts}
            shares = "  ".join(f"{name} {share:.1%} of the loss back" for name, share in lost.items())
        print(f"{key:12}  {row['wikitext2']:.3f}  {row['manual']:.3f}  {row.get('tokens', '')}  {shares}")


if __name__ == "__main__":
    main()
