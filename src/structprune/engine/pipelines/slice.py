"""The slicing pipeline: one block in memory at a time, the residual stream cut at every position.

The stream stays in the model's own coordinates while it is measured: a cut replaces x by B B^T x, B the (D, K) basis of
the position, and the stock sublayer then runs on it unchanged. That is what the written sublayer of width K computes,
since the norm's sum of squares is the same and everything it reads is W B B^T x. Only the written weights are rotated.

Shape suffixes: B windows, S positions, N windows, D hidden size, K kept dimensions.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structprune.architectures.family import Stream
from structprune.calibration.snapshots import Snapshots
from structprune.calibration.store import HiddenStore
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.pipelines.slice_settings import kept_width
from structprune.engine.pipelines.slice_weights import rotated_block, rotated_embeddings, rotated_head
from structprune.engine.run.context import RunContext
from structprune.engine.run.finalize import Outcome, commit, final_metrics, size_report
from structprune.engine.streaming.embed import embed, open_store
from structprune.engine.streaming.final_states import load_final_states, save_final_states
from structprune.engine.streaming.propagate import Propagator
from structprune.exporters.sliced import sliced_config, write_sliced_modeling_file
from structprune.linalg.rotation import dropped_share, principal_basis
from structprune.memory import format_bytes, release_free_memory
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One position of the stream."""

    basis_DK: Tensor
    """Orthonormal columns, float64, on the device."""
    dropped: float
    """Share of the energy of the measured stream that lies outside the basis."""


def execute_slice(context: RunContext) -> PruneReport:
    """Slice block after block into the run's staging directory and turn it into the output.

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors.
    """
    width = kept_width(context.stock.layout, _stream(context), context.recipe)
    return slice_to(context, width)


def slice_to(context: RunContext, width: int) -> PruneReport:
    """As `execute_slice`, to a stream of `width` dimensions; with all of them it is only rotated."""
    stock, layout = context.stock, context.stock.layout
    shortcuts = context.recipe.structure == "per-layer"
    # Before the long pass: what cannot be written is refused here.
    config = sliced_config(context.reader.config, stock.config, stock.family, width, shortcuts=shortcuts)
    common_DK = None if shortcuts else _common_basis(context, width)
    writer = ModelWriter(context.run.shards, len(layout.blocks), layout.blocks_module, context.stored_name)
    result = _slice_blocks(context, writer, width, common_DK)
    release_free_memory()
    metrics = final_metrics(context, result.outcome)
    release_free_memory()
    writer.write_rest(rotated_head(context, result.last_DK))
    if shortcuts:
        write_sliced_modeling_file(context.run.checkpoint, stock.family)
    removed = layout.block_parameters - result.num_block_parameters
    files = writer.weight_files(context.recipe.max_shard_size)
    size = size_report(context, files, removed_in_blocks=removed, scope_parameters=layout.block_parameters)
    return commit(context, files, config, result.outcome, size, metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """What the pass over the blocks left, beside the shards."""

    outcome: Outcome
    """Both hidden states in the model's own coordinates."""
    num_block_parameters: int
    last_DK: Tensor
    """The basis behind the last block."""


def _slice_blocks(
    context: RunContext,
    writer: ModelWriter,
    width: int,
    common_DK: Tensor | None,
) -> _Pass:
    """The loop itself. A common basis is known beforehand: then only the reported windows go through the cut model.

    What a process before this one did is taken over up to the newest snapshot, and the blocks behind that are cut
    again: rotated weights do not show where the stream was cut.
    """
    blocks = context.stock.layout.blocks
    lines = [context.run.journal.find(f"block {block.index}") for block in blocks]
    embedded = context.run.journal.find("embedding") is not None
    final_states = load_final_states(context.run.journal, context.run.staging)
    if final_states is not None and embedded and None not in lines:
        _adopt(writer, len(blocks))
        return _passed(writer, lines, final_states)
    num_windows = len(context.windows.ids_NS) if common_DK is None else context.num_probe
    snapshots = Snapshots(context.run.staging / "state", context.observer.note)
    kept = snapshots.behind([embedded and line is not None for line in lines])
    first = 0 if kept is None else kept.position
    with contextlib.ExitStack() as stack:
        store = open_store(context, context.run.staging / "hidden.bin", num_windows)
        stack.callback(store.close)
        dense = open_store(context, context.run.staging / "dense.bin", context.num_probe)
        stack.callback(dense.close)
        propagator = embed(context, {store: num_windows, dense: context.num_probe})
        streams = {"cut": store, "dense": dense}
        context.observer.start("slice", len(blocks) - first)
        if kept is not None:
            kept.restore(streams)
            here = Cut(basis_DK=kept.tensors["basis"].to(context.device), dropped=kept.values["dropped"])
            _adopt(writer, first)
            del kept
        else:
            here = _cut(
                context, _gram(context, _content(propagator, store), "embedding"), width, common_DK, "embedding"
            )
            shard = writer.write_embeddings(rotated_embeddings(context, here.basis_DK))
            context.run.journal.record("embedding", [shard])
        release_free_memory()
        for block in blocks[first:]:
            started = time.perf_counter()
            tensors = context.reader.read(block.shapes, block.prefix)
            module = context.stock.block(
                block.index, {n: t.to(context.device, context.dtype) for n, t in tensors.items()}
            )
            propagator.run(module, block.index, dense)
            cuts = [here]
            for sublayer in _stream(context).sublayers:
                where = f"after block {block.index} {sublayer.kind}"
                with context.stock.stage(module, (sublayer.kind,)):
                    moved = _moved(propagator, _CutBefore(context, module, cuts[-1]), block.index, store)
                    gram_DD = _gram(context, moved, where)
                cuts.append(_cut(context, gram_DD, width, common_DK, where))
                del gram_DD
            del module
            bases = [cut.basis_DK for cut in cuts]
            written = rotated_block(tensors, _stream(context), bases, shortcuts=common_DK is None)
            shard = writer.write_block(block.index, written)
            reports = _reports(context, block, cuts, time.perf_counter() - started)
            lines[block.index] = context.run.journal.record(
                f"block {block.index}",
                [shard],
                reports=[report.model_dump(mode="json") for report in reports],
                peak_bytes=context.meter.peak_so_far(),
            )
            here = cuts[-1]
            del tensors, written, bases, cuts
            snapshots.keep(block.index + 1, streams, {"basis": here.basis_DK.cpu()}, {"dropped": here.dropped})
            release_free_memory()
            line = f"block {block.index}  dropped {reports[-2].error:.4f} {reports[-1].error:.4f}"
            context.observer.advance(f"{line}  memory {format_bytes(context.meter.peak_so_far())}")
        final_states = {
            "dense": dense.read(0, context.num_probe).clone(),
            "pruned": _projected(
                store.read(0, context.num_probe).to(context.device), here.basis_DK.to(context.dtype)
            ).cpu(),
            "basis": here.basis_DK.cpu(),
        }
        save_final_states(context.run.journal, context.run.staging, final_states)
    snapshots.discard()
    return _passed(writer, lines, final_states)


def _adopt(writer: ModelWriter, num_blocks: int) -> None:
    """Count the embeddings and the first blocks, which an earlier process wrote."""
    writer.adopt_embeddings()
    for index in range(num_blocks):
        writer.adopt_block(index)


def _passed(
    writer: ModelWriter, lines: Sequence[Mapping[str, Any] | None], final_states: Mapping[str, Tensor]
) -> _Pass:
    """From the journal's line of every block."""
    return _Pass(
        outcome=Outcome(
            reports=[BlockReport(**report) for line in lines if line is not None for report in line["reports"]],
            kept_indices={},
            dense_NSD=final_states["dense"],
            pruned_NSD=final_states["pruned"],
        ),
        num_block_parameters=writer.num_block_parameters,
        last_DK=final_states["basis"],
    )


def _common_basis(context: RunContext, width: int) -> Tensor:
    """The basis (D, K) of sum x x^T / |x|^2 over all positions and tokens of the dense stream.

    The sublayers read a token without its length. The stream grows by orders of magnitude on its way, and a few tokens
    are longer than all others; without the division the last positions and those tokens would decide alone.
    """
    path = context.run.staging / "basis.safetensors"
    if context.run.journal.find("basis") is not None:
        return load_file(path)["basis"].to(context.device)
    hidden, blocks = context.stock.layout.hidden_size, context.stock.layout.blocks
    total_DD = torch.zeros(hidden, hidden, dtype=torch.float64, device=context.device)
    snapshots = Snapshots(context.run.staging / "stream", context.observer.note)
    kept = snapshots.load()
    first = 0 if kept is None else kept.position
    with contextlib.ExitStack() as stack:
        store = open_store(context, context.run.staging / "hidden.bin", len(context.windows.ids_NS))
        stack.callback(store.close)
        propagator = embed(context, {store: len(context.windows.ids_NS)})
        context.observer.start("sensitivity: stream", len(blocks) - first)
        if kept is not None:
            kept.restore({"hidden": store})
            total_DD += kept.tensors["total"].to(context.device)
            del kept
        else:
            total_DD += _gram(context, map(_directions, _content(propagator, store)), "embedding")
        for block in blocks[first:]:
            tensors = context.reader.read(block.shapes, block.prefix)
            module = context.stock.block(
                block.index, {n: t.to(context.device, context.dtype) for n, t in tensors.items()}
            )
            del tensors
            for sublayer in _stream(context).sublayers:
                with context.stock.stage(module, (sublayer.kind,)):
                    moved = _moved(propagator, module, block.index, store)
                    total_DD += _gram(context, map(_directions, moved), f"after block {block.index} {sublayer.kind}")
            del module
            snapshots.keep(block.index + 1, {"hidden": store}, {"total": total_DD.cpu()})
            release_free_memory()
            context.observer.advance(f"block {block.index}")
    basis_DK = principal_basis(total_DD, width, context.damping, "all positions")
    save_file({"basis": basis_DK.cpu().contiguous()}, path)
    context.run.journal.record("basis", [path])
    snapshots.discard()
    return basis_DK


def _directions(hidden_BSD: Tensor) -> Tensor:
    """Each token at length one; a token of zeros stays."""
    return nn.functional.normalize(hidden_BSD.float(), dim=-1)


class _CutBefore(nn.Module):
    """A block, or sublayer of one, on the cut stream."""

    def __init__(self, context: RunContext, block: nn.Module, cut: Cut) -> None:
        super().__init__()
        self.block = block
        self.basis_DK = cut.basis_DK.to(context.dtype)

    def forward(self, hidden_BSD: Tensor, **kwargs: Any) -> Any:
        return self.block(_projected(hidden_BSD, self.basis_DK), **kwargs)


def _projected(hidden_BSD: Tensor, basis_DK: Tensor) -> Tensor:
    return (hidden_BSD @ basis_DK) @ basis_DK.T


def _moved(propagator: Propagator, module: nn.Module, index: int, store: HiddenStore) -> Iterator[Tensor]:
    """Each micro-batch's output; it has replaced its input in the store."""
    with propagator.writing(store) as put:
        for start, _, hidden_BSD in propagator.read(store, 0, store.shape[0]):
            output_BSD = propagator.apply(module, index, hidden_BSD)
            put(start, output_BSD)
            yield output_BSD


def _content(propagator: Propagator, store: HiddenStore) -> Iterator[Tensor]:
    return (hidden_BSD for *_, hidden_BSD in propagator.read(store, 0, store.shape[0]))


def _gram(context: RunContext, batches: Iterable[Tensor], where: str) -> Tensor:
    """Sum of x x^T over the batches' tokens, (D, D), float32."""
    accumulator = GramAccumulator(context.stock.layout.hidden_size, context.device)
    for hidden_BSD in batches:
        accumulator.update(hidden_BSD.reshape(-1, hidden_BSD.shape[-1]))
    return accumulator.finalize(where)


def _cut(context: RunContext, gram_DD: Tensor, width: int, common_DK: Tensor | None, where: str) -> Cut:
    basis_DK = principal_basis(gram_DD, width, context.damping, where) if common_DK is None else common_DK
    return Cut(basis_DK=basis_DK, dropped=dropped_share(gram_DD, basis_DK))


def _reports(context: RunContext, block: BlockLayout, cuts: list[Cut], seconds: float) -> list[BlockReport]:
    """One line per sublayer, with the cut at its input; the statistics have the one at its output."""
    hidden, width = cuts[0].basis_DK.shape
    return [
        BlockReport(
            block=block.index,
            kind=sublayer.kind,
            num_units=hidden,
            kept_units=width,
            error_mask_only=None,
            error=before.dropped,
            status="sliced",
            statistics={"dropped_after": after.dropped},
            objective=[],
            seconds=seconds / (len(cuts) - 1),
        )
        for sublayer, before, after in zip(_stream(context).sublayers, cuts[:-1], cuts[1:], strict=True)
    ]


def _stream(context: RunContext) -> Stream:
    stream = context.stock.family.stream
    assert stream is not None, "refused before the run"
    return stream
