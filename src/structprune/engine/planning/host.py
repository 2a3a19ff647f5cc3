"""Bytes before work: what each phase of a run will hold at its peak, and the settings that fit the budget.

The figures are upper bounds from shapes. They count what this process adds to its size after the libraries are
imported: one block, one micro-batch of activations, one Gram matrix, the solver's workspace, the hidden states.
Embeddings and head are each held once, alone: at the start to embed the windows, at the end to copy them and to
compute perplexities. One function bounds each stretch of a run; what they add up is in `sizes.py`. What a device
with memory of its own holds is bounded in `device.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from structprune.engine.planning.device import device_plan
from structprune.engine.planning.gates import gate_disk_bytes, gate_phases
from structprune.engine.planning.host_elements import host_element_phases
from structprune.engine.planning.merged import merged_disk_bytes, merged_phases
from structprune.engine.planning.plan import DevicePlan, Place, PlanRequest, PrunePlan
from structprune.engine.planning.reload import ReloadBound
from structprune.engine.planning.search_bytes import disk_of_search, measuring_bytes, search_phases
from structprune.engine.planning.shapes import (
    FLAT_VECTORS,
    LEARNED_VECTORS,
    by_kind,
    divergence_bytes,
    gram_bytes,
    group_problem,
    kept_for_backward,
    new_bias_numbers,
    numel,
    one_of_each,
    repair_numbers,
    solver_windows,
    weight_gradient_bytes,
)
from structprune.engine.planning.sizes import CHUNK_BYTES, TOKENIZER_SHARE, HostChoice, HostSizes
from structprune.engine.planning.slices import SliceMemory, slice_phases
from structprune.engine.planning.work import planned_work
from structprune.engine.planning.workspace import iteration_bytes
from structprune.errors import MemoryBudgetError
from structprune.memory import available_bytes, format_budget, format_bytes
from structprune.phases import Phase, PhaseBytes, SublayerPhase, fullest, largest
from structprune.types import UnitGroup, UnitKind

# More tokens at once do not make the matrix products faster on any CPU that was tried, and cost memory.
_TARGET_TOKENS = 2048
# Reading the text: what is loaded for it, beside the tokenizer.
_TEXT_BYTES = 64 * 2**20
# The text as bytes, as text, in pieces, and joined; its tokens of four characters in pieces and joined.
_CHARACTER_BYTES = 8
# Of sums and solves on a device, what is fastest first: a solve is one piece of work, sums move for each micro-batch.
PLACES: tuple[tuple[Place, Place], ...] = (("device", "device"), ("device", "host"), ("host", "host"))


def make_plan(request: PlanRequest, memory: int | None, device_budget: int | None = None) -> PrunePlan:
    """Choose micro-batch, store and place of the sums so that the peaks fit `memory` and `device_budget`.

    `memory` is the host's, by default 80% of what is free; without `device_budget` there is no device with memory of
    its own. Raises MemoryBudgetError, naming the smallest budget that would do, when even one window at a time with the
    hidden states on disk, and the sums on the host, does not fit.
    """
    budget = memory if memory is not None else available_bytes() * 8 // 10
    smallest: PrunePlan | None = None
    smallest_device: DevicePlan | None = None
    for choice, sums, solves in _candidates(request, moved=device_budget is not None):
        plan, device = _plan_with(request, budget, choice), None
        if device_budget is not None:
            device = device_plan(request, device_budget, choice.micro_batch, sums, solves)
            if smallest_device is None or device.peak_bytes < smallest_device.peak_bytes:
                smallest_device = device
        fits = device is None or device.peak_bytes <= device.budget_bytes
        if fits and max(plan.peak_bytes, plan.reload_bytes) <= budget:
            return replace(plan, device=device)
        if smallest is None or plan.peak_bytes < smallest.peak_bytes:
            smallest = plan
    assert smallest is not None
    raise _refusal(smallest, smallest_device, budget)


def _candidates(request: PlanRequest, *, moved: bool) -> Iterator[tuple[HostChoice, Place, Place]]:
    """Yield settings with the places of sums and solves, the fastest first.

    A smaller micro-batch costs less than a sublayer that is computed again, or a Gram that is moved for each. Of cached
    inputs attention's are the narrower ones and save more; a device computes them again sooner than they come back.
    """
    largest = min(max(1, _TARGET_TOKENS // request.seq_len), request.num_windows)
    in_memory = HostChoice(store="memory", cached=(), micro_batch=largest, moved=moved)
    numbers_cached = [] if moved else range(len(request.cacheable), 0, -1)
    stores = [replace(in_memory, cached=request.cacheable[:count]) for count in numbers_cached]
    for choice in (*stores, in_memory, replace(in_memory, store="file")):
        for sums, solves in PLACES if moved else PLACES[:1]:
            for micro_batch in sorted({largest, max(1, largest // 2), 1}, reverse=True):
                yield replace(choice, micro_batch=micro_batch), sums, solves


def _refusal(smallest: PrunePlan, device: DevicePlan | None, budget: int) -> MemoryBudgetError:
    """Build the error for the candidates nearest to their budgets: it names the first budget that none of them fits."""
    if device is not None and device.peak_bytes > device.budget_bytes:
        return MemoryBudgetError(
            "does not fit in the device's memory budget",
            where=f"phase {str(fullest(device.phases))!r}",
            got=format_bytes(device.budget_bytes),
            wanted=f"at least {format_budget(device.peak_bytes)}",
            do="raise --device-memory, lower --seq-len, or leave the device out with --device cpu",
        )
    if smallest.reload_bytes > max(budget, smallest.peak_bytes):
        return MemoryBudgetError(
            "does not fit in the memory budget",
            where="the process that loads the result to check it",
            got=format_bytes(budget),
            wanted=f"at least {format_budget(smallest.reload_bytes)}",
            do="raise --memory, or leave the check out with --no-reload-check",
        )
    return MemoryBudgetError(
        "does not fit in the memory budget",
        where=f"phase {str(fullest(smallest.phases))!r}",
        got=format_bytes(budget),
        wanted=f"at least {format_budget(smallest.peak_bytes)}",
        do="raise --memory or lower --seq-len",
    )


def _plan_with(request: PlanRequest, budget: int, choice: HostChoice) -> PrunePlan:
    """Plan the run with these settings, whether it fits or not; phases are in the order of the reports."""
    sizes = HostSizes(request=request, choice=choice)
    phases = largest(_phases(HostSizes(request=each, choice=choice)) for each in one_of_each(request))
    num_ranks = request.num_ranks
    model_bytes, added = sum(request.stored_bytes.values()), _added_by_slicing(sizes)
    around = request.layout.around
    return PrunePlan(
        budget_bytes=budget,
        phases=phases,
        store=choice.store,
        store_bytes=sizes.store,
        micro_batch_windows=choice.micro_batch,
        cached=choice.cached,
        cache_bytes=sizes.cache,
        # The result twice: as the run's shards, and as the weight files that are made of them; what is around it once.
        disk_bytes=2 * (model_bytes + added)
        + around.num_bytes
        + _disk_to_go_on(sizes)
        + (max(sizes.num_stores * sizes.store, sizes.held_out_store) * num_ranks if choice.store == "file" else 0),
        reload=_reload_bound(sizes) if request.reload_check else None,
        result_size=(request.layout.all_parameters + added // 4, model_bytes + added + around.num_bytes),
        work=planned_work(request, choice),
    )


def _phases(sizes: HostSizes) -> PhaseBytes:
    """Bound what each phase takes with the block that is planned for."""
    request = sizes.request
    phases = (
        _reading(sizes) | _blocks(sizes) | _ends(sizes) | _held_out(sizes) | _comparisons(sizes) | _sensitivity(sizes)
    )
    if request.search is not None:
        phases |= search_phases(sizes)
    if request.repair_windows:
        phases |= _repair(sizes, phases[Phase.EMBED])
    phases |= gate_phases(sizes, phases[Phase.EMBED]) | merged_phases(sizes)
    if request.slices != "no":
        phases |= _slicing(sizes)
    elif request.elements:
        phases |= host_element_phases(sizes)
    elif request.needs_statistics:
        for kind, groups in by_kind(request.groups).items():
            phases |= _pruning(sizes, kind, groups)
    return phases


def _reading(sizes: HostSizes) -> PhaseBytes:
    """Plan reading the calibration text, and embedding its windows with the embeddings alone in memory."""
    request = sizes.request
    text = TOKENIZER_SHARE * request.tokenizer_bytes + _CHARACTER_BYTES * request.text_bytes
    return {
        Phase.CALIBRATION_TEXT: sizes.runtime + _TEXT_BYTES + text,
        Phase.EMBED: sizes.stores_open + sizes.embeddings + CHUNK_BYTES + 2 * sizes.micro_batch_states,
    }


def _blocks(sizes: HostSizes) -> PhaseBytes:
    """Plan reading a block, running all windows through it and writing it: twice the block, or once and activations."""
    beside = sizes.pruning + sizes.both_heads + sizes.weights + sizes.cast
    return {
        Phase.READ_BLOCK: beside + sizes.weights,
        Phase.PROPAGATE: beside + sizes.activations,
        Phase.WRITE_BLOCK: beside + sizes.weights,
    }


def _ends(sizes: HostSizes) -> PhaseBytes:
    """Plan the end of the run, where hidden states are left of the few windows of the perplexity only.

    Two models' logits are compared between the steps too.
    """
    others = sum(sizes.outer.values()) - sizes.stored_embeddings
    loss = sizes.stores_closed + sizes.head + CHUNK_BYTES + sizes.logits
    if sizes.request.distils:
        compared = divergence_bytes(sizes.request.layout.vocab_size, sizes.request.compute_dtype)
        loss = sizes.stores_open + sizes.gradient + sizes.both_heads + CHUNK_BYTES + compared
    return {
        Phase.COPY_OUTER: sizes.stores_closed + max(sizes.stored_embeddings, others) + CHUNK_BYTES,
        Phase.PERPLEXITY: loss,
    }


def _held_out(sizes: HostSizes) -> PhaseBytes:
    """Bound the passes of the held-out windows through the dense model and, after it, through what was written."""
    request = sizes.request
    if not request.held_out_windows:
        return {}
    # A block of the result is no larger, but for its shortcuts.
    shortcuts = 2 * request.sliced_hidden**2 * 8 if request.slices == "bases" else 0
    blocks = sizes.weights + sizes.cast + shortcuts + max(sizes.weights, sizes.activations)
    embeddings = sizes.embeddings + CHUNK_BYTES + 2 * sizes.micro_batch_states
    head = sizes.head + CHUNK_BYTES + sizes.logits + 2 * sizes.micro_batch_states
    in_memory = sizes.held_out_store if sizes.choice.store == "memory" else 0
    return {Phase.HELD_OUT: sizes.stores_closed + in_memory + max(blocks, embeddings, head)}


def _comparisons(sizes: HostSizes) -> PhaseBytes:
    """Plan choosing whole blocks, by the states at two boundaries or by the losses that follow from them."""
    phases: PhaseBytes = {}
    if sizes.request.compares == "boundaries":
        # Both states, their unit vectors and one difference in float32.
        states = sizes.micro_batch_tokens * sizes.hidden * (2 * sizes.item + 5 * 4)
        phases[Phase.ANGULAR_DISTANCES] = sizes.stores_open + 2 * sizes.weights + sizes.cast + states
    if sizes.request.compares == "losses":
        head = sizes.head + CHUNK_BYTES + sizes.logits
        phases[Phase.MEASURED_LOSSES] = sizes.stores_open + head + sizes.request.other_head_bytes
    return phases


def _sensitivity(sizes: HostSizes) -> PhaseBytes:
    """Plan measuring the dense model: backward from the loss through each block in turn, or forward for scores."""
    request, block = sizes.request, sizes.block
    phases: PhaseBytes = {}
    if request.distils:
        beside = sizes.stores_open + sizes.gradient + sizes.both_heads
        kept = kept_for_backward(request, block) + sizes.widened
        kept += weight_gradient_bytes(request, block) if request.needs_weight_gradients else 0
        phases[Phase.SENSITIVITY_BACKWARD] = beside + sizes.weights + sizes.cast + kept
    elif request.needs_sensitivity or request.needs_weight_gradients:
        beside = sizes.stores_closed + sizes.gradient
        kept = kept_for_backward(request, block) + sizes.widened
        if request.needs_sensitivity:
            sums = sum(gram_bytes(group) + sizes.hidden**2 * 4 for group in request.groups)
            # A block's sums wait at their owner while other blocks are differentiated.
            kept += sums * (2 if request.num_ranks > 1 else 1)
            if request.elements:
                # Behind the gradient maps are measured: the weight in float32, its score and what goes of it.
                widest = max(numel(block, name) for name in block.shapes)
                kept = max(kept, sums + widest * (4 + 4 + 4 + 1) + 2 * CHUNK_BYTES)
        if request.needs_weight_gradients:
            kept += weight_gradient_bytes(request, block)
        phases[Phase.SENSITIVITY_BACKWARD] = beside + sizes.weights + sizes.cast + kept
        phases[Phase.SENSITIVITY_LOSS] = beside + sizes.head + CHUNK_BYTES + sizes.logits
    if request.needs_scores:
        # All consumers' sums are taken while the whole block runs.
        sums = sum(gram_bytes(group) for group in request.groups)
        running = sizes.weights + sizes.cast + sizes.activations
        phases[Phase.SENSITIVITY_SCORES] = sizes.stores_open + running + sums
    return phases


def _repair(sizes: HostSizes, embed: int) -> PhaseBytes:
    """Plan learning from the dense model, one window a step; `embed` is the bound of embedding without it.

    A step keeps the window's states in front of every block; what learns has its value, two moments and the best value.
    """
    request, block = sizes.request, sizes.block
    window = request.seq_len * sizes.hidden * sizes.item
    numbers = repair_numbers(request)
    beside = sizes.stores_closed
    if sizes.choice.store == "memory":
        stores = 2 * request.repair_windows + len(numbers)
        beside += stores * window + LEARNED_VECTORS * 4 * sum(numbers)
    # The logits are gone when the first block is there. The last states and their gradient stay.
    divergence = divergence_bytes(request.layout.vocab_size, request.compute_dtype)
    step = request.seq_len * sizes.hidden * 4 + 2 * window
    kept = kept_for_backward(request, block) + sizes.widened
    learning = sizes.weights + sizes.cast + FLAT_VECTORS * 4 * max(numbers) + kept
    # A consumer is scaled in float32.
    consumers = [numel(block, group.consumer.tensor) for group in block.groups]
    writing = 2 * sizes.weights + 4 * max(consumers, default=0)
    # Both models' heads are read, and found to be the same.
    return {
        Phase.EMBED: max(embed, beside + sizes.embeddings + CHUNK_BYTES + 2 * window),
        Phase.REPAIR: beside + sizes.head + max(max(divergence, learning) + step, writing, sizes.head) + CHUNK_BYTES,
    }


def _slicing(sizes: HostSizes) -> PhaseBytes:
    """Plan cutting the residual stream: bases beside block or embeddings, and the eigenvectors they are made of."""
    return slice_phases(
        sizes.request,
        SliceMemory(
            micro_batch=sizes.choice.micro_batch,
            buffered=sizes.choice.store == "file",
            stores_open=sizes.stores_open,
            stores_closed=sizes.stores_closed,
            weights=sizes.weights,
            cast=sizes.cast,
            activations=sizes.activations,
            largest_outer=max(sizes.outer.values()),
        ),
    )


def _pruning(sizes: HostSizes, kind: UnitKind, groups: Sequence[UnitGroup]) -> PhaseBytes:
    """Plan one sublayer's statistics, choice and solve; its removal costs and new producers, if they are asked for.

    Its groups are measured in one pass and solved one after the other, with the others' sums beside, or in their place
    what was cut of them already.
    """
    request, group = sizes.request, groups[0]
    problem = group_problem(request, sizes.block, group)
    inputs = group.num_units * group.width
    beside = sizes.pruning + sizes.weights + sizes.cast
    others, kept = len(groups) - 1, (problem.kept or inputs) // group.width
    cut = sizes.block.unit_parameters(group) * kept * problem.stored_item
    # What the gradient left of each sublayer in scope.
    sensitivities = len(by_kind(request.groups)) * sizes.hidden**2 * 4 if request.needs_sensitivity else 0
    # Activations are gone when the lower triangle is filled in, by tiles of a sixteenth.
    batch = max(measuring_bytes(sizes, group), 3 * problem.gram // 16)
    phases: PhaseBytes = {
        SublayerPhase.STATISTICS.of(kind): beside + (others + 1) * problem.sums + batch,
        SublayerPhase.SOLVE.of(kind): beside + others * max(problem.sums, cut) + problem.solve + sensitivities,
    }
    again = max(phases.values())
    if request.needs_sensitivity:
        # Gates measure the order of removals while a store is open.
        dense = max(sizes.stores_closed + sizes.gradient, sizes.stores_open if request.gates else 0) + sizes.weights
        grams = sum(gram_bytes(other) for other in request.groups if other is not group)
        ordered = inputs * sizes.hidden * problem.stored_item
        costs = problem.gram + grams + ordered + problem.removal_costs
        phases[SublayerPhase.REMOVAL_COSTS.of(kind)] = dense + costs + sensitivities
    if request.num_latents and kind == "mlp":
        tokens = solver_windows(request.num_windows, request.seq_len) * request.seq_len
        proposal = iteration_bytes(tokens, sizes.hidden, problem.kept or inputs, request.num_latents)
        # Behind the proposal the consumer is measured and solved again; meanwhile there is the original block.
        original = sizes.weights + sizes.cast
        phases[Phase.ITERATE] = original + max(again, sizes.pruning + original + proposal)
    return phases


def _added_by_slicing(sizes: HostSizes) -> int:
    """Return the bytes of an embedding that the head no longer shares, and of the shortcuts, at most 8 per number."""
    request = sizes.request
    if request.slices == "no":
        return 0
    untied = max(sizes.outer.values()) if request.layout.tied_embeddings else 0
    shortcuts = 2 * request.sliced_hidden**2 * 8 * len(request.layout.blocks) if request.slices == "bases" else 0
    return untied + shortcuts


def _disk_to_go_on(sizes: HostSizes) -> int:
    """Return the disk bytes that a resume needs. A snapshot is there twice while its successor is written."""
    request, hidden = sizes.request, sizes.hidden
    num_blocks = len(request.layout.blocks)
    window = request.seq_len * hidden * sizes.item
    # Of all ranks: they share one disk.
    total = 2 * sizes.num_stores * sizes.store * request.num_ranks + 4 * request.num_probe * window
    if request.needs_sensitivity or request.needs_weight_gradients:
        kept = (num_blocks + 1) * request.sensitivity_windows * window + 2 * sizes.gradient
        total += kept * request.num_ranks
    if request.needs_sensitivity:
        total += num_blocks * len({group.kind for group in request.groups}) * hidden * hidden * 4
    if request.slices != "no":
        total += 2 * hidden * hidden * 8
    if request.search is not None:
        total += disk_of_search(sizes, request.search)
    if request.repair_windows:
        # The blocks once more with what was learned, two snapshots, the best values of either, and the result. New
        # biases are in the shards, in the weight files, and as zeros beside what the repair begins with.
        total += sum(request.stored_bytes.values())
        total += (2 * LEARNED_VECTORS + 3) * 4 * sum(repair_numbers(request)) + 3 * 4 * new_bias_numbers(request)
        total += (2 * request.repair_windows + num_blocks) * window if sizes.choice.store == "file" else 0
    total += gate_disk_bytes(sizes) + merged_disk_bytes(sizes)
    return total + (sum(request.stored_bytes.values()) if request.num_rehearsals else 0)


def _reload_bound(sizes: HostSizes) -> ReloadBound:
    """Return the bound on the process that loads the result, beside what the run still holds."""
    layout = sizes.request.layout
    shapes = {block.prefix + name: shape for block in layout.blocks for name, shape in block.shapes.items()}
    shapes.update(layout.outer_tensors)
    return ReloadBound(
        run_bytes=sizes.stores_closed,
        casts=bool(
            {*layout.around.dtypes, *(sizes.request.stored_dtypes[name] for name in shapes)}
            - {sizes.request.compute_dtype}
        ),
        largest_bytes=max(torch.Size(shape).numel() for shape in shapes.values()) * sizes.item,
        item_bytes=sizes.item,
        vocab_size=layout.vocab_size,
    )
