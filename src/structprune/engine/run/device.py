"""Where the forward passes run and in which dtype."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from structprune.engine.planning.plan import DevicePlan
from structprune.errors import InputError, MemoryBudgetError, first_line
from structprune.memory import available_bytes, format_bytes
from structprune.ranks import ranks_here
from structprune.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TIMING_S = 0.2


def resolve_device(name: str) -> torch.device:
    """Resolve a device's name: `auto` is CUDA where there is one, else the CPU. Raises InputError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RuntimeError("there is no such device")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError("--device is not usable", got=name, wanted="auto, cpu or cuda", do=first_line(error)) from None
    return device


def host_budget(asked: int | None) -> int:
    """Choose how much host memory a run may add: what is asked for, or its rank's part of 80% of what is free."""
    return asked if asked is not None else available_bytes() * 8 // 10 // ranks_here()


def device_budget(device: torch.device, asked: int | None) -> int | None:
    """Return the bytes that a run may add on the device, by default 90% of the free ones; None without own memory.

    Raises InputError if a budget is asked for a device without.
    """
    if device.type == "cpu":
        if asked is not None:
            raise InputError(
                "--device-memory is the budget of a CUDA device",
                got=f"{format_bytes(asked)} with --device {device}",
                wanted="--device cuda",
                do="leave it out; --memory is the budget of the host",
            )
        return None
    return asked if asked is not None else torch.cuda.mem_get_info(device)[0] * 9 // 10


@dataclass(slots=True, kw_only=True)
class DeviceMeter:
    """While entered the process cannot take more on the device than the plan's budget beside what it had.

    Without a plan there is no device, and nothing to do.
    """

    device: torch.device | None = None
    plan: DevicePlan | None = None
    _before: int = 0

    def __enter__(self) -> DeviceMeter:
        if self.plan is not None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            allowed = torch.cuda.memory_reserved(self.device) + self.plan.budget_bytes
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), self.device)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.plan is None:
            return
        torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        if isinstance(error, torch.OutOfMemoryError):
            raise MemoryBudgetError(
                "the device's memory budget was reached, though less was planned",
                where=str(self.device),
                got=format_bytes(self.plan.budget_bytes),
                wanted=f"{format_bytes(self.plan.peak_bytes)} by the plan",
                do="start again with a larger --device-memory or a smaller --seq-len, in another -o",
            ) from error

    def peak_bytes(self) -> int:
        """Return the highest point since entry, in bytes beside what was there before."""
        return 0 if self.plan is None else torch.cuda.max_memory_allocated(self.device) - self._before


def resolve_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Resolve the dtype: `auto` is bfloat16 on GPUs that have it and on CPUs that are measured to be faster with it."""
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = _product_seconds((torch.float32, torch.bfloat16))
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.5 < seconds[torch.float32] else torch.float32


def _product_seconds(dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, float]:
    """Time a 256 x 512 x 512 product in each dtype, the best of up to twelve taken in turn.

    A busy machine slows all alike, and not always. Each product takes a millisecond; where bfloat16 is emulated it can
    be half a second, and then the first two are enough to tell.
    """
    best = dict.fromkeys(dtypes, float("inf"))
    factors = {dtype: (torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)) for dtype in dtypes}
    started = time.perf_counter()
    for attempt in range(13):
        if attempt > 1 and time.perf_counter() - started > _TIMING_S:
            break
        for dtype, (a, b) in factors.items():
            start = time.perf_counter()
            torch.mm(a, b)
            if attempt > 0:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best


def machine() -> str:
    """Describe the processor and how much of it there is, as far as figures depend on it."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {psutil.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"
