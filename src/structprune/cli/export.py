"""`structprune export`: a checkpoint as a file for another runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.flags import JsonFlag, MergeAdapterFlag, QuietFlag


def export(
    model: Annotated[str, typer.Argument(help="Output of `prune`, or any model that it takes.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to create, e.g. small.gguf; for onnx and vllm a directory.")
    ],
    format: Annotated[
        str, typer.Option(help="gguf (llama.cpp), onnx (ONNX Runtime, OpenVINO) or vllm (its class for uneven blocks).")
    ] = "gguf",
    dtype: Annotated[str, typer.Option(help="stored, float32, float16 or bfloat16.")] = "stored",
    tokenizer_gguf: Annotated[
        Path | None, typer.Option(help="GGUF file of the dense model, whose tokenizer is copied.")
    ] = None,
    merge_adapter: MergeAdapterFlag = "none",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write MODEL for llama.cpp or vLLM, uneven widths too, or as an ONNX graph."""
    from structprune.api import export as run_export
    from structprune.cli.interrupt import interruptible
    from structprune.cli.progress import progress_observer
    from structprune.cli.tables import print_pairs
    from structprune.memory import format_bytes

    try:
        with interruptible(), progress_observer(quiet=quiet) as observer:
            result = run_export(
                model,
                output,
                format=format,
                dtype=dtype,
                tokenizer_gguf=tokenizer_gguf,
                merge_adapter=merge_adapter,
                observer=observer,
            )
    except KeyboardInterrupt:
        typer.echo("structprune: interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    print_pairs(
        f"structprune export {model}",
        [
            ("output", f"{result.path} ({format_bytes(result.bytes)})"),
            ("architecture", result.architecture),
            ("weights", f"{result.num_tensors} tensors, {result.dtype}"),
            ("tokenizer", result.tokenizer),
        ],
    )
