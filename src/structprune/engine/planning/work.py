"""How often a run will do each of the things that take its time, counted from shapes and settings.

What one of each takes on this machine is measured in `engine/run/pace.py`. Small things (reading text, reading and
writing weights) are left out, and every block counts as wide as it is before it is cut.
"""

from __future__ import annotations

from structprune.engine.planning.merged import judged_windows, merged_work
from structprune.engine.planning.pieces import Counts, Piece, What, Work
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.searching import candidate_windows, solved_widths
from structprune.engine.planning.shapes import by_kind
from structprune.engine.planning.sizes import HostChoice
from structprune.recipe.training import num_kept_apart
from structprune.types import UNIT_KINDS, Stage, UnitKind

# Experts that a token is sent to, where a sublayer has several parts.
_PARTS_PER_TOKEN = 2


def planned_work(request: PlanRequest, choice: HostChoice) -> Work | None:
    """Count the work of the whole run by its stretches, for the rank with the most windows.

    None where an iterative solver takes part, whose number of steps depends on what it finds.
    """
    if request.num_latents:
        return None
    counted: Work = {
        "sensitivity": _sensitivity(request),
        "choice of blocks": _choice_of_blocks(request),
        "gates": _gates(request),
        "search": _search(request),
        "blocks": _blocks(request, choice),
        "repair": _repair(request),
        "merged rows": _merged_rows(request),
        "perplexities and checks": _measurements(request),
    }
    return {name: counts for name, counts in counted.items() if counts}


def _added(*counts: Counts) -> dict[Piece, float]:
    """Add up, and leave out what is not done at all."""
    total: dict[Piece, float] = {}
    for each in counts:
        for piece, times in each.items():
            if times:
                total[piece] = total.get(piece, 0) + times
    return total


def _left(request: PlanRequest) -> float:
    """Return the share of the blocks that the result has."""
    return 1 - request.num_removed_blocks / len(request.layout.blocks)


def _passes(request: PlanRequest, num_windows: float) -> Counts:
    """Pass so many windows through all blocks."""
    return _added(
        *({Piece(What.STAGE, stage[0]): num_windows * blocks} for stage, blocks in request.num_stages.items())
    )


def _parts(request: PlanRequest, what: What) -> Counts:
    """Count something once for each part of every block's sublayers in scope."""
    return {Piece(what, kind): sum(_num_parts(request, kind)) for kind in by_kind(request.groups)}


def _num_parts(request: PlanRequest, kind: UnitKind) -> list[int]:
    """Count the parts of the sublayer in each block."""
    return [len(block.groups_of(kind)) for block in request.layout.blocks]


def _sums(request: PlanRequest, num_windows: float) -> Counts:
    """Sum the inputs of every consumer in scope over so many windows."""
    return {
        Piece(What.SUMS, kind): num_windows * sum(min(parts, _PARTS_PER_TOKEN) for parts in _num_parts(request, kind))
        for kind in by_kind(request.groups)
    }


def _sensitivity(request: PlanRequest) -> Counts:
    """Count what is measured of the dense model first."""
    found: Counts = {}
    windows, blocks = request.sensitivity_windows, len(request.layout.blocks)
    if request.needs_sensitivity or request.needs_weight_gradients:
        backward = What.WEIGHT_BACKWARD if request.needs_weight_gradients else What.BACKWARD
        once = {Piece(backward): windows * blocks, Piece(What.HEAD_BACKWARD): windows}
        found = _added(_passes(request, windows), once)
    if request.needs_sensitivity and request.elements:
        kinds = by_kind(request.groups)
        found = _added(found, {Piece(What.MAP_SUMS, kind): windows * len(_num_parts(request, kind)) for kind in kinds})
    elif request.needs_sensitivity:
        sublayers = sum(parts > 0 for kind in by_kind(request.groups) for parts in _num_parts(request, kind))
        gradients = {Piece(What.STREAM_SUMS): windows * sublayers}
        found = _added(found, _sums(request, windows), gradients, _parts(request, What.COSTS))
    if request.needs_scores:
        sums = {} if request.elements else _sums(request, request.num_windows)
        found = _added(found, _passes(request, request.num_windows), sums)
    return found


def _choice_of_blocks(request: PlanRequest) -> Counts:
    """Count choosing whole blocks: one pass, or for each that goes one of all candidates."""
    if request.compares == "boundaries":
        return _added(_passes(request, request.num_windows))
    if request.compares != "losses":
        return {}
    candidates, found = request.num_stores or 1, dict[Piece, float]()
    num_blocks = len(request.layout.blocks)
    for gone in range(request.num_removed_blocks):
        # A candidate's stream begins behind its own block, and before the last of these there is the one of all others.
        left, there = candidates - gone, num_blocks - gone
        passes = _passes(request, request.num_windows * (there * (left + 1) / 2 - 1) / num_blocks)
        found = _added(found, passes, {Piece(What.HEAD): request.num_windows * left})
    return found


def _search(request: PlanRequest) -> Counts:
    """Count a search over widths: what it is solved from, and its candidates; two heads are compared at each window."""
    search = request.search
    if search is None:
        return {}
    measured, compared = candidate_windows(search)
    kinds = by_kind(request.groups)
    sublayers: dict[UnitKind, int] = {kind: sum(_num_parts(request, kind)) for kind in kinds}
    solved = solved_widths(search, sum(sublayers.values())) / max(1, sum(sublayers.values()))
    return _added(
        _passes(request, measured + request.num_windows),
        _sums(request, search.windows.fitted),
        _parts(request, What.COSTS),
        {Piece(What.SEARCH_SOLVE, kind): solved * parts for kind, parts in sublayers.items()},
        {Piece(What.HEAD): 1.5 * compared},
    )


def _blocks(request: PlanRequest, choice: HostChoice) -> Counts:
    """Count the pass that writes the blocks."""
    if request.elements:
        return _elements(request, choice)
    return _slicing(request) if request.slices != "no" else _pruning(request, choice)


def _elements(request: PlanRequest, choice: HostChoice) -> Counts:
    """Count pruning single weights: both streams move on, and every group of maps is measured and solved."""
    windows, both = request.num_windows, 2 if request.follows_dense else 1
    found = _passes(request, windows if request.follows_dense else request.num_probe)
    for stage, blocks in request.num_stages.items():
        what = What.CONSUMER if stage[0] in choice.cached else What.STAGE
        found = _added(found, {Piece(what, stage[0]): windows * blocks})
    for block in request.layout.blocks:
        steps = request.elements[frozenset(block.shapes)]
        for kind in UNIT_KINDS:
            problems = [problem for step in steps if step.kind == kind for problem in step.problems]
            read, summed = any(each.read for each in problems), any(each.squares for each in problems)
            found = _added(
                found,
                {
                    Piece(What.MAP_INPUTS, kind): windows * both if read else 0,
                    Piece(What.MAP_SUMS, kind): windows if summed else 0,
                    Piece(What.MAP_SOLVE, kind): 1 if problems else 0,
                },
            )
    return found


def _pruning(request: PlanRequest, choice: HostChoice) -> Counts:
    """Count the pass that prunes, or copies, every block, and the rehearsals of it."""
    found = _added(*(_stage(request, choice, stage, blocks) for stage, blocks in request.num_stages.items()))
    if request.needs_statistics:
        solved = (_parts(request, What.CHOICE), _parts(request, What.SOLVE))
        found = _added(found, _sums(request, request.num_windows), *solved)
    rehearsal = _added(found, _parts(request, What.COSTS))
    return _added(found, *[rehearsal] * request.num_rehearsals)


def _stage(request: PlanRequest, choice: HostChoice, stage: Stage, blocks: int) -> Counts:
    """Count one stage of so many blocks: both streams move on, and each sublayer in scope is measured."""
    windows = request.num_windows
    measured = windows * sum(kind in by_kind(request.groups) for kind in stage) if request.needs_statistics else 0
    dense = windows if request.follows_dense else request.num_probe
    if measured and stage[0] in choice.cached:
        return {
            Piece(What.STAGE, stage[0]): blocks * (dense + measured),
            Piece(What.CONSUMER, stage[0]): blocks * windows,
        }
    # Where whole blocks are chosen, only the reported windows pass those that are left.
    pruned = windows if request.compares == "nothing" else _left(request) * request.num_probe
    return {Piece(What.STAGE, stage[0]): blocks * (dense + measured + pruned)}


def _slicing(request: PlanRequest) -> Counts:
    """Count cutting the stream at every position: with bases of their own in one pass, else after a dense one."""
    positions = len(request.layout.blocks) * len(UNIT_KINDS) + 1
    again = 0 if request.slices == "bases" else request.num_probe
    return _added(
        _passes(request, request.num_windows + again + request.num_probe),
        {
            Piece(What.STREAM_SUMS): (request.num_windows + again) * positions,
            Piece(What.BASIS): positions if request.slices == "bases" else 1,
        },
    )


def _repair(request: PlanRequest) -> Counts:
    """Count the passes over the windows that teach, the measurements at their ends, and the reported windows.

    The teacher passes each window once.
    """
    windows = request.repair_windows
    if not windows:
        return {}
    measured = num_kept_apart(windows)
    taught, blocks = windows - measured, len(request.layout.blocks)
    steps, evaluations = request.repair_epochs * taught, 1 + request.repair_epochs
    return _added(
        _passes(request, taught + steps + (1 + evaluations) * measured + request.num_probe),
        {
            Piece(What.BACKWARD): steps * blocks,
            Piece(What.HEAD_BACKWARD): 2 * steps,
            Piece(What.HEAD): 2 * evaluations * measured,
        },
    )


def _merged_rows(request: PlanRequest) -> Counts:
    """Count passing all windows through the pruned model, and those that measure once more, with what is fitted."""
    if not request.missing_tokens:
        return {}
    judged = judged_windows(request) + request.num_probe
    return _added(_passes(request, _left(request) * (request.num_windows + judged)), merged_work(request))


def _gates(request: PlanRequest) -> Counts:
    """Count the pass over the windows that teach, the steps, each on one of them, and the measurements.

    The teacher passes each window once that takes part. With several texts each has windows that only measure; here
    they are counted as those of one.
    """
    gates = request.gates
    if gates is None:
        return {}
    measured = num_kept_apart(request.num_windows)
    taught, blocks = request.num_windows - measured, len(request.layout.blocks)
    evaluations = 1 + -(-gates.steps // taught)
    steps = gates.steps * gates.sets
    passes = taught + min(gates.steps, taught) + steps + (1 + evaluations) * measured
    heads = Piece(What.HEAD_BACKWARD if gates.backward else What.HEAD)
    return _added(
        _passes(request, passes),
        _sums(request, taught),
        _parts(request, What.COSTS),
        {Piece(What.HEAD): 2 * evaluations * measured},
        {heads: 2 * steps},
        {Piece(What.BACKWARD): steps * blocks} if gates.backward else {},
    )


def _measurements(request: PlanRequest) -> Counts:
    """Count the perplexities of both models; the reload check is in a process of its own."""
    windows = request.held_out_windows
    heads = {Piece(What.HEAD): 2 * (windows + request.num_probe)}
    return _added(_passes(request, (1 + _left(request)) * windows), heads)
