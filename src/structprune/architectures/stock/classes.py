"""Stock classes of models by the names that configs have for them, and the command for those that are no decoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from structprune.errors import UnsupportedError


def stock_class(config: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """Find the class of stock transformers that `architectures` of a config.json names; None for no or another name."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def wraps_text_model(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, or the stock config of its type, has the config of a text model inside."""
    model_type = config.get("model_type")
    inner: Any = {}
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        inner = CONFIG_MAPPING[model_type].sub_configs
    return "text_config" in config or "text_config" in inner


def other_kind(config: Mapping[str, Any], directory: Path) -> UnsupportedError | None:
    """Build the error for a checkpoint whose stock class is an encoder, a vision or a speech model: what prunes it.

    None for causal models, for those that wrap a text model, and for classes that stock transformers has not.
    """
    kind = stock_class(config)
    if kind is None or wraps_text_model(config) or kind in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        return None
    return UnsupportedError(
        f"{kind.__name__} is no causal language model: only those are pruned block by block",
        where=str(directory / "config.json"),
        got=f"architectures {config['architectures']}",
        wanted="a decoder of text",
        do=f"`structprune prune-module {directory} -o OUT --examples FILE` prunes a model of any stock class, whole in "
        "memory (docs/any-architecture.md)",
    )
