"""`structprune prune-module`: an encoder, a vision or a speech model, whole in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, Field

from structprune.cli.flags import ReportJsonFlag
from structprune.cli.settings import given, takes_fields
from structprune.recipe import Flag, Group
from structprune.recipe.fields import ByteCount, Share, validated

if TYPE_CHECKING:
    from structprune.modules.prune import PrunedModule

EXAMPLES = """Examples:
  structprune prune-module MiniLM -o smaller --examples my-text.txt
  structprune prune-module ViT -o smaller --examples pictures.npy \\
    --families stock --sparsity 0.2
  structprune prune-module Whisper -o smaller --examples speech.safetensors \\
    --importance taylor --families stock --protect '*.decoder.*' --cost macs
  structprune prune-module program.pt2 -o smaller --examples pictures.npy"""


class _Settings(BaseModel):
    """Fields of a ModuleRecipe that a command line can give."""

    sparsity: Annotated[Share, Flag(Group.WHAT)] = Field(default=0.3, description="share of the cost that goes")
    cost: Annotated[str, Flag(Group.WHAT)] = Field(
        default="parameters", description="what the sparsity is a share of: parameters, macs or latency"
    )
    families: Annotated[str, Flag(Group.WHAT)] = Field(
        default="native",
        description="which units leave. native: those that the model's code runs without; stock: those of which a "
        "stock config can have fewer; all",
    )
    protect: Annotated[tuple[str, ...], Flag(Group.WHAT, unset="none")] = Field(
        default=(), description="families that stay whole: names or patterns such as '*.decoder.*', several times"
    )
    allow_coupled: Annotated[bool, Flag(Group.WHAT)] = Field(
        default=False, description="let units leave that a LayerNorm or a softmax sees together"
    )
    max_share: Annotated[float, Flag(Group.WHAT)] = Field(
        default=0.9, description="largest share of a family of units that leaves"
    )
    multiple_of: Annotated[int, Flag(Group.WHAT)] = Field(
        default=1, description="what the number of units that stay is a multiple of"
    )
    importance: Annotated[str, Flag(Group.HOW)] = Field(
        default="magnitude",
        description="magnitude, taylor, hessian or reconstruction; taylor and hessian need a tensor called labels "
        "among the examples",
    )
    reduction: Annotated[str, Flag(Group.HOW)] = Field(
        default="mean", description="how a unit's tensors become one number: mean, sum, max or first"
    )
    normalisation: Annotated[str, Flag(Group.HOW)] = Field(
        default="mean", description="how families are made comparable: none, mean, max, sum, gaussian or lamp"
    )
    ranking: Annotated[str, Flag(Group.HOW)] = Field(
        default="local",
        description="who is ranked together: local, pattern or global; measured: all, by the error that each family's "
        "absence makes in what comes out, for what it costs",
    )
    steps: Annotated[int, Flag(Group.HOW)] = Field(
        default=1, description="rounds of scores, choice, repair and removal"
    )
    repair: Annotated[bool, Flag(Group.HOW)] = Field(
        default=True, description="solve the weights that read removed units again"
    )
    batch_size: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=8, ge=2, description="examples of one batch; a last one that is shorter is left out"
    )
    max_batches: Annotated[int, Flag(Group.CALIBRATION)] = Field(default=16, ge=1, description="batches that are read")
    seq_len: Annotated[int, Flag(Group.CALIBRATION)] = Field(
        default=128, ge=4, description="tokens per window, where the examples are a text"
    )
    memory: Annotated[ByteCount | None, Flag(Group.RESOURCES, unset="80% of what is free")] = Field(
        default=None, ge=1, description="host bytes that copies of the weights may take, such as 4GiB"
    )


_OWN = ("batch_size", "max_batches", "seq_len", "memory")


@takes_fields(_Settings.model_fields, lambda values: validated(_Settings, given(values)))
def prune_module(
    model: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face directory of a model of any stock class, or a .pt2 file of torch.export.save."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    examples: Annotated[
        Path,
        typer.Option(
            help="Inputs: .safetensors with a tensor per argument, .npy with the main input, or a text for a model of "
            "texts."
        ),
    ],
    # _Settings, from the options that `takes_fields` adds.
    settings: Any,
    as_json: ReportJsonFlag = False,
) -> None:
    """Prune MODEL, an encoder, a vision or a speech model, whole in memory; causal language models have `prune`."""
    from structprune.errors import InputError
    from structprune.evaluation.modules import LABELS, check_fits, load_module, losses_of, read_examples
    from structprune.modules.importance import IMPORTANCES
    from structprune.modules.prune import prune_module as run
    from structprune.modules.settings import ModuleRecipe

    if output.exists():
        raise InputError("the directory is there already", where=str(output), do="name another one")
    fields = settings.model_dump()
    asked = {name: fields.pop(name) for name in _OWN}
    recipe = ModuleRecipe(**fields)
    check_fits(model, asked["memory"], with_gradients=bool(IMPORTANCES.get(recipe.importance).reads))
    module = load_module(model)
    batches = read_examples(examples, module, model, batch_size=asked["batch_size"], seq_len=asked["seq_len"])
    batches = batches[: asked["max_batches"]]
    inputs = [{name: value for name, value in batch.items() if name != LABELS} for batch in batches]
    result = run(module, inputs, recipe, loss=lambda smaller: losses_of(batches, smaller))
    result.save(output)
    if as_json:
        print(json.dumps(result.report(), indent=2))
    else:
        _print(result, model, output)


def _print(result: PrunedModule, model: Path, output: Path) -> None:
    """Print what left, and who loads the rest."""
    from structprune.cli.tables import print_pairs

    changed = {name: pair for name, pair in result.widths.items() if pair[0] != pair[1]}
    loads = "its tensors have no stock config: load program.pt2 with torch.export.load"
    rows = [
        (name, f"{before:,} -> {after:,} ({1 - after / before:.1%} less)")
        for name, (before, after) in result.costs.items()
    ]
    rows += [
        ("families", f"{len(changed)} of {len(result.widths)} lost units"),
        ("solved again", f"{len(result.repaired)} weights"),
        (
            "beside zeros",
            "not compared: coupled units left"
            if result.removal is None
            else f"{result.removal.difference:.1e} of the largest output",
        ),
        ("loads with", "from_pretrained, and program.pt2" if result.is_stock else loads),
    ]
    print_pairs(f"structprune prune-module {model} -> {output}", rows)
