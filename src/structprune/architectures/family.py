"""What a family file states: the names of the stock modules and the unit groups of one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from structprune.types import HeadUnits, UnitGroup, UnitKind


def _accept(_: Any) -> None:
    return None


def _unchanged(config: dict[str, Any]) -> dict[str, Any]:
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Data of one family. Module names are paths inside the stock `AutoModelForCausalLM` class."""

    name: str
    blocks_module: str
    embedding_modules: tuple[str, ...]
    """Modules with weights that run before the first block."""
    rotary_module: str | None
    """Module without weights that computes position embeddings; built anew from the config."""
    final_norm_module: str | None
    head_module: str
    attention_module: str | None
    """Attention inside a block, when the block is `h += attention(h); h += mlp(h)` with nothing after each sum.

    Each half can then run alone, or be removed. None for parallel or post-normalised blocks.
    """
    mlp_modules: tuple[str, ...]
    """Modules of the MLP inside a block; with zeros in their place the attention half is left."""
    groups: Callable[[PretrainedConfig, HeadUnits], tuple[UnitGroup, ...]]
    """Raises UnsupportedError where attention has no such units."""
    check: Callable[[PretrainedConfig], None] = _accept
    """Raises UnsupportedError for variants that the family file does not describe."""
    resized: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged
    """config.json with smaller numbers -> one that stock code accepts, where the family's own class would refuse it."""

    def half_modules(self, kind: UnitKind) -> tuple[str, ...]:
        """Modules of one half of a block, without its norm. Empty if the block has no halves."""
        if self.attention_module is None:
            return ()
        return (self.attention_module,) if kind == "attention" else self.mlp_modules
