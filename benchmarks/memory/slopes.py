"""How the bytes of each phase grow with the number of parameters N, planned and measured, and the table of the docs.

    python benchmarks/memory/slopes.py [-o benchmarks/memory/slopes.json]

The slope of log bytes over log N is fitted by least squares. N is that of the whole model, also where the run had only
a few of its blocks. 0.5 is the idealisation of the paper, whose one block is to grow as the square root of N; 1.0 is
what a method takes that holds the whole model.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# What a reader of the paper means by statistics, backward and solve.
PHASES = {"statistics": "statistics (mlp)", "backward": "sensitivity: backward", "solve": "solve (mlp)"}
FAMILIES = ("opt", "llama")
METHODS = ("fasp", "structprune")
# A line through fewer is no finding.
_FEWEST = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--planned", type=Path, default=HERE / "planned.json")
    parser.add_argument("--measured", type=Path, default=HERE / "measured.json")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    planned = json.loads(options.planned.read_text(encoding="utf-8"))
    runs = json.loads(options.measured.read_text(encoding="utf-8"))
    numbers = {row["model"]: row["parameters"] for row in planned}
    print(table(runs, numbers))
    found = {"planned": slopes(planned), "measured": slopes([_measured_row(run, numbers) for run in runs])}
    for source, groups in found.items():
        print(f"\n{source}: slope of log bytes over log N (0.5: the paper's idealisation, 1.0: the whole model)")
        for group, phases in groups.items():
            print(f"  {group:18}", "  ".join(f"{phase} {value:.2f} (0.5, 1.0)" for phase, value in phases.items()))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def table(runs: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> str:
    """Markdown, one row per run."""
    lines = [
        "| shape | method | N | blocks | tokens | planned | measured | planned / measured | peak RSS |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: (run["method"], numbers[run["model"]])):
        planned, measured = run["planned_peak_bytes"], run["measured_peak_bytes"]
        cells = [
            run["model"],
            f"`{run['method']}`",
            f"{numbers[run['model']] / 1e9:.2f}e9",
            str(run["blocks"]),
            str(run["tokens"]),
            f"{planned / 1e6:,.0f} MB",
            f"{measured / 1e6:,.0f} MB",
            f"{planned / measured:.2f}",
            f"{run['peak_rss_bytes'] / 1e6:,.0f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slopes(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Family and method -> phase -> slope, of phases that at least three models have."""
    found: dict[str, dict[str, float]] = {}
    for family in FAMILIES:
        for method in METHODS:
            chosen = [row for row in rows if row["model"].startswith(family) and row["method"] == method]
            fitted: dict[str, float] = {}
            for name in (*PHASES, "peak"):
                points = [(row["parameters"], row[name]) for row in chosen if name in row]
                if len(points) >= _FEWEST:
                    fitted[name] = slope(points)
            if fitted:
                found[f"{family} {method}"] = fitted
    return found


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Of log y over log x, by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def _measured_row(run: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    phases = run["measured_phases"]
    return {
        "model": run["model"],
        "method": run["method"],
        "parameters": numbers[run["model"]],
        "peak": run["measured_peak_bytes"],
        **{name: phases[phase] for name, phase in PHASES.items() if phase in phases},
    }


if __name__ == "__main__":
    main()
