"""The result of a comparison: one row per method and sparsity, all measured the same way on the same texts."""

from __future__ import annotations

import csv
import io
import math
from typing import Any, Literal

from pydantic import Field

from structprune.memory import format_bytes
from structprune.results.frozen import Frozen

COMPARISON_VERSION = 1
RESULT_NAME = "comparison.json"


class TextInfo(Frozen):
    """A text that every model is tested on."""

    label: str
    sha256: str


class TextScore(Frozen):
    """One model on one text."""

    text: str
    perplexity: float
    kl_to_dense: float | None
    """Mean KL(dense || pruned) per predicted token, in nats; None for the dense model itself, and where tokens went."""
    top1_agreement: float | None
    num_windows: int
    bits_per_byte: float | None = None
    """What it takes to tell a byte of the text; None in tables of earlier versions."""


class Speed(Frozen):
    """Tokens per second at batch 1, and the same over the dense model's in the same minute."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_speedup: float
    decode_speedup: float
    prompt_tokens: int
    decoded_tokens: int


class DenseRow(Frozen):
    """The model that everything is compared with."""

    parameters: int
    bytes: int
    texts: list[TextScore]


class Cell(Frozen):
    """One method at one sparsity."""

    key: str
    """Hash of everything that decides the result: model, recipe, texts, evaluation."""
    label: str
    method: str
    sparsity: float
    """Asked share of the parameters in `scope`; a method without units takes as many from all of the blocks. Where
    limits decided, the share that went."""
    limits: str = ""
    """Limits that decided in the place of a share, as they were asked for."""
    scope: str
    settings: dict[str, Any]
    """Recipe fields that differ from the defaults."""
    parameters: int
    tokens: int | None = None
    """Tokens that stay, where some went; None where all stay."""
    nonzero_parameters: int | None = None
    """Parameters that are not zero, where single weights went; None where whole units did."""
    bytes: int
    removed_share_of_scope: float
    removed_share_of_blocks: float
    removed_share_of_model: float
    texts: list[TextScore]
    speed: Speed | None
    wall_seconds: float
    """Seconds of pruning, with statistics that another cell had measured already counted in full."""
    shared_seconds: float
    """The part of `wall_seconds` that was another cell's work."""
    planned_peak_bytes: int
    measured_peak_bytes: int
    calibration_windows: int
    compute_dtype: str
    kept: dict[str, list[int]]
    """Kind of unit -> units kept in each block."""
    machine: str
    versions: dict[str, str]

    @property
    def asked(self) -> str:
        """What decided how much goes: limits, or the share."""
        return self.limits or f"{self.sparsity:.4g}"

    @property
    def nonzero(self) -> int:
        """Parameters that are not zero, by which methods of both kinds compare."""
        return self.parameters if self.nonzero_parameters is None else self.nonzero_parameters


COST_COLUMNS = ("wall", "shared", "peak", "planned", "prefill", "decode")


def cost_values(cell: Cell) -> tuple[str, ...]:
    """Format what a cell took, in the order of COST_COLUMNS; empty where there is nothing to say."""
    speed = cell.speed
    return (
        f"{cell.wall_seconds:.0f} s",
        f"{cell.shared_seconds:.0f} s" if cell.shared_seconds else "",
        format_bytes(cell.measured_peak_bytes),
        format_bytes(cell.planned_peak_bytes),
        "" if speed is None else f"{speed.prefill_speedup:.2f}x",
        "" if speed is None else f"{speed.decode_speedup:.2f}x",
    )


class Failure(Frozen):
    """A cell that did not come to an end; it is tried again when the comparison goes on."""

    label: str
    sparsity: float | None
    """None where limits decide."""
    error: str


class Comparison(Frozen):
    """All of it, as written to `comparison.json`. `schema_version` rises when a field changes its meaning."""

    schema_version: int = COMPARISON_VERSION
    model: str
    source_fingerprint: str
    calibration: str
    """Label of the calibration text; perplexities on text of the same domain flatter every method."""
    texts: list[TextInfo]
    seq_len: int
    """Tokens per evaluation window; stride the same."""
    max_windows: int | None
    dtype: str
    device: str
    dense: DenseRow | None = None
    cells: list[Cell] = Field(default_factory=list[Cell])
    failures: list[Failure] = Field(default_factory=list[Failure])

    def excess(self, cell: Cell) -> dict[str, float]:
        """Return by how much the logarithm of the perplexity grew over the dense model's, on each text.

        With fewer tokens it is the loss of as much text as one token of the dense model writes.
        """
        assert self.dense is not None, "it is measured before any cell"
        dense = {score.text: score for score in self.dense.texts}
        return {score.text: _excess(score, dense[score.text], cell.tokens) for score in cell.texts}

    @property
    def has_fewer_tokens(self) -> bool:
        """Whether tokens went in some cell, so that perplexities do not compare and bits per byte do."""
        return any(cell.tokens is not None for cell in self.cells)

    @property
    def has_zeros(self) -> bool:
        """Whether single weights went in some cell, so that parameters and non-zero ones differ."""
        return any(cell.nonzero_parameters is not None for cell in self.cells)

    def ordered(self) -> list[Cell]:
        """Sort the cells by what was asked, shares first, then by quality on the first text."""

        def place(cell: Cell) -> tuple[str, float, float]:
            return cell.limits, 0.0 if cell.limits else cell.sparsity, self.quality(cell.texts[0])

        return sorted(self.cells, key=place)

    def quality(self, score: TextScore) -> float:
        """Return what cells are compared by: the perplexity, or bits per byte where tokens went in some of them."""
        bits = score.bits_per_byte
        return bits if self.has_fewer_tokens and bits is not None else score.perplexity

    def to_csv(self) -> str:
        """Write one line per cell, the dense model first; columns of a text carry its label."""
        stream = io.StringIO()
        columns = ["method", "sparsity", "scope", "parameters", "nonzero_parameters", "bytes"]
        for text in self.texts:
            columns += [f"perplexity {text.label}", f"kl {text.label}", f"top1 {text.label}"]
            columns += [f"bits per byte {text.label}"] if self.has_fewer_tokens else []
        columns += [
            "wall_seconds",
            "shared_seconds",
            "planned_peak_bytes",
            "measured_peak_bytes",
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "prefill_speedup",
            "decode_speedup",
        ]
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        if self.dense is not None:
            row = {"method": "dense", "sparsity": 0.0, "parameters": self.dense.parameters, "bytes": self.dense.bytes}
            row["nonzero_parameters"] = self.dense.parameters
            writer.writerow(row | self._text_columns(self.dense.texts))
        for cell in self.ordered():
            row = {
                "method": cell.label,
                "sparsity": cell.sparsity,
                "scope": cell.scope,
                "parameters": cell.parameters,
                "nonzero_parameters": cell.nonzero,
                "bytes": cell.bytes,
                "wall_seconds": round(cell.wall_seconds, 1),
                "shared_seconds": round(cell.shared_seconds, 1),
                "planned_peak_bytes": cell.planned_peak_bytes,
                "measured_peak_bytes": cell.measured_peak_bytes,
            }
            if cell.speed is not None:
                row |= {
                    "prefill_tokens_per_s": round(cell.speed.prefill_tokens_per_s, 1),
                    "decode_tokens_per_s": round(cell.speed.decode_tokens_per_s, 2),
                    "prefill_speedup": round(cell.speed.prefill_speedup, 3),
                    "decode_speedup": round(cell.speed.decode_speedup, 3),
                }
            writer.writerow(row | self._text_columns(cell.texts))
        return stream.getvalue()

    def _text_columns(self, texts: list[TextScore]) -> dict[str, Literal[""] | float]:
        result: dict[str, Literal[""] | float] = {}
        for score in texts:
            result[f"perplexity {score.text}"] = round(score.perplexity, 4)
            result[f"kl {score.text}"] = "" if score.kl_to_dense is None else round(score.kl_to_dense, 5)
            result[f"top1 {score.text}"] = "" if score.top1_agreement is None else round(score.top1_agreement, 5)
            if self.has_fewer_tokens:
                bits = score.bits_per_byte
                result[f"bits per byte {score.text}"] = "" if bits is None else round(bits, 5)
        return result


def _excess(score: TextScore, dense: TextScore, tokens: int | None) -> float:
    if tokens is None or not score.bits_per_byte or not dense.bits_per_byte:
        return math.log(score.perplexity / dense.perplexity)
    return math.log(dense.perplexity) * (score.bits_per_byte / dense.bits_per_byte - 1)
