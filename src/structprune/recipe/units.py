"""Recipes of the methods that remove units: channels of the MLP, heads or channels of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from structprune.errors import InputError
from structprune.kinds import HeadUnits, Structure
from structprune.recipe.common import ResolvedRecipe, flag_name
from structprune.recipe.fields import METHODS_OWN, SAID, Flag, Group
from structprune.recipe.latency import NO_LATENCY_LIMIT, LatencyAtMost
from structprune.recipe.limited import LimitedRecipe
from structprune.recipe.limits import NO_CACHE_LIMIT, NO_FILE_LIMIT, TARGETS, AtMost, CacheAtMost, FileAtMost
from structprune.recipe.widths import ALL_KEPT, WIDTHS_NAME, Widths, as_widths

Damping = Annotated[float, Field(gt=0, le=1)] | Literal["auto"]
Target = Literal["local", "dense-path"]
_IDLE_METHOD = "magnitude"
"""Reads no text and solves nothing."""


class UnitsRecipe(LimitedRecipe, frozen=True):
    """What may be asked of the pipeline that prunes sublayer by sublayer."""

    pipeline: ClassVar[str] = "units"
    removes: ClassVar[str] = "units of sublayers"

    head_units: Annotated[HeadUnits | None, Flag(Group.WHAT, unset=METHODS_OWN)] = Field(
        default=None,
        description="what attention loses. kv-group: KV heads with their query heads; query-head: query heads alone; "
        "value-channel: channels of the values",
    )
    multiple_of: Annotated[int | None, Flag(Group.ADVANCED, unset="32; 128 in wide models")] = Field(
        default=None, ge=1, description="kept units per block are a multiple of this"
    )
    damping: Annotated[Damping | None, Flag(Group.ADVANCED, unset=METHODS_OWN)] = Field(
        default=None,
        description="ridge as a share of the Gram's mean diagonal; auto: as one of each input's own energy, chosen on "
        "windows kept apart",
    )
    shrinkage: Annotated[float | None, Flag(Group.ADVANCED, unset=METHODS_OWN)] = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the correlations between units that greedy removal does not count on",
    )
    score: Annotated[str | None, Flag(Group.HOW, unset=METHODS_OWN)] = Field(
        default=None, description="what decides which units stay, such as wanda or greedy (docs/methods.md lists all)"
    )
    allocator: Annotated[str | None, Flag(Group.HOW, unset=METHODS_OWN)] = Field(
        default=None,
        description="how the blocks share what is to go: uniform, closed-form, dp, milp, fermi-dirac, softmax or "
        "standardised; single weights: uniform, owl or dp",
    )
    search: Annotated[str, Flag(Group.HOW)] = Field(
        default="none",
        description="how widths are looked for by measurements, from the allocator's on, such as evopress "
        "(docs/search.md lists all); none: the allocator's stay",
    )
    search_generations: Annotated[int | None, Flag(Group.ADVANCED, unset="the search's own", beside="search")] = Field(
        default=None, ge=0, description="times that a search proposes choices of widths, at most"
    )
    search_children: Annotated[int | None, Flag(Group.ADVANCED, unset="the search's own", beside="search")] = Field(
        default=None, ge=0, description="choices of widths that a search proposes at a time"
    )
    search_anchors: Annotated[bool, Flag(Group.ADVANCED, beside="search")] = Field(
        default=False,
        description="let a search measure first what one width of every sublayer loses by itself, and what each loses "
        "that may go, and correct predicted losses by it",
    )
    solver: Annotated[str | None, Flag(Group.HOW, unset=METHODS_OWN)] = Field(
        default=None,
        description="how weights are restored: mask-only, bias, least-squares, admm, admm-duals or alternating; where "
        "single weights go own, mask-only, sweep, refit, swaps or swaps-refit",
    )
    target: Annotated[Target | None, Flag(Group.HOW, unset=METHODS_OWN)] = Field(
        default=None,
        description="what the solver fits. local: the sublayer's own output; dense-path: the dense model's hidden "
        "states",
    )
    structure: Annotated[Structure | None, Flag(Group.HOW, unset="what the method needs")] = Field(
        default=None, description="widths of the output: uniform (one for all blocks) or per-layer"
    )
    temperature: Annotated[float | None, Flag(Group.ADVANCED, unset=METHODS_OWN)] = Field(
        default=None, ge=0, description="temperature of the fermi-dirac and softmax allocators"
    )
    min_retention: Annotated[float, Flag(Group.WHAT)] = Field(
        default=0.1, gt=0, le=1, description="least share of its units that a block keeps"
    )
    max_retention: Annotated[float, Flag(Group.WHAT)] = Field(
        default=1.0, gt=0, le=1, description="largest share of its units that a block keeps"
    )
    outer_iterations: Annotated[int, Flag(Group.ADVANCED)] = Field(
        default=0,
        ge=0,
        description="times that removal costs are measured again on the pruned model and shared out anew",
    )
    allow_block_removal: Annotated[bool, Flag(Group.WHAT, names="--allow-block-removal/--no-block-removal")] = Field(
        default=False, description="let a block lose its whole attention or MLP"
    )
    protect_first: Annotated[int | None, Flag(Group.WHAT, unset=METHODS_OWN)] = Field(
        default=None, ge=0, description="blocks at the start that lose nothing"
    )
    protect_last: Annotated[int | None, Flag(Group.WHAT, unset=METHODS_OWN)] = Field(
        default=None, ge=0, description="blocks at the end that lose nothing"
    )
    widths: Annotated[Widths, Flag(Group.WHAT, unset="the allocator decides")] = Field(
        default=ALL_KEPT,
        description="JSON file with the units that each block keeps, such as an earlier run's "
        f"{WIDTHS_NAME}: {{block: {{kind: units}}}}",
    )
    gates: Annotated[str, Flag(Group.HOW)] = Field(
        default="none",
        description="what learns which units stay, through the whole model before any block is cut: graspprune, or "
        "none (docs/gates.md lists all)",
    )
    gates_steps: Annotated[int, Flag(Group.HOW, beside="gates")] = Field(
        default=128, ge=1, description="steps of the gates, each on one calibration window"
    )
    gates_loss: Annotated[Literal["divergence", "text"], Flag(Group.ADVANCED, beside="gates")] = Field(
        default="divergence",
        description="what the gates lower. divergence: the KL divergence from the dense model's predictions; text: the "
        "loss of the calibration text's own next tokens",
    )
    sensitivity_samples: Annotated[
        int | None, Flag(Group.CALIBRATION, unset="24, or fewer where those have more than 24,576 tokens")
    ] = Field(default=None, ge=1, description="windows of the streamed backward pass, or of measured losses")
    sensitivity_scale: Annotated[Literal["given", "per-text"], Flag(Group.ADVANCED)] = Field(
        default="given",
        description="size of the loss's gradients beside one another, of several texts. given: as they are; per-text: "
        "in every block each text's are brought to one mean square, so that the noisiest does not decide alone",
    )

    @classmethod
    def own_values(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out other pipelines' fields; widths that are given say the scope and the units where nothing else does.

        Raises UnsupportedError for a field without a meaning, InputError for widths in other units than are asked for.
        """
        own = super().own_values(values)
        if own.get("scope") == "vocabulary":
            return _of_tokens(own)
        widths = as_widths(own.get("widths"))
        if not widths.blocks:
            return {**_of_cache(own), **own}
        asked = own.get("head_units") or widths.head_units
        if widths.head_units not in (None, asked) and "attention" in widths.kinds:
            raise InputError(
                "--widths counts attention in other units than are asked for",
                got=f"--head-units {asked}",
                wanted=f"--head-units {widths.head_units}",
            )
        kinds = sorted(widths.kinds)
        return {"scope": kinds[0] if len(kinds) == 1 else "all", **own, "widths": widths, "head_units": asked}


def _of_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """Say that no unit goes, and the method that measures nothing. Raises InputError for what would remove units."""
    asked = [flag_name(name) for name in TARGETS if values.get(name)]
    if as_widths(values.get("widths")).blocks:
        asked.append("--widths")
    if values.get("method", _IDLE_METHOD) != _IDLE_METHOD:
        asked.append(f"--method {values['method']}")
    if values.get("sparsity"):
        asked.append(f"--sparsity {values['sparsity']}")
    if asked:
        raise InputError(
            "tokens alone go, so nothing else is chosen",
            got=f"--scope vocabulary, {', '.join(asked)}",
            wanted="--vocabulary with any scope of sublayers, or --scope vocabulary alone",
        )
    return {**values, "method": _IDLE_METHOD, "sparsity": 0.0}


def _of_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """Say the scope that a limit of the KV cache alone means: attention, or all beside limits of other things."""
    targets = [name for name in TARGETS if values.get(name) is not None]
    if "target_kv_cache" not in targets:
        return {}
    return {"scope": "attention" if len(targets) == 1 else "all"}


class ResolvedUnits(ResolvedRecipe, UnitsRecipe, frozen=True):
    """What a run that removes units works by."""

    target_parameters: AtMost = 0
    target_bytes: FileAtMost = NO_FILE_LIMIT
    target_kv_cache: CacheAtMost = NO_CACHE_LIMIT
    target_latency: LatencyAtMost = NO_LATENCY_LIMIT
    head_units: HeadUnits = SAID
    multiple_of: int = SAID
    damping: Damping = SAID
    shrinkage: float = SAID
    score: str = SAID
    allocator: str = SAID
    solver: str = SAID
    target: Target = SAID
    structure: Structure = SAID
    temperature: float = SAID
    protect_first: int = SAID
    protect_last: int = SAID
    sensitivity_samples: int = SAID
    search_generations: int = 0
    search_children: int = 0
    repair_samples: int = 0
    """Reports of earlier versions name none."""

    @property
    def searches(self) -> bool:
        """Whether widths are looked for by measurements."""
        return self.search != "none"

    @property
    def per_layer(self) -> bool:
        """Whether every block of the output has a config of its own."""
        return self.structure is Structure.PER_LAYER

    @property
    def chooses_ridge(self) -> bool:
        """Whether the ridge is chosen, on windows whose sums are kept apart."""
        return self.damping == "auto"

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states of all windows are kept beside the pruned ones."""
        return self.target == "dense-path"

    @property
    def protected(self) -> tuple[int, int]:
        """Blocks at the start and at the end that lose nothing."""
        return self.protect_first, self.protect_last

    @property
    def backward_samples(self) -> int:
        """Windows of the streamed backward pass."""
        return self.sensitivity_samples
