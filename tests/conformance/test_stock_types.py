"""The table of docs/decoders.md: what becomes of every causal type of stock transformers, as a tiny random model.

`STRUCTPRUNE_REWRITE=1 python -m pytest -m slow tests/conformance/test_stock_types.py` writes the table anew.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from structprune.architectures import FAMILIES
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import StructPruneError
from support.generated import check_table
from support.traced import DESCRIBED, TRACED, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PAGE = Path(__file__).parents[2] / "docs" / "decoders.md"
START, END = "<!-- made by tests/conformance/test_stock_types.py -->", "<!-- end -->"
TYPES = [name for name, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING]
_MOST_PARAMETERS = 30_000_000


def outcome(model_type: str) -> tuple[str, str, str]:
    """How the type is described, which units can go, and the reason where that is none."""
    if model_type in FAMILIES:
        return "family file", "", ""
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in skeleton.parameters()) > _MOST_PARAMETERS:
            return "not tried", "", "its config does not become small by the usual entries"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            return described(Path(directory), model_type)
    except StructPruneError:
        raise
    except Exception as error:
        # Configs want more than the usual entries, and say so by many types.
        return "not tried", "", f"its config wants more than the usual entries ({type(error).__name__})"


def described(directory: Path, model_type: str) -> tuple[str, str, str]:
    try:
        stock = StockModel(CheckpointReader(directory))
    except StructPruneError as error:
        said = re.sub(r"^.* has no family file, and ", "", error.what)
        got = " ".join(str(error.got or "").split())[:120]
        return "refused", "", said + (f": {got}" if got else "")
    units: list[str] = []
    reasons: list[str] = []
    for group in stock.groups:
        name = "channels" if group.kind == "mlp" else "KV groups"
        if group.config_fields:
            units.append(name)
        else:
            reasons.append(f"{name}: {(group.held or 'no config entry says fewer').partition(', whose inputs ')[0]}")
    tested = "traced and tested" if model_type in (*DESCRIBED, *TRACED) else "traced"
    # A mixture has as many groups as experts.
    units, reasons = list(dict.fromkeys(units)), list(dict.fromkeys(reasons))
    return tested, ", ".join(units) or "whole sublayers only", "; ".join(reasons).replace("|", "/")


def test_the_table_is_what_becomes_of_every_type() -> None:
    found = {model_type: outcome(model_type) for model_type in sorted(TYPES)}
    counts = Counter(how for how, _, _ in found.values())
    summary = ", ".join(f"{count} {how}" for how, count in sorted(counts.items(), key=lambda each: -each[1]))
    rows = [f"| {' | '.join([model_type, *cells])} |" for model_type, cells in found.items()]
    made = [
        f"{len(found)} types: {summary}.",
        "",
        "| `model_type` | described by | units | what cannot, and why |",
        "|---|---|---|---|",
        *rows,
    ]
    check_table(PAGE, START, END, made)
