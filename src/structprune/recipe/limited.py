"""Recipes of the pipelines that can be held to a size of the result instead of a share that goes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from structprune.recipe.fields import Flag, Group
from structprune.recipe.latency import NO_TABLE, Latency, Table
from structprune.recipe.limits import Count, FileBytes, KvCache
from structprune.recipe.repaired import RepairedRecipe

_SPARSITY_DECIDES = "--sparsity decides"


class LimitedRecipe(RepairedRecipe, frozen=True):
    """What may be asked of the pipelines that count what every unit or block adds to the result."""

    target_parameters: Annotated[Count | None, Flag(Group.WHAT, unset=_SPARSITY_DECIDES)] = Field(
        default=None, description="the most parameters that the result may have, such as 1B; instead of --sparsity"
    )
    target_bytes: Annotated[FileBytes | None, Flag(Group.WHAT, unset=_SPARSITY_DECIDES)] = Field(
        default=None,
        description="the most bytes of its weight files, such as 4GiB, or of a GGUF file of some type, such as "
        "q4_k_m:4GiB; instead of --sparsity",
    )
    target_kv_cache: Annotated[KvCache | None, Flag(Group.WHAT, unset=_SPARSITY_DECIDES)] = Field(
        default=None,
        description="the most bytes of keys and values of so many tokens, such as 8192:2GiB; instead of --sparsity",
    )
    target_latency: Annotated[Latency | None, Flag(Group.WHAT, unset=_SPARSITY_DECIDES)] = Field(
        default=None,
        description="the longest time of a prompt or of a token, such as 0.75x of the dense model's, decode:0.75x or "
        "prefill:120ms, by --latency-table; instead of --sparsity",
    )
    latency_table: Annotated[Table, Flag(Group.WHAT, unset="--target-latency needs one")] = Field(
        default=NO_TABLE, description="JSON file of `structprune bench MODEL --table FILE`"
    )
