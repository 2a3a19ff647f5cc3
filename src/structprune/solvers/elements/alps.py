"""ALPS: the mask and the weights together, by ADMM (arXiv 2406.07831, algorithm 1 and section 3.2).

In unit coordinates, A the damped Gram and B0 the wanted weight, min |.|_A^2 over V = D with zeros in D:

    B <- (B0 A - V + rho D)(A + rho I)^-1;     D <- the largest of B + V / rho;     V <- V + rho (B - D)

rho grows the faster the more of the mask still changes; when nothing changes the mask is that of B, and conjugate
gradients refit the weights on it. Published code keeps the eigenvectors of A and four matrices of the weight's size.
Here, with the same iterates:

- A + rho I is inverted anew, in one square, for each of about ten values of rho;
- with P = B + V / rho the new V is rho P where nothing stays, and the new D is P where something does: one matrix and
  its mask are the state;
- B0 A (A + rho I)^-1 = B0 - rho B0 (A + rho I)^-1, so neither A nor B0 A is there while rho is;
- some rows are worked on after the others, except for the mask where the pattern counts over the whole matrix.

Shape suffixes: I inputs, O outputs, S some of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.errors import NumericalError
from structprune.linalg.cholesky import factored, inverted
from structprune.patterns import Pattern, sparse
from structprune.solvers.elements.problem import Pruner, SparseProblem, SparseSolution
from structprune.solvers.elements.unit import UnitWeight, damped_gram, group_bytes, refit_bytes, refit_rows, row_groups

_RHO, _MOST_RHO = 0.1, 1e6
_EVERY, _SETTLED_AFTER, _SETTLED = 3, 30, 3e-4
MOST_STEPS = 300
_BUFFERS = 16 * 2**20


@dataclass(slots=True, kw_only=True)
class _State:
    """Where the iteration is: B + V / rho of the last step, and what of it stays."""

    point_OI: Tensor
    keep_OI: Tensor
    checked_OI: Tensor
    """What stayed at the last check."""
    pattern: Pattern
    rho: float = _RHO
    before: float = 0.0
    """rho of the last step; 0 in front of the first, where V is zero."""
    raised: bool = False

    @classmethod
    def at_start(cls, wanted: UnitWeight, pattern: Pattern) -> _State:
        outputs, inputs = wanted.source_OI.shape
        point_OI = torch.empty(outputs, inputs, dtype=wanted.dtype, device=wanted.source_OI.device)
        keep_OI = torch.empty(outputs, inputs, dtype=torch.bool, device=point_OI.device)
        state = cls(point_OI=point_OI, keep_OI=keep_OI, checked_OI=torch.empty_like(keep_OI), pattern=pattern)
        state.restart(wanted)
        return state

    def restart(self, wanted: UnitWeight) -> None:
        """Begin again with V = 0 and the largest of B0."""
        self.before = 0.0
        for part in row_groups(*self.point_OI.shape):
            self.point_OI[part] = wanted.rows(part)
        self.choose()
        self.checked_OI.copy_(self.keep_OI)

    def step(self, wanted: UnitWeight, inverse_II: Tensor) -> None:
        """Update B, then D and V."""
        for part in row_groups(*self.point_OI.shape):
            dual_SI = self.solve(wanted, inverse_II, part)
            self.point_OI[part] += dual_SI
            if self.pattern.by_rows:
                self.keep_OI[part] = self.pattern.keep_largest(self.point_OI[part])
        if not self.pattern.by_rows:
            self.choose()
        self.before = self.rho

    def solve(self, wanted: UnitWeight, inverse_II: Tensor, part: slice) -> Tensor:
        """Put B of some rows in the place of the last point, and return V / rho."""
        point_SI = self.point_OI[part]
        kept_SI = point_SI * self.keep_OI[part]
        dual_SI = (point_SI - kept_SI).mul_(self.before / self.rho)
        base_SI = wanted.rows(part)
        right_SI = kept_SI.sub_(dual_SI).sub_(base_SI)
        torch.addmm(base_SI, right_SI, inverse_II, alpha=self.rho, out=point_SI)
        return dual_SI

    def choose(self) -> None:
        """Choose what stays of all rows."""
        if not self.pattern.by_rows:
            self.keep_OI = self.pattern.keep_largest(self.point_OI)
            return
        for part in row_groups(*self.point_OI.shape):
            self.keep_OI[part] = self.pattern.keep_largest(self.point_OI[part])

    def num_changed(self) -> int:
        """Count what has changed since the last check, which this is from now on."""
        changed = sum(
            int((self.keep_OI[part] ^ self.checked_OI[part]).count_nonzero())
            for part in row_groups(*self.keep_OI.shape)
        )
        self.checked_OI.copy_(self.keep_OI)
        return changed


def prune_alps(problem: SparseProblem) -> SparseSolution:
    """Choose and solve one matrix. Raises NumericalError for a Gram that is not finite."""
    wanted = UnitWeight.of(problem)
    state = _State.at_start(wanted, problem.pattern)
    num_kept = max(1, int(state.keep_OI.count_nonzero()))
    inverse_II, steps = _inverse(problem, state.rho), 0
    for steps in range(1, MOST_STEPS + 1):
        state.step(wanted, inverse_II)
        if steps % _EVERY:
            continue
        if _checked(state, wanted, state.num_changed() / num_kept, steps):
            break
        if state.rho != state.before:
            # Before the next one is made.
            del inverse_II
            inverse_II = _inverse(problem, state.rho)
    # B once more: its largest are the mask.
    for part in row_groups(*state.point_OI.shape):
        state.solve(wanted, inverse_II, part)
    del inverse_II
    state.choose()
    answer_OI, keep_OI = state.point_OI, state.keep_OI
    del state
    for part in row_groups(*keep_OI.shape):
        answer_OI[part] = sparse(answer_OI[part], keep_OI[part])
    return SparseSolution(
        weight_OI=refit_rows(problem, wanted, keep_OI, answer_OI), keep_OI=keep_OI, statistics={"steps": float(steps)}
    )


def _inverse(problem: SparseProblem, rho: float) -> Tensor:
    """Invert A + rho I, whose condition is at most I / rho, in one square."""
    shifted_II = damped_gram(problem)
    shifted_II.diagonal().add_(rho)
    factor_II, definite = factored(shifted_II)
    if not definite:
        raise NumericalError("the Gram matrix is indefinite", got=f"rho {rho:g}", do="raise --damping")
    return inverted(factor_II)


def _checked(state: _State, wanted: UnitWeight, changed: float, steps: int) -> bool:
    """Set rho by what share of the mask has changed since the last check; True where the iteration is at its end."""
    if steps >= _SETTLED_AFTER and changed < _SETTLED:
        return True
    if changed == 0 and state.raised:
        return True
    if changed > 0.005 or (changed and state.raised):
        factor = 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
        state.rho, state.raised = min(_MOST_RHO, state.rho * factor), True
        return False
    state.rho /= 5
    if changed:
        # It began too high: from the start again.
        state.restart(wanted)
    return False


def workspace(inputs: int, outputs: int) -> int:
    """Count the inverse or A, the state with its masks, some rows, and what products work with: bytes."""
    admm = inputs**2 * 4 + inputs * outputs * (4 + 4) + group_bytes(inputs, outputs, 10) + _BUFFERS
    return max(admm, refit_bytes(inputs, outputs) + _BUFFERS)


ALPS = Pruner(prune=prune_alps, reads=frozenset({"gram"}), workspace=workspace)
