"""How long measuring and solving the maps of a block takes on this machine, where single weights get zeros.

Maps are solved on problems of some hundred inputs, and their time is extended from there.

Shape suffixes: B windows, S positions, D hidden size, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from structprune.architectures.stock.maps import InputGroup, MapStep, map_steps
from structprune.architectures.stock.model import StockModel
from structprune.methods import METHODS
from structprune.patterns import Pattern, as_pattern
from structprune.recipe import ResolvedRecipe
from structprune.recipe.elements import ResolvedElements
from structprune.solvers.elements import PRUNERS, UPDATES
from structprune.solvers.elements.problem import SparseProblem
from structprune.solvers.elements.unit import chosen_damping, squared_error, wanted_energy
from structprune.types import BlockLayout, Moments, UnitKind

_MOST_INPUTS = 512
_DAMPING = 1e-2
# Experts that a token is sent to.
_PARTS_PER_TOKEN = 2


class _ReachedError(Exception):
    """Raised by a hook: the maps are reached."""


def extrapolated(smaller: tuple[int, float], larger: tuple[int, float], width: int) -> float:
    """Find the time at a larger width from two times, each with its width.

    Matrices are passed over and multiplied: it is a n^2 + b n^3 through both, neither term negative.
    """
    (n, first), (m, second) = smaller, larger
    cubic = (second / m**2 - first / n**2) / (m - n) if m > n else second / m**3
    cubic = min(max(0.0, cubic), second / m**3)
    return (second / m**2 + cubic * (width - m)) * width**2


@dataclass(frozen=True, slots=True, kw_only=True)
class MapTrials:
    """Trials of the maps of one kind of sublayer, in one block."""

    stock: StockModel
    recipe: ResolvedRecipe
    block: BlockLayout
    kind: UnitKind
    device: torch.device

    @property
    def steps(self) -> list[MapStep]:
        """The steps of the sublayer."""
        return [step for step in map_steps(self.stock, [self.kind])[self.block.index] if step.kind == self.kind]

    @property
    def inputs(self) -> list[int]:
        """How many inputs the groups have that one token passes."""
        found: list[int] = []
        for step in self.steps:
            found += [self._shape(group.maps[0])[1] for group in step.groups[:_PARTS_PER_TOKEN]]
        return found

    def up_to(
        self, module: nn.Module, step: MapStep, forward: Callable[[nn.Module, int], Callable[[], object]], tokens: int
    ) -> Callable[[], object]:
        """Return what passes so many tokens through the block's stage up to the maps of a step."""
        run = forward(module, tokens)

        def leave(*_: object) -> None:
            raise _ReachedError

        def reached() -> None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.stock.stage(module, self.block.index, step.stage))
                # Of experts all are measured in one pass, which goes to its end.
                if len(step.groups) == 1:
                    place = module.get_submodule(step.groups[0].maps[0])
                    stack.callback(place.register_forward_pre_hook(leave).remove)
                with contextlib.suppress(_ReachedError):
                    run()

        return reached

    def solves(self, seconds: Callable[[Callable[[], object]], float]) -> float:
        """Time all maps of the sublayer, those of one shape once."""
        groups: Sequence[InputGroup] = [group for step in self.steps for group in step.groups]
        shapes = Counter(self._shape(name) for group in groups for name in group.maps)
        return sum(count * self._solve(shape, seconds) for shape, count in shapes.items())

    def _solve(self, shape: tuple[int, int], seconds: Callable[[Callable[[], object]], float]) -> float:
        if shape[1] <= _MOST_INPUTS:
            return seconds(partial(self._pruned, *shape))
        half, full = (
            (inputs, seconds(partial(self._pruned, max(1, shape[0] * inputs // shape[1]), inputs)))
            for inputs in (self._whole_groups(_MOST_INPUTS // 2), self._whole_groups(_MOST_INPUTS))
        )
        return extrapolated(half, full, shape[1])

    def _whole_groups(self, inputs: int) -> int:
        group = self._pattern().group
        return max(group, inputs // group * group)

    def _pattern(self) -> Pattern:
        assert isinstance(self.recipe, ResolvedElements)
        method = METHODS.get(self.recipe.method).in_pipeline(self.recipe.pipeline)
        return as_pattern(self.recipe.pattern, self.recipe.sparsity, method.counts)

    def _pruned(self, outputs: int, inputs: int) -> Tensor:
        """Choose and solve one map of numbers without a meaning, and judge it, as a run does."""
        recipe = self.recipe
        assert isinstance(recipe, ResolvedElements)
        method = METHODS.get(recipe.method).in_pipeline(recipe.pipeline)
        pruner, update = PRUNERS.get(method.score), UPDATES.get(recipe.solver)
        weight_OI = torch.randn(outputs, inputs, device=self.device)
        x_TI = torch.randn(inputs, inputs, device=self.device)
        gram_II = x_TI.T @ x_TI
        moments = Moments(gram_II=gram_II, num_tokens=inputs, sum_I=x_TI.sum(dim=0, dtype=torch.float64))
        if recipe.follows_dense:
            moments = replace(moments, target_OI=weight_OI @ gram_II, target_energy=1.0)
        problem = SparseProblem(
            weight_OI=weight_OI,
            pattern=self._pattern(),
            moments=moments,
            damping=_DAMPING,
            energy_NI=gram_II.diagonal().expand(recipe.num_samples, inputs) / inputs,
        )
        if recipe.chooses_ridge:
            chosen_damping(problem, moments)
        answer = update.solve(problem, pruner.prune(problem))
        if "gram" in pruner.reads | update.reads:
            for weight in (weight_OI * answer.keep_OI, answer.weight_OI):
                squared_error(weight, problem, moments)
            wanted_energy(problem, moments)
        return answer.weight_OI

    def _shape(self, name: str) -> tuple[int, int]:
        """Return (outputs, inputs) of a map."""
        first, second = self.block.shapes[f"{name}.weight"]
        return (second, first) if self.stock.family.inputs_first else (first, second)
