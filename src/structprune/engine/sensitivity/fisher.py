"""The sensitivity pass: what each removal would cost the loss, measured on the dense model before anything is pruned.

The streamed backward pass (`backward_pass.py`) recomputes each block and brings the exact gradient of the loss to every
consumer's output. From the two come the Gram matrix of the consumer's inputs and the output sensitivity F = E[g g^T]
(labels sampled from the model: the true Fisher), and from those the removal costs that allocators read.

Shape suffixes: B windows, S positions, D hidden size, T tokens, U units, I consumer inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.calibration.store import HiddenStore
from structprune.engine.layerwise.problem import layer_problem
from structprune.engine.layerwise.statistics import token_scale
from structprune.engine.passes import BlockPass, PassState, Visited, run_pass
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.backward_pass import Found, backward_pass, on_host
from structprune.engine.sensitivity.store import Costs, SensitivityStore, block_files
from structprune.engine.sensitivity.text_scale import window_factors
from structprune.engine.streaming.backward import differentiate
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.propagate import Propagator, captured
from structprune.errors import NumericalError
from structprune.memory import release_free_memory
from structprune.phases import Phase, SublayerPhase
from structprune.scores import SCORES
from structprune.scores.selection import ascending, removal_path
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, Moments, Sensitivity, UnitGroup


def fisher_pass(context: RunContext, folder: Path) -> Costs:
    """Measure every block; sensitivities stay in `folder` for the pruning pass (`load_found`): kind -> F (O, O)."""

    def removal_costs(
        block: BlockLayout, propagator: Propagator, boundary: HiddenStore, gradient: HiddenStore, owner: int
    ) -> Callable[[], Found]:
        with context.meter.phase(Phase.SENSITIVITY_BACKWARD):
            measure = backward(context, block, propagator, boundary, gradient, owner)
        # Freed activations would otherwise stay in the heap, in holes that no matrix fits into.
        release_free_memory()

        def found() -> Found:
            measured = measure()
            return measured.sensitivity, _costs(context, block, measured)

        return found

    return backward_pass(context, folder, labels="sampled", backward=removal_costs)


def score_pass(context: RunContext, folder: Path) -> Costs:
    """Score every unit on the dense model, in one forward pass; ascending, as the lowest go first."""
    ranks = context.ranks

    def visit(block: BlockLayout, state: PassState) -> Visited:
        tensors, module = load_block(context, block)
        owner = block.index % ranks.size
        with context.meter.phase(Phase.SENSITIVITY_SCORES):
            sums = _measure(context, block, module, state.propagator, state.stores["hidden"], owner)
        task = owner, partial(_scores, context, block, tensors, sums)
        return Visited(files=block_files(block, {}, ranks.all_gather({block.index: task})[block.index]))

    with SensitivityStore(folder, context.observer.note, ranks) as sensitivities:
        stores = {"hidden": len(context.windows.ids_NS)}
        name = str(Phase.SENSITIVITY_SCORES)
        run_pass(context, BlockPass(name=name, journal=sensitivities.journal, stores=stores, visit=visit))
        return sensitivities.costs(context.stock.layout.blocks, context.kinds)


def _scores(
    context: RunContext, block: BlockLayout, tensors: Mapping[str, Tensor], sums: dict[str, GramAccumulator]
) -> dict[str, Tensor]:
    """Score the units of each kind, sorted ascending. The sums are used up."""
    found: dict[str, Tensor] = {}
    for group in context.groups(block):
        a = sums.pop(group.name)
        if a.num_tokens == 0:
            # An expert that no token is sent to: no removal costs anything.
            add_cost(found, group, torch.zeros(group.num_units, dtype=torch.float64))
            continue
        moments = moments_of(a, f"block {block.index} {group.name}", a.num_tokens)
        problem = layer_problem(context, block, group, tensors, [moments])
        add_cost(found, group, ascending(SCORES.get(context.score).score(problem), group.partitions))
    return on_host(found)


def add_cost(costs: dict[str, Tensor], group: UnitGroup, cost_U: Tensor) -> None:
    """Add what each removal costs to the sum over the sublayer's parts, which lose as many units each."""
    costs[group.kind] = costs[group.kind] + cost_U if group.kind in costs else cost_U


def _measure(
    context: RunContext, block: BlockLayout, module: nn.Module, propagator: Propagator, store: HiddenStore, owner: int
) -> dict[str, GramAccumulator]:
    """Run all windows through the dense block, and sum each consumer's inputs, by name; the store moves on.

    The sums are those of all ranks at `owner`; elsewhere there are none.
    """
    with summed_inputs(context, block, module) as sums:
        propagator.run(module, block.index, store)
    return _added_up(context, sums, owner)


def _added_up(context: RunContext, sums: Mapping[str, GramAccumulator], owner: int) -> dict[str, GramAccumulator]:
    for accumulator in sums.values():
        accumulator.reduce(context.ranks, owner)
    return dict(sums) if owner == context.ranks.rank else {}


@contextlib.contextmanager
def summed_inputs(context: RunContext, block: BlockLayout, module: nn.Module) -> Generator[dict[str, GramAccumulator]]:
    """Sum every consumer's inputs inside the context; before a norm they are scaled as the problem wants them."""
    sums = {group.name: context.accumulator(group.num_units * group.width) for group in context.groups(block)}

    def add(group: UnitGroup) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x_TI = args[0].detach().reshape(-1, args[0].shape[-1])
            if group.output_norm_eps is not None:
                x_TI = x_TI.float() / token_scale(output.detach(), group.output_norm_eps)
            sums[group.name].update(x_TI)

        return hook

    with contextlib.ExitStack() as stack:
        for group in context.groups(block):
            handle = module.get_submodule(group.consumer_module).register_forward_hook(add(group))
            stack.callback(handle.remove)
        yield sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one block's recomputation and its gradient leave."""

    moments: dict[str, Moments]
    """Name of the group -> sums of its consumer's inputs, over all tokens also where it is sent some of them."""
    sensitivity: dict[str, Tensor]
    """Kind -> F = E[g g^T], (O, O), g the gradient of the summed loss by the sublayer's output at one token.

    The experts of a mixture have one F, that of their sum: each adds to it without a factor between. Before a norm it
    is that of the output over its root mean square.
    """


def backward(
    context: RunContext,
    block: BlockLayout,
    propagator: Propagator,
    boundary: HiddenStore,
    gradient: HiddenStore,
    owner: int = 0,
) -> Callable[[], Measured]:
    """Move `gradient` from the block's output to its input; the sums of inputs and gradients on the way.

    What is returned makes them of the sums over all ranks, once, at `owner`.
    """
    _, module = load_block(context, block)
    sublayers = [block.group(kind) for kind in context.kinds if block.has(kind)]
    hidden_size = context.stock.layout.hidden_size
    gradients = {sublayer.kind: GramAccumulator(hidden_size, context.device) for sublayer in sublayers}
    outputs: dict[str, Tensor] = {}
    factors = iter(window_factors(context, gradient))

    def update(found: Sequence[Tensor]) -> None:
        factor = next(factors)
        for sublayer, grad_BSD in zip(sublayers, found, strict=True):
            grad_TD = grad_BSD.reshape(-1, hidden_size)
            if sublayer.output_norm_eps is not None:
                grad_TD = grad_TD.float() * token_scale(outputs[sublayer.kind].detach(), sublayer.output_norm_eps)
            gradients[sublayer.kind].update(grad_TD if factor == 1 else grad_TD.float() * factor)
        outputs.clear()

    def wanted() -> list[Tensor]:
        return [outputs[sublayer.kind] for sublayer in sublayers]

    with contextlib.ExitStack() as stack:
        sums = stack.enter_context(summed_inputs(context, block, module))
        for sublayer in sublayers:
            summed = sublayer.output_module or sublayer.consumer_module
            stack.enter_context(captured(module, summed, partial(outputs.__setitem__, sublayer.kind)))
        differentiate(context, block, module, propagator, boundary, gradient, wanted=wanted, receive=update)
    inputs, output_gradients = _added_up(context, sums, owner), _added_up(context, gradients, owner)
    return lambda: _measured(context, block, inputs, output_gradients)


def _measured(
    context: RunContext, block: BlockLayout, inputs: dict[str, GramAccumulator], gradients: dict[str, GramAccumulator]
) -> Measured:
    """Turn the sums, which are used up, into moments and sensitivities."""
    where = f"block {block.index}"
    return Measured(
        moments={
            group.name: moments_of(inputs.pop(group.name), f"{where} {group.name}", gradients[group.kind].num_tokens)
            for group in context.groups(block)
        },
        sensitivity={
            kind: a.finalize(f"gradient of {where} {kind}").div_(a.num_tokens) for kind, a in gradients.items()
        },
    )


def moments_of(accumulator: GramAccumulator, where: str, num_tokens: int) -> Moments:
    return Moments(sum_I=accumulator.sum_I, num_tokens=num_tokens, gram_II=accumulator.finalize(where))


def _costs(context: RunContext, block: BlockLayout, measured: Measured) -> dict[str, Tensor]:
    """Compute the loss that each removal adds, by greedy removal on the dense statistics, which are used up."""
    tensors = context.reader.read(block.shapes, block.prefix)
    result: dict[str, Tensor] = {}
    for group in context.groups(block):
        sensitivity = Sensitivity(sensitivity_OO=measured.sensitivity[group.kind])
        with context.meter.phase(SublayerPhase.REMOVAL_COSTS.of(group.kind)):
            problem = layer_problem(context, block, group, tensors, [measured.moments.pop(group.name)], sensitivity)
            # Prices are what this text says: shrinkage is for the choice of units, and makes the allocation worse.
            try:
                path = removal_path(replace(problem, shrinkage=0.0), group.num_units)
            except NumericalError as error:
                raise error.inside(f"block {block.index} {group.name}") from error
            add_cost(result, group, path.cost)
            del problem
    return result
