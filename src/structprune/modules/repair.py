"""Weights that read fewer units, solved again by least squares: linear maps, and convolutions as maps of patches.

Shape suffixes: O outputs, I inputs of the map (input channels times places of a kernel, and one for the bias), K kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from structprune.modules.consumers import Consumer, consumers, whole_weight
from structprune.modules.layout import Keep, ModuleLayout
from structprune.modules.outputs import OutputError
from structprune.modules.solve import Sums, least_squares_by_output
from structprune.tracing.replay import Example, Kept, See, cut_state, watch
from structprune.tracing.terms import Atom, kept_positions, leaves

_MIN_EXAMPLES = 4
"""Examples from which every fourth one chooses the ridges instead of being fitted."""


def repaired(layout: ModuleLayout, keep: Keep, examples: Sequence[Example]) -> tuple[dict[str, Tensor], list[str]]:
    """Solve the weights that read removed units again, so that each gives what it gave in the dense module.

    Stages (families that share a consumer) go in the order of the graph, each on inputs that the repaired stages before
    it give, with the dense module's outputs as targets: (tensors, names of the weights that were solved). Every fourth
    example is held out: it chooses the ridges (`solve.py`), and where the new weights of a stage bring what the whole
    module returns no nearer to the dense module for it, the old ones stay. The weights are then solved on all examples.
    Weights in groups, transposed or read by several operations stay as they are.
    """
    state = {name: tensor.detach() for name, tensor in layout.state.items()}
    dense, done = dict(state), list[str]()
    removed = {atom: units for atom, units in layout.kept_atoms(keep).items() if len(units) < atom.size}
    gone: dict[Atom, Sequence[int]] = {}
    error = OutputError(layout, dense, [each for number, each in enumerate(examples) if _is_held_out(number, examples)])
    for atoms, together in _stages(layout, removed):
        sums = measure_sums(layout, together, examples, (dense, state), gone) if together else {}
        without = {**gone, **{atom: removed[atom] for atom in atoms}}
        final, judged = dict(state), dict(state)
        for consumer in together:
            _solve(consumer, state, sums[consumer.weight], (removed, gone), (final, judged))
        # Without an example to tell by, the new weights are taken.
        if together and (not error or error.without(judged, without) < error.without(state, without)):
            state = final
            done += [consumer.weight for consumer in together]
        gone = without
    return state, done


def _is_held_out(number: int, examples: Sequence[Example]) -> bool:
    return len(examples) >= _MIN_EXAMPLES and number % _MIN_EXAMPLES == _MIN_EXAMPLES - 1


def _stages(layout: ModuleLayout, removed: Mapping[Atom, Sequence[int]]) -> list[tuple[set[Atom], list[Consumer]]]:
    """Group the atoms that some consumer reads together, in the order of their first consumers."""
    stages: list[tuple[set[Atom], list[Consumer]]] = []
    for consumer in consumers(layout):
        read = leaves(consumer.term).keys() & removed.keys()
        if not read:
            continue
        joined = [stage for stage in stages if stage[0] & read]
        together = (set(read).union(*(stage[0] for stage in joined)), [each for stage in joined for each in stage[1]])
        together[1].append(consumer)
        place = min((stages.index(stage) for stage in joined), default=len(stages))
        stages = [stage for stage in stages if stage not in joined]
        stages.insert(place, together)
    rest = removed.keys() - {atom for atoms, _ in stages for atom in atoms}
    # What no such map reads leaves first, so that those behind it see what is left.
    return [(set(rest), []), *stages] if rest else stages


def measure_sums(
    layout: ModuleLayout,
    together: Sequence[Consumer],
    examples: Sequence[Example],
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    gone: Kept,
) -> dict[str, tuple[Sums, Sums | None]]:
    """Sum products of inputs with each other and with the dense module's outputs: (fitted, held out) by weight.

    `states` has the tensors of the dense module and those of the repaired one, which gives the inputs without the units
    that left in the stages before.
    """
    dense, state = states
    cut = cut_state(layout.traced, state, gone)
    sums: dict[tuple[str, bool], Sums] = {}
    for number, example in enumerate(examples):
        targets: dict[str, Tensor] = {}
        held = _is_held_out(number, examples)
        watch(layout.traced, dense, example, {}, {each.node: _keeps(each, targets, gone) for each in together})
        watch(layout.traced, cut, example, gone, {each.node: _adds(each, targets, sums, held) for each in together})
    return {each.weight: (sums[each.weight, False], sums.get((each.weight, True))) for each in together}


def _keeps(consumer: Consumer, targets: dict[str, Tensor], gone: Kept) -> See:
    """Return what keeps the dense outputs of a map, those that are still there."""
    rows = torch.tensor(kept_positions(consumer.outputs, gone))

    def see(_: Mapping[str, Any], result: Tensor) -> None:
        targets[consumer.weight] = consumer.form.outputs(result)[:, rows.to(result.device)]

    return see


def _adds(consumer: Consumer, targets: dict[str, Tensor], sums: dict[tuple[str, bool], Sums], held: bool) -> See:
    """Return what adds up the products of a map's inputs."""
    return lambda named, _: _add(sums, consumer, named, targets.pop(consumer.weight), held)


def _add(
    sums: dict[tuple[str, bool], Sums], consumer: Consumer, named: Mapping[str, Any], target_TO: Tensor, held: bool
) -> None:
    start = 0
    for part in consumer.form.rows(named):
        rows_TI = part if consumer.bias is None else torch.cat([part, part.new_ones(len(part), 1)], 1)
        wanted_TO = target_TO[start : start + len(rows_TI)]
        start += len(rows_TI)
        inputs = rows_TI.shape[1]
        found = sums.get((consumer.weight, held))
        if found is None:
            found = sums[consumer.weight, held] = Sums(
                gram_II=rows_TI.new_zeros(inputs, inputs, dtype=torch.float64),
                target_OI=rows_TI.new_zeros(wanted_TO.shape[1], inputs, dtype=torch.float64),
            )
        # Products of a part are exact enough in the model's type; their sum over all parts is not.
        found.gram_II += rows_TI.T @ rows_TI
        found.target_OI += wanted_TO.T @ rows_TI


def _solve(
    consumer: Consumer,
    state: Mapping[str, Tensor],
    sums: tuple[Sums, Sums | None],
    kept: tuple[Kept, Kept],
    results: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    """Put a new weight and bias, of the old shapes and zero for the inputs that leave, into both `results`.

    `kept` has what stays in the end, and what has left already. The first result is solved on all examples, the second
    on those that are not held out.
    """
    removed, gone = kept
    old, form = state[consumer.weight], consumer.form
    whole_OI = whole_weight(consumer, state)
    rows = torch.tensor(kept_positions(consumer.outputs, gone))
    keep = torch.zeros(consumer.term.size, dtype=torch.bool)
    keep[kept_positions(consumer.term, removed)] = True
    # A bias is no multiple of the inputs, and stays.
    keep_I = keep.repeat_interleave(whole_OI.shape[1] // len(keep))
    if consumer.bias is not None:
        keep_I = torch.cat([keep_I, torch.ones(1, dtype=torch.bool)])
    solution = least_squares_by_output(whole_OI[rows], keep_I, *sums)
    for result, weight_OK in zip(results, (solution.weight_OK, solution.judged_OK), strict=True):
        if weight_OK is None:
            continue
        solved_OI = torch.zeros_like(whole_OI)
        solved_OI[rows[:, None], keep_I.nonzero().T] = weight_OK.to(whole_OI.dtype)
        if consumer.bias is not None:
            result[consumer.bias] = solved_OI[:, -1].contiguous()
            solved_OI = solved_OI[:, :-1]
        result[consumer.weight] = form.weight_of(solved_OI, old)
