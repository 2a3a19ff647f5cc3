"""Operations that see a whole axis at once: means, norms, softmax, sorting, look-ups.

Units along such an axis can leave, but what is left is not what zeros would leave: the axis is coupled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from structprune.tracing.rules.operation import Call, Operation, Output
from structprune.tracing.terms import Product, Term, kept_positions, leaves
from structprune.tracing.values import Mixing, Step, Value, silent_in_all, silent_without


def _reduced(step: Step, value: Value) -> tuple[Value, list[Term]]:
    axes = step.axes(len(value.dims)) if "dim" in step.arguments else list(range(len(value.dims)))
    keep = bool(step.arguments.get("keepdim", False))
    dims = [Product(()) if axis in axes else dim for axis, dim in enumerate(value.dims) if keep or axis not in axes]
    gone = [value.dims[axis] for axis in axes]
    return Value(dims=tuple(dims), silent=silent_without(value, *gone)), gone


def _reduce(step: Step) -> Output:
    """Take a mean, a maximum, a norm of an axis: all of its things count."""
    result, gone = _reduced(step, step.inputs()[0])
    step.couple(*gone)
    several = isinstance(step.node.meta["val"], tuple | list)
    return (result,) * len(step.node.meta["val"]) if several else result


def _extreme(step: Step) -> Output:
    """Take the largest of an axis, or of two operands element by element."""
    other = step.value("other")
    if other is None:
        return _reduce(step)
    pair = (step.inputs()[0], other)
    return Value(dims=step.broadcast(value.dims for value in pair), silent=silent_in_all(pair))


def _sum(step: Step) -> Output:
    """Add up an axis: what is zero may be left out."""
    value = step.inputs()[0]
    result, gone = _reduced(step, value)
    silent = leaves(*value.silent)
    step.couple(*(atom for atom in leaves(*gone) if atom not in silent))
    return result


def _softmax(step: Step) -> Output:
    """Share out one among the things of an axis; over positions that is attention."""
    value = step.inputs()[0]
    axis = step.axis(len(value.dims))
    step.couple(value.dims[axis])
    if axis == len(value.dims) - 1:
        step.notes.mixings.append(Mixing(node=step.node, over=value.dims[-1], heads=value.dims[:-2]))
    return Value(dims=value.dims)


def _scan(step: Step) -> Output:
    """Add up what came before, place by place."""
    value = step.inputs()[0]
    axis = step.axis(len(value.dims))
    step.couple(value.dims[axis])
    step.notes.mixings.append(Mixing(node=step.node, over=value.dims[axis], heads=None))
    return Value(dims=value.dims, silent=silent_without(value, value.dims[axis]))


def _norm(step: Step) -> Output:
    """Read a norm of the last axes, with a weight and a bias where there are any."""
    value = step.inputs()[0]
    normed = value.dims[len(value.dims) - len(step.arguments["normalized_shape"]) :]
    step.couple(*normed)
    scales = [scale for scale in (step.value("weight"), step.value("bias")) if scale is not None]
    for scale in scales:
        step.broadcast((normed, scale.dims))
    return Value(dims=value.dims, silent=silent_in_all(scales) if scales else frozenset())


def _resize_norm(call: Call) -> None:
    call.arguments["normalized_shape"] = call.shape()[-len(call.arguments["normalized_shape"]) :]


def _top(step: Step) -> Output:
    """Choose the largest of an axis: values, and which things they are."""
    value = step.inputs()[0]
    axis = step.axis(len(value.dims), default=-1)
    chosen_from = value.dims[axis]
    step.couple(chosen_from)
    dims = list(value.dims)
    dims[axis] = step.pinned(step.shapes[0][axis])
    best = Value(dims=tuple(dims))
    return best, replace(best, chosen=chosen_from)


def _sorted(step: Step) -> Output:
    """Put things into an order: each may come to the place of any other."""
    value = step.inputs()[0]
    term = value.dims[step.axis(len(value.dims), default=-1)]
    step.pin(term)
    return Value(dims=value.dims), Value(dims=value.dims, chosen=term)


def _index(step: Step) -> Output:
    """Look things of one axis up by their numbers."""
    value, given = step.tensor("self"), step.arguments["indices"]
    axes = [axis for axis, index in enumerate(given) if index is not None]
    ids = step.tensors("indices")
    if len(axes) != 1 or len(ids) != 1 or step.node.meta["val"].dim() != len(value.dims) - 1 + len(ids[0].dims):
        return step.freeze()
    return _looked_up(step, value, axes[0], ids[0])


def _index_select(step: Step) -> Output:
    value = step.tensor("self")
    return _looked_up(step, value, step.axis(len(value.dims)), step.tensor("index"))


def _embedding(step: Step) -> Output:
    return _looked_up(step, step.tensor("weight"), 0, step.tensor("indices"))


def _looked_up(step: Step, value: Value, axis: int, ids: Value) -> Value:
    term, dims = value.dims[axis], ids.dims
    first = ids.constant[0] % term.size if ids.constant else 0
    if ids.constant and ids.constant == tuple(range(ids.constant[0], ids.constant[0] + len(ids.constant))):
        # A run of numbers that is written in the code is a segment.
        step.unify(dims[0], step.cut(step.cut(term, first + len(ids.constant))[0], first)[1])
    elif ids.chosen is not None and ids.chosen.size == term.size:
        step.unify(ids.chosen, term)
        step.couple(term)
    else:
        step.pin(term)
    origin = value.origin if axis == 0 else None
    return Value(dims=(*value.dims[:axis], *dims, *value.dims[axis + 1 :]), silent=value.silent, origin=origin)


def _gather(step: Step) -> Output:
    """Look up or write elements of one axis by their numbers, place by place along the others."""
    value, ids = step.tensor("self"), step.tensor("index")
    axis = step.axis(len(value.dims))
    others = [each for each in step.inputs() if len(each.dims) == len(value.dims)]
    for place, dim in enumerate(value.dims):
        if place == axis:
            step.couple(dim)
            continue
        for other in others:
            if other.dims[place].size == dim.size:
                step.unify(dim, other.dims[place])
            else:
                step.pin(dim, other.dims[place])
    if step.shape == tuple(dim.size for dim in value.dims):
        return Value(dims=value.dims)
    step.pin(value.dims[axis])
    return Value(dims=ids.dims)


def _one_hot(step: Step) -> Output:
    """Write numbers as rows with a single one."""
    ids = step.inputs()[0]
    size = step.shape[-1]
    chosen = ids.chosen if ids.chosen is not None and ids.chosen.size == size else step.pinned(size)
    return Value(dims=(*ids.dims, chosen))


def _resize_one_hot(call: Call) -> None:
    call.arguments["num_classes"] = call.shape()[-1]


def _resize_index(call: Call) -> None:
    """Give numbers that are written in the code those that their things have now."""
    given: Sequence[object] = call.arguments["indices"]
    axis = next(axis for axis, index in enumerate(given) if index is not None)
    term = call.inputs["self"].dims[axis]
    kept = kept_positions(term, call.kept)
    if call.inputs["indices"].constant is None or len(kept) == term.size:
        return
    ids = given[axis]
    places = {old: new for new, old in enumerate(kept)}
    renumbered = ids.new_tensor([places[int(i) % term.size] for i in ids.flatten()])  # pyright: ignore[reportAttributeAccessIssue]
    call.arguments["indices"] = [*given[:axis], renumbered.reshape(ids.shape), *given[axis + 1 :]]  # pyright: ignore[reportAttributeAccessIssue]


_REDUCE = Operation(rule=_reduce)

REDUCTIONS: dict[str, Operation] = {
    **dict.fromkeys(("mean", "amax", "amin", "var", "std", "prod", "logsumexp", "any", "all"), _REDUCE),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _REDUCE),
    **dict.fromkeys(("max", "min"), Operation(rule=_extreme)),
    "sum": Operation(rule=_sum),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), Operation(rule=_softmax)),
    "cumsum": Operation(rule=_scan),
    **dict.fromkeys(("layer_norm", "rms_norm"), Operation(rule=_norm, resize=_resize_norm)),
    "topk": Operation(rule=_top),
    "sort": Operation(rule=_sorted),
    "index": Operation(rule=_index, resize=_resize_index),
    "index_select": Operation(rule=_index_select),
    "embedding": Operation(rule=_embedding),
    **dict.fromkeys(("gather", "scatter"), Operation(rule=_gather)),
    "one_hot": Operation(rule=_one_hot, resize=_resize_one_hot),
}
"""Operation -> its entry."""
