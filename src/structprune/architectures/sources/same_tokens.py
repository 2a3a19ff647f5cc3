"""Whether two directories hold the same tokenizer: the ids of a text that tokenizers are known to read differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.errors import CheckpointError

PROBE_TEXT = " ".join(
    (
        "In 1984, 12345.678 of 9,876,543 (3.14e-10)  two  spaces\tand a tab;\n\nIt's we'll THEY'RE",
        # Accents, composed and not; then Russian, Greek, Arabic, Hebrew, Hindi, Chinese, Japanese, Korean, Thai.
        "\u00e9t\u00e9 e\u0301te\u0301 na\u00efve stra\u00dfe",
        "\u041f\u0440\u0438\u0432\u0435\u0442 \u03ba\u03cc\u03c3\u03bc\u03b5",
        "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
        "\u4f60\u597d \u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
        # Beyond the basic plane, joined and alone; code, line ends and a hard space.
        "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
        "def f(x):\n    return x ** 2  # x\u00b2 \u2264 \u221e\r\n    \u00a0end ",
    )
)
"""Digits, spaces, capitals, accents, scripts and code: what tokenizers are known to read differently."""


def check_same_tokens(source: Path, output: Path, config: PretrainedConfig | None = None) -> None:
    """Raise CheckpointError unless both directories' tokenizers give the same ids, or neither holds one.

    `config`: the source's, where entries of its file were corrected.
    """
    wanted, got = _probe(source, config), _probe(output, None)
    if wanted != got:
        raise CheckpointError(
            "the output's tokenizer reads texts otherwise than the source's",
            where=str(output),
            got=_shown(got, wanted),
            wanted=_shown(wanted, got),
            do="report this: a file of the tokenizer was not carried over",
        )


def _probe(directory: Path, config: PretrainedConfig | None) -> dict[str, Any] | None:
    """Return what the tokenizer makes of the probe text, part by part; None without a tokenizer."""
    try:
        tokenizer = TextEncoder(directory, config=config).tokenizer
    except CheckpointError:
        return None
    special = " ".join(map(str, tokenizer.all_special_tokens))
    text = f"{PROBE_TEXT}{special} end{special}"
    return {
        "class": type(tokenizer).__name__,
        "ids": tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        "ids with special tokens": tokenizer(text, verbose=False)["input_ids"],
        "special tokens": tokenizer.special_tokens_map,
        "chat template": getattr(tokenizer, "chat_template", None),
    }


def _shown(shown: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """Show the first part in which the two differ."""
    if shown is None or other is None:
        return "no tokenizer" if shown is None else f"a {shown['class']}"
    name = next(name for name, value in shown.items() if other[name] != value)
    return f"{name} {str(shown[name])[:200]}"
