"""Parts of a file that is too large to be held whole: pieces from places all over it, its first part, or one by one.

A calibration run uses a megabyte or two of text, however large the file is. Pieces are whole lines, from one place in
each of as many equal stretches of the file, so that all of it can be met.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from structprune.memory import format_bytes

PART_CHARACTERS = 2**22
"""What is held at once of a file that is read to its end."""
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
_PIECE_BYTES = 64 * 2**10
_LEAST_BYTES = 4 * 2**20
# Several times what a token takes in prose, so that there are more windows than are drawn.
_BYTES_PER_TOKEN = 16
# No end of a line is looked for further on, where lines are rows.
_LONGEST_LINE = 8 * 2**20


def most_bytes(num_tokens: int) -> int:
    """Return how much of a file is read for windows of so many tokens in all; a smaller file is read whole."""
    return max(_LEAST_BYTES, _BYTES_PER_TOKEN * num_tokens)


def held_bytes(path: Path, num_tokens: int) -> int:
    """Return how much text is held at most of the file at `path`, for windows of so many tokens in all."""
    packed = path.suffix.lower() in (*COMPRESSED, ".parquet")
    return most_bytes(num_tokens) if packed else min(path.stat().st_size, most_bytes(num_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How much of a file may be read, and what decides where."""

    num_bytes: int
    seed: int


class Readable(Protocol):
    """A file or a stream."""

    def read(self, size: int = -1, /) -> bytes:
        """Read so many bytes, or fewer at the end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What was read of a file."""

    data: bytes
    left_out: str = ""
    """What was not read, in words; empty: all of it is here."""
    cut: bool = False
    """Whether it ends where the rest was left out, perhaps within a row."""


def first_part(file: Readable, share: Share | None, unit: int = 1) -> Content:
    """Read a file from where it stands, which may be a stream of unknown length: no more than `share` says.

    `unit` is what a character takes at least where it is not UTF-8.
    """
    if share is None:
        return Content(data=file.read())
    data = file.read(share.num_bytes + 1)
    if len(data) <= share.num_bytes:
        return Content(data=data)
    lines = data[: data.rfind(b"\n") + 1] or data
    data = data[: len(data) // unit * unit] if unit > 1 else _whole_characters(lines)
    return Content(data=data, left_out=f"its first {format_bytes(len(data))}", cut=True)


def pieces(file: BinaryIO, share: Share, *, rows: bool) -> Content:
    """Read pieces from all over a file that can be sought in, whole lines where `rows`; `file` is larger than that.

    Each begins at a place drawn in one of as many stretches, which are visited in a random order until there is enough,
    so that also a few long rows come from all over. Nothing is read twice.
    """
    size = file.seek(0, io.SEEK_END)
    count = max(1, share.num_bytes // _PIECE_BYTES)
    drawn = random.Random(share.seed)
    stretches = [(size * number // count, size * (number + 1) // count) for number in range(count)]
    starts = [drawn.randrange(first, max(first + 1, last - _PIECE_BYTES)) for first, last in stretches]
    drawn.shuffle(starts)
    found: dict[int, bytes] = {}
    left = share.num_bytes
    for start in starts:
        begin, piece = _lines(file, start, found, left) if rows else _words(file, start)
        if piece.strip():
            found[begin] = piece
            left -= len(piece)
        if left <= 0:
            break
    data = b"\n".join(found[begin] for begin in sorted(found))
    read = format_bytes(sum(map(len, found.values())))
    return Content(data=data, left_out=f"{len(found)} pieces of it, {read} of {format_bytes(size)}")


def whole_lines(read: Callable[[], str]) -> Iterator[str]:
    """Yield what `read` gives until there is no more, each part to a line's end, or between words on a long line."""
    left = ""
    while new := read():
        part = left + new
        place = part.rfind("\n") + 1 or max(0, part.rfind(" ")) or len(part)
        yield part[:place]
        left = part[place:]
    if left:
        yield left


def batches(documents: Iterable[str]) -> Iterator[str]:
    """Yield documents, joined by blank lines to parts of at least so many characters."""
    held, size = list[str](), 0
    for document in documents:
        held.append(document)
        size += len(document)
        if size >= PART_CHARACTERS:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


def _lines(file: BinaryIO, start: int, found: Mapping[int, bytes], most: int) -> tuple[int, bytes]:
    """Read whole lines behind `start`, up to what was found before; none where one alone is longer than `most`.

    Returns where they begin, too.
    """
    file.seek(start)
    if start and not _finish_line(file):
        return start, b""
    begin = file.tell()
    if any(other <= begin < other + len(piece) for other, piece in found.items()):
        return begin, b""
    end = min((other for other in found if other > begin), default=None)
    lines: list[bytes] = []
    total = 0
    while total < _PIECE_BYTES and begin + total != end:
        line = file.readline(most - total + 1)
        if not line or total + len(line) > most:
            break
        lines.append(line)
        total += len(line)
    return begin, b"".join(lines)


def _finish_line(file: BinaryIO) -> bool:
    """Read to the end of a line; whether it ended soon enough."""
    line = file.readline(_LONGEST_LINE)
    return len(line) < _LONGEST_LINE or line.endswith(b"\n")


def _words(file: BinaryIO, start: int) -> tuple[int, bytes]:
    """Read text behind `start`, from the next line's beginning to a line's end, or between words on a long line."""
    file.seek(start)
    data = file.read(_PIECE_BYTES)
    if start:
        data = _behind(data, b"\n") or _behind(data, b" ") or data
    if len(data) == _PIECE_BYTES or file.read(1):
        data = data[: data.rfind(b"\n") + 1] or data[: data.rfind(b" ") + 1] or data
    return start, _whole_characters(data)


def _behind(data: bytes, mark: bytes) -> bytes:
    place = data.find(mark)
    return data[place + 1 :] if place >= 0 else b""


def _whole_characters(data: bytes) -> bytes:
    """Leave out the parts of a UTF-8 character at both ends."""
    first = next((place for place in range(min(4, len(data))) if data[place] & 0xC0 != 0x80), 0)
    data = data[first:]
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            # The last character's first byte says how many follow it.
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data if length == back else data[:-back]
    return data
