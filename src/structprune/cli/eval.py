"""`structprune eval`: perplexity with its window length, distance from another model, zero-shot tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from structprune.cli.command import many_values
from structprune.cli.flags import JsonFlag, MergeAdapterFlag, ModelArgument, QuietFlag

if TYPE_CHECKING:
    from structprune.kinds import StartToken
    from structprune.results.measured import Evaluation, TextResult

EvalCommand = many_values("--text", "--tasks")


def evaluate(
    model: ModelArgument,
    merge_adapter: MergeAdapterFlag = "none",
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Text or jsonl files, or the held-out passages boolq and sciq.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Another model, the dense one: how far are the predictions from its?"),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows of each text.")] = None,
    bos: Annotated[
        str, typer.Option(help="Whether windows begin with the start token: auto (as the tokenizer does), yes or no.")
    ] = "auto",
    stream: Annotated[bool, typer.Option("--stream", help="One block in memory at a time.")] = False,
    memory: Annotated[
        str | None, typer.Option(help="Budget of --stream, e.g. 4GiB.  [default: 80% of what is free]")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Zero-shot tasks of lm-eval, e.g. boolq,piqa (needs the extra eval).")
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Directory of local task files, for machines without the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the tasks' requests.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure the perplexity of MODEL on texts, in consecutive windows, the tail dropped. Or zero-shot tasks."""
    from structprune.assess import EvaluationRequest, evaluate_all
    from structprune.cli.progress import progress_observer
    from structprune.cli.tables import print_pairs

    request = EvaluationRequest(
        texts=text or [],
        merge_adapter=merge_adapter,
        against=against,
        seq_len=seq_len,
        max_windows=max_windows,
        # Checked with the other settings.
        bos=cast("StartToken", bos),
        tasks=[name for part in tasks or [] for name in part.split(",") if name],
        tasks_dir=tasks_dir,
        task_limit=limit,
        batch_size=batch_size,
        stream=stream,
        memory=memory,
        device=device,
        dtype=dtype,
    )
    with progress_observer(quiet=quiet) as observer:
        result = evaluate_all(model, request, observer)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    print_pairs(f"structprune eval {model}", _rows(result))


def _rows(result: Evaluation) -> list[tuple[str, str]]:
    from structprune.memory import format_bytes

    rows = [row for text in result.texts for row in _text_rows(text, result.against)]
    for task in result.tasks:
        values = [
            f"{name} {value:.4f}" + (f" +- {error:.4f}" if (error := task.standard_errors.get(name)) else "")
            for name, value in task.metrics.items()
        ]
        shots = f"{task.num_samples} samples, {task.num_fewshot} examples in the prompt"
        rows.append((task.task, f"{', '.join(values)} ({shots})"))
    memory = f"measured {format_bytes(result.measured_peak_bytes)}"
    if result.planned_peak_bytes is not None:
        memory = f"planned {format_bytes(result.planned_peak_bytes)}, {memory}"
    how = "one block at a time" if result.streamed else "whole model"
    return [*rows, ("forward passes", f"{result.dtype} on {result.device}, {how}"), ("peak memory", memory)]


def _text_rows(text: TextResult, against: str | None) -> list[tuple[str, str]]:
    from structprune.results.summary import beginning

    rows = [("text", text.text), ("perplexity", f"{text.perplexity:.4f}")]
    if text.kl_to_reference is not None and text.top1_agreement is not None:
        rows += [
            (f"perplexity of {against}", f"{text.reference_perplexity:.4f}"),
            (f"KL from {against}", f"{text.kl_to_reference:.4f} nats per token"),
            ("same likeliest token", f"{text.top1_agreement:.2%}"),
        ]
    if text.bits_per_byte is not None and text.num_bytes:
        tokens = text.num_predicted_tokens / text.num_bytes
        rows.append(("bits per byte", f"{text.bits_per_byte:.4f} ({tokens:.3f} tokens per byte)"))
    windows = f"{text.seq_len} tokens, stride {text.stride}, {text.num_windows} windows, {beginning(text.start)}"
    return [*rows, ("window", windows)]
