"""The mixed-integer objective of each search for units, block by block: does the penalty method beat OSSCAR's search?

Per block of SmolLM2-135M the Gram of down_proj's input on the dense model (protocol P1's windows). Every search gets
the same problem and the same number of units; its set is solved anew and priced by min over V, removed columns zero,
of sum |V x - W x|^2 as a share of sum |W x|^2.

    python benchmarks/decisions.py [--data DIR] [--sparsities 0.3 0.5] [--num-samples 48] [--output FILE]

Shape suffixes: N windows, S positions, U units.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from global_reference import calibration_windows, grams_of
from rich.console import Console
from rich.table import Table

from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.loading import load_model
from structprune.scores import SCORES, SELECTORS
from structprune.scores.selection import decision_objective, keep_best
from structprune.types import LayerProblem, Moments

RANKED = ("l2", "wanda")
SEARCHES = ("penalty", "greedy", "greedy-swap")
DAMPING = 1e-2


def objectives(problem: LayerProblem, num_keep: int) -> dict[str, float]:
    """Name of the ranking or search -> its objective."""
    kept = {name: keep_best(SCORES.get(name).score(problem), num_keep) for name in RANKED}
    kept |= {name: SELECTORS.get(name).keep(problem, num_keep) for name in SEARCHES}
    return {name: decision_objective(problem, keep_U) for name, keep_U in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("STRUCTPRUNE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--output", type=Path, default=Path("out/decisions.json"))
    arguments = parser.parse_args()
    reader = open_model("smollm2")
    ids_NS = calibration_windows(reader.directory, arguments.data, arguments.num_samples)
    model = load_model(reader, torch.device("cpu"), torch.float32).requires_grad_(False)
    grams = grams_of(model, ids_NS)
    rows: list[dict[str, float]] = []
    for sparsity in arguments.sparsities:
        for index, (layer, gram_II) in enumerate(zip(model.model.layers, grams, strict=True)):
            weight_OI = layer.mlp.down_proj.weight
            num_units = weight_OI.shape[1]
            problem = LayerProblem(
                weight_OI=weight_OI,
                fit=Moments(gram_II=gram_II, num_tokens=ids_NS.numel()),
                width=1,
                damping=DAMPING,
                producer_norms_MU=torch.ones(1, num_units),
            )
            found = objectives(problem, round((1 - sparsity) * num_units))
            rows.append({"sparsity": sparsity, "block": index, **found})
    table = Table("sparsity", *RANKED, *SEARCHES, "penalty at most greedy", "penalty at most greedy-swap")
    for sparsity in arguments.sparsities:
        blocks = [row for row in rows if row["sparsity"] == sparsity]
        means = [sum(row[name] for row in blocks) / len(blocks) for name in (*RANKED, *SEARCHES)]
        wins = [sum(row["penalty"] <= row[name] for row in blocks) for name in ("greedy", "greedy-swap")]
        table.add_row(f"{sparsity:.0%}", *(f"{m:.5f}" for m in means), *(f"{win}/{len(blocks)}" for win in wins))
    Console().print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
