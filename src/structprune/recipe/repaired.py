"""Settings of the repair behind the last block, for recipes whose results can have one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from structprune.recipe.common import Recipe
from structprune.recipe.fields import Flag, Group


class RepairedRecipe(Recipe, frozen=True):
    """What may be asked of the pipelines whose result stock blocks can carry: it can learn from the dense model."""

    repair: Annotated[Literal["none", "scales"], Flag(Group.HOW)] = Field(
        default="none",
        description="what learns from the dense model behind the last block. scales: norms, biases and a scale for "
        "each channel and head, the matrices as they are; none: nothing",
    )
    repair_samples: Annotated[int | None, Flag(Group.CALIBRATION, unset="all of --num-samples")] = Field(
        default=None,
        ge=2,
        description="calibration windows of the repair; it is measured on an eighth of them and learns from the others",
    )
