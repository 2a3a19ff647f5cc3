"""The tables of docs/exports.md are what happens: every family pruned in every way, every output loaded or refused.

`STRUCTPRUNE_REWRITE=1 python -m pytest tests/e2e/test_exports_page.py` writes the tables anew.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import GELU, assert_same, stock_checkpoint

from structprune import prune
from structprune.api import export
from structprune.architectures import FAMILIES
from structprune.architectures.stock.loading import load_model
from structprune.errors import UnsupportedError
from support.page import MODELS, STRUCTURES, check_structure, folder_of, recipe_of

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

PAGE = Path(__file__).parents[2] / "docs" / "exports.md"
START, END = "<!-- made by tests/e2e/test_exports_page.py -->", "<!-- end -->"

EXPORTED = "vLLM, exported"
COLUMNS = ("transformers", "llama.cpp", "vLLM, native", "vLLM, Transformers backend", EXPORTED, "SGLang")
WORDS = {"yes": "expected", "no": "no", "unverified": "not known"}


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
        output = root / folder_of(model, heading)
        try:
            report = prune(source_of(model, root), recipe_of(model, heading, text_file), output)
        except UnsupportedError as error:
            return Row(cells={"transformers": Cell(word="refused", reason=shown(error))}, claims={})
        # The run's own check: stock code loaded the directory and computed the run's logits.
        assert report.reload.mode == "whole"
        check_structure(heading, output)
        cells = {"transformers": Cell(word="pass"), "llama.cpp": llama_cell(model, output)}
        claims = {claim.runtime: claim for claim in report.runtimes}
        for name, claim in claims.items():
            if name not in cells:
                cells[name] = cell_of(claim)
        if EXPORTED in claims:
            cells[EXPORTED] = exported_cell(cells[EXPORTED], output)
        return Row(cells=cells, claims={name: claim.loads for name, claim in claims.items()})

    return make


def cell_of(claim: Any) -> Cell:
    """What is claimed of a runtime that does not run here; what was run elsewhere passes, as the class it names."""
    if (claim.loads, claim.basis) == ("yes", "checked"):
        found = re.match(r"as (\w+)", claim.reason)
        return Cell(word=f"pass, `{found[1]}`") if found else Cell(word="pass", reason=claim.reason)
    basis = f" ({claim.basis})" if claim.basis == "by its source" else ""
    return Cell(word=WORDS[claim.loads], reason=claim.reason + basis)


def exported_cell(claimed: Cell, output: Path) -> Cell:
    """What is claimed of the exported directory, which test_vllm.py loads, or why there is none."""
    try:
        export(output, output.with_suffix(".vllm"), format="vllm")
    except UnsupportedError as error:
        return Cell(word="refused", reason=shown(error))
    return claimed


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
        for runtime in ("transformers", "llama.cpp", EXPORTED):
            if runtime in row.claims:
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
