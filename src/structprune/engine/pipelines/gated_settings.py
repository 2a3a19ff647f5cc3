"""Whether gates can learn which units stay, and what the planner has to know of them."""

from __future__ import annotations

from collections.abc import Sequence

from structprune.allocation.gates import gates_of
from structprune.engine.planning.plan import PlannedGates
from structprune.errors import InputError, UnsupportedError
from structprune.methods.method import Method, SensitivityKind
from structprune.recipe.units import ResolvedUnits
from structprune.types import UnitGroup


def check_gates(recipe: ResolvedUnits, method: Method, groups: Sequence[UnitGroup]) -> None:
    """Raise UnsupportedError where gates have no start or no place, InputError where they have no windows."""
    if gates_of(recipe.gates) is None:
        return
    if method.sensitivity_for(recipe.allocator) is not SensitivityKind.LOSS:
        raise UnsupportedError(
            "gates begin with what each removal costs the loss, which nothing measures here",
            got=f"--gates {recipe.gates}, --method {method.name}, --allocator {recipe.allocator}",
            wanted="--method structprune, or --allocator closed-form",
        )
    if recipe.num_samples < 2:
        raise InputError(
            "one window cannot both teach the gates and measure them",
            got=f"--gates {recipe.gates}, --num-samples {recipe.num_samples}",
            wanted="at least 2 for --num-samples",
        )
    if any(group.expert is not None for group in groups):
        raise UnsupportedError("the experts of a mixture have no gates", got=f"--gates {recipe.gates}")
    if any(group.partitions > 1 for group in groups):
        raise UnsupportedError(
            "every KV head keeps as many units here, which gates do not",
            got=f"--gates {recipe.gates}, --head-units {recipe.head_units}",
            wanted="--head-units kv-group",
        )


def planned_gates(recipe: ResolvedUnits) -> PlannedGates | None:
    """Return what gates will do; None where there are none."""
    gates = gates_of(recipe.gates)
    if gates is None:
        return None
    return PlannedGates(steps=recipe.gates_steps, sets=gates.num_sets, backward=gates.uses_gradient)
