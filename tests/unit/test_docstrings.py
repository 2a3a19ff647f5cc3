"""Docstrings and comments of the package: rooms say what they hold, first lines are sentences, everything is ASCII."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.syntax import statements

ROOT = Path(__file__).parents[2] / "src" / "structprune"
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = sorted(path for path in FILES if path.name == "__init__.py")

OPENINGS = {"Of", "As", "That", "Those", "By", "For", "From", "In", "Per", "On", "With", "Without", "Over", "It", "Its"}
"""First words of fragments: what such a line speaks of stands somewhere else."""

HERE = Path(__file__).parent
VERBS = set((HERE / "docstrings_verbs.txt").read_text(encoding="ascii").split())
"""Imperatives that a function's docstring may begin with. A verb that is not there is put into the file."""


def first_lines(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, first line of the docstring, whether it is that of a function that does something)."""
    for node in statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text:
                line = 1 if isinstance(node, ast.Module) else node.lineno
                yield line, text.splitlines()[0], isinstance(node, ast.FunctionDef) and not is_value(node)
        if isinstance(node, ast.ClassDef | ast.Module):
            for field, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                    value = after.value
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield after.lineno, value.value.strip().splitlines()[0], False


def is_value(function: ast.FunctionDef) -> bool:
    """Whether the function is read like a field."""
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def opens_as_fragment(line: str) -> bool:
    return re.split(r"\W", line, maxsplit=1)[0] in OPENINGS


def is_imperative(line: str) -> bool:
    """Whether a function's first line may stand: an imperative, or `Whether ...` of what answers yes or no."""
    words = re.match(r"(?:\([a-z]\) )?([A-Z][\w-]*)", line)
    return words is not None and (words[1] in VERBS or words[1] == "Whether")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def to_mend(path: Path) -> Iterator[tuple[str, str]]:
    """(place, first line) of every docstring of the file that breaks a rule."""
    for number, line, acts in first_lines(ast.parse(path.read_text(encoding="utf-8"))):
        if opens_as_fragment(line) or (acts and not is_imperative(line)):
            yield f"{relative(path)}:{number}", line


def test_first_lines() -> None:
    """An imperative sentence for a function, a noun phrase for a class or a field; never a fragment."""
    broken = [f"{place}: {line}" for path in FILES for place, line in to_mend(path)]
    assert not broken, "first lines to mend:\n" + "\n".join(broken)


def test_the_checks_find_what_they_look_for() -> None:
    """A check of text that finds nothing proves nothing, unless it is seen to find something."""
    assert opens_as_fragment("Of one rank over the others.")
    assert opens_as_fragment("As it was written.")
    assert opens_as_fragment("That of a finished run.")
    assert not opens_as_fragment("Offset of the first unit.")
    assert not is_imperative("Bytes of the files that a tokenizer is read from.")
    assert not is_imperative("Returns the bytes.")
    assert is_imperative("Return the bytes.")
    assert is_imperative("Whether the checkpoint has a head.")


def test_source_is_ascii() -> None:
    """Comments and docstrings need no other letters; a name in another script is a mistake or a trick."""
    for path in FILES:
        strange = [n for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if not line.isascii()]
        assert not strange, f"{relative(path)} has letters that are not ASCII in lines {strange}"


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: relative(path.parent))
def test_room_says_what_it_holds(path: Path) -> None:
    """What lives here, and which files to read first; these files are there."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    what, _, first = text.partition("Read first: ")
    assert len(what.split()) >= 5, f"{relative(path)}: say what lives in this package"
    named = re.findall(r"`([\w/]+\.py)`", first)
    assert named, f"{relative(path)}: say which files to read first, as 'Read first: `file.py`'"
    for name in named:
        assert (path.parent / name).is_file(), f"{relative(path)} names {name}, which is not there"
