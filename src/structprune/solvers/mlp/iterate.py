"""The one loop of all iterative solvers (after optimistix): a solver is data, three functions of its own state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from structprune.errors import NumericalError

State = TypeVar("State")
IterateStatus = Literal["converged", "iteration-limit", "objective-rose"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IterativeSolver(Generic[State]):
    """What one method brings to the loop."""

    name: str
    init: Callable[[], State]
    step: Callable[[State], State]
    """May reuse the large buffers of the state it is given; what the caller reads from the best state must survive."""
    objective: Callable[[State], float]
    """Read once per state. Lower is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterateOptions:
    """When the loop stops. A change within `rtol * |best| + atol` is none: neither progress nor a rise."""

    max_iterations: int = 8
    rtol: float = 1e-4
    atol: float = 0.0
    patience: int = 2
    """Iterations in a row without progress before the loop stops."""
    rise_stops: bool = True
    """False for methods that need not descend (scaled duals): a rise is then an iteration without progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterated(Generic[State]):
    """The state of the lowest objective, and how the loop ended."""

    best: State
    history: list[float]
    """The objective of the initial state and after every step, also after one that was thrown away."""
    status: IterateStatus


def iterate(solver: IterativeSolver[State], options: IterateOptions) -> Iterated[State]:
    """Step until no progress ("converged"), a rise or a value that is not finite ("objective-rose"), or the limit.

    Raises NumericalError if the objective of the initial state is not finite.
    """
    state = best = solver.init()
    lowest = solver.objective(state)
    history = [lowest]
    if not math.isfinite(lowest):
        raise NumericalError("the objective is not finite at the start", where=solver.name, got=lowest)
    num_idle = 0
    for _ in range(options.max_iterations):
        state = solver.step(state)
        value = solver.objective(state)
        history.append(value)
        slack = options.rtol * abs(lowest) + options.atol
        rose = not value <= lowest + slack  # NaN counts as a rise
        num_idle = 0 if value < lowest - slack else num_idle + 1
        if value < lowest:
            best, lowest = state, value
        if rose and (options.rise_stops or not math.isfinite(value)):
            return Iterated(best=best, history=history, status="objective-rose")
        if num_idle >= options.patience:
            return Iterated(best=best, history=history, status="objective-rose" if rose else "converged")
    return Iterated(best=best, history=history, status="iteration-limit")
