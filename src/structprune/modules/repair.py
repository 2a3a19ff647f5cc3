"""Weights that read fewer units, solved again by least squares: linear maps, and convolutions as maps of patches.

Shape suffixes: O outputs, I inputs of the map (input channels times places of a kernel, and one for the bias), K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from structprune.modules.layout import Keep, ModuleLayout, Use
from structprune.modules.solve import Sums, least_squares_by_output
from structprune.tracing.replay import Example, Kept, See, cut_state, replay, watch
from structprune.tracing.terms import Atom, Term, kept_positions, leaves
from structprune.tracing.values import arguments_of

_MIN_EXAMPLES = 4
"""Examples from which every fourth one chooses the ridges instead of being fitted."""
_PATCH_NUMBERS = 1 << 22
"""Numbers of patches that are made at a time: 16 MiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How an operation is a linear map of rows of inputs."""

    weight: str
    """Argument that is the weight."""
    axis: int
    """Axis of the weight along which its inputs lie."""
    matrix: Callable[[Tensor], Tensor]
    """Weight -> (O, I)."""
    weight_of: Callable[[Tensor, Tensor], Tensor]
    """(O, I) and the old weight -> weight."""
    rows: Callable[[Mapping[str, Any]], Iterable[Tensor]]
    """Arguments -> inputs (tokens, I), a few samples at a time."""
    outputs: Callable[[Tensor], Tensor]
    """Result -> (tokens, O), in the order of the rows."""
    inputs: str
    """Argument that the weight is multiplied with."""


def _linear_rows(arguments: Mapping[str, Any]) -> Iterable[Tensor]:
    value = arguments["input"]
    yield value.reshape(-1, value.shape[-1])


def _addmm_rows(arguments: Mapping[str, Any]) -> Iterable[Tensor]:
    yield arguments["mat1"]


def _patches(arguments: Mapping[str, Any]) -> Iterable[Tensor]:
    """Yield the patches that each output of a convolution reads, (places, channels times places of the kernel)."""
    value, kernel = arguments["input"], arguments["weight"].shape[2:]
    spatial = len(kernel)
    stride, padding, dilation = (_pair(arguments[name], spatial) for name in ("stride", "padding", "dilation"))
    if spatial == 1:
        value, kernel = value[..., None, :], (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    each = max(value[0].numel() * kernel[0] * kernel[1] // (stride[0] * stride[1]), 1)
    for part in value.split(max(_PATCH_NUMBERS // each, 1)):
        found = F.unfold(part, tuple(kernel), dilation=dilation, padding=padding, stride=stride)
        yield found.transpose(1, 2).flatten(0, 1)


def _pair(given: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(given) * count if len(given) == 1 else tuple(given)


_LINEAR = Form(
    weight="weight",
    axis=1,
    matrix=lambda weight: weight,
    weight_of=lambda matrix_OI, _: matrix_OI,
    rows=_linear_rows,
    outputs=lambda result: result.reshape(-1, result.shape[-1]),
    inputs="input",
)
_ADDMM = Form(
    weight="mat2",
    axis=0,
    matrix=lambda weight: weight.T,
    weight_of=lambda matrix_OI, _: matrix_OI.T.contiguous(),
    rows=_addmm_rows,
    outputs=lambda result: result,
    inputs="mat1",
)
_CONVOLUTION = Form(
    weight="weight",
    axis=1,
    matrix=lambda weight: weight.flatten(1),
    weight_of=lambda matrix_OI, old: matrix_OI.reshape(old.shape),
    rows=_patches,
    outputs=lambda result: result.transpose(0, 1).flatten(1).T,
    inputs="input",
)
FORMS: Mapping[str, Form] = {"linear": _LINEAR, "addmm": _ADDMM, "conv1d": _CONVOLUTION, "conv2d": _CONVOLUTION}
"""Operations whose weights are solved again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Consumer:
    """One weight that reads units which leave."""

    weight: str
    bias: str | None
    form: Form
    node: Node
    term: Term
    """Axis of its inputs."""
    outputs: Term
    """Axis of its outputs."""


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
    judge = _Judge(layout, dense, [each for number, each in enumerate(examples) if _is_held_out(number, examples)])
    for atoms, consumers in _stages(layout, removed):
        sums = _measure(layout, consumers, examples, (dense, state), gone) if consumers else {}
        without = {**gone, **{atom: removed[atom] for atom in atoms}}
        final, judged = dict(state), dict(state)
        for consumer in consumers:
            _solve(consumer, state, sums[consumer.weight], (removed, gone), (final, judged))
        if consumers and judge.prefers(judged, state, without):
            state = final
            done += [consumer.weight for consumer in consumers]
        gone = without
    return state, done


def _is_held_out(number: int, examples: Sequence[Example]) -> bool:
    return len(examples) >= _MIN_EXAMPLES and number % _MIN_EXAMPLES == _MIN_EXAMPLES - 1


class _Judge:
    """How far the outputs of the smaller module are from the dense ones, for examples that nothing was fitted to."""

    def __init__(self, layout: ModuleLayout, dense: Mapping[str, Tensor], examples: Sequence[Example]) -> None:
        self._layout = layout
        self._examples = examples
        self._wanted = [replay(layout.traced, dense, example) for example in examples]

    def prefers(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], gone: Kept) -> bool:
        """Whether the first tensors do better than the second; always where there is no example to tell by."""
        return not self._examples or self._distance(first, gone) < self._distance(second, gone)

    def _distance(self, state: Mapping[str, Tensor], gone: Kept) -> float:
        cut = cut_state(self._layout.traced, state, gone)
        total = 0.0
        for example, wanted in zip(self._examples, self._wanted, strict=True):
            for one, other in zip(replay(self._layout.traced, cut, example, gone), wanted, strict=True):
                if other.is_floating_point():
                    total += float((one - other).square().sum() / other.square().sum().clamp_min(1e-30))
        return total


def _stages(layout: ModuleLayout, removed: Mapping[Atom, Sequence[int]]) -> list[tuple[set[Atom], list[_Consumer]]]:
    """Group the atoms that some consumer reads together, in the order of their first consumers."""
    stages: list[tuple[set[Atom], list[_Consumer]]] = []
    for consumer in _consumers(layout):
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


def _consumers(layout: ModuleLayout) -> list[_Consumer]:
    """List the maps whose weights can be solved, in the order of the graph."""
    found: list[_Consumer] = []
    order = {node: number for number, node in enumerate(layout.traced.program.graph.nodes)}
    for name, uses in layout.uses.items():
        form = FORMS.get(uses[0].operation)
        if name not in layout.parameters or form is None or len(uses) != 1 or uses[0].argument != form.weight:
            continue
        arguments = arguments_of(uses[0].node)
        if arguments.get("groups", 1) != 1 or isinstance(arguments.get("padding"), str):
            continue
        dims = layout.traced.parameters[name]
        found.append(
            _Consumer(
                weight=name,
                bias=_bias(layout, uses[0]),
                form=form,
                node=uses[0].node,
                term=dims[form.axis],
                outputs=dims[1 - form.axis],
            )
        )
    return sorted(found, key=lambda consumer: order[consumer.node])


def _bias(layout: ModuleLayout, use: Use) -> str | None:
    """Name the bias of an operation that no other one reads."""
    for name, uses in layout.uses.items():
        if len(uses) == 1 and uses[0].node is use.node and uses[0].is_bias:
            return name
    return None


def _measure(
    layout: ModuleLayout,
    consumers: Sequence[_Consumer],
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
        watch(layout.traced, dense, example, {}, {each.node: _keeps(each, targets, gone) for each in consumers})
        watch(layout.traced, cut, example, gone, {each.node: _adds(each, targets, sums, held) for each in consumers})
    return {each.weight: (sums[each.weight, False], sums.get((each.weight, True))) for each in consumers}


def _keeps(consumer: _Consumer, targets: dict[str, Tensor], gone: Kept) -> See:
    """Return what keeps the dense outputs of a map, those that are still there."""
    rows = torch.tensor(kept_positions(consumer.outputs, gone))

    def see(_: Mapping[str, Any], result: Tensor) -> None:
        targets[consumer.weight] = consumer.form.outputs(result)[:, rows.to(result.device)]

    return see


def _adds(consumer: _Consumer, targets: dict[str, Tensor], sums: dict[tuple[str, bool], Sums], held: bool) -> See:
    """Return what adds up the products of a map's inputs."""
    return lambda named, _: _add(sums, consumer, named, targets.pop(consumer.weight), held)


def _add(
    sums: dict[tuple[str, bool], Sums], consumer: _Consumer, named: Mapping[str, Any], target_TO: Tensor, held: bool
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
    consumer: _Consumer,
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
    whole_OI = form.matrix(old)
    rows = torch.tensor(kept_positions(consumer.outputs, gone))
    keep = torch.zeros(consumer.term.size, dtype=torch.bool)
    keep[kept_positions(consumer.term, removed)] = True
    keep_I = keep.repeat_interleave(whole_OI.shape[1] // len(keep))
    if consumer.bias is not None:
        whole_OI = torch.cat([whole_OI, state[consumer.bias][:, None]], 1)
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
