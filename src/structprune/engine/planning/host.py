"""Bytes before work: what each phase of a run will hold at its peak, and the settings that fit the budget.

The figures are upper bounds from shapes. They count what this process adds to its size after the libraries are
imported: one block, one micro-batch of activations, one Gram matrix, the solver's workspace, the hidden states.
Embeddings and head are each held once, alone: at the start to embed the windows, at the end to copy them and to
compute two perplexities. What a device with memory of its own holds is bounded in `device_plan.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from structprune.architectures.stock.tiled_attention import scratch_bytes
from structprune.engine.planning.device import device_plan
from structprune.engine.planning.plan import DevicePlan, Place, PlanRequest, PrunePlan
from structprune.engine.planning.reload import RELOAD_TOKENS, ReloadBound
from structprune.engine.planning.shapes import (
    SCORE_BYTES,
    activation_bytes,
    by_kind,
    embedding_names,
    gram_bytes,
    group_problem,
    kept_for_backward,
    logit_bytes,
    mask_bytes,
    most_inputs,
    num_scores,
    numel,
    solver_windows,
    statistics_bytes,
    weight_gradient_bytes,
    widest_block,
)
from structprune.engine.planning.slices import slice_phases
from structprune.engine.planning.workspace import iteration_bytes
from structprune.engine.streaming.transfer import NUM_STAGED
from structprune.errors import MemoryBudgetError
from structprune.memory import HEAP_BLOCK_BYTES, HEAP_END_BYTES, available_bytes, format_budget, format_bytes
from structprune.phases import Phase, PhaseBytes, SublayerPhase, fullest
from structprune.statistics.gram import NUM_STRIPS
from structprune.types import UnitKind

# More tokens at once do not make the matrix products faster on any CPU that was tried, and cost memory.
_TARGET_TOKENS = 2048
_HEAP_STATES = 8
# Thread stacks, allocator slack, Python objects; readers of parquet files stay once they were used.
_RUNTIME_BYTES = 40 * 2**20
_TEXT_READER_BYTES = 48 * 2**20
# Reading the text: what is loaded for it, and a tokenizer, 14 times as large as its file.
_TEXT_BYTES = 64 * 2**20
_TOKENIZER_SHARE = 15
# The text as bytes, as text, in pieces, and joined; its tokens of four characters in pieces and joined.
_CHARACTER_BYTES = 8
# What the CPU library keeps of its last products in another dtype than float32 (memory.py bounds their number), and its
# code for them. Measured, not derived: on SmolLM2 `fasp` stays 37 MiB under its plan with that. Where a backward pass
# and a search came first, more of the libraries' code is resident and the heap is fuller: `structprune` took between
# 304 and 335 MiB in eight runs of one shape, for which 331 were planned without the second figure, and 751 on a CPU
# with AVX-512 but no AMX, for which 727 were.
_KERNEL_CACHE_BYTES = 48 * 2**20
_SENSITIVITY_KERNEL_BYTES = 40 * 2**20
# Of the exchange between ranks: a piece (engine/ranks/group.py), the library's copy of it, sockets and threads.
_EXCHANGE_BYTES = 64 * 2**20
# Of sums and solves on a device, what is fastest first: a solve is one piece of work, sums move for each micro-batch.
PLACES: tuple[tuple[Place, Place], ...] = (("device", "device"), ("device", "host"), ("host", "host"))
# The reader copies large tensors out of the file's mapping in chunks of this size.
_CHUNK_BYTES = 16 * 2**20


def make_plan(request: PlanRequest, memory: int | None, device_budget: int | None = None) -> PrunePlan:
    """Choose micro-batch, store and place of the sums so that the peaks fit `memory` and `device_budget`.

    `memory` is the host's, by default 80% of what is free; without `device_budget` there is no device with memory of
    its own. Raises MemoryBudgetError, naming the smallest budget that would do, when even one window at a time with the
    hidden states on disk, and the sums on the host, does not fit.
    """
    budget = memory if memory is not None else available_bytes() * 8 // 10
    largest = min(max(1, _TARGET_TOKENS // request.seq_len), request.num_windows)
    moved = device_budget is not None
    smallest: PrunePlan | None = None
    smallest_device: DevicePlan | None = None
    # A smaller micro-batch costs less than a sublayer that is computed again, or a Gram that is moved for each.
    for store, cached in _stores(request, moved=moved):
        for sums, solves in PLACES if moved else PLACES[:1]:
            for micro_batch in sorted({largest, max(1, largest // 2), 1}, reverse=True):
                plan, device = _plan_with(request, budget, store, cached, micro_batch, moved=moved), None
                if device_budget is not None:
                    device = device_plan(request, device_budget, micro_batch, sums, solves)
                    if smallest_device is None or device.peak_bytes < smallest_device.peak_bytes:
                        smallest_device = device
                fits = device is None or device.peak_bytes <= device.budget_bytes
                if fits and max(plan.peak_bytes, plan.reload_bytes) <= budget:
                    return replace(plan, device=device)
                if smallest is None or plan.peak_bytes < smallest.peak_bytes:
                    smallest = plan
    assert smallest is not None
    if smallest_device is not None and smallest_device.peak_bytes > smallest_device.budget_bytes:
        raise MemoryBudgetError(
            "does not fit in the device's memory budget",
            where=f"phase {str(fullest(smallest_device.phases))!r}",
            got=format_bytes(smallest_device.budget_bytes),
            wanted=f"at least {format_budget(smallest_device.peak_bytes)}",
            do="raise --device-memory, lower --seq-len, or leave the device out with --device cpu",
        )
    if smallest.reload_bytes > max(budget, smallest.peak_bytes):
        raise MemoryBudgetError(
            "does not fit in the memory budget",
            where="the process that loads the result to check it",
            got=format_bytes(budget),
            wanted=f"at least {format_budget(smallest.reload_bytes)}",
            do="raise --memory, or leave the check out with --no-reload-check",
        )
    raise MemoryBudgetError(
        "does not fit in the memory budget",
        where=f"phase {str(fullest(smallest.phases))!r}",
        got=format_bytes(budget),
        wanted=f"at least {format_budget(smallest.peak_bytes)}",
        do="raise --memory or lower --seq-len",
    )


def _stores(request: PlanRequest, *, moved: bool) -> list[tuple[str, tuple[UnitKind, ...]]]:
    """Where hidden states can be and which sublayers' inputs are kept beside them, what is fastest first.

    Attention's inputs are the narrower ones and save more. A device computes them again sooner than they come back.
    """
    choices: list[tuple[str, tuple[UnitKind, ...]]] = [("memory", ()), ("file", ())]
    if not moved:
        for count in range(1, len(request.cacheable) + 1):
            choices.insert(0, ("memory", request.cacheable[:count]))
    return choices


def _plan_with(
    request: PlanRequest, budget: int, store: str, cached: tuple[UnitKind, ...], micro_batch: int, *, moved: bool
) -> PrunePlan:
    item = request.compute_dtype.itemsize
    hidden = request.layout.hidden_size
    store_bytes = request.num_windows * request.seq_len * hidden * item
    num_stores = request.num_stores or (2 if request.follows_dense else 1)
    runtime = _RUNTIME_BYTES + HEAP_END_BYTES
    if item != 4:
        runtime += _KERNEL_CACHE_BYTES + (_SENSITIVITY_KERNEL_BYTES if request.needs_sensitivity else 0)
    runtime += _TEXT_READER_BYTES if request.text_bytes is None else 0
    base = runtime + mask_bytes(request, micro_batch) + request.held_bytes
    base += _EXCHANGE_BYTES if request.num_ranks > 1 else 0
    # On their way to a device and back: states, or in the backward pass those of one window and gradients.
    base += NUM_STAGED * max(micro_batch * item, item + 2 * 4) * request.seq_len * hidden if moved else 0
    # Behind the last block: both models' last states of the reported windows, and the logits of the reload check.
    final_states = 2 * request.num_probe * request.seq_len * hidden * item
    small = base + final_states + (RELOAD_TOKENS * request.layout.vocab_size * 4 if request.reload_check else 0)
    # While blocks run those states are in a store like the others.
    resident = base + (num_stores * store_bytes + final_states if store == "memory" else 0)
    # Only while blocks are pruned, one sublayer's at a time.
    cache_bytes = request.num_windows * request.seq_len * item * most_inputs(request.layout, cached)
    pruning = resident + cache_bytes

    block = widest_block(request)
    names = [block.prefix + name for name in block.shapes]
    weights = sum(request.stored_bytes[name] for name in names)
    cast = sum(numel(block, name) * item for name in names if request.stored_dtypes[name] != request.compute_dtype)
    scores = num_scores(request)
    tiles = scratch_bytes(request.seq_len) if request.compute_dtype == torch.bfloat16 and not scores else 0
    activations = activation_bytes(block, hidden, micro_batch * request.seq_len * item, tiles)
    activations += micro_batch * scores * SCORE_BYTES
    # As wide as the stream: small ones leave holes in the heap.
    if (states := micro_batch * request.seq_len * hidden * item) < HEAP_BLOCK_BYTES:
        activations += _HEAP_STATES * states
    # A CPU without units for a narrow dtype multiplies by a float32 copy of the weight.
    widened = 0 if item == 4 else 4 * max(torch.Size(shape).numel() for shape in block.shapes.values())
    activations += widened

    outer = {name: request.stored_bytes[name] for name in request.layout.outer_tensors}
    # What is computed with is cast as it is read.
    in_use = {name: torch.Size(shape).numel() * item for name, shape in request.layout.outer_tensors.items()}
    first = embedding_names(request)
    # As they are copied, and as they are computed with.
    embeddings, embedding = sum(outer[name] for name in first), sum(in_use[name] for name in first)
    head = max(in_use.values())
    logits = logit_bytes(request.layout.vocab_size, request.compute_dtype)
    phases: PhaseBytes = {
        Phase.CALIBRATION_TEXT: runtime
        + _TEXT_BYTES
        + _TOKENIZER_SHARE * request.tokenizer_bytes
        + _CHARACTER_BYTES * (request.text_bytes or 0),
        Phase.EMBED: resident + embedding + _CHUNK_BYTES + 2 * micro_batch * request.seq_len * hidden * item,
        Phase.READ_BLOCK: pruning + 2 * weights + cast,
        Phase.PROPAGATE: pruning + weights + cast + activations,
        Phase.WRITE_BLOCK: pruning + 2 * weights + cast,
        # By now the hidden states are gone, but for the few windows of the perplexity.
        Phase.COPY_OUTER: small + max(embeddings, sum(outer.values()) - embeddings) + _CHUNK_BYTES,
        Phase.PERPLEXITY: small + head + _CHUNK_BYTES + logits,
    }
    if request.compares == "boundaries":
        # Both states, their unit vectors and one difference in float32.
        states = micro_batch * request.seq_len * hidden * (2 * item + 5 * 4)
        phases[Phase.ANGULAR_DISTANCES] = resident + 2 * weights + cast + states
    if request.compares == "losses":
        phases[Phase.MEASURED_LOSSES] = resident + head + _CHUNK_BYTES + logits + request.other_head_bytes
    # Of the windows of the backward pass, at one block boundary.
    gradient = request.sensitivity_windows * request.seq_len * hidden * 4
    if request.needs_sensitivity or request.needs_weight_gradients:
        kept = kept_for_backward(request, block)
        sums = (
            sum(gram_bytes(group) + hidden * hidden * 4 for group in request.groups) if request.needs_sensitivity else 0
        )
        # A block's sums wait at their owner while other blocks are differentiated.
        waiting = sums if request.num_ranks > 1 else 0
        phases[Phase.SENSITIVITY_BACKWARD] = small + gradient + weights + cast + kept + widened + sums + waiting
        phases[Phase.SENSITIVITY_LOSS] = small + gradient + head + _CHUNK_BYTES + logits
    if request.needs_scores:
        # All consumers' sums are taken while the whole block runs.
        sums = sum(gram_bytes(group) for group in request.groups)
        phases[Phase.SENSITIVITY_SCORES] = phases[Phase.PROPAGATE] - cache_bytes + sums
    if request.needs_weight_gradients:
        phases[Phase.SENSITIVITY_BACKWARD] += weight_gradient_bytes(request, block)
    if request.slices != "no":
        phases |= slice_phases(
            hidden=hidden,
            width=request.sliced_hidden,
            item=item,
            several=request.slices == "bases",
            buffered=store == "file",
            stream=resident,
            outside=small,
            weights=weights,
            cast=cast,
            activations=activations,
            batch_tokens=micro_batch * request.seq_len,
            largest_outer=max(outer.values()),
        )
    elif request.needs_statistics:
        for kind, parts in by_kind(request.groups).items():
            group, others = parts[0], len(parts) - 1
            inputs = group.num_units * group.width
            problem = group_problem(request, block, group)
            gram = problem.gram
            # Of other parts, whose sums are taken in the same pass.
            kept_apart = others * problem.sums
            # What the gradient left of each sublayer in scope.
            sensitivities = len(by_kind(request.groups)) * hidden * hidden * 4 if request.needs_sensitivity else 0
            batch = max(activations, statistics_bytes(request, group, micro_batch))
            if item != 4:
                # The same input in float32, where it is too large for the holes that the activations left in the heap,
                # and what the library makes of it and of one strip to multiply them in bfloat16.
                wide = micro_batch * request.seq_len * inputs * 4
                batch += (wide if wide >= HEAP_BLOCK_BYTES else 0) + wide // 2 + wide // 2 // NUM_STRIPS
            # Activations are gone when the lower triangle is filled in, by tiles of a sixteenth.
            phases[SublayerPhase.STATISTICS.of(kind)] = (
                pruning + weights + cast + problem.sums + kept_apart + max(batch, 3 * gram // 16)
            )
            phases[SublayerPhase.SOLVE.of(kind)] = pruning + weights + cast + problem.solve + kept_apart + sensitivities
            if request.needs_sensitivity:
                rest = sum(gram_bytes(other) for other in request.groups if other is not group)
                ordered = inputs * hidden * problem.stored_item
                phases[SublayerPhase.REMOVAL_COSTS.of(kind)] = (
                    small + gradient + weights + gram + ordered + problem.removal_costs + rest + sensitivities
                )
            if request.num_latents and kind == "mlp":
                tokens = solver_windows(request.num_windows, request.seq_len) * request.seq_len
                # Behind the proposal the consumer is measured and solved again; meanwhile there is the original block.
                measured = max(phases[SublayerPhase.STATISTICS.of(kind)], phases[SublayerPhase.SOLVE.of(kind)])
                again = measured + weights + cast
                proposal = iteration_bytes(tokens, hidden, problem.kept or inputs, request.num_latents)
                phases[Phase.ITERATE] = max(again, pruning + 2 * weights + 2 * cast + proposal)
    model_bytes = sum(request.stored_bytes.values())
    added = 0
    if request.slices != "no":
        # An embedding that the head no longer shares, and the shortcuts, in no more than eight bytes per number.
        added = max(outer.values()) if request.layout.tied_embeddings else 0
        if request.slices == "bases":
            added += 2 * request.sliced_hidden**2 * 8 * len(request.layout.blocks)
    return PrunePlan(
        budget_bytes=budget,
        phases=phases,
        store=store,
        store_bytes=store_bytes,
        micro_batch_windows=micro_batch,
        cached=cached,
        cache_bytes=cache_bytes,
        disk_bytes=model_bytes
        + added
        + _disk_to_go_on(request, num_stores * store_bytes, gradient)
        + (num_stores * store_bytes * request.num_ranks if store == "file" else 0),
        reload=_reload_bound(request, small, item) if request.reload_check else None,
        result_size=(request.layout.num_parameters + added // 4, model_bytes + added),
    )


def _disk_to_go_on(request: PlanRequest, stores_bytes: int, gradient_bytes: int) -> int:
    """Disk of what a run that is cut goes on from. A snapshot is there twice while its successor is written."""
    hidden, num_blocks = request.layout.hidden_size, len(request.layout.blocks)
    window = request.seq_len * hidden * request.compute_dtype.itemsize
    # Of all ranks: they share one disk.
    total = 2 * stores_bytes * request.num_ranks + 4 * request.num_probe * window
    if request.needs_sensitivity or request.needs_weight_gradients:
        kept = (num_blocks + 1) * request.sensitivity_windows * window + 2 * gradient_bytes
        total += kept * request.num_ranks
    if request.needs_sensitivity:
        total += num_blocks * len({group.kind for group in request.groups}) * hidden * hidden * 4
    if request.slices != "no":
        total += 2 * hidden * hidden * 8
    return total + (sum(request.stored_bytes.values()) if request.rehearses else 0)


def _reload_bound(request: PlanRequest, run_bytes: int, item: int) -> ReloadBound:
    layout = request.layout
    shapes = {block.prefix + name: shape for block in layout.blocks for name, shape in block.shapes.items()}
    shapes.update(layout.outer_tensors)
    casts = any(request.stored_dtypes[name] != request.compute_dtype for name in shapes)
    largest = max(torch.Size(shape).numel() for shape in shapes.values()) * item
    return ReloadBound(
        run_bytes=run_bytes, casts=casts, largest_bytes=largest, item_bytes=item, vocab_size=layout.vocab_size
    )
