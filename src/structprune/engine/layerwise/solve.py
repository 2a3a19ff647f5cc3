"""One group of units of a block: what was measured of it -> the units that stay, and the consumer solved for them.

Shape suffixes: T tokens, U units, I consumer inputs, O outputs, K kept inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.architectures.units import add_bias, compact
from structprune.engine.layerwise.few_tokens import ExpertTokens, with_missing_tokens
from structprune.engine.layerwise.problem import layer_problem
from structprune.engine.run.context import RunContext
from structprune.errors import NumericalError
from structprune.linalg.gram_products import fitting_error, output_energy
from structprune.memory import release_free_memory
from structprune.scores import SCORES, SELECTORS
from structprune.scores.selection import decision_objective, keep_best, removal_path
from structprune.scores.weights import MAGNITUDE
from structprune.solvers import SOLVERS
from structprune.types import BlockLayout, LayerProblem, Moments, Sensitivity, SolveResult, UnitGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedGroup:
    """One group of a sublayer, decided and solved."""

    keep_units: Tensor
    result: SolveResult
    errors: tuple[float, float, float] | None
    statistics: dict[str, float]
    cost_U: Tensor | None
    tokens: ExpertTokens | None
    """Tokens that an expert was sent; None for what every token passes."""

    def written(self) -> SolvedGroup:
        """Return the same without the consumer's weights, which are in the block's tensors by now."""
        return replace(self, result=replace(self.result, weight_OK=self.result.weight_OK.new_empty(0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to stay of one group."""

    num_keep: int
    units: Sequence[int] | None = None
    """Which units, where that is given; None: the score or selector chooses them."""

    def mask_U(self, problem: LayerProblem) -> Tensor | None:
        """Return the given units as a mask."""
        if self.units is None:
            return None
        keep_U = torch.zeros(problem.num_units, dtype=torch.bool, device=problem.device)
        keep_U[list(self.units)] = True
        return keep_U


def solve_cost(block: BlockLayout, group: UnitGroup) -> float:
    """Estimate a problem's time in multiplications: a factorisation, and products as wide as the outputs."""
    inputs = group.num_units * group.width
    return inputs**3 + inputs * math.prod(block.shapes[group.consumer.tensor])


def solve_group(
    context: RunContext,
    block: BlockLayout,
    group: UnitGroup,
    tensors: Mapping[str, Tensor],
    wanted: Wanted,
    measured: list[Moments],
    sensitivity: Sensitivity | None,
    *,
    measure_costs: bool,
) -> SolvedGroup:
    """Decide and solve one group, on one rank. Takes what was measured: the list is empty afterwards."""
    measured_problem = layer_problem(context, block, group, tensors, measured, sensitivity)
    tokens = ExpertTokens.of(group, measured, measured_problem)
    problem = with_missing_tokens(measured_problem) if tokens is not None and measured else measured_problem
    statistics = _context(measured_problem, measured)
    # The problem has them in its own order, or as they are.
    measured.clear()
    try:
        keep_U, result = _decide(context, problem, wanted, by_weights=tokens is not None and tokens.sent == 0)
        statistics |= _decision_objectives(context, problem, keep_U)
    except NumericalError as error:
        # Scores and solvers see a matrix, not where it is from.
        raise error.inside(f"block {block.index} {group.name}") from error
    errors = _squared_errors(measured_problem, keep_U, result) if context.method.needs_statistics else None
    cost_U = _removal_costs(problem, tokens) if measure_costs else None
    # Wherever it was solved, it is written from the host.
    return SolvedGroup(
        keep_units=torch.nonzero(keep_U).flatten().cpu(),
        result=result.to(torch.device("cpu")),
        errors=errors,
        statistics=statistics | dict(result.statistics),
        cost_U=cost_U,
        tokens=tokens,
    )


def _removal_costs(problem: LayerProblem, tokens: ExpertTokens | None) -> Tensor:
    """Measure what each removal adds to the loss: nothing where no token comes by."""
    if tokens is not None and tokens.sent == 0:
        return torch.zeros(problem.num_units, dtype=torch.float64)
    return removal_path(problem, problem.num_units).cost.cpu()


def with_group(tensors: Mapping[str, Tensor], group: UnitGroup, part: SolvedGroup) -> dict[str, Tensor]:
    """Return the block's tensors with the group cut, and its consumer as it was solved."""
    cut = compact(tensors, group, part.keep_units)
    # Solved unit after unit; in the tensor the kept inputs keep their order.
    order_K = torch.argsort(group.consumer.indices(part.keep_units))
    cut[group.consumer.tensor] = part.result.weight_OK[:, order_K].movedim(-1, group.consumer.axis).contiguous()
    return cut if part.result.bias_O is None else add_bias(cut, group, part.result.bias_O)


def _context(problem: LayerProblem, measured: Sequence[Moments]) -> dict[str, float]:
    """Collect the report's context of the sublayer: energies per token and how much the loss depends on it."""
    found: dict[str, float] = {}
    total = problem.total()
    if total.num_tokens and measured:
        found["residual_energy"] = total.residual_energy / total.num_tokens
    if total.num_tokens and total.target_energy is not None:
        found["target_energy"] = total.target_energy / total.num_tokens
    if problem.sensitivity_OO is not None:
        found["sensitivity"] = float(problem.sensitivity_OO.diagonal().sum(dtype=torch.float64))
    return found


def _decide(
    context: RunContext, problem: LayerProblem, wanted: Wanted, *, by_weights: bool
) -> tuple[Tensor, SolveResult]:
    """Choose the units unless they are given, solve the consumer."""
    keep_U = wanted.mask_U(problem)
    if keep_U is None:
        keep_U = _chosen(context, problem, wanted.num_keep, by_weights=by_weights)
    release_free_memory()
    result = SOLVERS.get(context.solver).solve(problem, keep_U)
    if not torch.isfinite(result.weight_OK).all():
        raise NumericalError("the solver's weight is not finite", do="raise --damping")
    return keep_U, result


def _chosen(context: RunContext, problem: LayerProblem, num_keep: int, *, by_weights: bool) -> Tensor:
    """Choose the units that stay. Gradients that no token gave are zero: then the weights decide."""
    if context.score in SELECTORS:
        return SELECTORS.get(context.score).keep(problem, num_keep)
    score = SCORES.get(context.score)
    if by_weights and "gradients" in score.reads:
        score = MAGNITUDE
    score_U = score.score(problem)
    if not torch.isfinite(score_U).all():
        raise NumericalError("a score is not finite", do="the source checkpoint may be damaged")
    return keep_best(score_U, num_keep, problem.partitions)


def _decision_objectives(context: RunContext, problem: LayerProblem, keep_U: Tensor) -> dict[str, float]:
    """Compare the objective of the search for units with that of as many units by their own output energy.

    A search in units of the loss has another objective, and two factorisations would cost more than they tell.
    """
    if context.score not in SELECTORS or problem.sensitivity_OO is not None or bool(keep_U.all()):
        return {}
    ranked_U = keep_best(SCORES.get("l2").score(problem), int(keep_U.sum()), problem.partitions)
    return {
        "decision_objective_l2": decision_objective(problem, ranked_U),
        "decision_objective": decision_objective(problem, keep_U),
    }


def _squared_errors(problem: LayerProblem, keep_U: Tensor, result: SolveResult) -> tuple[float, float, float]:
    """Compute the squared errors of the cut weight and of the solved one, and the target's energy, over all tokens."""
    kept_K = problem.kept_inputs(keep_U)
    total = problem.total()
    energy = total.target_energy
    if energy is None:
        energy = output_energy(problem.weight_OI, total.gram_II)
    if energy <= 0:
        return 0.0, 0.0, 0.0
    given = (kept_K, problem.weight_OI, total.gram_II, total.target_OI, energy)
    if total.target_OI is None:
        # What the removed inputs gave, and no other product.
        removed_P = problem.kept_inputs(~keep_U)
        before = output_energy(problem.weight_OI[:, removed_P], total.gram_II, removed_P)
    else:
        before = fitting_error(problem.weight_OI[:, kept_K], *given)
    after = fitting_error(result.weight_OK, *given)
    if result.bias_O is not None:
        # The bias is the mean of what is missing, so it takes exactly its own energy away.
        after = max(0.0, after - total.num_tokens * float(result.bias_O.square().sum(dtype=torch.float64)))
    return before, after, energy
