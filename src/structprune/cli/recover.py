"""`structprune recover`: a pruned model learns again from the dense one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.flags import DeviceFlag, DtypeFlag, MemoryFlag, QuietFlag, ReportJsonFlag, SeedFlag

if TYPE_CHECKING:
    from structprune.results.recovery import RecoveryReport


def recover(
    student: Annotated[str, typer.Argument(help="The pruned model: a directory that `prune` wrote, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    teacher: Annotated[str, typer.Option(help="The dense model that it was pruned from.")],
    mode: Annotated[
        str | None,
        typer.Option(help="stream: all blocks together; blocks: one after the other; lora.  [default: stream]"),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text to learn from, as in `prune`; may be given several times.  [default: as in `prune`]"),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time limit of the training.  [default: none]")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the windows.  [default: 1; blocks at most 4, lora 1]")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Windows of each text.  [default: 512]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.  [default: 1024]")] = None,
    held_out: Annotated[
        int | None, typer.Option(help="Windows of each text to measure on.  [default: an eighth, at most 8]")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step.  [default: 2]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its highest value.  [default: the mode's]")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps over which it rises.  [default: 5]")] = None,
    rank: Annotated[int | None, typer.Option(help="Of mode lora.  [default: 16]")] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="given, or robust: texts that are further from the teacher count more.  [default: given]"),
    ] = None,
    mix_radius: Annotated[float | None, typer.Option(help="How far robust may go.  [default: 0.5]")] = None,
    memory: MemoryFlag = None,
    device: DeviceFlag = None,
    dtype: DtypeFlag = None,
    seed: SeedFlag = None,
    reload_check: Annotated[
        bool | None,
        typer.Option("--reload-check/--no-reload-check", help="As in `prune`.  [default: yes]"),
    ] = None,
    as_json: ReportJsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Let the pruned model STUDENT learn again from the dense one; `structprune resume` goes on if it was cut."""
    values = dict(locals())
    # Only now: these load torch and transformers, and a wrong flag should not wait for that.
    from structprune.training.settings import RecoverySettings

    given = {n: values[n] for n in RecoverySettings.model_fields if n != "calibration" and values[n] is not None}
    from structprune.api import recover as run_recover
    from structprune.cli.interrupt import run_or_say_how_to_resume

    settings = RecoverySettings.build(calibration=tuple(calibration or ()), **given)
    report = run_or_say_how_to_resume(
        lambda observer: run_recover(student, teacher, settings, output, observer), output, quiet=quiet
    )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        recovery_table(report)


def recovery_table(report: RecoveryReport) -> None:
    """Print what a recovery did and cost."""
    from structprune.cli.render import key_value_table
    from structprune.memory import format_bytes
    from structprune.results.summary import reload_line

    windows = sum(text.held_out_windows for text in report.texts)
    rows = [
        ("KL from the teacher", f"{report.before.divergence:.4f} -> {report.after.divergence:.4f} nats per token"),
        (
            "perplexity",
            f"{report.before.perplexity:.2f} -> {report.after.perplexity:.2f} (dense {report.dense_perplexity:.2f})",
        ),
        ("measured on", f"{windows} held-out windows of {report.seq_len} tokens: {report.description}"),
        ("learned from", f"{report.tokens:,} tokens, mode {report.settings['mode']}"),
    ]
    if report.blocks:
        changed = sum(block.changed for block in report.blocks)
        rows.append(("blocks", f"{changed} of {len(report.blocks)} changed, the others were met no better"))
    if len(report.texts) > 1:
        rows += [(f"share of {text.name}", f"{text.share:.1%}") for text in report.texts]
    rows += [
        (
            "peak memory",
            f"planned {format_bytes(report.memory.planned_peak_bytes)}, "
            f"measured {format_bytes(report.memory.measured_peak_bytes)}",
        ),
        ("reload check", reload_line(report.reload)),
        ("forward passes", f"{report.compute_dtype} on {report.device}"),
        ("time", f"training {report.train_seconds:.1f} s, the whole run {report.wall_seconds:.1f} s"),
    ]
    key_value_table(f"structprune recover {report.student} -> {report.output}", rows)
