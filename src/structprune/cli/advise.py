"""`structprune advise`: which method, scope and share to take, tried on few windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, Field

from structprune.cli.command import many_values
from structprune.cli.flags import ModelArgument, QuietFlag
from structprune.cli.settings import given, takes_fields
from structprune.recipe import Flag, Group, Recipe
from structprune.recipe.fields import Share, validated

if TYPE_CHECKING:
    from structprune.comparison.advice import Advice, Tried

AdviseCommand = many_values("--candidates", "--text", "--set")


class _Asked(BaseModel):
    """Few windows: the order of the candidates is wanted, not their best."""

    remove: Annotated[Share, Flag(Group.WHAT)] = Field(
        default=0.2, description="share of all parameters of the model that is to go"
    )
    num_samples: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=24, ge=1, description="calibration windows of each candidate"
    )
    seq_len: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=512, ge=2, description="tokens per window, in calibration and tests"
    )


_FIELDS = {"calibration": Recipe.model_fields["calibration"]} | _Asked.model_fields


@takes_fields(_FIELDS, given)
def advise(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the trial; the same again goes on.")],
    text: Annotated[
        list[Path], typer.Option("--text", help="One or more texts to test on, of the kind that the model is for.")
    ],
    # Fields of a recipe and `remove`, from the options that `takes_fields` adds.
    settings: Any,
    candidates: Annotated[
        list[str] | None,
        typer.Option(help="One or more, each as in `compare --methods`.  [default: one of each kind]"),
    ] = None,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows of each text to test on.")] = 8,
    set_fields: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the recipe, for all candidates.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time prefill and decoding.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: QuietFlag = False,
) -> None:
    """Try methods and scopes that remove as much of MODEL on few windows, and say which to take."""
    from structprune.cli.interrupt import run_cells
    from structprune.comparison.advice import CANDIDATES, AdviceRequest
    from structprune.comparison.advice import advise as run_advise
    from structprune.comparison.cells import parse_settings

    asked = validated(_Asked, {name: settings.pop(name) for name in _Asked.model_fields if name in settings})
    shared = {**settings, "num_samples": asked.num_samples, "seq_len": asked.seq_len}
    request = AdviceRequest(
        model=model,
        remove=asked.remove,
        texts=text,
        shared=shared | parse_settings(set_fields or [], "--set"),
        candidates=candidates or CANDIDATES,
        seq_len=asked.seq_len,
        max_windows=max_windows,
        time_it=speed,
        quiet=quiet,
    )
    found = run_cells(lambda observer: run_advise(request, output, observer), output, quiet=quiet)
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=2))
    else:
        _print(found)
    if not found.tried:
        raise typer.Exit(1)


def _print(found: Advice) -> None:
    """Print the candidates, best first, and the command of the best."""
    from structprune.cli.tables import Column, print_table

    columns = ["candidate", "scope", "share of it", "mean loss", "worst loss", "prefill", "decode", "wall", "config"]
    print_table(
        f"{found.model} without {found.remove:.1%} of its parameters: how much the logarithm of the perplexity grows",
        [Column(name=name, figures=number > 1) for number, name in enumerate(columns)],
        [_row(entry) for entry in found.tried],
    )
    for label, reason in found.left_out.items():
        print(f"left out: {label}: {reason}")
    if found.tried:
        print(f"take: {found.tried[0].command}")
    stock = found.best_stock
    if stock is not None and stock is not found.tried[0]:
        print(f"for a stock config: {stock.command}")


def _row(entry: Tried) -> tuple[str, ...]:
    speed = entry.cell.speed
    return (
        entry.label,
        entry.scope,
        f"{entry.sparsity:.1%}",
        f"{entry.mean_loss:.3f}",
        f"{entry.worst_loss:.3f} ({entry.worst_text})",
        "" if speed is None else f"{speed.prefill_speedup:.2f}x",
        "" if speed is None else f"{speed.decode_speedup:.2f}x",
        f"{entry.cell.wall_seconds:.0f} s",
        "stock" if entry.stock else "own",
    )
