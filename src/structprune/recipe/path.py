"""What every width is predicted to cost, as a run has measured it: widths for any share follow at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, model_validator

from structprune.errors import InputError, UnsupportedError
from structprune.files import check_path, expand_user, read_validated
from structprune.kinds import HeadUnits, UnitKind
from structprune.recipe.common import DEFAULT_METHOD, Recipe, flag_name
from structprune.recipe.limits import TARGETS
from structprune.recipe.units import UnitsRecipe
from structprune.recipe.widths import BlockWidths

if TYPE_CHECKING:
    from structprune.allocation.menu import Slot

PATH_NAME = "pruning_path.json"
# More than any sublayer has: sums of them are exact, and those of losses finite.
_MOST_PARAMETERS, _MOST_LOSS = 2**53, 1e100
_Parameters = Annotated[int, Field(ge=0, le=_MOST_PARAMETERS)]
_Loss = Annotated[float, Field(ge=-_MOST_LOSS, le=_MOST_LOSS, allow_inf_nan=False)]


class SublayerPath(BaseModel, frozen=True, extra="forbid"):
    """The widths that one sublayer may have, by ascending removal."""

    block: NonNegativeInt
    kind: UnitKind
    before: Annotated[int, Field(gt=0, le=_MOST_PARAMETERS)]
    """Parameters of the sublayer with all units."""
    units: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    parameters: tuple[_Parameters, ...]
    """What is left of them at each width."""
    loss: tuple[_Loss, ...]
    """What the removal of all other units is predicted to add to the loss, in nats per token."""

    @model_validator(mode="after")
    def _alike(self) -> SublayerPath:
        if not len(self.units) == len(self.parameters) == len(self.loss):
            raise ValueError("units, parameters and loss have different lengths")
        for name, values in (("units", self.units), ("parameters", (self.before + 1, *self.parameters))):
            if any(a <= b for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name} do not descend")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One size on the way from the dense model to the smallest one."""

    share: float
    """Share of the scope's parameters that goes."""
    removed: int
    """Parameters that go."""
    loss: float
    """What that is predicted to add to the loss, in nats per token."""


class RemovalPath(BaseModel, frozen=True, extra="forbid"):
    """All widths of all sublayers in scope with their predicted losses."""

    schema_version: Literal[1] = 1
    source: str
    source_fingerprint: str
    head_units: HeadUnits
    """What the units of attention are."""
    scope_parameters: Annotated[int, Field(gt=0, le=_MOST_PARAMETERS)]
    """What a share is a share of."""
    sublayers: Annotated[tuple[SublayerPath, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_once(self) -> RemovalPath:
        if len({(sublayer.block, sublayer.kind) for sublayer in self.sublayers}) < len(self.sublayers):
            raise ValueError("a sublayer is there twice")
        return self

    @property
    def before(self) -> int:
        """Parameters of all sublayers in scope."""
        return sum(sublayer.before for sublayer in self.sublayers)

    def slots(self) -> list[Slot]:
        """Return the widths as exact allocators take them."""
        from structprune.allocation.menu import Slot, Variant

        return [
            Slot(
                block=sublayer.block,
                kind=sublayer.kind,
                variants=tuple(
                    Variant(keep=keep, cost=(size,), price=loss)
                    for keep, size, loss in zip(sublayer.units, sublayer.parameters, sublayer.loss, strict=True)
                ),
            )
            for sublayer in self.sublayers
        ]

    def widths(self, sparsity: float) -> BlockWidths:
        """Return the widths of least predicted loss that remove this share of the scope's parameters, by `dp`.

        Raises InputError if the widths do not allow so much to go.
        """
        from structprune.allocation.knapsack import dynamic_programming
        from structprune.allocation.menu import Budget, kept_units

        slots = self.slots()
        most = (self.before - sum(slot.variants[-1].cost[0] for slot in slots)) / self.scope_parameters
        if sparsity > most:
            raise InputError(
                "--allocation has no widths that remove as much",
                got=f"--sparsity {sparsity:g}",
                wanted=f"at most {math.floor(most * 1e4) / 1e4:g}",
                do="lower --sparsity, or measure again with other bounds",
            )
        removal = math.ceil(sparsity * self.scope_parameters - 1e-6)
        choice = dynamic_programming(slots, Budget(at_most=(self.before - removal,)))
        blocks: dict[int, dict[UnitKind, int]] = {}
        for sublayer, keep in zip(self.sublayers, kept_units(slots, choice), strict=True):
            blocks.setdefault(sublayer.block, {})[sublayer.kind] = keep
        attention = any("attention" in kinds for kinds in blocks.values())
        return BlockWidths(blocks=blocks, head_units=self.head_units if attention else None)

    def curve(self) -> list[CurvePoint]:
        """Return every choice that is the best of its size at some price of size, from the largest to the smallest."""
        from structprune.allocation.path import lagrangian_path

        path = lagrangian_path(self.slots())
        sizes = [(path.start_cost, path.start_price), *((point.cost, point.price) for point in path.points)]
        return [
            CurvePoint(share=(self.before - size) / self.scope_parameters, removed=self.before - size, loss=loss)
            for size, loss in sizes
        ]


def read_path(file: str | Path) -> RemovalPath:
    """Read a file that a run has left. Raises InputError that names the file and the entry."""
    path = expand_user(str(file))
    check_path(path, "the file of --allocation")
    if not path.is_file():
        raise InputError("there is no file of costs here", where=str(path), wanted=f"an earlier run's {PATH_NAME}")
    return read_validated(path, RemovalPath, "--allocation", f"an earlier run's {PATH_NAME}")


def with_allocation(values: Mapping[str, Any], file: str | Path, share: float) -> dict[str, Any]:
    """Put the widths for a share in the place of the share, in a recipe's values.

    Raises InputError for values that decide the widths too, UnsupportedError for a method that has none.
    """
    kind = Recipe.kind_for(values)
    if not issubclass(kind, UnitsRecipe):
        raise UnsupportedError(
            f"--allocation gives widths, and method {values.get('method') or DEFAULT_METHOD!r} removes {kind.removes}",
            got=str(file),
        )
    other = [flag_name(name) for name in ("widths", "allocator", *TARGETS) if values.get(name) is not None]
    other += ["--search"] if values.get("search") not in (None, kind.model_fields["search"].default) else []
    if other:
        raise InputError(
            f"{', '.join(other)} and --allocation would decide the same thing",
            wanted="--allocation with --sparsity alone",
        )
    kept = {name: value for name, value in values.items() if name != "sparsity"}
    return {**kept, "widths": read_path(file).widths(share)}
