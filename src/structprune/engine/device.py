"""Where the forward passes run and in which dtype."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from structprune.errors import InputError, first_line
from structprune.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises InputError for a device that is not there."""
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


def resolve_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs that have it and on CPUs where its matrix product is measured to be faster."""
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = _product_seconds((torch.float32, torch.bfloat16))
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.5 < seconds[torch.float32] else torch.float32


def _product_seconds(dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, float]:
    """Best of twelve of a 256 x 512 x 512 product each, in turn: a busy machine slows all alike, and not always.

    A millisecond each, some where bfloat16 is emulated.
    """
    best = dict.fromkeys(dtypes, float("inf"))
    factors = {dtype: (torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)) for dtype in dtypes}
    for attempt in range(13):
        for dtype, (a, b) in factors.items():
            start = time.perf_counter()
            torch.mm(a, b)
            if attempt > 0:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best


def machine() -> str:
    """The processor and how much of it, as far as figures depend on it."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {psutil.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"
