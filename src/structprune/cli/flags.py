"""Arguments and options that several verbs take."""

from typing import Annotated

import typer

from structprune.recipe import Group

ModelArgument = Annotated[
    str, typer.Argument(help="Hugging Face directory, hub id[@revision], .gguf file, or smollm2.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReportJsonFlag = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
RankTimeoutFlag = Annotated[
    float,
    typer.Option(
        help="Under torchrun: seconds that ranks wait for one of them before all give up.",
        rich_help_panel=Group.RESOURCES.value,
    ),
]
MergeAdapterFlag = Annotated[
    str,
    typer.Option(
        "--merge-adapter",
        help="Folder of a LoRA adapter that is merged into MODEL first; beside: the one in its folder.",
    ),
]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
