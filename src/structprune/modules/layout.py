"""What can leave a module: families of units as values with names, and what holds everything else."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from structprune.errors import InputError
from structprune.tracing.families import Family, FrozenAxis
from structprune.tracing.graph import STATE_KINDS, Traced, state_of, trace
from structprune.tracing.replay import Example
from structprune.tracing.terms import Atom, Term, atoms, describe, resolve
from structprune.tracing.values import arguments_of, operation_name
from structprune.types import AxisSlice

Given = Tensor | Mapping[str, Any] | Sequence[Any]
"""One example input: a tensor, arguments by position, or arguments by name."""
Keep = Mapping[str, Sequence[int]]
"""Name of a family -> the units that stay, ascending."""
_BIAS = "bias"
_BIASES: Mapping[str, str] = {"addmm": "self", "baddbmm": "self"}
"""Operation -> argument that is its bias, where that is not called so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One operation that reads a parameter or buffer, and as which argument."""

    node: Node
    argument: str

    @property
    def operation(self) -> str:
        return operation_name(self.node)

    @property
    def is_bias(self) -> bool:
        """Whether the operation adds it to what it computes."""
        return self.argument == _BIASES.get(self.operation, _BIAS)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFamily:
    """Units of one sort that can leave a module one by one: channels of a network's stream, neurons, heads."""

    name: str
    """Path of the first module that computes the units; with `/0`, `/1` where one module computes several sorts."""
    num_units: int
    slices: tuple[AxisSlice, ...]
    """What a unit owns of every parameter and buffer."""
    couplings: tuple[str, ...]
    """Operations that see all units at once, such as a LayerNorm: without units they do not compute what they compute
    with zeros in their place."""
    pattern: tuple[str, ...]
    """How the operations around the units read them; families with equal patterns are isomorphic (arXiv 2407.04616)."""
    family: Family
    """The same family as the tracer has it."""

    @property
    def is_exact(self) -> bool:
        """Whether removal of units is the same as zeros in their place."""
        return not self.couplings

    @property
    def atom(self) -> Atom:
        return self.family.atom


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLayout:
    """A module as data: what can leave, and what cannot and why."""

    model: nn.Module
    example: Example
    traced: Traced
    families: tuple[UnitFamily, ...]
    frozen: tuple[FrozenAxis, ...]
    """Parts of axes that stay, with the operations, inputs or outputs that hold them."""
    uses: Mapping[str, tuple[Use, ...]]
    """Parameter or buffer -> operations that read it."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters, buffers and constants by name: the tensors of the model themselves."""
        return state_of(self.traced.program)

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters, without buffers."""
        return frozenset(self.traced.program.graph_signature.parameters)

    def family(self, name: str) -> UnitFamily:
        """Return a family by its name. Raises InputError for one that is not there."""
        for each in self.families:
            if each.name == name:
                return each
        raise InputError(
            f"no family is called {name!r}",
            where=type(self.model).__name__,
            wanted=", ".join(each.name for each in self.families[:20]) or "nothing: no unit can leave this module",
        )

    def kept_atoms(self, keep: Keep) -> dict[Atom, list[int]]:
        """Translate names to the tracer's atoms. Raises InputError for units that are not there, or none."""
        found: dict[Atom, list[int]] = {}
        for name, units in keep.items():
            each, chosen = self.family(name), [int(unit) for unit in units]
            if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= each.num_units:
                raise InputError(
                    "these units cannot stay",
                    where=name,
                    got=str(chosen[:20]),
                    wanted=f"one or more of 0 ... {each.num_units - 1}, ascending",
                )
            found[each.atom] = chosen
        return found


def as_example(given: Given) -> Example:
    """Build the arguments of a call from a tensor, from arguments by position or from arguments by name."""
    if isinstance(given, Tensor):
        return Example(args=(given,), kwargs={})
    if isinstance(given, Mapping):
        return Example(args=(), kwargs=dict(given))
    return Example(args=tuple(given), kwargs={})


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Set the model to evaluation, and every module back to its own mode behind it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def layout(model: nn.Module, example: Given) -> ModuleLayout:
    """Find what can leave a module from its graph for one example input, in evaluation mode.

    The example is a tensor, a sequence of arguments or a mapping of them by name; its sizes are part of the graph: a
    batch of at least two, and no length that is equal to another by chance. No weight is read: the model may be on
    `meta`. Raises UnsupportedError where torch.export has no graph of the module.
    """
    arguments = as_example(example)
    with evaluating(model):
        traced = trace(model, arguments.args, arguments.kwargs)
    uses = _uses(traced)
    return ModuleLayout(
        model=model,
        example=arguments,
        traced=traced,
        families=_named(traced, uses),
        frozen=traced.frozen,
        uses=uses,
    )


def _uses(traced: Traced) -> dict[str, tuple[Use, ...]]:
    program = traced.program
    names = {
        spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs if spec.kind in STATE_KINDS
    }
    found: dict[str, list[Use]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        for argument, given in arguments_of(node).items():
            for each in given if isinstance(given, list | tuple) else (given,):
                if isinstance(each, Node) and each.name in names:
                    found.setdefault(names[each.name], []).append(Use(node=node, argument=str(argument)))
    return {name: tuple(each) for name, each in found.items()}


def _named(traced: Traced, uses: Mapping[str, Sequence[Use]]) -> tuple[UnitFamily, ...]:
    parameters = frozenset(traced.program.graph_signature.parameters)
    # What only buffers have, such as positions that the example does not reach, makes nothing smaller.
    families = [each for each in traced.families if any(part.tensor in parameters for part in each.members)]
    bases = [_base(family) for family in families]
    counts: dict[str, int] = {}
    found: list[UnitFamily] = []
    for family, base in zip(families, bases, strict=True):
        number = counts.get(base, 0)
        counts[base] = number + 1
        found.append(
            UnitFamily(
                name=base if bases.count(base) == 1 else f"{base}/{number}",
                num_units=family.num_units,
                slices=family.members,
                couplings=family.couplings,
                pattern=_pattern(traced, family, uses),
                family=family,
            )
        )
    return tuple(found)


def _base(family: Family) -> str:
    tensor = (*family.producers, *family.members)[0].tensor
    return tensor.rpartition(".")[0] or tensor


def _pattern(traced: Traced, family: Family, uses: Mapping[str, Sequence[Use]]) -> tuple[str, ...]:
    """List how the members are read, without names or sizes: operation, argument, axis and how it is divided; sorted.

    Heads and channels of heads stand in axes of several factors, neurons are an axis of their own.
    """
    places = {(member.tensor, member.axis) for member in family.members}
    reads = [
        f"{use.operation}.{use.argument}.{axis}{_division(traced.parameters[tensor][axis], family.atom)}"
        for tensor, axis in places
        for use in uses.get(tensor, ())
    ]
    return tuple(sorted((*reads, *{place.partition(" ")[0] for place in family.couplings})))


def _division(term: Term, atom: Atom) -> str:
    """Write an axis as a formula of what it is made of, without sizes: `u` the units, `x` anything else."""
    return (
        ""
        if resolve(term) is atom
        else f"[{describe(term, {each: 'u' if each is atom else 'x' for each in atoms(term)})}]"
    )
