"""A smaller hidden size: the stock config where one basis serves all, else that and a modelling file with shortcuts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structprune.architectures.family import Family
from structprune.architectures.modeling.per_layer import MODELING_MODULE, MODELING_NAME
from structprune.architectures.modeling.sliced import SLICED_ENTRY, sliced_class_name, sliced_source
from structprune.errors import UnsupportedError
from structprune.files import write_text


def sliced_config(
    config: Mapping[str, Any], resolved: Any, family: Family, width: int, *, shortcuts: bool
) -> dict[str, Any]:
    """Return the source's config.json with a stream of `width`; `resolved` is the stock config class made of it.

    The norms' epsilon grows as the stream shrinks: the mean over K of x^2 plus eps D/K is D/K times the mean over D
    plus eps. The head has a basis and a scale of its own, so it is no longer tied to the embedding.
    Raises UnsupportedError if no stock class takes the number of heads with this width.
    """
    assert family.stream is not None
    hidden, heads = resolved.hidden_size, resolved.num_attention_heads
    result = dict(config) | {
        "hidden_size": width,
        # Left out, it would be derived from the hidden size.
        "head_dim": getattr(resolved, "head_dim", None) or hidden // heads,
        # Mistral's class, which may have to stand in for LLaMA's, has another default.
        "num_key_value_heads": resolved.num_key_value_heads,
        family.stream.eps_field: getattr(resolved, family.stream.eps_field) * hidden / width,
        "tie_word_embeddings": False,
    }
    try:
        result = family.resized(result)
    except UnsupportedError as error:
        raise UnsupportedError(
            error.what, got=error.got, do=f"use --multiple-of {math.lcm(8, heads)}, a multiple of the number of heads"
        ) from None
    if not shortcuts:
        return result
    model, causal = (sliced_class_name(family.classes[result["model_type"]], s) for s in ("Model", "ForCausalLM"))
    return result | {
        "architectures": [causal],
        "auto_map": {
            "AutoModel": f"{MODELING_MODULE}.{model}",
            "AutoModelForCausalLM": f"{MODELING_MODULE}.{causal}",
        },
        SLICED_ENTRY: {"hidden_size": hidden},
    }


def write_sliced_modeling_file(directory: Path, family: Family) -> None:
    """Write the family's constant modelling file beside config.json."""
    write_text(directory / MODELING_NAME, sliced_source(family))
