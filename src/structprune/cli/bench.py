"""`structprune bench`: speed, memory and size of a finished model, alone or beside another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.command import many_values
from structprune.cli.flags import JsonFlag, MergeAdapterFlag, ModelArgument, QuietFlag
from structprune.errors import InputError

if TYPE_CHECKING:
    from structprune.assess import SpeedRequest

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
    table: Annotated[
        Path | None,
        typer.Option("--table", help="Time what pruning could leave instead, and write it for --target-latency."),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure prefill and decode tokens per second (median, quartiles), peak memory and size of MODEL."""
    from structprune.assess import SpeedRequest, record_time
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
    if table is not None:
        if against is not None:
            raise InputError("a table is made of one model", got="--table, --against", wanted="one of them")
        _write_table(model, request, merge_adapter, table, as_json=as_json, quiet=quiet)
        return
    with progress_observer(quiet=quiet) as observer:
        observer.start("bench", len(request.batches) * len(request.prompts))
        result = run_bench(model, request, merge_adapter=merge_adapter, against=against, advance=observer.advance)
        if merge_adapter == "none" and (line := record_time(Path(model), result)):
            observer.note(line)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        bench_tables(result)


def _write_table(
    model: str, request: SpeedRequest, merge_adapter: str, path: Path, *, as_json: bool, quiet: bool
) -> None:
    """Time the widths, write the table, and print it."""
    from structprune.assess import time_widths
    from structprune.cli.progress import progress_observer
    from structprune.cli.render import latency_table
    from structprune.files import check_path, write_text

    check_path(path, "the file of --table")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError("the table cannot be written here", where=str(path), wanted="a file in a folder that is there")
    with progress_observer(quiet=quiet) as observer:
        found = time_widths(model, request, merge_adapter=merge_adapter, observer=observer)
    text = found.model_dump_json(indent=2)
    write_text(path, text)
    if as_json:
        print(text)
    else:
        latency_table(found, path)
