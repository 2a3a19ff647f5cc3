"""The slicing pipeline: one block in memory at a time, the residual stream cut at every position.

The stream stays in the model's own coordinates while it is measured: a cut replaces x by B B^T x, B the (D, K) basis of
the position, and the stock sublayer then runs on it unchanged. That is what the written sublayer of width K computes,
since the norm's sum of squares is the same and everything it reads is W B B^T x. Only the written weights are rotated.

Shape suffixes: B windows, S positions, N windows, D hidden size, K kept dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.family import Stream
from structprune.calibration.store import HiddenStore
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.passes import BlockPass, Carried, Line, PassState, Visited, run_pass
from structprune.engine.pipelines.slice_settings import kept_width, sliced_shares
from structprune.engine.pipelines.slice_weights import rotated_block, rotated_embeddings, rotated_head
from structprune.engine.run.context import RunContext
from structprune.engine.run.final_metrics import final_metrics
from structprune.engine.run.finalize import Outcome, Result, commit, size_report
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.final_states import first_windows
from structprune.engine.streaming.propagate import Propagator
from structprune.exporters.sliced import sliced_config, write_sliced_modeling_file
from structprune.linalg.rotation import dropped_share, principal_basis
from structprune.memory import release_free_memory
from structprune.recipe.slice import ResolvedSlice
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

    @classmethod
    def of(cls, carried: Carried) -> Cut:
        """Take up the cut that was made behind the block before."""
        return cls(basis_DK=carried.tensors["basis"], dropped=carried.values["dropped"])

    def carried(self) -> Carried:
        """Hand this cut to the next block."""
        return Carried(tensors={"basis": self.basis_DK}, values={"dropped": self.dropped})


def execute_slice(context: RunContext) -> PruneReport:
    """Slice block after block into the run's staging directory and turn it into the output.

    With the stream's full width it is only rotated. Raises NumericalError for weights or activations that are not
    finite, CheckpointError for unreadable tensors.
    """
    stock, layout = context.stock, context.stock.layout
    width = kept_width(layout, _stream(context), context.settings(ResolvedSlice))
    shortcuts = context.recipe.per_layer
    # Before the long pass: what cannot be written is refused here.
    config = sliced_config(context.reader.config, stock.config, stock.family, width, shortcuts=shortcuts)
    common_DK = None if shortcuts else _common_basis(context, width)
    writer = ModelWriter(context.run.shards, len(layout.blocks), layout.blocks_module, context.file_form)
    sliced = _slice_blocks(context, writer, width, common_DK)

    def finish() -> Result:
        release_free_memory()
        metrics = final_metrics(context, sliced.outcome.dense_NSD, sliced.outcome.pruned_NSD)
        release_free_memory()
        removed = layout.block_parameters - writer.num_block_parameters
        writer.write_rest(rotated_head(context, sliced.last_DK))
        if shortcuts:
            write_sliced_modeling_file(context.run.checkpoint, stock.family)
        files = writer.weight_files(context.recipe.max_shard_size)
        size = size_report(
            context, files, sliced.outcome, removed_in_blocks=removed, scope_parameters=layout.block_parameters
        )
        return Result(files=files, config=config, outcome=sliced.outcome, size=size, metrics=metrics)

    return commit(context, finish)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sliced:
    """What the pass over the blocks leaves, beside the shards."""

    outcome: Outcome
    """Both hidden states in the model's own coordinates."""
    last_DK: Tensor
    """The basis behind the last block."""


def _slice_blocks(context: RunContext, writer: ModelWriter, width: int, common_DK: Tensor | None) -> _Sliced:
    """Cut the stream at every position, and write the rotated blocks.

    A common basis is known beforehand: then only the reported windows go through the cut model. Rotated weights do not
    show where the stream was cut, so blocks behind the newest snapshot are cut again by a process that goes on.
    """
    num_windows = len(context.windows.ids_NS) if common_DK is None else context.num_probe

    def cut(batches: Iterable[Tensor], where: str) -> Cut:
        return _cut(context, _gram(context, batches, where), width, common_DK, where)

    def begin(state: PassState) -> Visited:
        here = cut(_content(state.propagator, state.stores["cut"]), "embedding")
        return Visited(tensors=rotated_embeddings(context, here.basis_DK), carried=here.carried())

    def visit(block: BlockLayout, state: PassState) -> Visited:
        started = time.perf_counter()
        tensors, module = load_block(context, block)
        state.propagator.run(module, block.index, state.stores["dense"])
        cuts = [Cut.of(state.carried)]
        for sublayer in _stream(context).sublayers:
            with context.stock.stage(module, block.index, (sublayer.kind,)):
                after_cut = _CutBefore(context, module, cuts[-1])
                moved = _moved(state.propagator, after_cut, block.index, state.stores["cut"])
                del after_cut
                cuts.append(cut(moved, f"after block {block.index} {sublayer.kind}"))
        del module
        written = rotated_block(tensors, _stream(context), [c.basis_DK for c in cuts], shortcuts=common_DK is None)
        reports = _reports(context, block, cuts, time.perf_counter() - started)
        values = {"reports": [report.model_dump(mode="json") for report in reports]}
        return Visited(tensors=written, values=values, carried=cuts[-1].carried())

    def finish(state: PassState) -> dict[str, Tensor]:
        dense_NSD, cut_NSD = (
            first_windows(context.ranks, state.stores[name], context.num_probe) for name in ("dense", "cut")
        )
        basis_DK = state.carried.tensors["basis"]
        pruned_NSD = _projected(cut_NSD.to(context.device), basis_DK.to(context.dtype))
        return {"dense": dense_NSD, "pruned": pruned_NSD.cpu(), "basis": basis_DK.cpu()}

    result = run_pass(
        context,
        BlockPass(
            name="slice",
            journal=context.run.journal,
            stores={"cut": num_windows, "dense": context.num_probe},
            begin=begin,
            opening="embedding",
            visit=visit,
            finish=finish,
            describe=_describe,
            writer=writer,
        ),
    )
    outcome = Outcome(
        reports=[BlockReport(**report) for line in result.lines for report in line["reports"]],
        kept_indices={},
        dense_NSD=result.final["dense"],
        pruned_NSD=result.final["pruned"],
        shares=sliced_shares(context.stock.layout, _stream(context), context.settings(ResolvedSlice)),
    )
    return _Sliced(outcome=outcome, last_DK=result.final["basis"])


def _describe(block: BlockLayout, line: Line) -> str:
    first, second = (BlockReport(**report) for report in line["reports"][-2:])
    return f"block {block.index}  dropped {first.error:.4f} {second.error:.4f}"


def _common_basis(context: RunContext, width: int) -> Tensor:
    """Find the basis (D, K) of sum x x^T / |x|^2 over all positions and tokens of the dense stream.

    The sublayers read a token without its length. The stream grows by orders of magnitude on its way, and a few tokens
    are longer than all others; without the division the last positions and those tokens would decide alone.
    """
    hidden = context.stock.layout.hidden_size

    def begin(state: PassState) -> Visited:
        total_DD = torch.zeros(hidden, hidden, dtype=torch.float64, device=context.device)
        total_DD += _gram(context, map(_directions, _content(state.propagator, state.stores["hidden"])), "embedding")
        return Visited(carried=Carried(tensors={"total": total_DD}))

    def visit(block: BlockLayout, state: PassState) -> Visited:
        module = load_block(context, block)[1]
        total_DD = state.carried.tensors["total"]
        for sublayer in _stream(context).sublayers:
            with context.stock.stage(module, block.index, (sublayer.kind,)):
                moved = _moved(state.propagator, module, block.index, state.stores["hidden"])
                total_DD += _gram(context, map(_directions, moved), f"after block {block.index} {sublayer.kind}")
        return Visited(carried=Carried(tensors={"total": total_DD}))

    def finish(state: PassState) -> dict[str, Tensor]:
        total_DD = state.carried.tensors["total"]
        return {
            "basis": principal_basis(total_DD, width, context.settings(ResolvedSlice).damping, "all positions").cpu()
        }

    result = run_pass(
        context,
        BlockPass(
            name="sensitivity: stream",
            journal=context.run.journal,
            stores={"hidden": len(context.windows.ids_NS)},
            begin=begin,
            visit=visit,
            finish=finish,
            records_blocks=False,
            last="basis",
            snapshots="stream",
        ),
    )
    return result.final["basis"].to(context.device)


def _directions(hidden_BSD: Tensor) -> Tensor:
    """Scale each token to length one; a token of zeros stays."""
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
    """Yield each micro-batch's output, which has replaced its input in the store."""
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
    basis_DK = (
        principal_basis(gram_DD, width, context.settings(ResolvedSlice).damping, where)
        if common_DK is None
        else common_DK
    )
    return Cut(basis_DK=basis_DK, dropped=dropped_share(gram_DD, basis_DK))


def _reports(context: RunContext, block: BlockLayout, cuts: list[Cut], seconds: float) -> list[BlockReport]:
    """Report each sublayer with the cut at its input; the statistics have the one at its output."""
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
