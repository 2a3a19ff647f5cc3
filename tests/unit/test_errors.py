"""Errors: one readable sentence, and the same parts as data."""

from __future__ import annotations

import json

import pytest

from structprune import errors
from structprune.errors import StructPruneError

KINDS = [
    errors.InputError,
    errors.CheckpointError,
    errors.UnsupportedError,
    errors.MemoryBudgetError,
    errors.NumericalError,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_can_be_caught_as_one(kind: type[StructPruneError]) -> None:
    with pytest.raises(StructPruneError, match=r"^it broke\.$"):
        raise kind("it broke")


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "it broke."),
        ({"where": "block 7"}, "block 7: it broke."),
        ({"got": 5, "wanted": 4}, "it broke; got 5, wanted 4."),
        ({"got": 0}, "it broke; got 0."),
        ({"wanted": "a text"}, "it broke; wanted a text."),
        ({"do": "raise --memory"}, "it broke. Raise --memory."),
        ({"do": "did you mean x?"}, "it broke. Did you mean x?"),
        (
            {"where": "block 7", "got": "4.0 GiB", "wanted": "5.1 GiB", "do": "raise --memory"},
            "block 7: it broke; got 4.0 GiB, wanted 5.1 GiB. Raise --memory.",
        ),
    ],
)
def test_message(parts: dict[str, object], text: str) -> None:
    assert str(StructPruneError("it broke", **parts)) == text  # pyright: ignore[reportArgumentType]


def test_the_end_mark_is_not_doubled() -> None:
    assert str(StructPruneError("it broke!")) == "it broke!"
    assert str(StructPruneError("it broke", do="try again.")) == "it broke. Try again."


@pytest.mark.parametrize("kind", KINDS)
def test_parts_as_data(kind: type[StructPruneError]) -> None:
    error = kind("it broke", where="here", got=(2, 3), wanted=None, do="stop")
    data = json.loads(json.dumps(error.to_dict()))
    assert data == {
        "error": kind.__name__,
        "what": "it broke",
        "where": "here",
        "got": "(2, 3)",
        "wanted": None,
        "do": "stop",
    }
