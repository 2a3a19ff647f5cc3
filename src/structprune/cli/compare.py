"""`structprune compare`: several methods at several sparsities in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, Field

from structprune.cli.command import many_values
from structprune.cli.flags import ModelArgument, QuietFlag
from structprune.cli.settings import given, takes_fields
from structprune.errors import InputError
from structprune.recipe import MOST_SAMPLES, Flag, Group, Recipe

CompareCommand = many_values("--methods", "--sparsities", "--text", "--set")


_SPARSITIES = (0.1, 0.2, 0.3, 0.5)


class _Shared(BaseModel):
    """Every method gets the same windows, so their number does not follow from the time that each of them takes."""

    num_samples: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=MOST_SAMPLES, description="calibration windows"
    )


_SHARED = {name: Recipe.model_fields[name] for name in ("calibration", "seq_len")} | _Shared.model_fields


@takes_fields(_SHARED, given)
def compare(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the table; the same again goes on.")],
    methods: Annotated[
        list[str],
        typer.Option(help="One or more, each NAME or NAME:FIELD=VALUE,FIELD=VALUE, e.g. fasp:target=dense-path."),
    ],
    text: Annotated[list[Path], typer.Option("--text", help="One or more texts to test on.")],
    # Fields of a recipe, from the options that `takes_fields` adds.
    settings: Any,
    sparsities: Annotated[list[str] | None, typer.Option(help="One or more.  [default: 0.1 0.2 0.3 0.5]")] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows of each text.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file of settings that all methods share.")] = None,
    set_fields: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the recipe, for all methods.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time prefill and decoding.")] = True,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the curves (needs matplotlib).")] = True,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the pruned checkpoints.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: QuietFlag = False,
) -> None:
    """Prune MODEL by each method at each sparsity, test all alike, and write one table."""
    from structprune.comparison.cells import common_recipe, is_limited, parse_settings, parse_variant

    of_file = Recipe.merged_values(recipe, {}) if recipe is not None else {}
    shared = {**of_file, **settings, **parse_settings(set_fields or [], "--set")}
    variants = [parse_variant(name) for name in methods]
    limited = [variant for variant in variants if is_limited(shared, variant)]
    if sparsities and len(limited) == len(variants):
        raise InputError("limits decide how much goes, so no share is taken beside them", got="--sparsities")
    others = [variant for variant in variants if variant not in limited]
    shares = [Recipe.build(sparsity=share).sparsity for share in sparsities or _SPARSITIES]

    from structprune.cli.interrupt import run_cells
    from structprune.cli.render import comparison_table
    from structprune.comparison.cell import cell_name
    from structprune.comparison.run import ComparisonRequest
    from structprune.comparison.run import compare as run_compare

    request = ComparisonRequest(
        model=model,
        shared=shared,
        cells=[
            *((variant, share) for share in shares for variant in others),
            *((variant, None) for variant in limited),
        ],
        texts=text,
        seq_len=common_recipe(shared).seq_len,
        max_windows=max_windows,
        time_it=speed,
        plots=plots,
        keep=keep,
        quiet=quiet,
    )
    result = run_cells(lambda observer: run_compare(request, output, observer), output, quiet=quiet)
    if as_json:
        print(json.dumps(result.model_dump(mode="json"), indent=2))
    else:
        comparison_table(result)
    if result.failures:
        for failure in result.failures:
            typer.echo(f"structprune: {cell_name(failure.label, failure.sparsity)} failed: {failure.error}", err=True)
        raise typer.Exit(1)
