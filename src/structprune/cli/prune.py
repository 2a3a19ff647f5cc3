"""`structprune prune`: recipe from flags and file, then the run, then a table or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id, .gguf file, or smollm2 (bundled).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the scope's parameters to remove.  [default: 0.3]")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="mlp, attention or all.  [default: mlp]")] = None,
    head_units: Annotated[
        str | None,
        typer.Option(help="kv-group: KV heads with their query heads; query-head: one of each.  [default: kv-group]"),
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `structprune methods`.  [default: fasp]")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, boolq, self, or a text or jsonl file.  [default: the first that can be had]"),
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration windows.  [default: 128]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.  [default: 2048]")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Host memory budget, e.g. 4GiB.  [default: 80% of what is free]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.  [default: auto]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Forward passes: auto, float32, bfloat16, float16.  [default: auto]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the window draw.  [default: 0]")] = None,
    multiple_of: Annotated[
        int | None, typer.Option(help="Kept widths are a multiple of this.  [default: 32, wide models 128]")
    ] = None,
    damping: Annotated[
        str | None,
        typer.Option(help="Ridge as a share of the Gram's mean diagonal, or auto.  [default: the method's]"),
    ] = None,
    shrinkage: Annotated[
        float | None,
        typer.Option(help="Share of the units' correlations that removal does not count on.  [default: the method's]"),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="See docs/methods.md.  [default: the method's]"),
    ] = None,
    allocator: Annotated[
        str | None, typer.Option(help="uniform, closed-form, energy, softmax or standardised.  [default: the method's]")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="mask-only, bias, least-squares, admm, admm-duals or alternating.  [default: the method's]"),
    ] = None,
    target: Annotated[str | None, typer.Option(help="local or dense-path.  [default: the method's]")] = None,
    structure: Annotated[
        str | None, typer.Option(help="uniform or per-layer.  [default: what the method needs]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the energy and softmax allocators.  [default: the method's]")
    ] = None,
    min_retention: Annotated[
        float | None, typer.Option(help="Least share of its units that a block keeps.  [default: 0.1]")
    ] = None,
    max_retention: Annotated[
        float | None, typer.Option(help="Largest share of its units that a block keeps.  [default: 1]")
    ] = None,
    outer_iterations: Annotated[
        int | None, typer.Option(help="Times that removals are priced again on the pruned model.  [default: 0]")
    ] = None,
    allow_block_removal: Annotated[
        bool | None,
        typer.Option(
            "--allow-block-removal/--no-block-removal",
            help="A block may lose its whole attention or MLP.  [default: no]",
        ),
    ] = None,
    protect_first: Annotated[
        int | None, typer.Option(help="Blocks at the start that lose nothing.  [default: the method's]")
    ] = None,
    protect_last: Annotated[
        int | None, typer.Option(help="Blocks at the end that lose nothing.  [default: the method's]")
    ] = None,
    sensitivity_samples: Annotated[
        int | None, typer.Option(help="Windows of the streamed backward pass, or of measured losses.  [default: 12]")
    ] = None,
    reload_check: Annotated[
        bool | None,
        typer.Option(
            "--reload-check/--no-reload-check",
            help="Load the result with stock code, in a process of its own, and compare its logits.  [default: yes]",
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file of these settings; flags win.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Prune MODEL into a new, physically smaller checkpoint."""
    from structprune.recipe import Recipe

    flags: dict[str, Any] = {
        "sparsity": sparsity,
        "scope": scope,
        "head_units": head_units,
        "method": method,
        "calibration": calibration,
        "num_samples": num_samples,
        "seq_len": seq_len,
        "memory": memory,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "multiple_of": multiple_of,
        "damping": damping,
        "shrinkage": shrinkage,
        "score": score,
        "allocator": allocator,
        "solver": solver,
        "target": target,
        "structure": structure,
        "temperature": temperature,
        "min_retention": min_retention,
        "max_retention": max_retention,
        "outer_iterations": outer_iterations,
        "allow_block_removal": allow_block_removal,
        "protect_first": protect_first,
        "protect_last": protect_last,
        "sensitivity_samples": sensitivity_samples,
        "reload_check": reload_check,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = Recipe.from_yaml(recipe, **given) if recipe is not None else Recipe.build(**given)
    # Only now: these load torch and transformers, and a wrong flag should not wait for that.
    from structprune.api import prune as run_prune
    from structprune.cli.interrupt import interruptible
    from structprune.cli.progress import progress_observer
    from structprune.cli.render import report_table

    try:
        with interruptible(), progress_observer(quiet=quiet) as observer:
            report = run_prune(model, settings, output, observer)
    except KeyboardInterrupt:
        typer.echo("structprune: interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        report_table(report)
