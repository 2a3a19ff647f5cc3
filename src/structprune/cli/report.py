"""`structprune report`: the page of a finished run or comparison, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.command import many_values

ReportCommand = many_values("--with")


def report(
    run: Annotated[Path, typer.Argument(help="Output of `prune`, or directory of `compare`.")],
    measured: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Files of `eval --json` or `bench --json`, for the table before and after."),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Draw PNG files too (needs matplotlib).")] = False,
) -> None:
    """Rebuild the HTML page of RUN from its JSON: one file, no network, no script."""
    from structprune.report.rebuild import rebuild

    for path in rebuild(run, measured or [], png=png):
        typer.echo(str(path))
