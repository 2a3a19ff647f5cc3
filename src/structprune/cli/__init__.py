"""The command line: each command parses its arguments, calls the API and prints. Errors of the input exit with 2.

One file per command. Read first: `prune.py`; then `settings.py`, the flags of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import typer

from structprune.cli import advise as advise_verb
from structprune.cli import bench as bench_verb
from structprune.cli import compare as compare_verb
from structprune.cli import eval as eval_verb
from structprune.cli import export as export_verb
from structprune.cli import inspect as inspect_verb
from structprune.cli import methods as methods_verb
from structprune.cli import plan as plan_verb
from structprune.cli import prune as prune_verb
from structprune.cli import prune_module as prune_module_verb
from structprune.cli import push as push_verb
from structprune.cli import recover as recover_verb
from structprune.cli import report as report_verb
from structprune.cli import resume as resume_verb
from structprune.cli import vocabulary as vocabulary_verb
from structprune.cli.command import Command, Group
from structprune.cli.streams import forgiving_streams
from structprune.errors import StructPruneError
from structprune.ranks import launched, refuse_ranks

_TELLING_S = 5.0

app = typer.Typer(
    name="structprune",
    cls=Group,
    help="Structured pruning of large language models in bounded memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("prune", cls=Command, epilog=prune_verb.EXAMPLES)(prune_verb.prune)
app.command("resume", cls=Command)(resume_verb.resume)
app.command("recover", cls=Command)(recover_verb.recover)
app.command("plan", cls=Command)(plan_verb.plan)
app.command("inspect", cls=Command)(inspect_verb.inspect)
app.command("vocabulary", cls=vocabulary_verb.VocabularyCommand)(vocabulary_verb.vocabulary)
app.command("methods", cls=Command)(methods_verb.methods)
app.command("eval", cls=eval_verb.EvalCommand)(eval_verb.evaluate)
app.command("bench", cls=bench_verb.BenchCommand)(bench_verb.bench)
app.command("report", cls=report_verb.ReportCommand)(report_verb.report)
app.command("export", cls=Command)(export_verb.export)
app.command("push", cls=Command)(push_verb.push)
app.command("compare", cls=compare_verb.CompareCommand)(compare_verb.compare)
app.command("prune-module", cls=Command, epilog=prune_module_verb.EXAMPLES)(prune_module_verb.prune_module)
app.command("advise", cls=advise_verb.AdviseCommand)(advise_verb.advise)


@app.callback()
def _root(context: typer.Context) -> None:
    """Refuse several ranks for the commands that cannot share their work."""
    if context.invoked_subcommand not in ("prune", "resume"):
        refuse_ranks(f"`structprune {context.invoked_subcommand}`")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `structprune` command with `arguments`, by default those of the process, and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    code: str | int | None = None
    with forgiving_streams():
        code = _run(arguments)
    _leave(code)


def _run(arguments: list[str]) -> str | int | None:
    """Run the command and return its exit code; what went wrong is said on standard error."""
    try:
        app(args=arguments, prog_name="structprune")
    except SystemExit as error:
        return error.code
    except StructPruneError as error:
        if error.elsewhere:
            # The one that tells it is to end first: launchers interrupt the others then.
            time.sleep(_TELLING_S)
        else:
            if "--json" in arguments:
                print(json.dumps(error.to_dict()))
            print(f"structprune: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A disk, a right or a network file system: no fault of the program, and its traceback helps nobody.
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"structprune: {where}{error.strerror or error}.", *getattr(error, "__notes__", ()), file=sys.stderr)
        return 2
    return 0


def _leave(code: str | int | None) -> NoReturn:
    """End the process. Of several ranks at once where one failed: threads of a library may wait for it for minutes."""
    with contextlib.suppress(StructPruneError):
        if isinstance(code, int) and code != 0 and launched()[1] > 1:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    sys.exit(code)
