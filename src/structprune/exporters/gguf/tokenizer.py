"""Tokenizer metadata of a GGUF file: copied from another GGUF file, or made of a byte-level BPE's tokenizer.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune.architectures.sources.gguf_pretokenizers import PRE_TOKENIZERS
from structprune.checkpoint.gguf_file import gguf_package, read_gguf
from structprune.errors import CheckpointError, UnsupportedError

_ADVICE = "pass --tokenizer-gguf with a GGUF file of the dense model, whose tokenizer is copied"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How the text is cut before merges are applied, and whether words that are in the vocabulary are taken as they are ->
# the name that llama.cpp has for it. A regular expression is that of tokenizer.json, to the letter.
_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("ByteLevel",), False): "gpt-2",
    (("Digits", "ByteLevel"), False): "smollm",
    ((f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}",), False): "qwen2",
    ((f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}",), False): "dbrx",
}


# The same of tokenizers that were made of a GGUF file.
_READ_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (pre.expressions, pre.ignore_merges): name for name, pre in reversed(list(PRE_TOKENIZERS.items()))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One metadata entry, as gguf's writer takes it."""

    key: str
    value: Any
    type: Any
    """gguf.GGUFValueType."""
    sub_type: Any = None
    """Type of an array's items; None for gguf's choice."""


def copied_tokenizer(source: Path, vocab_size: int) -> list[Entry]:
    """Copy the `tokenizer.*` entries of the GGUF file `source`.

    Raises CheckpointError for an unreadable file or one without a tokenizer of `vocab_size` tokens.
    """
    # Bounded, unlike the package's own reader: what this one has read, that one can.
    read_gguf(source)
    gguf = gguf_package()
    reader: Any = gguf.GGUFReader(str(source))
    fields = {name: field for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    entries = [
        Entry(
            key=name,
            value=field.contents(),
            type=field.types[0],
            sub_type=field.types[-1] if len(field.types) > 1 else None,
        )
        for name, field in fields.items()
    ]
    tokens = next((entry.value for entry in entries if entry.key == gguf.Keys.Tokenizer.LIST), None)
    if tokens is None or len(tokens) != vocab_size:
        raise CheckpointError(
            "the GGUF file's tokenizer does not belong to the model",
            where=str(source),
            got="no tokens" if tokens is None else f"{len(tokens)} tokens",
            wanted=f"{vocab_size}, as in the model's embedding",
        )
    return entries


def built_tokenizer(directory: Path, vocab_size: int) -> list[Entry]:
    """Build the entries for the byte-level BPE in `directory`. Raises UnsupportedError for any other tokenizer."""
    import gguf

    path = directory / "tokenizer.json"
    try:
        tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedError("the model has no tokenizer.json", where=str(directory), do=_ADVICE) from None
    except ValueError as error:
        raise CheckpointError("the file cannot be read as JSON", where=str(path), got=str(error)) from None
    pre = _pre_tokenizer(tokenizer, path)
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    added = {str(token["content"]): token for token in tokenizer.get("added_tokens", [])}
    by_id = {index: token for token, index in vocabulary.items()} | {t["id"]: name for name, t in added.items()}
    if max(by_id) >= vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model's embedding has rows",
            where=str(path),
            got=max(by_id) + 1,
            wanted=f"at most {vocab_size}",
            do=_ADVICE,
        )
    tokens: list[str] = []
    types: list[int] = []
    for index in range(vocab_size):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(int(gguf.TokenType.UNUSED))
            continue
        tokens.append(token)
        kind = gguf.TokenType.NORMAL
        if token in added:
            kind = gguf.TokenType.CONTROL if added[token].get("special") else gguf.TokenType.USER_DEFINED
        types.append(int(kind))
    writer: Any = gguf.GGUFWriter(None, "none")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with _without_pair_warnings():
        special: Any = gguf.SpecialVocab(directory, load_merges=True, n_vocab=vocab_size)
    # llama.cpp would fill in what it takes for usual.
    for name in ("bos", "eos"):
        special.add_special_token.setdefault(name, False)
    special.add_to_gguf(writer, quiet=True)
    return [
        Entry(key=key, value=item.value, type=item.type, sub_type=item.sub_type)
        for key, item in writer.kv_data[0].items()
        if key.startswith("tokenizer.")
    ]


@contextmanager
def _without_pair_warnings() -> Generator[None]:
    """Suppress what the gguf package logs of a template for pairs of texts, which a language model never gets."""
    logger = logging.getLogger("gguf.vocab")

    def wanted(record: logging.LogRecord) -> bool:
        return "TemplateProcessing<pair>" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _pre_tokenizer(tokenizer: Mapping[str, Any], path: Path) -> str:
    """Find llama.cpp's name for how the text is cut. Raises UnsupportedError where it has none, or no such BPE."""
    model = tokenizer.get("model") or {}
    problem = None
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        problem = f"a {model.get('type')} model{' with byte fallback' * bool(model.get('byte_fallback'))}"
    elif not model.get("merges"):
        problem = "a BPE without merges"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        problem = "a BPE with marks at parts of words"
    elif (tokenizer.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        # NFC is left out, as llama.cpp does for all: text that is in this form already is not changed by it.
        problem = f"the normaliser {tokenizer['normalizer'].get('type')}"
    if problem is None:
        steps = _steps(tokenizer.get("pre_tokenizer") or {})
        key = (steps or (), bool(model.get("ignore_merges")))
        name = _PRE_TOKENIZERS.get(key) or _READ_PRE_TOKENIZERS.get(key)
        if name is not None:
            return name
        problem = f"the pre-tokenizer {json.dumps(tokenizer.get('pre_tokenizer'))[:200]}"
    raise UnsupportedError(
        "only a byte-level BPE whose pre-tokenizer llama.cpp knows by name can be translated",
        where=str(path),
        got=problem,
        do=_ADVICE,
    )


def _steps(pre_tokenizer: Mapping[str, Any]) -> tuple[str, ...] | None:
    """List the steps that cut the text: names, or the regular expression of a split; None if one is not known here."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = parts[-1] if parts else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    steps: list[str] = []
    for part in parts[:-1]:
        pattern = (part.get("pattern") or {}).get("Regex")
        if part.get("type") == "Split" and pattern and part.get("behavior") == "Isolated" and not part.get("invert"):
            steps.append(pattern)
        elif part.get("type") == "Digits" and part.get("individual_digits"):
            steps.append("Digits")
        else:
            return None
    return (*steps, "ByteLevel") if last.get("use_regex", True) else tuple(steps)
