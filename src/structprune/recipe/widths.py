"""Widths decided outside the tool: how many units each block keeps, from a file or a mapping in the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, PlainSerializer, StrictInt, ValidationError

from structprune.errors import InputError
from structprune.files import check_path, expand_user, read_json
from structprune.kinds import HeadUnits, UnitKind

WIDTHS_NAME = "pruning_widths.json"
_EXAMPLE = '{"0": {"attention": 3, "mlp": 1024}, "1": ...}: block -> kind -> units to keep'


class BlockWidths(BaseModel, frozen=True, extra="forbid"):
    """Units to keep of blocks; a block or a kind that is not named keeps all of its units, and none is said by {}."""

    blocks: dict[NonNegativeInt, dict[UnitKind, Annotated[StrictInt, Field(ge=0)]]] = Field(default={}, repr=False)
    """Block -> kind -> units; zero removes the sublayer."""
    head_units: HeadUnits | None = None
    """What the units of attention are, where a run has saved it."""

    @property
    def kinds(self) -> frozenset[UnitKind]:
        """Kinds of units that are named for some block."""
        return frozenset(kind for block in self.blocks.values() for kind in block)

    def kept(self, block: int, kind: UnitKind, num_units: int) -> int:
        """Return the units that a sublayer of so many keeps."""
        return self.blocks.get(block, {}).get(kind, num_units)


ALL_KEPT = BlockWidths()
"""Widths that name no block: nothing is decided outside."""


def read_widths(path: Path) -> BlockWidths:
    """Read a JSON object block -> kind -> units, alone or as the entry `blocks` that a run saves.

    Raises InputError that names the file and the entry; CheckpointError for a file that is no JSON object.
    """
    check_path(path, "the file of widths")
    if not path.is_file():
        raise InputError("there is no file of widths here", where=str(path), wanted=_EXAMPLE)
    return _validated(read_json(path, once=True), str(path))


def _validated(data: Mapping[str, Any], where: str) -> BlockWidths:
    data = data if data.keys() & BlockWidths.model_fields else {"blocks": data}
    try:
        widths = BlockWidths.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        # A key that is no number has an entry of its own behind its name.
        place = ", ".join(str(entry) for entry in first["loc"][1:] if entry != "[key]")
        raise InputError(
            f"--widths is not usable: {first['msg'].lower()}",
            where=f"{where}: block {place}" if place else where,
            got=repr(first.get("input"))[:80],
            wanted=_EXAMPLE,
        ) from None
    names = data.get("blocks", {})
    if len(widths.blocks) < len(names):
        # Different names of one number, such as 1 and 01.
        raise InputError("--widths names a block twice", where=where, got=", ".join(map(str, names))[:80])
    if not widths.kinds:
        raise InputError("--widths names no block", where=where, wanted=_EXAMPLE)
    return widths


def as_widths(value: Any) -> BlockWidths:
    """Read what a recipe may say: a path, a mapping, or nothing. Raises InputError for anything else."""
    if value is None or isinstance(value, BlockWidths):
        return value or ALL_KEPT
    if isinstance(value, str | Path):
        return read_widths(expand_user(str(value)))
    if isinstance(value, Mapping):
        return _validated(value, "recipe")
    raise InputError("--widths is not usable", got=repr(value)[:80], wanted=f"a JSON file, or {_EXAMPLE}")


Widths = Annotated[
    BlockWidths,
    BeforeValidator(as_widths),
    PlainSerializer(lambda value: saved_widths(value) if value.blocks else None, return_type=dict[str, Any] | None),
]
"""A mapping, or the path of a file that holds one; null in JSON where nothing is decided."""


def saved_widths(widths: BlockWidths) -> dict[str, Any]:
    """Put them into JSON, as `read_widths` takes them."""
    blocks = {str(number): dict(kinds) for number, kinds in sorted(widths.blocks.items())}
    return {"head_units": widths.head_units, "blocks": blocks}
