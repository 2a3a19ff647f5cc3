"""The pipeline that removes whole experts of a mixture: measure a block, choose, write it with those that stay.

An expert is taken or left, and every block keeps as many, so there is no allocation and nothing to solve. Blocks
without experts stay as they are. The dense model's stream is measured, as in the paper; the pruned one passes along for
the reported windows only.

Shape suffixes: E experts, R tokens that are sent to one expert, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.family import Experts
from structprune.architectures.stock.model import StockModel
from structprune.calibration.store import HiddenStore
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.layerwise.few_tokens import ExpertTokens, token_statistics
from structprune.engine.passes import BlockPass, Line, PassState, Visited, run_pass
from structprune.engine.pipelines.counted_settings import counted_shares, num_to_remove
from structprune.engine.planning.forecast import BlockTensors, Forecast, result_tensors, shape_of
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.widths import check_shared_out
from structprune.engine.run.context import RunContext
from structprune.engine.run.finalize import Outcome, finalize
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.final_states import first_windows
from structprune.engine.streaming.propagate import Propagator, captured
from structprune.errors import InputError, UnsupportedError
from structprune.methods.method import Method
from structprune.phases import Phase
from structprune.recipe.experts import ExpertsRecipe, ResolvedExperts
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.types import BlockLayout, UnitGroup, UnitKind

# The mean of so many norms is known to about a tenth of their spread.
_ENOUGH_TOKENS = 100
# What the report and the manifest call it.
KIND = "expert"
# Config entry of routers that choose among sets of experts first, and then among those inside (DeepSeek V3).
_SETS = "n_group"


def expert_settings(
    recipe: ExpertsRecipe, method: Method, stock: StockModel
) -> tuple[ResolvedExperts, tuple[UnitGroup, ...]]:
    """Fill every entry of the recipe, and find the mixture's groups.

    Raises UnsupportedError for a model without experts or a setting without a meaning, InputError where fewer experts
    would be left than a token is sent to.
    """
    experts = stock.family.mixture
    if experts is None:
        raise UnsupportedError(
            f"method {method.name!r} removes experts of a mixture, and this model has none",
            got=stock.family.name,
            wanted="such as qwen3_moe",
            do="use another --method",
        )
    if not experts.count_field or not experts.chosen_field or not experts.routers:
        raise UnsupportedError(
            f"no config entry is known for the experts of {stock.family.name}, so none can leave",
            got=f"number {experts.count_field or 'unknown'}, chosen {experts.chosen_field or 'unknown'}",
            do="prune channels of the experts with another --method",
        )
    num_sets = getattr(stock.config, _SETS, None) or 1
    if num_sets > 1:
        raise UnsupportedError(
            "its router chooses sets of experts first, and other numbers of experts make other sets",
            got=f"{_SETS} {num_sets}",
            wanted=f"{_SETS} 1",
            do="prune channels of the experts with another --method",
        )
    if recipe.scope != "mlp":
        raise UnsupportedError(
            f"method {method.name!r} removes whole experts", got=f"--scope {recipe.scope}", wanted="--scope mlp"
        )
    total, chosen = getattr(stock.config, experts.count_field), getattr(stock.config, experts.chosen_field)
    remove = num_to_remove(recipe.sparsity, total)
    if remove > total - chosen:
        raise InputError(
            "fewer experts would be left than a token is sent to",
            got=f"sparsity {recipe.sparsity:g}, which is {remove} of {total} experts",
            wanted=f"at most {total - chosen}: {experts.chosen_field} is {chosen}",
            do="lower --sparsity",
        )
    block = next(block for block in stock.layout.blocks if _is_mixture(stock, block))
    return ResolvedExperts.of(recipe), block.groups_of("mlp")


def expert_request(request: PlanRequest) -> PlanRequest:
    """Complete the request: one stream of all windows, and no sums but two numbers per expert."""
    return replace(request, needs_statistics=False)


def forecast_experts(stock: StockModel, recipe: ResolvedExperts, kinds: Sequence[UnitKind]) -> Forecast:
    """Forecast all of the result, since every block keeps as many experts.

    Raises UnsupportedError where processes could not share them.
    """
    check_shared_out(stock, recipe, {})
    layout, experts = stock.layout, _experts(stock)
    total = getattr(stock.config, experts.count_field)
    remove = num_to_remove(recipe.sparsity, total)
    config = _with_fewer(layout.config, stock, total - remove)
    keep = total - remove

    def tensors_of(block: BlockLayout) -> BlockTensors:
        mixture = _is_mixture(stock, block)
        # Experts are alike, so it does not matter which ones stay.
        for name, shape in block.shapes.items():
            if not mixture:
                yield name, name, shape
            elif name in experts.routers:
                yield name, name, (keep, *shape[1:])
            elif not name.startswith(f"{experts.module}.") or _expert_number(name, experts) < keep:
                yield name, name, shape

    return Forecast(
        shape=shape_of(stock, recipe, config),
        kept=None,
        shares=counted_shares(recipe.sparsity, total),
        tensors=result_tensors(stock, recipe, layout.blocks, tensors_of),
    )


def _expert_number(name: str, experts: Experts) -> int:
    return int(name.removeprefix(f"{experts.module}.").partition(".")[0])


def execute_experts(context: RunContext) -> PruneReport:
    """Measure, choose and write block after block into the run's staging directory.

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors.
    """
    layout, experts = context.stock.layout, _experts(context.stock)
    writer = ModelWriter(context.run.shards, len(layout.blocks), layout.blocks_module, context.file_form)
    outcome = _prune_blocks(context, experts, writer)
    config = _with_fewer(context.reader.config, context.stock, _num_kept(context, experts))
    mixtures = [block for block in layout.blocks if _is_mixture(context.stock, block)]
    in_scope = sum(block.module_parameters(block.group("mlp")) for block in mixtures)
    return finalize(context, writer, config, outcome, in_scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saliency:
    """What the calibration tokens say of a block's experts."""

    norms_E: Tensor
    """Sum over the tokens that are sent to an expert of |g f(x)|, g the router's weight, float64."""
    tokens_E: Tensor
    """How many those tokens are, int64."""

    @property
    def mean_E(self) -> Tensor:
        """S_j of arXiv 2510.13999; zero for an expert that no token is sent to, which takes part in no output."""
        return self.norms_E / self.tokens_E.clamp(min=1)

    def keep(self, num_keep: int) -> Tensor:
        """Return the numbers of the most salient experts, ascending; of two that are equal the lower number wins."""
        order_E = self.mean_E.argsort(descending=True, stable=True)
        return order_E[:num_keep].sort().values


@torch.no_grad()
def measure_experts(
    module: nn.Module, experts: Experts, num_experts: int, propagator: Propagator, index: int, store: HiddenStore
) -> Saliency:
    """Pass every window of `store` through the block, in place. Raises NumericalError as the propagator does."""
    norms_E = torch.zeros(num_experts, dtype=torch.float64)
    tokens_E = torch.zeros(num_experts, dtype=torch.int64)

    def received(number: int, weighted_RD: Tensor) -> None:
        # float32 from here on: the squares of half precision would pass its range.
        norms_R = torch.linalg.vector_norm(weighted_RD, dim=-1, dtype=torch.float32)
        norms_E[number] += float(norms_R.sum(dtype=torch.float64))
        tokens_E[number] += len(weighted_RD)

    with contextlib.ExitStack() as stack:
        for number in range(num_experts):
            name = f"{experts.module}.{number}.{experts.writer}"
            stack.enter_context(captured(module, name, lambda output_RD, n=number: received(n, output_RD)))
        propagator.run(module, index, store)
    return Saliency(norms_E=norms_E, tokens_E=tokens_E)


def keep_experts(tensors: Mapping[str, Tensor], experts: Experts, kept: Sequence[int]) -> dict[str, Tensor]:
    """Return a block's `tensors` (relative names) with the experts `kept` (ascending) alone, under new numbers."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in experts.routers:
            result[name] = tensor[list(kept)].contiguous()
        elif name.startswith(f"{experts.module}."):
            number, _, rest = name.removeprefix(f"{experts.module}.").partition(".")
            if int(number) in kept:
                result[f"{experts.module}.{kept.index(int(number))}.{rest}"] = tensor
        else:
            result[name] = tensor
    return result


def _prune_blocks(context: RunContext, experts: Experts, writer: ModelWriter) -> Outcome:
    """Measure every block on the dense stream, and choose; the reported windows pass the smaller blocks too."""
    total = getattr(context.stock.config, experts.count_field)

    def visit(block: BlockLayout, state: PassState) -> Visited:
        started = time.perf_counter()
        tensors, module = load_block(context, block)
        if not _is_mixture(context.stock, block):
            _move(context, block, module, state, "dense", "pruned")
            return Visited(tensors=tensors, values={"kept": None})
        with context.meter.phase(Phase.PROPAGATE):
            found = measure_experts(module, experts, total, state.propagator, block.index, state.stores["dense"])
        del module
        kept: list[int] = found.keep(_num_kept(context, experts)).tolist()
        smaller = keep_experts(tensors, experts, kept)
        del tensors
        _move_pruned(context, experts, block, smaller, state)
        report = BlockReport(
            block=block.index,
            kind=KIND,
            num_units=total,
            kept_units=len(kept),
            error_mask_only=None,
            error=None,
            status="ok",
            statistics=_statistics(context, found, kept),
            objective=[],
            seconds=time.perf_counter() - started,
        )
        return Visited(tensors=smaller, values={"report": report.model_dump(mode="json"), "kept": kept})

    def replay(block: BlockLayout, line: Line, state: PassState) -> None:
        tensors, module = load_block(context, block)
        if line["kept"] is None:
            _move(context, block, module, state, "dense", "pruned")
            return
        _move(context, block, module, state, "dense")
        del module
        smaller = keep_experts(tensors, experts, line["kept"])
        del tensors
        _move_pruned(context, experts, block, smaller, state)

    def describe(block: BlockLayout, line: Line) -> str:
        return f"block {block.index} " + ("as it is" if line["kept"] is None else f"{len(line['kept'])}/{total}")

    def finish(state: PassState) -> dict[str, Tensor]:
        return {name: first_windows(context.ranks, store, context.num_probe) for name, store in state.stores.items()}

    result = run_pass(
        context,
        BlockPass(
            name="experts",
            journal=context.run.journal,
            stores={"dense": len(context.windows.ids_NS), "pruned": context.num_probe},
            visit=visit,
            replay=replay,
            finish=finish,
            describe=describe,
            writer=writer,
        ),
    )
    cut = [line for line in result.lines if line["kept"] is not None]
    return Outcome(
        reports=[BlockReport(**line["report"]) for line in cut],
        kept_indices={str(line["report"]["block"]): {KIND: line["kept"]} for line in cut},
        dense_NSD=result.final["dense"],
        pruned_NSD=result.final["pruned"],
        shares=counted_shares(context.recipe.sparsity, total),
    )


def _move_pruned(
    context: RunContext, experts: Experts, block: BlockLayout, smaller: Mapping[str, Tensor], state: PassState
) -> None:
    """Move the pruned stream over the block with the experts that stay."""
    cast = {name: tensor.to(context.device, context.dtype) for name, tensor in smaller.items()}
    module = context.stock.block(block.index, cast, _config(context, experts, block.index))
    _move(context, block, module, state, "pruned")


def _move(context: RunContext, block: BlockLayout, module: nn.Module, state: PassState, *streams: str) -> None:
    """Move these streams over the block."""
    with context.meter.phase(Phase.PROPAGATE):
        for name in streams:
            state.propagator.run(module, block.index, state.stores[name])


def _statistics(context: RunContext, found: Saliency, kept: Sequence[int]) -> dict[str, float]:
    """Say for the report what share of the saliency went, and how many experts got no tokens or few."""
    total = float(found.mean_E.sum())
    removed = 1 - float(found.mean_E[list(kept)].sum()) / total if total else 0.0
    counts = [ExpertTokens(sent=int(sent), enough=_ENOUGH_TOKENS) for sent in found.tokens_E]
    return {"saliency_removed": removed, **token_statistics(counts, context.num_measured_tokens)}


def _is_mixture(stock: StockModel, block: BlockLayout) -> bool:
    return stock.family.at(block.index).experts is not None


def _experts(stock: StockModel) -> Experts:
    experts = stock.family.mixture
    assert experts is not None
    return experts


def _num_kept(context: RunContext, experts: Experts) -> int:
    total: int = getattr(context.stock.config, experts.count_field)
    return total - num_to_remove(context.recipe.sparsity, total)


def _with_fewer(config: Mapping[str, Any], stock: StockModel, num_experts: int) -> dict[str, Any]:
    """Set config.json's number of experts, under the name that it has there: stock classes know an older one."""
    field = _experts(stock).count_field
    name = field if field in config else stock.config.attribute_map.get(field, field)
    return dict(config) | {name: num_experts}


def _config(context: RunContext, experts: Experts, index: int) -> Any:
    """Return the stock config of the block with the experts that remain."""
    config = copy.deepcopy(context.stock.block_configs[index])
    setattr(config, experts.count_field, _num_kept(context, experts))
    return config
