"""The model card of an output: README.md with the front matter that the hub reads. Plain text from the report.

Names of files stay names: the card is made to be published, and the paths of the machine are nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from structprune.checkpoint.folder import MODULES_NAME
from structprune.checkpoint.readme import is_text
from structprune.files import plain_name
from structprune.memory import format_bytes
from structprune.recipe.units import ResolvedUnits
from structprune.report.zeros import description, introduction
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.results.summary import around_rows, beginning, stored_in
from structprune.results.texts import Perplexities
from structprune.texts import shown_texts
from structprune.types import HeadUnits
from structprune.vocabulary.kept import KEPT_NAME

# Entries of the source's front matter that hold for what is made of it.
_CARRIED = ("license", "license_name", "license_link", "language", "datasets")
_EMBEDDING_LIBRARY = "sentence-transformers"


def model_card(report: PruneReport, source: Mapping[str, Any], hub_id: str | None) -> str:
    """Render the text of README.md.

    `source` is what `source_metadata` found, `hub_id` the source's name on the hub or None.
    """
    front = {name: source[name] for name in _CARRIED if source.get(name)}
    base = hub_id or source.get("base_model")
    if base:
        front["base_model"] = base
    front |= _for_the_hub(report, source)
    name = plain_name(Path(report.output).name)
    origin = plain_name(report.source if hub_id else Path(report.source).name)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        _introduction(report, origin),
        *_licence(front, source),
        "## Before and after",
        _figures(report),
        "## What was removed",
        _removed(report.blocks, report.recipe.head_units if isinstance(report.recipe, ResolvedUnits) else None)
        if report.zeros is None
        else description(report.zeros, report.blocks),
        "## How to load it",
        *_loading(report, name),
        "## How it was made",
        _making(report),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(report: PruneReport, origin: str) -> str:
    version, source = report.versions["structprune"], f"`{origin}`{_adapter(report)}"
    if report.zeros is not None:
        return f"{source}, {introduction(report.zeros)}. Made by structprune {version}, method `{report.method}`."
    return (
        f"{source}, made smaller by structured pruning with structprune {version}: method `{report.method}`, "
        f"{report.size.removed_share_of_model:.1%} of the parameters removed."
    )


def _embeds(report: PruneReport) -> bool:
    """Whether the modules of an embedding model were carried over."""
    return report.files is not None and MODULES_NAME in (*report.files.carried, *report.files.rewritten)


def _for_the_hub(report: PruneReport, source: Mapping[str, Any]) -> dict[str, Any]:
    """Say under what the hub lists the model: text generation, or what the source embeds for."""
    how = "structured-pruning" if report.zeros is None else "sparse"
    tags = ["pruned", how, "structprune", report.method]
    if not _embeds(report):
        kind = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    else:
        tags.append(_EMBEDDING_LIBRARY)
        task = source.get("pipeline_tag")
        kind = {"library_name": _EMBEDDING_LIBRARY, "pipeline_tag": task if is_text(task) else "feature-extraction"}
    return {**kind, "tags": list(dict.fromkeys(tags))}


def _adapter(report: PruneReport) -> str:
    return "" if report.adapter is None else f" with the adapter `{plain_name(Path(report.adapter.path).name)}` merged"


def _licence(front: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    if source.get("unreadable"):
        return ["The front matter of the source's README could not be read: look there for its licence."]
    if "license" not in front:
        return ["The source states no licence in its README's front matter: look there before you share this model."]
    return []


def _figures(report: PruneReport) -> str:
    size, text, held_out, zeros = report.size, report.calibration, report.held_out, report.zeros
    rows: list[tuple[str, int, Perplexities]] = [
        ("perplexity of the calibration text, in-sample", text.perplexity_windows, text)
    ]
    if held_out is not None:
        several = [(f"the same of {plain_name(t.label)}", t.num_windows, t) for t in held_out.texts]
        rows[:0] = [
            ("perplexity of held-out windows of the calibration text", held_out.num_windows, held_out),
            *several,
        ]
    return _table(
        ("", "before", "after"),
        [
            *(
                (
                    f"{name} ({windows} x {text.seq_len} tokens)",
                    f"{one.dense_perplexity:.2f}",
                    f"{one.pruned_perplexity:.2f}",
                )
                for name, windows, one in rows
            ),
            *_token_rows(report),
            ("parameters", f"{size.parameters_before:,}", f"{size.parameters_after:,}"),
            *([] if zeros is None else [("of them not zero", "", f"{zeros.nonzero_parameters:,}")]),
            *((name, "", value) for name, value in around_rows(size)),
            (
                "weight files",
                format_bytes(size.bytes_before),
                f"{format_bytes(size.bytes_after)}{stored_in(size)}",
            ),
        ],
    )


def _token_rows(report: PruneReport) -> list[tuple[str, str, str]]:
    """List what a smaller vocabulary changes; nothing where all tokens stay."""
    tokens = report.vocabulary
    if tokens is None:
        return []
    rows = [("tokens", f"{tokens.before:,}", f"{tokens.after:,}")]
    if tokens.parameters_before is not None:
        left = tokens.parameters_before - tokens.parameters
        rows.append(("parameters of their rows", f"{tokens.parameters_before:,}", f"{left:,}"))
    if tokens.merged is not None and tokens.merged.changed:
        rows.append(("head rows that carry missing tokens", "", f"{tokens.merged.num_rows:,}"))
    if report.held_out is not None and (bits := report.held_out.bits_per_byte) is not None:
        name = "bits per byte of the held-out windows, with the tokens that stay"
        rows.append((name, f"{bits[0]:.4f}", f"{bits[1]:.4f}"))
    return rows


# The list is beside the card, and no setting for making another.
_OF_TOKENS = ("vocabulary", "vocabulary_text", "drop_reserve", "merge_rows")
# What the recipe's `head_units` counts.
_HEAD_UNITS: Mapping[HeadUnits, str] = {
    "kv-group": "KV groups of heads",
    "query-head": "query heads of every KV head",
    "value-channel": "value channels of all KV heads together",
}


def _removed(blocks: Sequence[BlockReport], head_units: HeadUnits | None) -> str:
    """Describe what was removed: one line per kind where all blocks are alike, else a table of the blocks."""
    kinds = list(dict.fromkeys(block.kind for block in blocks))
    if not kinds:
        return "Tokens; no unit of any block."
    if kinds == ["block"]:
        gone = [str(block.block) for block in blocks if block.kept_units == 0]
        return f"Blocks {', '.join(gone) or 'none'} of {len(blocks)}, counted from 0."
    if any(block.status == "sliced" for block in blocks):
        left = f"{blocks[0].kept_units} of {blocks[0].num_units}"
        return f"Dimensions of the residual stream: {left} are left in every block."
    units = {"mlp": "MLP channels", "expert": "experts"}
    units |= {"attention": _HEAD_UNITS[head_units]} if head_units else {}
    by_kind = {kind: [block for block in blocks if block.kind == kind] for kind in kinds}
    if all(len({(b.kept_units, b.num_units) for b in part}) == 1 for part in by_kind.values()):
        lines = [
            f"- {units[kind]}: {part[0].kept_units} of {part[0].num_units} are left in every block"
            for kind, part in by_kind.items()
        ]
        return "\n".join(lines)
    kept = {(block.kind, block.block): f"{block.kept_units} of {block.num_units}" for block in blocks}
    rows = [
        (str(index), *(kept.get((kind, index), "") for kind in kinds))
        for index in sorted({block.block for block in blocks})
    ]
    return "What is left:\n\n" + _table(("block", *(units[kind] for kind in kinds)), rows)


_CAUSAL = "AutoModelForCausalLM"
# Runtime -> the command that loads the directory; the flag is added where a modelling file has to run.
_COMMANDS = {
    "vLLM, native": ("vLLM", "vllm serve {name}"),
    "vLLM, Transformers backend": ("vLLM", "vllm serve {name} --model-impl transformers"),
    "vLLM, exported": (
        "vLLM, in a class of its own",
        "structprune export {name} --format vllm -o {name}-vllm\nvllm serve {name}-vllm",
    ),
    "SGLang": ("SGLang", "python -m sglang.launch_server --model-path {name}"),
    "llama.cpp": ("llama.cpp", "structprune export {name} --format gguf -o {name}.gguf"),
}


def _loading(report: PruneReport, name: str) -> list[str]:
    own = any(s.runtime == "transformers" and "trust_remote_code" in s.reason for s in report.runtimes)
    model, reads = (
        ("AutoModelForImageTextToText", "Processor") if report.size.parameters_around else (_CAUSAL, "Tokenizer")
    )
    code = [
        f"```python\nfrom transformers import {model}, Auto{reads}\n\n"
        f'model = {model}.from_pretrained("{name}"{", trust_remote_code=True" if own else ""})\n'
        f'{reads.lower()} = Auto{reads}.from_pretrained("{name}")\n```'
    ]
    if _embeds(report):
        code.append(
            "For embeddings, with the modules that lie beside it (not run here):\n\n"
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("{name}"{", trust_remote_code=True" if own else ""})\n```'
        )
    if own:
        code.append("The code that this allows, `modeling_structprune.py`, consists of stock classes and little more.")
    shown: set[str] = set()
    for support in report.runtimes:
        title, command = _COMMANDS.get(support.runtime, ("", ""))
        if support.loads != "yes" or not title or title in shown:
            continue
        shown.add(title)
        flag = " --trust-remote-code" if own and title.startswith("vLLM") else ""
        read = "" if support.basis == "checked" else " (by its source, not run)"
        code.append(f"{title}{read}:\n\n```sh\n{command.format(name=name)}{flag}\n```")
    rows = [(s.runtime, s.loads + (f", {s.basis}" if s.basis else ""), s.reason) for s in report.runtimes]
    return [*code, _table(("runtime", "loads it", "how, or why not"), rows)]


def _making(report: PruneReport) -> str:
    recipe = report.recipe.model_dump(
        mode="json",
        exclude={"memory", "device", "device_memory", "max_shard_size", "reload_check", "latency_table", *_OF_TOKENS},
    )
    recipe |= {
        "calibration": plain_name(shown_texts(report.recipe.calibration)),
        "merge_adapter": plain_name(Path(recipe["merge_adapter"]).name),
    }
    text = yaml.safe_dump({name: value for name, value in recipe.items() if value is not None}, sort_keys=False)
    calibration, check = report.calibration, report.reload
    checked = "It was not loaded for a check."
    if check.relative_difference is not None:
        checked = (
            "A fresh process loaded it with stock code"
            f"{'' if check.mode == 'whole' else ', module by module'}: the logits at {check.num_positions} positions "
            f"differ by {check.relative_difference:.1e} (relative) from those of the pruning run."
        )
    commit = f"Made from commit `{report.source_commit}` of its source. " if report.source_commit else ""
    tokens = "" if report.vocabulary is None else f"The tokens that stay are in `{KEPT_NAME}`. "
    return (
        f"{commit}{tokens}Calibrated on {calibration.num_windows} windows of {calibration.seq_len} tokens, "
        f"{beginning(calibration.start)} ({plain_name(calibration.description)}). {checked} "
        f"{'Kept indices' if report.zeros is None else 'Zeros of every matrix'} are in `pruning_manifest.json`, all "
        "figures in `pruning_report.json`.\n\n"
        f"The recipe, resolved:\n\n```yaml\n{text}```"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
