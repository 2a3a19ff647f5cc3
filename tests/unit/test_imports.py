"""The package's import graph, imports for type checkers included: no circle, and one place for what few should know."""

from __future__ import annotations

from pathlib import Path

import grimp
import networkx
import pytest

import structprune


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("structprune", include_external_packages=True, exclude_type_checking_imports=False)


def circles(graph: grimp.ImportGraph) -> list[set[str]]:
    """Return the groups of modules that import each other, directly or not."""
    imports = networkx.DiGraph()
    for module in graph.modules:
        imports.add_edges_from((module, imported) for imported in graph.find_modules_directly_imported_by(module))
    return [group for group in networkx.strongly_connected_components(imports) if len(group) > 1]


def test_no_import_circle(graph: grimp.ImportGraph) -> None:
    assert circles(graph) == []


def test_a_circle_would_be_found(graph: grimp.ImportGraph) -> None:
    graph = grimp.build_graph("structprune", cache_dir=None)
    graph.add_import(importer="structprune.errors", imported="structprune.api")
    (circle,) = circles(graph)
    assert {"structprune.errors", "structprune.api", "structprune.recipe"} <= circle


def test_the_engine_has_few_entries() -> None:
    engine = Path(structprune.__file__).with_name("engine")
    entries = [entry.name for entry in engine.iterdir() if entry.name not in ("__init__.py", "__pycache__")]
    assert len(entries) <= 10, entries
