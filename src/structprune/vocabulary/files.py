"""The tokenizer's files with fewer tokens: all forms that a folder may have beside tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from structprune.errors import CheckpointError
from structprune.files import read_json, write_json, write_text
from structprune.vocabulary.ids import Ids, with_new_ids
from structprune.vocabulary.tokenizer_json import shrunk

TOKENIZER_NAME = "tokenizer.json"
# Forms that are not written with fewer tokens: whoever reads them has tokenizer.json beside them.
_OTHER_FORMS = ("*.tiktoken", "tekken.json")
# Of the pieces of a SentencePiece model: the unknown one, and those that stand for no text.
_MARKS = (2, 3)
_PIECE, _KIND = 1, 3


def write_files(directory: Path, tokenizer: Mapping[str, Any], new: Ids, num_rows: int) -> tuple[str, ...]:
    """Rewrite the files of a folder, a copy of the source's, for the tokens of `new`; returns what was left out.

    Raises CheckpointError where settings name a token that is gone.
    """
    written = shrunk(tokenizer, new, str(directory / TOKENIZER_NAME))
    # As compact as such files are: a list of a hundred thousand merges in lines of its own has no reader.
    write_text(directory / TOKENIZER_NAME, json.dumps(written, ensure_ascii=False))
    left_out: list[str] = []
    for path in sorted(directory.iterdir()):
        if path.name == "added_tokens.json":
            found = {token: new[number] for token, number in read_json(path).items() if number in new}
            write_json(path, found)
        elif path.name == "tokenizer_config.json":
            write_json(path, _with_new_entries(read_json(path), new))
        elif path.name == "generation_config.json":
            write_json(path, with_new_ids(read_json(path), new, num_rows, str(path)))
        elif path.name == "vocab.json":
            write_text(path, json.dumps(dict(written["model"]["vocab"]), ensure_ascii=False))
        elif path.name == "merges.txt":
            lines = [" ".join(merge) for merge in written["model"].get("merges", [])]
            write_text(path, "\n".join(["#version: 0.2", *lines, ""]))
        elif path.name == "vocab.txt":
            write_text(path, "".join(f"{token}\n" for token in written["model"]["vocab"]))
        elif path.suffix == ".model":
            smaller = with_fewer_pieces(path.read_bytes(), new)
            if smaller is None:
                left_out.append(path.name)
                path.unlink()
            else:
                path.write_bytes(smaller)
        elif any(path.match(pattern) for pattern in _OTHER_FORMS):
            left_out.append(path.name)
            path.unlink()
    return tuple(left_out)


def _with_new_entries(config: Mapping[str, Any], new: Ids) -> dict[str, Any]:
    """Renumber the added tokens that tokenizer_config.json lists by their ids."""
    result = dict(config)
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, Mapping):
        result["added_tokens_decoder"] = {
            str(new[int(number)]): entry for number, entry in listed.items() if int(number) in new
        }
    return result


def with_fewer_pieces(data: bytes, kept: Collection[int]) -> bytes | None:
    """Return a SentencePiece model with these pieces alone; None if a mark of its would get another id.

    Its training settings count marks such as the unknown token by their ids. The file is a list of fields of Protocol
    Buffers; the pieces are fields of their own, whose places are their ids. Raises CheckpointError for a damaged file.
    """
    result, pieces = bytearray(), 0
    gone = False
    for field, content, whole in _fields(data):
        if field != _PIECE:
            result += whole
            continue
        stays = pieces in kept
        kind = next((value for number, value, _ in _fields(content) if number == _KIND), 1)
        if kind in _MARKS and (gone or not stays):
            return None
        gone = gone or not stays
        result += whole if stays else b""
        pieces += 1
    return bytes(result)


def _fields(data: Any) -> Iterator[tuple[int, Any, bytes]]:
    """Yield (number, content, whole field) of a message; the content is bytes or a number."""
    place = 0
    while place < len(data):
        start = place
        key, place = _varint(data, place)
        number, form = key >> 3, key & 7
        content: Any
        if form == 0:
            content, place = _varint(data, place)
        elif form in (1, 2, 5):
            size, place = _varint(data, place) if form == 2 else ((8 if form == 1 else 4), place)
            content = data[place : place + size]
            place += size
        else:
            raise CheckpointError("a SentencePiece model is damaged", got=f"a field of form {form}")
        if place > len(data):
            raise CheckpointError("a SentencePiece model is cut off")
        yield number, content, data[start:place]


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise CheckpointError("a SentencePiece model is cut off")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise CheckpointError("a SentencePiece model is damaged", got="a number of more than ten bytes")
