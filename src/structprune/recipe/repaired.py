"""Settings of the repair behind the last block, and of what is chosen on held-out windows of several texts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from structprune.recipe.common import Recipe
from structprune.recipe.fields import Flag, Group
from structprune.texts import OBJECTIVES, Objective, ObjectiveName
from structprune.vocabulary.kept import KeptTokens


def repair_of(recipe: Recipe) -> str | None:
    """Name the repair that a recipe asks for; None where it asks for none, or its pipeline has none."""
    asked = recipe.repair if isinstance(recipe, RepairedRecipe) else "none"
    return None if asked == "none" else asked


def repair_windows(recipe: Recipe, num_windows: int) -> int:
    """Count the windows that a repair asks for, as many as are fitted on unless it says; 0 where there is none."""
    if not isinstance(recipe, RepairedRecipe) or recipe.repair == "none":
        return 0
    return recipe.repair_samples or num_windows


def repair_epochs(recipe: Recipe) -> int:
    """Count the passes over its windows that a recipe's repair makes at most."""
    return recipe.repair_epochs if isinstance(recipe, RepairedRecipe) else 1


def repair_adds_biases(recipe: Recipe) -> bool:
    """Say whether a recipe's repair gives consumers biases that they lack."""
    return repair_of(recipe) == "scales+biases"


def merges_rows(recipe: Recipe) -> bool:
    """Say whether head rows are fitted to carry the tokens that are gone."""
    return isinstance(recipe, RepairedRecipe) and recipe.merge_rows


def objective_of(recipe: Recipe) -> Objective:
    """Return what choices on held-out windows go by; the mean where the pipeline makes none."""
    return OBJECTIVES[recipe.objective if isinstance(recipe, RepairedRecipe) else "mean"]


class RepairedRecipe(Recipe, frozen=True):
    """What may be asked of the pipelines whose result stock blocks can carry: it can learn from the dense model."""

    repair: Annotated[Literal["none", "scales", "scales+biases"], Flag(Group.HOW)] = Field(
        default="none",
        description="what learns from the dense model behind the last block. scales: norms, biases and a scale for "
        "each channel and head, the matrices as they are; scales+biases: new biases too, where the model's config has "
        "an entry for them; none: nothing",
    )
    repair_epochs: Annotated[int, Flag(Group.HOW, beside="repair")] = Field(
        default=1, ge=1, description="passes of the repair over its windows; the best one is kept"
    )
    repair_samples: Annotated[
        int | None, Flag(Group.CALIBRATION, unset="as many as --num-samples", beside="repair")
    ] = Field(
        default=None,
        ge=0,
        description="windows of the same texts for the repair, which nothing else is fitted on where the texts have so "
        "many; it is measured on an eighth of them and learns from the others",
    )
    merge_rows: Annotated[bool, Flag(Group.HOW, beside="vocabulary")] = Field(
        default=False,
        description="fit the head's rows of first pieces to carry what the tokens that are gone would have been given, "
        "on the calibration windows; they stay if windows that they were not fitted on are predicted better",
    )
    objective: Annotated[ObjectiveName, Flag(Group.HOW)] = Field(
        default="mean",
        description="what is best for several calibration texts, where a ridge is chosen on windows kept apart or a "
        "repair is kept. mean: all windows together; worst: the text that fares worst, each beside its own size",
    )

    def with_tokens(self, kept: KeptTokens) -> Self:
        found = super().with_tokens(kept)
        # Where none goes there is none to carry.
        return found if kept else found.model_copy(update={"merge_rows": False})
