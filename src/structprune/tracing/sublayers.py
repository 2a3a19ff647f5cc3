"""The sublayers of a block, found by the sums of its residual stream; no name of a module is read.

The stream is what enters a block and what each sum adds to. A consumer is a linear map whose output reaches such a sum
without another linear map in between. What lies between the stream that it reads and the consumer says what the
sublayer is: attention where a softmax over positions is there, a mixer where positions see each other in another way,
else an MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from structprune.errors import UnsupportedError
from structprune.kinds import SublayerKind
from structprune.tracing.graph import STATE_KINDS, Traced
from structprune.tracing.terms import Atom, Term, atoms, leaves
from structprune.tracing.values import Contraction, Value, operation_name

"""`mixer`: positions see each other, but by no softmax (convolutions, scans, linear attention)."""
_PASSING = frozenset(
    {"to", "_to_copy", "alias", "clone", "contiguous", "detach", "dropout", "type_as", "view", "reshape"}
)
"""Operations behind which the stream is the same."""
_NORMS = frozenset({"mean", "rms_norm", "layer_norm", "linalg_vector_norm", "var", "sum"})
"""Operations that a norm over the stream's width consists of, or begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayer:
    """One consumer, and what lies between the stream that it reads and the sum that its output is added to."""

    kind: SublayerKind
    consumer: Contraction
    reads: int
    """Number of the state of the stream that is read: 0 enters the block."""
    adds: int
    """Number of the state that the output is part of."""
    tensors: tuple[str, ...]
    """Parameters and buffers before the consumer, its own too, without those of norms over the stream."""
    norms: tuple[str, ...]
    """Parameters of norms over the stream, before the consumer and behind it."""
    output_norm: Node | None
    """The operation by which the output is normed before the sum."""
    output_module: str | None
    """Innermost module whose output is what the stream is added; None where the block computes it itself."""
    heads: frozenset[Atom]
    """Atoms of the axes of the scores besides positions, where it is attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The states of the residual stream in a block."""

    states: Mapping[Node, int]
    width: Term
    positions: frozenset[Atom]
    """Atoms of windows and positions. Code that takes positions one by one leaves each of them an atom of its own."""


def find_stream(traced: Traced) -> Stream:
    """Find the residual stream: the first input that has the output's shape, and the sums that it passes.

    Raises UnsupportedError where the output is no such sum, with the operation that it is of.
    """
    graph, result = traced.program.graph, traced.outputs[0]
    specs = {spec.arg.name: spec.kind for spec in traced.program.graph_signature.input_specs}
    shape = result.meta["val"].shape
    given = next(
        (
            node
            for node in graph.nodes
            if specs.get(node.name) == InputKind.USER_INPUT
            and isinstance(tensor := node.meta.get("val"), Tensor)
            and tensor.is_floating_point()
            and tensor.shape == shape
        ),
        None,
    )
    states: dict[Node, int] = {} if given is None else {given: 0}
    for node in graph.nodes:
        # Some code joins windows and positions for a while.
        if node.op == "call_function" and _is_of_shape(node, shape):
            _follow(node, states)
    if given is None or result not in states or len(shape) != 3:
        raise UnsupportedError(
            "the output is not the input plus what sublayers add",
            where=f"{operation_name(result)} ({result.name})",
            got=f"an output of shape {tuple(shape)}",
            wanted="a decoder block with one residual stream, (windows, positions, width)",
        )
    value = traced.values[given]
    assert isinstance(value, Value)
    return Stream(states=states, width=value.dims[-1], positions=frozenset(atoms(*value.dims[:-1])))


def stream_scales(traced: Traced, stream: Stream) -> tuple[tuple[str, int], ...]:
    """List the parameters and buffers that the stream is multiplied by, each with the state that comes of it."""
    return tuple(
        (name, state)
        for node, state in stream.states.items()
        if node.op == "call_function" and operation_name(node).removesuffix("_") == "mul"
        for name in _tensors(traced, node.all_input_nodes)
    )


def _is_of_shape(node: Node, shape: torch.Size) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.shape[-1:] == shape[-1:] and value.numel() == shape.numel()


def _follow(node: Node, states: dict[Node, int]) -> None:
    """Give `node` its state if it continues the stream: a sum with it, or a number that it is multiplied by."""
    name = operation_name(node).removesuffix("_")
    known = [each for each in node.all_input_nodes if each in states]
    if len(known) != 1:
        return
    others = [each for each in node.all_input_nodes if each not in states]
    if name in _PASSING:
        if node.args[0] is known[0]:
            states[node] = states[known[0]]
    elif (name == "add" and others) or (name == "mul" and all(_is_number(each) for each in others)):
        states[node] = max(states.values()) + 1


def _is_number(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.numel() == 1


def find_sublayers(traced: Traced, stream: Stream) -> tuple[Sublayer, ...]:
    """Find the sublayers in the order of the stream's sums.

    Raises UnsupportedError for one that reads several states.
    """
    products: dict[Node, Contraction] = {each.node: each for each in traced.notes.contractions}
    found: list[Sublayer] = []
    for node, product in products.items():
        if not product.origins or not _is_as_wide(traced, node, stream):
            continue
        behind = _behind(node, stream, products.keys())
        if behind is not None:
            found.append(_sublayer(traced, stream, product, behind))
    # A norm that several sublayers read belongs to none of them.
    owners: dict[str, set[tuple[int, str]]] = {}
    for each in found:
        for name in each.norms:
            owners.setdefault(name, set()).add((each.adds, each.kind))
    return tuple(
        replace(each, norms=tuple(name for name in each.norms if len(owners[name]) == 1))
        for each in sorted(found, key=lambda each: each.adds)
    )


def _is_as_wide(traced: Traced, node: Node, stream: Stream) -> bool:
    """Whether an axis of the result has the stream's width: what a router or a gate gives has not."""
    value = traced.values[node]
    assert isinstance(value, Value)
    return any(leaves(dim).keys() == leaves(stream.width).keys() for dim in value.dims)


def _behind(node: Node, stream: Stream, products: Iterable[Node]) -> list[Node] | None:
    """List the operations from a product's output to the stream's next sum, that sum last; None if others read it."""
    found: dict[Node, None] = {}
    sums: dict[Node, None] = {}
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user in stream.states:
            sums[user] = None
        elif user in products or user.op == "output":
            return None
        elif user not in found:
            found[user] = None
            waiting += user.users
    return [*found, *sums] if len(sums) == 1 else None


def _before(node: Node, stream: Stream) -> tuple[dict[Node, None], set[int]]:
    """Collect the operations that a node needs, itself too, as far as the stream; and the states that they read."""
    found: dict[Node, None] = {}
    reads: set[int] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in stream.states:
            reads.add(stream.states[each])
        elif each not in found:
            found[each] = None
            waiting += each.all_input_nodes
    return found, reads


def _sublayer(traced: Traced, stream: Stream, product: Contraction, behind: list[Node]) -> Sublayer:
    before, reads = _before(product.node, stream)
    if len(reads) != 1:
        raise UnsupportedError(
            "a sublayer reads several states of the residual stream, or none",
            where=f"{operation_name(product.node)} ({product.node.name})",
            got=str(sorted(reads)),
            wanted="one state for each sublayer",
        )
    names = _tensors(traced, before)
    width = leaves(stream.width).keys()
    biases = {each.bias for each in traced.notes.contractions}
    # Vectors over the stream's width that are no bias belong to norms.
    normed = [
        name
        for name in dict.fromkeys((*names, *_tensors(traced, _inputs_of(behind[:-1]))))
        if name not in biases and [leaves(dim).keys() for dim in traced.parameters[name]] == [width]
    ]
    output_norm = next((node for node in behind if _norms_the_width(traced, node, stream)), None)
    kind, heads = _kind(traced, stream, before)
    return Sublayer(
        kind=kind,
        consumer=product,
        reads=reads.pop(),
        adds=stream.states[behind[-1]],
        tensors=tuple(name for name in names if name not in normed),
        norms=tuple(normed),
        output_norm=output_norm,
        output_module=_module_of(next(each for each in behind[-1].all_input_nodes if each not in stream.states)),
        heads=heads,
    )


def _module_of(node: Node) -> str | None:
    """Return the innermost module that computes a node, or the tensor that it is a view of."""
    while True:
        stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
        path = [name for name, _ in stack.values() if name]
        if path:
            return path[-1]
        if operation_name(node) not in _PASSING:
            return None
        node = node.all_input_nodes[0]


def _inputs_of(nodes: Iterable[Node]) -> list[Node]:
    """List the parameters that operations read, also through one operation on them alone (1 + weight)."""
    near = [each for node in nodes for each in node.all_input_nodes]
    far = [each for node in near for each in node.all_input_nodes if len(node.all_input_nodes) == 1]
    farther = [each for node in far for each in node.all_input_nodes if len(node.all_input_nodes) == 1]
    return [node for node in (*near, *far, *farther) if node.op == "placeholder"]


def _tensors(traced: Traced, nodes: Iterable[Node]) -> list[str]:
    specs = {spec.arg.name: spec for spec in traced.program.graph_signature.input_specs}
    placeholders = [node for node in nodes if node.op == "placeholder" and specs[node.name].kind in STATE_KINDS]
    return [str(specs[node.name].target) for node in placeholders]


def _norms_the_width(traced: Traced, node: Node, stream: Stream) -> bool:
    name = operation_name(node)
    if name not in _NORMS:
        return False
    place = f"{name} ({node.name})"
    return any(place in atom.couplings for atom in leaves(stream.width))


def _kind(traced: Traced, stream: Stream, before: Mapping[Node, None]) -> tuple[SublayerKind, frozenset[Atom]]:
    mixings = [
        each for each in traced.notes.mixings if each.node in before and atoms(each.over).keys() & stream.positions
    ]
    scores = [each.heads for each in mixings if each.heads is not None]
    if scores:
        return "attention", frozenset(leaves(*(dim for heads in scores for dim in heads)).keys() - stream.positions)
    summed = any(
        atoms(each.term).keys() & stream.positions for each in traced.notes.contractions if each.node in before
    )
    mixes = bool(mixings) or summed or not _positions_stay(traced, stream, before)
    return ("mixer" if mixes else "mlp"), frozenset()


def _positions_stay(traced: Traced, stream: Stream, before: Mapping[Node, None]) -> bool:
    """Whether all that is computed from the stream has all of its windows and positions: none is taken out."""
    computed: set[Node] = set()
    for node in traced.program.graph.nodes:
        if node in before and any(each in stream.states or each in computed for each in node.all_input_nodes):
            computed.add(node)
            found = traced.values.get(node)
            values = found if isinstance(found, tuple) else (found,)
            if any(value is not None and not stream.positions <= atoms(*value.dims).keys() for value in values):
                return False
    return True


def stages(sublayers: Iterable[Sublayer]) -> tuple[tuple[SublayerKind, ...], ...]:
    """Return the kinds of sublayers that read the same state of the stream, in the order in which it is read."""
    found: dict[int, dict[SublayerKind, None]] = {}
    for each in sorted(sublayers, key=lambda each: each.reads):
        found.setdefault(each.reads, {})[each.kind] = None
    return tuple(tuple(sorted(kinds)) for _, kinds in sorted(found.items()))
