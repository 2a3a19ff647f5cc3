"""The table of docs/tracing.md: what the tracer finds in one block of every sort of decoders without a family file.

`STRUCTPRUNE_REWRITE=1 python -m pytest -m slow tests/conformance/test_tracing_decoders.py` writes the table anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from structprune.errors import UnsupportedError
from structprune.tracing.graph import Traced, state_of
from structprune.tracing.groups import attention_groups, mlp_groups
from structprune.tracing.replay import check_removal, replay
from structprune.tracing.sublayers import find_stream, find_sublayers, stages
from structprune.types import UnitGroup
from support.blocks import RecordedBlock, recorded_blocks
from support.decoders import TINY_DECODERS, tiny_decoder
from support.generated import check_table

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PAGE = Path(__file__).parents[2] / "docs" / "tracing.md"
START, END = "<!-- made by tests/conformance/test_tracing_decoders.py -->", "<!-- end -->"


def sorts(blocks: Iterable[RecordedBlock]) -> list[RecordedBlock]:
    """The first block of every sort: of those with tensors of the same names and shapes."""
    found: dict[object, RecordedBlock] = {}
    for block in blocks:
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.module.state_dict().items())
        found.setdefault(shapes, block)
    return list(found.values())


def checked(block: RecordedBlock) -> Traced:
    """The block's graph, which computes what the block does; every family that may go is as good as zeros."""
    traced = block.trace()
    state = state_of(traced.program)
    output = block.module(*block.example.args, **block.example.kwargs)
    expected = output[0] if isinstance(output, tuple) else output
    # Parts of some blocks compute in float32 whatever the type is.
    torch.testing.assert_close(replay(traced, state, block.example)[0], expected, rtol=1e-5, atol=1e-5)
    for family in traced.families:
        if family.is_exact:
            kept = [unit for unit in range(family.num_units) if unit % 4 != 1]
            assert check_removal(traced, state, block.example, {family: kept}).difference < 1e-6
    assert not traced.unknown
    return traced


class Notes:
    """Reasons, numbered as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def cell(self, groups: Callable[[], Iterable[UnitGroup]]) -> str:
        """Units of every group, equal groups together; or the number of the reason why there are none."""
        try:
            sizes = Counter((group.num_units, group.expert is not None) for group in groups())
        except UnsupportedError as error:
            text = str(error.got).partition(", whose inputs are ")[2] if "held by" in str(error.got) else error.what
            if text not in self.texts:
                self.texts.append(text)
            return f"no ({self.texts.index(text) + 1})"
        return (
            ", ".join(
                f"{count} experts of {units}" if is_expert else f"{units}"
                for (units, is_expert), count in sizes.items()
            )
            or "none"
        )


def row(model_type: str, block: RecordedBlock, notes: Notes) -> str:
    traced = checked(block)
    sublayers = find_sublayers(traced, find_stream(traced))
    order = ", then ".join(" and ".join(stage) for stage in stages(sublayers))
    channels = notes.cell(lambda: mlp_groups(traced))
    heads = [
        notes.cell(lambda units=units: attention_groups(traced, units))
        for units in ("kv-group", "query-head", "value-channel")
    ]
    return f"| {' | '.join([model_type, str(block.index), order, channels, *heads])} |"


def test_the_table_is_what_the_graphs_have() -> None:
    notes = Notes()
    rows = [row(name, block, notes) for name in TINY_DECODERS for block in sorts(recorded_blocks(tiny_decoder(name)))]
    made = [
        "| `model_type` | block | sublayers | MLP channels | KV groups | query heads | value channels |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        *(f"{number}. {text}" for number, text in enumerate(notes.texts, 1)),
    ]
    check_table(PAGE, START, END, made)
