"""`structprune bench`: speed, memory and size of a finished model, alone or beside another one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from structprune.cli.command import many_values
from structprune.cli.flags import JsonFlag, MergeAdapterFlag, ModelArgument, QuietFlag

BenchCommand = many_values("--batch", "--prompt")


def bench(
    model: ModelArgument,
    merge_adapter: MergeAdapterFlag = "none",
    against: Annotated[
        str | None, typer.Option("--against", help="Another model, the dense one: timed in turn, ratios are given.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="One or more batch sizes.  [default: 1]")] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(min=1, help="One or more prompt lengths in tokens.  [default: 512]")
    ] = None,
    decode: Annotated[int, typer.Option(min=1, help="Tokens to decode behind each prompt.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each point, after a warm-up.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure prefill and decode tokens per second (median, quartiles), peak memory and size of MODEL."""
    from structprune.assess import SpeedRequest
    from structprune.assess import bench as run_bench
    from structprune.cli.progress import progress_observer
    from structprune.cli.render import bench_tables

    request = SpeedRequest(
        batches=list(dict.fromkeys(batch or [1])),
        prompts=list(dict.fromkeys(prompt or [512])),
        decode_tokens=decode,
        repeats=repeats,
        device=device,
        dtype=dtype,
    )
    with progress_observer(quiet=quiet) as observer:
        observer.start("bench", len(request.batches) * len(request.prompts))
        result = run_bench(model, request, merge_adapter=merge_adapter, against=against, advance=observer.advance)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        bench_tables(result)
