"""`structprune resume`: goes on with a run that was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.flags import QuietFlag, RankTimeoutFlag, ReportJsonFlag
from structprune.ranks import RANK_TIMEOUT_S, launched


def resume(
    run: Annotated[Path, typer.Argument(help="The -o of the run that was cut.")],
    as_json: ReportJsonFlag = False,
    quiet: QuietFlag = False,
    rank_timeout: RankTimeoutFlag = RANK_TIMEOUT_S,
) -> None:
    """Go on with a run of `prune` or `recover` that was interrupted, killed or out of disk; the result is the same."""
    # Only now: these load torch and transformers, and a wrong flag should not wait for that.
    from structprune.api import resume as resume_run
    from structprune.cli.interrupt import run_or_say_how_to_resume
    from structprune.cli.recover import recovery_table
    from structprune.cli.render import report_table
    from structprune.cli.shares import print_shares, resume_run_of_shares
    from structprune.comparison.shares import find_shares
    from structprune.results.report import PruneReport

    if find_shares(run) is not None:
        print_shares(resume_run_of_shares(run, quiet=quiet), as_json=as_json)
        return
    report = run_or_say_how_to_resume(
        lambda observer: resume_run(run, observer, rank_timeout=rank_timeout), run, quiet=quiet
    )
    if launched()[0] > 0:
        return
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif isinstance(report, PruneReport):
        report_table(report)
    else:
        recovery_table(report)
