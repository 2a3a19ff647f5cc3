"""Every call of the package that may run code of a checkpoint says that it does not."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import structprune

PACKAGE = Path(structprune.__file__).parent
LOADERS = ("from_pretrained", "from_config")
# The only loads that may run a file of the directory: the check of an output, behind `check_runs_ours_only`.
TRUSTING = {("evaluation/reload.py", "own")}
SOURCES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def loads(path: Path) -> list[tuple[int, str | None]]:
    """(line, what `trust_remote_code` is; None where it is left open) of every load in a file."""
    text = path.read_text(encoding="utf-8")
    if not any(name in text for name in LOADERS):
        return []
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS]
    trust = [{word.arg: ast.unparse(word.value) for word in node.keywords} for node in named]
    return [(node.lineno, words.get("trust_remote_code")) for node, words in zip(named, trust, strict=True)]


def test_no_load_leaves_it_open() -> None:
    for path in SOURCES:
        name = path.relative_to(PACKAGE).as_posix()
        for line, trust in loads(path):
            assert trust == "False" or (name, trust) in TRUSTING, f"{name}:{line}: trust_remote_code={trust}"


def test_the_guard_sees_the_loads() -> None:
    """Those that there are; a reader of another name would need this test to know it."""
    found = {path.relative_to(PACKAGE).as_posix(): loads(path) for path in SOURCES}
    for name in ("stock/loading", "stock/model", "sources/tokenizer"):
        assert found[f"architectures/{name}.py"], name
    assert {trust for _, trust in found["evaluation/reload.py"]} == {"own", "False"}
