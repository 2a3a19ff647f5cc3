"""Tokenizer metadata of a GGUF file: copied from another GGUF file, or made of the checkpoint's own tokenizer.

A byte-level BPE is translated here, what SentencePiece makes in sentencepiece.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structprune.architectures.sources.gguf_pretokenizers import PRE_TOKENIZERS
from structprune.checkpoint.gguf_file import gguf_package, read_gguf
from structprune.errors import CheckpointError, UnsupportedError
from structprune.exporters.gguf.entries import ADVICE, Entry, GgufTokenizer, entries_of, special_entries, token_table
from structprune.exporters.gguf.sentencepiece import SPM_NAME, is_sentencepiece, sentencepiece_tokenizer

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


def copied_tokenizer(source: Path, vocab_size: int) -> GgufTokenizer:
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
    return GgufTokenizer(entries=tuple(entries), source=source)


def built_tokenizer(directory: Path, vocab_size: int, config: Any) -> GgufTokenizer:
    """Build the entries for the tokenizer in `directory`; `config` is the model's. Raises UnsupportedError for one that
    llama.cpp has no form of, CheckpointError for one that cannot be read or has more tokens than `vocab_size`.
    """
    path = directory / "tokenizer.json"
    if not path.is_file() and (directory / SPM_NAME).is_file():
        return sentencepiece_tokenizer(directory, vocab_size, config)
    try:
        tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedError("the model has no tokenizer.json", where=str(directory), do=ADVICE) from None
    except ValueError as error:
        raise CheckpointError("the file cannot be read as JSON", where=str(path), got=str(error)) from None
    if is_sentencepiece(tokenizer):
        return sentencepiece_tokenizer(directory, vocab_size, config)
    return _byte_level(tokenizer, path, vocab_size)


def _byte_level(tokenizer: Mapping[str, Any], path: Path, vocab_size: int) -> GgufTokenizer:
    """Build the entries for a byte-level BPE. Raises UnsupportedError for any other tokenizer."""
    import gguf

    pre = _pre_tokenizer(tokenizer, path)
    added = {str(token["content"]): token for token in tokenizer.get("added_tokens", [])}
    table = token_table(tokenizer["model"]["vocab"], added, vocab_size, path)
    writer: Any = gguf.GGUFWriter(None, "none")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(table.tokens)
    writer.add_token_types(table.types)
    special_entries(path.parent, vocab_size, merges=True).add_to_gguf(writer, quiet=True)
    return GgufTokenizer(entries=entries_of(writer), source=path)


def _pre_tokenizer(tokenizer: Mapping[str, Any], path: Path) -> str:
    """Find llama.cpp's name for how the text is cut. Raises UnsupportedError where it has none, or no such BPE."""
    model = tokenizer.get("model") or {}
    problem = None
    if model.get("type") != "BPE":
        problem = f"a {model.get('type')} model"
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
        "only SentencePiece's tokenizers and byte-level BPE whose pre-tokenizer has a name in llama.cpp are translated",
        where=str(path),
        got=problem,
        do=ADVICE,
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
