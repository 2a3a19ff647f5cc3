"""Operations on pictures and sounds: norms of channels, pooling, resampling. Axis 1 has the channels, others places."""

from __future__ import annotations

from dataclasses import replace

from structprune.tracing.rules.operation import Call, Operation, Output
from structprune.tracing.terms import Term, split
from structprune.tracing.values import Step, Value, silent_in_all, silent_in_any


def _affine(step: Step, channels: Term, names: tuple[str, ...]) -> list[Value]:
    """Unify the statistics and parameters of a norm with its channels, and return the parameters."""
    given = [value for name in names if (value := step.value(name)) is not None]
    for value in given:
        step.unify(channels, value.dims[0])
    return [value for name in ("weight", "bias") if (value := step.value(name)) is not None]


def _batch_norm(step: Step) -> Output:
    """Read a norm of each channel by itself: by stored statistics, or by those of the batch."""
    value = step.inputs()[0]
    scales = _affine(step, value.dims[1], ("weight", "bias", "running_mean", "running_var"))
    mean = step.value("running_mean")
    parts = scales or [value, *([mean] if mean is not None else [])]
    return Value(dims=value.dims, silent=silent_in_all(parts))


def _group_norm(step: Step) -> Output:
    """Read a norm of groups of channels: whole groups are apart, the channels of one see each other."""
    value = step.inputs()[0]
    inner = step.split(value.dims[1], step.arguments["num_groups"])[1]
    step.couple(inner)
    scales = _affine(step, value.dims[1], ("weight", "bias"))
    return Value(dims=value.dims, silent=silent_in_all(scales) if scales else silent_in_all((value,)))


def _resize_group_norm(call: Call) -> None:
    count = call.arguments["num_groups"]
    call.arguments["num_groups"] = call.size(split(call.inputs["input"].dims[1], count, "group_norm")[0])


def _pool(step: Step) -> Output:
    """Read a window over places, channel by channel: what is zero in all places stays zero."""
    value = step.inputs()[0]
    several = isinstance(step.node.meta["val"], tuple | list)
    shape = step.shapes[0] if several else step.shape
    rank = _spatial(step, len(shape))
    step.pin(*value.dims[len(shape) - rank :])
    result = replace(
        value, dims=(*value.dims[: len(shape) - rank], *(step.pinned(size) for size in shape[len(shape) - rank :]))
    )
    return (result,) * len(step.shapes) if several else result


def _spatial(step: Step, rank: int) -> int:
    """Return the number of axes of places, the digit in the operation's name; else all but batch and channels."""
    digits = [int(letter) for letter in step.name if letter in "123" and f"{letter}d" in step.name]
    return digits[0] if digits else rank - 2


def _prelu(step: Step) -> Output:
    value, slope = step.inputs()[0], step.tensor("weight")
    if slope.dims[0].size > 1:
        step.unify(value.dims[1 if len(value.dims) > 1 else 0], slope.dims[0])
    return Value(dims=value.dims, silent=value.silent)


def _glu(step: Step) -> Output:
    """Split an axis in two: the first half is gated by the second."""
    value = step.inputs()[0]
    axis = step.axis(len(value.dims), default=-1)
    first, second = step.cut(value.dims[axis], value.dims[axis].size // 2)
    step.unify(first, second)
    return Value(dims=(*value.dims[:axis], first, *value.dims[axis + 1 :]), silent=value.silent)


def _transposed(step: Step) -> Output:
    """Read a transposed convolution, whose weight is (inputs, outputs, places); in groups it stays as it is."""
    value, weight, bias = step.tensor("input"), step.tensor("weight"), step.value("bias")
    if step.arguments["groups"] != 1:
        return step.freeze()
    step.pin(*value.dims[2:], *weight.dims[2:])
    step.unify(value.dims[1], weight.dims[0])
    step.contract(value.dims[1], (value, weight), bias)
    silent = silent_in_any((value, weight))
    if bias is not None:
        step.unify(weight.dims[1], bias.dims[0])
        silent &= silent_in_any((bias,))
    places = tuple(step.pinned(size) for size in step.shape[2:])
    return Value(dims=(value.dims[0], weight.dims[1], *places), silent=silent)


_POOL = Operation(rule=_pool)
_DIMENSIONS = (1, 2, 3)

CHANNELS: dict[str, Operation] = {
    **dict.fromkeys(("batch_norm", "instance_norm"), Operation(rule=_batch_norm)),
    "group_norm": Operation(rule=_group_norm, resize=_resize_group_norm),
    **{f"max_pool{count}d": _POOL for count in _DIMENSIONS},
    **{f"avg_pool{count}d": _POOL for count in _DIMENSIONS},
    **{f"adaptive_avg_pool{count}d": _POOL for count in _DIMENSIONS},
    **{f"adaptive_max_pool{count}d": _POOL for count in _DIMENSIONS},
    **{f"upsample_nearest{count}d": _POOL for count in _DIMENSIONS},
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d"), _POOL),
    "prelu": Operation(rule=_prelu),
    "glu": Operation(rule=_glu),
    **{f"conv_transpose{count}d": Operation(rule=_transposed) for count in _DIMENSIONS},
}
"""Operation -> its entry."""
