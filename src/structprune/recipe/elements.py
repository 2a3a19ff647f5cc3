"""Recipes of the methods that set single weights to zero, by a pattern: a share of them anywhere, or N of every M."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from structprune.errors import InputError
from structprune.kinds import Scope, Structure
from structprune.recipe.common import Recipe, ResolvedRecipe
from structprune.recipe.fields import METHODS_OWN, SAID, Flag, Group, Share
from structprune.recipe.units import Damping, Target


def _read_pattern(value: Any) -> Any:
    """Check the name of a pattern. Raises InputError."""
    # Only now: patterns load torch, and the help of the command line should not wait for that.
    from structprune.patterns import pattern_name

    return pattern_name(value) if isinstance(value, int | str) else value


PatternName = Annotated[str, BeforeValidator(_read_pattern)]
"""`unstructured`, with what is counted apart as in `unstructured:row`, or `N:M`."""


class ElementsRecipe(Recipe, frozen=True):
    """What may be asked of the pipeline that prunes the matrices of every block weight by weight."""

    pipeline: ClassVar[str] = "elements"
    removes: ClassVar[str] = "single weights"
    settled: ClassVar[Mapping[str, Any]] = {"multiple_of": 1}

    method: Annotated[str, Flag(Group.HOW)] = Field(
        default="alps", description="a name that `structprune methods` lists"
    )
    scope: Annotated[Scope, Flag(Group.WHAT)] = Field(
        default="all", description="sublayers whose matrices are pruned: mlp, attention or all"
    )
    pattern: Annotated[PatternName | None, Flag(Group.WHAT, unset="whole units go; unstructured where no unit can")] = (
        Field(
            default=None,
            description="single weights go, as zeros. unstructured: the share --sparsity of every matrix, or of every "
            "row with unstructured:row; N:M, such as 2:4: all but N of every M consecutive weights of a row",
        )
    )
    permute_channels: Annotated[bool, Flag(Group.HOW, names="--permute-channels/--no-permute-channels")] = Field(
        default=False,
        description="put MLP channels, and each KV head's values, in an order in which groups of N:M lose less",
    )
    damping: Annotated[Damping | None, Flag(Group.ADVANCED, unset=METHODS_OWN)] = Field(
        default=None, description="ridge as a share of each input's energy; auto: chosen on windows kept apart"
    )
    solver: Annotated[str | None, Flag(Group.HOW, unset=METHODS_OWN)] = Field(
        default=None,
        description="what becomes of the weights that stay: own, mask-only, sweep, refit, swaps, swaps-refit or dsnot",
    )
    allocator: Annotated[str, Flag(Group.HOW)] = Field(
        default="uniform",
        description="how the blocks share the zeros of an unstructured pattern: uniform or owl; "
        "dp: how all maps do, by the loss",
    )
    target: Annotated[Target | None, Flag(Group.HOW, unset=METHODS_OWN)] = Field(
        default=None,
        description="what is fitted. local: the map's own output; dense-path: its output in the dense model",
    )

    structure: Annotated[Structure | None, Flag(Group.HOW, unset="what the source has")] = Field(
        default=None, description="widths of the output, which are those of the source: uniform or per-layer"
    )

    @classmethod
    def own_values(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out other pipelines' fields, and take the share from a pattern that says it.

        Raises UnsupportedError for a field without a meaning, InputError for a share that the pattern does not have.
        """
        own = super().own_values(values)
        share = _share_of(own.get("pattern"))
        if share is None:
            return own
        asked = own.get("sparsity")
        try:
            other = asked is not None and TypeAdapter[float](Share).validate_python(asked) != share
        except (ValidationError, InputError):
            # The field itself says what is wrong with it.
            return own
        if other:
            raise InputError(
                "the pattern says itself what share goes",
                got=f"--pattern {_read_pattern(own['pattern'])}, --sparsity {asked}",
                wanted=f"--sparsity {share:g}, or none",
            )
        return {**own, "sparsity": share}


def _share_of(pattern: Any) -> float | None:
    from structprune.patterns import share_of

    name = _read_pattern(pattern)
    return share_of(name) if isinstance(name, str) else None


class ResolvedElements(ResolvedRecipe, ElementsRecipe, frozen=True):
    """What a run that prunes weight by weight works by."""

    pattern: PatternName = SAID
    damping: Damping = SAID
    solver: str = SAID
    target: Target = SAID
    structure: Structure = SAID

    @property
    def per_layer(self) -> bool:
        """Whether every block of the output has a config of its own, as in the source."""
        return self.structure is Structure.PER_LAYER

    @property
    def chooses_ridge(self) -> bool:
        """Whether the ridge is chosen, on windows whose sums are kept apart."""
        return self.damping == "auto"

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states of all windows are kept beside the pruned ones."""
        return self.target == "dense-path"
