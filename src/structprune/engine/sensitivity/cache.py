"""What a method measures on the dense model first, here or in an earlier run that asked the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from structprune.calibration.select import fingerprint
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.fisher import fisher_pass, score_pass
from structprune.engine.sensitivity.store import Costs, load_costs, load_found
from structprune.engine.sensitivity.taylor import load_taylor, taylor_pass
from structprune.files import write_text
from structprune.methods.method import SensitivityKind
from structprune.recipe.units import ResolvedUnits
from structprune.results.schema import ReusedStatistics
from structprune.runs.journal import JOURNAL_NAME, read_journal
from structprune.types import Sensitivity

_DONE_NAME = "survey.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityPass:
    """What was found, and where the rest of it lies."""

    kind: SensitivityKind
    costs: Costs
    folder: Path
    for_widths: bool
    """Whether only the allocator reads it; the method then decides without."""
    reused: ReusedStatistics | None = None
    """What it took the run that measured it; None if this one did."""

    def of_block(self, block: int) -> dict[str, Sensitivity]:
        """Load the sensitivities that the decision in one block reads.

        They are by kind of unit, or by the name of the group where each has its own.
        """
        if self.for_widths:
            return {}
        match self.kind:
            case SensitivityKind.LOSS:
                found = load_found(self.folder, block)
                return {kind: Sensitivity(sensitivity_OO=F_OO) for kind, F_OO in found.items()}
            case SensitivityKind.TAYLOR:
                return {kind: Sensitivity(taylor=sums) for kind, sums in load_taylor(self.folder, block).items()}
            case _:
                return {}


def measure_sensitivity(context: RunContext, folder: Path) -> SensitivityPass | None:
    """Measure into `folder`, or with `context.shared` into a place where later runs of the same question find it."""
    kind = context.sensitivity
    if kind is SensitivityKind.NONE:
        return None
    for_widths = kind != context.method.sensitivity
    if context.shared is None:
        return SensitivityPass(kind=kind, costs=_measure(context, folder), folder=folder, for_widths=for_widths)
    folder = context.shared / _key(context)
    done = folder / _DONE_NAME
    if done.exists():
        reused = ReusedStatistics.model_validate_json(done.read_text(encoding="utf-8"))
        context.observer.note(
            f"the dense model's measurements are taken over from an earlier run ({reused.seconds:.0f} s)"
        )
        costs = load_costs(folder, context.stock.layout.blocks, context.kinds)
        return SensitivityPass(kind=kind, costs=costs, folder=folder, for_widths=for_widths, reused=reused)
    # What an interrupted run left there is an answer to the same question: the sensitivity pass goes on with it.
    partial = folder.with_name(f"{folder.name}.partial")
    context.shared.mkdir(parents=True, exist_ok=True)
    costs = _measure(context, partial)
    seconds = max(float(line["seconds"]) for line in read_journal(partial / JOURNAL_NAME).values())
    spent = ReusedStatistics(seconds=seconds, peak_bytes=context.meter.peak_so_far())
    write_text(partial / _DONE_NAME, spent.model_dump_json())
    partial.rename(folder)
    return SensitivityPass(kind=kind, costs=costs, folder=folder, for_widths=for_widths)


def _measure(context: RunContext, folder: Path) -> Costs:
    match context.sensitivity:
        case SensitivityKind.NONE:
            raise AssertionError("nothing to measure")
        case SensitivityKind.SCORES:
            return score_pass(context, folder)
        case SensitivityKind.LOSS:
            return fisher_pass(context, folder)
        case SensitivityKind.TAYLOR:
            return taylor_pass(context, folder)


def _key(context: RunContext) -> str:
    """Hash of everything that the sensitivity pass depends on."""
    recipe = context.settings(ResolvedUnits)
    question = {
        "source": context.reader.fingerprint(),
        "windows": fingerprint(context.windows.ids_NS),
        "sensitivity": context.sensitivity,
        "score": None if context.sensitivity is SensitivityKind.LOSS else context.score,
        "kinds": context.kinds,
        "head_units": recipe.head_units,
        "damping": context.damping,
        "sensitivity_samples": recipe.sensitivity_samples,
        "sensitivity_scale": recipe.sensitivity_scale,
        "seed": recipe.seed,
        "dtype": str(context.dtype),
        "width": str(context.reader.width),
        "device": str(context.device),
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
