"""The tokenizer of a GGUF file, built from the file's own tokens, merges or scores; the judge is llama.cpp's.

Two kinds are read: byte-level BPE (`gpt2`), whose way of cutting text is a name in the file, and SentencePiece's BPE
with scores (`llama`). The second merges whatever neighbours make the token with the highest score, so each way to make
a token of two others is a merge here, in the order of the scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from structprune.architectures.gguf.fields import is_one_of
from structprune.architectures.sources.gguf_pretokenizers import DEFAULT, PRE_TOKENIZERS
from structprune.checkpoint.gguf_file import GgufHeader
from structprune.errors import CheckpointError, UnsupportedError

_PREFIX = "tokenizer.ggml."
# Types of tokens, by the format.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\u2581"
# Each place where a longer one could be cut would be a merge of its own.
_MOST_CHARACTERS = 512
# Keys that change no id of a text: what stands for turns, gaps and templates, and other forms of the same tokenizer.
_INERT = (
    "eot_token_id",
    "eom_token_id",
    "seperator_token_id",
    "mask_token_id",
    "cls_token_id",
    "prefix_token_id",
    "suffix_token_id",
    "middle_token_id",
    "fim_pre_token_id",
    "fim_suf_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "eos_token_ids",
    "token_type_count",
)
# Keys that change ids, and the values by which they do not.
_NEUTRAL = {"remove_extra_whitespaces": (False,), "add_sep_token": (False,)}


class _Entries:
    """The tokenizer's keys, each to be taken, as in gguf_fields.py."""

    def __init__(self, header: GgufHeader) -> None:
        self.where = str(header.path)
        own = header.metadata.items()
        self._values = {key.removeprefix(_PREFIX): value for key, value in own if key.startswith(_PREFIX)}
        self._used: set[str] = set()

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return the value, or `default`. Raises CheckpointError for one of another type."""
        self._used.add(name)
        value = self._values.get(name, default)
        if value is not default and not isinstance(value, kind):
            raise CheckpointError(
                f"the GGUF file's {_PREFIX}{name} is of another type than the format says", where=self.where
            )
        return value

    def check_all_taken(self) -> None:
        """Raise UnsupportedError that names a key that would change the tokens of a text."""
        for name, value in self._values.items():
            if name not in self._used and name not in _INERT and not is_one_of(value, _NEUTRAL.get(name, ())):
                raise UnsupportedError(
                    f"the GGUF file holds something that would be lost: the key {_PREFIX}{name} has no reader",
                    where=self.where,
                    got=str(value)[:80],
                    do="start from the model's Hugging Face checkpoint",
                )


def write_tokenizer(header: GgufHeader, vocab_size: int, directory: Path) -> str | None:
    """Write tokenizer.json and what belongs to it into `directory`. How it was made, or None for a file without one.

    Raises UnsupportedError for another kind of tokenizer or a pre-tokenizer without a known name, CheckpointError for
    tokens that do not fit together or are more than `vocab_size`.
    """
    entries = _Entries(header)
    kind = entries.take("model", str, "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in _KINDS:
        raise UnsupportedError(
            "this kind of tokenizer cannot be read from a GGUF file",
            where=entries.where,
            got=kind,
            wanted=" or ".join(_KINDS),
            do="start from the model's Hugging Face checkpoint",
        )
    tokens, types = _tokens(entries, vocab_size)
    tokenizer, add_bos, origin = _KINDS[kind](entries, tokens, types)
    special = {name: _special(entries, f"{key}_token_id", tokens) for name, key in _SPECIAL.items()}
    _add_marked(tokenizer, tokens, types)
    _add_ends(tokenizer, entries, special, tokens, add_bos=add_bos)
    entries.check_all_taken()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": None if index is None else tokens[index] for name, index in special.items()},
    )
    templates = _chat_templates(header.metadata)
    if templates:
        fast.chat_template = templates if len(templates) > 1 else next(iter(templates.values()))
    fast.save_pretrained(str(directory))
    return f"built from the GGUF file: {origin}"


_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _tokens(entries: _Entries, vocab_size: int) -> tuple[list[str], list[int]]:
    """Read the token of each id, and its type."""
    tokens: list[str] = entries.take("tokens", list, [])
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError("the GGUF file's tokenizer has no tokens", where=entries.where)
    if len(tokens) > vocab_size:
        raise CheckpointError(
            "the GGUF file's tokenizer has more tokens than the embedding has rows",
            where=entries.where,
            got=len(tokens),
            wanted=f"at most {vocab_size}",
        )
    types = _numbers(entries, "token_type", len(tokens))
    kinds = [1] * len(tokens) if types is None else [int(kind) for kind in types]
    # llama.cpp's names for tokens without text.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise CheckpointError("the GGUF file's tokenizer has a token twice", where=entries.where, got=repr(twice))
    return tokens, kinds


def _numbers(entries: _Entries, name: str, count: int) -> np.ndarray[Any, Any] | None:
    values = entries.take(name, np.ndarray)
    if values is not None and len(values) < count:
        raise CheckpointError(
            f"the GGUF file's {_PREFIX}{name} is too short", where=entries.where, got=len(values), wanted=count
        )
    return None if values is None else values[:count]


def _special(entries: _Entries, name: str, tokens: list[str]) -> int | None:
    """Read the id of a token with a task; one beyond the vocabulary counts as none, as in llama.cpp."""
    index = entries.take(name, int)
    return index if index is not None and 0 <= index < len(tokens) else None


def _byte_level(entries: _Entries, tokens: list[str], _: list[int]) -> tuple[Tokenizer, bool, str]:
    """Return the tokenizer without its marked tokens, whether a start token is usual, and what it was made of."""
    name = entries.take("pre", str, DEFAULT) or DEFAULT
    # Scores of a BPE are not used; byte-level text has no prefix and keeps its spaces.
    entries.take("scores", np.ndarray)
    entries.take("add_space_prefix", bool)
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            "the GGUF file's pre-tokenizer has no known way to cut text",
            where=entries.where,
            got=f"tokenizer.ggml.pre {name!r}",
            wanted=", ".join(PRE_TOKENIZERS),
            do="start from the model's Hugging Face checkpoint",
        )
    pre = PRE_TOKENIZERS[name]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [_pair(entries, merge, vocabulary) for merge in entries.take("merges", list, [])]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in pre.expressions]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer, pre.add_bos, f"byte-level BPE, pre-tokenizer {name}"


def _pair(entries: _Entries, merge: Any, vocabulary: Mapping[str, int]) -> tuple[str, str]:
    """Return the two tokens of a merge, which a space parts; one in front would be part of the first."""
    cut = merge.find(" ", 1) if isinstance(merge, str) else -1
    first, second = (merge[:cut], merge[cut + 1 :]) if cut > 0 else ("", "")
    if not {first, second, first + second} <= vocabulary.keys():
        raise CheckpointError(
            "the GGUF file's tokenizer has a merge of tokens that it lacks", where=entries.where, got=repr(merge)[:80]
        )
    return first, second


def _scored(entries: _Entries, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool, str]:
    scores = _numbers(entries, "scores", len(tokens))
    if scores is None:
        raise CheckpointError("the GGUF file's SentencePiece tokenizer has no scores", where=entries.where)
    entries.take("pre", str)
    # Where a file has merges too, llama.cpp takes the scores.
    entries.take("merges", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        if len(token) > _MOST_CHARACTERS:
            raise CheckpointError(
                "the GGUF file's tokenizer has a token that is too long",
                where=entries.where,
                got=f"{len(token)} characters",
                wanted=f"at most {_MOST_CHARACTERS}",
            )
        for cut in range(1, len(token)):
            first, second = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if first is not None and second is not None:
                merges.append((-score, first, second, (token[:cut], token[cut:])))
    merges.sort()
    model = models.BPE(
        vocab=vocabulary, merges=[pair for *_, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = entries.take("add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])  # pyright: ignore[reportAttributeAccessIssue]
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True, f"SentencePiece BPE with scores, {'a' if prefix else 'no'} space in front"


_KINDS: Mapping[str, Callable[[_Entries, list[str], list[int]], tuple[Tokenizer, bool, str]]] = {
    "gpt2": _byte_level,
    "llama": _scored,
}
"""Kind of tokenizer, by the file's word for it -> its reader: byte-level BPE, and SentencePiece's BPE."""


def _add_marked(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Add the tokens that are found in a text before anything is cut."""
    special = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _UNKNOWN)
    ]
    plain = [
        AddedToken(token, normalized=False, special=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind == _USER_DEFINED
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_ends(
    tokenizer: Tokenizer, entries: _Entries, special: Mapping[str, int | None], tokens: list[str], *, add_bos: bool
) -> None:
    """Add the tokens that are put before and behind a text that is encoded with special tokens."""
    starts, ends = entries.take("add_bos_token", bool, add_bos), entries.take("add_eos_token", bool, False)
    bos, eos = special["bos"] if starts else None, special["eos"] if ends else None
    before, behind = ([] if index is None else [tokens[index]] for index in (bos, eos))
    if not before and not behind:
        return
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{name}:1" for name in before), "$B:1", *(f"{name}:1" for name in behind)],
        special_tokens=[(tokens[index], index) for index in {bos, eos} if index is not None],
    )


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Name -> template; the one without a name is `default`."""
    return {
        key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": value
        for key, value in metadata.items()
        if key.startswith("tokenizer.chat_template") and isinstance(value, str)
    }
