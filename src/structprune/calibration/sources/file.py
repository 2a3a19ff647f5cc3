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
import random
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from structprune.calibration.context import CalibrationWindows, SourceContext, draw_windows
from structprune.calibration.sources.parts import COMPRESSED, Content, Readable, Share, first_part, most_bytes, pieces
from structprune.calibration.sources.rows import COLUMNS, join_turns, row_text
from structprune.errors import InputError, first_line
from structprune.files import check_path, check_regular
from structprune.memory import format_bytes
from structprune.texts import split_field
from structprune.types import Render

# Enough to see whether lines are rows.
_HEAD_BYTES = 2**20
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
# The longer ones first: UTF-32's begins with UTF-16's.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# Bytes of the widest unit of those with wide ones.
_WIDEST = 4
_WIDE_MARKS = tuple(mark for mark, name in _MARKS if name != "utf-8-sig")
_JSON, _TABLES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
# Lines that must be rows for a file to be taken for JSON lines against its name.
_ROWS_SEEN = 20
# Of a parquet file, whose cells may be large.
_ROWS_AT_ONCE = 8
Notify = Callable[[str], None]


def read_text(
    path: Path, render: Render | None = None, notify: Notify = lambda said: None, share: Share | None = None
) -> str:
    """Return the file's documents, joined by blank lines; with `share` no more of a large file than that.

    `render` turns chats into text, by default turn by turn; `notify` hears of what was not taken as it is. Raises
    InputError if the file is missing or unreadable, or if a row holds no text.
    """
    path, field = split_field(path)
    check_path(path, "the text file")
    try:
        check_regular(path)
        with path.open("rb") as file:
            reading = _Reading(
                path=path, field=field, render=_checked(render or join_turns, notify), notify=notify, share=share
            )
            return "\n\n".join(reading.documents(file))
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

    share = Share(
        num_bytes=most_bytes((context.num_samples + context.num_held_out) * context.seq_len), seed=context.seed
    )
    text = read_text(path, context.render or join, lambda note: said.setdefault(note), share)
    return draw_windows(text, path.name + "".join(f" ({note})" for note in said), context)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One reading of one file."""

    path: Path
    field: str | None
    """Field that holds the text of a row; None: the usual ones."""
    render: Render
    notify: Notify
    share: Share | None
    """How much of it may be read; None: all."""

    def documents(self, file: BinaryIO) -> Iterable[str]:
        """Return the file's documents. Raises InputError for what is no text."""
        size, start = file.seek(0, io.SEEK_END), self._start(file)
        if start == _PARQUET:
            most = None if self.share is None else self.share.num_bytes
            return self._texts(_parquet_rows(file, self.path, self.field, self._drawn(size)), most)
        if start.startswith(_GZIP) or start == _ZSTD:
            unpacked = gzip.GzipFile(fileobj=file) if start.startswith(_GZIP) else _unzstd(file, self.path)
            with _unpacking(self.path):
                if unpacked.peek(4)[:4] == _PARQUET:
                    # Its directory is at its end.
                    return self._texts(_parquet_rows(io.BytesIO(unpacked.read()), self.path, self.field, None))
            return self._decoded_documents(self._first_part(unpacked))
        share = self._drawn(size)
        wide = start.startswith(_WIDE_MARKS)
        if share is None or wide:
            return self._decoded_documents(self._first_part(file, _WIDEST if wide else 1))
        head = first_part(file, Share(num_bytes=_HEAD_BYTES, seed=0))
        file.seek(0)
        content, suffix = _decoded(head), _suffix(self.path)
        if suffix in _TABLES or (suffix in _JSON and content.lstrip().startswith("[")):
            # Rows of several lines cannot be told apart from the middle.
            return self._decoded_documents(self._first_part(file))
        rows = suffix in _JSON or _begins_with_rows(content, self.field)
        found = pieces(file, share, rows=rows)
        if not found.data:
            # Its rows are long; what is at its start says more.
            file.seek(0)
            found = self._first_part(file)
        return self._decoded_documents(found, rows=rows)

    def _start(self, file: BinaryIO) -> bytes:
        file.seek(0)
        start = file.read(4)
        file.seek(0)
        return start

    def _drawn(self, size: int) -> Share | None:
        """Return the share of a file that is larger than it; None for one that is read whole."""
        return self.share if self.share is not None and size > self.share.num_bytes else None

    def _first_part(self, file: Readable, unit: int = 1) -> Content:
        with _unpacking(self.path):
            return first_part(file, self.share, unit)

    def _decoded_documents(self, found: Content, *, rows: bool = False) -> Iterable[str]:
        """Return the documents of what was read; `rows` if it is known to be JSON lines."""
        if found.left_out:
            self.notify(found.left_out)
        content = _decoded(found)
        if "\0" in content:
            raise InputError(
                "the text file holds NUL characters",
                where=str(self.path),
                wanted="text",
                do="save it as UTF-8, or as UTF-16 with a mark",
            )
        suffix = _suffix(self.path)
        if suffix in _TABLES:
            separator = "\t" if suffix == ".tsv" else ","
            return self._texts(_csv_rows(content, self.path, separator, cut=found.cut))
        if suffix not in _JSON and (rows or _begins_with_rows(content, self.field)):
            self.notify("read as JSON lines")
            suffix = ".jsonl"
        if suffix in _JSON:
            return self._texts(_json_rows(content, self.path, found))
        if self.field is not None:
            raise InputError(
                "plain text has no fields",
                where=str(self.path),
                got=f"#{self.field}",
                wanted="a JSON, CSV or parquet file",
            )
        return [content]

    def _texts(self, rows: Iterable[tuple[str, Any]], most: int | None = None) -> Iterator[str]:
        """Yield each row's text, up to `most` characters or a little more; empty ones are left out.

        Raises InputError for the first row without one.
        """
        nulls: list[str] = []
        any_text, seen = False, 0
        for where, row in rows:
            place = where if str(self.path) in where else f"{self.path}, {where}"
            text = row_text(row, place, self.field, self.render)
            if text is None:
                nulls.append(where)
                continue
            any_text = True
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError("the row's text is no Unicode", where=where, got="half a surrogate pair")
            if text:
                yield text
            seen += len(text)
            if most is not None and seen > most:
                self.notify(f"{format_bytes(seen)} of its text")
                break
        if nulls and not any_text:
            raise InputError(
                "no row has a text", where=nulls[0], got="null", do="name the field that holds it: FILE#FIELD"
            )
        if nulls:
            self.notify(f"{len(nulls)} row{'s'[: len(nulls) > 1]} left out, whose text is null")


@contextlib.contextmanager
def _unpacking(path: Path) -> Generator[None]:
    """Name the file where its compression is damaged; the optional library's error is known by its name."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise InputError("the file cannot be decompressed", where=str(path), got=first_line(error)) from None


def _suffix(path: Path) -> str:
    """Return the last suffix that says what the file holds, compressed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
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
            row_text(row, "", field, join_turns)
    except (ValueError, RecursionError, InputError):
        return False
    return True


def _decoded(found: Content) -> str:
    """Decode UTF-8, or what a byte order mark announces; the mark itself is no text.

    What ends within the last character was cut there. Raises UnicodeDecodeError for anything else.
    """
    data = found.data
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if not found.cut or error.start < len(data) - _WIDEST:
            raise
        return data[: error.start].decode(encoding)


def _unzstd(file: BinaryIO, path: Path) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError:
        raise InputError(
            "the file is compressed with zstd, which needs the zstandard package",
            where=str(path),
            do="pip install zstandard, or decompress it first",
        ) from None
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))


def _json_rows(content: str, path: Path, found: Content) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a JSON array, or of one JSON value per line."""
    if content.lstrip().startswith("["):
        yield from _array_rows(content, path) if found.cut else _whole_array_rows(content, path)
        return
    if found.cut and "\n" not in content:
        raise InputError(
            "a row is longer than what is read of a large file",
            where=str(path),
            wanted=f"a line's end within {format_bytes(len(found.data))}",
            do="write one row to a line, and split rows that are so long",
        )
    # Not splitlines: a string may hold other line ends than this one.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        # Lines of pieces have no numbers that anybody could look up.
        where, quoted = (str(path), f" in {line[:40]!r}") if found.left_out else (f"{path}:{number}", "")
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError("the line is not JSON", where=where, got=f"{error}{quoted}") from None


def _whole_array_rows(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError("the file is not JSON", where=str(path), got=first_line(error)) from None
    yield from ((f"{path}, element {number}", row) for number, row in enumerate(rows, start=1))


def _array_rows(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array whose end was not read, up to the one that is not whole."""
    decoder, place = json.JSONDecoder(), content.index("[") + 1
    for number in itertools.count(1):
        place = _behind_space(content, place)
        where = f"{path}, element {number}"
        try:
            row, place = decoder.raw_decode(content, place)
        except (ValueError, RecursionError) as error:
            if number > 1 and _ends_within(content, error):
                return
            raise InputError("the file is not JSON", where=where, got=first_line(error)) from None
        yield where, row
        place = _behind_space(content, place)
        if content[place : place + 1] in ("", "]"):
            return
        if content[place] != ",":
            raise InputError("the file is not JSON", where=where, got=f"{content[place : place + 20]!r} behind it")
        place += 1


def _ends_within(content: str, error: Exception) -> bool:
    """Whether a value cannot be read because the text ends within it, and for no other reason."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(content.rstrip()) - len("false")


def _behind_space(content: str, place: int) -> int:
    while content[place : place + 1].isspace():
        place += 1
    return place


def _csv_rows(content: str, path: Path, separator: str, *, cut: bool) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    number, last = 0, 0
    try:
        for number, row in enumerate(reader, start=1):
            last = reader.line_num
            yield f"row {number}", row
    except csv.Error as error:
        lines = content.count("\n")
        if cut and number and "unexpected end" in str(error) and lines - last <= max(20, lines // 20):
            return
        raise InputError("the file is not CSV", where=f"{path}, behind row {number}", got=str(error)) from None


def _parquet_rows(file: BinaryIO, path: Path, field: str | None, drawn: Share | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, row); with `drawn` of row groups in a random order, as many of them as are asked for."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "a parquet file needs the pyarrow package", where=str(path), do="pip install pyarrow"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        names = [str(name) for name in table.schema_arrow.names]
        wanted = [name for name in names if name == field or (field is None and name in COLUMNS)]
        if not wanted:
            # It has no text, and these are its fields.
            yield f"{path}, row 1", dict.fromkeys(names)
            return
        groups = list(range(table.num_row_groups))
        if drawn is not None:
            random.Random(drawn.seed).shuffle(groups)
        batches = table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted, row_groups=groups)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        drawn_ones = "" if drawn is None else " of those that were drawn"
        yield from ((f"{path}, row {number}{drawn_ones}", row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError("the file is not parquet", where=str(path), got=first_line(error)) from None
