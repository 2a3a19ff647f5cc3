"""Rows of files that have them: JSON arrays and lines, tables, parquet, also where only a part was read."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from structprune.calibration.sources.parts import Content, Share
from structprune.calibration.sources.rows import COLUMNS
from structprune.errors import InputError, first_line
from structprune.memory import format_bytes

# Of a parquet file, whose cells may be large.
_ROWS_AT_ONCE = 8


def json_rows(content: str, path: Path, found: Content) -> Iterator[tuple[str, Any]]:
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
    yield from line_rows(content.split("\n"), path, numbered=not found.left_out)


def line_rows(lines: Iterable[str], path: Path, *, numbered: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of lines with one JSON value each, empty ones left out."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        # Lines of pieces have no numbers that anybody could look up.
        where, quoted = (f"{path}:{number}", "") if numbered else (str(path), f" in {line[:40]!r}")
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError("the line is not JSON", where=where, got=f"{error}{quoted}") from None


def array_rows(read: Callable[[], str], path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, element) of a JSON array of any length; `read` gives the next part of its text, at the end none."""
    decoder, content, place, ended = json.JSONDecoder(), "", 0, False

    def more() -> None:
        nonlocal content, place, ended
        new = read()
        ended = not new
        content, place = content[place:] + new, 0

    def next_character() -> str:
        nonlocal place
        place = _behind_space(content, place)
        while place == len(content) and not ended:
            more()
            place = _behind_space(content, place)
        return content[place : place + 1]

    def damaged(number: int, got: str) -> InputError:
        return InputError("the file is not JSON", where=f"{path}, element {number}", got=got)

    next_character()
    place += 1
    if next_character() == "]":
        return
    for number in itertools.count(1):
        while True:
            next_character()
            try:
                row, end = decoder.raw_decode(content, place)
            except (ValueError, RecursionError) as error:
                if ended or not _ends_within(content, error):
                    raise damaged(number, first_line(error)) from None
                more()
                continue
            # A number at the end of what was read may go on behind it.
            if end < len(content) or ended:
                break
            more()
        place = end
        yield f"{path}, element {number}", row
        behind = next_character()
        if behind == "]":
            return
        if behind != ",":
            raise damaged(number, f"{content[place : place + 20]!r} behind it")
        place += 1


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


def csv_rows(content: str, path: Path, separator: str, *, cut: bool) -> Iterator[tuple[str, Any]]:
    """Yield (place, row); where the text was cut, up to the row that is not whole."""
    lines = content.count("\n") if cut else None
    yield from table_rows(io.StringIO(content, newline=""), path, separator, cut_behind=lines)


def table_rows(
    lines: Iterable[str], path: Path, separator: str, *, cut_behind: int | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a table's lines; of one that was cut behind so many, up to the row that is not whole."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines, delimiter=separator, strict=True)
    number, last = 0, 0
    try:
        for number, row in enumerate(reader, start=1):
            last = reader.line_num
            yield f"row {number}", row
    except csv.Error as error:
        near = cut_behind is not None and cut_behind - last <= max(20, cut_behind // 20)
        if near and number and "unexpected end" in str(error):
            return
        raise InputError("the file is not CSV", where=f"{path}, behind row {number}", got=str(error)) from None


def parquet_rows(file: BinaryIO, path: Path, field: str | None, drawn: Share | None) -> Iterator[tuple[str, Any]]:
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
