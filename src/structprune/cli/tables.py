"""Tables for the terminal that never break a word: columns are as wide as their longest word, texts wrap in between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Console
from rich.text import Text

from structprune.cli.command import wrap_words

# A path or a method with settings may go on in the next line after one of these.
_JOINT = re.compile(r"(?<=[/:,])(?=[^\s\d])")
_GAP = "  "


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table; figures are aligned to the right and stay in one line."""

    name: str
    figures: bool = False


@dataclass(frozen=True, slots=True)
class Heading:
    """A row that names those below it."""

    text: str


Row = Sequence[str] | Heading


def print_table(title: str, columns: Sequence[Column], rows: Sequence[Row], *, legend: Iterable[str] = ()) -> None:
    """Print a table as wide as the terminal, or wider where its longest words need that."""
    console = Console()
    widths = _widths(columns, rows, console.width)
    _print_words(console, title, *legend)
    _print_row(console, columns, [column.name for column in columns], widths, style="bold")
    _print_rule(console, widths)
    for number, row in enumerate(rows):
        if isinstance(row, Heading):
            if number:
                _print_rule(console, widths)
            _print_words(console, row.text, style="bold")
        else:
            _print_row(console, columns, row, widths)
    console.print()


def print_pairs(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and what each has to say, with a bar between them."""
    console, rows = Console(), list(rows)
    bar = " \u2502 "
    room = console.width - len(bar)
    names, values = _widths((Column(name=""), Column(name="")), rows, room + len(_GAP))
    # Names are read first: they may have a third of the line, unless a word of the values needs it.
    spare = min(max((len(name) for name, _ in rows), default=0), room // 3) - names
    longest = _narrowest(Column(name=""), [value for _, value in rows])
    spare = max(0, min(spare, values - longest))
    names, values = names + spare, values - spare
    _print_words(console, title)
    for name, value in rows:
        lines = zip_longest(_wrapped(name, names), _wrapped(value, values), fillvalue="")
        for left, right in lines:
            console.print(Text.assemble((f"{left:<{names}}", "bold"), bar, right), soft_wrap=True)


def fits(columns: Sequence[Column], rows: Sequence[Row]) -> bool:
    """Say whether the terminal is wide enough for every column's longest word."""
    width = Console().width
    return _total(_widths(columns, rows, width)) <= width


def _print_words(console: Console, *paragraphs: str, style: str = "italic") -> None:
    for text in paragraphs:
        for line in wrap_words(text, console.width):
            console.print(Text(line, style=style), soft_wrap=True)


def _print_rule(console: Console, widths: Sequence[int]) -> None:
    console.print(Text("\u2500" * _total(widths)), soft_wrap=True)


def _print_row(
    console: Console, columns: Sequence[Column], row: Sequence[str], widths: Sequence[int], style: str = ""
) -> None:
    cells = [
        [line.rjust(width) if column.figures else line.ljust(width) for line in _wrapped(text, width)] or [" " * width]
        for column, text, width in zip(columns, row, widths, strict=True)
    ]
    for index in range(max(map(len, cells))):
        line = [cell[index] if index < len(cell) else " " * width for cell, width in zip(cells, widths, strict=True)]
        console.print(Text(_GAP.join(line).rstrip(), style=style), soft_wrap=True)


def _widths(columns: Sequence[Column], rows: Sequence[Row], room: int) -> list[int]:
    """Give every column the width of its longest word, then share out what is left to where most is missing."""
    texts = [
        [column.name, *(row[index] for row in rows if not isinstance(row, Heading))]
        for index, column in enumerate(columns)
    ]
    widths = [_narrowest(column, cells) for column, cells in zip(columns, texts, strict=True)]
    wanted = [max(len(line) for text in cells for line in text.splitlines() or [""]) for cells in texts]
    for _ in range(room - _total(widths)):
        missing = [want - width for want, width in zip(wanted, widths, strict=True)]
        if max(missing) <= 0:
            break
        widths[missing.index(max(missing))] += 1
    return widths


def _narrowest(column: Column, cells: Sequence[str]) -> int:
    if column.figures:
        return max(map(len, (*column.name.split(), *cells[1:])), default=0)
    return max((len(piece) for text in cells for word in text.split() for piece in _JOINT.split(word)), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _wrapped(text: str, width: int) -> list[str]:
    """Split `text` between words; a word that is wider than the column goes on after one of its joints."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            pieces = [word] if len(word) <= width else _JOINT.split(word)
            for number, piece in enumerate(pieces):
                gap = " " if line and not number else ""
                if line and len(line) + len(gap) + len(piece) > width:
                    lines.append(line)
                    line = piece
                else:
                    line += gap + piece
        lines.append(line)
    return lines
