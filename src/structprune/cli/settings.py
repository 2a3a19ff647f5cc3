"""The settings of a run as options of the command line, for every verb that takes them."""

# Without postponed annotations: typer reads the real ones from the signature that `takes_recipe` puts together.
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structprune.cli.flags import DeviceFlag, DtypeFlag, MemoryFlag, SeedFlag

if TYPE_CHECKING:
    from structprune.recipe import Recipe


def recipe_from_flags(
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the scope's parameters to remove.  [default: 0.3]")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="mlp, attention or all.  [default: mlp]")] = None,
    head_units: Annotated[
        str | None,
        typer.Option(
            help="kv-group: KV heads with their query heads; query-head: one of each; value-channel: V/O pairs.  "
            "[default: the method's]"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `structprune methods`.  [default: fasp]")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, boolq, self, or a text or jsonl file.  [default: the first that can be had]"),
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration windows.  [default: 128]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.  [default: 2048]")] = None,
    memory: MemoryFlag = None,
    device: DeviceFlag = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory budget of a CUDA device, e.g. 8GiB.  [default: 90% of what is free]")
    ] = None,
    dtype: DtypeFlag = None,
    seed: SeedFlag = None,
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
        int | None,
        typer.Option(help="Times that removal costs are measured again on the pruned model.  [default: 0]"),
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
        int | None,
        typer.Option(
            help="Windows of the streamed backward pass, or of measured losses.  [default: 24,576 tokens, at most 24]"
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(help="Processes that will share each block: heads and widths divide by it.  [default: 1]"),
    ] = None,
    reload_check: Annotated[
        bool | None,
        typer.Option(
            "--reload-check/--no-reload-check",
            help="Load the result with stock code, in a process of its own, and compare its logits.  [default: yes]",
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file of these settings; flags win.")] = None,
) -> "Recipe":
    """The recipe of these flags and of the file; flags win. Raises InputError."""
    flags = {name: value for name, value in locals().items() if name != "recipe" and value is not None}
    from structprune.recipe import Recipe

    return Recipe.from_yaml(recipe, **flags) if recipe is not None else Recipe.build(**flags)


def takes_recipe(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` with the options of `recipe_from_flags` in the place of its parameter `settings`."""
    flags = inspect.signature(recipe_from_flags).parameters
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        parameters += flags.values() if parameter.name == "settings" else [parameter]

    @functools.wraps(verb)
    def command(**values: Any) -> None:
        given = {name: values.pop(name) for name in flags}
        verb(settings=recipe_from_flags(**given), **values)

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
