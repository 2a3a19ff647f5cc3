"""Bytes that each phase holds on a device with memory of its own, from shapes.

Blocks run there, sums are taken there, units are chosen and consumers solved there, in that order of importance: what
does not fit is the host's. The figures are upper bounds, as the host's are, and tests compare them with a device that
the CPU plays; no GPU was there. The run's own limit is what keeps the promise (device.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from structprune.engine.planning.elements import Beside, element_phases
from structprune.engine.planning.gates import gate_device_bytes
from structprune.engine.planning.merged import merged_device_bytes
from structprune.engine.planning.plan import DevicePlan, Place, PlanRequest
from structprune.engine.planning.search_bytes import search_solve_phases
from structprune.engine.planning.shapes import (
    FLAT_VECTORS,
    SCORE_BYTES,
    activation_bytes,
    by_kind,
    divergence_bytes,
    embedding_names,
    gram_bytes,
    group_problem,
    kept_for_backward,
    left_bytes,
    logit_bytes,
    mask_bytes,
    mixer_bytes,
    num_scores,
    one_of_each,
    repair_numbers,
    solver_windows,
    statistics_bytes,
    weight_gradient_bytes,
    widest_block,
)
from structprune.engine.planning.slices import SliceMemory, slice_phases
from structprune.engine.planning.workspace import iteration_bytes
from structprune.phases import Phase, PhaseBytes, SublayerPhase, largest
from structprune.statistics.gram import NUM_STRIPS
from structprune.types import BlockLayout, UnitGroup, UnitKind

# What cuBLAS works in (32 MiB on the newest), and half-used blocks of the allocator.
LIBRARY_BYTES = 64 * 2**20


def device_plan(request: PlanRequest, budget: int, micro_batch: int, sums: Place, solves: Place) -> DevicePlan:
    """Plan the device's memory with micro-batches of `micro_batch` windows and sums and solves in these places."""
    phases = largest(_phases(each, micro_batch, sums, solves) for each in one_of_each(request))
    return DevicePlan(budget_bytes=budget, phases=phases, sums=sums, solves=solves)


def _phases(request: PlanRequest, micro_batch: int, sums: Place, solves: Place) -> PhaseBytes:
    """Bound what each phase takes of the device with the block that is planned for."""
    item, hidden, seq_len = request.compute_dtype.itemsize, request.layout.hidden_size, request.seq_len
    block, vocab_size = widest_block(request), request.layout.vocab_size
    one_each = micro_batch * seq_len * item
    outer = {name: torch.Size(shape).numel() * item for name, shape in request.layout.outer_tensors.items()}
    # With cosines and sines, the largest of what blocks are called with beside the states.
    base = LIBRARY_BYTES + mask_bytes(request, micro_batch) + 2 * hidden * one_each
    # The next micro-batch, which is there before its turn, and the last one's output on its way out.
    base += 2 * hidden * one_each
    weights = sum(torch.Size(shape).numel() for shape in block.shapes.values()) * item
    activations = activation_bytes(block, hidden, one_each) + micro_batch * num_scores(request) * SCORE_BYTES
    activations = max(activations, micro_batch * mixer_bytes(request, block).peak)
    running = base + weights + activations
    # Of one window in float32, where a loss is differentiated.
    gradient = seq_len * hidden * 4
    loss = base + max(outer.values()) + logit_bytes(vocab_size, request.compute_dtype)
    phases: PhaseBytes = {
        Phase.EMBED: base + sum(outer[name] for name in embedding_names(request)) + 2 * hidden * one_each,
        # Where the stream's basis changes, the block as it was is there until its successor is.
        Phase.READ_BLOCK: base + (1 if request.slices == "no" else 2) * weights,
        Phase.PROPAGATE: running,
        Phase.PERPLEXITY: loss + 2 * request.num_probe * seq_len * hidden * item,
    }
    if request.held_out_windows:
        # A block of the result is no larger, but for its shortcuts.
        shortcuts = 2 * request.sliced_hidden**2 * item if request.slices == "bases" else 0
        head = loss + 2 * seq_len * hidden * item
        phases[Phase.HELD_OUT] = max(phases[Phase.EMBED], running + shortcuts, head)
    if request.compares == "boundaries":
        phases[Phase.ANGULAR_DISTANCES] = running + micro_batch * seq_len * hidden * (2 * item + 5 * 4)
    if request.compares == "losses":
        phases[Phase.MEASURED_LOSSES] = loss + request.other_head_bytes + 2 * seq_len * hidden * item
    sensitivity = sum(_sum_bytes(request, group, sums) + hidden * hidden * 4 for group in request.groups)
    if request.needs_sensitivity or request.needs_weight_gradients:
        kept = kept_for_backward(request, block)
        # Of three windows: one computed with, one before and one after it.
        moving = 3 * (gradient + seq_len * hidden * item)
        phases[Phase.SENSITIVITY_BACKWARD] = (
            base + weights + moving + kept + (sensitivity if request.needs_sensitivity else 0)
        )
        phases[Phase.SENSITIVITY_LOSS] = loss + 2 * gradient
    if request.search is not None:
        phases[Phase.SEARCH_STATISTICS] = running + sensitivity
        compared = base + max(outer.values()) + divergence_bytes(vocab_size, request.compute_dtype)
        phases[Phase.SEARCH_CANDIDATES] = max(running, compared + 2 * seq_len * hidden * item)
        if solves == "device":
            for kind, parts in by_kind(request.groups).items():
                phases |= search_solve_phases(request, block, kind, parts, base + weights)
    if request.repair_windows:
        phases[Phase.REPAIR] = base + _repair_bytes(request, block, weights, max(outer.values()))
    if request.missing_tokens:
        phases[Phase.MERGED_ROWS] = max(running, phases[Phase.EMBED], loss + merged_device_bytes(request))
    if request.gates is not None:
        learning = gate_device_bytes(request, block, weights, max(outer.values()))
        phases[Phase.GATES] = max(base + learning, running + sensitivity)
    if request.needs_scores:
        phases[Phase.SENSITIVITY_SCORES] = running + sensitivity
    if request.needs_weight_gradients:
        phases[Phase.SENSITIVITY_BACKWARD] += weight_gradient_bytes(request, block)
    if request.slices != "no":
        phases |= slice_phases(
            request,
            SliceMemory(
                micro_batch=micro_batch,
                buffered=True,
                stores_open=base,
                stores_closed=base,
                weights=weights,
                cast=weights,
                activations=activations,
                largest_outer=max(outer.values()),
            ),
        )
    elif request.elements:
        beside = Beside(
            block=base + weights,
            again=weights if request.follows_dense else 0,
            activations=activations,
            tokens=micro_batch * seq_len,
            item=item,
            sums=sums == "device",
            solves=solves == "device",
        )
        phases |= element_phases(request.elements[frozenset(block.shapes)], beside)
    elif request.needs_statistics:
        for kind, parts in by_kind(request.groups).items():
            taken = sum(_sum_bytes(request, part, sums) for part in parts)
            # The last micro-batch's inputs and targets are there while the next one passes; where the ridge is chosen,
            # sums that are not all there at once are counted below.
            left = 0 if request.chooses_ridge else max(left_bytes(request, part, micro_batch) for part in parts)
            batch = max(activations + left, *(statistics_bytes(request, part, micro_batch) for part in parts))
            if request.chooses_ridge and sums == "device":
                # Those of the windows that are fitted, and of other texts, while the last ones are taken.
                before = request.held_out_texts
                taken += sum(group_problem(request, block, part).sums // (1 + before) * before for part in parts)
            phases[SublayerPhase.STATISTICS.of(kind)] = base + weights + batch + taken
            if solves == "device":
                phases |= _solve_phases(request, block, kind, parts, base + weights)
            if request.num_latents and kind == "mlp":
                tokens = solver_windows(request.num_windows, seq_len) * seq_len
                inputs = parts[0].num_units * parts[0].width
                # With the block as it was, which says what is to be met.
                proposal = iteration_bytes(tokens, hidden, inputs, request.num_latents)
                phases[Phase.ITERATE] = running + weights + proposal
    return phases


def _repair_bytes(request: PlanRequest, block: BlockLayout, weights: int, head: int) -> int:
    """Return the bytes of both models' heads, which stay, of one window, and of a block that learns or is compared."""
    window = request.seq_len * request.layout.hidden_size
    numbers = max(repair_numbers(request))
    learning = weights + kept_for_backward(request, block) + FLAT_VECTORS * 4 * numbers
    # States and gradients of three windows: one computed with, one before and one after it.
    moving = 3 * window * (request.compute_dtype.itemsize + 4)
    return 2 * head + moving + max(learning, divergence_bytes(request.layout.vocab_size, request.compute_dtype))


def _solve_phases(
    request: PlanRequest, block: BlockLayout, kind: UnitKind, parts: Sequence[UnitGroup], beside: int
) -> PhaseBytes:
    """Plan choosing and solving one part of a sublayer, beside the sums of the others and one sensitivity."""
    problem = group_problem(request, block, parts[0])
    sensitivity = request.layout.hidden_size**2 * 4 if request.needs_sensitivity else 0
    # CUDA makes an inverse beside its factor (at::native cholesky_inverse), and libraries copy what is not laid out as
    # they want it.
    copied = problem.inputs**2 * 8
    rest = (len(parts) - 1) * problem.sums
    phases: PhaseBytes = {SublayerPhase.SOLVE.of(kind): beside + problem.solve + rest + sensitivity + copied}
    if request.needs_sensitivity:
        # With all sums of the block there.
        others = sum(gram_bytes(other) for other in request.groups if other is not parts[0])
        sensitivities = len(by_kind(request.groups)) * sensitivity
        phases[SublayerPhase.REMOVAL_COSTS.of(kind)] = (
            beside + problem.gram + problem.removal_costs + others + sensitivities + copied
        )
    return phases


def _sum_bytes(request: PlanRequest, group: UnitGroup, sums: Place) -> int:
    """Return the bytes of a consumer's sums, and of the tile that fills their lower triangle or a strip to the host."""
    gram = gram_bytes(group)
    cross = group.num_units * group.width * request.layout.hidden_size * 4 if request.follows_dense else 0
    return gram + cross + 3 * gram // 16 if sums == "device" else max(gram // NUM_STRIPS, cross)
