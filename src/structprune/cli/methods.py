"""`structprune methods`: the methods with their papers, and the searches over widths with theirs."""

from __future__ import annotations

import json
from dataclasses import asdict

from structprune.cli.flags import JsonFlag


def methods(as_json: JsonFlag = False) -> None:
    """List the methods, their papers, and whether each is the published formula; then the searches over widths.

    As JSON the methods alone.
    """
    from structprune.allocation.proposers import SEARCHES
    from structprune.cli.tables import Column, print_table
    from structprune.methods import METHODS

    entries = [METHODS.get(name) for name in METHODS]
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    columns = [Column(name=name) for name in ("method", "what it does", "paper", "basis")]
    rows = [(entry.name, entry.summary, f"{entry.title}\n{entry.paper}", entry.provenance) for entry in entries]
    print_table("structprune methods", columns, rows)
    searches = {name: SEARCHES.get(name) for name in SEARCHES}
    print_table(
        "searches over widths (--search)",
        [Column(name=name) for name in ("search", "what it does", "paper", "basis")],
        [(name, entry.title, entry.paper, entry.provenance) for name, entry in searches.items()],
    )
