"""What `prune` and `resume` do and print where several shares were asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from structprune.cli.interrupt import run_cells
from structprune.cli.tables import Column, print_table
from structprune.comparison.shares import prune_shares, resume_shares
from structprune.memory import format_bytes
from structprune.recipe import Recipe
from structprune.results.report import PruneReport

_COLUMNS = ("share", "removed", "parameters", "disk", "predicted loss", "perplexity", "seconds")


def run_shares(model: str, recipes: Mapping[str, Recipe], output: Path, *, quiet: bool) -> dict[str, PruneReport]:
    """Prune to every share; an interrupt ends the program and says how to go on."""
    return run_cells(lambda observer: prune_shares(model, recipes, output, observer), output, quiet=quiet)


def resume_run_of_shares(output: Path, *, quiet: bool) -> dict[str, PruneReport]:
    """Go on with several shares; an interrupt ends the program and says how to go on."""
    return run_cells(lambda observer: resume_shares(output, observer), output, quiet=quiet)


def print_shares(reports: Mapping[str, PruneReport], *, as_json: bool) -> None:
    """Print a row for each share, or all reports as JSON."""
    if as_json:
        print(json.dumps({name: report.to_dict() for name, report in reports.items()}, indent=2))
        return
    first = next(iter(reports.values()))
    measured = first.calibration if first.held_out is None else first.held_out
    where = "in-sample" if first.held_out is None else "held-out windows"
    print_table(
        f"{first.method}: {first.source}, perplexity of {where} {measured.dense_perplexity:.2f} before",
        [Column(name=name, figures=True) for name in _COLUMNS],
        [_row(name, report) for name, report in reports.items()],
    )


def _row(name: str, report: PruneReport) -> list[str]:
    measured = report.calibration if report.held_out is None else report.held_out
    # Where single weights went these are the zeros, and the parameters that are none.
    zeros = report.zeros
    return [
        name,
        f"{report.size.removed_share_of_scope if zeros is None else zeros.share:.2%}",
        f"{report.size.parameters_after if zeros is None else zeros.nonzero_parameters:,}",
        format_bytes(report.size.bytes_after),
        "" if report.predicted_loss is None else f"{report.predicted_loss:.4f}",
        f"{measured.pruned_perplexity:.2f}",
        f"{report.wall_seconds:.0f}",
    ]
