"""What may be asked of the vocabulary: a list of the tokens that stay, or how many are to."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainSerializer

from structprune.errors import InputError
from structprune.files import expand_user
from structprune.recipe.fields import Flag, Group
from structprune.recipe.limits import parse_count
from structprune.texts import weighted_texts
from structprune.vocabulary.kept import ALL_TOKENS, KeptTokens, as_kept

_AUTO = "auto"
_NUMBER = re.compile(r"\s*\d[\d_]*(\.\d+)?\s*[km]?\s*", re.IGNORECASE)


class WantedTokens(BaseModel, frozen=True, extra="forbid"):
    """How many tokens are to stay, where texts are still to decide which."""

    size: Annotated[int, Field(ge=0)]
    """Zero: as many as are worth their row."""

    def __str__(self) -> str:
        return str(self.size) if self.size else _AUTO


AUTO_TOKENS = WantedTokens(size=0)
"""The number of tokens that are worth their row, by measurements."""


def _as_asked(value: Any) -> Any:
    """Read a size such as `64k`; a file of such a name is taken as it is."""
    if isinstance(value, WantedTokens):
        return value
    if value == _AUTO:
        return AUTO_TOKENS
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and _NUMBER.fullmatch(value) and not expand_user(value).is_file()):
        size = parse_count(value)
        if size < 1:
            raise InputError("a vocabulary has tokens", got=f"--vocabulary {value}", wanted="a number such as 64000")
        return WantedTokens(size=size)
    return as_kept(value)


def _checked(texts: tuple[str, ...]) -> tuple[str, ...]:
    weighted_texts(texts)
    return texts


def _in_json(value: KeptTokens | WantedTokens) -> Any:
    if isinstance(value, WantedTokens):
        return value.size or _AUTO
    return value.model_dump(mode="json") if value else None


AskedVocabulary = Annotated[
    KeptTokens | WantedTokens,
    BeforeValidator(_as_asked),
    PlainSerializer(_in_json, return_type=dict[str, Any] | int | str | None),
    Flag(Group.WHAT, unset="all tokens stay"),
]
"""A list of tokens, its content, the path of its file, a number such as `64k`, or `auto`; null where all stay."""
VOCABULARY_FIELD: Any = Field(
    default=ALL_TOKENS,
    description="tokens that stay, such as 64000 or 64k: those that the calibration texts and --vocabulary-text use "
    "most; auto: down to where more would cost more bits per byte than the MLP's channels do, or to where "
    "--target-parameters is met; or the JSON file of `structprune vocabulary MODEL -o FILE`",
)

VocabularyTexts = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value or ()),
    AfterValidator(_checked),
    Flag(Group.WHAT, unset="none"),
]
"""Texts with their weights, as they are asked for."""
VOCABULARY_TEXT_FIELD: Any = Field(
    default=(),
    description="text or jsonl file of any size that tokens are counted on too; given several times, each counts by "
    "its weight, as in code.jsonl:2",
)

DropReserve = Annotated[bool, Flag(Group.WHAT)]
"""Whether added tokens may go that stand for nothing yet."""
DROP_RESERVE_FIELD: Any = Field(
    default=False, description="let added tokens go that stand for nothing yet, such as <unused12>"
)


def decided_tokens(asked: KeptTokens | WantedTokens) -> KeptTokens:
    """Return the list of tokens. Raises InputError where there is only a number of them."""
    if isinstance(asked, WantedTokens):
        raise InputError(
            "it is not decided which tokens stay",
            got=f"--vocabulary {asked}",
            do="structprune vocabulary MODEL -o FILE decides it",
        )
    return asked
