"""What a refused run says of the one that was begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from structprune.engine.run.identity import check_same
from structprune.errors import InputError

PARTS = {"recipe": "with other settings"}


@pytest.mark.parametrize(
    ("before", "now", "got", "wanted"),
    [
        ({"seed": 1, "damping": None}, {"seed": 2, "damping": None}, "seed 2", "seed 1"),
        # Of a version that knew less.
        ({"seed": 1}, {"seed": 1, "damping": None}, "damping None", "none"),
        ({"seed": 1, "damping": None}, {"seed": 1}, "none", "damping None"),
    ],
)
def test_the_difference_is_shown(before: dict[str, Any], now: dict[str, Any], got: str, wanted: str) -> None:
    with pytest.raises(InputError, match="started with other settings") as caught:
        check_same({"recipe": before}, {"recipe": now}, Path("out.partial"), PARTS)
    assert (caught.value.got, caught.value.wanted) == (got, wanted)


def test_the_same_is_no_error() -> None:
    check_same({"recipe": {"seed": 1}}, {"recipe": {"seed": 1}}, Path("out.partial"), PARTS)
