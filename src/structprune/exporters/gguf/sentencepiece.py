"""Tokenizer metadata of what SentencePiece makes: a BPE with byte fallback (LLaMA 2, Mistral, Gemma), or a Unigram.

llama.cpp has no merges for the first but scores: of all neighbours that together are a token, those whose token has the
highest score are merged. A token's score here is minus the number of the first merge that makes it, which keeps the
order of the merges. Whether that gives the tokenizer's own ids is tried out before anything is written, since merges of
any kind say more than scores do, and a Unigram may be cut at words first.

The tokenizer is asked for as transformers loads it, which is not always what tokenizer.json says.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune.architectures.sources.same_tokens import PROBE_TEXT
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.errors import UnsupportedError
from structprune.exporters.gguf.entries import (
    ADVICE,
    MARKED,
    GgufTokenizer,
    TokenTable,
    entries_of,
    special_entries,
    token_table,
)
from structprune.exporters.gguf.spm_encoder import SPACE, SpmEncoder, byte_token
from structprune.exporters.gguf.unigram_encoder import UnigramEncoder

SPM_NAME = "tokenizer.model"
"""The file of the sentencepiece library."""
# What transformers needs to read it.
_SPM_PACKAGES = ("sentencepiece", "google.protobuf")
# Token ids with a task, which llama.cpp would take for 0, 1 and 2 where the file does not say.
_TASKS = ("bos", "eos", "unk", "pad")
# Texts that are encoded at once, and tokens that are joined to one text.
_BATCH, _JOINED = 4096, 8
# No token of most vocabularies: control characters, a private one, the last but one of all.
_RARE = "\x01\x7f\ue000\U0010fffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A kind of tokenizer that both have."""

    name: str
    """What llama.cpp calls it."""
    problem: Callable[[Mapping[str, Any]], str | None]
    """Content of a tokenizer.json -> what llama.cpp has not, or None."""
    scores: Callable[[TokenTable, Mapping[str, Any]], list[float]]
    """Tokens and the model of a tokenizer.json -> a score for each token."""
    encoder: type[SpmEncoder] | type[UnigramEncoder]
    """How llama.cpp cuts a text by it."""


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the content of a tokenizer.json is a BPE that spells unknown characters in bytes, or a Unigram."""
    model = tokenizer.get("model") or {}
    return model.get("type") in _KINDS and (model["type"] != "BPE" or bool(model.get("byte_fallback")))


def sentencepiece_tokenizer(directory: Path, vocab_size: int, config: Any) -> GgufTokenizer:
    """Build the entries for the tokenizer in `directory`, tokenizer.json or tokenizer.model; `config` is the model's.

    Raises UnsupportedError where llama.cpp would give other ids for a plain text, or where the library is missing that
    reads the file, CheckpointError for a tokenizer that cannot be loaded or has more tokens than `vocab_size`.
    """
    import gguf

    path = next(path for name in ("tokenizer.json", SPM_NAME) if (path := directory / name).is_file())
    tokenizer, content = _loaded(path, config)
    model, kind = content["model"], _KINDS[content["model"]["type"]]
    added = {str(token["content"]): token for token in content["added_tokens"]}
    table = token_table(_vocabulary(model), added, vocab_size, path)
    table = _typed(table, added, tokenizer.unk_token, bytes_=model["byte_fallback"])
    scores, prefix = kind.scores(table, model), _SPACES[_spaces(content)]
    special = special_entries(directory, vocab_size, merges=False)
    own = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _TASKS}
    special.special_token_ids |= {name: index for name, index in own.items() if isinstance(index, int)}
    special.add_special_token |= _ends(tokenizer.backend_tokenizer, own, path)
    encoder = kind.encoder(table, scores, add_space_prefix=prefix)
    notes = _compare(tokenizer.backend_tokenizer, encoder, table, path)
    writer: Any = gguf.GGUFWriter(None, "none")
    writer.add_tokenizer_model(kind.name)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(table.tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(table.types)
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(False)
    special.add_to_gguf(writer, quiet=True)
    return GgufTokenizer(entries=entries_of(writer), source=path, notes=notes)


def _loaded(path: Path, config: Any) -> tuple[Any, dict[str, Any]]:
    """Load the tokenizer beside `path` with transformers, and what its tokenizer.json would hold.

    Raises UnsupportedError where a package is missing, or where llama.cpp has no form of it.
    """
    missing = [name for name in _SPM_PACKAGES if not _is_installed(name)] if path.name == SPM_NAME else []
    if missing:
        raise UnsupportedError(
            f"{SPM_NAME} is read with further packages",
            where=str(path),
            got=f"no {', no '.join(missing)}",
            do=f"pip install sentencepiece protobuf, or {ADVICE}",
        )
    tokenizer = TextEncoder(path.parent, config=config).tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    problem = _problem(content) if content else f"a {type(tokenizer).__name__}"
    if problem is not None:
        raise UnsupportedError("llama.cpp has no form of this tokenizer", where=str(path), got=problem, do=ADVICE)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer, content


def _vocabulary(model: Mapping[str, Any]) -> Mapping[str, int]:
    """Map each token to its id, which in a Unigram is its place."""
    if model["type"] == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # Of the package that it lies in.
        return False


def _problem(content: Mapping[str, Any]) -> str | None:
    """Say what keeps llama.cpp from having this tokenizer; None if nothing does."""
    kind = _KINDS.get(content["model"]["type"])
    if kind is None:
        return f"a {content['model']['type']} model"
    problem = kind.problem(content)
    if problem is None and _spaces(content) not in _SPACES:
        steps = (content["normalizer"], content["pre_tokenizer"])
        return f"normalizer and pre-tokenizer {json.dumps(steps, ensure_ascii=False)[:300]}"
    return problem


def _merges_problem(content: Mapping[str, Any]) -> str | None:
    model = content["model"]
    if not model["byte_fallback"]:
        return "a BPE model without byte fallback"
    if not model["merges"]:
        return "a BPE without merges"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "a BPE with marks at parts of words"
    names = model["vocab"].keys() | {token["content"] for token in content["added_tokens"]}
    # llama.cpp looks for the character where a byte has no token, which is the same below 128.
    missing = [
        value for value in range(256) if byte_token(value) not in names and not (value < 128 and chr(value) in names)
    ]
    return f"no token for byte {byte_token(missing[0])}" if missing else None


def _unigram_problem(content: Mapping[str, Any]) -> str | None:
    if content["model"]["byte_fallback"]:
        return "a Unigram model with byte fallback, which llama.cpp's has not"
    return "a Unigram model without an unknown token" if content["model"]["unk_id"] is None else None


def _flat(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """List the steps of a normalizer or pre-tokenizer, those of a sequence one by one."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _flat(inner, name)] if part["type"] == "Sequence" else [part]


def _spaces(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the steps before the merges; what is not known here has no name in _SPACES."""
    names: list[str] = []
    for step in _flat(content["normalizer"], "normalizers") + _flat(content["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                names.append("prepend")
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                names.append("replace")
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}:
                names.append(f"metaspace {scheme}")
            case {"type": "Split", "pattern": {"String": " "}} if "replace" in names:
                # Cuts nothing: no space is left.
                pass
            case _:
                names.append(f"unknown {step['type']}")
    return tuple(names)


_SPACES: Mapping[tuple[str, ...], bool] = {
    ("prepend", "replace"): True,
    ("replace", "prepend"): True,
    ("replace",): False,
    ("metaspace always",): True,
    ("metaspace first",): True,
    ("metaspace never",): False,
}
"""How spaces are marked -> whether one is put in front of a text."""


def _typed(table: TokenTable, added: Mapping[str, Any], unknown: str | None, *, bytes_: bool) -> TokenTable:
    """Mark the token of unknown characters, and where `bytes_` says so those of bytes."""
    import gguf

    names = {byte_token(value) for value in range(256)} if bytes_ else set[str]()
    kinds = dict.fromkeys(names - added.keys(), int(gguf.TokenType.BYTE))
    if unknown is not None:
        kinds[unknown] = int(gguf.TokenType.UNKNOWN)
    pairs = zip(table.tokens, table.types, strict=True)
    return TokenTable(tokens=table.tokens, types=tuple(kinds.get(token, kind) for token, kind in pairs))


def _merge_scores(table: TokenTable, model: Mapping[str, Any]) -> list[float]:
    """Score each token: minus the number of the first merge that makes it; the lowest for one that none makes."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(model["merges"]))) for token in table.tokens]


def _own_scores(table: TokenTable, model: Mapping[str, Any]) -> list[float]:
    """Read each token's logarithmic probability; the lowest for one that is no piece."""
    own = {token: float(score) for token, score in model["vocab"]}
    lowest = min(own.values())
    return [own.get(token, lowest) for token in table.tokens]


_KINDS: Mapping[str, _Kind] = {
    "BPE": _Kind(name="llama", problem=_merges_problem, scores=_merge_scores, encoder=SpmEncoder),
    "Unigram": _Kind(name="t5", problem=_unigram_problem, scores=_own_scores, encoder=UnigramEncoder),
}
"""Type of a model in tokenizer.json -> its kind."""


def _ends(backend: Any, own: Mapping[str, int | None], path: Path) -> dict[str, bool]:
    """Find out which tokens are put before and behind a text. Raises UnsupportedError for others than start and end."""
    alone, whole = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    before = next(n for n in range(len(whole) - len(alone) + 1) if whole[n : n + len(alone)] == alone)
    ends = {"bos": whole[:before], "eos": whole[before + len(alone) :]}
    for name, ids in ends.items():
        if ids not in ([], [own[name]]):
            raise UnsupportedError(
                "llama.cpp puts no other tokens around a text than one for its start and one for its end",
                where=str(path),
                got=f"ids {ids} for {name}_token_id {own[name]}",
                do=ADVICE,
            )
    return {name: bool(ids) for name, ids in ends.items()}


def _compare(backend: Any, encoder: SpmEncoder | UnigramEncoder, table: TokenTable, path: Path) -> tuple[str, ...]:
    """Compare llama.cpp's ids with the tokenizer's.

    Raises UnsupportedError where they differ for a plain text. Where they do for texts that begin with a space, or in
    which marked tokens stand, that is a note: for those llama.cpp has one way, and tokenizers have several.
    """
    for text, got, wanted in _different(backend, encoder, _plain_texts(table)):
        raise UnsupportedError(
            "llama.cpp would cut a text otherwise than the model's tokenizer",
            where=str(path),
            got=f"ids {got} for {text[:80]!r}",
            wanted=f"ids {wanted}",
            do=ADVICE,
        )
    texts = _marked_texts(table)
    different = list(_different(backend, encoder, texts))
    if not different:
        return ()
    text, got, wanted = different[0]
    return (
        f"llama.cpp cuts {len(different)} of {len(texts)} texts that begin with a space, or hold marked tokens, "
        f"otherwise than the model's tokenizer: {text!r} gives ids {got} instead of {wanted}",
    )


def _different(
    backend: Any, encoder: SpmEncoder | UnigramEncoder, texts: Sequence[str]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield each text that is cut differently, llama.cpp's ids and the tokenizer's."""
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        for text, wanted in zip(batch, backend.encode_batch(batch, add_special_tokens=False), strict=True):
            got = encoder.encode(text)
            if got != wanted.ids:
                yield text, got, wanted.ids


def _plain_texts(table: TokenTable) -> list[str]:
    """List texts of many scripts, each token behind a line end, by which no other touches it, and many in a row."""
    words = [token.replace(SPACE, " ") for token in table.of_kinds("NORMAL")]
    mixed = random.Random(0).sample(words, len(words))
    rows = ["".join(mixed[start : start + _JOINED]) for start in range(0, len(mixed), _JOINED)]
    marked = [f"a{token}" for token in table.of_kinds("USER_DEFINED")]
    return [PROBE_TEXT, f"a{_RARE}", *(f"\n{word}" for word in (*words, *rows)), *marked]


def _marked_texts(table: TokenTable) -> list[str]:
    """List texts that begin with spaces, and those with each marked token between letters and spaces."""
    marked = table.of_kinds(*MARKED)
    return [" a", "  a", "   ", *(text for token in marked for text in (f"a{token}a", f"a {token} a", token * 2))]
