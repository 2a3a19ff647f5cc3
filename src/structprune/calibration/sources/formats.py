"""Rows of files that have them: JSON arrays and lines, tables, parquet, also where only a part was read."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import sys
from collections.abc import Iterator
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


def csv_rows(content: str, path: Path, separator: str, *, cut: bool) -> Iterator[tuple[str, Any]]:
    """Yield (place, row); where the text was cut, up to the row that is not whole."""
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
