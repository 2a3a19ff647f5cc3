"""What this package asks of a CUDA device's memory, answered without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

GIB = 2**30


class FakeGpu:
    """16 GiB of which 12 are free; 1 GiB is reserved by this process, half of it in use."""

    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.peak = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        def set_fraction(fraction: float, _: torch.device) -> None:
            self.fractions.append(fraction)

        replaced = {
            "mem_get_info": lambda _: (12 * GIB, 16 * GIB),
            "get_device_properties": lambda _: SimpleNamespace(total_memory=16 * GIB),
            "memory_allocated": lambda _: GIB // 2,
            "memory_reserved": lambda _: GIB,
            "max_memory_allocated": lambda _: self.peak,
            "reset_peak_memory_stats": lambda _: None,
            "empty_cache": lambda: None,
            "set_per_process_memory_fraction": set_fraction,
        }
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
