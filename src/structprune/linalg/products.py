"""How matrix products are computed on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch


@contextlib.contextmanager
def exact_bfloat16_products() -> Generator[None]:
    """Let the CPU multiply float32 matrices as bfloat16 inside the context and add in float32, where it can.

    This is for matrices whose values are bfloat16 numbers, where it is exact but for the order of the sums. Twice as
    fast on CPUs with matrix units, and no change on others.
    """
    products: Any = getattr(torch.backends.mkldnn, "matmul", None)
    # Older versions of torch have one setting for the whole process instead, which is not ours to change.
    before = getattr(products, "fp32_precision", None)
    if before is None:
        yield
        return
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
