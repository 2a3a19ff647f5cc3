"""Bytes of a search over widths: host, disk and device."""

from __future__ import annotations

from collections.abc import Sequence

from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.searching import KEPT_VARIANTS, SearchWork
from structprune.engine.planning.shapes import by_kind, divergence_bytes, gram_bytes, group_problem, statistics_bytes
from structprune.engine.planning.sizes import CHUNK_BYTES, HostSizes
from structprune.memory import HEAP_BLOCK_BYTES
from structprune.phases import Phase, PhaseBytes, SublayerPhase
from structprune.statistics.gram import NUM_STRIPS
from structprune.types import BlockLayout, UnitGroup, UnitKind


def search_phases(sizes: HostSizes) -> PhaseBytes:
    """Plan a search over widths: the sums of all consumers of a block, what follows from one, and what candidates take.

    Candidates' hidden states take no more than those of the pass that prunes, however many there are.
    """
    request, block = sizes.request, sizes.block
    beside = sizes.stores_open + sizes.weights + sizes.cast
    grams = sum(gram_bytes(group) for group in request.groups)
    phases: PhaseBytes = {
        Phase.SEARCH_STATISTICS: beside
        + grams
        + max(sizes.activations, *(measuring_bytes(sizes, group) for group in request.groups)),
    }
    for kind, groups in by_kind(request.groups).items():
        problem = group_problem(request, block, groups[0]).alone
        ordered = problem.inputs * sizes.hidden * problem.stored_item
        # What was measured of each sublayer's sensitivity is read again.
        order = grams + ordered + max(problem.decide, problem.removal_costs)
        if request.needs_sensitivity:
            order += len(by_kind(request.groups)) * sizes.hidden**2 * 4
        phases[SublayerPhase.SEARCH_ORDER.of(kind)] = beside + order
        # The block as it was, and as it is cut.
        phases[SublayerPhase.SEARCH_SOLVE.of(kind)] = beside + sizes.weights + problem.gram + problem.solve
    window = 2 * request.seq_len * sizes.hidden * sizes.item
    compared = sizes.head + CHUNK_BYTES + divergence_bytes(request.layout.vocab_size, request.compute_dtype) + window
    running = 2 * sizes.weights + sizes.cast + sizes.activations
    phases[Phase.SEARCH_CANDIDATES] = sizes.stores_open + max(compared, running)
    return phases


def measuring_bytes(sizes: HostSizes, group: UnitGroup) -> int:
    """Return the bytes of a micro-batch where sums are taken of the inputs of a group's consumer."""
    batch = max(sizes.activations, statistics_bytes(sizes.request, group, sizes.choice.micro_batch))
    if sizes.item == 4:
        return batch
    # The same input in float32, where it is too large for the holes that the activations left in the heap, and what the
    # library makes of it and of one strip to multiply them in bfloat16.
    wide = sizes.micro_batch_tokens * group.num_units * group.width * 4
    return batch + (wide if wide >= HEAP_BLOCK_BYTES else 0) + wide // 2 + wide // 2 // NUM_STRIPS


def disk_of_search(sizes: HostSizes, search: SearchWork) -> int:
    """Return the disk bytes of a search: sums and solved consumers of every sublayer, and the dense model's states."""
    total = sizes.store + 2 * (search.windows.fitted * sizes.request.seq_len * sizes.hidden * sizes.item)
    for block in sizes.request.layout.blocks:
        for kind in by_kind(sizes.request.groups):
            for group in block.groups_of(kind):
                inputs = group.num_units * group.width
                name = block.prefix + group.consumer.tensor
                solved = KEPT_VARIANTS * sizes.request.stored_bytes[name] + group.num_units * 8 * KEPT_VARIANTS
                total += gram_bytes(group) + 8 * inputs + 16 * group.num_units + solved
    return total


def search_solve_phases(
    request: PlanRequest, block: BlockLayout, kind: UnitKind, parts: Sequence[UnitGroup], beside: int
) -> PhaseBytes:
    """Plan ordering the units of a sublayer, and solving one of its widths."""
    problem = group_problem(request, block, parts[0]).alone
    copied = problem.inputs**2 * 8
    sensitivity = request.layout.hidden_size**2 * 4 if request.needs_sensitivity else 0
    grams = sum(gram_bytes(group) for group in request.groups)
    order = grams + max(problem.decide, problem.removal_costs) + sensitivity
    return {
        SublayerPhase.SEARCH_ORDER.of(kind): beside + order + copied,
        SublayerPhase.SEARCH_SOLVE.of(kind): beside + problem.solve + copied,
    }
