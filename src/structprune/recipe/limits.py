"""Limits of what a run leaves: numbers of parameters, bytes of the files, bytes of the KV cache."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer

from structprune.errors import InputError
from structprune.memory import parse_bytes

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_count(value: Any) -> Any:
    """Read `1B`, `1.3b`, `350M`, `20_000` or a whole number. Raises InputError for any other text."""
    if not isinstance(value, str | bool):
        return value
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([kmbgt]?)\s*", str(value).lower())
    if match is None:
        raise InputError("a number cannot be read", got=repr(value)[:40], wanted="a number such as 350M, 1.3B or 1000")
    return round(float(match[1]) * _COUNTS[match[2]]) if match[2] or "." in match[1] else int(match[1])


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]
"""A number, or a text such as `1.3B`."""


class FileLimit(BaseModel, frozen=True, extra="forbid"):
    """The most bytes that a file may have; zero: there is no limit."""

    at_most: Annotated[int, Field(ge=0)] = 0
    gguf_type: str = ""
    """Which file: the GGUF file of this type, such as `q4_k_m`; empty: the weight files that are written."""

    @classmethod
    def read(cls, value: Any) -> Any:
        """Read a number of bytes, `4GiB`, or `q4_k_m:4GiB`. Raises InputError for any other text."""
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(at_most=value)
        if not isinstance(value, str):
            return value
        gguf_type, colon, size = value.rpartition(":")
        found = cls(at_most=parse_bytes(size), gguf_type=gguf_type.strip().lower())
        if not found.at_most or (colon and not found.gguf_type):
            raise InputError(
                "a limit of bytes cannot be read",
                got=repr(value)[:40],
                wanted="bytes such as 4GiB, or those of a GGUF file of some type such as q4_k_m:4GiB",
            )
        return found

    def __bool__(self) -> bool:
        return self.at_most > 0

    def __str__(self) -> str:
        return f"{self.gguf_type}:{self.at_most}" if self.gguf_type else str(self.at_most)

    @property
    def plain(self) -> int | str | None:
        """What stands in a recipe: a number where no type is said, nothing where there is no limit."""
        if not self:
            return None
        return str(self) if self.gguf_type else self.at_most


FileBytes = Annotated[
    FileLimit,
    BeforeValidator(FileLimit.read),
    PlainSerializer(lambda value: value.plain, return_type=int | str | None),
]
"""A limit, or a text such as `4GiB` or `q4_k_m:4GiB`."""
NO_FILE_LIMIT = FileLimit()
FileAtMost = Annotated[
    FileLimit,
    BeforeValidator(lambda value: NO_FILE_LIMIT if value is None else FileLimit.read(value)),
    PlainSerializer(lambda value: value.plain, return_type=int | str | None),
]
"""The most bytes; null in JSON where there is no limit."""


class KvCacheLimit(BaseModel, frozen=True, extra="forbid"):
    """The most that the keys and values of one sequence of so many tokens may take; zeros: there is no limit."""

    tokens: Annotated[int, Field(ge=0)] = 0
    at_most: Annotated[int, Field(ge=0)] = 0
    """Bytes."""

    @classmethod
    def read(cls, value: Any) -> Any:
        """Read `8192:2GiB`, tokens and bytes. Raises InputError for any other text."""
        if not isinstance(value, str):
            return value
        tokens, colon, size = value.partition(":")
        found = cls(tokens=parse_count(tokens), at_most=parse_bytes(size)) if colon else cls()
        if not found.tokens or not found.at_most:
            raise InputError(
                "a limit of the KV cache cannot be read",
                got=repr(value)[:40],
                wanted="tokens and bytes, such as 8192:2GiB",
            )
        return found

    def __bool__(self) -> bool:
        return self.at_most > 0

    def __str__(self) -> str:
        return f"{self.tokens}:{self.at_most}"


KvCache = Annotated[KvCacheLimit, BeforeValidator(KvCacheLimit.read), PlainSerializer(str)]
"""A limit, or a text such as `8192:2GiB`."""
NO_CACHE_LIMIT = KvCacheLimit()

AtMost = Annotated[
    int,
    BeforeValidator(lambda value: 0 if value is None else value),
    PlainSerializer(lambda value: value or None, return_type=int | None),
]
"""The most of something, 0 where there is no limit; null in JSON."""
CacheAtMost = Annotated[
    KvCacheLimit,
    BeforeValidator(lambda value: NO_CACHE_LIMIT if value is None else KvCacheLimit.read(value)),
    PlainSerializer(lambda value: str(value) if value else None, return_type=str | None),
]
"""The most of a KV cache; null in JSON where there is no limit."""

TARGETS = ("target_parameters", "target_bytes", "target_kv_cache", "target_latency")
"""Fields of a recipe that limit what a run leaves."""


def targets_of(recipe: BaseModel) -> dict[str, Any]:
    """Return the limits that a recipe asks for, by field."""
    return {name: value for name in TARGETS if (value := getattr(recipe, name, None))}
