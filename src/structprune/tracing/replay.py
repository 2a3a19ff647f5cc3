"""Running a traced graph with tensors of any widths, and the proof that to remove units is to mask them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from structprune.errors import InputError, UnsupportedError, first_line
from structprune.tracing.families import Family
from structprune.tracing.graph import IGNORED, STATE_KINDS, Traced
from structprune.tracing.rules import operation
from structprune.tracing.rules.operation import Call
from structprune.tracing.terms import Atom, Term, kept_positions
from structprune.tracing.values import Value, arguments_of, operation_name

Kept = Mapping[Atom, Sequence[int]]
"""Atom -> the things that stay, ascending."""
See = Callable[[Mapping[str, Any], Any], None]
"""Takes the arguments of an operation by their names, and its result."""
TOLERANCE: Mapping[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest difference from the masked module, as a share of its largest output; of other types 3e-2.

Parts of stock code compute in float32 whatever the type is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Arguments of a module, of the same form as those that it was traced with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What was found as units were removed."""

    difference: float
    """Largest difference of an output from that of the masked module, as a share of the largest output."""
    effect: float
    """Largest difference of the masked module from the whole one, as a share of the largest output."""


def replay(traced: Traced, state: Mapping[str, Tensor], example: Example, kept: Kept | None = None) -> list[Tensor]:
    """Run the graph with these parameters and buffers, and return the tensors that come out and must stay.

    `kept` says which units `state` has left; sizes that the code has written down are changed with them.
    """
    return _Replay(traced, state, kept or {}).outputs(example)


def returned(traced: Traced, state: Mapping[str, Tensor], example: Example, kept: Kept | None = None) -> Any:
    """Run the graph like `replay`, with gradients where they are on, and return all that the module returns."""
    program = traced.program
    run = _Replay(traced, state, kept or {})
    found = run.run(*graph_inputs(traced, state, example), enable_io_processing=False)
    specs = program.graph_signature.output_specs
    given = [each for each, spec in zip(found, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
    assert program.call_spec.out_spec is not None
    return pytree.tree_unflatten(given, program.call_spec.out_spec)


def watch(
    traced: Traced, state: Mapping[str, Tensor], example: Example, kept: Kept, watched: Mapping[Node, See]
) -> None:
    """Run the graph like `replay` up to the last of some operations, and show each: its arguments, and its result."""
    run = _Replay(traced, state, kept, watched=watched)
    with torch.no_grad():
        run.run(*graph_inputs(traced, state, example), enable_io_processing=False)


def graph_inputs(traced: Traced, state: Mapping[str, Tensor], example: Example) -> list[Any]:
    """List what goes into the graph, in its order. Raises InputError for arguments of another form than the traced."""
    program = traced.program
    given, form = pytree.tree_flatten((tuple(example.args), dict(example.kwargs)))
    if form != program.call_spec.in_spec:
        raise InputError(
            "the arguments have another form than those that were traced",
            got=str(form),
            wanted=str(program.call_spec.in_spec),
        )
    inputs = iter(given)
    values: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind in STATE_KINDS:
            values.append(state[str(spec.target)])
        elif spec.kind == InputKind.USER_INPUT:
            values.append(next(inputs))
        else:
            raise UnsupportedError("the graph has an input that is neither tensor nor argument", got=str(spec))
    return values


def cut_state(traced: Traced, state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Select from every axis what stays. Tensors without a removed unit are passed through."""
    return _changed(traced, state, kept, lambda tensor, axis, index: tensor.index_select(axis, index))


def masked_state(traced: Traced, state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Put zeros in the place of all that `cut_state` leaves out, but in numbers of things, where zero is the first."""

    def masked(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        gone = torch.ones(tensor.shape[axis], dtype=torch.bool).index_fill_(0, index.cpu(), False)
        return tensor.index_fill(axis, torch.nonzero(gone).flatten().to(tensor.device), 0)

    return _changed(traced, state, kept, masked)


def check_removal(
    traced: Traced, state: Mapping[str, Tensor], example: Example, kept: Mapping[Family, Sequence[int]]
) -> Removal:
    """Compare the module without some units with the module that has zeros in their place.

    `kept` has the units of each family that stay, ascending. Raises UnsupportedError that names the first operation
    whose result differs.
    """
    for family, units in kept.items():
        if not units or list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= family.num_units:
            raise InputError(
                "these units cannot stay",
                got=str(list(units)),
                wanted=f"some of 0 ... {family.num_units - 1}, ascending",
            )
    sizes = {family.atom: units for family, units in kept.items()}
    return check_states(
        traced,
        example,
        sizes,
        cut=cut_state(traced, state, sizes),
        masked=masked_state(traced, state, sizes),
        whole=state,
    )


def check_states(
    traced: Traced,
    example: Example,
    kept: Kept,
    *,
    cut: Mapping[str, Tensor],
    masked: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
) -> Removal:
    """Compare the graph with the tensors of `cut` with the one that has zeros there, and that with the whole one.

    Here units may have been chosen otherwise than `kept` says, as many of each: `kept` gives the sizes. Raises
    UnsupportedError that names the first operation whose result differs.
    """
    smaller, zeroed, dense = (
        replay(traced, cut, example, kept),
        replay(traced, masked, example),
        replay(traced, whole, example),
    )
    difference = max(_relative(one, other) for one, other in zip(smaller, zeroed, strict=True))
    effect = max(_relative(one, other) for one, other in zip(zeroed, dense, strict=True))
    # Not `difference > tolerance`: what is not a number is no equality.
    if not difference <= TOLERANCE.get(dense[0].dtype, 3e-2):
        raise UnsupportedError(
            "without these units the module does not compute what it computes with zeros in their place",
            where=_first_difference(traced, example, kept, cut, masked),
            got=f"a difference of {difference:.1e} of the largest output, where the units themselves make {effect:.1e}",
            do="leave these units in",
        )
    return Removal(difference=difference, effect=effect)


def _changed(
    traced: Traced, state: Mapping[str, Tensor], kept: Kept, change: Callable[[Tensor, int, Tensor], Tensor]
) -> dict[str, Tensor]:
    result = dict(state)
    for name, dims in traced.parameters.items():
        for axis, term in enumerate(dims):
            positions = kept_positions(term, kept)
            if len(positions) < term.size:
                index = torch.tensor(positions, dtype=torch.long, device=result[name].device)
                result[name] = change(result[name], axis, index)
    return result


def _relative(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return float("inf")
    if not second.is_floating_point() or second.numel() == 0:
        return 0.0 if torch.equal(first, second) else float("inf")
    return float((first - second).abs().max() / second.abs().max().clamp_min(torch.finfo(second.dtype).tiny))


def _first_difference(
    traced: Traced, example: Example, kept: Kept, cut: Mapping[str, Tensor], masked: Mapping[str, Tensor]
) -> str:
    """Name the first operation whose result, where it is kept, is not that of the masked graph."""
    smaller, zeroed = _Replay(traced, cut, kept, record=True), _Replay(traced, masked, {}, record=True)
    smaller.outputs(example)
    zeroed.outputs(example)
    for node, found in smaller.seen.items():
        wanted, value = zeroed.seen[node], traced.values.get(node)
        if not isinstance(value, Value) or not found.is_floating_point():
            continue
        for axis, term in enumerate(value.dims):
            wanted = _select(wanted, axis, term, kept)
        if _relative(found, wanted) > TOLERANCE.get(found.dtype, 3e-2):
            return _name(node)
    return "output"


def _name(node: Node) -> str:
    """Name an operation; of one result of several, the operation that they are of."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, Node)
    return f"{operation_name(source)} ({source.name})"


def _select(tensor: Tensor, axis: int, term: Term, kept: Kept) -> Tensor:
    positions = kept_positions(term, kept)
    if len(positions) == term.size:
        return tensor
    return tensor.index_select(axis, torch.tensor(positions, dtype=torch.long, device=tensor.device))


class _Replay(Interpreter):
    """One run of a graph, operation after operation, each with its sizes written anew."""

    def __init__(
        self,
        traced: Traced,
        state: Mapping[str, Tensor],
        kept: Kept,
        *,
        record: bool = False,
        watched: Mapping[Node, See] | None = None,
    ) -> None:
        super().__init__(traced.program.graph_module, garbage_collect_values=not record)
        self.extra_traceback = False
        self._traced = traced
        self._state = state
        self._kept = kept
        self._record = record
        self._watched = watched
        self._unseen = set(watched or ())
        self._results: dict[Node, Tensor] = {}
        self.seen: dict[Node, Tensor] = {}
        """Results by node, where they are recorded."""

    def outputs(self, example: Example) -> list[Tensor]:
        """Run the graph. Raises InputError for arguments of another form than those that were traced."""
        values = graph_inputs(self._traced, self._state, example)
        with torch.no_grad():
            self.run(*values, enable_io_processing=False)
        return [self._results[each] for each in self._traced.outputs]

    def run_node(self, n: Node) -> Any:
        """Run one operation with the sizes that its inputs have now."""
        if self._watched is not None and not self._unseen:
            # Nothing behind the last operation is wanted.
            return None
        result = self._run(n)
        if self._watched is not None and n in self._unseen:
            self._unseen.remove(n)
            named = {name: self.map_nodes_to_values(each, n) for name, each in arguments_of(n).items()}
            self._watched[n](named, result)
        if n in self._traced.outputs:
            self._results[n] = result
        return result

    def _run(self, n: Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        if operation_name(n) in IGNORED:
            return None
        try:
            result = self._call(n)
        except RuntimeError as error:
            raise UnsupportedError(
                "this operation does not run with fewer units", where=_name(n), got=first_line(error)
            ) from error
        if self._record and isinstance(result, Tensor):
            # Operations in place may write over it later.
            self.seen[n] = result.clone()
        return result

    def _call(self, node: Node) -> Any:
        entry = operation(operation_name(node))
        value = self._traced.values.get(node)
        if not self._kept or entry is None or entry.resize is None or value is None:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            target: Any = node.target
            return target(*args, **kwargs)
        named = arguments_of(node)
        known = {
            name: found
            for name, given in named.items()
            for each in (given if isinstance(given, list | tuple) else (given,))
            if isinstance(each, Node) and isinstance(found := self._traced.values.get(each), Value)
        }
        call = Call(
            target=node.target,
            arguments={name: self.map_nodes_to_values(each, node) for name, each in named.items()},
            inputs=known,
            output=value,
            kept=self._kept,
        )
        entry.resize(call)
        args = [call.arguments[each.name] for each in call.target._schema.arguments if not each.kwarg_only]
        kwargs = {each.name: call.arguments[each.name] for each in call.target._schema.arguments if each.kwarg_only}
        return call.target(*args, **kwargs)
