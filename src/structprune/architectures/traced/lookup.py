"""The family of a config: from its file, or found by tracing."""

from __future__ import annotations

import copy
import functools
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from structprune.architectures import FAMILIES
from structprune.architectures.family import Family
from structprune.architectures.stock.config import without_own_widths
from structprune.architectures.traced.family import traced_family

_KEPT = 8


def is_stock_type(model_type: str) -> bool:
    """Whether stock transformers has a causal model of this type, which may be described by tracing."""
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def is_stock_decoder(config: Any) -> bool:
    """Whether stock transformers has a causal model of this config, and no other parts around it."""
    return (
        isinstance(config, PretrainedConfig)
        and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        and not config.is_encoder_decoder
        and config.get_text_config() is config
        and getattr(config, "num_hidden_layers", None) is not None
    )


def find_family(config: Any) -> Family | None:
    """Return the family of a stock config; None where neither a file nor tracing describes it."""
    if config.model_type in FAMILIES:
        return FAMILIES.get(config.model_type)
    return family_of(config) if is_stock_decoder(config) else None


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a stock causal model. Raises UnsupportedError for one that cannot be described."""
    if config.model_type in FAMILIES:
        return FAMILIES.get(config.model_type)
    text = config.to_json_string(use_diff=False)
    return traced(Described(config, text))


class Described:
    """A config that equals another one of the same text."""

    def __init__(self, config: PretrainedConfig, text: str) -> None:
        self.config, self._text = config, text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Described) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@functools.lru_cache(_KEPT)
def traced(described: Described) -> Family:
    """Describe a model, once for as long as it is in use."""
    config = described.config
    return traced_family(without_own_widths(config) if config.is_heterogeneous else copy.deepcopy(config))
