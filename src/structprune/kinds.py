"""Kinds of units, outputs and sources, by name. Without torch: the command line is ready before that is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal

StartToken = Literal["auto", "yes", "no"]
"""Whether windows of a text begin with the model's start token; auto: as its tokenizer does."""
UnitKind = Literal["attention", "mlp"]
SublayerKind = Literal[UnitKind, "mixer"]
"""What a sublayer of a block is: one that has units, or one that mixes positions in another way and stays whole."""
HeadUnits = Literal["kv-group", "query-head", "value-channel"]
"""What a unit of attention is: a KV head with all its query heads, one query head of every KV head, or one channel of a
KV head's values (a V/O pair)."""
UNIT_KINDS: tuple[UnitKind, ...] = ("attention", "mlp")
"""Kinds of units in the order of a block's forward pass."""
Scope = Literal["mlp", "attention", "all", "vocabulary"]
"""What a run removes units of; or none, where tokens alone go."""
SCOPES: Mapping[Scope, tuple[UnitKind, ...]] = {
    "mlp": ("mlp",),
    "attention": ("attention",),
    "all": UNIT_KINDS,
    "vocabulary": (),
}
SUBLAYER_KINDS: tuple[SublayerKind, ...] = (*UNIT_KINDS, "mixer")

Provenance = Literal["published formula", "read in public code", "derived", "reconstructed", "baseline"]
"""How far a method of ours is the one that its source describes."""


class Structure(StrEnum):
    """How the widths of a result are written, and so which code loads it."""

    UNIFORM = "uniform"
    """One width of each kind for all blocks: a stock config."""
    PER_LAYER = "per-layer"
    """Blocks with configs of their own, and a modelling file that reads them."""
