"""The cost model of several ranks: by hand for one small shape, and the figures that docs/distributed.md shows."""

from __future__ import annotations

from pathlib import Path

from structprune.engine.planning.exchange import gram_bytes, pruning_exchange, sensitivity_exchange
from structprune.types import AxisSlice, UnitGroup, UnitKind

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
GIB = 2**30


def group(kind: UnitKind, num_units: int, width: int) -> UnitGroup:
    consumer = AxisSlice(tensor="consumer.weight", axis=1, width=width)
    return UnitGroup(
        kind=kind, num_units=num_units, width=width, producers=(), consumer=consumer, consumer_module="consumer"
    )


def test_strips_of_a_gram() -> None:
    # Strips of two rows: 8, 6, 4 and 2 columns.
    assert gram_bytes(8) == (2 * 8 + 2 * 6 + 2 * 4 + 2 * 2) * 4 + 8 * 8 + 8
    # Of 3, 3, 3 and 1.
    assert gram_bytes(10) == (3 * 10 + 3 * 7 + 3 * 4 + 1) * 4 + 10 * 8 + 8
    # As many strips as columns.
    assert gram_bytes(3) == (3 + 2 + 1) * 4 + 3 * 8 + 8


def test_one_block_by_hand() -> None:
    mlp = group("mlp", 8, 1)
    local = pruning_exchange([mlp], {"mlp": 6}, 4, 2, parts=1, follows_dense=False)
    assert (local.sums, local.tensors) == (gram_bytes(8) + 16, 6 * 8 + 6 * 4 * 2)
    dense = pruning_exchange([mlp], {"mlp": 6}, 4, 2, parts=2, follows_dense=True)
    assert (dense.sums, dense.tensors) == (2 * (gram_bytes(8) + 24 + 8 * 4 * 4), local.tensors)
    sensitivity = sensitivity_exchange([mlp, group("attention", 2, 4)], 4)
    assert sensitivity.sums == 2 * gram_bytes(8) + 2 * gram_bytes(4)
    assert sensitivity.tensors == 2 * 4 * 4 * 4 + (8 + 2) * 8


def test_figures_of_the_page() -> None:
    """Llama 70B: hidden size 8192, 28,672 channels, 8 KV groups of 8 heads of 128, bfloat16, 30% removed."""
    groups = [group("attention", 8, 1024), group("mlp", 28672, 1)]
    kept = {"attention": 6, "mlp": 20096}
    sensitivity = sensitivity_exchange(groups, 8192)
    structprune = pruning_exchange(groups, kept, 8192, 2, parts=2, follows_dense=True)
    fasp = pruning_exchange(groups, kept, 8192, 2, parts=1, follows_dense=False)
    rows = (("sensitivity pass", sensitivity), ("`structprune`", structprune), ("`fasp`", fasp))
    text = PAGE.read_text(encoding="utf-8")
    for name, exchange in rows:
        assert f"| {name} | {exchange.sums / GIB:.2f} GiB | {exchange.tensors / GIB:.2f} GiB |" in text
