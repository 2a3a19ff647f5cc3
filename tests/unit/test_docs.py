"""What the documentation names exists: recipes load, links lead somewhere, README commands are commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from structprune.cli import app
from structprune.methods import METHODS
from structprune.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipe_is_usable(path: Path) -> None:
    assert METHODS.get(Recipe.from_yaml(path).method)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_commands_exist() -> None:
    verbs = {command.name for command in app.registered_commands}
    used = set(re.findall(r"^structprune (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert used
    assert used <= verbs


def test_every_method_has_a_row() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert f"`{name}`" in page
