"""New producers for a pruned MLP, kept only if windows that they were not solved on are met better.

The consumer is solved from sums over all tokens. An iterative solver also moves gate and up, for which it needs tokens
themselves: it gets some windows, proposes, and the consumer is solved again behind the proposal.

Shape suffixes: B windows, S positions, D hidden size, T tokens, O outputs, I consumer inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from structprune.engine.layerwise.problem import layer_problem
from structprune.engine.layerwise.statistics import Reference, Streams, Sublayer, consumer_target, measure, stage_output
from structprune.engine.planning.shapes import solver_windows
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.propagate import observed, tapped
from structprune.solvers import SOLVERS
from structprune.solvers.mlp.block import MlpSolution, MlpTokens, MlpWeights
from structprune.solvers.mlp.updates import ACTIVATIONS, Affine
from structprune.types import BlockLayout, Moments, SolveResult, UnitGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """What became of a proposal."""

    tensors: dict[str, Tensor]
    """The block's tensors: with new producers and consumer, or those that were given."""
    objective: list[float]
    """Objective of the iterative solver, before its first step and after each."""
    statistics: dict[str, float]


def refine(
    context: RunContext, mlp: Sublayer, pruned: nn.Module, tensors: Mapping[str, Tensor], solved: SolveResult
) -> Refined:
    """Propose producers for the MLP of `pruned` (tensors: `tensors`) by the context's iterative solver, and judge them.

    Both are judged by the relative error on the held-out windows with the consumer solved on the others. The pruned
    stream is at the MLP's input. What it is to meet is the reference of `mlp`, the dense stream behind it, or without
    one what the MLP made of the pruned stream before units of it were removed.
    """
    (group,), block, streams = mlp.groups, mlp.block, mlp.streams
    group = replace(group, num_units=solved.weight_OK.shape[1] // group.width)
    num_solved = context.ranks.num_local(solver_windows(context.num_fitted, context.windows.ids_NS.shape[1]))
    reference = mlp.reference or stage_output(context, block, group, mlp.module, streams, streams.pruned, write=False)
    tokens = _tokens(context, block, group, pruned, streams, reference, num_solved)
    # Every rank has the same weights all along; the first one's count, whatever another kind of processor makes of it.
    propose = SOLVERS.get(context.solver).propose
    assert propose is not None
    proposed = _Proposal.of(propose(tokens, _weights(context, group, tensors)))
    proposal = context.ranks.broadcast(lambda: proposed)
    del tokens
    candidate = dict(tensors)
    for name, affine in ((group.up_module, proposal.up), (group.gate_module, proposal.gate)):
        if name is None or affine is None:
            continue
        weight_OI = affine.weight_OI.cpu().to(tensors[f"{name}.weight"].dtype)
        candidate[f"{name}.weight"] = weight_OI.movedim(0, _output_axis(group, name)).contiguous()
        if affine.bias_O is not None:
            candidate[f"{name}.bias"] = affine.bias_O.cpu().to(tensors[f"{name}.bias"].dtype)
    for name, tensor in candidate.items():
        pruned.get_parameter(name).data = tensor.to(context.device, context.dtype)
    proposed_mlp = Sublayer(block=block, groups=[group], module=pruned, streams=streams, reference=reference)
    measured = [measure(context, proposed_mlp, windows).get(group.name) for windows in context.window_sets]
    result = context.ranks.broadcast(lambda: _refitted(context, block, group, tensors, measured))
    before, after = solved.statistics["held_out_error"], result.statistics["held_out_error"]
    accepted = after < before
    if accepted:
        candidate[group.consumer.tensor] = result.weight_OK.movedim(-1, group.consumer.axis).contiguous()
    statistics = {f"{context.solver}_{name}": value for name, value in proposal.statistics.items()}
    return Refined(
        tensors=candidate if accepted else dict(tensors),
        objective=proposal.history,
        statistics={
            **statistics,
            f"{context.solver}_held_out_error": after,
            f"{context.solver}_accepted": float(accepted),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proposal:
    """What is tried of a solver's answer."""

    up: Affine
    gate: Affine | None
    history: list[float]
    statistics: Mapping[str, float]

    @classmethod
    def of(cls, solution: MlpSolution) -> _Proposal:
        up, gate = solution.weights.up, solution.weights.gate
        return cls(up=up, gate=gate, history=solution.history, statistics=dict(solution.statistics))


def _refitted(
    context: RunContext,
    block: BlockLayout,
    group: UnitGroup,
    tensors: Mapping[str, Tensor],
    measured: Sequence[Moments | None],
) -> SolveResult:
    """Refit the consumer behind the proposal, on the rank that has the sums."""
    problem = layer_problem(context, block, group, tensors, [part for part in measured if part is not None])
    keep_U = torch.ones(problem.num_units, dtype=torch.bool, device=problem.device)
    return SOLVERS.get(context.solver).solve(problem, keep_U).to(torch.device("cpu"))


def _tokens(
    context: RunContext,
    block: BlockLayout,
    group: UnitGroup,
    sublayer: nn.Module,
    streams: Streams,
    reference: Reference,
    num_windows: int,
) -> MlpTokens:
    """Collect the MLP's inputs and targets for this rank's first windows."""
    assert group.up_module is not None
    # A rank may have none.
    none_TD = torch.empty(0, context.stock.layout.hidden_size, device=context.device)
    inputs: list[Tensor] = [] if num_windows else [none_TD]
    targets: list[Tensor] = [] if num_windows else [none_TD]
    zeros = context.stock.adds_in_place(block.index, group.kind)
    for start, stop, hidden_BSD in streams.propagator.read(streams.pruned, 0, num_windows):
        wanted_BSD = reference(start, stop)
        with (
            context.stock.stage(sublayer, block.index, context.stock.stage_of(block.index, "mlp")),
            observed(sublayer, group.up_module, inputs.append),
            tapped(sublayer, group.consumer_module, lambda _: None, zeros=zeros),
        ):
            residual_BSD = streams.propagator.apply(sublayer, block.index, hidden_BSD)
        targets.append(consumer_target(group, sublayer, wanted_BSD, residual_BSD))
    return MlpTokens(
        x_TD=torch.cat(inputs).float(),
        y_TD=torch.cat(targets),
        add_up=context.ranks.all_reduce,
        num_holders=context.ranks.size,
    )


def _output_axis(group: UnitGroup, module: str) -> int:
    """Return the axis of the map's outputs: 0, or 1 where the weight is transposed."""
    return next(part.axis for part in group.producers if part.tensor == f"{module}.weight")


def _weights(context: RunContext, group: UnitGroup, tensors: Mapping[str, Tensor]) -> MlpWeights:
    """Return the pruned MLP in float32, without the consumer's bias, which is part of the target."""
    assert group.up_module is not None
    assert group.activation is not None

    def values(name: str) -> Tensor:
        return tensors[name].to(context.device, torch.float32)

    def affine(module: str) -> Affine:
        bias = f"{module}.bias"
        weight_OI = values(f"{module}.weight").movedim(_output_axis(group, module), 0).contiguous()
        return Affine(weight_OI=weight_OI, bias_O=values(bias) if bias in tensors else None)

    return MlpWeights(
        activation=ACTIVATIONS.get(group.activation),
        up=affine(group.up_module),
        gate=None if group.gate_module is None else affine(group.gate_module),
        down=Affine(weight_OI=values(group.consumer.tensor).movedim(group.consumer.axis, -1)),
    )
