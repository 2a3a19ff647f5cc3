"""Operations that compute each element by itself: axes that lie above each other are one.

They differ in what becomes of zeros. A sum is zero where all of it is, a product where one factor is, relu(0) = 0,
exp(0) is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from structprune.tracing.rules.operation import Operation, Output, to_shape
from structprune.tracing.terms import Atom, leaves
from structprune.tracing.values import Step, Value, silent_in_all, silent_in_any

Silence = Callable[[Step, Sequence[Value]], frozenset[Atom]]


def _elementwise(silence: Silence) -> Operation:
    def rule(step: Step) -> Output:
        values = step.inputs()
        return Value(dims=step.broadcast(value.dims for value in values), silent=silence(step, values))

    return Operation(rule=rule)


def _of_all(step: Step, values: Sequence[Value]) -> frozenset[Atom]:
    """Return the silent atoms of a sum, which a number other than zero ends."""
    numbers = [step.arguments.get(name) for name in ("other", "value")]
    if any(isinstance(number, int | float) and number != 0 for number in numbers):
        return frozenset()
    return silent_in_all(values)


def _of_any(_: Step, values: Sequence[Value]) -> frozenset[Atom]:
    return silent_in_any(values)


def _of_first(step: Step, values: Sequence[Value]) -> frozenset[Atom]:
    first = step.value("self") or step.value("input")
    return first.silent if first is not None and values else frozenset()


def _of_power(step: Step, values: Sequence[Value]) -> frozenset[Atom]:
    exponent = step.arguments.get("exponent")
    if isinstance(exponent, int | float) and exponent > 0:
        return _of_first(step, values)
    return _of_none(step, values) if exponent == 0 else _without_zeros(step, values)


def _of_quotient(step: Step, values: Sequence[Value]) -> frozenset[Atom]:
    """Return the silent atoms of what is divided; what it is divided by must not be zero."""
    divisor = step.value("other")
    if divisor is not None:
        _without_zeros(step, (divisor,))
    return _of_first(step, values)


def _without_zeros(step: Step, values: Sequence[Value]) -> frozenset[Atom]:
    """Mark as coupled what would be zero, for an operation that has no number for it."""
    silent = leaves(*(atom for value in values for atom in value.silent))
    step.couple(*(atom for atom in leaves(*(dim for value in values for dim in value.dims)) if atom in silent))
    return frozenset()


def _of_clamp(step: Step, values: Sequence[Value]) -> frozenset[Atom]:
    low, high = step.arguments.get("min"), step.arguments.get("max")
    has_zero = (not isinstance(low, int | float) or low <= 0) and (not isinstance(high, int | float) or high >= 0)
    return _of_first(step, values) if has_zero and len(values) == 1 else frozenset()


def _of_masked_fill(step: Step, values: Sequence[Value]) -> frozenset[Atom]:
    return _of_first(step, values) if step.arguments.get("value") == 0 else frozenset()


def _of_where(step: Step, _: Sequence[Value]) -> frozenset[Atom]:
    chosen = [step.value("self"), step.value("other")]
    return silent_in_all(value for value in chosen if value is not None) if all(chosen) else frozenset()


def _of_none(_: Step, __: Sequence[Value]) -> frozenset[Atom]:
    return frozenset()


def _same(step: Step) -> Output:
    """Return the input's value: the same numbers, in another place or of another type."""
    return step.inputs()[0]


def _copied(step: Step) -> Output:
    """Unify what is written with the place where it is written."""
    target, source = step.tensor("self"), step.tensor("src")
    step.broadcast((target.dims, source.dims))
    return replace(target, silent=silent_in_all((target, source)), origin=None)


def _triangle(step: Step) -> Output:
    """Keep one side of a diagonal, which would shift if an axis of it shrank."""
    value = step.tensor("self")
    step.pin(*value.dims[-2:])
    return value


def _filled(step: Step) -> Output:
    """Build a tensor of one number: any axis of it may be shorter."""
    return Value(dims=tuple(Atom(size) for size in step.shape))


def _like(step: Step) -> Output:
    return Value(dims=step.inputs()[0].dims)


def _counted(step: Step) -> Output:
    """Build a tensor whose elements differ by their places: every axis stays as it is."""
    return step.fresh()


_SUM = _elementwise(_of_all)
_PRODUCT = _elementwise(_of_any)
_FIRST = _elementwise(_of_first)
_NONE = _elementwise(_of_none)
_QUOTIENT = _elementwise(_of_quotient)
_UNDEFINED = _elementwise(_without_zeros)
_SAME = Operation(rule=_same)
_FILLED = Operation(rule=_filled, resize=to_shape)
_LIKE = Operation(rule=_like)

ELEMENTWISE: dict[str, Operation] = {
    **dict.fromkeys(("add", "sub", "rsub", "maximum", "minimum"), _SUM),
    **dict.fromkeys(("mul", "logical_and", "bitwise_and", "__and__"), _PRODUCT),
    **dict.fromkeys(("div", "floor_divide", "remainder", "true_divide"), _QUOTIENT),
    **dict.fromkeys(("relu", "relu6", "silu", "gelu", "tanh", "neg", "abs", "sqrt", "square", "floor"), _FIRST),
    **dict.fromkeys(("ceil", "round", "sin", "erf", "sign", "leaky_relu", "elu", "celu", "hardtanh"), _FIRST),
    **dict.fromkeys(
        ("mish", "hardswish", "asinh", "expm1", "log1p", "nan_to_num", "dropout", "isinf", "isnan", "feature_dropout"),
        _FIRST,
    ),
    **dict.fromkeys(("exp", "exp2", "sigmoid", "hardsigmoid", "cos", "softplus", "log_sigmoid"), _NONE),
    **dict.fromkeys(("logical_not", "bitwise_not", "le", "ge", "eq"), _NONE),
    **dict.fromkeys(("lt", "gt", "ne", "logical_or", "bitwise_or", "__or__"), _SUM),
    **dict.fromkeys(("rsqrt", "log", "log2", "reciprocal"), _UNDEFINED),
    "pow": _elementwise(_of_power),
    "clamp": _elementwise(_of_clamp),
    "clip": _elementwise(_of_clamp),
    "clamp_min": _elementwise(_of_clamp),
    "clamp_max": _elementwise(_of_clamp),
    "masked_fill": _elementwise(_of_masked_fill),
    "where": _elementwise(_of_where),
    **dict.fromkeys(("to", "_to_copy", "type_as", "alias", "clone", "contiguous", "detach", "lift_fresh_copy"), _SAME),
    **dict.fromkeys(("lift_fresh", "float"), _SAME),
    "copy": Operation(rule=_copied),
    "tril": Operation(rule=_triangle),
    "triu": Operation(rule=_triangle),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), _FILLED),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "fill", "zero"), _LIKE),
    **dict.fromkeys(("arange", "eye", "scalar_tensor", "linspace"), Operation(rule=_counted)),
}
"""Operation -> its entry. One that ends in `_` and has none is the same one in place."""
