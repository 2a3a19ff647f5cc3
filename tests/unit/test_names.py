"""No code asks for the name of an entry: entries say of themselves what they read, change and hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from structprune.allocation import ALLOCATORS
from structprune.allocation.proposers import SEARCHES
from structprune.architectures import FAMILIES
from structprune.calibration import SOURCES
from structprune.engine.pipelines.depth_choice import BLOCK_SCORES
from structprune.engine.pipelines.registry import PIPELINES
from structprune.exporters import EXPORTERS
from structprune.methods import METHODS
from structprune.registry import Registry
from structprune.scores import SCORES, SELECTORS
from structprune.solvers import SOLVERS
from structprune.solvers.elements import PRUNERS, UPDATES
from structprune.training import MODES

ROOT = Path(__file__).parents[2] / "src" / "structprune"
HOMES: dict[str, tuple[Registry[Any], ...]] = {
    "methods/": (METHODS,),
    "scores/": (SCORES, SELECTORS),
    "solvers/": (SOLVERS, PRUNERS, UPDATES),
    "allocation/": (ALLOCATORS, SEARCHES),
    "calibration/sources/": (SOURCES,),
    "exporters/": (EXPORTERS,),
    # A class that several model types share tells them apart.
    "architectures/families/": (FAMILIES,),
    "engine/pipelines/registry.py": (PIPELINES,),
    "engine/pipelines/depth_choice.py": (BLOCK_SCORES,),
    "training/": (MODES,),
}
"""Where the entries of a registry stand: only there may their names be compared."""


def compared(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every constant text that something is compared with, also in a `match`."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            values = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            values = [node.value]
        for value in values:
            items = value.elts if isinstance(value, ast.Tuple | ast.Set | ast.List) else [value]
            for item in items:
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.lineno, item.value


def found_in(source: str, path: str) -> list[str]:
    """Comparisons with a name that is at home in another place."""
    foreign = {
        name for home, registries in HOMES.items() if not path.startswith(home) for r in registries for name in r
    }
    own = {name for home, registries in HOMES.items() if path.startswith(home) for r in registries for name in r}
    return [f"{path}:{line} {text!r}" for line, text in compared(ast.parse(source)) if text in foreign - own]


def test_no_name_is_compared() -> None:
    found = [
        line
        for path in sorted(ROOT.rglob("*.py"))
        for line in found_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "ask the entry instead of comparing its name:\n" + "\n".join(found)


def test_the_count_finds_what_it_looks_for() -> None:
    assert found_in("x == 'closed-form'", "engine/a.py") == ["engine/a.py:1 'closed-form'"]
    assert found_in("x not in (None, 'bias')", "engine/a.py") == ["engine/a.py:1 'bias'"]
    assert found_in("match x:\n    case 'taylor-mix': pass", "engine/a.py") == ["engine/a.py:2 'taylor-mix'"]
    assert found_in("x == 'llama'", "architectures/families/llama.py") == []
    assert found_in("x = 'closed-form'", "engine/a.py") == []
