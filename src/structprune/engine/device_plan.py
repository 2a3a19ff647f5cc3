"""Bytes that each phase holds on a device with memory of its own, from shapes.

Blocks run there and sums are taken there; deciding and solving are the host's. The figures are upper bounds, as the
host's are, but no GPU was there to compare them with: the run's own limit is what keeps the promise (device.py).
"""

from __future__ import annotations

import torch

from structprune.engine.plan import DevicePlan, PlanRequest, SumsPlace
from structprune.engine.shape_bytes import (
    SCORE_BYTES,
    activation_bytes,
    by_kind,
    embedding_names,
    gram_bytes,
    kept_for_backward,
    logit_bytes,
    mask_bytes,
    num_scores,
    solver_windows,
    statistics_bytes,
    weight_gradient_bytes,
    widest_block,
)
from structprune.engine.slice_bytes import slice_phases
from structprune.engine.workspace import iteration_bytes
from structprune.statistics.gram import NUM_STRIPS
from structprune.types import UnitGroup

# What cuBLAS works in (32 MiB on the newest), and half-used blocks of the allocator.
_LIBRARY_BYTES = 64 * 2**20


def device_plan(request: PlanRequest, budget: int, micro_batch: int, sums: SumsPlace) -> DevicePlan:
    """What the device holds with micro-batches of so many windows and the sums of activations in that place."""
    item, hidden, seq_len = request.compute_dtype.itemsize, request.layout.hidden_size, request.seq_len
    block, vocab_size = widest_block(request), request.layout.vocab_size
    one_each = micro_batch * seq_len * item
    outer = {name: torch.Size(shape).numel() * item for name, shape in request.layout.outer_tensors.items()}
    # With cosines and sines, the largest of what blocks are called with beside the states.
    base = _LIBRARY_BYTES + mask_bytes(request, micro_batch) + 2 * hidden * one_each
    weights = sum(torch.Size(shape).numel() for shape in block.shapes.values()) * item
    activations = activation_bytes(block, hidden, one_each) + micro_batch * num_scores(request) * SCORE_BYTES
    # The whole block is there until its cut successor is.
    running = base + 2 * weights + activations
    # Of one window in float32, where a loss is differentiated.
    gradient = seq_len * hidden * 4
    loss = base + max(outer.values()) + logit_bytes(vocab_size, request.compute_dtype)
    phases = {
        "embed": base + sum(outer[name] for name in embedding_names(request)) + 2 * hidden * one_each,
        "propagate": running,
        "perplexity of the calibration text": loss + 2 * request.num_probe * seq_len * hidden * item,
    }
    if request.compares == "borders":
        phases["angular distances"] = running + micro_batch * seq_len * hidden * (2 * item + 5 * 4)
    if request.compares == "losses":
        phases["measured losses"] = loss + request.other_head_bytes + 2 * seq_len * hidden * item
    surveyed = sum(_sum_bytes(request, group, sums) + hidden * hidden * 4 for group in request.groups)
    if request.needs_survey or request.needs_weight_gradients:
        kept = kept_for_backward(request, block)
        phases["survey: backward"] = base + weights + gradient + kept + (surveyed if request.needs_survey else 0)
        phases["survey: loss"] = loss + 2 * gradient
    if request.needs_scores:
        phases["survey: scores"] = running + surveyed
    if request.needs_weight_gradients:
        phases["survey: backward"] += weight_gradient_bytes(request, block)
    if request.slices != "no":
        phases |= slice_phases(
            hidden=hidden,
            width=request.sliced_hidden,
            item=item,
            several=request.slices == "bases",
            buffered=True,
            stream=base,
            outside=base,
            weights=weights,
            cast=weights,
            activations=activations,
            batch_tokens=micro_batch * seq_len,
            largest_outer=max(outer.values()),
        )
    elif request.needs_statistics:
        for kind, parts in by_kind(request.groups).items():
            taken = sum(_sum_bytes(request, part, sums) for part in parts)
            taken += max(statistics_bytes(request, part, micro_batch) for part in parts)
            phases[f"statistics ({kind})"] = running + taken
            if request.num_latents and kind == "mlp":
                tokens = solver_windows(request.num_windows, seq_len) * seq_len
                inputs = parts[0].num_units * parts[0].width
                phases["iterate"] = running + iteration_bytes(tokens, hidden, inputs, request.num_latents)
    return DevicePlan(budget_bytes=budget, phases=phases, sums=sums)


def _sum_bytes(request: PlanRequest, group: UnitGroup, sums: SumsPlace) -> int:
    """Of one consumer: its sums and the tile in which the lower triangle is filled in, or a strip on its way out."""
    gram = gram_bytes(group)
    cross = group.num_units * group.width * request.layout.hidden_size * 4 if request.follows_dense else 0
    return gram + cross + 3 * gram // 16 if sums == "device" else max(gram // NUM_STRIPS, cross)
