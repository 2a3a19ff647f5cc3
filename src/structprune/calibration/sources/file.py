"""Text files as people have them: plain text, JSON rows or arrays, chats, CSV, parquet; compressed or not.

A file is a list of documents, joined by blank lines. Rows give their field `text`, the one that `FILE#FIELD` names, a
chat in `messages` or `conversations` through the model's own chat template, or a prompt with its completion.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from structprune.calibration.context import CalibrationWindows, SourceContext, draw_windows
from structprune.errors import InputError, first_line
from structprune.files import check_path, check_regular
from structprune.types import Render

_CHATS = ("messages", "conversations")
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
# ShareGPT's names of roles.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def read_text(path: Path, render: Render | None = None) -> str:
    """Return the file's documents, joined by blank lines.

    `render` turns chats into text, by default turn by turn. Raises InputError if the file is missing or unreadable, or
    if a row holds no text.
    """
    path, field = _split_field(path)
    check_path(path, "the text file")
    try:
        check_regular(path)
        with path.open("rb") as file:
            return "\n\n".join(_documents(file, path, field, render or join_turns))
    except FileNotFoundError:
        raise InputError("the text file does not exist", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(
            "the text file is not UTF-8",
            where=str(path),
            got=str(error),
            do="save it as UTF-8, or as UTF-16 with a mark",
        ) from None
    except (OSError, EOFError) as error:
        raise InputError("the text file cannot be read", where=str(path), got=str(error)) from None


def join_turns(turns: Sequence[Mapping[str, str]]) -> str:
    """Return a chat as plain text: what was said, turn by turn, for models without a chat template."""
    return "\n\n".join(turn["content"] for turn in turns)


def file_windows(path: Path, context: SourceContext) -> CalibrationWindows:
    """Return windows drawn from the file's text; where a chat had no template, the description says so."""
    joined = False

    def join(turns: Sequence[Mapping[str, str]]) -> str:
        nonlocal joined
        joined = True
        return join_turns(turns)

    text = read_text(path, context.render or join)
    plain = " (chats as plain text: the model has no chat template)" if joined else ""
    return draw_windows(text, path.name + plain, context)


def _split_field(path: Path) -> tuple[Path, str | None]:
    """Split `FILE#FIELD` into file and field; a file that has such a name itself is taken as it is."""
    name, mark, field = path.name.rpartition("#")
    if not mark or not name or not field or path.exists():
        return path, None
    return path.with_name(name), field


def _documents(file: BinaryIO, path: Path, field: str | None, render: Render) -> Iterable[str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    start = file.read(4)
    file.seek(0)
    if start.startswith(_GZIP):
        return _documents_of(io.BytesIO(gzip.decompress(file.read())), path, suffixes[:-1], field, render)
    if start == _ZSTD:
        return _documents_of(_unzstd(file, path), path, suffixes[:-1], field, render)
    return _documents_of(file, path, suffixes, field, render)


def _documents_of(
    file: BinaryIO, path: Path, suffixes: Sequence[str], field: str | None, render: Render
) -> Iterable[str]:
    suffix = suffixes[-1] if suffixes else ""
    start = file.read(4)
    file.seek(0)
    if start == _PARQUET:
        return _texts(_parquet_rows(file, path), path, field, render)
    content = _decoded(file.read())
    if suffix in (".json", ".jsonl", ".ndjson"):
        return _texts(_json_rows(content, path), path, field, render)
    if suffix in (".csv", ".tsv"):
        return _texts(_csv_rows(content, "\t" if suffix == ".tsv" else ","), path, field, render)
    if field is not None:
        raise InputError(
            "plain text has no fields", where=str(path), got=f"#{field}", wanted="a JSON, CSV or parquet file"
        )
    return [content]


def _decoded(content: bytes) -> str:
    """Decode UTF-8, or what a byte order mark announces; the mark itself is no text."""
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    return content.decode(encoding)


def _unzstd(file: BinaryIO, path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise InputError(
            "the file is compressed with zstd, which needs the zstandard package",
            where=str(path),
            do="pip install zstandard, or decompress it first",
        ) from None
    try:
        return io.BytesIO(zstandard.ZstdDecompressor().stream_reader(file).read())
    except zstandard.ZstdError as error:
        raise InputError("the file cannot be decompressed", where=str(path), got=first_line(error)) from None


def _json_rows(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a JSON array, or of one JSON value per line."""
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError("the file is not JSON", where=str(path), got=first_line(error)) from None
        yield from ((f"{path}, element {number}", row) for number, row in enumerate(rows, start=1))
        return
    # Not splitlines: a string may hold other line ends than this one.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError("the line is not JSON", where=f"{path}:{number}", got=str(error)) from None


def _csv_rows(content: str, separator: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    yield from ((f"row {number}", row) for number, row in enumerate(reader, start=1))


def _parquet_rows(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "a parquet file needs the pyarrow package", where=str(path), do="pip install pyarrow"
        ) from None
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except pyarrow.ArrowException as error:
        raise InputError("the file is not parquet", where=str(path), got=first_line(error)) from None


def _texts(rows: Iterable[tuple[str, Any]], path: Path, field: str | None, render: Render) -> Iterator[str]:
    """Yield each row's text; rows whose text is empty are left out. Raises InputError for the first row without one."""
    for where, row in rows:
        text = _row_text(row, where if str(path) in where else f"{path}, {where}", field, render)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("the row's text is no Unicode", where=where, got="half a surrogate pair")
        if text:
            yield text


def _row_text(row: Any, where: str, field: str | None, render: Render) -> str:
    if isinstance(row, str) and field is None:
        return row
    if isinstance(row, dict):
        value = row.get(field or "text")
        if isinstance(value, str):
            return value
        if field is None:
            for name in _CHATS:
                if isinstance(row.get(name), list):
                    return _chat_text(row[name], where, render)
            for first, second in _PAIRS:
                if isinstance(row.get(first), str) and isinstance(row.get(second), str):
                    return _pair_text(row[first], row.get("input"), row[second])
        elif isinstance(value, list):
            return _chat_text(value, where, render)
    raise InputError(
        "the row has no text",
        where=where,
        got=f"fields {', '.join(map(str, row))}"[:200] if isinstance(row, dict) else type(row).__name__,
        wanted=f"a field {field!r} with a text"
        if field
        else 'a field "text", a chat in "messages" or "conversations", or "prompt" and "completion"',
        do="name the field that holds the text: FILE#FIELD",
    )


def _pair_text(prompt: str, extra: Any, completion: str) -> str:
    return "\n".join(part for part in (prompt, extra, completion) if isinstance(part, str) and part)


def _chat_text(messages: Sequence[Any], where: str, render: Render) -> str:
    """Render the chat by the model's template, whichever of the usual names its turns have."""
    turns: list[dict[str, str]] = []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if isinstance(content, list):
            # Parts of a turn; those that are no text (images) say nothing to a language model.
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(
                "a turn of the chat has no role or no content",
                where=where,
                got=repr(message)[:80],
                wanted='{"role": "user", "content": "..."}',
            )
        turns.append({"role": _ROLES.get(role, role), "content": content})
    try:
        return render(turns)
    except InputError as error:
        raise error.inside(where) from None
