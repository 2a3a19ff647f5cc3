"""One run's inputs, decided and checked before the first weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from structprune.checkpoint.writer import FileForm, ModelWriter
from structprune.engine.run.device import DeviceMeter
from structprune.engine.streaming.model import StreamedModel
from structprune.methods.method import Method, SensitivityKind
from structprune.observer import Observer, SilentObserver
from structprune.recipe import ResolvedRecipe
from structprune.recipe.repaired import objective_of
from structprune.recipe.units import ResolvedUnits
from structprune.results.gates import GatesReport
from structprune.results.schema import RepairReport
from structprune.runs.directory import RunDirectory
from structprune.solvers import SOLVERS
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, UnitGroup, UnitKind

# Costs and selection come before the ridge is chosen; the prototype's value.
_DECISION_DAMPING = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What a repair leaves."""

    writer: ModelWriter
    """The shards that count: new ones, or those that were there where nothing helped."""
    pruned_NSD: Tensor | None
    """New last hidden states of the reported windows; None: they are as they were."""
    config: Mapping[str, Any]
    """What config.json says of the shards that count."""
    report: RepairReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """One way in which a pruned model learns from the dense one before it is written."""

    run: Callable[[RunContext, ModelWriter, Mapping[str, Any]], Repaired]
    """(run, shards of the pruned model, its config). Raises NumericalError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What is left of the units when gates have learned."""

    widths: dict[str, list[int]]
    """Kind -> units that each block keeps."""
    units: Sequence[Mapping[str, Sequence[int]]]
    """Units that stay of each group, by block and name; empty where nothing helped: then the method chooses."""
    report: GatesReport


ChooseUnits = Callable[["RunContext", Mapping[str, list[Tensor]], Mapping[str, list[int]], Path], Chosen]
"""(run, costs of all removals, widths, folder of the sensitivity pass) -> the units that stay.

Raises NumericalError."""


Resolved = TypeVar("Resolved", bound=ResolvedRecipe)
WindowRanges = Sequence[tuple[int, int]]
"""(first, last) of stretches of windows."""


def stretches(numbers: Sequence[int]) -> WindowRanges:
    """Return (first, last) of the longest stretches without a gap that ascending numbers fall into."""
    starts = [place for place, number in enumerate(numbers) if not place or number != numbers[place - 1] + 1]
    stops = [*starts[1:], len(numbers)][: len(starts)]
    return [(numbers[start], numbers[stop - 1] + 1) for start, stop in zip(starts, stops, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext(StreamedModel):
    """Everything that a run of `prune` works by."""

    source: str
    run: RunDirectory
    """Where the run leaves what is done; entered."""
    observer: Observer = field(default_factory=SilentObserver)
    recipe: ResolvedRecipe
    method: Method
    kinds: tuple[UnitKind, ...]
    """Unit kinds in scope."""
    calibration_name: str
    num_probe: int
    """Calibration windows, the first ones, whose perplexity is reported, dense and pruned: in-sample."""
    started: float
    """`time.perf_counter()` at the start of the run."""
    repair: Repair | None = None
    """What learns behind the last block; None: nothing does."""
    choose_units: ChooseUnits | None = None
    """What chooses units through the whole model before any block is cut; None: nothing does."""
    shared: Path | None = None
    """Where the dense model's measurements are kept for other runs; None: only for this one."""
    device_meter: DeviceMeter = field(default_factory=DeviceMeter)

    def groups(self, block: BlockLayout) -> tuple[UnitGroup, ...]:
        """Return the groups in scope of one block; blocks of an unevenly pruned source may lack a sublayer."""
        return tuple(group for kind in self.kinds for group in block.groups_of(kind))

    @property
    def file_form(self) -> FileForm:
        """How tensors lie in the output's files."""
        return self.stock.file_form(per_layer=self.recipe.per_layer)

    def accumulator(self, num_inputs: int, *, num_outputs: int = 0) -> GramAccumulator:
        """Create an accumulator of activations where the plan has room for their sums."""
        apart = self.plan.device is not None and self.plan.device.sums == "host"
        device = torch.device("cpu") if apart else self.device
        return GramAccumulator(num_inputs, device, num_outputs=num_outputs, apart=apart)

    @property
    def solve_device(self) -> torch.device:
        """Where units are chosen and consumers solved."""
        on_device = self.plan.device is not None and self.plan.device.solves == "device"
        return self.device if on_device else torch.device("cpu")

    def settings(self, kind: type[Resolved]) -> Resolved:
        """Return the recipe as that of one pipeline. Raises TypeError in a run of another."""
        if not isinstance(self.recipe, kind):
            raise TypeError(f"a run of {type(self.recipe).__name__} has no {kind.__name__}")
        return self.recipe

    @property
    def damping(self) -> float:
        """The ridge of the decision, and of the solver unless it is chosen on windows kept apart."""
        damping = self.settings(ResolvedUnits).damping
        return _DECISION_DAMPING if damping == "auto" else damping

    @property
    def shrinkage(self) -> float:
        """The share of the correlations between units that greedy removal does not count on."""
        return self.settings(ResolvedUnits).shrinkage

    @property
    def score(self) -> str:
        """The name of the score or selector."""
        return self.settings(ResolvedUnits).score

    @property
    def solver(self) -> str:
        """The name of the solver."""
        return self.settings(ResolvedUnits).solver

    @property
    def sensitivity(self) -> SensitivityKind:
        """What is measured on the dense model first."""
        return self.method.sensitivity_for(self.settings(ResolvedUnits).allocator)

    @property
    def adds_bias(self) -> bool:
        """Whether the solver adds to the consumers' biases."""
        return "biases" in SOLVERS.get(self.solver).changes

    @property
    def protected(self) -> tuple[int, int]:
        """Blocks at the start and at the end that lose nothing."""
        return self.recipe.protected

    @property
    def num_validation(self) -> int:
        """Windows, the last ones, whose sums are kept apart to choose the ridge; 0 where it is given."""
        return max(1, len(self.windows.ids_NS) // 4) if self.recipe.chooses_ridge else 0

    @property
    def window_sets(self) -> tuple[WindowRanges, ...]:
        """Which of this rank's windows have sums together: those that are fitted, then those that choose the ridge.

        The latter all together, or those of each text where the objective goes by texts.
        """
        chosen_by = range(self.num_fitted, len(self.windows.ids_NS))
        sets: list[Sequence[int]] = [range(self.num_fitted)]
        if chosen_by:
            of_texts = [[n for n in text.windows if n in chosen_by] for text in self.windows.texts]
            by_text = objective_of(self.recipe).by_text and any(of_texts)
            sets += [numbers for numbers in of_texts if numbers] if by_text else [chosen_by]
        return tuple(tuple(self.ranks.local_range(*stretch) for stretch in stretches(numbers)) for numbers in sets)

    @property
    def num_fitted(self) -> int:
        """Windows, the first ones, that do not choose the ridge."""
        return len(self.windows.ids_NS) - self.num_validation

    @property
    def num_backward(self) -> int:
        """Windows, the first ones, of the streamed backward pass, or of measured losses."""
        return min(self.recipe.backward_samples, len(self.windows.ids_NS))

    @property
    def num_measured_tokens(self) -> int:
        """Tokens that pass a block while it is measured: all, or those of the backward pass where nothing else is."""
        num_windows, seq_len = self.windows.ids_NS.shape
        return (num_windows if self.method.needs_statistics else self.num_backward) * seq_len

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states of all windows are kept beside the pruned ones."""
        return self.recipe.follows_dense
