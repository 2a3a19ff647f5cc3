"""Many variants of the model, run together: each block is read once, and candidates share what they begin with alike.

A candidate names a variant of every block. In front of the first block all have the same hidden states, and one store
holds them. Where the variants of a block differ, the store is copied, once for each further variant; so there are never
more stores than candidates, and a candidate's states are those that it would have alone, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from structprune.calibration.snapshots import Snapshot, Snapshots
from structprune.calibration.store import HiddenStore
from structprune.engine.streaming.embed import embed, open_store
from structprune.engine.streaming.model import StreamedModel
from structprune.engine.streaming.propagate import Propagator
from structprune.memory import release_free_memory
from structprune.observer import Observer
from structprune.types import BlockLayout

Candidate = tuple[int, ...]
"""The number of the variant that takes part of each block, or `PASSED_BY`."""
PASSED_BY = -1
"""The block is not there: its input is its output."""
BuildVariant = Callable[[BlockLayout, int], nn.Module]
"""Builds a variant of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Branch:
    """Candidates that are alike so far, by their numbers, and the store of their hidden states."""

    members: tuple[int, ...]
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Candidates that run together, and where an interrupted process finds what it had done of them."""

    candidates: Sequence[Candidate]
    number: int
    """The place among the rounds of the search, from 0."""
    values: Mapping[str, Any]
    """What the search has to know of the rounds before, as JSON holds it; kept with the hidden states."""
    description: str


class CandidateStreams:
    """Stores for the candidates of all rounds of a search, and the newest hidden states of the current one.

    Files of both lie in `scratch`; those of the newest states stay there for a process that goes on.
    """

    def __init__(
        self, model: StreamedModel, observer: Observer, scratch: Path, *, num_stores: int, num_windows: int
    ) -> None:
        self._model, self._observer, self._num_windows = model, observer, num_windows
        self._snapshots = Snapshots(scratch / "choice", observer.note)
        self._stores: list[HiddenStore] = []
        with contextlib.ExitStack() as stack:
            for slot in range(num_stores):
                self._stores.append(open_store(model, scratch / f"candidate-{slot}.bin", num_windows))
                stack.callback(self._stores[-1].close)
            self._closing = stack.pop_all()
        self.found: Snapshot | None = self._snapshots.load()
        """What an interrupted process left; its `values` are those of its round."""

    def close(self) -> None:
        """Close the stores; what was kept of the hidden states stays for a process that goes on."""
        self._closing.close()

    def discard(self) -> None:
        """Remove what was kept: the search has come to its end."""
        self._snapshots.discard()

    def run(self, this: Round, build: BuildVariant) -> dict[Candidate, HiddenStore]:
        """Move each candidate's stream over all blocks; the states behind the last one, until the next round.

        The round that an interrupted process was in begins behind the last block that is kept.
        """
        blocks = self._model.stock.layout.blocks
        candidates = list(dict.fromkeys(this.candidates))
        assert len(candidates) <= len(self._stores)
        propagator = embed(self._model, {self._stores[0]: self._num_windows})
        branches = [_Branch(members=tuple(range(len(candidates))), slot=0)]
        left = [block for block in blocks if any(each[block.index] != PASSED_BY for each in candidates)]
        if self.found is not None:
            branches = [_Branch(members=tuple(m), slot=slot) for m, slot in self.found.values["branches"]]
            self.found.restore({str(branch.slot): self._stores[branch.slot] for branch in branches})
            left = [block for block in left if block.index > self.found.values["block"]]
            self.found = None
        self._observer.start(this.description, len(left))
        for block in left:
            branches = self._branched(branches, [candidate[block.index] for candidate in candidates], propagator)
            self._move(block, branches, candidates, build, propagator)
            self._snapshots.keep(
                this.number * len(blocks) + block.index,
                {str(branch.slot): self._stores[branch.slot] for branch in branches},
                values={
                    **this.values,
                    "branches": [[list(branch.members), branch.slot] for branch in branches],
                    "block": block.index,
                },
            )
            release_free_memory()
            self._observer.advance(f"block {block.index}")
        return {candidates[member]: self._stores[branch.slot] for branch in branches for member in branch.members}

    def _branched(self, branches: Sequence[_Branch], variants: Sequence[int], propagator: Propagator) -> list[_Branch]:
        """Split the branches by the variants of the next block, and copy the states of those that go apart."""
        free = [slot for slot in range(len(self._stores)) if slot not in {branch.slot for branch in branches}]
        result: list[_Branch] = []
        for branch in branches:
            for variant in dict.fromkeys(variants[member] for member in branch.members):
                members = tuple(member for member in branch.members if variants[member] == variant)
                # The first ones keep the store.
                slot = branch.slot if branch.members[0] in members else free.pop(0)
                if slot != branch.slot:
                    for start, stop in propagator.batches(0, self._num_windows):
                        self._stores[slot].write(start, self._stores[branch.slot].read(start, stop))
                result.append(_Branch(members=members, slot=slot))
        return result

    def _move(
        self,
        block: BlockLayout,
        branches: Sequence[_Branch],
        candidates: Sequence[Candidate],
        build: BuildVariant,
        propagator: Propagator,
    ) -> None:
        """Run each variant of the block over the branches that it takes part in."""
        by_variant: dict[int, list[HiddenStore]] = {}
        for branch in branches:
            variant = candidates[branch.members[0]][block.index]
            by_variant.setdefault(variant, []).append(self._stores[branch.slot])
        for variant, stores in by_variant.items():
            if variant == PASSED_BY:
                continue
            module = build(block, variant)
            for store in stores:
                propagator.run(module, block.index, store)
            del module
