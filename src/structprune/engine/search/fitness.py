"""How far candidates are from the dense model: the KL divergence of their predictions, window by window.

Shape suffixes: N windows, S positions, D hidden size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.calibration.store import FileStore, HiddenStore
from structprune.engine.planning.searching import stores_at_once
from structprune.engine.run.context import RunContext
from structprune.engine.search.variants import Variants
from structprune.engine.streaming.candidates import CandidateStreams, Round
from structprune.engine.streaming.divergence import divergences
from structprune.engine.streaming.losses import last_states
from structprune.errors import NumericalError
from structprune.memory import release_free_memory
from structprune.phases import Phase
from structprune.runs.journal import Journal
from structprune.types import BlockLayout

_DENSE_STEP = "last states of the dense model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Candidates that are measured on the same windows."""

    widths: Sequence[Mapping[str, Sequence[int]]]
    """Kind -> units that each block keeps, of each candidate."""
    draws: Sequence[int]
    """Which units of these widths stay: 0 for the best ones, other numbers for other draws."""
    windows: tuple[int, ...]
    """Numbers of the run's windows, ascending."""
    description: str


class Fitness:
    """Measures candidates, each measurement once: a process that goes on with a search finds what was measured.

    `folder` has the dense model's last hidden states of the windows `numbers`, and those of candidates meanwhile.
    """

    def __init__(self, context: RunContext, folder: Path, journal: Journal, numbers: Sequence[int]) -> None:
        self._context, self._folder, self._journal = context, folder, journal
        self._variants = Variants(context, folder)
        self._rows = {number: row for row, number in enumerate(numbers)}
        self._count = 0
        self._dense = self._dense_states(tuple(numbers))

    def close(self) -> None:
        """Close the dense model's states; what was measured stays."""
        self._dense.close()

    def measure(self, asked: Measurement) -> list[tuple[float, ...]]:
        """Measure the divergence of each candidate on each window, in nats per token.

        Those that find no room at once run one group after the other. Raises NumericalError for hidden states or
        divergences that are not finite.
        """
        room = (2 if self._context.follows_dense else 1) * len(self._context.windows.ids_NS)
        at_once = stores_at_once(room, len(asked.windows), len(asked.widths))
        losses: list[tuple[float, ...]] = []
        for first in range(0, len(asked.widths), at_once):
            part = slice(first, first + at_once)
            losses += self._measured(asked.widths[part], asked.draws[part], asked)
        return losses

    def _measured(
        self, widths: Sequence[Mapping[str, Sequence[int]]], draws: Sequence[int], asked: Measurement
    ) -> list[tuple[float, ...]]:
        """Measure candidates that run together, or read what was measured of them."""
        number, self._count = self._count, self._count + 1
        step = f"measurement {number}"
        given = {
            "windows": list(asked.windows),
            "candidates": [{kind: list(kept) for kind, kept in one.items()} for one in widths],
            "draws": list(draws),
        }
        line = self._journal.find(step, given)
        if line is None:
            losses = self._streamed(number, widths, draws, asked)
            line = self._journal.record(step, given=given, losses=losses, peak_bytes=self._context.meter.peak_so_far())
        return [tuple(each) for each in line["losses"]]

    def _streamed(
        self,
        number: int,
        widths: Sequence[Mapping[str, Sequence[int]]],
        draws: Sequence[int],
        asked: Measurement,
    ) -> list[list[float]]:
        """Run the candidates over their windows, and compare where they end with where the dense model does."""
        context, blocks = self._context, self._context.stock.layout.blocks
        # Variants of a block are numbered in the order in which they are met.
        tables: list[dict[tuple[tuple[tuple[str, int], ...], int], int]] = [{} for _ in blocks]
        candidates: list[tuple[int, ...]] = []
        for one, draw in zip(widths, draws, strict=True):
            candidate: list[int] = []
            for block, table in zip(blocks, tables, strict=True):
                kept = tuple((kind, one[kind][block.index]) for kind in context.kinds if block.has(kind))
                cut = any(0 < count < block.group(kind).num_units for kind, count in kept)
                candidate.append(table.setdefault((kept, draw if cut else 0), len(table)))
            candidates.append(tuple(candidate))

        def build(block: BlockLayout, variant: int) -> nn.Module:
            kept, draw = next(key for key, place in tables[block.index].items() if place == variant)
            return self._variants.build(block, dict(kept), draw)

        with contextlib.closing(
            CandidateStreams(
                context.on_windows(asked.windows),
                context.observer,
                self._folder,
                num_stores=len(set(candidates)),
                num_windows=len(asked.windows),
            )
        ) as streams:
            if streams.found is not None and streams.found.values.get("measurement") != number:
                # Of a measurement that was finished.
                streams.discard()
                streams.found = None
            found = streams.run(
                Round(
                    candidates=candidates,
                    number=number,
                    values={"measurement": number},
                    description=asked.description,
                ),
                build,
            )
            self._variants.close()
            release_free_memory()
            with context.meter.phase(Phase.SEARCH_CANDIDATES):
                head = context.stock.load_head(context.device, context.dtype)
                losses = self._divergences(head, [found[each] for each in candidates], asked.windows)
                del head
            streams.discard()
        release_free_memory()
        return losses

    def _divergences(self, head: nn.Module, stores: Sequence[HiddenStore], windows: Sequence[int]) -> list[list[float]]:
        """Compare last hidden states with the dense model's of the same windows."""
        device, losses = self._context.device, list[list[float]]()
        for place, number in enumerate(windows):
            row = self._rows[number]
            wanted_SD = self._dense.read(row, row + 1)[0].to(device)
            students = [partial(_read, store, place, device) for store in stores]
            sums = divergences(head, students, wanted_SD)
            losses.append([total / len(wanted_SD) for total in sums])
            if not all(math.isfinite(total) for total in sums):
                raise NumericalError(
                    "the divergence from the dense model is NaN or infinite",
                    where="a candidate of the search",
                    do="use --dtype float32",
                )
        return [list(each) for each in zip(*losses, strict=True)]

    @torch.no_grad()
    def _dense_states(self, numbers: tuple[int, ...]) -> FileStore:
        """Run the dense model over the windows, or open what an interrupted process left of that."""
        context, path = self._context, self._folder / "dense.bin"
        shape = (len(numbers), context.windows.ids_NS.shape[1], context.stock.layout.hidden_size)
        if self._journal.find(_DENSE_STEP) is None:
            context.observer.start("search: dense model", len(context.stock.layout.blocks))
            states = last_states(
                context.on_windows(numbers), self._folder / "states.bin", advance=context.observer.advance
            )
            file = FileStore(path, shape, context.dtype, lasting=True)
            with contextlib.closing(states), contextlib.closing(file):
                for row in range(len(numbers)):
                    file.write(row, states.read(row, row + 1))
            self._journal.record(_DENSE_STEP, [path])
            release_free_memory()
        return FileStore(path, shape, context.dtype, lasting=True)


def _read(store: HiddenStore, window: int, device: torch.device) -> Tensor:
    """Read one window's hidden states, (S, D)."""
    return store.read(window, window + 1)[0].to(device)
