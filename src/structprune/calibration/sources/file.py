"""Text files as people have them: plain text, JSON rows or arrays, chats, CSV, parquet; compressed or not.

A file is a list of documents, joined by blank lines. Rows give their field `text`, the one that `FILE#FIELD` names, a
chat in `messages` or `conversations` through the model's own chat template, or a prompt with its completion.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from structprune.calibration.context import CalibrationWindows, SourceContext, draw_windows
from structprune.calibration.sources.formats import (
    array_rows,
    csv_rows,
    json_rows,
    line_rows,
    parquet_rows,
    table_rows,
)
from structprune.calibration.sources.parts import (
    COMPRESSED,
    PART_CHARACTERS,
    Content,
    Readable,
    Share,
    batches,
    first_part,
    most_bytes,
    pieces,
    whole_lines,
)
from structprune.calibration.sources.rows import join_turns, row_text
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
Notify = Callable[[str], None]


def read_text(
    path: Path, render: Render | None = None, notify: Notify = lambda said: None, share: Share | None = None
) -> str:
    """Return the file's documents, joined by blank lines; with `share` no more of a large file than that.

    `render` turns chats into text, by default turn by turn; `notify` hears of what was not taken as it is. Raises
    InputError if the file is missing or unreadable, or if a row holds no text.
    """
    path, field = split_field(path)
    with _opened(path) as file:
        reading = _Reading(
            path=path, field=field, render=_checked(render or join_turns, notify), notify=notify, share=share
        )
        return "\n\n".join(reading.documents(file))


def text_parts(path: Path, render: Render | None = None) -> Iterator[tuple[str, int]]:
    """Yield all of the text that `read_text` returns, however large the file: (part, bytes of the file behind it).

    A part is about four million characters and ends at a line's end or between documents; no more than that and one
    row is held. Raises what `read_text` does.
    """
    path, field = split_field(path)
    with _opened(path) as file:
        notify = _nothing_said
        reading = _Reading(
            path=path, field=field, render=_checked(render or join_turns, notify), notify=notify, share=None
        )
        for part in reading.parts(file):
            yield part, file.tell()


def _nothing_said(note: str) -> None: ...


@contextlib.contextmanager
def _opened(path: Path) -> Generator[io.BufferedReader]:
    """Open a text file. Raises InputError for what cannot be opened or read."""
    check_path(path, "the text file")
    try:
        check_regular(path)
        with path.open("rb") as file:
            yield file
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

    def documents(self, file: io.BufferedReader) -> Iterable[str]:
        """Return the file's documents. Raises InputError for what is no text."""
        size, start = file.seek(0, io.SEEK_END), self._start(file)
        if start == _PARQUET:
            most = None if self.share is None else self.share.num_bytes
            return self._texts(parquet_rows(file, self.path, self.field, self._drawn(size)), most)
        if start.startswith(_GZIP) or start == _ZSTD:
            unpacked = self._unpacked(file)
            with _unpacking(self.path):
                if unpacked.peek(4)[:4] == _PARQUET:
                    # Its directory is at its end.
                    return self._texts(parquet_rows(io.BytesIO(unpacked.read()), self.path, self.field, None))
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

    def parts(self, file: io.BufferedReader) -> Iterator[str]:
        """Yield all of the file's text, a part at a time. Raises InputError for what is no text."""
        with _unpacking(self.path):
            stream = self._unpacked(file)
            if stream.peek(4)[:4] == _PARQUET:
                # Its directory is at its end.
                whole = file if stream is file else io.BytesIO(stream.read())
                yield from batches(self._texts(parquet_rows(whole, self.path, self.field, None)))
                return
            with self.path.open("rb") as again, _as_text(self._unpacked(again), "\n") as beginning:
                head = beginning.read(_HEAD_BYTES)
            with _as_text(stream, "" if _suffix(self.path) in _TABLES else "\n") as text:
                yield from self._decoded_parts(text, head)

    def _decoded_parts(self, text: io.TextIOWrapper, head: str) -> Iterator[str]:
        suffix, lines = _suffix(self.path), map(self._without_nul, text)

        def read() -> str:
            return self._without_nul(text.read(PART_CHARACTERS))

        if suffix in _TABLES:
            yield from batches(self._texts(table_rows(lines, self.path, "\t" if suffix == ".tsv" else ",")))
        elif suffix in _JSON and head.lstrip().startswith("["):
            yield from batches(self._texts(array_rows(read, self.path)))
        elif suffix in _JSON or _begins_with_rows(head, self.field):
            yield from batches(self._texts(line_rows(lines, self.path)))
        else:
            self._check_no_field()
            yield from whole_lines(read)

    def _unpacked(self, file: io.BufferedReader) -> io.BufferedReader | gzip.GzipFile:
        start = self._start(file)
        if start.startswith(_GZIP):
            return gzip.GzipFile(fileobj=file)
        return _unzstd(file, self.path) if start == _ZSTD else file

    def _without_nul(self, text: str) -> str:
        if "\0" in text:
            raise InputError(
                "the text file holds NUL characters",
                where=str(self.path),
                wanted="text",
                do="save it as UTF-8, or as UTF-16 with a mark",
            )
        return text

    def _check_no_field(self) -> None:
        """Raise InputError if a field is asked for of plain text."""
        if self.field is not None:
            raise InputError(
                "plain text has no fields",
                where=str(self.path),
                got=f"#{self.field}",
                wanted="a JSON, CSV or parquet file",
            )

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
        content = self._without_nul(_decoded(found))
        suffix = _suffix(self.path)
        if suffix in _TABLES:
            separator = "\t" if suffix == ".tsv" else ","
            return self._texts(csv_rows(content, self.path, separator, cut=found.cut))
        if suffix not in _JSON and (rows or _begins_with_rows(content, self.field)):
            self.notify("read as JSON lines")
            suffix = ".jsonl"
        if suffix in _JSON:
            return self._texts(json_rows(content, self.path, found))
        self._check_no_field()
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


def _encoding(start: bytes) -> str:
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def _as_text(file: io.BufferedReader | gzip.GzipFile, newline: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding=_encoding(file.peek(4)[:4]), newline=newline)


def _decoded(found: Content) -> str:
    """Decode UTF-8, or what a byte order mark announces; the mark itself is no text.

    What ends within the last character was cut there. Raises UnicodeDecodeError for anything else.
    """
    data = found.data
    encoding = _encoding(data)
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
