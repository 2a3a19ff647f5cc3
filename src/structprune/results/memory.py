"""Reports of memory: what was planned and what was measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from structprune.results.frozen import Frozen


class MemoryStretch(Frozen):
    """The highest point of one stretch of the run, from the end of the stretch before it."""

    phase: str
    """What was going on, as the progress said it."""
    seconds: float
    """Time of the stretch's end, from the start of the run."""
    peak_bytes: int


class DeviceMemoryReport(Frozen):
    """Bytes on a CUDA device beside what the process had there before the run."""

    budget_bytes: int
    planned_peak_bytes: int
    measured_peak_bytes: int
    """Peak of the process that finished the run."""
    phases: dict[str, int]
    """Planned."""
    sums: Literal["device", "host"]
    """Where the sums of activations lay while they were taken."""
    solves: Literal["device", "host"] = "host"
    """Where units were chosen and consumers solved; before there was a choice, on the host."""


class MemoryReport(Frozen):
    """Bytes above the process's size before the run (libraries imported)."""

    budget_bytes: int
    planned_peak_bytes: int
    measured_peak_bytes: int
    phases: dict[str, int]
    """Planned."""
    measured_phases: dict[str, int] = Field(default_factory=dict[str, int])
    """Peaks of those of `phases` that were measured apart."""
    store: str
    micro_batch_windows: int
    cached: list[str] = Field(default_factory=list[str])
    """Sublayers whose consumer's inputs were kept in memory until it was solved."""
    cache_bytes: int = 0
    timeline: list[MemoryStretch] = Field(default_factory=list[MemoryStretch])
    """Empty in reports of the first version that had none."""
    device: DeviceMemoryReport | None = None
    """None: blocks ran in host memory."""
