"""`structprune methods`: the methods with their papers."""

from __future__ import annotations

import json
from dataclasses import asdict

from structprune.cli.flags import JsonFlag


def methods(as_json: JsonFlag = False) -> None:
    """List the methods, their papers, and whether each is the published formula."""
    from rich.console import Console
    from rich.table import Table

    from structprune.methods import METHODS

    entries = [METHODS.get(name) for name in METHODS]
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    table = Table("method", "what it does", "paper", "basis", title="structprune methods")
    for entry in entries:
        table.add_row(entry.name, entry.summary, f"{entry.title}\n{entry.paper}", entry.provenance)
    Console().print(table)
