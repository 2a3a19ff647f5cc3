"""Text files as people have them: plain text, JSON rows or arrays, chats, CSV, parquet; compressed or not.

A file is a list of documents, joined by blank lines. Rows give their field `text`, the one that `FILE#FIELD` names, a
chat in `messages` or `conversations` through the model's own chat template, or a prompt with its completion.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# The longer ones first: UTF-32's begins with UTF-16's.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_COMPRESSED, _JSON, _TABLES = (".gz", ".gzip", ".zst", ".zstd"), (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
# Columns of a table that may be text; others may hold what Python has no value for.
_COLUMNS = {"text", "input", *_CHATS, *itertools.chain.from_iterable(_PAIRS)}
# Lines that must be rows for a file to be taken for JSON lines against its name.
_ROWS_SEEN = 20
Notify = Callable[[str], None]


def read_text(path: Path, render: Render | None = None, notify: Notify = lambda said: None) -> str:
    """Return the file's documents, joined by blank lines.

    `render` turns chats into text, by default turn by turn; `notify` hears of what was not taken as it is. Raises
    InputError if the file is missing or unreadable, or if a row holds no text.
    """
    path, field = _split_field(path)
    check_path(path, "the text file")
    try:
        check_regular(path)
        with path.open("rb") as file:
            return "\n\n".join(_documents(file, path, field, _checked(render or join_turns, notify), notify))
    except FileNotFoundError:
        raise InputError("the text file does not exist", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(
            "the text file is not UTF-8",
            where=str(path),
            got=str(error),
            do="save it as UTF-8, or as UTF-16 with a mark",
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError("the text file cannot be read", where=str(path), got=str(error)) from None


def join_turns(turns: Sequence[Mapping[str, Any]]) -> str:
    """Return a chat as plain text: what was said and called, turn by turn, for models without a chat template."""
    calls = [json.dumps(turn["tool_calls"], ensure_ascii=False) if "tool_calls" in turn else "" for turn in turns]
    said = ([turn["content"], called] for turn, called in zip(turns, calls, strict=True))
    return "\n\n".join("\n".join(part for part in parts if part) for parts in said)


def _checked(render: Render, notify: Notify) -> Render:
    """Render, and say so where a template writes no calls of tools."""

    def checked(turns: Sequence[Mapping[str, Any]]) -> str:
        text = render(turns)
        calls = (call for turn in turns for call in turn.get("tool_calls", ()))
        if any(str(call["function"].get("name")) not in text for call in calls):
            notify("calls of tools left out: the chat template does not write them")
        return text

    return checked


def file_windows(path: Path, context: SourceContext) -> CalibrationWindows:
    """Return windows drawn from the file's text; what was not taken as it is, the description says."""
    said: dict[str, None] = {}

    def join(turns: Sequence[Mapping[str, Any]]) -> str:
        said["chats as plain text: the model has no chat template"] = None
        return join_turns(turns)

    text = read_text(path, context.render or join, lambda note: said.setdefault(note))
    return draw_windows(text, path.name + "".join(f" ({note})" for note in said), context)


def _split_field(path: Path) -> tuple[Path, str | None]:
    """Split `FILE#FIELD` into file and field; a file that has such a name itself is taken as it is."""
    name, mark, field = path.name.rpartition("#")
    if not mark or not name or not field or path.exists():
        return path, None
    return path.with_name(name), field


def _documents(file: BinaryIO, path: Path, field: str | None, render: Render, notify: Notify) -> Iterable[str]:
    start = file.read(4)
    file.seek(0)
    if start.startswith(_GZIP):
        file = io.BytesIO(gzip.decompress(file.read()))
    elif start == _ZSTD:
        file = _unzstd(file, path)
    start = file.read(4)
    file.seek(0)
    if start == _PARQUET:
        return _texts(_parquet_rows(file, path, field), path, field, render, notify)
    content = _decoded(file.read())
    if "\0" in content:
        raise InputError(
            "the text file holds NUL characters",
            where=str(path),
            wanted="text",
            do="save it as UTF-8, or as UTF-16 with a mark",
        )
    suffix = _suffix(path)
    if suffix in _TABLES:
        return _texts(_csv_rows(content, path, "\t" if suffix == ".tsv" else ","), path, field, render, notify)
    if suffix not in _JSON and _begins_with_rows(content, field):
        notify("read as JSON lines")
        suffix = ".jsonl"
    if suffix in _JSON:
        return _texts(_json_rows(content, path), path, field, render, notify)
    if field is not None:
        raise InputError(
            "plain text has no fields", where=str(path), got=f"#{field}", wanted="a JSON, CSV or parquet file"
        )
    return [content]


def _suffix(path: Path) -> str:
    """Return the last suffix that says what the file holds, compressed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _begins_with_rows(content: str, field: str | None) -> bool:
    """Whether the first lines are rows that hold text, whatever the file's name: nobody writes prose like that."""
    if not content.lstrip().startswith("{"):
        return False
    lines = itertools.islice((line for line in io.StringIO(content) if line.strip()), _ROWS_SEEN)
    try:
        for line in lines:
            row = json.loads(line)
            if not isinstance(row, dict):
                return False
            _row_text(row, "", field, join_turns)
    except (ValueError, RecursionError, InputError):
        return False
    return True


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


def _csv_rows(content: str, path: Path, separator: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            yield f"row {number}", row
    except csv.Error as error:
        raise InputError("the file is not CSV", where=f"{path}, behind row {number}", got=str(error)) from None


def _parquet_rows(file: BinaryIO, path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "a parquet file needs the pyarrow package", where=str(path), do="pip install pyarrow"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = [str(name) for name in table.schema_arrow.names]
        wanted = [name for name in names if name == field or (field is None and name in _COLUMNS)]
        if not wanted:
            # It has no text, and these are its fields.
            yield f"{path}, row 1", dict.fromkeys(names)
            return
        batches = table.iter_batches(batch_size=1024, columns=wanted)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError("the file is not parquet", where=str(path), got=first_line(error)) from None


def _texts(
    rows: Iterable[tuple[str, Any]], path: Path, field: str | None, render: Render, notify: Notify
) -> Iterator[str]:
    """Yield each row's text; rows whose text is empty are left out. Raises InputError for the first row without one."""
    nulls: list[str] = []
    any_text = False
    for where, row in rows:
        text = _row_text(row, where if str(path) in where else f"{path}, {where}", field, render)
        if text is None:
            nulls.append(where)
            continue
        any_text = True
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("the row's text is no Unicode", where=where, got="half a surrogate pair")
        if text:
            yield text
    if nulls and not any_text:
        raise InputError("no row has a text", where=nulls[0], got="null", do="name the field that holds it: FILE#FIELD")
    if nulls:
        notify(f"{len(nulls)} row{'s'[: len(nulls) > 1]} left out, whose text is null")


def _row_text(row: Any, where: str, field: str | None, render: Render) -> str | None:
    """Return what the row says; None where the field is there and null."""
    if isinstance(row, str) and field is None:
        return row
    name = field or "text"
    if isinstance(row, dict):
        value = row.get(name)
        # An empty text beside a chat is a column that another part of the file uses.
        if isinstance(value, str) and (value or field is not None):
            return value
        if field is None:
            for chat in _CHATS:
                if isinstance(row.get(chat), list):
                    return _chat_text(row[chat], where, render)
            for first, second in _PAIRS:
                if isinstance(row.get(first), str) and isinstance(row.get(second), str):
                    return _pair_text(row[first], row.get("input"), row[second])
        elif isinstance(value, list):
            return _chat_text(value, where, render)
        if isinstance(value, str):
            return value
        if name in row and value is None:
            return None
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
    try:
        return render([_turn(message) for message in messages])
    except InputError as error:
        raise error.inside(where) from None


def _no_turn(message: Any) -> InputError:
    return InputError(
        "a turn of the chat has no role or no content",
        got=repr(message)[:80],
        wanted='{"role": "user", "content": "..."}',
    )


def _turn(message: Any) -> dict[str, Any]:
    """Return role and content as text, and calls of tools where there are some. Raises InputError."""
    if not isinstance(message, dict):
        raise _no_turn(message)
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    calls = message.get("tool_calls")
    if isinstance(content, list):
        # Those that are no text (images) say nothing to a language model.
        content = "".join(_part_text(part, message) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise _no_turn(message)
    turn: dict[str, Any] = {"role": _ROLES.get(role, role), "content": content}
    if isinstance(calls, list) and calls:
        turn["tool_calls"] = [_call(call, message) for call in calls]
    return turn


def _part_text(part: Any, message: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, dict):
        # Of threads: the value beside its annotations.
        text = text.get("value")
    if text is None and isinstance(part, dict):
        return ""
    if not isinstance(text, str):
        raise _no_turn(message)
    return text


def _call(call: Any, message: Any) -> Any:
    """Return the call with its arguments as the values that templates expect, where they are JSON in a string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise _no_turn(message)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            function = {**function, "arguments": json.loads(arguments)}
    return {**call, "function": function}
