"""Keys of GGUF files and the config entries that say the same: one `Entry` each, read and written.

Where a file is silent, llama.cpp's own default counts, for that is what the file computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from structprune.architectures.gguf.description import Entry, GgufModel, GgufReading, Sizes, Value
from structprune.architectures.gguf.rope_reading import read_rope
from structprune.architectures.gguf.rope_writing import rope_parameters, write_rope
from structprune.errors import UnsupportedError

_SLIDING, _FULL = "sliding_attention", "full_attention"


def number(
    key: str,
    name: str,
    default: float | Callable[[Sizes], float] | None = None,
    *,
    zero_is_none: bool = False,
    off: object = math.nan,
) -> Entry:
    """Build the entry of one number; without a default the file has to say it.

    `zero_is_none`: a zero in the file counts as if it said nothing. `off` is the config's value of a number that the
    file does not say, or says as zero.
    """
    optional = not (isinstance(off, float) and math.isnan(off))

    def read(reading: GgufReading) -> dict[str, Any]:
        usual = default(reading.sizes) if callable(default) else default
        value = reading.fields.number(key, usual)
        if optional and not value:
            return {name: off}
        return {name: usual if zero_is_none and not value else value}

    def write(model: GgufModel) -> dict[str, Value]:
        value = getattr(model.config, name)
        return {} if optional and not value else {key: float(value)}

    return Entry(read=read, write=write)


def whole(key: str, name: str, default: int | None = None, *, least: int = 1) -> Entry:
    """Build the entry of one whole number; without a default the file has to say it."""
    return Entry(
        read=lambda reading: {name: reading.fields.integer(key, default, least=least)},
        write=lambda model: {key: int(getattr(model.config, name))},
    )


def flag(key: str, name: str, default: bool) -> Entry:
    """Build the entry of one flag."""
    return Entry(
        read=lambda reading: {name: reading.fields.flag(key, default)},
        write=lambda model: {key: bool(getattr(model.config, name))},
    )


RMS_EPSILON = number("attention.layer_norm_rms_epsilon", "rms_norm_eps")


def layer_norm_epsilon(name: str) -> Entry:
    """Build the entry of the epsilon of LayerNorm, by the config's name for it."""
    return number("attention.layer_norm_epsilon", name)


# Reading takes the size of a head with the other sizes.
HEAD_SIZE = Entry(
    read=lambda _: {},
    write=lambda model: {"attention.key_length": model.head_size, "attention.value_length": model.head_size},
)


def rotary(*, partial: bool = False, log_multiplier: bool = False) -> Entry:
    """Build the entry of rotary positions that are the same in all blocks (rope_reading.py, rope_writing.py)."""
    return Entry(
        read=lambda reading: {
            "rope_parameters": read_rope(
                reading.fields,
                reading.sizes.head_size,
                reading.sizes.positions,
                partial=partial,
                log_multiplier=log_multiplier,
                factors=reading.target.rope_factors,
            )
        },
        write=lambda model: write_rope(model, partial=partial, log_multiplier=log_multiplier),
    )


ROTARY = rotary()


def _read_local(reading: GgufReading, base: float | None) -> dict[str, Any]:
    full = ROTARY.read(reading)["rope_parameters"]
    own = reading.fields.number("rope.freq_base_swa", full["rope_theta"] if base is None else base)
    if base is None and own != full["rope_theta"]:
        raise UnsupportedError(
            "llama.cpp turns all blocks of this architecture with one base",
            where=reading.fields.where,
            got=f"{reading.fields.architecture}.rope.freq_base_swa {own}",
            wanted=full["rope_theta"],
        )
    return {"rope_parameters": {_FULL: full, _SLIDING: {"rope_type": "default", "rope_theta": own}}}


def _write_local(model: GgufModel, base: float | None) -> dict[str, Value]:
    parameters = model.config.rope_parameters[_SLIDING]
    if parameters.get("rope_type", "default") != "default":
        raise UnsupportedError("llama.cpp scales no rotary positions of sliding windows", got=dict(parameters))
    own = float(parameters["rope_theta"])
    if base is None and own != rope_parameters(model)["rope_theta"]:
        raise UnsupportedError(
            f"llama.cpp's {model.target.architecture} turns all blocks with one base", got=f"sliding windows with {own}"
        )
    return {**ROTARY.write(model), **({} if base is None else {"rope.freq_base_swa": own})}


def local_rotary(base: float | None = None) -> Entry:
    """Build the entry of rotary positions that blocks with a window have without a scaling.

    `base` is that of such a block where the file does not say one; None: they have that of the others.
    """
    return Entry(read=lambda reading: _read_local(reading, base), write=lambda model: _write_local(model, base))


def one_base() -> Entry:
    """Build the entry of a base for blocks with a window, which has to be that of the others."""

    def read(reading: GgufReading) -> dict[str, Any]:
        base = reading.fields.number("rope.freq_base", 10000.0)
        if reading.fields.number("rope.freq_base_swa", base) != base:
            raise UnsupportedError("the blocks of this model turn with one base", where=reading.fields.where)
        return {}

    return Entry(read=read, write=lambda _: {})


def windows(period: int, default: int | None = None, *, may_lack: bool = False, none_says_so: bool = False) -> Entry:
    """Build the entry of attention windows in all blocks but every `period`-th.

    `default` is the window of a file that says none; `may_lack`: without one all attention is full, and with
    `none_says_so` the config has none then, rather than one that is never asked for.
    """

    def read(reading: GgufReading) -> dict[str, Any]:
        sizes = reading.sizes
        pattern = reading.fields.pattern("attention.sliding_window_pattern", sizes.blocks, period)
        window = reading.fields.integer("attention.sliding_window", 0 if may_lack else default, least=0)
        types = [_SLIDING if own and window else _FULL for own in pattern]
        return {"layer_types": types, "sliding_window": window or (None if none_says_so else sizes.positions)}

    def write(model: GgufModel) -> dict[str, Value]:
        types = model.layer_types()
        if may_lack and _SLIDING not in types:
            return {}
        if types != [_FULL if (index + 1) % period == 0 else _SLIDING for index in range(len(types))]:
            raise UnsupportedError(
                f"llama.cpp's {model.target.architecture} has full attention in every block number divisible by "
                f"{period}",
                got=f"layer_types {types}",
                do="export a model that has lost no blocks",
            )
        return {"attention.sliding_window": int(model.config.sliding_window or 0)}

    return Entry(read=read, write=write)


def unturned(period: int) -> Entry:
    """Build the entry of every `period`-th block without rotary positions, which no key says."""

    def write(model: GgufModel) -> dict[str, Value]:
        turned = [bool(model.config.no_rope_layers[block.index]) for block in model.blocks]
        if turned != [(index + 1) % period != 0 for index in range(len(turned))]:
            raise UnsupportedError(
                f"llama.cpp's {model.target.architecture} turns no head in every block number divisible by {period}, "
                "and in no other",
                got=f"no_rope_layers {model.config.no_rope_layers}",
                do="export a model that has lost no blocks",
            )
        return {}

    def read(reading: GgufReading) -> dict[str, Any]:
        return {"no_rope_layers": [int((index + 1) % period != 0) for index in range(reading.sizes.blocks)]}

    return Entry(read=read, write=write)


def query_scale(largest: int) -> Entry:
    """Build the entry of Gemma's scale of queries, which no key says: one for the model of `largest` blocks."""

    def write(model: GgufModel) -> dict[str, Value]:
        config, blocks = model.config, len(model.blocks)
        wanted = config.hidden_size // config.num_attention_heads if blocks == largest else model.head_size
        if config.query_pre_attn_scalar != wanted:
            raise UnsupportedError(
                "llama.cpp divides the attention scores of a model with so many blocks by the root of another number",
                got=f"query_pre_attn_scalar {config.query_pre_attn_scalar}, {blocks} blocks",
                wanted=wanted,
            )
        return {}

    def read(reading: GgufReading) -> dict[str, Any]:
        sizes = reading.sizes
        scale = sizes.hidden // sizes.heads if sizes.blocks == largest else sizes.head_size
        return {"query_pre_attn_scalar": scale}

    return Entry(read=read, write=write)


def constants(values: Mapping[str, Any]) -> Entry:
    """Build the entry of config entries that no key says and that cannot be compared, such as unused ones."""
    return Entry(read=lambda _: dict(values), write=lambda _: {})


def only(key: str, *accepted: object) -> Entry:
    """Build the entry of a key that has one meaning in stock code: its values that say it, the first of them written.

    A file without it says the same.
    """

    def read(reading: GgufReading) -> dict[str, Any]:
        found = reading.fields.raw(key)
        if found is not None and found not in accepted:
            raise UnsupportedError(
                "the GGUF file computes something that the stock model does not",
                where=reading.fields.where,
                got=f"{reading.fields.architecture}.{key} {found}",
                wanted=" or ".join(map(str, accepted)),
            )
        return {}

    return Entry(read=read, write=lambda _: {})


def derived(key: str, found: Callable[[GgufReading], int], written: Callable[[GgufModel], int]) -> Entry:
    """Build the entry of a key whose value follows from others. A file without it says the same."""

    def read(reading: GgufReading) -> Mapping[str, Any]:
        return only(key, found(reading)).read(reading) if reading.fields.raw(key) is not None else {}

    return Entry(read=read, write=lambda model: {key: written(model)})


def _original_context(model: GgufModel) -> dict[str, Value]:
    if rope_parameters(model).get("rope_type") == "longrope":
        return {}
    original = getattr(model.config, "original_max_position_embeddings", None) or model.config.max_position_embeddings
    return {"rope.scaling.original_context_length": int(original)}


ORIGINAL_CONTEXT = Entry(
    read=lambda reading: {
        "original_max_position_embeddings": reading.fields.integer(
            "rope.scaling.original_context_length", reading.sizes.positions
        )
    },
    write=_original_context,
)
LIMITING_WINDOW = Entry(
    read=lambda reading: {
        "sliding_window": reading.fields.integer("attention.sliding_window", 0, least=0) or None,
    },
    write=lambda model: {"attention.sliding_window": int(model.config.sliding_window or 0)},
)


def _write_caps(model: GgufModel) -> dict[str, Value]:
    config = model.config
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        raise UnsupportedError("llama.cpp's gemma2 caps both attention scores and logits", got="a config without caps")
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


SOFT_CAPS = Entry(
    read=lambda reading: {
        "attn_logit_softcapping": reading.fields.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": reading.fields.number("final_logit_softcapping", 30.0) or None,
    },
    write=_write_caps,
)
