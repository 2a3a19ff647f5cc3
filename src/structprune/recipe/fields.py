"""How a setting is declared: a type with bounds, a description, and its place on the command line."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainSerializer, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo

from structprune.errors import InputError
from structprune.files import DEFAULT_SHARD_BYTES as DEFAULT_SHARD_BYTES
from structprune.kinds import StartToken
from structprune.memory import parse_bytes
from structprune.texts import AUTO, weighted_texts

Settings = TypeVar("Settings", bound=BaseModel)
METHODS_OWN = "the method's"
SAID: Any = Field(default=...)
"""The default of a field that has none: in a resolved recipe everything is said."""


class Group(StrEnum):
    """A heading of the command line's help."""

    WHAT = "What to remove"
    HOW = "How"
    CALIBRATION = "Calibration"
    RESOURCES = "Resources"
    ADVANCED = "Advanced"


@dataclass(frozen=True, slots=True)
class Flag:
    """A field's place on the command line, as metadata of its type: `Annotated[int, Flag(Group.HOW)]`."""

    group: Group
    unset: str = ""
    """What is taken where nothing is given, in words, for a field whose default does not say it."""
    names: str = ""
    """Both names of a switch, `--on/--off`; empty: the field's name, and `--no-` before it."""
    beside: str = ""
    """The field that has to ask for something, where this one says how that is done; alone it would change nothing."""


def flag_of(field: FieldInfo) -> Flag:
    """Return how a recipe's field was declared."""
    return next(entry for entry in field.metadata if isinstance(entry, Flag))


ByteCount = Annotated[int, BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value)]
"""A number, or a text such as `4GiB`."""


_SECONDS = {"s": 1, "m": 60, "h": 3600}


def _read_seconds(value: Any) -> Any:
    """Read `10m`, `1.5h` or `90s`; numbers are seconds. Raises InputError for a text without a unit."""
    if not isinstance(value, str | bool):
        return round(value) if isinstance(value, float) and math.isfinite(value) else value
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*([smh])\s*", str(value).lower())
    if match is None:
        raise InputError(
            "a time cannot be read", got=repr(value), wanted="a number with a unit, such as 10m, 1.5h or 90s"
        )
    return round(float(match[1]) * _SECONDS[match[2]])


Seconds = Annotated[int, BeforeValidator(_read_seconds)]
"""A number of seconds, or a text such as `10m`."""


def _read_share(value: Any, info: ValidationInfo) -> Any:
    """Read `30%` as 0.3. Raises InputError for a number that was meant as a percentage."""
    given = value if isinstance(value, str) else repr(value)
    if isinstance(value, str):
        try:
            if value.strip().endswith("%"):
                return float(value.strip().removesuffix("%")) / 100
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < 100:
        raise InputError(
            f"--{(info.field_name or '').replace('_', '-')} is not usable",
            got=given,
            wanted="a share, at least 0 and less than 1",
            do=f"did you mean {value / 100:g}?",
        )
    return value


def _read_switch(value: Any) -> Any:
    """Read the values that YAML makes of yes and no."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


BosSetting = Annotated[StartToken, BeforeValidator(_read_switch), Flag(Group.CALIBRATION)]
"""Whether windows begin with the start token."""
BOS_FIELD: Any = Field(
    default="auto",
    description="whether every window begins with the model's start token: auto, yes or no; auto: as its tokenizer "
    "encodes a text",
)

AdapterSetting = Annotated[str, BeforeValidator(lambda value: "none" if value is None else value), Flag(Group.WHAT)]
"""Folder of a LoRA adapter, `beside` or `none`."""

OutputDtype = Annotated[Literal["source", "bfloat16", "float16", "float32"], Flag(Group.WHAT)]
"""Number format of the weights that are written."""
OUTPUT_DTYPE_FIELD: Any = Field(
    default="source",
    description="number format of the weights as they are written: source, bfloat16, float16 or float32; source: "
    "each as it is stored, bfloat16 where it is quantised there",
)

Share = Annotated[float, BeforeValidator(_read_share)]
"""A number from 0 to below 1, or a text such as `30%`."""


def validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build the settings `kind`. Raises InputError that names the flag, what it got and what it takes."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # Only the field: a union's errors go on with the name of the alternative.
        name = str(first["loc"][0]) if first["loc"] else "recipe"
        flag = "--" + name.replace("_", "-")
        raise InputError(
            f"{flag} is not usable", got=reprlib.repr(first.get("input")), wanted=first["msg"].lower()
        ) from None


def settings_fingerprint(settings: BaseModel) -> str:
    """Hash the canonical JSON of every field with SHA-256."""
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_tuple(value: Any) -> Any:
    if value is None:
        return (AUTO,)
    return (value,) if isinstance(value, str) else value


def _checked(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not texts:
        raise ValueError("no text is named")
    weighted_texts(texts)
    return texts


# One text is a plain string in files, as it was before there could be several.
CalibrationTexts = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_checked),
    PlainSerializer(lambda texts: texts[0] if len(texts) == 1 else list(texts)),
]
