"""Tokenizer metadata of a BPE with byte fallback, as SentencePiece makes it: LLaMA 2, Mistral, Gemma.

llama.cpp has no merges for it but scores: of all neighbours that together are a token, those whose token has the
highest score are merged. A token's score here is minus the number of the first merge that makes it, which keeps the
order of the merges. Whether that gives the tokenizer's own ids is tried out before anything is written, since merges of
any kind say more than scores do.

The tokenizer is asked for as transformers loads it, which is not always what tokenizer.json says.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Mapping, Sequence
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


def has_byte_fallback(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the content of a tokenizer.json is a BPE that spells unknown characters in bytes."""
    model = tokenizer.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def spm_tokenizer(directory: Path, vocab_size: int, config: Any) -> GgufTokenizer:
    """Build the entries for the tokenizer in `directory`, tokenizer.json or tokenizer.model; `config` is the model's.

    Raises UnsupportedError where llama.cpp would give other ids for a plain text, or where the library is missing that
    reads the file, CheckpointError for a tokenizer that cannot be loaded or has more tokens than `vocab_size`.
    """
    import gguf

    path = next(path for name in ("tokenizer.json", SPM_NAME) if (path := directory / name).is_file())
    missing = [name for name in _SPM_PACKAGES if not _is_installed(name)] if path.name == SPM_NAME else []
    if missing:
        raise UnsupportedError(
            f"{SPM_NAME} is read with further packages",
            where=str(path),
            got=f"no {', no '.join(missing)}",
            do=f"pip install sentencepiece protobuf, or {ADVICE}",
        )
    tokenizer = TextEncoder(directory, config=config).tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] | None = None if backend is None else json.loads(backend.to_str())
    problem = f"a {type(tokenizer).__name__}" if content is None else _problem(content)
    if backend is None or content is None or problem is not None:
        raise UnsupportedError("llama.cpp has no form of this tokenizer", where=str(path), got=problem, do=ADVICE)
    backend.no_truncation()
    backend.no_padding()
    added = {str(token["content"]): token for token in content["added_tokens"]}
    table = _typed(token_table(content["model"]["vocab"], added, vocab_size, path), added, tokenizer.unk_token)
    scores = _scores(table.tokens, content["model"]["merges"])
    prefix = _adds_space(content)
    notes = _compare(backend, SpmEncoder(table, scores, add_space_prefix=prefix), table, path)
    writer: Any = gguf.GGUFWriter(None, "none")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(table.tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(table.types)
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(False)
    special = special_entries(directory, vocab_size, merges=False)
    own = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _TASKS}
    special.special_token_ids |= {name: index for name, index in own.items() if isinstance(index, int)}
    special.add_special_token |= _ends(backend, own, path)
    special.add_to_gguf(writer, quiet=True)
    return GgufTokenizer(entries=entries_of(writer), source=path, notes=notes)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # Of the package that it lies in.
        return False


def _problem(content: Mapping[str, Any]) -> str | None:
    """Say what keeps the tokenizer from being cut by scores; None if nothing does."""
    model = content["model"]
    if not has_byte_fallback(content):
        return f"a {model['type']} model" + " without byte fallback" * (model["type"] == "BPE")
    if not model["merges"]:
        return "a BPE without merges"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "a BPE with marks at parts of words"
    names = model["vocab"].keys() | {token["content"] for token in content["added_tokens"]}
    # llama.cpp looks for the character where a byte has no token, which is the same below 128.
    missing = [
        value for value in range(256) if byte_token(value) not in names and not (value < 128 and chr(value) in names)
    ]
    if missing:
        return f"no token for byte {byte_token(missing[0])}"
    if _spaces(content) not in _SPACES:
        steps = (content["normalizer"], content["pre_tokenizer"])
        return f"normalizer and pre-tokenizer {json.dumps(steps, ensure_ascii=False)[:300]}"
    return None


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


def _adds_space(content: Mapping[str, Any]) -> bool:
    return _SPACES[_spaces(content)]


def _typed(table: TokenTable, added: Mapping[str, Any], unknown: str | None) -> TokenTable:
    """Mark the tokens of bytes, and the one of unknown characters."""
    import gguf

    kinds = dict.fromkeys((byte_token(value) for value in range(256)), int(gguf.TokenType.BYTE))
    kinds = {token: kind for token, kind in kinds.items() if token not in added}
    if unknown is not None:
        kinds[unknown] = int(gguf.TokenType.UNKNOWN)
    pairs = zip(table.tokens, table.types, strict=True)
    return TokenTable(tokens=table.tokens, types=tuple(kinds.get(token, kind) for token, kind in pairs))


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Score each token: minus the number of the first merge that makes it; the lowest for one that none makes."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


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


def _compare(backend: Any, encoder: SpmEncoder, table: TokenTable, path: Path) -> tuple[str, ...]:
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


def _different(backend: Any, encoder: SpmEncoder, texts: Sequence[str]) -> Iterator[tuple[str, list[int], list[int]]]:
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
