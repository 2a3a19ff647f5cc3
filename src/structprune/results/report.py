"""The report of one pruning run as a person meets it: the facts of schema.py, shown in a terminal or a notebook."""

from __future__ import annotations

from rich.table import Table

from structprune.results.schema import PruneFacts
from structprune.results.summary import html_table, rich_table, summary_rows


class PruneReport(PruneFacts):
    """What `structprune.prune` returns and `pruning_report.json` holds."""

    def __repr__(self) -> str:
        size = self.size
        return (
            f"PruneReport({self.method!r}, {self.source!r} -> {self.output!r}, {size.parameters_before:,} -> "
            f"{size.parameters_after:,} parameters, {len(self.blocks)} block entries)"
        )

    __str__ = __repr__

    def __rich__(self) -> Table:
        return rich_table(self.title, summary_rows(self))

    def _repr_html_(self) -> str:
        """Render the summary for notebooks."""
        return html_table(self.title, summary_rows(self))

    @property
    def title(self) -> str:
        """What was done, to what, and where the result is."""
        what = "tokens alone" if self.recipe.scope == "vocabulary" else self.method
        return f"{what}: {self.source} -> {self.output}"
