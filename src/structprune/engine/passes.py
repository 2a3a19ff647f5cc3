"""The one loop over blocks: a pass from the first block to the last is a `BlockPass`, which `run_pass` carries out.

In front of the first block every stream (a store of hidden states) is embedded. Then block after block is visited: the
pass reads it, moves its streams over it and says what is to be written and recorded of it; the loop writes the shard
and the line of the journal, keeps a snapshot of the streams if it is time for one, gives free memory back and tells the
observer. Behind the last block what the pass wants to keep of its streams is recorded, and the snapshot goes.

What an interrupted run does
----------------------------
A process that goes on with a run calls `run_pass` with the same pass, and finds in the pass's journal

- the line of each block that was recorded: its shard is whole, and what it says counts;
- the line of the end, if there is one: with the lines of all blocks nothing is left to do, and nothing is read;
- the newest snapshot. It counts if every block in front of its position is recorded (the pass's opening step too, where
  it has one): then the streams are filled from it, and the loop begins at its position. Without one the streams are
  embedded again, and the loop begins at the first block.

From there on a block that is recorded is replayed: the pass moves the streams over it as it did the first time, product
for product, and nothing of it is solved or written again. A pass that cannot do that (rotated weights do not show where
the stream was cut) has no `replay`: there a recorded block is visited again, and gives the same bytes. A line or a file
that is damaged costs its own block, a damaged snapshot costs replays; both are named to the observer. Of several ranks
all ask the journal together, so they find the same; the first one writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from structprune.calibration.snapshots import Snapshot, Snapshots
from structprune.calibration.store import HiddenStore
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.embed import embed, open_store
from structprune.engine.streaming.final_states import FINAL_STEP, load_final_states, save_final_states
from structprune.engine.streaming.propagate import Propagator
from structprune.memory import format_bytes, release_free_memory
from structprune.runs.journal import Journal
from structprune.types import BlockLayout

Line = Mapping[str, Any]
"""The journal's record of one block, as it is read from JSON: lines are checked by their sum, not by their type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """Values that one block hands to the next beside the streams; a snapshot keeps them."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values that JSON can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassState:
    """A pass in front of a block: its streams, open and filled, and what the block before has handed on."""

    propagator: Propagator
    stores: Mapping[str, HiddenStore]
    carried: Carried = field(default_factory=Carried)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visited:
    """Everything that the visit of one block leaves. The streams have moved on."""

    tensors: Mapping[str, Tensor] | None = None
    """The block of the output, by its names within the block; None: there is none."""
    files: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Name of a file in the journal's folder -> its tensors."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values of the block's line."""
    carried: Carried = field(default_factory=Carried)


def _same_index(block: BlockLayout) -> int | None:
    return block.index


def _block_name(block: BlockLayout, _: Line) -> str:
    return f"block {block.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPass:
    """One pass over the blocks of the context's model, as data. All ranks call each function."""

    name: str
    """Name of the progress that is shown."""
    journal: Journal
    """Steps of the pass; its files lie in the journal's folder."""
    stores: Mapping[str, int]
    """Stream -> how many windows of the run it has. Snapshots keep them under these names."""
    visit: Callable[[BlockLayout, PassState], Visited]
    """Compute one block, and move the streams over it."""
    replay: Callable[[BlockLayout, Line, PassState], None] | None = None
    """Move the streams over a block that is recorded, as its visit did; None: it is visited again."""
    begin: Callable[[PassState], Visited] | None = None
    """Work in front of the first block; `tensors` are the output's embeddings, under the model's names."""
    finish: Callable[[PassState], Mapping[str, Tensor]] | None = None
    """Tensors to keep of the streams behind the last block."""
    describe: Callable[[BlockLayout, Line], str] = _block_name
    """Text of the progress behind a block."""
    blocks: Sequence[BlockLayout] | None = None
    """The first blocks of the model, where the pass does not go over all of them."""
    embedded: Collection[str] | None = None
    """Streams that begin with the embedded windows, where the others are filled by the visits."""
    writer: ModelWriter | None = None
    """Where the blocks of the output are written."""
    output_index: Callable[[BlockLayout], int | None] = _same_index
    """Index of the block in the output; None: it is not there."""
    given: Sequence[Any] | None = None
    """Values per block that its step depends on, beside what the run's first step names."""
    records_blocks: bool = True
    """Whether each block is a step of the journal; without, only snapshots and the end are."""
    opening: str | None = None
    """Step that records what `begin` has written."""
    last: str = FINAL_STEP
    """Step that records what `finish` gives."""
    snapshots: str = "state"
    """Folder of the snapshots, in the journal's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What a pass leaves, whichever process did how much of it."""

    lines: Sequence[Line]
    """The journal's, of every block; empty if blocks are not recorded."""
    final: Mapping[str, Tensor]
    """The tensors of `finish`."""
    carried: Carried
    """What the last block handed on; nothing if no block was left to visit."""


def run_pass(context: RunContext, block_pass: BlockPass) -> PassResult:
    """Run a pass, or what an interrupted process left of it (see above).

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors.
    """
    blocks = context.stock.layout.blocks if block_pass.blocks is None else block_pass.blocks
    journal, ranks = block_pass.journal, context.ranks
    lines, final = _find_lines(block_pass, blocks), _find_final(block_pass)
    if _is_finished(block_pass, lines, final):
        _adopt(block_pass, blocks, lines, len(blocks))
        return _result(lines, final or {}, Carried())
    snapshots = Snapshots(journal.folder / block_pass.snapshots, context.observer.note, ranks)
    snapshot = snapshots.behind([line is not None or not block_pass.records_blocks for line in lines])
    first = 0 if snapshot is None else snapshot.position
    _adopt(block_pass, blocks, lines, first)
    with contextlib.ExitStack() as stack:
        state = _open(context, block_pass, stack)
        context.observer.start(block_pass.name, len(blocks) - first)
        state = _begin(context, block_pass, state) if snapshot is None else _restored(context, snapshot, state)
        del snapshot
        for position, block in enumerate(blocks[first:], start=first):
            line = lines[position]
            if line is not None and block_pass.replay is not None:
                block_pass.replay(block, line, state)
            else:
                visited = block_pass.visit(block, state)
                peak_bytes = ranks.all_reduce_max(context.meter.peak_so_far())
                line = ranks.broadcast(partial(_record, block_pass, block, position, visited, peak_bytes))
                lines[position] = line if block_pass.records_blocks else None
                state = replace(state, carried=visited.carried)
                del visited
            _keep(snapshots, position + 1, state)
            release_free_memory()
            memory = format_bytes(context.meter.peak_so_far())
            context.observer.advance(f"{block_pass.describe(block, line)}  memory {memory}")
        if block_pass.finish is not None:
            final = block_pass.finish(state)
            save_final_states(journal, final, ranks, block_pass.last)
        carried = state.carried
    snapshots.discard()
    return _result(lines, final or {}, carried)


def _result(lines: Sequence[Line | None], final: Mapping[str, Tensor], carried: Carried) -> PassResult:
    return PassResult(lines=[line for line in lines if line is not None], final=final, carried=carried)


def _find_lines(block_pass: BlockPass, blocks: Sequence[BlockLayout]) -> list[Line | None]:
    """Find the line of each block; none counts without the opening step."""
    if not block_pass.records_blocks:
        return [None] * len(blocks)
    find = block_pass.journal.find
    lines = [find(_step(block), _given(block_pass, position)) for position, block in enumerate(blocks)]
    opened = block_pass.opening is None or find(block_pass.opening) is not None
    return lines if opened else [None] * len(blocks)


def _find_final(block_pass: BlockPass) -> Mapping[str, Tensor] | None:
    return None if block_pass.finish is None else load_final_states(block_pass.journal, block_pass.last)


def _is_finished(block_pass: BlockPass, lines: Sequence[Line | None], final: Mapping[str, Tensor] | None) -> bool:
    """Whether nothing is left to do: a pass that records neither blocks nor an end is done again."""
    blocks_done = block_pass.records_blocks and None not in lines
    if block_pass.finish is None:
        return blocks_done
    return final is not None and (blocks_done or not block_pass.records_blocks)


def _adopt(block_pass: BlockPass, blocks: Sequence[BlockLayout], lines: Sequence[Line | None], first: int) -> None:
    """Count what is written and will not be written again: `first` is the block that the loop begins at."""
    writer = block_pass.writer
    if writer is None:
        return
    if block_pass.opening is not None and first > 0:
        writer.adopt_embeddings()
    for position, (block, line) in enumerate(zip(blocks, lines, strict=True)):
        index = block_pass.output_index(block)
        if line is not None and index is not None and (position < first or block_pass.replay is not None):
            writer.adopt_block(index)


def _open(context: RunContext, block_pass: BlockPass, stack: contextlib.ExitStack) -> PassState:
    """Open the streams, which `stack` closes, and embed the windows."""
    stores: dict[str, HiddenStore] = {}
    for name, num_windows in block_pass.stores.items():
        stores[name] = open_store(context, block_pass.journal.folder / f"{name}.bin", num_windows)
        stack.callback(stores[name].close)
    embedded = block_pass.stores if block_pass.embedded is None else block_pass.embedded
    return PassState(propagator=embed(context, {stores[n]: block_pass.stores[n] for n in embedded}), stores=stores)


def _begin(context: RunContext, block_pass: BlockPass, state: PassState) -> PassState:
    """Run the work in front of the first block."""
    if block_pass.begin is None:
        return state
    opened = block_pass.begin(state)
    if block_pass.opening is not None:
        context.ranks.broadcast(partial(_record_opening, block_pass, block_pass.opening, opened))
    state = replace(state, carried=opened.carried)
    del opened
    release_free_memory()
    return state


def _record_opening(block_pass: BlockPass, step: str, opened: Visited) -> None:
    files: list[Path] = []
    if opened.tensors is not None:
        assert block_pass.writer is not None
        files.append(block_pass.writer.write_embeddings(opened.tensors))
    block_pass.journal.record(step, files, **opened.values)


def _restored(context: RunContext, snapshot: Snapshot, state: PassState) -> PassState:
    """Fill the streams from a snapshot."""
    snapshot.restore(state.stores)
    tensors = {name: tensor.to(context.device) for name, tensor in snapshot.tensors.items()}
    return replace(state, carried=Carried(tensors=tensors, values=snapshot.values))


def _record(block_pass: BlockPass, block: BlockLayout, position: int, visited: Visited, peak_bytes: int) -> Line:
    """Write what the visit left and record it, on the first rank. Returns the line."""
    files: list[Path] = []
    if visited.tensors is not None:
        index = block_pass.output_index(block)
        assert block_pass.writer is not None
        assert index is not None
        files.append(block_pass.writer.write_block(index, visited.tensors))
    for name, tensors in visited.files.items():
        files.append(block_pass.journal.folder / name)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, files[-1])
    if not block_pass.records_blocks:
        return visited.values
    given = _given(block_pass, position)
    return block_pass.journal.record(_step(block), files, given, **visited.values, peak_bytes=peak_bytes)


def _keep(snapshots: Snapshots, position: int, state: PassState) -> None:
    tensors = {name: tensor.cpu() for name, tensor in state.carried.tensors.items()}
    snapshots.keep(position, state.stores, tensors, state.carried.values)


def _step(block: BlockLayout) -> str:
    return f"block {block.index}"


def _given(block_pass: BlockPass, position: int) -> Any:
    return None if block_pass.given is None else block_pass.given[position]
