"""Several models measured on the same texts, in columns: what a step of compression took, and what it left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from structprune.memory import format_bytes
from structprune.results.frozen import Frozen


class ModelColumn(Frozen):
    """One model's size, quality and speed."""

    name: str
    parameters: int
    file_bytes: int
    perplexities: Mapping[str, float]
    """Text -> perplexity."""
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    says: str
    """Greedy answer to the common prompt."""


def column_rows(columns: Sequence[ModelColumn]) -> list[tuple[str, ...]]:
    """Show (what, value of each column) in rows; from the second column on with the change from the first."""
    texts = list(columns[0].perplexities)
    measures: list[tuple[str, Callable[[ModelColumn], float], Callable[[float], str]]] = [
        ("parameters", lambda one: one.parameters, lambda value: f"{value:,.0f}"),
        ("bytes on disk", lambda one: one.file_bytes, format_bytes),
        *((f"perplexity, {text}", lambda one, text=text: one.perplexities[text], "{:.2f}".format) for text in texts),
        ("prefill, tokens/s", lambda one: one.prefill_tokens_per_s, "{:,.0f}".format),
        ("decode, tokens/s", lambda one: one.decode_tokens_per_s, "{:,.1f}".format),
    ]
    return [(name, *_compared([value(one) for one in columns], show)) for name, value, show in measures]


def _compared(values: Sequence[float], show: Callable[[float], str]) -> list[str]:
    first, *others = values
    return [show(first), *(f"{show(value)} ({value / first - 1:+.1%})" for value in others)]
