"""Limits of time: how long a model takes beside the dense one, by a table of what each width takes on one machine."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, model_validator

from structprune.errors import InputError
from structprune.files import check_path, expand_user, read_validated
from structprune.kinds import UnitKind

Phase = Literal["prefill", "decode"]
"""What is timed: reading a prompt, or writing one token behind it."""
_NANOSECONDS = {"us": 1e3, "ms": 1e6, "s": 1e9}
_EXAMPLE = "a share of the dense model's time such as 0.75x or decode:0.75x, or a time such as prefill:120ms"


class LatencyLimit(BaseModel, frozen=True, extra="forbid"):
    """The longest that a model may take; zeros: there is no limit."""

    phase: Phase = "prefill"
    share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Share of the dense model's time."""
    nanoseconds: Annotated[int, Field(ge=0)] = 0
    """The time itself, where no share is given."""

    @classmethod
    def read(cls, value: Any) -> Any:
        """Read `0.75x`, `decode:0.75x` or `prefill:120ms`. Raises InputError for any other text."""
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*(?:(prefill|decode):)?(\d{1,9}(?:\.\d{1,9})?)\s*(x|us|ms|s)\s*", value.lower())
        phase: Phase = "decode" if match and match[1] == "decode" else "prefill"
        number = float(match[2]) if match else 0.0
        if match is None or number <= 0:
            raise InputError("a limit of time cannot be read", got=repr(value)[:40], wanted=_EXAMPLE)
        if match[3] == "x":
            return cls(phase=phase, share=number)
        return cls(phase=phase, nanoseconds=max(1, round(number * _NANOSECONDS[match[3]])))

    def __bool__(self) -> bool:
        return self.share > 0 or self.nanoseconds > 0

    def __str__(self) -> str:
        return f"{self.phase}:{f'{self.share:g}x' if self.share else f'{self.nanoseconds / 1e6:.12g}ms'}"


Latency = Annotated[LatencyLimit, BeforeValidator(LatencyLimit.read), PlainSerializer(str)]
"""A limit, or a text such as `decode:0.75x`."""
NO_LATENCY_LIMIT = LatencyLimit()
LatencyAtMost = Annotated[
    LatencyLimit,
    BeforeValidator(lambda value: NO_LATENCY_LIMIT if value is None else LatencyLimit.read(value)),
    PlainSerializer(lambda value: str(value) if value else None, return_type=str | None),
]
"""The longest time; null in JSON where there is no limit."""

Microseconds = Annotated[float, Field(allow_inf_nan=False)]


class SublayerTimes(BaseModel, frozen=True, extra="forbid"):
    """What a sublayer takes at some widths, beyond what a block takes without it."""

    kind: UnitKind
    units: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2)]
    """Widths that were timed, ascending: from 0, where the sublayer is gone, to that of the source."""
    prefill: tuple[Microseconds, ...]
    decode: tuple[Microseconds, ...]

    @model_validator(mode="after")
    def _alike(self) -> SublayerTimes:
        if not len(self.units) == len(self.prefill) == len(self.decode):
            raise ValueError("units, prefill and decode have different lengths")
        if self.units[0] != 0 or any(a >= b for a, b in itertools.pairwise(self.units)):
            raise ValueError("units do not ascend from 0")
        return self

    @property
    def num_units(self) -> int:
        """Units of the source."""
        return self.units[-1]

    def nanoseconds(self, phase: Phase) -> tuple[tuple[int, int], ...]:
        """Return (units, time) of each width that was timed, as times of a phase that never fall with the width.

        Times that fall where units are added are noise: neighbours are averaged until none does (pool adjacent
        violators).
        """
        # Torch is not wanted where a command line is read.
        import torch

        from structprune.allocation.across import increasing

        measured = torch.tensor(self.prefill if phase == "prefill" else self.decode, dtype=torch.float64)
        smooth: list[float] = increasing(measured.clamp_min(0)).tolist()
        return tuple((units, round(1000 * (time - smooth[0]))) for units, time in zip(self.units, smooth, strict=True))


class LatencyTable(BaseModel, frozen=True, extra="forbid"):
    """What the sublayers of a model take on one machine, by their widths; without entries where there is no table."""

    schema_version: Literal[1] = 1
    source: str = ""
    device: str = ""
    dtype: str = ""
    machine: str = ""
    batch: int = 0
    prompt_tokens: int = 0
    prefill: Microseconds = 0.0
    """Time in which the whole source reads a prompt of so many tokens in each sequence of the batch."""
    decode: Microseconds = 0.0
    """Time in which it writes one token of each sequence."""
    sublayers: tuple[SublayerTimes, ...] = Field(default=(), repr=False)
    """One for each kind and number of units that a block of the source has."""

    def __bool__(self) -> bool:
        return bool(self.sublayers)

    def whole(self, phase: Phase) -> int:
        """Return what the source takes, in nanoseconds."""
        return round(1000 * (self.prefill if phase == "prefill" else self.decode))

    def times(self, kind: UnitKind, num_units: int) -> SublayerTimes:
        """Return the times of a sublayer. Raises InputError if the table has none of such a one."""
        for times in self.sublayers:
            if times.kind == kind and times.num_units == num_units:
                return times
        raise InputError(
            "--latency-table knows nothing of a sublayer of this model",
            where=f"the table of {self.source}",
            got=f"{kind} of {num_units} units",
            wanted=" or ".join(f"{times.kind} of {times.num_units}" for times in self.sublayers),
            do="make a table of this model: structprune bench MODEL --table FILE",
        )


NO_TABLE = LatencyTable()


def _as_table(value: Any) -> Any:
    """Read a file's path or its content; nothing is no table. Raises InputError that names the entry."""
    if value is None or isinstance(value, LatencyTable):
        return value or NO_TABLE
    if isinstance(value, Mapping):
        return value
    path = expand_user(str(value))
    check_path(path, "the file of --latency-table")
    if not path.is_file():
        raise InputError("there is no table here", where=str(path), do="make it: structprune bench MODEL --table FILE")
    return read_table(path)


def read_table(path: Path) -> LatencyTable:
    """Read what `structprune bench --table` has written. Raises InputError that names the file and the entry."""
    table = read_validated(path, LatencyTable, "--latency-table", "what structprune bench --table has written")
    if not table:
        raise InputError("--latency-table has no times", where=str(path))
    return table


Table = Annotated[
    LatencyTable,
    BeforeValidator(_as_table),
    PlainSerializer(lambda value: value.model_dump(mode="json") if value else None, return_type=dict[str, Any] | None),
]
"""A table, its content, or the path of its file; null in JSON where there is none."""
