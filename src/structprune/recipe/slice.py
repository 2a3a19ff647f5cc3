"""Recipes of the methods that cut the residual stream."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from structprune.kinds import Scope, Structure
from structprune.recipe.common import Recipe, ResolvedRecipe
from structprune.recipe.fields import METHODS_OWN, SAID, Flag, Group


class SliceRecipe(Recipe, frozen=True):
    """What may be asked of the pipeline that makes the hidden size smaller."""

    pipeline: ClassVar[str] = "slice"
    removes: ClassVar[str] = "directions of the residual stream"

    method: Annotated[str, Flag(Group.HOW)] = Field(
        default="slicegpt", description="a name that `structprune methods` lists"
    )
    scope: Annotated[Scope, Flag(Group.WHAT)] = Field(
        default="all", description="both sublayers, which share the stream: all"
    )
    multiple_of: Annotated[int, Flag(Group.ADVANCED)] = Field(
        default=8, ge=1, description="the width of the stream is a multiple of this"
    )
    damping: Annotated[float | None, Flag(Group.ADVANCED, unset=METHODS_OWN)] = Field(
        default=None, gt=0, le=1, description="ridge as a share of the covariance's mean diagonal"
    )
    structure: Annotated[Structure, Flag(Group.HOW)] = Field(
        default=Structure.PER_LAYER,
        description="bases of the stream: per-layer (one at every position, with shortcut matrices) or uniform (one)",
    )


class ResolvedSlice(ResolvedRecipe, SliceRecipe, frozen=True):
    """What a run that cuts the residual stream works by."""

    damping: float = SAID

    @property
    def per_layer(self) -> bool:
        """Whether every block of the output has a config of its own."""
        return self.structure is Structure.PER_LAYER
