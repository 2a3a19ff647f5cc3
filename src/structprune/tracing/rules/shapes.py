"""Operations that move, cut and join axes without computing anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from structprune.tracing.rules.operation import Call, Operation, Output, to_shape
from structprune.tracing.terms import Atom, Product, Sum, Term, leaves
from structprune.tracing.values import Step, Value, silent_without

_ONE = Product(())


def _moved(value: Value, dims: Sequence[Term]) -> Value:
    """Return the same elements with other axes."""
    return replace(value, dims=tuple(dims), constant=None)


def _view(step: Step) -> Output:
    """Read all axes as one product and group its factors anew."""
    value = step.tensor("self")
    rest: Term = Product(value.dims)
    dims: list[Term] = []
    for size in step.shape:
        if rest.size == 0 or size == 0:
            return step.freeze()
        left, rest = step.split(rest, size)
        dims.append(left)
    return _moved(value, dims)


def _resize_view(call: Call) -> None:
    """Set the call to a reshape: with fewer units the strides of what comes in may be others."""
    call.target = torch.ops.aten.reshape.default
    call.arguments = {"self": call.arguments["self"], "shape": call.shape()}


def _resize_unflatten(call: Call) -> None:
    axis = call.arguments["dim"] % len(call.inputs["self"].dims)
    call.arguments["sizes"] = call.shape()[axis : axis + len(call.arguments["sizes"])]


def _transpose(step: Step) -> Output:
    value = step.tensor("self")
    dims = list(value.dims)
    first, second = step.axis(len(dims), "dim0"), step.axis(len(dims), "dim1")
    dims[first], dims[second] = dims[second], dims[first]
    return _moved(value, dims)


def _permute(step: Step) -> Output:
    value = step.tensor("self")
    return _moved(value, [value.dims[axis] for axis in step.axes(len(value.dims), "dims")])


def _reversed(step: Step) -> Output:
    value = step.tensor("self")
    return _moved(value, value.dims[::-1])


def _last_two(step: Step) -> Output:
    value = step.tensor("self")
    return _moved(value, (*value.dims[:-2], value.dims[-1], value.dims[-2]))


def _unsqueeze(step: Step) -> Output:
    value = step.tensor("self")
    dims = list(value.dims)
    dims.insert(step.axis(len(dims) + 1), _ONE)
    return _moved(value, dims)


def _squeeze(step: Step) -> Output:
    value = step.tensor("self")
    gone = set(step.axes(len(value.dims))) if value.dims else set[int]()
    return _moved(value, [dim for axis, dim in enumerate(value.dims) if axis not in gone or dim.size != 1])


def _expand(step: Step) -> Output:
    """Repeat axes of size 1: as many copies as are wanted, so the new axis may be shorter."""
    value = step.inputs()[0]
    old = (*[_ONE] * (len(step.shape) - len(value.dims)), *value.dims)
    dims = [Atom(size) if dim.size != size else dim for dim, size in zip(old, step.shape, strict=True)]
    return _moved(value, dims)


def _repeat(step: Step) -> Output:
    """Put copies of the whole beside each other along each axis."""
    value = step.tensor("self")
    repeats = step.arguments["repeats"]
    old = (*[_ONE] * (len(repeats) - len(value.dims)), *value.dims)
    return _moved(value, [Product((Atom(times), dim)) for times, dim in zip(repeats, old, strict=True)])


def _resize_repeat(call: Call) -> None:
    old = call.arguments["self"].shape
    old = (*[1] * (len(call.shape()) - len(old)), *old)
    call.arguments["repeats"] = [new // size for new, size in zip(call.shape(), old, strict=True)]


def _repeat_interleave(step: Step) -> Output:
    """Put copies of each thing beside it."""
    value = step.tensor("self")
    times = step.arguments["repeats"]
    if step.arguments.get("dim") is None or not isinstance(times, int):
        return step.freeze()
    axis = step.axis(len(value.dims))
    dims = list(value.dims)
    dims[axis] = Product((dims[axis], Atom(times)))
    return _moved(value, dims)


def _resize_interleave(call: Call) -> None:
    old = call.arguments["self"].shape
    axis = call.arguments["dim"] % len(old)
    call.arguments["repeats"] = call.shape()[axis] // old[axis]
    call.arguments["output_size"] = None


def _bounds(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


def _slice(step: Step) -> Output:
    value = step.tensor("self")
    dims = list(value.dims)
    axis, size = step.axis(len(dims), default=0), dims[step.axis(len(dims), default=0)].size
    start, end = _bounds(size, step.arguments["start"], step.arguments["end"])
    stride = step.arguments["step"]
    if stride == 1:
        dims[axis] = _segment(step, dims[axis], start, end)
    elif size % stride == 0 and start < stride and end == size:
        # One of every `stride` neighbours: which one is written in the code.
        dims[axis], neighbours = step.split(dims[axis], size // stride)
        step.pin(neighbours)
    else:
        step.pin(dims[axis])
        dims[axis] = step.pinned(step.shape[axis])
    return _moved(value, dims)


def _segment(step: Step, term: Term, start: int, end: int) -> Term:
    return step.cut(step.cut(term, end)[0], start)[1]


def _resize_slice(call: Call) -> None:
    term = _axis_of(call)
    start, end = _bounds(term.size, call.arguments["start"], call.arguments["end"])
    if call.arguments["step"] == 1:
        call.arguments |= {"start": call.before(term, start), "end": call.before(term, end)}
    else:
        call.arguments["end"] = None


def _axis_of(call: Call) -> Term:
    dims = call.inputs["self"].dims
    return dims[call.arguments["dim"] % len(dims)]


def _narrow(step: Step) -> Output:
    value = step.tensor("self")
    dims = list(value.dims)
    axis, start = step.axis(len(dims)), step.arguments["start"]
    if not isinstance(start, int):
        return step.freeze()
    start %= dims[axis].size
    dims[axis] = _segment(step, dims[axis], start, start + step.arguments["length"])
    return _moved(value, dims)


def _resize_narrow(call: Call) -> None:
    term, start = _axis_of(call), call.arguments["start"] % _axis_of(call).size
    end = call.before(term, start + call.arguments["length"])
    call.arguments["start"] = call.before(term, start)
    call.arguments["length"] = end - call.arguments["start"]


def _select(step: Step) -> Output:
    value = step.tensor("self")
    dims = list(value.dims)
    axis = step.axis(len(dims))
    index = step.arguments["index"] % dims[axis].size
    _segment(step, dims[axis], index, index + 1)
    del dims[axis]
    return _moved(value, dims)


def _resize_select(call: Call) -> None:
    term = _axis_of(call)
    call.arguments["index"] = call.before(term, call.arguments["index"] % term.size)


def _split(step: Step) -> Output:
    """Cut an axis into segments of the sizes that came out."""
    value = step.tensor("self")
    axis = step.axis(len(value.dims), default=0)
    rest, parts = value.dims[axis], list[Value]()
    for shape in step.shapes:
        part, rest = step.cut(rest, shape[axis])
        parts.append(_moved(value, (*value.dims[:axis], part, *value.dims[axis + 1 :])))
    return tuple(parts)


def _resize_split(call: Call) -> None:
    axis = call.arguments.get("dim", 0) % len(call.inputs["self"].dims)
    assert isinstance(call.output, tuple)
    sizes = [call.size(part.dims[axis]) for part in call.output]
    call.target = torch.ops.aten.split_with_sizes.default
    call.arguments = {"self": call.arguments["self"], "split_sizes": sizes, "dim": axis}


def _unbind(step: Step) -> Output:
    """Take every thing of an axis by itself: as many as there are."""
    value = step.tensor("self")
    axis = step.axis(len(value.dims), default=0)
    step.pin(value.dims[axis])
    part = _moved(value, (*value.dims[:axis], *value.dims[axis + 1 :]))
    return (part,) * value.dims[axis].size


def _joined_silence(values: Sequence[Value]) -> frozenset[Atom]:
    """Return the atoms that are silent wherever they occur."""
    silent = [leaves(*value.silent).keys() for value in values]
    loud = set[Atom]()
    for value, quiet in zip(values, silent, strict=True):
        loud |= leaves(*value.dims).keys() - quiet
    return frozenset(set[Atom]().union(*silent) - loud)


def _cat(step: Step) -> Output:
    values = [value for value in step.tensors("tensors") if math.prod(dim.size for dim in value.dims) > 0]
    if not values:
        return step.freeze()
    axis = step.axis(len(values[0].dims), default=0)
    dims = list(values[0].dims)
    for value in values[1:]:
        for place, (one, other) in enumerate(zip(dims, value.dims, strict=True)):
            if place != axis:
                step.unify(one, other)
    dims[axis] = Sum(tuple(value.dims[axis] for value in values))
    return Value(dims=tuple(dims), silent=_joined_silence(values))


def _stack(step: Step) -> Output:
    values = step.tensors("tensors")
    dims = list(step.broadcast(value.dims for value in values))
    dims.insert(step.axis(len(dims) + 1, default=0), step.pinned(len(values)))
    return Value(dims=tuple(dims), silent=_joined_silence(values))


def _pad(step: Step) -> Output:
    """Put a number in front of an axis and behind it; negative widths cut."""
    value = step.tensor("self")
    dims, widths = list(value.dims), step.arguments["pad"]
    for place in range(len(widths) // 2):
        axis, (before, after) = len(dims) - 1 - place, widths[2 * place : 2 * place + 2]
        term = _segment(step, dims[axis], max(-before, 0), dims[axis].size - max(-after, 0))
        dims[axis] = Sum((step.pinned(max(before, 0)), term, step.pinned(max(after, 0))))
    zeros = step.arguments.get("mode", "constant") == "constant" and not step.arguments.get("value")
    if not zeros or min(widths) < 0:
        step.pin(*dims)
    return replace(_moved(value, dims), origin=None, silent=value.silent if zeros else frozenset())


def _flip(step: Step) -> Output:
    """Turn axes round, or shift them: things change places with each other."""
    value = step.tensor("self")
    step.pin(*(value.dims[axis] for axis in step.axes(len(value.dims), "dims")))
    return value


def _complex(step: Step) -> Output:
    """Read the last axis, real and imaginary part, as one number."""
    value = step.tensor("self")
    step.pin(value.dims[-1])
    return _moved(value, value.dims[:-1])


def _real(step: Step) -> Output:
    value = step.tensor("self")
    return _moved(value, (*value.dims, step.pinned(2)))


def _diagonal(step: Step) -> Output:
    value = step.tensor("self")
    dims = list(value.dims)
    first, second = step.axis(len(dims), "dim1"), step.axis(len(dims), "dim2")
    step.unify(dims[first], dims[second])
    step.pin(dims[first])
    kept = [dim for axis, dim in enumerate(dims) if axis not in (first, second)]
    return Value(dims=(*kept, dims[first]), silent=silent_without(value, dims[first]))


_VIEW = Operation(rule=_view, resize=_resize_view)
_EXPAND = Operation(rule=_expand, resize=to_shape)
_SPLIT = Operation(rule=_split, resize=_resize_split)

SHAPES: dict[str, Operation] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "view_as", "reshape_as"), _VIEW),
    "flatten": Operation(rule=_view),
    "unflatten": Operation(rule=_view, resize=_resize_unflatten),
    "transpose": Operation(rule=_transpose),
    "permute": Operation(rule=_permute),
    **dict.fromkeys(("t", "numpy_T"), Operation(rule=_reversed)),
    **dict.fromkeys(("mT", "adjoint"), Operation(rule=_last_two)),
    "unsqueeze": Operation(rule=_unsqueeze),
    "squeeze": Operation(rule=_squeeze),
    **dict.fromkeys(("expand", "broadcast_to"), _EXPAND),
    "expand_as": Operation(rule=_expand),
    "repeat": Operation(rule=_repeat, resize=_resize_repeat),
    "repeat_interleave": Operation(rule=_repeat_interleave, resize=_resize_interleave),
    "slice": Operation(rule=_slice, resize=_resize_slice),
    "narrow": Operation(rule=_narrow, resize=_resize_narrow),
    "select": Operation(rule=_select, resize=_resize_select),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _SPLIT),
    "unbind": Operation(rule=_unbind),
    **dict.fromkeys(("cat", "concat", "concatenate"), Operation(rule=_cat)),
    "stack": Operation(rule=_stack),
    **dict.fromkeys(("pad", "constant_pad_nd"), Operation(rule=_pad)),
    **dict.fromkeys(("flip", "roll"), Operation(rule=_flip)),
    "view_as_complex": Operation(rule=_complex),
    "view_as_real": Operation(rule=_real),
    "diagonal": Operation(rule=_diagonal),
}
"""Operation -> its entry."""
VIEWS = frozenset(SHAPES) - {
    "cat",
    "concat",
    "concatenate",
    "stack",
    "pad",
    "constant_pad_nd",
    "repeat",
    "repeat_interleave",
    "flip",
}
"""Operations whose output shares its memory with their input, or may."""
