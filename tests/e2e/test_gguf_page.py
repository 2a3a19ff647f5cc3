"""The tables of docs/gguf.md are the descriptions, and the tests that each of them has.

`STRUCTPRUNE_REWRITE=1 python -m pytest tests/e2e/test_gguf_page.py` writes them anew.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from test_gguf import UNIFORM

from structprune.architectures.gguf.table import GGUF_FAMILIES, READ_AS
from support.generated import check_table
from support.gguf_models import MODELS, REFUSED, UNDESCRIBED, WRITTEN_AS_ANOTHER

PAGE = Path(__file__).parents[2] / "docs" / "gguf.md"
START, END = "<!-- made by tests/e2e/test_gguf_page.py{} -->", "<!-- end -->"
# Types with a family file, and how many models of each test_gguf.py writes and test_gguf_source.py reads.
CHECKED = Counter(
    [*(config().model_type for config, _ in UNIFORM.values()), *(model_type for model_type, _, _ in MODELS.values())]
)


def test_every_type_is_loaded_by_a_test() -> None:
    assert set(CHECKED) | set(WRITTEN_AS_ANOTHER) >= set(GGUF_FAMILIES)


def test_the_table_of_types() -> None:
    rows = ["| GGUF architecture | `model_type` | read | written | checked against llama.cpp |", "|---" * 5 + "|"]
    for architecture in sorted(READ_AS):
        for model_type in READ_AS[architecture]:
            family = GGUF_FAMILIES[model_type]
            read = "yes"
            if model_type in WRITTEN_AS_ANOTHER:
                read = f"as `{WRITTEN_AS_ANOTHER[model_type][0]}`"
            elif model_type in UNDESCRIBED:
                read = "yes; [tracing](decoders.md) does not describe it for pruning"
            uneven = "" if family.uneven is None else f", uneven widths as `{family.uneven.architecture}`"
            checked = CHECKED[model_type] or 1
            models = f"{checked} model{'s' if checked > 1 else ''}"
            rows.append(f"| {architecture} | `{model_type}` | {read} | yes{uneven} | {models} |")
    check_table(PAGE, START.format(""), END, rows)


def test_the_table_of_refusals() -> None:
    assert not set(REFUSED) & set(READ_AS)
    rows = [f"| {name} | {REFUSED[name]} |" for name in sorted(REFUSED)]
    check_table(PAGE, START.format(": refused"), END, ["| GGUF architecture | why |", "|---|---|", *rows])
