"""A report in a few lines, for the terminal, a notebook and the page: what was done, what it cost, what to look at."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from structprune.allocation import ALLOCATORS
from structprune.memory import format_bytes
from structprune.recipe import ResolvedRecipe
from structprune.recipe.repaired import objective_of, repair_of
from structprune.recipe.slice import ResolvedSlice
from structprune.recipe.units import ResolvedUnits
from structprune.results.memory import DeviceMemoryReport, MemoryReport
from structprune.results.removed import removed_rows
from structprune.results.schema import BlockReport, FilesReport, PruneFacts, ReloadReport
from structprune.results.sizes import ReachableShares, SizeReport
from structprune.results.texts import HeldOutReport, HeldOutText, Perplexities
from structprune.solvers import SOLVERS

# A difference between shares that is not worth a word.
_CLOSE = 0.01
# Held-out over in-sample growth of the perplexity from which a run is warned of. One window of 2048 tokens moves either
# by a few percent.
OVERFITTING = 1.2
# From how many times the others' mean, and from how much above it, the growth of the logarithm of the perplexity of one
# text is said to be far more. One window of 2048 tokens moves it by a few hundredths.
UNEVEN, UNEVEN_BY = 2.0, 0.1
# Calibration tokens, for each unit of the widest sublayer, below which a run that solves weights again is warned of.
TOKENS_PER_UNIT = 8
LEAST_TOKENS = 4096

UNITS = {
    "mlp": "MLP channels",
    "attention": "attention units",
    "block": "blocks",
    "expert": "experts",
}
"""Kind of a block report -> what is counted."""


def around_rows(size: SizeReport) -> list[tuple[str, str]]:
    """Say what was pruned of an image-text model, as (name, value); nothing for a model that is pruned as a whole."""
    if not size.parameters_around:
        return []
    return [
        ("removed of the text model", f"{size.removed_share_of_text_model:.2%}"),
        ("parameters around the text model", f"{size.parameters_around:,}, copied as they are"),
    ]


def summary_rows(report: PruneFacts) -> list[tuple[str, str]]:
    """List what a run did and cost as (name, value)."""
    size, memory, calibration = report.size, report.memory, report.calibration
    saved = 1 - size.bytes_after / size.bytes_before
    commit = [] if report.source_commit is None else [("commit of the source", report.source_commit)]
    return [
        *perplexity_rows(report),
        *commit,
        *_adapter(report),
        *([] if report.vocabulary is None else [("vocabulary", report.vocabulary.line)]),
        *removed_rows(report),
        ("parameters", f"{size.parameters_before:,} -> {size.parameters_after:,}"),
        *around_rows(size),
        (
            "bytes on disk",
            f"{format_bytes(size.bytes_before)} -> {format_bytes(size.bytes_after)} "
            f"({abs(saved):.1%} {'less' if saved >= 0 else 'more'}){stored_in(size)}",
        ),
        (
            "calibration",
            f"{calibration.description}: {calibration.num_windows} windows of {calibration.seq_len} tokens, "
            f"{beginning(calibration.start)}",
        ),
        *_starved_row(report),
        *gate_rows(report),
        *([] if report.search is None else [("search over widths", report.search.line)]),
        *repair_rows(report),
        ("peak memory", _peaks(memory)),
        *([] if memory.device is None else [("peak device memory", _peaks(memory.device))]),
        ("reload check", reload_line(report.reload)),
        *beside_the_weights(report.files),
        *([("tokenizer", "gives the source's ids on a text of many scripts: yes")] if report.same_tokens else []),
        ("forward passes", f"{report.compute_dtype} on {report.device}"),
        ("wall time", f"{report.wall_seconds:.1f} s"),
    ]


def _adapter(report: PruneFacts) -> list[tuple[str, str]]:
    adapter = report.adapter
    if adapter is None:
        return []
    replaced = f", {adapter.num_replaced} replaced" if adapter.num_replaced else ""
    return [("adapter", f"{Path(adapter.path).name}, merged: {adapter.num_updated} tensors changed{replaced}")]


def gate_rows(report: PruneFacts) -> list[tuple[str, str]]:
    """Say (name, value) of what gates learned about which units stay; nothing where there were none."""
    gates = report.gates
    if gates is None:
        return []
    measured = sum(text.num_windows for text in gates.texts)
    return [
        (
            f"gates by {gates.learner}",
            f"{gates.outcome}; KL from the dense model on {measured} of the calibration's windows, nothing solved yet: "
            f"{gates.text_figures} nats per token; {gates.steps} steps on {gates.num_windows} others in "
            f"{gates.seconds:.0f} s",
        )
    ]


def repair_rows(report: PruneFacts) -> list[tuple[str, str]]:
    """Say (name, value) of what was learned behind the last block; nothing where nothing was to learn."""
    repair = report.repair
    if repair is None:
        return []
    of = ", of the text that is furthest from it," if objective_of(report.recipe).by_text else ""
    return [
        (
            f"repair by {repair.mode}",
            f"KL from the dense model{of} {repair.divergence_before:.4f} -> {repair.divergence_after:.4f} nats per "
            f"token on {_plural(repair.num_measured, 'window')}; {repair.num_windows} others taught "
            f"{repair.num_learned:,} numbers in {repair.seconds:.0f} s"
            + (f"; nothing else was fitted on {repair.num_apart} of them" if repair.num_apart else "")
            + _said("; new biases in {}", repair.new_biases)
            + _said("; none in {}, for which the config has no entry", repair.no_biases)
            + ("" if repair.changed else "; nothing helped, nothing was changed"),
        )
    ]


def _said(sentence: str, sublayers: Sequence[str]) -> str:
    """Put the sublayers into the sentence; nothing where there are none."""
    return sentence.format(" and ".join(sublayers)) if sublayers else ""


def beginning(start: str) -> str:
    """Say what every window begins with."""
    return f"each behind the start token {start}" if start else "without a start token"


def stored_in(size: SizeReport) -> str:
    """Name what the output's weights are stored in, behind a comma; nothing in reports of earlier versions."""
    return f", in {' and '.join(size.dtypes)}" if size.dtypes else ""


def perplexity_rows(report: PruneFacts) -> list[tuple[str, str]]:
    """Say (name, value) of what the result is worth: on windows that nothing was fitted on, then in-sample."""
    held_out, calibration = report.held_out, report.calibration
    fitted = _before_and_after(calibration, f"first {calibration.perplexity_windows} calibration windows, fitted")
    if held_out is None:
        return [("perplexity, in-sample only", fitted)]
    texts = f"{len(held_out.texts)} texts" if held_out.texts else "the same text"
    measured = _before_and_after(held_out, f"{_windows(held_out)} of {texts}")
    return [
        ("perplexity", measured),
        *((f"perplexity, {text.label}", _before_and_after(text, _windows(text))) for text in held_out.texts),
        ("perplexity, in-sample", fitted),
        *bits_rows(report),
    ]


def bits_rows(report: PruneFacts) -> list[tuple[str, str]]:
    """Say what a byte of the held-out windows takes where tokens went: perplexity is not comparable with the source's.

    Both figures are of the tokens that stay: the source's own are those of `structprune eval`.
    """
    bits = None if report.held_out is None else report.held_out.bits_per_byte
    if report.vocabulary is None or bits is None:
        return []
    before, after = bits
    return [("bits per byte", f"{before:.4f} -> {after:.4f}, both with the tokens that stay")]


def _starved(report: PruneFacts) -> list[BlockReport]:
    """Find the sublayers of a mixture with experts that too few calibration tokens were sent to."""
    names = ("experts_without_tokens", "experts_with_few_tokens")
    return [block for block in report.blocks if any(block.statistics.get(name) for name in names)]


def _starved_row(report: PruneFacts) -> list[tuple[str, str]]:
    """Say how many experts had too few tokens, and in which blocks; nothing where all had enough."""
    blocks = _starved(report)
    if not blocks:
        return []
    without, few = (_counted(blocks, name) for name in ("experts_without_tokens", "experts_with_few_tokens"))
    return [("experts with few tokens", f"without any: {without}; with too few: {few}")]


def _counted(blocks: Iterable[BlockReport], name: str) -> str:
    found = [block for block in blocks if block.statistics.get(name)]
    if not found:
        return "none"
    numbers = ", ".join(str(block.block) for block in found)
    total = sum(block.statistics[name] for block in found)
    return f"{total:.0f} in {'block' if len(found) == 1 else 'blocks'} {numbers}"


def _starved_warnings(report: PruneFacts) -> list[str]:
    """Name the calibration tokens that would do, by the share of the expert that is used least."""
    # Reports of earlier versions say of some methods how many experts had none, and no more.
    blocks = [block for block in _starved(report) if "wanted_tokens" in block.statistics]
    if not blocks:
        return []
    ((_, counted),) = _starved_row(report)
    worst = max(blocks, key=lambda block: block.statistics["wanted_tokens"]).statistics
    return [
        f"Experts were sent too few calibration tokens ({worst['enough_expert_tokens']:.0f} are enough for one) and "
        f"were pruned by their weights alone, or nearer to them. {counted[0].upper()}{counted[1:]}. "
        f"{'About' if worst['least_expert_tokens'] else 'More than'} {worst['wanted_tokens']:,.0f} tokens would do "
        f"instead of {worst['tokens']:,.0f}: raise --num-samples, and --sensitivity-samples where gradients decide."
    ]


def _windows(held_out: HeldOutReport | HeldOutText) -> str:
    return _plural(held_out.num_windows, "held-out window")


def _before_and_after(measured: Perplexities, where: str) -> str:
    return f"{measured.dense_perplexity:.2f} -> {measured.pruned_perplexity:.2f} ({measured.ratio:.2f} times; {where})"


def beside_the_weights(files: FilesReport | None) -> list[tuple[str, str]]:
    """Name the files that the source had beside its weights; nothing in reports of earlier versions."""
    if files is None:
        return []
    left = "; ".join(f"{name} ({reason})" for name, reason in files.left_out.items())
    return [("beside the weights", f"{len(files.carried)} files carried over, left out: {left or 'none'}")]


def _peaks(memory: MemoryReport | DeviceMemoryReport) -> str:
    return f"planned {format_bytes(memory.planned_peak_bytes)}, measured {format_bytes(memory.measured_peak_bytes)}"


def reload_line(reload: ReloadReport) -> str:
    """Describe how the finished checkpoint fared in a fresh process."""
    if reload.relative_difference is None:
        return f"{'left out' if reload.mode == 'off' else 'not possible'} ({reload.reason})"
    how = "whole model" if reload.mode == "whole" else f"module by module, because {reload.reason}"
    return (
        f"stock transformers, {how}: relative difference {reload.relative_difference:.1e} of the logits at "
        f"{reload.num_positions} positions ({reload.seconds:.1f} s)"
    )


def share_note(recipe: ResolvedRecipe, shares: ReachableShares | None) -> tuple[str, ...]:
    """Say that another share goes than was asked for, and which ones could be had; nothing where they are close."""
    if shares is None or abs(shares.removed - recipe.sparsity) <= _CLOSE:
        return ()
    multiple = recipe.multiple_of if isinstance(recipe, ResolvedUnits | ResolvedSlice) else 1
    goes = f"{shares.removed:.2%}" if shares.decided else f"{shares.above:.2%} to {shares.removed:.2%}"
    most = recipe.max_retention if isinstance(recipe, ResolvedUnits) else 1.0
    if most < 1 and not shares.below:
        return (
            f"{goes} of the parameters in scope go and {recipe.sparsity:.2%} were asked for: --max-retention {most:g} "
            f"takes as much of every sublayer"
            + (f", and the widths are to be multiples of {multiple}" if multiple > 1 else ""),
        )
    return (
        f"{goes} of the parameters in scope go and {recipe.sparsity:.2%} were asked for: the nearest "
        f"shares that the units allow are {shares.below:.2%} below and {shares.above:.2%} above"
        + (f"; a smaller --multiple-of than {multiple} allows others" if multiple > 1 else ""),
    )


def warnings(report: PruneFacts) -> list[str]:
    """List what a reader should not miss."""
    over = [limit for limit in report.limits if limit.is_missed]
    notes = (
        *report.notes,
        *(() if report.limits else share_note(report.recipe, report.size.reachable)),
        *(f"the limit of {limit.name} is missed: {limit.line}" for limit in over),
    )
    found = [f"{note[0].upper()}{note[1:]}." for note in notes] + _perplexity_warnings(report)
    found += _starved_warnings(report)
    raised = _places(block for block in report.blocks if block.status == "damping-raised")
    if raised:
        found.append(f"A factorisation failed at the asked ridge, which was raised: {raised}.")
    if isinstance(report.recipe, ResolvedUnits):
        found += _bound_warnings(report, report.recipe)
    memory, reload, calibration = report.memory, report.reload, report.calibration
    for more, place in (("More", memory), ("On the device more", memory.device)):
        if place is not None and place.measured_peak_bytes > place.planned_peak_bytes:
            found.append(
                f"{more} memory was used ({format_bytes(place.measured_peak_bytes)}) than planned "
                f"({format_bytes(place.planned_peak_bytes)})."
            )
    if reload.relative_difference is None:
        found.append(f"The result was not loaded for a check: {reload.reason}.")
    solver = SOLVERS.find(report.recipe.solver) if isinstance(report.recipe, ResolvedUnits) else None
    if solver is not None and "consumer" in solver.changes:
        tokens, widest = calibration.num_windows * calibration.seq_len, max(block.num_units for block in report.blocks)
        if tokens < max(LEAST_TOKENS, TOKENS_PER_UNIT * widest):
            found.append(
                f"Only {tokens:,} calibration tokens for up to {widest:,} units of a block: methods that re-solve "
                "weights fit so few too closely (docs/footguns.md)."
            )
    return found


def _perplexity_warnings(report: PruneFacts) -> list[str]:
    held_out, calibration = report.held_out, report.calibration
    if held_out is None:
        return [
            "Perplexity is in-sample only, which says little: no window was held out. Give more calibration text, or "
            "measure with `structprune eval` on another text."
        ]
    found: list[str] = []
    if held_out.set_apart:
        found.append(
            "The calibration text has no windows beside those that were asked for, so fewer were fitted: "
            f"{calibration.num_windows}, and {_windows(held_out)} set apart."
        )
    found += _uneven_warnings(report, held_out)
    if held_out.ratio > OVERFITTING * calibration.ratio:
        found.append(
            f"The perplexity is {held_out.ratio:.2f} times the dense model's on held-out windows and "
            f"{calibration.ratio:.2f} times in-sample: the calibration text was fitted too closely. Give more of it "
            "(--num-samples), of the domains that the model is for, or let the result learn again (`structprune "
            "recover`)."
        )
    return found


def _uneven_warnings(report: PruneFacts, held_out: HeldOutReport) -> list[str]:
    """Name the text whose loss has grown far more than that of the others, and say what can be done for it."""
    worst = max(held_out.texts, key=lambda text: text.excess, default=None)
    others = [text.excess for text in held_out.texts if text is not worst]
    if worst is None or not others:
        return []
    mean = sum(others) / len(others)
    if worst.excess <= UNEVEN * mean or worst.excess < mean + UNEVEN_BY:
        return []
    weight = next((text.weight for text in report.calibration.texts if text.name == worst.name), 1.0)
    recipe, advice = report.recipe, [f"Give it twice the weight (--calibration {worst.label}:{2 * weight:g})"]
    if not objective_of(recipe).by_text and (recipe.chooses_ridge or repair_of(recipe)):
        advice.append("choose for the text that fares worst (--objective worst)")
    return [
        f"{worst.label} lost far more than the other texts: its perplexity is {worst.ratio:.2f} times the dense "
        f"model's, that of the others {math.exp(mean):.2f} times in the mean (logarithms {worst.excess:.2f} and "
        f"{mean:.2f}). {', '.join(advice)}, or remove less."
    ]


def _bound_warnings(report: PruneFacts, recipe: ResolvedUnits) -> list[str]:
    found: list[str] = []
    low, high = blocks_at_a_bound(report)
    if low:
        share = recipe.min_retention
        found.append(f"At the least share that a block keeps ({share:.0%}, --min-retention): {_places(low)}.")
    if high:
        share = recipe.max_retention
        found.append(f"At the largest share that a block keeps ({share:.0%}, --max-retention): {_places(high)}.")
    return found


def blocks_at_a_bound(report: PruneFacts) -> tuple[list[BlockReport], list[BlockReport]]:
    """Find blocks that an allocator would have cut further, or less, but for a bound; none where all are cut alike."""
    recipe = report.recipe
    if not isinstance(recipe, ResolvedUnits):
        return [], []
    allocator = ALLOCATORS.find(recipe.allocator)
    if allocator is None or not allocator.bounded:
        return [], []
    multiple = recipe.multiple_of
    low = [
        block
        for block in report.blocks
        if 0 < block.kept_units < block.num_units
        and block.kept_units < math.ceil(block.num_units * recipe.min_retention) + multiple
    ]
    high = [
        block
        for block in report.blocks
        if recipe.max_retention < 1 and block.kept_units > math.floor(block.num_units * recipe.max_retention) - multiple
    ]
    return low, high


def _places(blocks: Iterable[BlockReport]) -> str:
    """Format blocks kind after kind, as in `blocks 3, 4, 7 (mlp)`."""
    by_kind: dict[str, list[str]] = {}
    for block in blocks:
        by_kind.setdefault(block.kind, []).append(str(block.block))
    return "; ".join(
        f"{'block' if len(numbers) == 1 else 'blocks'} {', '.join(numbers)} ({kind})"
        for kind, numbers in by_kind.items()
    )


def rich_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Build a table of two columns without a header."""
    # Text, not str: names and paths may hold brackets, which rich would read as markup.
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Build the same table for a notebook, which brings its own style."""
    cells = "".join(
        f'<tr><th style="text-align: left">{html.escape(name)}</th>'
        f'<td style="text-align: left">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption>{html.escape(title)}</caption><tbody>{cells}</tbody></table>"


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
