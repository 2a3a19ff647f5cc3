"""Rotary positions of a GGUF file as transformers' `rope_parameters`.

llama.cpp turns pair i of a head at position p by p / (factor_i * s * base**(2i/d)) and multiplies by m: factor_i of
`rope_freqs.weight` or of the long and short factors, s of `rope.scaling.factor`, m of `rope.scaling.attn_factor`; YaRN
mixes s and 1 between two frequencies and has a factor of its own (ggml's rope_yarn). A file has no name for LLaMA 3's
scaling, only its factors: the parameters are found from them and checked to give them again. What has no name in
transformers is written as `longrope` with the same factors for all lengths, which computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from structprune.architectures.gguf.fields import GgufFields, shortest
from structprune.checkpoint.gguf_file import dequantiser, read_rows
from structprune.errors import CheckpointError, UnsupportedError

# Relative, of factors that were computed in float32.
_TOLERANCE = 1e-5
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(
    fields: GgufFields, head_size: int, context: int, *, partial: bool, log_multiplier: bool, factors: Sequence[str]
) -> dict[str, Any]:
    """Read full attention's `rope_parameters`; `factors` names the tensors that the architecture reads, if any.

    `partial`: it may turn a part of each head only; `log_multiplier`: it reads a factor of YaRN's own scale.
    Raises UnsupportedError for a scaling that transformers does not have, CheckpointError for factors of another
    number.
    """
    rotated = fields.integer("rope.dimension_count", head_size, most=head_size)
    if rotated % 2 or (rotated != head_size and not partial):
        raise UnsupportedError(
            "only a part of each head is turned, which this architecture does not have",
            where=fields.where,
            got=f"rope.dimension_count {rotated}, heads of {head_size}",
        )
    base = fields.number("rope.freq_base", 10000.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if partial:
        parameters["partial_rotary_factor"] = rotated / head_size
    kind = fields.text("rope.scaling.type", "linear")
    scale = fields.number("rope.scaling.factor", 0.0) or fields.number("rope.scale_linear", 0.0) or 1.0
    fields.number("rope.scale_linear", 0.0)
    if not scale > 0:
        raise CheckpointError("the scaling of the rotary positions is not positive", where=fields.where, got=scale)
    original = fields.integer("rope.scaling.original_context_length", context)
    attention = fields.number("rope.scaling.attn_factor", 1.0)
    if kind == "none":
        scale = 1.0
    if kind == "yarn":
        if any(fields.has_tensor(name) for name in factors):
            raise _unknown(fields, "yarn together with factors of each frequency")
        return parameters | _yarn(scale, original, attention) | (_own_yarn(fields) if log_multiplier else {})
    if kind not in ("none", "linear", "longrope"):
        raise _unknown(fields, kind)
    found = {name: _factors(fields, name, rotated // 2) for name in factors if fields.take_tensor(name)}
    return parameters | _scaled(found, scale, attention, original, context, base, rotated)


def _unknown(fields: GgufFields, kind: str) -> UnsupportedError:
    return UnsupportedError(
        "this scaling of the rotary positions cannot be read from a GGUF file",
        where=fields.where,
        got=kind,
        wanted="none, linear, yarn, longrope, or factors as LLaMA 3 has them",
        do="start from the model's Hugging Face checkpoint",
    )


def _yarn(scale: float, original: int, attention: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": scale,
        "original_max_position_embeddings": original,
        **_BETAS,
    }
    if attention != 1.0:
        values["attention_factor"] = attention * (0.1 * math.log(scale) + 1.0)
    return values


def _own_yarn(fields: GgufFields) -> dict[str, Any]:
    """Read what few architectures have of YaRN in the file: its frequencies, and the scale that divides its own."""
    values = {name: fields.number(f"rope.scaling.yarn_{name}", usual) for name, usual in _BETAS.items()}
    multiplier = fields.number("rope.scaling.yarn_log_multiplier", 0.0)
    return values | ({"mscale": 1.0, "mscale_all_dim": multiplier} if multiplier else {})


def _factors(fields: GgufFields, name: str, count: int) -> list[float]:
    info = fields.header.tensors[name]
    if info.shape != (count,):
        raise CheckpointError(
            f"tensor {name!r} has another number of factors than a head has frequencies",
            where=fields.where,
            got=list(info.shape),
            wanted=[count],
        )
    values = dequantiser(info)(read_rows(info, 0, 1)).reshape(-1)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise CheckpointError(f"tensor {name!r} holds factors that are not positive", where=fields.where)
    return [shortest(float(value)) for value in values]


def _scaled(
    factors: dict[str, list[float]],
    scale: float,
    attention: float,
    original: int,
    context: int,
    base: float,
    rotated: int,
) -> dict[str, Any]:
    """Return the entries for factors of each frequency, one for all, and one of attention, any of which may be 1."""
    both = {name: [scale * value for value in values] for name, values in factors.items()}
    if "rope_factors_long.weight" in both and "rope_factors_short.weight" in both:
        return _longrope(
            both["rope_factors_short.weight"], both["rope_factors_long.weight"], attention, original, context
        )
    if not both and attention == 1.0:
        return {} if scale == 1.0 else {"rope_type": "linear", "factor": scale}
    values = next(iter(both.values()), [scale] * (rotated // 2))
    if attention == 1.0 and scale == 1.0:
        if all(value == 1.0 for value in values):
            return {}
        named = _llama3(np.array(values), base, original)
        if named is not None:
            return named
    return _longrope(values, values, attention, original, context)


def _longrope(short: list[float], long: list[float], attention: float, original: int, context: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "factor": max(1.0, context / original),
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def _llama3(factors: np.ndarray[Any, Any], base: float, context: int) -> dict[str, Any] | None:
    """Return LLaMA 3's parameters that give these factors, or None.

    1 / factor_i = 1/F + s_i (1 - 1/F) with s_i = clip(a f_i - b, 0, 1) for the frequency f_i, in turns per position:
    F is the largest factor, a and b follow from the factors between. The low frequency factor is 1, as in every model,
    for it and the original length say one thing together; the high one is 1 + 1/b, the length a / b.
    """
    count = len(factors)
    frequencies = base ** (-np.arange(count) / count) / (2 * math.pi)
    whole = float(factors.max())
    between = (factors > 1 + _TOLERANCE) & (factors < whole * (1 - _TOLERANCE))
    share = (1 / factors[between] - 1 / whole) / (1 - 1 / whole) if whole > 1 else factors[:0]
    candidates: list[tuple[float, float]] = []
    if len(share) >= 2:
        slope, shift = np.polyfit(frequencies[between], share, 1)
        high = 1 - 1 / shift if shift < 0 else 4.0
        candidates = [(high, slope * (high - 1)), (4.0, slope * 3)]
    elif len(share) == 1:
        candidates = [(4.0, float((1 + 3 * share[0]) / frequencies[between][0]))]
    # Without a frequency between, any length by which one falls on either side.
    ones = factors <= 1 + _TOLERANCE
    if not len(share) and ones.any():
        candidates = [(4.0, float(4.0 / frequencies[ones].min())), (2.0, float(2.0 / frequencies[ones].min()))]
    for high, length in [*((round(high, 3), round(length)) for high, length in candidates), *candidates]:
        if high > 1 and length >= 1 and _same(_llama3_factors(frequencies, whole, high, length), factors):
            return {
                "rope_type": "llama3",
                "factor": whole,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    return None


def _llama3_factors(
    frequencies: np.ndarray[Any, Any], whole: float, high: float, length: float
) -> np.ndarray[Any, Any]:
    share = np.clip((length * frequencies - 1) / (high - 1), 0, 1)
    return 1 / ((1 - share) / whole + share)


def _same(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    return bool((np.abs(found / wanted - 1) < _TOLERANCE).all())
