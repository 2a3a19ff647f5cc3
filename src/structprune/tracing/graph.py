"""Reading a module's graph: from torch.export to families.

Every axis of every parameter and buffer begins as an atom of its own, inputs and outputs as pinned ones. The rules of
the operations unify them in the order of the graph.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from structprune.errors import UnsupportedError, first_line
from structprune.tracing.families import Family, FrozenAxis, find_families
from structprune.tracing.rules import operation
from structprune.tracing.rules.shapes import VIEWS
from structprune.tracing.terms import Atom, Term, pin, pinned
from structprune.tracing.values import Notes, Step, Value, operation_name, silent_in_all

STATE_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
IGNORED = frozenset({"_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size"})
"""Operations that compute nothing."""
_SHORT = 16
"""Elements of a list that may be written in the code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What a module's graph says of its parameters. Names are those of `module.named_parameters()` and buffers."""

    program: ExportedProgram
    parameters: Mapping[str, tuple[Term, ...]]
    """Expression of every axis of every parameter and buffer."""
    values: Mapping[Node, Value | tuple[Value, ...]]
    outputs: tuple[Node, ...]
    """Nodes of the tensors that come out and must stay as they are."""
    families: tuple[Family, ...]
    frozen: tuple[FrozenAxis, ...]
    notes: Notes

    @property
    def unknown(self) -> Mapping[str, str]:
        """Operations that the rules do not read and that hold what else could leave: name -> where the first one is."""
        first = dict.fromkeys(axis.reasons[0] for axis in self.frozen)
        found = [(self.notes.unknown[place], place) for place in first if place in self.notes.unknown]
        return dict(reversed(found))


def trace(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, num_outputs: int | None = None
) -> Traced:
    """Find the families of a module from its graph for one example input; it may be on `meta`.

    Sizes of the example are part of the graph: give positions and windows sizes of their own, greater than 1. Of the
    tensors that come out, the first `num_outputs` must stay as they are, None: all of them.
    Raises UnsupportedError where torch.export has no graph of the module, or one whose shapes depend on the data.
    """
    program = export(module, args, kwargs or {})
    reader = _Reader(program, num_outputs)
    for node in program.graph.nodes:
        reader.read(node)
    contracted = [(each.term, each.origins) for each in reader.notes.contractions]
    if not reader.outputs:
        raise UnsupportedError("no tensor comes out", where=type(module).__name__)
    families, frozen = find_families(reader.parameters, contracted)
    return Traced(
        program=program,
        parameters=reader.parameters,
        values=reader.environment,
        outputs=tuple(reader.outputs),
        families=families,
        frozen=frozen,
        notes=reader.notes,
    )


def export(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """Make the graph of ATen operations of a module without gradients. Raises UnsupportedError where there is none."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(module, tuple(args), dict(kwargs), strict=False)
    except Exception as error:
        # torch.export raises many types, all for code that is no fixed graph.
        raise UnsupportedError(
            "torch.export cannot make a graph of this module",
            where=type(module).__name__,
            got=f"{type(error).__name__}: {first_line(error)}",
            wanted="operations that do not depend on the data",
        ) from error


def state_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Return parameters, buffers and constants of a program by the names that its graph has for them."""
    return {
        **{name: each for name, each in program.constants.items() if isinstance(each, Tensor)},
        **program.state_dict,
    }


class _Reader:
    """Values of a graph's nodes, one node after the other."""

    def __init__(self, program: ExportedProgram, num_outputs: int | None) -> None:
        self.outputs: list[Node] = []
        self._num_outputs = num_outputs
        self.notes = Notes()
        self.parameters: dict[str, tuple[Term, ...]] = {}
        self.environment: dict[Node, Any] = {}
        self._state = state_of(program)
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self._used = {
            id(self._state[str(self._specs[node.name].target)])
            for node in program.graph.nodes
            if node.op == "placeholder" and node.users and self._specs[node.name].kind in STATE_KINDS
        }
        self._tied: dict[int, tuple[Term, ...]] = {}
        """Parameters by identity: one with two names has one expression."""

    def read(self, node: Node) -> None:
        """Add the value of a node. Raises UnsupportedError for shapes that depend on the data."""
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "output":
            self._output(node)
        elif node.op == "call_function" and operation_name(node) not in IGNORED:
            self._operation(node)

    def _placeholder(self, node: Node) -> None:
        example = node.meta.get("val")
        if not isinstance(example, Tensor):
            return
        spec = self._specs[node.name]
        if spec.kind not in STATE_KINDS:
            place = f"input {node.name}"
            self.environment[node] = Value(dims=tuple(pinned(size, place) for size in _sizes(node, example)))
            return
        name = str(spec.target)
        tensor = self._state[name]
        dims = self._tied.setdefault(id(tensor), tuple(Atom(size) for size in example.shape))
        if id(tensor) not in self._used:
            pin("not used", *dims)
        self.parameters[name] = dims
        silent = frozenset(dim for dim in dims if isinstance(dim, Atom))
        self.environment[node] = Value(dims=dims, silent=silent, origin=name, constant=_constant(spec.kind, tensor))

    def _output(self, node: Node) -> None:
        results: Any = node.args[0]
        tensors = [each for each in results if isinstance(self.environment.get(each), Value)]
        self.outputs = tensors[: self._num_outputs]
        pin("output", *(dim for each in self.outputs for dim in self.environment[each].dims))

    def _operation(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, number = node.args
            assert isinstance(source, Node)
            self.environment[node] = self.environment[source][number]
            return
        result = node.meta.get("val")
        if not isinstance(result, Tensor | tuple | list):
            return
        shapes = [_sizes(node, each) for each in (result if isinstance(result, tuple | list) else (result,))]
        step = Step(node, self.environment, self.notes)
        entry = operation(step.name)
        value = entry.rule(step) if entry is not None else step.freeze()
        found = value if isinstance(value, tuple) else (value,)
        if entry is None or [tuple(dim.size for dim in each.dims) for each in found] != shapes:
            # A form of the operation that its rule does not read is as unknown as one without a rule.
            value = step.freeze()
        self.environment[node] = value
        if step.name.endswith("_") and isinstance(value, Value):
            self._mutated(node, value)

    def _mutated(self, node: Node, written: Value) -> None:
        """Forget that what is written over in place was zero, there and in all that it is a view of."""
        place = node.args[0]
        while isinstance(place, Node) and isinstance(self.environment.get(place), Value):
            old: Value = self.environment[place]
            self.environment[place] = replace(old, silent=silent_in_all((old, written)))
            if place.op != "call_function" or operation_name(place) not in VIEWS | {"alias", "detach"}:
                return
            place = place.args[0]


def _sizes(node: Node, example: Tensor) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in example.shape):
        raise UnsupportedError(
            "the shape of a result depends on the data",
            where=f"{operation_name(node)} ({node.name})",
            got=str(tuple(example.shape)),
            do="trace the part of the module that has a fixed graph",
        )
    return tuple(example.shape)


def _constant(kind: InputKind, tensor: Tensor) -> tuple[int, ...] | None:
    short = kind == InputKind.CONSTANT_TENSOR and tensor.ndim == 1 and tensor.numel() <= _SHORT
    if not short or tensor.is_floating_point() or tensor.is_meta or tensor.is_complex():
        return None
    return tuple(int(each) for each in tensor)
