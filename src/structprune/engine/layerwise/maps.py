"""Sums over calibration windows of what the linear maps of a block read, and one map's zeros from them.

On the dense path y = W x_d, x_d what the map reads in the dense model, so that the sum of y x^T is W K with
K = sum x_d x^T: one square for all maps that share an input, whatever they give.

Shape suffixes: B windows, S positions, T tokens, I inputs, O outputs, N windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.stock.maps import InputGroup, MapStep
from structprune.calibration.store import HiddenStore
from structprune.engine.layerwise.statistics import Streams, read_ranges
from structprune.engine.run.context import RunContext, WindowRanges
from structprune.engine.streaming.propagate import Propagator
from structprune.errors import NOT_FINITE_ADVICE, NumericalError
from structprune.linalg.gram_products import energy, strips
from structprune.rows import DiagonalRows, Rows, SymmetricRows
from structprune.solvers.elements.problem import Reads
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, Moments


class _ReachedError(Exception):
    """Raised by a hook: all that was wanted of a forward pass is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSums:
    """What was summed of one tensor that maps read."""

    moments: Moments
    """`target_OI` is K, (inputs of the dense model, inputs); None for the local target."""
    energy_NI: Tensor
    """Mean square of each input in every window, float32; in one row of an expert's tokens, and of all windows where
    nothing reads squares."""
    wanted: Mapping[str, float] = field(default_factory=dict[str, float])
    """Map -> sum of |y|^2 on the dense path."""

    def plus(self, other: InputSums) -> InputSums:
        """Return the sums over the tokens of both. Those of `self` are added to, and cannot be used afterwards."""
        own, others = self.moments, other.moments
        target_OI = own.target_OI
        if target_OI is not None and others.target_OI is not None:
            target_OI = _added(target_OI, others.target_OI)
        return InputSums(
            moments=Moments(
                gram_II=_added(own.gram_II, others.gram_II),
                num_tokens=own.num_tokens + others.num_tokens,
                sum_I=None if own.sum_I is None or others.sum_I is None else own.sum_I + others.sum_I,
                target_OI=target_OI,
            ),
            energy_NI=torch.cat([self.energy_NI, other.energy_NI]),
            wanted={name: energy + other.wanted[name] for name, energy in self.wanted.items()},
        )

    def reordered(self, order_I: Tensor) -> InputSums:
        """Return the same sums with the inputs in another order: a new square, put in order a few rows at a time."""
        moments, order_I = self.moments, order_I.to(self.moments.gram_II.device)
        target_OI = None if moments.target_OI is None else _reordered(moments.target_OI, order_I)
        sum_I = None if moments.sum_I is None else moments.sum_I[order_I]
        moments = replace(moments, gram_II=_reordered(moments.gram_II, order_I), sum_I=sum_I, target_OI=target_OI)
        return replace(self, moments=moments, energy_NI=self.energy_NI[:, order_I.cpu()])

    def packed(self) -> InputSums:
        """Return the same sums in less memory, for what reads them rarely: half of a Gram matrix."""
        gram_II = self.moments.gram_II
        if isinstance(gram_II, Tensor):
            gram_II = SymmetricRows.of(gram_II)
        return replace(self, moments=replace(self.moments, gram_II=gram_II))


def _reordered(matrix_II: Rows, order_I: Tensor) -> Rows:
    if isinstance(matrix_II, DiagonalRows):
        return DiagonalRows(values_I=matrix_II.values_I[order_I])
    found_II = matrix_II[order_I]
    for part in strips(*found_II.shape):
        found_II[part] = found_II[part][:, order_I]
    return SymmetricRows.of(found_II) if isinstance(matrix_II, SymmetricRows) else found_II


def _added(own_II: Rows, other_II: Rows) -> Rows:
    """Add a matrix to one of the same sort, in its place."""
    if isinstance(own_II, Tensor) and isinstance(other_II, Tensor):
        return own_II.add_(other_II)
    assert isinstance(own_II, DiagonalRows)
    assert isinstance(other_II, DiagonalRows)
    return DiagonalRows(values_I=own_II.values_I + other_II.values_I)


@dataclass(slots=True, kw_only=True)
class _Sums:
    """Sums of one group while windows pass."""

    group: InputGroup
    gram: GramAccumulator | None
    squares: bool
    """Whether the squares of each window are summed."""
    means: bool = False
    """Whether the inputs themselves are summed."""
    energy_I: Tensor | None = None
    sum_I: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list[Tensor])
    num_tokens: int = 0
    wanted: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, x: Tensor, dense_TI: Tensor | None) -> None:
        """Add a micro-batch, (B, S, I), or an expert's tokens, (R, I)."""
        x_TI = x.reshape(-1, x.shape[-1])
        if self.gram is not None:
            self.gram.update(x_TI, dense_TI)
        by_window = x if x.ndim == 3 else x_TI[None]
        for x_SI in by_window if self.squares else ():
            # In float32, as squares of half precision would pass its range: a tenth of the time of a column's norm.
            energy_I = x_SI.to(torch.float32, copy=True).square_().sum(dim=0).to(torch.float64)
            self.energy_I = energy_I if self.energy_I is None else self.energy_I + energy_I
            if x.ndim == 3:
                self.rows.append((energy_I / len(x_SI)).to("cpu", torch.float32))
        if self.means:
            sum_I = x_TI.sum(dim=0, dtype=torch.float32).to(torch.float64)
            self.sum_I = sum_I if self.sum_I is None else self.sum_I + sum_I
        self.num_tokens += len(x_TI)

    def finished(self, inputs: int, where: str) -> InputSums:
        """Return the sums. Raises NumericalError if an activation was NaN or infinite."""
        gram_II = None if self.gram is None else self.gram.finalize(where)
        energy_I = torch.zeros(inputs, dtype=torch.float64) if self.energy_I is None else self.energy_I
        if gram_II is not None and not self.squares:
            energy_I = gram_II.diagonal().to(torch.float64)
        if not bool(torch.isfinite(energy_I).all()):
            raise NumericalError(
                "activations are NaN or infinite (or overflow when squared)",
                where=where,
                do=NOT_FINITE_ADVICE,
            )
        rows = self.rows or [(energy_I / max(1, self.num_tokens)).to("cpu", torch.float32)]
        sum_I = torch.zeros_like(energy_I) if self.means and self.sum_I is None else self.sum_I
        moments = Moments(gram_II=DiagonalRows(values_I=energy_I), num_tokens=self.num_tokens, sum_I=sum_I)
        if self.gram is not None and gram_II is not None:
            moments = replace(moments, gram_II=gram_II, target_OI=self.gram.target_OI)
        return InputSums(moments=moments, energy_NI=torch.stack(rows), wanted=self.wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockModules:
    """One block as it is pruned, and as it was where the dense path is followed."""

    block: BlockLayout
    pruned: nn.Module
    dense: nn.Module | None


def measure_maps(
    context: RunContext,
    modules: BlockModules,
    step: MapStep,
    streams: Streams,
    windows: WindowRanges,
    reads: Set[Reads],
    inputs_NSI: Tensor | None = None,
) -> list[InputSums]:
    """Sum what the groups of a step read, over some windows of the pruned stream; neither stream is moved.

    With `inputs_NSI` what the only group reads is kept there. Raises NumericalError for activations that are not
    finite.
    """
    block, sums = modules.block, [_open(context, modules, group, reads) for group in step.groups]
    assert inputs_NSI is None or len(sums) == 1, "what several groups read is not kept"
    for start, stop, hidden_BSD in read_ranges(streams, windows):
        dense_TI = None
        if modules.dense is not None:
            dense_TI = _dense_inputs(context, modules, step, sums[0], streams, (start, stop))
        with contextlib.ExitStack() as stack:
            stack.enter_context(context.stock.stage(modules.pruned, block.index, step.stage))
            alone = len(sums) == 1
            for each in sums:
                kept_BSI = None if inputs_NSI is None else inputs_NSI[start:stop]
                hook = partial(_receive, sums=each, dense_TI=dense_TI, leave=alone, kept_BSI=kept_BSI)
                place = modules.pruned.get_submodule(each.group.maps[0])
                stack.callback(place.register_forward_pre_hook(hook).remove)
            with contextlib.suppress(_ReachedError):
                streams.propagator.apply(modules.pruned, block.index, hidden_BSD)
    inputs = [_num_inputs(context, block, each.group.maps[0]) for each in sums]
    return [
        each.finished(count, f"block {block.index} {each.group.maps[0]}")
        for each, count in zip(sums, inputs, strict=True)
    ]


def measure_squares(
    context: RunContext,
    block: BlockLayout,
    module: nn.Module,
    steps: Sequence[MapStep],
    propagator: Propagator,
    store: HiddenStore,
) -> dict[str, Tensor]:
    """Sum the squares of what all maps of a block read, and move the stream on: map -> (I,), float64.

    Raises NumericalError for activations that are not finite.
    """
    sums = [_Sums(group=group, gram=None, squares=True) for step in steps for group in step.groups]
    with contextlib.ExitStack() as stack:
        for each in sums:
            hook = partial(_receive, sums=each, dense_TI=None, leave=False)
            stack.callback(module.get_submodule(each.group.maps[0]).register_forward_pre_hook(hook).remove)
        propagator.run(module, block.index, store)
    found: dict[str, Tensor] = {}
    for each in sums:
        name = each.group.maps[0]
        squares = each.finished(_num_inputs(context, block, name), f"block {block.index} {name}")
        found |= dict.fromkeys(each.group.maps, squares.moments.gram_II.diagonal())
    return found


def _open(context: RunContext, modules: BlockModules, group: InputGroup, reads: Set[Reads]) -> _Sums:
    """Begin the sums of a group: of all products where something reads them."""
    squares, means = "energy" in reads, "mean" in reads
    if "gram" not in reads:
        return _Sums(group=group, gram=None, squares=squares, means=means)
    inputs = _num_inputs(context, modules.block, group.maps[0])
    gram = context.accumulator(inputs, num_outputs=0 if modules.dense is None else inputs)
    return _Sums(group=group, gram=gram, squares=squares, means=means)


def _num_inputs(context: RunContext, block: BlockLayout, name: str) -> int:
    shape = block.shapes[f"{name}.weight"]
    return shape[0] if context.stock.family.inputs_first else shape[1]


def _receive(
    _: nn.Module,
    args: tuple[Tensor, ...],
    *,
    sums: _Sums,
    dense_TI: Tensor | None,
    leave: bool,
    kept_BSI: Tensor | None = None,
) -> None:
    sums.add(args[0], dense_TI)
    if kept_BSI is not None:
        kept_BSI.copy_(args[0].view_as(kept_BSI))
    if leave:
        raise _ReachedError


def _dense_inputs(
    context: RunContext,
    modules: BlockModules,
    step: MapStep,
    sums: _Sums,
    streams: Streams,
    windows: tuple[int, int],
) -> Tensor:
    """Return what the maps of a group read in the dense model, in float32, and add up what they give there."""
    found: list[Tensor] = []
    dense, index = modules.dense, modules.block.index
    assert dense is not None

    def given(module: Any, _: object, output: Tensor, name: str) -> None:
        bias_O: Tensor | None = module.bias
        output = output if bias_O is None else output - bias_O
        sums.wanted[name] = sums.wanted.get(name, 0.0) + float(energy(output.reshape(-1, output.shape[-1])))
        if name == sums.group.maps[-1]:
            raise _ReachedError

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]).float())

    with contextlib.ExitStack() as stack:
        stack.enter_context(context.stock.stage(dense, index, step.stage))
        for name in sums.group.maps:
            module = dense.get_submodule(name)
            stack.callback(module.register_forward_hook(partial(given, name=name)).remove)
        first = dense.get_submodule(sums.group.maps[0])
        stack.callback(first.register_forward_pre_hook(read).remove)
        with contextlib.suppress(_ReachedError):
            streams.propagator.apply(dense, index, streams.propagator.fetch(streams.dense, *windows))
    return found.pop()


def moments_of(sums: InputSums, name: str, weight_OI: Tensor) -> Moments:
    """Return the sums of one map of a group: on the dense path with its own targets, W K."""
    moments = sums.moments.to(weight_OI.device)
    if moments.target_OI is None:
        return moments
    return replace(moments, target_OI=weight_OI.float() @ moments.target_OI[:], target_energy=sums.wanted[name])
