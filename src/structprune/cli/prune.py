"""`structprune prune`: recipe from flags and file, then the run, then a table or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from structprune.cli.flags import ModelArgument, QuietFlag, RankTimeoutFlag, ReportJsonFlag
from structprune.cli.settings import takes_recipes
from structprune.ranks import RANK_TIMEOUT_S, launched

EXAMPLES = """\
Examples:
  structprune prune Qwen/Qwen2.5-0.5B -o smaller --sparsity 30%
  structprune prune smollm2 -o fewer-blocks --method depth --sparsity 0.2
  structprune prune my-model -o small --recipe recipe.yaml --memory 8GiB
"""


@takes_recipes
def prune(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    # Name -> Recipe, from the options that `takes_recipes` adds; the name of a single one is empty.
    settings: Any,
    as_json: ReportJsonFlag = False,
    quiet: QuietFlag = False,
    rank_timeout: RankTimeoutFlag = RANK_TIMEOUT_S,
) -> None:
    """Prune MODEL into a new, physically smaller checkpoint.

    With several shares (--sparsity 0.1,0.2) there is one for each, in a folder of OUTPUT, and the dense model is
    measured once.
    """
    # Only now: these load torch and transformers, and a wrong flag should not wait for that.
    from structprune.api import prune as run_prune
    from structprune.cli.interrupt import run_or_say_how_to_resume
    from structprune.cli.render import report_table
    from structprune.cli.shares import print_shares, run_shares

    if "" not in settings:
        print_shares(run_shares(model, settings, output, quiet=quiet), as_json=as_json)
        return
    recipe = settings[""]
    report = run_or_say_how_to_resume(
        lambda observer: run_prune(model, recipe, output, observer, rank_timeout=rank_timeout, timed=not quiet),
        output,
        quiet=quiet,
    )
    if launched()[0] > 0:
        return
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        report_table(report)
