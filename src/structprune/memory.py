"""Bytes: parsing, what is free, and the peak that was really reached."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import psutil

from structprune.errors import InputError
from structprune.phases import PhaseBytes, PhaseName

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_CACHED_SHAPES = "48"
HEAP_BLOCK_BYTES = 8 * 2**20
"""Freed blocks that are smaller stay in the heap."""
HEAP_END_BYTES = 12 * 2**20
"""Free memory at the end of the heap that is not given back before the next `release_free_memory`."""
_UNITS = {
    "": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(("", "k", "m", "g", "t"))},
    **{f"{prefix}{end}": 1024**power for power, prefix in enumerate("kmgt", start=1) for end in ("", "ib")},
}


def parse_bytes(text: str | int) -> int:
    """Parse `"4GiB"`, `"512 MB"`, `"4g"` (binary) or a plain number of bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in _UNITS:
        raise InputError(
            "a size in bytes cannot be read", got=repr(text), wanted="a number with a unit such as 4GiB or 512MB"
        )
    value = float(match[1]) * _UNITS[match[2].lower()]
    if value >= 2**63:
        raise InputError("a size in bytes is too large", got=f"{str(text)[:20]}...", wanted="less than 8 EiB")
    return int(value)


def format_bytes(num_bytes: float) -> str:
    """Format bytes as a short text in binary units, e.g. `1.5 GiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_budget(num_bytes: int) -> str:
    """Format bytes as whole mebibytes, rounded up: a budget that is printed must do when it is typed."""
    return f"{-(-num_bytes // 2**20)} MiB"


def available_bytes() -> int:
    """Return the host memory that new allocations can take: the machine's, or the control group's if that is less."""
    available = psutil.virtual_memory().available
    limit_file = Path("/sys/fs/cgroup/memory.max")
    usage_file = Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):
        available = min(available, int(limit_file.read_text()) - int(usage_file.read_text()))
    return max(available, 0)


def release_free_memory() -> None:
    """Give freed heap pages back to the system, so that resident memory is what is in use (glibc only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def bound_hidden_memory() -> None:
    """Keep two things from growing that no plan sees. Call before the first matrix product.

    Freed blocks of 8 MiB or more go back to the system at once (glibc): by default they become part of the heap, where
    successors of another size do not fit into their holes. The solver peaked 45 MiB higher for matrices of order 1536,
    and activations of 6 MiB, which do stay there, added 54 MiB to a run of 167. From 4 MiB on, the forward passes of a
    135M model took 17% more CPU time for the pages, from 8 MiB on 4%. Smaller ones stay in the heap, up to 12 MiB at
    its end: once the other threshold is set the default there is 128 KiB, with which every temporary of a forward pass
    was taken anew from the system, page by page, and an RMSNorm of 2048 tokens cost four to eight times as much.

    oneDNN keeps what it prepared for each shape of a bfloat16 product, 0.6 MiB each and up to 1024 of them, while every
    pruned block has its own width; a user's setting of these caches is left alone.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, HEAP_END_BYTES)
    for name in _CACHES:
        os.environ.setdefault(name, _CACHED_SHAPES)


def unbounded_environment() -> dict[str, str]:
    """Return the environment without the bounds of `bound_hidden_memory`, for a process whose speed is measured.

    A model of uneven widths has more shapes than the bounded caches hold, and would prepare each product anew.
    """
    return {k: v for k, v in os.environ.items() if k not in _CACHES or v != _CACHED_SHAPES}


def _clear_mark() -> None:
    """Reset the process's high-water mark to what it holds now, on Linux. Raises OSError elsewhere."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """The highest point of one stretch of a run."""

    phase: str
    seconds: float
    """Time of the stretch's end, from the moment the meter was entered."""
    peak_bytes: int
    """Above the process's size at that moment."""


class PeakMeter:
    """Peak resident memory of this process above the moment the meter was entered.

    Linux keeps the high-water mark itself once it has been reset; elsewhere a thread samples it every 20 ms.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._kernel_mark = False
        self._paused = False
        self._stop = threading.Event()
        self._sampled_peak = 0
        self._earlier_peak = 0
        self._phase_peak = 0
        self._stretch_peak = 0
        self.baseline_bytes = 0
        self.peak_bytes = 0
        self.phases: PhaseBytes = {}
        """Phase -> its peak above the baseline, the highest where it came several times."""
        self.samples: list[MemorySample] = []

    def __enter__(self) -> PeakMeter:
        release_free_memory()
        self._entered = time.perf_counter()
        try:
            _clear_mark()
            self._kernel_mark = True
        except OSError:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        self.baseline_bytes = self._process.memory_info().rss
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_bytes = self.peak_so_far()
        self._stop.set()

    @contextlib.contextmanager
    def phase(self, phase: PhaseName) -> Generator[None]:
        """Count the peak inside the context for `phase` too, stretches that end in it included.

        Phases may not be nested.
        """
        self._take_mark()
        self._phase_peak = 0
        try:
            yield
        finally:
            self._take_mark()
            self.phases[phase] = max(self.phases.get(phase, 0), self._phase_peak)

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Count nothing inside the context: another process works, and its memory has an entry of its own."""
        self._take_mark()
        self._paused = True
        try:
            yield
        finally:
            self._restart()
            self._paused = False

    def peak_so_far(self) -> int:
        """Return the bytes above the baseline at the highest point since entry."""
        return max(self._earlier_peak, self._mark())

    def mark(self, name: str) -> None:
        """End a stretch of the run: its peak goes into `samples`, and the next stretch begins."""
        if self._paused:
            return
        self._take_mark()
        seconds = time.perf_counter() - self._entered
        self.samples.append(MemorySample(phase=name, seconds=seconds, peak_bytes=self._stretch_peak))
        self._stretch_peak = 0

    def _take_mark(self) -> int:
        """Return the mark, and start it anew."""
        mark = self._mark()
        self._earlier_peak = max(self._earlier_peak, mark)
        self._stretch_peak = max(self._stretch_peak, mark)
        self._phase_peak = max(self._phase_peak, mark)
        self._restart()
        return mark

    def _restart(self) -> None:
        if self._kernel_mark:
            _clear_mark()
        self._sampled_peak = 0

    def _mark(self) -> int:
        if self._kernel_mark:
            status = Path("/proc/self/status").read_text()
            match = re.search(r"VmHWM:\s+(\d+) kB", status)
            assert match is not None
            peak = int(match[1]) * 1024
        else:
            peak = max(self._sampled_peak, self._process.memory_info().rss)
        return max(0, peak - self.baseline_bytes)

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self._sampled_peak = max(self._sampled_peak, self._process.memory_info().rss)
