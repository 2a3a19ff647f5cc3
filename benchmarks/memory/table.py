"""What every phase is planned to take for the true shapes of published models: `planned.json`, which slopes.py reads.

    python benchmarks/memory/table.py [-o benchmarks/memory/planned.json]

The bytes are the planner's, from headers of whole models (files of holes); the tests and one.py compare its bounds with
what is measured. Hidden states are in a file, one window of 2048 tokens is computed at a time, passes are in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from shapes import SHAPES, Shape
from slopes import METHODS, PHASES
from source import write_source

from structprune import Recipe
from structprune.api import RunPlan, plan
from structprune.errors import MemoryBudgetError
from structprune.memory import parse_bytes
from structprune.phases import by_name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES.values():
        for method in METHODS:
            rows.append(_row(shape, method))
            print(json.dumps(rows[-1]), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _row(shape: Shape, method: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        source = write_source(shape, shape.num_blocks, Path(work) / "source", filled=False)
        (Path(work) / "text.txt").write_text("No text is read for a plan.")
        found = _smallest_plan(source, method, Path(work) / "text.txt")
    phases = by_name(found.plan.phases)
    return {
        "model": shape.name,
        "method": method,
        "parameters": found.layout.num_parameters,
        "peak": found.plan.peak_bytes,
        **{name: phases[phase] for name, phase in PHASES.items() if phase in phases},
    }


def _smallest_plan(source: Path, method: str, text: Path) -> RunPlan:
    settings: dict[str, Any] = {"method": method, "calibration": str(text), "dtype": "bfloat16", "reload_check": False}
    try:
        return plan(source, Recipe.build(**settings, memory="1MiB"))
    except MemoryBudgetError as error:
        named = parse_bytes(str(error.wanted).removeprefix("at least "))
        return plan(source, Recipe.build(**settings, memory=named))


if __name__ == "__main__":
    main()
