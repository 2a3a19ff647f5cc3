"""One run's inputs, decided and checked before the first weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from structprune.engine.run.device import DeviceMeter
from structprune.engine.streaming.model import StreamedModel
from structprune.kinds import Structure
from structprune.methods.method import Method, SensitivityKind
from structprune.observer import Observer, SilentObserver
from structprune.recipe import Recipe
from structprune.runs.directory import RunDirectory
from structprune.solvers import SOLVERS
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, UnitGroup

# Costs and selection come before the ridge is chosen; the prototype's value.
_DECISION_DAMPING = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext(StreamedModel):
    """Everything that a run of `prune` works by. Its recipe is resolved: no entry that has an effect is None."""

    source: str
    run: RunDirectory
    """Where the run leaves what is done; entered."""
    observer: Observer = field(default_factory=SilentObserver)
    recipe: Recipe
    method: Method
    kinds: tuple[str, ...]
    """Unit kinds in scope."""
    calibration_name: str
    num_probe: int
    """Windows whose perplexity is reported, dense and pruned."""
    started: float
    """`time.perf_counter()` at the start of the run."""
    shared: Path | None = None
    """Where the dense model's measurements are kept for other runs; None: only for this one."""
    device_meter: DeviceMeter = field(default_factory=DeviceMeter)

    def groups(self, block: BlockLayout) -> tuple[UnitGroup, ...]:
        """The groups in scope of one block; blocks of an unevenly pruned source differ, and may lack a sublayer."""
        return tuple(group for kind in self.kinds for group in block.groups_of(kind))

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the output's files: as in the source, or as our own modelling file needs it.

        transformers translates old names for its own classes only.
        """
        return name if self.recipe.structure == Structure.PER_LAYER else self.reader.stored_name(name)

    def accumulator(self, num_inputs: int, *, num_outputs: int = 0) -> GramAccumulator:
        """Of activations, where the plan has room for their sums."""
        apart = self.plan.device is not None and self.plan.device.sums == "host"
        device = torch.device("cpu") if apart else self.device
        return GramAccumulator(num_inputs, device, num_outputs=num_outputs, apart=apart)

    @property
    def solve_device(self) -> torch.device:
        """Where units are chosen and consumers solved."""
        on_device = self.plan.device is not None and self.plan.device.solves == "device"
        return self.device if on_device else torch.device("cpu")

    @property
    def damping(self) -> float:
        """The ridge of the decision, and of the solver unless it is chosen on held-out windows."""
        assert self.recipe.damping is not None
        return _DECISION_DAMPING if self.recipe.damping == "auto" else self.recipe.damping

    @property
    def shrinkage(self) -> float:
        """The recipe's, resolved from the method's where it was not given."""
        assert self.recipe.shrinkage is not None
        return self.recipe.shrinkage

    @property
    def score(self) -> str:
        """The recipe's score or selector, resolved from the method's where it was not given."""
        assert self.recipe.score is not None
        return self.recipe.score

    @property
    def solver(self) -> str:
        """The recipe's solver, resolved from the method's where it was not given."""
        assert self.recipe.solver is not None
        return self.recipe.solver

    @property
    def sensitivity(self) -> SensitivityKind:
        """What is measured on the dense model first."""
        assert self.recipe.allocator is not None
        return self.method.sensitivity_for(self.recipe.allocator)

    @property
    def adds_bias(self) -> bool:
        """Whether the solver adds to the consumers' biases."""
        return "biases" in SOLVERS.get(self.solver).changes

    @property
    def protected(self) -> tuple[int, int]:
        """Blocks at the start and at the end that lose nothing."""
        assert self.recipe.protect_first is not None
        assert self.recipe.protect_last is not None
        return self.recipe.protect_first, self.recipe.protect_last

    @property
    def num_held_out(self) -> int:
        """Windows, the last ones, whose sums are kept apart to choose the ridge; 0 where it is given."""
        return max(1, len(self.windows.ids_NS) // 4) if self.recipe.damping == "auto" else 0

    @property
    def window_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first, last) of this rank's windows that are fitted, and of those held out if there are any."""
        num_windows = len(self.windows.ids_NS)
        fitted, held_out = (
            self.ranks.local_range(0, self.num_fitted),
            self.ranks.local_range(self.num_fitted, num_windows),
        )
        return (fitted, held_out) if self.num_held_out else (fitted,)

    @property
    def num_fitted(self) -> int:
        """Windows, the first ones, that are not held out."""
        return len(self.windows.ids_NS) - self.num_held_out

    @property
    def num_backward(self) -> int:
        """Windows, the first ones, of the streamed backward pass, or of measured losses."""
        assert self.recipe.sensitivity_samples is not None
        return min(self.recipe.sensitivity_samples, len(self.windows.ids_NS))

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states of all windows are kept beside the pruned ones."""
        return self.recipe.target == "dense-path"
