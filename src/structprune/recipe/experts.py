"""Recipes of the methods that remove whole experts of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from structprune.recipe.common import ResolvedRecipe
from structprune.recipe.depth import LEFT_AS_THEY_ARE
from structprune.recipe.fields import Flag, Group
from structprune.recipe.repaired import RepairedRecipe


class ExpertsRecipe(RepairedRecipe, frozen=True):
    """What may be asked of the pipeline that leaves out experts."""

    pipeline: ClassVar[str] = "experts"
    removes: ClassVar[str] = "whole experts"
    settled: ClassVar[Mapping[str, Any]] = {
        **LEFT_AS_THEY_ARE,
        "score": "router-weighted",
        "protect_first": 0,
        "protect_last": 0,
    }

    method: Annotated[str, Flag(Group.HOW)] = Field(
        default="reap", description="a name that `structprune methods` lists"
    )


class ResolvedExperts(ResolvedRecipe, ExpertsRecipe, frozen=True):
    """What a run that removes whole experts works by."""

    repair_samples: int = 0
    """Reports of earlier versions name none."""
