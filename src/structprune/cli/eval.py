"""`structprune eval`: perplexity with its window length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, hub id[@revision], .gguf file, or smollm2.")],
    text: Annotated[Path, typer.Option("--text", help="Text or jsonl file.")],
    against: Annotated[
        str | None,
        typer.Option("--against", help="Another model, the dense one: how far are the predictions from its?"),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of MODEL on a text: consecutive windows, no special tokens, tail dropped."""
    from structprune.api import evaluate as run_evaluate
    from structprune.cli.render import key_value_table

    result = run_evaluate(
        model, text, against=against, seq_len=seq_len, max_windows=max_windows, device=device, dtype=dtype
    )
    if as_json:
        print(json.dumps({"model": model, **result.to_dict()}, indent=2))
        return
    rows = [("perplexity", f"{result.perplexity:.4f}")]
    if result.kl_to_reference is not None and result.top1_agreement is not None:
        rows += [
            (f"KL from {against}", f"{result.kl_to_reference:.4f} nats per token"),
            ("same likeliest token", f"{result.top1_agreement:.2%}"),
        ]
    rows += [
        ("window", f"{result.seq_len} tokens, stride {result.stride}, {result.num_windows} windows"),
        ("text", result.text),
    ]
    key_value_table(f"structprune eval {model}", rows)
