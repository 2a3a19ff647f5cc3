"""Help texts: what each says, where, and that no line breaks a word."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from structprune.cli import app, command, main
from structprune.recipe import RECIPES, Flag, Group, Recipe, all_fields
from structprune.recipe.training import RecoverySettings

VERBS = sorted(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
KINDS = (*(RECIPES.get(pipeline) for pipeline in RECIPES), RecoverySettings)
FIELDS = [(kind, name) for kind in KINDS for name in kind.model_fields]


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_breaks_no_word_at_80_columns(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MAX_WIDTH", 10_000)
    monkeypatch.setenv("COLUMNS", "10000")
    words = set(help_of(verb, capsys).split())
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(verb, capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert set(text.split()) == words


def test_prune_help_has_five_groups_and_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("prune", capsys)
    headings = re.findall(r"^(\S.*):$", text, flags=re.MULTILINE)
    assert headings == ["Arguments", "Options", *Group, "Examples"]
    sections = dict(zip(headings, re.split(r"^\S.*:$", text, flags=re.MULTILINE)[1:], strict=True))
    for name, field in all_fields().items():
        flag = next(entry for entry in field.metadata if isinstance(entry, Flag))
        assert re.search(rf"^  --{name.replace('_', '-')}\b", sections[flag.group], flags=re.MULTILINE), name
    examples = sections["Examples"].strip().splitlines()
    assert len(examples) == 3
    assert all(line.strip().startswith("structprune prune ") for line in examples)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_field_is_described_for_the_command_line(kind: type[BaseModel], name: str) -> None:
    field = kind.model_fields[name]
    flag = next(entry for entry in field.metadata if isinstance(entry, Flag))
    assert field.description
    assert flag.unset or field.default not in (None, ()), "`unset` says what stands for a default of None"
    # Where only one of them has a meaning, the method says so.
    for choice in choices(field) if name != "scope" else [field.default]:
        assert choice in field.description


def choices(field: FieldInfo) -> list[str]:
    """Names that a field takes and no others, from its type."""
    parts: list[Any] = [part for part in get_args(field.annotation) if part is not type(None)]
    names = [name for part in parts for name in (get_args(part) or [part])]
    return [name for name in names if isinstance(name, str)]


def test_the_default_stands_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of("prune", capsys).split())
    assert "--num-samples <int> Calibration windows. [default: as many as --time-budget allows, at most 128]" in text
    assert f"--seq-len <int> Tokens per window. [default: {Recipe().seq_len}]" in text
    assert "[default: 80% of what is free]" in text
