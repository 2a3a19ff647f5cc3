"""What every phase takes for the true shapes of published models, and how that grows with the number of parameters.

    python benchmarks/memory/table.py [-o benchmarks/memory/planned.json]

The bytes are the planner's, from headers of whole models (files of holes); the tests and one.py compare its bounds with
what is measured. Hidden states are in a file, one window of 2048 tokens is computed at a time, passes are in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shapes import SHAPES, Shape
from source import write_source

from structprune import Recipe
from structprune.api import RunPlan, plan
from structprune.errors import MemoryBudgetError
from structprune.memory import parse_bytes

# What a reader of the paper means by statistics, backward and solve.
PHASES = {"statistics": "statistics (mlp)", "backward": "survey: backward", "solve": "solve (mlp)"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES.values():
        for method in ("fasp", "structprune"):
            rows.append(_row(shape, method))
            print(json.dumps(rows[-1]), flush=True)
    slopes = _slopes(rows)
    print(json.dumps(slopes, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps({"rows": rows, "slopes": slopes}, indent=2) + "\n", encoding="utf-8")


def _row(shape: Shape, method: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        source = write_source(shape, shape.num_blocks, Path(work) / "source", filled=False)
        (Path(work) / "text.txt").write_text("No text is read for a plan.")
        found = _smallest_plan(source, method, Path(work) / "text.txt")
    phases = found.plan.phases
    return {
        "model": shape.name,
        "method": method,
        "parameters": found.layout.num_parameters,
        "smallest_budget_bytes": found.plan.peak_bytes,
        **{name: phases[phase] for name, phase in PHASES.items() if phase in phases},
    }


def _smallest_plan(source: Path, method: str, text: Path) -> RunPlan:
    settings: dict[str, Any] = {"method": method, "calibration": str(text), "dtype": "bfloat16", "reload_check": False}
    try:
        return plan(source, Recipe.build(**settings, memory="1MiB"))
    except MemoryBudgetError as error:
        named = parse_bytes(str(error.wanted).removeprefix("at least "))
        return plan(source, Recipe.build(**settings, memory=named))


def _slopes(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Family and method -> phase -> slope of log bytes over log parameters; 0.5 is the paper's ideal, 1.0 the whole."""
    slopes: dict[str, dict[str, float]] = {}
    for family in ("opt", "llama"):
        for method in ("fasp", "structprune"):
            chosen = [row for row in rows if row["model"].startswith(family) and row["method"] == method]
            slopes[f"{family} {method}"] = {
                name: _slope([(row["parameters"], row[name]) for row in chosen])
                for name in ("smallest_budget_bytes", *PHASES)
                if all(name in row for row in chosen)
            }
    return slopes


def _slope(points: Sequence[tuple[int, int]]) -> float:
    """By least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


if __name__ == "__main__":
    main()
