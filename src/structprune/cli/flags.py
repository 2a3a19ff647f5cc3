"""Arguments and options that several verbs take."""

from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(help="Hugging Face directory, hub id[@revision], .gguf file, or smollm2.")
]
MemoryFlag = Annotated[str | None, typer.Option(help="Host memory budget, e.g. 4GiB.  [default: 80% of what is free]")]
DeviceFlag = Annotated[str | None, typer.Option(help="auto, cpu or cuda.  [default: auto]")]
DtypeFlag = Annotated[
    str | None, typer.Option(help="Forward passes: auto, float32, bfloat16, float16.  [default: auto]")
]
SeedFlag = Annotated[int | None, typer.Option(help="Seed of the window draw.  [default: 0]")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReportJsonFlag = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
RankTimeoutFlag = Annotated[
    float, typer.Option(help="Under torchrun: seconds that ranks wait for one of them before all give up.")
]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
