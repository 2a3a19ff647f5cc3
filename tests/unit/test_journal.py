"""The journal and the snapshots: what is damaged costs itself and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from structprune.calibration import snapshots
from structprune.calibration.snapshots import Snapshots
from structprune.calibration.store import MemoryStore
from structprune.runs.journal import JOURNAL_NAME, Journal, silent


def write(folder: Path) -> None:
    with contextlib.closing(Journal(folder)) as journal:
        for number in range(3):
            path = folder / f"file-{number}"
            path.write_bytes(bytes(range(100)))
            journal.record(f"step {number}", [path], {"width": number}, found=0.1 * number, peak_bytes=number)


def read(folder: Path) -> tuple[list[str], list[str]]:
    """The steps that are found, and what is said."""
    notes: list[str] = []
    with contextlib.closing(Journal(folder, notes.append)) as journal:
        steps = [f"step {n}" for n in range(3) if journal.find(f"step {n}", {"width": n}) is not None]
    return steps, notes


def test_steps_are_found_with_their_values(tmp_path: Path) -> None:
    write(tmp_path)
    assert read(tmp_path) == (["step 0", "step 1", "step 2"], [])
    with contextlib.closing(Journal(tmp_path)) as journal:
        line = journal.find("step 1", {"width": 1})
        assert line is not None
        assert line["found"] == 0.1
        assert journal.find("step 1", {"width": 2}) is None
        assert journal.find("step 3") is None
        assert journal.largest("peak_bytes") == 2
        assert journal.seconds > journal.earlier_s > 0


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b[:50] + b"!" + b[51:], lambda b: b + b"0"])
def test_a_damaged_file_costs_its_step(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "file-1"
    path.write_bytes(change(path.read_bytes()))
    assert read(tmp_path) == (["step 0", "step 2"], [f"{path} is damaged; step 'step 1' is done again"])
    path.unlink()
    assert read(tmp_path) == (["step 0", "step 2"], [f"{path} is missing; step 'step 1' is done again"])


def test_any_damaged_byte_of_a_line_costs_its_step(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / JOURNAL_NAME
    content = path.read_bytes()
    first, second, _ = content.split(b"\n", 2)
    for place in range(0, len(second), 7):
        data = bytearray(content)
        data[len(first) + 1 + place] ^= 1
        path.write_bytes(data)
        steps, notes = read(tmp_path)
        assert steps == ["step 0", "step 2"]
        assert notes[0].startswith(f"{path}: line 2 is damaged")
        path.write_bytes(content)


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-3])
    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.record("step 2", given={"width": 2})
    assert read(tmp_path) == (["step 0", "step 1", "step 2"], [])


def test_a_step_counts_as_it_was_recorded_last(tmp_path: Path) -> None:
    write(tmp_path)
    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.record("step 1", given={"width": 1}, found=7)
    with contextlib.closing(Journal(tmp_path)) as journal:
        line = journal.find("step 1", {"width": 1})
        assert line is not None
        assert line["found"] == 7


def test_snapshots_take_their_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now[0])
    real = snapshots.write_json

    def slow(path: Path, value: object) -> None:
        now[0] += 3.0
        real(path, value)

    monkeypatch.setattr(snapshots, "write_json", slow)
    store = MemoryStore((2, 4, 8), torch.float32)
    kept = Snapshots(tmp_path / "state", silent)
    written: list[int] = []
    for position in range(1, 41):
        now[0] += 10.0
        kept.keep(position, {"hidden": store})
        found = kept.load()
        assert found is not None
        if not written or found.position != written[-1]:
            written.append(found.position)
    # 3 s each: no sooner than 150 s after the one before.
    assert written == [1, 16, 31]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["31.hidden", "state.json"]


def test_a_snapshot_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SHARE", float("inf"))
    store = MemoryStore((3, 4, 8), torch.bfloat16)
    store.write(0, torch.randn(3, 4, 8))
    wanted = store.read(0, 3).clone()
    kept = Snapshots(tmp_path / "state", silent)
    kept.keep(2, {"hidden": store}, {"basis": torch.eye(3)}, {"dropped": 0.1})
    other = MemoryStore((3, 4, 8), torch.bfloat16)
    found = kept.behind([True, True, False])
    assert found is not None
    found.restore({"hidden": other})
    assert torch.equal(other.read(0, 3), wanted)
    assert torch.equal(found.tensors["basis"], torch.eye(3))
    assert found.values == {"dropped": 0.1}
    assert kept.behind([True, False, False]) is None
    assert kept.load() is None
    assert not (tmp_path / "state").exists()
