"""Candidates that run together have the hidden states that each has alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprune.engine.run.context import RunContext
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.candidates import PASSED_BY, Candidate, CandidateStreams, Round
from structprune.engine.streaming.propagate import Propagator
from structprune.types import BlockLayout
from support.contexts import NUM_WINDOWS, context_for
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CANDIDATES: Sequence[Candidate] = [
    (0, 0, 0, 0),
    (0, 0, 1, 0),
    (0, 2, 1, PASSED_BY),
    (1, 0, 0, 0),
    (0, 2, 1, 2),
    (PASSED_BY, PASSED_BY, 0, PASSED_BY),
    (0, 0, 1, 0),
]


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    found = context_for(save_tiny("llama", tmp_path / "model", num_blocks=4))
    found.run.staging.mkdir()
    return found


def build(context: RunContext, block: BlockLayout, variant: int) -> nn.Module:
    """The block with an MLP that counts less, the higher the number."""
    module = load_block(context, block)[1]
    with torch.no_grad():
        module.get_parameter("mlp.down_proj.weight").mul_(1 - variant / 4)
    return module


def run(context: RunContext, candidates: Sequence[Candidate], num_stores: int) -> dict[Candidate, Tensor]:
    with contextlib.closing(
        CandidateStreams(context, context.observer, context.run.staging, num_stores=num_stores, num_windows=NUM_WINDOWS)
    ) as streams:
        found = streams.run(
            Round(candidates=candidates, number=0, values={}, description="candidates"),
            lambda block, variant: build(context, block, variant),
        )
        streams.discard()
        return {each: store.read(0, NUM_WINDOWS).clone() for each, store in found.items()}


def test_together_as_alone(context: RunContext) -> None:
    different = len(set(CANDIDATES))
    together = run(context, CANDIDATES, different)
    assert set(together) == set(CANDIDATES)
    for candidate in CANDIDATES:
        alone = run(context, [candidate], 1)[candidate]
        assert torch.equal(together[candidate], alone)
    assert len({tuple(states.flatten().tolist()) for states in together.values()}) == different


def test_what_is_alike_is_run_once(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    applied: Any = Propagator.run

    def counted(self: Propagator, module: nn.Module, index: int, store: Any) -> None:
        runs.append(index)
        applied(self, module, index, store)

    monkeypatch.setattr(Propagator, "run", counted)
    run(context, CANDIDATES, len(set(CANDIDATES)))
    # Beginnings that differ, less those whose last block is passed by.
    assert [runs.count(index) for index in range(4)] == [2, 3, 5, 4]


def test_an_interrupted_round_goes_on(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structprune.calibration.snapshots.SHARE", 1e9)
    expected = run(context, CANDIDATES, len(set(CANDIDATES)))
    built: list[int] = []

    def interrupted(at: int) -> Any:
        def variant(block: BlockLayout, number: int) -> nn.Module:
            built.append(block.index)
            if block.index == at:
                raise KeyboardInterrupt
            return build(context, block, number)

        return variant

    this = Round(candidates=CANDIDATES, number=0, values={"search": 7}, description="candidates")
    for at in (2, -1):
        with contextlib.closing(
            CandidateStreams(
                context, context.observer, context.run.staging, num_stores=len(set(CANDIDATES)), num_windows=NUM_WINDOWS
            )
        ) as streams:
            assert streams.found is None if at == 2 else streams.found.values["search"] == 7
            with contextlib.suppress(KeyboardInterrupt):
                found = streams.run(this, interrupted(at))
                assert at == -1
                for candidate, store in found.items():
                    assert torch.equal(store.read(0, NUM_WINDOWS), expected[candidate])
    assert built == [0, 0, 1, 1, 2, 2, 2, 3, 3]
