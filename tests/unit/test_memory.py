"""Bytes: what a user may write, how they are shown, and that the peak meter sees what was really allocated."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structprune.errors import InputError
from structprune.memory import (
    PeakMeter,
    available_bytes,
    bound_hidden_memory,
    format_bytes,
    parse_bytes,
    unbounded_environment,
)
from structprune.phases import Phase

_SIZE = 200_000_000


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1234", 1234),
        (1234, 1234),
        ("17b", 17),
        ("4k", 4 * 1024),
        ("4KiB", 4 * 1024),
        ("4kB", 4000),
        ("512MB", 512 * 1000**2),
        ("512 mib", 512 * 1024**2),
        ("  4GiB ", 4 * 1024**3),
        ("4g", 4 * 1024**3),
        ("4GB", 4 * 1000**3),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("2T", 2 * 1024**4),
        ("2tb", 2 * 1000**4),
    ],
)
def test_parse_bytes(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-4GiB", "4 parsecs", "4,5GiB", "1e9", "4GiB extra", ".5g", "0x10", "nan"])
def test_unreadable_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="wanted a number with a unit such as 4GiB") as caught:
        parse_bytes(text)
    assert caught.value.got == repr(text)


def test_absurdly_large_size_is_refused() -> None:
    with pytest.raises(InputError):
        parse_bytes("1" + "0" * 400)


@given(st.integers(0, 2**53))
def test_plain_numbers_are_exact(num_bytes: int) -> None:
    assert parse_bytes(str(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 * 1024**2, "5.0 MiB"),
        (3 * 1024**3 // 2, "1.5 GiB"),
        (2048 * 1024**3, "2048.0 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(0, 2**45))
def test_formatted_bytes_can_be_read_back(num_bytes: int) -> None:
    """One decimal of the unit: within a twentieth of it."""
    text = format_bytes(num_bytes)
    assert parse_bytes(text) == pytest.approx(num_bytes, abs=0.05 * parse_bytes("1" + text.split()[1]) + 1)


def test_available_bytes_is_between_nothing_and_everything() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_peak_meter_sees_what_was_allocated_and_freed() -> None:
    with PeakMeter() as meter:
        assert meter.peak_so_far() < _SIZE / 10
        buffer = torch.ones(_SIZE, dtype=torch.uint8)
        del buffer
        assert meter.peak_so_far() == pytest.approx(_SIZE, rel=0.1)
    assert meter.peak_bytes == pytest.approx(_SIZE, rel=0.1)


def test_peak_meter_starts_anew() -> None:
    """A peak before the meter was entered does not count, nor does what is still held from then."""
    held = torch.ones(_SIZE // 2, dtype=torch.uint8)
    gone = torch.ones(_SIZE, dtype=torch.uint8)
    del gone
    with PeakMeter() as meter:
        buffer = torch.ones(_SIZE // 4, dtype=torch.uint8)
        del buffer
    assert meter.peak_bytes == pytest.approx(_SIZE // 4, rel=0.2)
    del held


def test_a_phase_counts_what_stretches_took_that_ended_in_it() -> None:
    with PeakMeter() as meter:
        with meter.phase(Phase.REPAIR):
            del_later = bytearray(b"x" * (64 * 2**20))
            meter.mark("a stretch")
            del del_later
            meter.mark("another")
        with meter.phase(Phase.EMBED):
            pass
    assert meter.phases[Phase.REPAIR] >= 60 * 2**20
    assert meter.phases[Phase.EMBED] < 30 * 2**20
    assert [sample.phase for sample in meter.samples] == ["a stretch", "another"]


def test_peak_meter_without_the_kernels_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the mark cannot be reset, a thread samples: an allocation that stays for a while is seen."""

    def refuse(self: Path, text: str) -> int:
        raise PermissionError(f"{self}: {text}")

    monkeypatch.setattr(Path, "write_text", refuse)
    with PeakMeter() as meter:
        monkeypatch.undo()
        buffer = torch.ones(_SIZE, dtype=torch.uint8)
        time.sleep(0.2)
        del buffer
    assert meter.peak_bytes == pytest.approx(_SIZE, rel=0.1)


def test_a_process_whose_speed_is_measured_gets_no_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a user's own setting it gets that one."""
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    bound_hidden_memory()
    assert os.environ["LRU_CACHE_CAPACITY"] == "48"
    environment = unbounded_environment()
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert "LRU_CACHE_CAPACITY" not in environment
    assert environment["PATH"] == os.environ["PATH"]
