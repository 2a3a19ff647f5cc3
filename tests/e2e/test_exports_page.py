"""The tables of docs/exports.md are what happens: every family pruned in every way, every output loaded or refused.

`STRUCTPRUNE_REWRITE=1 python -m pytest tests/e2e/test_exports_page.py` writes the tables anew.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import GELU, SIZES, UNIFORM, assert_same, stock_checkpoint
from transformers import LlamaConfig, MistralConfig, OPTConfig, Qwen3Config, Qwen3MoeConfig

from structprune import Recipe, prune
from structprune.api import export
from structprune.architectures import FAMILIES
from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.architectures.stock.loading import load_model
from structprune.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

PAGE = Path(__file__).parents[2] / "docs" / "exports.md"
START, END = "<!-- made by tests/e2e/test_exports_page.py -->", "<!-- end -->"

# Row -> config. Every family once, and what makes a difference for the formats.
MODELS: dict[str, Callable[[], Any]] = {
    "gemma2": UNIFORM["gemma2"][0],
    "gemma3_text": UNIFORM["gemma3"][0],
    "gpt2": UNIFORM["gpt2"][0],
    "gpt_neox": UNIFORM["gpt_neox"][0],
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "opt": lambda: OPTConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    ),
    "phi3": UNIFORM["phi3"][0],
    "qwen2": UNIFORM["qwen2"][0],
    "qwen3": UNIFORM["qwen3"][0],
    "qwen3, tied": lambda: Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    ),
}
# Without heads of their own size in the config, and with a step of widths.
MLP_ONLY = ("gpt2", "gpt_neox", "opt")
STEPS = {"qwen3_moe": 8}
COMMON: dict[str, Any] = {"sparsity": 0.3, "num_samples": 4, "seq_len": 32, "dtype": "float32"}
# Heading -> settings of the run.
STRUCTURES: dict[str, dict[str, Any]] = {
    "Equal widths, fewer MLP channels (`--structure uniform`)": {"method": "magnitude", "structure": "uniform"},
    "Equal widths, fewer heads (`--structure uniform --scope attention`)": {
        "method": "wanda-sp",
        "structure": "uniform",
        "scope": "attention",
        "sparsity": 0.4,
    },
    "Fewer blocks (`--method depth`)": {"method": "depth"},
    "Fewer experts (`--method reap`)": {"method": "reap"},
    "Uneven widths (`--structure per-layer`)": {
        "method": "structprune",
        "structure": "per-layer",
        "scope": "all",
        "protect_first": 1,
    },
    "Uneven widths, some blocks without attention or MLP (`--allow-block-removal`)": {
        "method": "structprune",
        "structure": "per-layer",
        "scope": "all",
        "sparsity": 0.7,
        "allow_block_removal": True,
    },
    "Uneven widths of values (`--method fasp --scope attention --head-units value-channel`)": {
        "method": "fasp",
        "scope": "attention",
        "head_units": "value-channel",
    },
    "Narrower residual stream, with shortcuts (`--method slicegpt`)": {"method": "slicegpt", "sparsity": 0.1},
}
COLUMNS = ("transformers", "llama.cpp", "vLLM, native", "vLLM, Transformers backend", "SGLang")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One answer: `word`, and why."""

    word: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One family in one structure."""

    cells: Mapping[str, Cell]
    claims: Mapping[str, str]
    """Runtime -> what the report of the run says, `yes`, `no` or `unverified`; nothing where the run was refused."""


@functools.cache
def source_of(model: str, root: Path) -> Path:
    return stock_checkpoint(MODELS[model](), root / model.replace(", ", "-"))[0]


@pytest.fixture(scope="module")
def row_of(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[[str, str], Row]:
    """The row of a model and a structure, made once."""
    root = tmp_path_factory.mktemp("page")

    @functools.cache
    def make(model: str, heading: str) -> Row:
        settings = COMMON | {"calibration": str(text_file)} | STRUCTURES[heading]
        if settings["method"] not in ("depth", "reap"):
            settings["multiple_of"] = STEPS.get(model, 4 if settings["method"] == "slicegpt" else 1)
        if model in MLP_ONLY and settings.get("scope") == "all" and not settings.get("allow_block_removal"):
            settings["scope"] = "mlp"
        # Not the model's name: llama.cpp looks for certain tokens where it finds "phi3" in it.
        output = root / f"{list(MODELS).index(model)}-{list(STRUCTURES).index(heading)}"
        try:
            report = prune(source_of(model, root), Recipe.build(**settings), output)
        except UnsupportedError as error:
            return Row(cells={"transformers": Cell(word="refused", reason=shown(error))}, claims={})
        # The run's own check: stock code loaded the directory and computed the run's logits.
        assert report.reload.mode == "whole"
        check_structure(heading, output)
        cells = {"transformers": Cell(word="pass"), "llama.cpp": llama_cell(model, output)}
        for claim in report.runtimes:
            if claim.runtime not in cells:
                word = {"yes": "expected", "no": "no", "unverified": "not known"}[claim.loads]
                basis = f" ({claim.basis})" if claim.basis else ""
                cells[claim.runtime] = Cell(word=word, reason=claim.reason + basis)
        return Row(cells=cells, claims={claim.runtime: claim.loads for claim in report.runtimes})

    return make


def check_structure(heading: str, output: Path) -> None:
    """The run made what the heading says."""
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    settings = STRUCTURES[heading]
    assert (REMOVED_ENTRY in config) is bool(settings.get("allow_block_removal"))
    if settings.get("structure") == "per-layer" and REMOVED_ENTRY not in config:
        blocks = config["per_layer_config"].values()
        assert len({tuple(block.items()) for block in blocks}) > 1, "the widths are even"


def llama_cell(model: str, output: Path) -> Cell:
    try:
        result = export(output, output.with_suffix(".gguf"))
    except UnsupportedError as error:
        return Cell(word="refused", reason=shown(error))
    expected = load_model(output, torch.device("cpu"), torch.float32)
    assert_same(output.with_suffix(".gguf"), expected, atol=5e-3 if model.startswith(GELU) else 1e-4)
    return Cell(word=f"pass, `{result.architecture}`")


def shown(error: UnsupportedError) -> str:
    """The refusal without the place, which is one of this machine."""
    return str(UnsupportedError(error.what, got=error.got, wanted=error.wanted, do=error.do))


def test_every_family_has_a_row() -> None:
    assert {config().model_type for config in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_claimed_is_what_happens(model: str, row_of: Callable[[str, str], Row]) -> None:
    """What `plan` and the report say of the runtimes that run here."""
    for heading in STRUCTURES:
        row = row_of(model, heading)
        for runtime in ("transformers", "llama.cpp"):
            if row.claims:
                passed = row.cells[runtime].word.startswith("pass")
                assert row.claims[runtime] == ("yes" if passed else "no"), (heading, runtime, row.cells[runtime])


def test_the_page_is_what_happens(row_of: Callable[[str, str], Row]) -> None:
    reasons: dict[str, int] = {}
    lines: list[str] = []
    for heading in STRUCTURES:
        lines += [f"### {heading}", "", "| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for model in MODELS:
            cells = row_of(model, heading).cells
            texts = [numbered(cells[name], reasons) if name in cells else "" for name in COLUMNS]
            lines.append(f"| {model} | " + " | ".join(texts) + " |")
        lines.append("")
    lines += ["### Reasons", "", *(f"{number}. {reason}" for reason, number in reasons.items())]
    made = "\n".join(lines)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    found, _, after = rest.partition(END)
    if os.environ.get("STRUCTPRUNE_REWRITE") == "1":
        PAGE.write_text(f"{before}{START}\n\n{made}\n\n{END}{after}", encoding="utf-8")
        return
    assert found.strip() == made, "docs/exports.md is not what the code does: see the head of this file"


def numbered(cell: Cell, reasons: dict[str, int]) -> str:
    """The cell with the number of its reason, which is new where the reason is."""
    if not cell.reason:
        return cell.word
    return f"{cell.word} ({reasons.setdefault(cell.reason, len(reasons) + 1)})"
