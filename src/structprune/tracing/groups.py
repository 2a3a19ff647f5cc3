"""Unit groups of a decoder block from its families, as the pipelines take them.

Of the atoms that a consumer sums over, those that are heads of the scores are heads: one that the values have too is a
KV head with its queries, one that only the queries have is a query head of every KV head. The others are value
channels. In an MLP they are channels, of each expert by itself where a router chooses the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch.fx import Node

from structprune.errors import UnsupportedError
from structprune.tracing.families import Family, places, slices
from structprune.tracing.graph import Traced
from structprune.tracing.sublayers import Sublayer, find_stream, find_sublayers
from structprune.tracing.terms import Atom, leaves
from structprune.tracing.values import Value, arguments_of, operation_name
from structprune.types import AxisSlice, HeadUnits, SublayerKind, UnitGroup

StackedNames = Mapping[str, Sequence[str]]
"""Tensor that holds all experts along its first axis -> names of the tensors of one expert in a checkpoint, with `{}`
for its number: those that lie one behind the other along the axis of the units."""


def unit_groups(traced: Traced, head_units: HeadUnits, stacked: StackedNames | None = None) -> tuple[UnitGroup, ...]:
    """Build the groups of a traced decoder block: channels of MLPs first, then units of attention.

    What config entries say of the widths is not in the graph: `config_fields`, `activation` and entries of biases stay
    empty. Raises UnsupportedError where the block has no residual stream, or its attention no such units.
    """
    return (*mlp_groups(traced, stacked), *attention_groups(traced, head_units))


def mlp_groups(traced: Traced, stacked: StackedNames | None = None) -> tuple[UnitGroup, ...]:
    """Build the groups of channels: one for each MLP of a block, and one for each expert of its mixtures."""
    return tuple(
        group
        for sublayer in _sublayers(traced, "mlp")
        for family in families_of(traced, sublayer)
        for group in _channels(traced, sublayer, family, stacked or {})
    )


def attention_groups(traced: Traced, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    """Build the groups of attention, none where a block has no attention.

    Raises UnsupportedError where it has no such units, with the operations that hold them.
    """
    return tuple(_heads(traced, sublayer, head_units) for sublayer in _sublayers(traced, "attention"))


def _sublayers(traced: Traced, kind: SublayerKind) -> list[Sublayer]:
    return [each for each in find_sublayers(traced, find_stream(traced)) if each.kind == kind]


def expert_families(traced: Traced) -> tuple[Family, ...]:
    """List the families whose units a router numbers: whole experts, which leave by another way than zeros."""
    chosen = leaves(*(value.chosen for value in _all_values(traced) if value.chosen is not None))
    return tuple(family for family in traced.families if family.atom in chosen)


def families_of(traced: Traced, sublayer: Sublayer) -> list[Family]:
    """List the families that a sublayer's consumer sums over and that can leave exactly, in the order of its axis."""
    by_atom = {family.atom: family for family in traced.families}
    found = [by_atom[atom] for atom in leaves(sublayer.consumer.term) if atom in by_atom]
    return [family for family in found if family.is_exact and _consumers(family, sublayer)]


def _consumers(family: Family, sublayer: Sublayer) -> list[AxisSlice]:
    return [each for each in family.consumers if each.tensor in sublayer.consumer.origins]


def _channels(traced: Traced, sublayer: Sublayer, family: Family, stacked: StackedNames) -> list[UnitGroup]:
    """Build the group of an MLP's channels, or one of each expert."""
    experts = _experts(traced, family)
    group = _group(traced, sublayer, family.producers, _consumers(family, sublayer), family.num_units)
    if experts is None:
        up, gate = _maps(traced, sublayer, family)
        return [replace(group, kind="mlp", up_module=up, gate_module=gate)]
    names = list(sublayer.tensors)
    renamed = {name: stacked.get(name, (f"{name}.{{}}",)) for name in names}
    groups: list[UnitGroup] = []
    for number in range(experts):
        consumer = _of_expert(group.consumer, number, traced, renamed)
        groups.append(
            replace(
                group,
                expert=number,
                producers=tuple(_of_expert(each, number, traced, renamed) for each in group.producers),
                consumer=consumer,
                consumer_module=consumer.tensor.removesuffix(".weight"),
                module_prefix=common_prefix([*names, consumer.tensor]),
                output_module=sublayer.output_module,
            )
        )
    return groups


def _experts(traced: Traced, family: Family) -> int | None:
    """Count the experts where all tensors of `family` have one of each along their first axis; else return None.

    Experts are what a router numbers: its choice is made of the same atoms as these axes.
    """
    axes = {tuple(leaves(traced.parameters[member.tensor][0])) for member in family.members}
    if len(axes) != 1 or family.atom in (stack := axes.pop()):
        return None
    chosen = [value.chosen for value in _all_values(traced) if value.chosen is not None]
    if not any(stack and stack == tuple(leaves(term)) for term in chosen):
        return None
    return traced.parameters[family.members[0].tensor][0].size


def _all_values(traced: Traced) -> list[Value]:
    found = [each for value in traced.values.values() for each in (value if isinstance(value, tuple) else (value,))]
    return [each for each in found if isinstance(each, Value)]


def _of_expert(part: AxisSlice, number: int, traced: Traced, names: Mapping[str, Sequence[str]]) -> AxisSlice:
    """Return the slice of one expert's own tensor, which has an axis less."""
    segments = names[part.tensor]
    length = traced.parameters[part.tensor][part.axis].size // len(segments)
    segment, offset = divmod(part.offset, length)
    return replace(part, tensor=segments[segment].format(number), axis=part.axis - 1, offset=offset)


def _heads(traced: Traced, sublayer: Sublayer, head_units: HeadUnits) -> UnitGroup:
    """Build the group of attention. Raises UnsupportedError where there are no such units."""
    found = families_of(traced, sublayer)
    values = [family for family in found if family.atom not in sublayer.heads]
    heads = [family for family in found if family.atom in sublayer.heads]
    if values:
        shared = [family for family in heads if _values_have(traced, family.atom, values)]
    else:
        # A head that keys and values have too owns more than a query head does.
        most = max((_owned(family) for family in heads), default=0)
        shared = [family for family in heads if _owned(family) == most]
    build: Mapping[HeadUnits, Callable[[], UnitGroup]] = {
        "kv-group": lambda: _plain(traced, sublayer, _single(shared, sublayer, "KV heads that can leave")),
        "query-head": lambda: _plain(
            traced,
            sublayer,
            _single([each for each in heads if each not in shared], sublayer, "query heads that share a KV head"),
        ),
        "value-channel": lambda: _value_channels(
            traced, sublayer, _single(values, sublayer, "value channels that can leave")
        ),
    }
    return build[head_units]()


def _single(families: Sequence[Family], sublayer: Sublayer, what: str) -> Family:
    if len(families) == 1:
        return families[0]
    node = sublayer.consumer.node
    raise UnsupportedError(
        f"this attention has no {what}" if not families else f"this attention has several sorts of {what}",
        where=f"{operation_name(node)} ({node.name})",
        got=f"{', '.join(sublayer.consumer.origins)}, whose inputs {_held(sublayer)}",
    )


def _held(sublayer: Sublayer) -> str:
    """Say what holds the inputs of a consumer, or sees several of them at once."""
    reasons = [reason for atom in leaves(sublayer.consumer.term) for reason in (*atom.pins, *atom.couplings)]
    return f"are held by {', '.join(dict.fromkeys(reasons))}" if reasons else "can all leave"


def _owned(family: Family) -> int:
    """Count the indices that all units of a family own."""
    return sum(each.width * each.repeat for each in family.members) * family.num_units


def _values_have(traced: Traced, heads: Atom, values: Sequence[Family]) -> bool:
    """Whether the maps that compute the values have these heads."""
    return all(
        place.stands_under(heads)
        for family in values
        for each in family.producers
        for place in places(traced.parameters[each.tensor][each.axis], family.atom)
    )


def _plain(traced: Traced, sublayer: Sublayer, family: Family) -> UnitGroup:
    group = _group(traced, sublayer, family.producers, _consumers(family, sublayer), family.num_units)
    return replace(group, kind="attention")


def held_group(traced: Traced, sublayer: Sublayer) -> UnitGroup:
    """Build the group of a sublayer that cannot lose a part: one unit, which is all that the consumer reads."""
    name, term = sublayer.consumer.origins[0], sublayer.consumer.term
    dims = traced.parameters[name]
    axis = next(axis for axis, dim in enumerate(dims) if dim.size == term.size and leaves(dim) == leaves(term))
    consumer = AxisSlice(tensor=name, axis=axis, width=term.size)
    return replace(_group(traced, sublayer, (), [consumer], 1), kind="mlp" if sublayer.kind == "mlp" else "attention")


def _value_channels(traced: Traced, sublayer: Sublayer, channels: Family) -> UnitGroup:
    """Build the group whose unit is one channel of one KV head: each head may keep others, as many.

    The heads themselves need not be able to leave. Where some tensor has the channels of all heads together, a unit is
    one channel of every head.
    """
    owners = [atom for atom in sublayer.heads if _values_have(traced, atom, [channels])]
    parent = next((atom for atom in owners if _are_apart(traced, channels.atom, atom)), None)
    if parent is None:
        return _plain(traced, sublayer, channels)
    axes = dict.fromkeys((each.tensor, each.axis) for each in channels.members)
    parts = [
        part
        for tensor, axis in axes
        for place in places(traced.parameters[tensor][axis], channels.atom)
        for part in slices(tensor, axis, place, parent)
    ]
    consumers = {(each.tensor, each.axis) for each in _consumers(channels, sublayer)}
    group = _group(
        traced,
        sublayer,
        [part for part in parts if (part.tensor, part.axis) not in consumers],
        [part for part in parts if (part.tensor, part.axis) in consumers],
        channels.num_units * parent.size,
    )
    return replace(group, kind="attention", partitions=parent.size)


def _are_apart(traced: Traced, channels: Atom, heads: Atom) -> bool:
    """Whether no tensor has the channels without the heads, in which all heads would have to keep the same."""
    return all(heads in found for value in _all_values(traced) if channels in (found := leaves(*value.dims)))


def _group(
    traced: Traced, sublayer: Sublayer, producers: Sequence[AxisSlice], consumers: Sequence[AxisSlice], num_units: int
) -> UnitGroup:
    """Build a group with what all kinds have. Raises UnsupportedError where one slice cannot say what is read."""
    node = sublayer.consumer.node
    if len(consumers) != 1:
        raise UnsupportedError(
            "what a unit owns of the map that reads it is not one regular slice",
            where=f"{operation_name(node)} ({node.name})",
            got=", ".join(f"{each.tensor} from {each.offset}" for each in consumers),
        )
    consumer = consumers[0]
    return UnitGroup(
        kind="mlp",
        num_units=num_units,
        width=consumer.width * consumer.repeat,
        producers=tuple(producers),
        consumer=consumer,
        consumer_module=consumer.tensor.removesuffix(".weight"),
        consumer_bias=sublayer.consumer.bias,
        module_prefix=common_prefix(sublayer.tensors),
        norm_modules=tuple(dict.fromkeys(name.rpartition(".")[0] for name in sublayer.norms)),
        output_norm_eps=_epsilon(sublayer),
    )


def common_prefix(names: Iterable[str]) -> str:
    """Return what all names begin with: whole modules where there is one around all of them."""
    first, last = min(names := list(names)), max(names)
    same = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    common = first[:same]
    return common[: common.rindex(".") + 1] if "." in common else common


def _epsilon(sublayer: Sublayer) -> float | None:
    """Return the epsilon of the RMSNorm behind the consumer: what is added to the mean of the squares."""
    if sublayer.output_norm is None:
        return None
    given = arguments_of(sublayer.output_norm).get("eps")
    if isinstance(given, float):
        return given
    numbers = [arguments_of(user).get("other") for user in sublayer.output_norm.users if operation_name(user) == "add"]
    found = [number for number in numbers if isinstance(number, float)]
    if not found:
        raise UnsupportedError(
            "the norm behind a sublayer has no epsilon that can be found",
            where=f"{operation_name(sublayer.output_norm)} ({sublayer.output_norm.name})",
        )
    return found[0]


def _maps(traced: Traced, sublayer: Sublayer, family: Family) -> tuple[str | None, str | None]:
    """Find the modules of an MLP's up map and gate, each a map of its own whose rows are the channels.

    A gate's output passes the activation first; of a single map it is the up map's.
    """
    tensors = {each.tensor for each in family.producers}
    single = {
        product.origins[0]: product.node
        for product in traced.notes.contractions
        if len(product.origins) == 1
        and product.origins[0] in tensors
        and product.node is not sublayer.consumer.node
        and leaves(*traced.parameters[product.origins[0]]).keys() >= {family.atom}
        and sum(each.tensor == product.origins[0] for each in family.producers) == 1
    }
    modules = {tensor: tensor.removesuffix(".weight") for tensor in single}
    if len(single) == 1:
        return next(iter(modules.values())), None
    if len(single) != 2:
        return None, None
    gates = [tensor for tensor, node in single.items() if not _is_multiplied(node)]
    ups = [tensor for tensor in single if tensor not in gates]
    return (modules[ups[0]], modules[gates[0]]) if len(gates) == 1 else (None, None)


def _is_multiplied(node: Node) -> bool:
    return all(operation_name(user) == "mul" for user in node.users)
