"""`structprune push`: a finished output to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.flags import JsonFlag, QuietFlag


def push(
    output: Annotated[Path, typer.Argument(help="Output of `prune`.")],
    repo_id: Annotated[str, typer.Argument(help="Model repository, e.g. you/smaller-model; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only you see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.  [default: main]")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Upload OUTPUT, with its model card, to the hub."""
    from huggingface_hub.utils import disable_progress_bars

    from structprune.api import push as run_push
    from structprune.cli.interrupt import interruptible
    from structprune.cli.progress import progress_observer

    if quiet:
        disable_progress_bars()
    try:
        with interruptible(), progress_observer(quiet=quiet) as observer:
            address = run_push(output, repo_id, private=private, revision=revision, observer=observer)
    except KeyboardInterrupt:
        typer.echo("structprune: interrupted; the repository has no new commit", err=True)
        raise typer.Exit(130) from None
    print(json.dumps({"repo_id": repo_id, "commit": address}) if as_json else address)
