"""Bytes: parsing, the budget that work is admitted against, and the peak that was really reached."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from structprune.errors import InputError, MemoryBudgetError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str | int) -> int:
    """`"4GiB"`, `"512 MB"`, `"4g"` (binary) or a plain number of bytes -> bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in _UNITS:
        raise InputError("a size in bytes cannot be read", got=repr(text), wanted="a number with a unit such as 4GiB or 512MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(num_bytes: float) -> str:
    """Bytes -> a short text in binary units, e.g. `1.5 GiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def available_bytes() -> int:
    """Host memory that new allocations can take: the machine's, or the control group's where that is less."""
    available = psutil.virtual_memory().available
    limit_file = Path("/sys/fs/cgroup/memory.max")
    usage_file = Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):
        available = min(available, int(limit_file.read_text()) - int(usage_file.read_text()))
    return max(available, 0)


class MemoryBudget:
    """Byte leases against a fixed budget. A lease that does not fit raises; the peak of all leases is kept."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.leased_bytes = 0
        self.peak_bytes = 0

    @contextlib.contextmanager
    def lease(self, where: str, num_bytes: int) -> Iterator[None]:
        """Hold `num_bytes` while the context is open. Raises MemoryBudgetError if the budget is passed."""
        if self.leased_bytes + num_bytes > self.total_bytes:
            raise MemoryBudgetError(
                "does not fit in the memory budget",
                where=where,
                got=f"{format_bytes(self.leased_bytes)} in use + {format_bytes(num_bytes)}",
                wanted=f"at most {format_bytes(self.total_bytes)}",
                do="raise --memory, or lower --num-samples or --seq-len",
            )
        self.leased_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.leased_bytes)
        try:
            yield
        finally:
            self.leased_bytes -= num_bytes


def release_free_memory() -> None:
    """Give freed heap pages back to the system, so that resident memory is what is in use (glibc only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class PeakMeter:
    """Peak resident memory of this process above the moment the meter was entered.

    Linux keeps the high-water mark itself once it has been reset; elsewhere a thread samples it every 20 ms.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._kernel_mark = False
        self._stop = threading.Event()
        self._sampled_peak = 0
        self.baseline_bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> PeakMeter:
        release_free_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._kernel_mark = True
        except OSError:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        self.baseline_bytes = self._process.memory_info().rss
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_bytes = self.peak_so_far()
        self._stop.set()

    def peak_so_far(self) -> int:
        """Bytes above the baseline at the highest point since entry."""
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
