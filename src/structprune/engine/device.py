"""Where the forward passes run and in which dtype."""

from __future__ import annotations

import time

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
    return torch.bfloat16 if _product_seconds(torch.bfloat16) * 1.5 < _product_seconds(torch.float32) else torch.float32


def _product_seconds(dtype: torch.dtype) -> float:
    """Best of three of one 256 x 512 x 512 product: about a millisecond even where bfloat16 is emulated."""
    a = torch.ones(256, 512, dtype=dtype)
    b = torch.ones(512, 512, dtype=dtype)
    times: list[float] = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return min(times[1:])
