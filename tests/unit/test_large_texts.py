"""Texts that are too large to be read whole: what is read of them, from where, and what is said of the rest."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from structprune.calibration.context import SourceContext
from structprune.calibration.sources.file import file_windows, read_text, text_parts
from structprune.calibration.sources.parts import Share, held_bytes, most_bytes
from structprune.errors import InputError

SHARE = Share(num_bytes=400_000, seed=0)
NUM_ROWS = 20_000


def row(number: int) -> str:
    """A hundred characters, of one to four bytes each, that say their number."""
    return f"<{number:06}>" + "añ漢𝄞 " * 18 + f"</{number:06}>"


def read(path: Path, share: Share = SHARE) -> tuple[str, list[str]]:
    said: list[str] = []
    return read_text(path, notify=said.append, share=share), said


def whole_rows(text: str) -> list[int]:
    """Numbers of the rows in a text of nothing but whole ones."""
    found = [part for part in text.split("\n") if part.strip()]
    numbers = [int(part[1:7]) for part in found]
    assert found == [row(number) for number in numbers]
    return numbers


def write_lines(path: Path, make: Callable[[int], str]) -> Path:
    path.write_text("\n".join(make(number) for number in range(NUM_ROWS)) + "\n", encoding="utf-8")
    return path


def check_from_all_over(numbers: list[int]) -> None:
    assert len(set(numbers)) == len(numbers) > 500
    tenths = {number * 10 // NUM_ROWS for number in numbers}
    assert len(tenths) >= 5
    assert max(numbers) > NUM_ROWS // 2


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".json"])
def test_rows_come_from_all_over(suffix: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / f"rows{suffix}", lambda number: json.dumps({"text": row(number)}, ensure_ascii=False))
    text, said = read(path)
    check_from_all_over(whole_rows(text))
    assert len(text.encode()) < 1.5 * SHARE.num_bytes
    assert "pieces of it" in said[0]
    assert "MiB" in said[0]
    assert ("read as JSON lines" in said) == (suffix == ".txt")


def test_prose_comes_from_all_over(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prose.txt", row)
    text, said = read(path)
    check_from_all_over(whole_rows(text))
    assert len(text.encode()) <= SHARE.num_bytes
    assert said == [said[0]]


def test_another_seed_draws_elsewhere(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prose.txt", row)
    assert read(path)[0] == read(path)[0]
    assert read(path)[0] != read(path, Share(num_bytes=SHARE.num_bytes, seed=1))[0]


def test_a_file_that_is_no_larger_is_read_whole(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prose.txt", row)
    size = path.stat().st_size
    assert read(path, Share(num_bytes=size, seed=0)) == (path.read_text(encoding="utf-8"), [])
    assert read(path, Share(num_bytes=size - 1, seed=0))[1] != []


def test_one_line_is_cut_between_words(tmp_path: Path) -> None:
    words = [f"wört{number:06}" for number in range(200_000)]
    path = tmp_path / "line.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    text, _ = read(path)
    found = text.split()
    assert set(found) <= set(words)
    assert 10_000 < len(found) < len(words) / 4


def test_text_without_spaces_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("漢𝄞é" * 400_000, encoding="utf-8")
    text, _ = read(path)
    assert set(text) == {*"漢𝄞é\n"}


def test_rows_longer_than_a_piece_are_whole(tmp_path: Path) -> None:
    long = {number: "x" * 150_000 + str(number) for number in range(100)}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in long.values()))
    text, _ = read(path, Share(num_bytes=300_000, seed=0))
    assert set(text.split("\n\n")) <= set(long.values())


def test_the_first_elements_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": row(number)} for number in range(NUM_ROWS)], indent=1))
    text, said = read(path)
    numbers = whole_rows(text)
    assert numbers == list(range(len(numbers)))
    assert 500 < len(numbers) < NUM_ROWS / 2
    assert said[0].startswith("its first ")


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_the_first_rows_of_a_table(suffix: str, separator: str, tmp_path: Path) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator)
    writer.writerow(["id", "text"])
    writer.writerows([number, row(number) + "\n\n" + row(number)] for number in range(NUM_ROWS))
    path = tmp_path / f"rows{suffix}"
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    text, said = read(path)
    numbers = whole_rows(text)[::2]
    assert numbers == list(range(len(numbers)))
    assert 300 < len(numbers) < NUM_ROWS / 2
    assert said[0].startswith("its first ")


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_the_first_part_of_what_is_packed(packing: str, tmp_path: Path) -> None:
    pack = gzip.compress if packing == "gz" else pytest.importorskip("zstandard").ZstdCompressor().compress
    lines = "\n".join(json.dumps({"text": row(number)}) for number in range(NUM_ROWS))
    path = tmp_path / f"rows.jsonl.{packing}"
    path.write_bytes(pack(lines.encode()))
    text, said = read(path)
    numbers = whole_rows(text)
    assert numbers == list(range(len(numbers)))
    assert 300 < len(numbers) < NUM_ROWS / 2
    assert said[0].startswith("its first ")
    path.write_bytes(path.read_bytes()[:100] + b"damaged" + path.read_bytes()[107:])
    with pytest.raises(InputError, match="cannot be"):
        read(path)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"a b\n" * 50_000_000, compresslevel=1))
    tracemalloc.start()
    text, _ = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(text) <= SHARE.num_bytes
    assert peak < 20 * SHARE.num_bytes


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_marks(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_bytes("\n".join(row(number) for number in range(NUM_ROWS)).encode(encoding))
    text, said = read(path)
    assert row(3) in text or encoding == "utf-8-sig"
    assert "\ufeff" not in text
    assert len(text.encode(encoding)) <= SHARE.num_bytes + 4
    assert len(said) == 1


def test_row_groups_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    drawn = random.Random(0)
    noise = [row(number) + drawn.randbytes(40).hex() for number in range(NUM_ROWS)]
    parquet.write_table(pyarrow.table({"text": noise}), path, row_group_size=500)
    assert path.stat().st_size > SHARE.num_bytes
    text, said = read(path)
    numbers = [int(part[1:7]) for part in text.split("\n\n")]
    assert numbers != list(range(len(numbers)))
    assert len(numbers) < NUM_ROWS / 2
    assert said[0].endswith("of its text")


def test_windows_of_a_large_file_take_little_memory(tmp_path: Path) -> None:
    """And the description says what was read."""
    path = tmp_path / "large.txt"
    with path.open("w") as file:
        for _ in range(64):
            file.write("many words on one line " * 50_000)
    context = SourceContext(
        encode=lambda text: torch.arange(len(text) // 4),
        sample=lambda *_: torch.zeros(0),
        num_samples=8,
        seq_len=128,
        seed=0,
    )
    tracemalloc.start()
    found = file_windows(path, context)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.ids_NS.shape == (8, 128)
    assert "64 pieces of it, 4.0 MiB of 70.2 MiB" in found.description
    assert peak < 30 * 2**20


def test_what_is_held_is_planned(tmp_path: Path) -> None:
    small, packed = tmp_path / "small.txt", tmp_path / "rows.jsonl.gz"
    for path in (small, packed):
        path.write_bytes(b"a" * 1000)
    assert held_bytes(small, 10**6) == 1000
    assert held_bytes(packed, 10**6) == most_bytes(10**6) == 16 * 10**6
    assert most_bytes(10) == 4 * 2**20


def test_long_rows_come_from_all_over_and_once(tmp_path: Path) -> None:
    long = [f"{number:03} " + "x" * 1_000_000 for number in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in long))
    text, said = read(path, Share(num_bytes=5_000_000, seed=0))
    numbers = [int(part[:3]) for part in text.split("\n\n")]
    assert len(set(numbers)) == len(numbers) >= 3
    assert max(numbers) > 20
    assert len(text) <= 5_000_000
    assert said[0].startswith(f"{len(numbers)} pieces of it, ")


def test_short_lines_take_no_time(tmp_path: Path) -> None:
    """Rows are found among millions of empty lines; a sum over all lines for each line would take hours."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "at the start"}\n' + b"\n" * 6_000_000)
    assert "at the start" in read_text(path, share=Share(num_bytes=5_000_000, seed=0))


def test_a_row_that_never_ends(tmp_path: Path) -> None:
    path = tmp_path / "dict.json"
    path.write_text(json.dumps({"data": ["many words"] * 200_000}))
    with pytest.raises(InputError, match="a row is longer than what is read of a large file"):
        read(path)


@pytest.mark.parametrize("fault", ["quote", "comma"])
def test_an_array_that_is_damaged_in_the_middle(fault: str, tmp_path: Path) -> None:
    elements = [json.dumps({"text": row(number)}) for number in range(NUM_ROWS)]
    elements[61] = '{"text": "an "unescaped" quote"}' if fault == "quote" else elements[61] + " " + elements[62]
    path = tmp_path / "rows.json"
    path.write_text("[" + ",\n".join(elements) + "]")
    with pytest.raises(InputError, match="the file is not JSON") as caught:
        read(path)
    assert "element 62" in str(caught.value)


def test_a_table_with_a_quote_that_never_ends(tmp_path: Path) -> None:
    lines = [f'{number},"{row(number)}"' for number in range(NUM_ROWS)]
    lines[100] = '100,"a quote'
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n" + "\n".join(lines).replace('"</', "</"), encoding="utf-8")
    path.write_text("id,text\n" + "\n".join([*lines[:101], *(f"{n},plain {row(n)}" for n in range(101, NUM_ROWS))]))
    with pytest.raises(InputError, match="the file is not CSV"):
        read(path)


def test_other_encodings_are_refused_in_a_first_part_too(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt.gz"
    path.write_bytes(gzip.compress("café naïve\n".encode("latin-1") * 200_000))
    with pytest.raises(InputError, match="not UTF-8"):
        read(path)


def test_one_large_row_group_of_parquet_takes_little_memory(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    drawn = random.Random(0)
    parquet.write_table(pyarrow.table({"text": [drawn.randbytes(400).hex() for _ in range(NUM_ROWS)]}), path)
    tracemalloc.start()
    text, _ = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert SHARE.num_bytes <= len(text) < 1.1 * SHARE.num_bytes
    assert peak < 12 * SHARE.num_bytes < path.stat().st_size


def small_parts(path: Path, monkeypatch: pytest.MonkeyPatch, size: int = 50_000) -> list[str]:
    """Read a file to its end in parts of so many characters."""
    for name in ("parts", "file"):
        monkeypatch.setattr(f"structprune.calibration.sources.{name}.PART_CHARACTERS", size)
    found = list(text_parts(path))
    places = [behind for _, behind in found]
    assert places == sorted(places)
    assert 0 < places[-1] <= path.stat().st_size
    return [part for part, _ in found]


def in_format(kind: str, path: Path) -> Path:
    """Write rows in a format that the name says."""
    name = kind.removesuffix(".gz")
    rows = [{"text": row(number), "id": number} for number in range(3000)]
    if name == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows({**one, "text": f'{one["text"]}\r\n"{one["id"]}"'} for one in rows)
        content = file.getvalue()
    elif name == "json":
        content = json.dumps(rows, ensure_ascii=False, indent=1)
    elif name == "jsonl":
        content = "\n\n".join(json.dumps(one) for one in rows)
    else:
        content = "\r\n".join(str(one["text"]) for one in rows)
    path = path / f"rows.{'txt' if name in ('utf-16', 'utf-8-sig') else name}{'.gz' if kind.endswith('.gz') else ''}"
    data = content.encode(name if name.startswith("utf") else "utf-8")
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


FORMATS = ["txt", "utf-16", "utf-8-sig", "txt.gz", "jsonl", "jsonl.gz", "json", "csv"]


@pytest.mark.parametrize("kind", FORMATS)
def test_all_of_a_text_in_parts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text as where the file is read whole."""
    path = in_format(kind, tmp_path)
    parts = small_parts(path, monkeypatch)
    is_rows = kind.startswith(("json", "csv"))
    assert ("\n\n" if is_rows else "").join(parts) == read_text(path)
    assert len(parts) > 4
    assert max(map(len, parts)) < 60_000
    assert is_rows or all(part.endswith("\n") for part in parts[:-1])


@pytest.mark.parametrize("packing", ["", ".zst"])
def test_all_of_parquet_in_parts(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": [row(number) for number in range(3000)]}), path)
    if packing:
        zstandard = pytest.importorskip("zstandard")
        (tmp_path / "rows.parquet.zst").write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
        path = tmp_path / "rows.parquet.zst"
    parts = small_parts(path, monkeypatch)
    assert "\n\n".join(parts) == read_text(path)
    assert len(parts) > 4


def test_parts_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between words, before the space, which belongs to the next one; without spaces between characters."""
    path = tmp_path / "line.txt"
    for content in ("word " * 40_000, "漢𝄞é" * 40_000):
        path.write_text(content, encoding="utf-8")
        parts = small_parts(path, monkeypatch)
        assert "".join(parts) == content
        assert len(parts) > 2
        assert " " not in content or all(part.startswith(" ") for part in parts[1:])


def test_elements_that_lie_across_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    rows = [{"text": 'a \\ " ]}, \u00e9' * number, "scores": [1.5, 20, None]} for number in range(1, 40)]
    path.write_text(f" {json.dumps(rows)} ")
    for size in (1, 7, 100):
        assert "\n\n".join(small_parts(path, monkeypatch, size)) == "\n\n".join(str(one["text"]) for one in rows)
    path.write_text("[ ]")
    assert not list(text_parts(path))


DAMAGED = [
    ("rows.json", '[{"text": "a"}, {"text": "b"} {"text": "c"}]', "element 2"),
    ("rows.json", '[{"text": "a"}, {"text": "b"', "element 2"),
    ("rows.jsonl", '{"text": "a"}\n{"text": "b"', "rows.jsonl:2"),
    ("rows.jsonl", '{"text": "a"}\n{"body": 3}', "rows.jsonl:2"),
    ("rows.csv", 'id,text\n1,"a', "not CSV"),
    ("prose.txt", "a\0b", "NUL"),
    ("prose.txt#text", "plain", "plain text has no fields"),
]


@pytest.mark.parametrize(("name", "content", "said"), DAMAGED)
def test_parts_of_what_is_damaged(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name.partition("#")[0]).write_text(content)
    with pytest.raises(InputError) as caught:
        list(text_parts(tmp_path / name))
    assert said in str(caught.value)


def test_parts_of_other_encodings_and_files(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_bytes("café\n".encode("latin-1") * 10)
    with pytest.raises(InputError, match="not UTF-8"):
        list(text_parts(path))
    with pytest.raises(InputError, match="does not exist"):
        list(text_parts(tmp_path / "nothing.txt"))
    packed = tmp_path / "prose.txt.gz"
    packed.write_bytes(gzip.compress(b"many words " * 1000)[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        list(text_parts(packed))


def test_parts_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"text": "many words on one line " * 500})
    path.write_text("\n".join([line] * 500))
    tracemalloc.start()
    parts = 0
    for name in ("parts", "file"):
        monkeypatch.setattr(f"structprune.calibration.sources.{name}.PART_CHARACTERS", 200_000)
    for part, _ in text_parts(path):
        parts += len(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parts > 5 * 2**20
    # The head that says whether lines are rows is a megabyte.
    assert peak < 4 * 2**20
