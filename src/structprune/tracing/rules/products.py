"""Operations that sum products: linear maps, convolutions, attention."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from structprune.tracing.rules.operation import Call, Operation, Output
from structprune.tracing.terms import Atom, Term, split
from structprune.tracing.values import Mixing, Step, Value, silent_in_all, silent_in_any, silent_without


def _biased(product: Value, bias: Value | None) -> frozenset[Atom]:
    """Return what is silent of a sum of a product and a bias along the last axis."""
    return product.silent if bias is None else silent_in_all((product, bias))


def _product(step: Step, operands: Sequence[tuple[Value, str]], output: str, bias: Value | None = None) -> Value:
    """Read a sum of products whose axes have letters: equal letters are one axis, those that are gone are summed."""
    terms: dict[str, list[Term]] = {}
    for value, letters in operands:
        for letter, dim in zip(letters, value.dims, strict=True):
            terms.setdefault(letter, []).append(dim)
    # An axis of size 1 fits any other where it is not summed.
    dims: Mapping[str, Term] = {letter: step.broadcast((term,) for term in each)[0] for letter, each in terms.items()}
    values = [value for value, _ in operands]
    for letter, dim in dims.items():
        if letter not in output:
            step.contract(dim, values, bias)
    return Value(dims=tuple(dims[letter] for letter in output), silent=silent_in_any(values))


def _with_bias(step: Step, product: Value, bias: Value | None) -> Value:
    if bias is None:
        return product
    return Value(dims=step.broadcast((product.dims, bias.dims)), silent=_biased(product, bias))


def _letters(count: int) -> str:
    return string.ascii_lowercase[:count]


def _linear(step: Step) -> Output:
    value, weight, bias = step.tensor("input"), step.tensor("weight"), step.value("bias")
    outer = _letters(len(value.dims) - 1)
    product = _product(step, ((value, f"{outer}I"), (weight, "OI")), f"{outer}O", bias)
    return _with_bias(step, product, bias)


def _matmul(step: Step) -> Output:
    first = step.tensor("self")
    second = step.value("other") or step.tensor("mat2")
    if min(len(first.dims), len(second.dims)) < 2:
        return step.freeze()
    return _batched(step, first, second)


def _batched(step: Step, first: Value, second: Value, bias: Value | None = None) -> Value:
    outer = _letters(max(len(first.dims), len(second.dims)) - 2)
    left = outer[len(outer) - len(first.dims) + 2 :] + "RK"
    right = outer[len(outer) - len(second.dims) + 2 :] + "KC"
    return _product(step, ((first, left), (second, right)), f"{outer}RC", bias)


def _addmm(step: Step) -> Output:
    """Read `self + first @ second`."""
    bias = step.tensor("self")
    first = step.value("mat1") or step.tensor("batch1")
    second = step.value("mat2") or step.tensor("batch2")
    return _with_bias(step, _batched(step, first, second, bias), bias)


def _einsum(step: Step) -> Output:
    equation: str = step.arguments["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    operands = list(zip(step.tensors("tensors"), inputs.split(","), strict=True))
    if not arrow or "." in equation or any(len(set(letters)) != len(letters) for _, letters in operands):
        return step.freeze()
    return _product(step, operands, output)


def _convolution(step: Step) -> Output:
    """Read a convolution: positions mix, and channels as the groups have them."""
    value, weight, bias = step.tensor("input"), step.tensor("weight"), step.value("bias")
    groups = step.arguments["groups"]
    step.pin(*value.dims[2:], *weight.dims[2:])
    channels = weight.dims[0]
    if groups == 1:
        step.unify(value.dims[1], weight.dims[1])
        step.contract(value.dims[1], (value, weight), bias)
    elif weight.dims[1].size == 1 and groups == channels.size:
        step.unify(value.dims[1], channels)
    else:
        # Whole groups may leave, and within the groups inputs or outputs, as many in each.
        group, inputs = step.split(value.dims[1], groups)
        step.unify(inputs, weight.dims[1])
        step.unify(step.split(channels, groups)[0], group)
        step.contract(weight.dims[1], (value, weight), bias)
    silent = silent_in_any((value, weight))
    step.notes.mixings.append(Mixing(node=step.node, over=value.dims[2], heads=None))
    spatial = tuple(step.pinned(size) for size in step.shape[2:])
    if bias is not None:
        step.unify(channels, bias.dims[0])
        silent &= silent_in_any((bias,))
    return Value(dims=(value.dims[0], channels, *spatial), silent=silent)


def _resize_groups(call: Call) -> None:
    groups = call.arguments["groups"]
    if groups > 1:
        call.arguments["groups"] = call.size(split(call.inputs["weight"].dims[0], groups, "groups")[0])


def _attention(step: Step) -> Output:
    """Read scaled dot product attention: (..., heads, positions, size) each."""
    query, key, value = step.tensor("query"), step.tensor("key"), step.tensor("value")
    step.unify(query.dims[-1], key.dims[-1])
    step.contract(query.dims[-1], (query, key))
    step.unify(key.dims[-2], value.dims[-2])
    step.pin(key.dims[-2])
    outer = step.broadcast((key.dims[:-2], value.dims[:-2]))
    if step.arguments.get("enable_gqa") and query.dims[-3].size != outer[-1].size:
        # Query heads h * r ... h * r + r - 1 read KV head h.
        heads, _ = step.split(query.dims[-3], outer[-1].size)
        step.unify(heads, outer[-1])
        step.broadcast((query.dims[:-3], outer[:-1]))
        outer = query.dims[:-2]
    else:
        outer = step.broadcast((query.dims[:-2], outer))
    mask = step.value("attn_mask")
    if mask is not None:
        step.broadcast((mask.dims, (*outer, query.dims[-2], key.dims[-2])))
    step.notes.mixings.append(Mixing(node=step.node, over=key.dims[-2], heads=outer))
    return Value(dims=(*outer, query.dims[-2], value.dims[-1]), silent=silent_without(value, key.dims[-2]))


def _keep_scale(call: Call) -> None:
    """Write down the scale that follows from the size of the queries, which may be smaller now."""
    if call.arguments["scale"] is None:
        call.arguments["scale"] = call.inputs["query"].dims[-1].size ** -0.5


PRODUCTS: dict[str, Operation] = {
    "linear": Operation(rule=_linear),
    **dict.fromkeys(("matmul", "mm", "bmm"), Operation(rule=_matmul)),
    **dict.fromkeys(("addmm", "baddbmm"), Operation(rule=_addmm)),
    "einsum": Operation(rule=_einsum),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), Operation(rule=_convolution, resize=_resize_groups)),
    "scaled_dot_product_attention": Operation(rule=_attention, resize=_keep_scale),
}
"""Operation -> its entry."""
