"""The decision: which tokens of a model stay, as a file that a run reads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, model_validator

from structprune.errors import InputError
from structprune.files import check_path, expand_user, read_validated

KEPT_NAME = "pruning_vocabulary.json"
"""What a run calls its list in the output."""
_ROWS = 2**24
"""More rows than any embedding has."""


class KeptTokens(BaseModel, frozen=True, extra="forbid"):
    """Tokens that stay, by their ids in the source; without entries all do."""

    schema_version: Literal[1] = 1
    source: str = ""
    num_rows: Annotated[int, Field(ge=0, le=_ROWS)] = 0
    """Rows of the source's embedding."""
    tokenizer: str = ""
    """SHA-256 of the source's tokenizer.json, or of what stands for it."""
    ids: Annotated[tuple[int, ...], Field(repr=False)] = ()
    """Ascending; the new id of a token is its place here."""
    texts: tuple[str, ...] = ()
    """What the tokens were counted on."""
    num_tokens: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Tokens of all texts together."""
    covered: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of them that stay, the mean of the texts' own."""
    merged_rows: bool = False
    """Whether the rows beside this list carry missing tokens; of what a run has written."""

    @model_validator(mode="after")
    def _ascending(self) -> KeptTokens:
        if any(a >= b for a, b in itertools.pairwise(self.ids)):
            raise ValueError("ids do not ascend")
        if self.ids and not 0 <= self.ids[0] <= self.ids[-1] < self.num_rows:
            raise ValueError("an id is no row of the embedding")
        return self

    def __bool__(self) -> bool:
        return bool(self.ids)

    @property
    def new_ids(self) -> dict[int, int]:
        """Id in the source -> id in the result."""
        return {old: new for new, old in enumerate(self.ids)}


ALL_TOKENS = KeptTokens()


def read_kept(path: Path) -> KeptTokens:
    """Read what `structprune vocabulary` has written. Raises InputError that names the file and the entry."""
    check_path(path, "the file of --vocabulary")
    if not path.is_file():
        raise InputError(
            "there is no list of tokens here",
            where=str(path),
            do="make it: structprune vocabulary MODEL -o FILE --size NUMBER --text TEXT",
        )
    kept = read_validated(path, KeptTokens, "--vocabulary", "what structprune vocabulary has written")
    if not kept:
        raise InputError("--vocabulary names no tokens", where=str(path))
    return kept


def as_kept(value: Any) -> Any:
    """Read the file that a path names, or return a list or its content. Raises InputError for a file that is none."""
    if value is None or isinstance(value, KeptTokens):
        return value or ALL_TOKENS
    return value if isinstance(value, Mapping) else read_kept(expand_user(str(value)))


Vocabulary = Annotated[
    KeptTokens,
    BeforeValidator(as_kept),
    PlainSerializer(lambda value: value.model_dump(mode="json") if value else None, return_type=dict[str, Any] | None),
]
"""A list of tokens, its content, or the path of its file; null in JSON where all stay."""
