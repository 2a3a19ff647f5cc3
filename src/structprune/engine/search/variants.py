"""What candidates consist of: blocks with sublayers of any width, their consumers solved again.

A sublayer of a width keeps the units that the order of removal leaves last, and its consumer is solved from the sums of
its inputs on the dense stream. It is solved when a candidate first wants it; solved ones stay on disk, the newest of
each sublayer.

Shape suffixes: U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structprune.architectures.units import remove_sublayer
from structprune.engine.layerwise.block import cut_module
from structprune.engine.layerwise.few_tokens import with_missing_tokens
from structprune.engine.layerwise.problem import layer_problem
from structprune.engine.layerwise.solve import SolvedGroup, with_group
from structprune.engine.planning.searching import KEPT_VARIANTS
from structprune.engine.run.context import RunContext
from structprune.engine.search.statistics import GroupStatistics, load_statistics
from structprune.errors import NumericalError
from structprune.memory import release_free_memory
from structprune.phases import SublayerPhase
from structprune.scores.selection import removal_order
from structprune.solvers import SOLVERS
from structprune.types import UNIT_KINDS, BlockLayout, SolveResult, UnitGroup

_TEMPERATURE = 0.1
"""How far the prices of removals are moved for other units of the same width: a tenth, in their logarithm."""


class Variants:
    """Blocks of the dense model with sublayers cut to some width; `folder` has their statistics and what is solved."""

    def __init__(self, context: RunContext, folder: Path) -> None:
        self._context, self._folder = context, folder
        self._solved: dict[tuple[int, str], list[Path]] = {}
        self._read: tuple[int, dict[str, Tensor]] | None = None
        """The newest block's number and tensors: its variants are built one after the other."""
        # What an interrupted process left is not in the count of those that stay.
        for path in folder.glob("solved-*"):
            path.unlink()

    def build(self, block: BlockLayout, widths: Mapping[str, int], draw: int = 0) -> nn.Module:
        """Build the block with so many units of each kind, kinds that are not named as they are.

        With a `draw` from 1 other units stay than the best ones: the prices of removals are moved a little by chance
        (Gumbel top-k: arXiv 2310.13183 draws masks near the best one as well).
        """
        context = self._context
        tensors = self._tensors(block)
        kept: dict[str, int] = {}
        for kind in UNIT_KINDS:
            if kind not in widths or widths[kind] == block.group(kind).num_units:
                continue
            kept[kind] = widths[kind]
            if widths[kind] == 0:
                tensors = remove_sublayer(tensors, block, kind)
                continue
            with context.meter.phase(SublayerPhase.SEARCH_SOLVE.of(kind)):
                for group in block.groups_of(kind):
                    tensors = with_group(tensors, group, self._part(block, group, tensors, widths[kind], draw))
        release_free_memory()
        return cut_module(context, block, tensors, kept)

    def close(self) -> None:
        """Let go of the newest block."""
        self._read = None

    def _tensors(self, block: BlockLayout) -> dict[str, Tensor]:
        if self._read is None or self._read[0] != block.index:
            self._read = None
            self._read = block.index, self._context.reader.read(block.shapes, block.prefix)
        return self._read[1]

    def _part(
        self, block: BlockLayout, group: UnitGroup, tensors: Mapping[str, Tensor], num_keep: int, draw: int
    ) -> SolvedGroup:
        """Load the group's consumer of this width, or solve it; that of other units is solved each time."""
        path = self._folder / f"solved-{block.index}-{group.name}-{num_keep}.safetensors"
        known = self._solved.setdefault((block.index, group.name), [])
        if draw == 0 and path in known:
            known.append(known.pop(known.index(path)))
            stored = load_file(path)
            keep_units, result = (
                stored["keep_units"],
                SolveResult(weight_OK=stored["weight_OK"], bias_O=stored.get("bias_O"), status="ok", statistics={}),
            )
        else:
            keep_units, result = self._solve(block, group, tensors, num_keep, draw)
            if draw == 0:
                self._save(path, known, keep_units, result)
        return SolvedGroup(keep_units=keep_units, result=result, errors=None, statistics={}, cost_U=None, tokens=None)

    def _save(self, path: Path, known: list[Path], keep_units: Tensor, result: SolveResult) -> None:
        parts = {"keep_units": keep_units, "weight_OK": result.weight_OK.contiguous()}
        save_file(parts if result.bias_O is None else {**parts, "bias_O": result.bias_O}, path)
        known.append(path)
        if len(known) > KEPT_VARIANTS:
            known.pop(0).unlink()

    def _solve(
        self, block: BlockLayout, group: UnitGroup, tensors: Mapping[str, Tensor], num_keep: int, draw: int
    ) -> tuple[Tensor, SolveResult]:
        """Solve the consumer: (units that stay, ascending; weight, on the host)."""
        context = self._context
        found = load_statistics(self._folder, block, group)
        problem = layer_problem(context, block, group, tensors, [found.moments])
        if group.expert is not None:
            problem = with_missing_tokens(problem)
        order_U = found.order_U if draw == 0 else self._drawn(block, group, found, draw)
        keep_U = torch.ones(group.num_units, dtype=torch.bool, device=problem.device)
        keep_U[order_U[: group.num_units - num_keep].to(problem.device)] = False
        del found
        try:
            result = SOLVERS.get(context.solver).solve(problem, keep_U)
        except NumericalError as error:
            raise error.inside(f"block {block.index} {group.name}") from error
        if not torch.isfinite(result.weight_OK).all():
            raise NumericalError(
                "the solver's weight is not finite", where=f"block {block.index} {group.name}", do="raise --damping"
            )
        return torch.nonzero(keep_U).flatten().cpu(), result.to(torch.device("cpu"))

    def _drawn(self, block: BlockLayout, group: UnitGroup, found: GroupStatistics, draw: int) -> Tensor:
        """Order the units by prices that are moved by chance: differently for every group, draw and seed."""
        seed = (self._context.recipe.seed * 1_009 + draw) * 1_000_003 + block.index * 1_009 + (group.expert or 0)
        generator = torch.Generator().manual_seed(seed * len(UNIT_KINDS) + UNIT_KINDS.index(group.kind))
        uniform_U = torch.rand(group.num_units, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
        gumbel_U = -(-uniform_U.log()).log()
        price_U = torch.empty(group.num_units, dtype=torch.float64)
        price_U[found.order_U] = found.price_U.clamp_min(1e-12 * float(found.price_U.abs().max()) or 1.0).log()
        return removal_order(price_U + _TEMPERATURE * gumbel_U, group.partitions)
