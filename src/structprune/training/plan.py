"""Bytes before work: the planner's bounds for streaming both models, and what training holds beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.host import make_plan
from structprune.engine.planning.plan import PlanRequest, PrunePlan
from structprune.engine.planning.shapes import FLAT_VECTORS, divergence_bytes
from structprune.recipe.training import RecoverySettings
from structprune.training import MODES


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """What a recovery will hold."""

    plan: PrunePlan
    resident: bool
    """Whether what the optimiser keeps between steps stays in memory."""


def plan_recovery(
    teacher: StockModel, student: StockModel, settings: RecoverySettings, dtype: torch.dtype, num_windows: int
) -> RecoveryPlan:
    """Plan a recovery with resolved settings. Raises MemoryBudgetError, naming the smallest budget that would do."""
    item = dtype.itemsize
    layout = student.layout
    widest = max((teacher, student), key=lambda model: max(block.num_parameters for block in model.layout.blocks))
    batch_bytes = settings.batch * settings.seq_len * layout.hidden_size * item
    block = max(block.num_parameters for block in layout.blocks)
    mode = MODES.get(settings.mode).bytes(student, settings, item)
    held = mode.held + FLAT_VECTORS * 4 * mode.numbers + 2 * item * block + 2 * batch_bytes
    if not mode.distils:
        # Both heads, and the logits of a part.
        held += 2 * layout.vocab_size * layout.hidden_size * item + divergence_bytes(layout.vocab_size, dtype)
    request = PlanRequest(
        layout=widest.layout,
        groups=widest.groups,
        stored_bytes={name: widest.reader.num_bytes([name]) for name in widest.reader.shapes},
        stored_dtypes=widest.reader.dtypes,
        compute_dtype=dtype,
        num_windows=num_windows,
        seq_len=settings.seq_len,
        num_probe=0,
        needs_statistics=False,
        needs_weight_gradients=mode.weight_gradients,
        distils=mode.distils,
        sensitivity_windows=settings.batch,
        num_stores=2,
        reload_check=settings.reload_check,
        held_bytes=held,
    )
    plan = make_plan(request, settings.memory)
    stays = plan.peak_bytes + mode.resident <= plan.budget_bytes
    if stays:
        plan = replace(plan, phases={name: size + mode.resident for name, size in plan.phases.items()})
    disk = plan.disk_bytes + mode.disk + (0 if stays else mode.resident)
    # Window by window: a run that goes on must not depend on how much memory was free at its start.
    return RecoveryPlan(plan=replace(plan, disk_bytes=disk, micro_batch_windows=1), resident=stays)
