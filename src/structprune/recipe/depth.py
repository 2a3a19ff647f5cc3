"""Recipes of the methods that remove whole blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from structprune.kinds import Scope
from structprune.recipe.common import ResolvedRecipe
from structprune.recipe.fields import METHODS_OWN, SAID, Flag, Group
from structprune.recipe.latency import NO_LATENCY_LIMIT, LatencyAtMost
from structprune.recipe.limited import LimitedRecipe
from structprune.recipe.limits import NO_CACHE_LIMIT, NO_FILE_LIMIT, AtMost, CacheAtMost, FileAtMost

# What a run does that takes or leaves blocks and experts as they are.
LEFT_AS_THEY_ARE: Mapping[str, Any] = {
    "head_units": "kv-group",
    "multiple_of": 1,
    "damping": 1e-4,
    "shrinkage": 0.0,
    "allocator": "uniform",
    "solver": "mask-only",
    "target": "local",
    "structure": "uniform",
    "temperature": 0.0,
}


class DepthRecipe(LimitedRecipe, frozen=True):
    """What may be asked of the pipeline that leaves out whole blocks."""

    pipeline: ClassVar[str] = "depth"
    removes: ClassVar[str] = "whole blocks"
    settled: ClassVar[Mapping[str, Any]] = LEFT_AS_THEY_ARE

    method: Annotated[str, Flag(Group.HOW)] = Field(
        default="depth", description="a name that `structprune methods` lists"
    )
    scope: Annotated[Scope, Flag(Group.WHAT)] = Field(
        default="all", description="both sublayers, which leave together: all"
    )
    score: Annotated[str | None, Flag(Group.HOW, unset=METHODS_OWN)] = Field(
        default=None, description="what decides which blocks go: angular or measured-loss"
    )
    protect_first: Annotated[int, Flag(Group.WHAT)] = Field(
        default=0, ge=0, description="blocks at the start that stay"
    )
    protect_last: Annotated[int, Flag(Group.WHAT)] = Field(default=0, ge=0, description="blocks at the end that stay")
    sensitivity_samples: Annotated[
        int | None, Flag(Group.CALIBRATION, unset="24, or fewer where those have more than 24,576 tokens")
    ] = Field(default=None, ge=1, description="windows of measured losses")


class ResolvedDepth(ResolvedRecipe, DepthRecipe, frozen=True):
    """What a run that removes whole blocks works by."""

    target_parameters: AtMost = 0
    target_bytes: FileAtMost = NO_FILE_LIMIT
    target_kv_cache: CacheAtMost = NO_CACHE_LIMIT
    target_latency: LatencyAtMost = NO_LATENCY_LIMIT
    score: str = SAID
    sensitivity_samples: int = SAID
    repair_samples: int = 0
    """Reports of earlier versions name none."""

    @property
    def protected(self) -> tuple[int, int]:
        """Blocks at the start and at the end that stay."""
        return self.protect_first, self.protect_last

    @property
    def backward_samples(self) -> int:
        """Windows of measured losses."""
        return self.sensitivity_samples
