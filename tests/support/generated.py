"""Tables in docs that a test makes: written anew on demand, else held against what is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def check_table(page: Path, start: str, end: str, made: Sequence[str]) -> None:
    """Hold the lines between two marks against those that were made; STRUCTPRUNE_REWRITE=1 writes them instead."""
    text = page.read_text(encoding="utf-8")
    before, found_start, rest = text.partition(start)
    table, found_end, after = rest.partition(end)
    assert found_start
    assert found_end
    if os.environ.get("STRUCTPRUNE_REWRITE") == "1":
        page.write_text(f"{before}{start}\n\n{chr(10).join(made)}\n\n{end}{after}", encoding="utf-8")
        return
    assert table.strip() == "\n".join(made), f"docs/{page.name} is not what was found; see the head of this test's file"
