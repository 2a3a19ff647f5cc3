"""Every operation of the table: a module without some units computes what it computes with zeros in their place.

Each case is a small module around one operation, between a linear map that computes units and one that reads them. The
masked module is stock torch; what the table says of the operation decides which units may go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structprune.tracing.families import Family
from structprune.tracing.graph import Traced, state_of, trace
from structprune.tracing.replay import Example, check_removal, replay
from structprune.tracing.rules import OPERATIONS, operation
from structprune.tracing.values import operation_name

Apply = Callable[[Tensor, "Around"], Tensor]
BATCH, POSITIONS, WIDTH, UNITS = 2, 5, 6, 12


@dataclass(frozen=True, kw_only=True)
class Case:
    """One use of an operation on x (2, 5, 12), and the sizes of the families that may then leave exactly."""

    name: str
    apply: Apply
    exact: tuple[int, ...] = (12,)
    coupled: tuple[int, ...] = ()
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    reads: int = UNITS
    """Last axis of the result."""


class Around(nn.Module):
    """out(op(a(x))); `weights` are parameters of the operation."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.a = nn.Linear(WIDTH, UNITS, bias=False)
        self.out = nn.Linear(case.reads, WIDTH)
        for name, shape in case.weights.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.case.apply(self.a(x), self))


def unary(function: Callable[[Tensor], Tensor]) -> Apply:
    return lambda x, _: function(x)


aten: Any = torch.ops.aten
# fmt: off
UNARY = (
    "relu", "relu6", "silu", "gelu", "tanh", "neg", "abs", "square", "floor", "ceil", "round", "sin", "erf",
    "sign", "leaky_relu", "elu", "celu", "hardtanh", "mish", "hardswish", "asinh", "expm1", "exp", "exp2",
    "sigmoid", "hardsigmoid", "cos", "softplus", "logical_not", "isinf", "isnan", "nan_to_num", "alias", "clone",
    "contiguous", "detach", "lift_fresh_copy", "lift_fresh", "log_sigmoid",
)
BINARY = (
    "add", "sub", "rsub", "mul", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne", "logical_and",
    "logical_or",
)
# fmt: on


def summed(x: Tensor, result: Tensor) -> Tensor:
    """Units times the sum of a result over all of them: what a removed unit leaves in the sum is seen in the others."""
    return x * result.to(x.dtype).sum(-1, keepdim=True)


def unary_case(name: str) -> Case:
    """The sum of f over the units no longer sees units that are zero exactly where f(0) = 0."""
    function = getattr(aten, name)
    silent = not function(torch.zeros(1)).any()
    return Case(
        name=name,
        apply=lambda x, _: summed(x, function(x)),
        exact=(12,) if silent else (),
        coupled=() if silent else (12,),
    )


def binary_case(name: str) -> Case:
    """Both operands are zero where a unit is gone."""
    function = getattr(aten, name)
    silent = not function(torch.zeros(1), torch.zeros(1)).any()
    return Case(
        name=name,
        apply=lambda x, m: summed(x, function(x, m.w)),
        weights={"w": (12,)},
        exact=(12,) if silent else (),
        coupled=() if silent else (12,),
    )


def typed(function: Callable[[Tensor], Tensor]) -> Apply:
    """An operation that gives no numbers of the type of the map behind it, or may give none at all."""
    return lambda x, _: function(x).to(x.dtype)


def heads(x: Tensor) -> Tensor:
    return x.view(BATCH, POSITIONS, 3, 4).transpose(1, 2)


def attended(x: Tensor, _: Around) -> Tensor:
    result = F.scaled_dot_product_attention(heads(x), heads(x), heads(x))
    return result.transpose(1, 2).reshape(BATCH, POSITIONS, 12)


def grouped_attention(x: Tensor, m: Any) -> Tensor:
    keys = heads(x)[:, :1]
    values = F.linear(x[..., :4], m.w).view(BATCH, POSITIONS, 1, 4).transpose(1, 2)
    result = F.scaled_dot_product_attention(heads(x)[:, 1:], keys, values, enable_gqa=True)
    return result.transpose(1, 2).reshape(BATCH, POSITIONS, 8)


def depthwise(x: Tensor, m: Any) -> Tensor:
    return F.conv1d(x.transpose(1, 2), m.w, m.c, padding=1, groups=12).transpose(1, 2)


def grouped(x: Tensor, m: Any) -> Tensor:
    return F.conv1d(x.transpose(1, 2), m.w, padding=1, groups=3).transpose(1, 2)


def plain_convolution(x: Tensor, m: Any) -> Tensor:
    return F.conv1d(x.transpose(1, 2), m.w, m.c, padding=1).transpose(1, 2)


def doubled_depthwise(x: Tensor, m: Any) -> Tensor:
    return F.conv1d(x.transpose(1, 2), m.w, groups=12).transpose(1, 2)


def channelwise(function: Callable[[Tensor, Any], Tensor], places: int = 1) -> Apply:
    """An operation on (batch, channels, places), with as many axes of places as are wanted, all but the first of 1."""

    def apply(x: Tensor, m: Any) -> Tensor:
        channels = x.transpose(1, 2)
        result = function(channels.reshape(*channels.shape, *[1] * (places - 1)), m)
        return result.flatten(2)[..., :2].transpose(1, 2)

    return apply


def resampled(name: str, *arguments: Any) -> Case:
    """A pool or resampling over as many axes of places as its name says."""
    places = int(name[-2])

    def function(x: Tensor, _: Any) -> Tensor:
        result = getattr(aten, name)(x, *(value(places) if callable(value) else value for value in arguments))
        return result[0] if isinstance(result, tuple) else result

    return Case(name=name, apply=channelwise(function, places))


NORM_PARAMETERS: dict[str, tuple[int, ...]] = {"w": (12,), "c": (12,)}


def complex_turn(x: Tensor, _: Around) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(BATCH, POSITIONS, 6, 2).contiguous())
    return torch.view_as_real(pairs * (1 + 2j)).flatten(-2)


def chosen_experts(x: Tensor, m: Any) -> Tensor:
    ids = torch.topk(F.linear(x, m.router), 2, dim=-1).indices
    return torch.einsum("bpku,bpu->bpu", m.bank[ids], x)


def weighed(function: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """An operation with a parameter along the units."""
    return {"apply": lambda x, m: function(x, m.w), "weights": {"w": (12,)}}


def made(function: Callable[[Tensor], Tensor]) -> Apply:
    """A tensor that is made beside the units, and multiplied with them."""
    return lambda x, _: x * function(x)


CASES = (
    *(unary_case(name) for name in UNARY),
    *(binary_case(name) for name in BINARY),
    *(
        Case(name=name, apply=typed(lambda x, name=name: getattr(aten, name)(x.abs() + 1)))
        for name in ("sqrt", "rsqrt", "log", "log2", "reciprocal")
    ),
    *(
        Case(name=name, apply=unary(lambda x, name=name: getattr(aten, name)(x)), exact=(), coupled=(12,))
        for name in ("rsqrt", "log", "log2", "reciprocal")
    ),
    *(
        Case(name=name, **weighed(lambda x, w, name=name: getattr(aten, name)(x, w.abs() + 1)))
        for name in ("div", "true_divide", "floor_divide", "remainder")
    ),
    Case(name="div", **weighed(lambda x, w: x / w), exact=(), coupled=(12,)),
    *(
        Case(name=name, **weighed(lambda x, w, name=name: summed(x, getattr(aten, name)(x > 0, w > 0))))
        for name in ("bitwise_and", "bitwise_or", "__and__", "__or__")
    ),
    Case(name="log1p", apply=unary(lambda x: summed(x, x.abs().log1p()))),
    Case(name="bitwise_not", apply=typed(lambda x: ~(x > 0))),
    Case(name="zeros_like", apply=unary(lambda x: x + torch.zeros_like(x))),
    Case(name="ones_like", apply=unary(lambda x: x + torch.ones_like(x))),
    Case(name="empty_like", apply=unary(lambda x: x + aten.fill(torch.empty_like(x), 2.0))),
    Case(
        name="add",
        apply=unary(lambda x: (x + 1).sum(-1, keepdim=True).expand(-1, -1, 6)),
        exact=(6,),
        coupled=(12,),
        reads=6,
    ),
    Case(name="pow", apply=unary(lambda x: x**2)),
    Case(name="pow", apply=unary(lambda x: x.pow(0).sum(-1, keepdim=True) * x), exact=(), coupled=(12,)),
    Case(name="clamp", apply=unary(lambda x: x.clamp(-0.1, 0.1))),
    Case(name="clamp", apply=unary(lambda x: x.clamp(0.1, 0.2).sum(-1, keepdim=True) * x), exact=(), coupled=(12,)),
    Case(name="clip", apply=unary(lambda x: aten.clip(x, -0.1, 0.1))),
    Case(name="clamp_min", apply=unary(lambda x: aten.clamp_min(x, 0.1))),
    Case(name="clamp_max", apply=unary(lambda x: aten.clamp_max(x, 0.1))),
    Case(name="masked_fill", apply=unary(lambda x: x.masked_fill(x > 0, 3.0))),
    Case(name="where", apply=unary(lambda x: torch.where(x > 0, x, 2 * x))),
    Case(name="dropout", apply=unary(lambda x: aten.dropout(x, 0.5, False))),
    Case(name="to", apply=unary(lambda x: x.to(torch.float32).to(x.dtype))),
    Case(name="_to_copy", apply=unary(lambda x: aten._to_copy(x, dtype=torch.float32).to(x.dtype))),
    Case(name="type_as", apply=lambda x, m: x.type_as(m.out.bias)),
    Case(name="float", apply=unary(lambda x: x.float().to(x.dtype))),
    Case(name="copy", apply=unary(lambda x: torch.zeros_like(x).copy_(x))),
    *(
        Case(
            name=name,
            apply=made(lambda x, name=name: getattr(aten, name)(torch.ones(5, 5, dtype=x.dtype)).sum(0)[:, None]),
        )
        for name in ("tril", "triu")
    ),
    Case(name="zeros", apply=unary(lambda x: torch.cat([x, torch.zeros(2, 5, 12, dtype=x.dtype)], 1)[:, :5])),
    Case(name="ones", apply=made(lambda x: torch.ones(2, 5, 12, dtype=x.dtype))),
    Case(name="full", apply=made(lambda x: torch.full((2, 5, 12), 3.0, dtype=x.dtype))),
    Case(name="empty", apply=made(lambda x: aten.fill(aten.empty([2, 5, 12], dtype=x.dtype), 2.0))),
    Case(name="new_zeros", apply=made(lambda x: x.new_zeros(2, 5, 12) + 1)),
    Case(name="new_ones", apply=made(lambda x: x.new_ones(2, 5, 12))),
    Case(name="new_full", apply=made(lambda x: x.new_full((2, 5, 12), 3.0))),
    Case(name="new_empty", apply=made(lambda x: aten.fill(x.new_empty(2, 5, 12), 2.0))),
    Case(name="full_like", apply=made(lambda x: torch.full_like(x, 2.0))),
    Case(name="fill", apply=made(lambda x: aten.fill(x, 2.0))),
    Case(name="zero", apply=unary(lambda x: x + torch.ones_like(x).zero_())),
    # Numbers that differ by place: an axis that they lie along stays whole.
    Case(name="arange", apply=made(lambda x: torch.arange(12, dtype=x.dtype)), exact=()),
    Case(name="linspace", apply=made(lambda x: torch.linspace(0, 1, 12, dtype=x.dtype)), exact=()),
    Case(name="eye", apply=unary(lambda x: x @ torch.eye(12, dtype=x.dtype)), exact=()),
    Case(name="scalar_tensor", apply=made(lambda x: aten.scalar_tensor(2.0, dtype=x.dtype))),
    # Shapes.
    Case(name="view", apply=unary(lambda x: x.view(2, 5, 3, 4).view(10, 12).view(2, 5, 12)), exact=(3, 4)),
    Case(name="reshape", apply=unary(lambda x: x.reshape(2, 5, 3, 4).transpose(2, 3).reshape(2, 5, 12)), exact=(3, 4)),
    Case(name="view_as", apply=unary(lambda x: x.view_as(x.view(10, 12)).relu().view_as(x))),
    Case(name="reshape_as", apply=unary(lambda x: x.reshape_as(x.view(2, 5, 3, 4)).relu().flatten(2)), exact=(3, 4)),
    Case(name="_unsafe_view", apply=unary(lambda x: aten._unsafe_view(x, [2, 5, 3, 4]).flatten(2)), exact=(3, 4)),
    Case(name="flatten", apply=unary(lambda x: x.view(2, 5, 3, 4).flatten(-2)), exact=(3, 4)),
    Case(name="unflatten", apply=unary(lambda x: x.unflatten(-1, (3, 4)).flatten(-2)), exact=(3, 4)),
    Case(name="transpose", apply=unary(lambda x: x.transpose(1, 2).relu().transpose(-1, 1))),
    Case(name="permute", apply=unary(lambda x: x.permute(2, 0, 1).relu().permute(1, 2, 0))),
    Case(name="t", apply=unary(lambda x: (x.view(10, 12).t().relu().t()).view(2, 5, 12))),
    Case(name="numpy_T", apply=unary(lambda x: aten.numpy_T(aten.numpy_T(x).relu()))),
    Case(name="mT", apply=unary(lambda x: aten.mT(aten.mT(x).relu()))),
    Case(name="adjoint", apply=unary(lambda x: aten.adjoint(aten.adjoint(x).relu()))),
    Case(name="unsqueeze", apply=unary(lambda x: x.unsqueeze(1).unsqueeze(-1).relu().squeeze(-1).squeeze(1))),
    Case(name="squeeze", apply=unary(lambda x: x[:, None].relu().squeeze())),
    Case(
        name="expand",
        apply=unary(lambda x: x.unsqueeze(-1).expand(2, 5, 12, 3).reshape(2, 5, 36)),
        exact=(3, 12),
        reads=36,
    ),
    Case(name="expand_as", apply=unary(lambda x: x[..., None].relu().expand_as(x[..., None]).squeeze(-1))),
    Case(name="expand_as", apply=lambda x, m: x * m.w.expand_as(x), weights={"w": (12,)}),
    Case(name="broadcast_to", apply=unary(lambda x: x[:, None].broadcast_to(2, 4, 5, 12).sum(1))),
    Case(name="repeat", apply=unary(lambda x: x.repeat(1, 1, 2)), exact=(2, 12), reads=24),
    Case(name="repeat_interleave", apply=unary(lambda x: x.repeat_interleave(3, dim=-1)), exact=(3, 12), reads=36),
    Case(name="slice", apply=unary(lambda x: x[..., 2:9]), exact=(2, 7, 3), reads=7),
    Case(name="slice", apply=unary(lambda x: x[..., 1::3]), exact=(4,), reads=4),
    Case(name="slice", apply=unary(lambda x: x[..., 1:9:3]), exact=(), reads=3),
    Case(name="narrow", apply=unary(lambda x: aten.narrow(x, -1, 2, 7)), exact=(2, 7, 3), reads=7),
    Case(name="select", apply=unary(lambda x: x * x.select(-1, 3)[..., None].tanh()), exact=(3, 8)),
    Case(name="split", apply=unary(lambda x: torch.mul(*x.split(6, -1))), exact=(6,), reads=6),
    Case(name="split_with_sizes", apply=unary(lambda x: torch.cat(x.split([2, 3, 7], -1)[::-1], -1)), exact=(2, 3, 7)),
    Case(name="chunk", apply=unary(lambda x: torch.mul(*x.chunk(2, -1))), exact=(6,), reads=6),
    Case(name="unbind", apply=unary(lambda x: torch.add(*x.view(2, 5, 2, 6).unbind(2))), exact=(6,), reads=6),
    Case(name="cat", apply=unary(lambda x: torch.cat([x, x.relu()], -1)), reads=24),
    Case(name="concatenate", apply=unary(lambda x: torch.concatenate([x, x.tanh()], -1)), reads=24),
    Case(name="concat", apply=unary(lambda x: aten.concat([x.exp(), x], 1)[:, 5:])),
    Case(name="stack", apply=unary(lambda x: torch.stack([x, x.relu()], -1).flatten(-2)), reads=24),
    Case(name="pad", apply=unary(lambda x: F.pad(x, (1, 2))), reads=15),
    Case(name="constant_pad_nd", apply=unary(lambda x: aten.constant_pad_nd(x, [0, 3], 2.0)), exact=(), reads=15),
    Case(name="flip", apply=unary(lambda x: x.flip(-1)), exact=()),
    Case(name="roll", apply=unary(lambda x: x.roll(2, 1))),
    Case(name="view_as_complex", apply=complex_turn, exact=(6,)),
    Case(name="view_as_real", apply=complex_turn, exact=(6,)),
    Case(
        name="diagonal",
        apply=unary(lambda x: x.unflatten(-1, (3, 4))[..., :3].diagonal(dim1=2, dim2=3)),
        exact=(),
        reads=3,
    ),
    # Sums of products.
    Case(
        name="linear",
        apply=lambda x, m: F.linear(x, m.w, m.c),
        weights={"w": (9, 12), "c": (9,)},
        exact=(9, 12),
        reads=9,
    ),
    Case(name="matmul", apply=lambda x, m: x @ m.w, weights={"w": (12, 9)}, exact=(9, 12), reads=9),
    Case(
        name="mm",
        apply=lambda x, m: aten.mm(x.view(10, 12), m.w).view(2, 5, 9),
        weights={"w": (12, 9)},
        exact=(9, 12),
        reads=9,
    ),
    # Sums of products of what is not zero: exp(0) = 1 in both.
    Case(name="matmul", apply=unary(lambda x: (x.exp() @ x.exp().mT) @ x), exact=(), coupled=(12,)),
    Case(name="bmm", apply=unary(lambda x: torch.bmm(torch.bmm(x, x.transpose(1, 2)), x))),
    Case(
        name="addmm",
        apply=lambda x, m: torch.addmm(m.c, x.view(10, 12), m.w).view(2, 5, 9),
        weights={"w": (12, 9), "c": (9,)},
        exact=(9, 12),
        reads=9,
    ),
    Case(
        name="baddbmm",
        apply=lambda x, m: torch.baddbmm(m.c, x, m.w),
        weights={"w": (2, 12, 9), "c": (2, 1, 9)},
        exact=(9, 12),
        reads=9,
    ),
    Case(
        name="einsum",
        apply=lambda x, m: torch.einsum("bpu,uo->bpo", x, m.w),
        weights={"w": (12, 9)},
        exact=(9, 12),
        reads=9,
    ),
    Case(name="conv1d", apply=depthwise, weights={"w": (12, 1, 3), "c": (12,)}),
    Case(name="conv1d", apply=plain_convolution, weights={"w": (9, 12, 3), "c": (9,)}, exact=(9, 12), reads=9),
    Case(name="conv1d", apply=grouped, weights={"w": (6, 4, 3)}, exact=(2, 3, 4), reads=6),
    Case(name="conv1d", apply=doubled_depthwise, weights={"w": (24, 1, 1)}, exact=(2, 12), reads=24),
    *(
        Case(
            name=f"conv_transpose{count}d",
            apply=channelwise(
                lambda x, m, count=count: getattr(aten, f"conv_transpose{count}d")(
                    x, m.w[(...,) + (None,) * count], m.c
                ),
                count,
            ),
            weights={"w": (12, 9), "c": (9,)},
            exact=(9, 12),
            reads=9,
        )
        for count in (1, 2, 3)
    ),
    Case(
        name="conv_transpose1d",
        apply=channelwise(lambda x, m: F.conv_transpose1d(x, m.w[..., None])),
        weights={"w": (12, 9)},
        exact=(9, 12),
        reads=9,
    ),
    # Norms of channels, pools, resampling.
    Case(
        name="batch_norm",
        apply=channelwise(lambda x, m: F.batch_norm(x, m.mean.detach(), m.var.detach().abs(), m.w, m.c)),
        weights={**NORM_PARAMETERS, "mean": (12,), "var": (12,)},
    ),
    Case(
        name="batch_norm",
        apply=channelwise(lambda x, m: F.batch_norm(x, m.mean.detach(), m.var.detach().abs())),
        weights={"mean": (12,), "var": (12,)},
    ),
    Case(
        name="instance_norm",
        apply=channelwise(lambda x, m: F.instance_norm(x, weight=m.w, bias=m.c)),
        weights=NORM_PARAMETERS,
    ),
    Case(
        name="group_norm",
        apply=channelwise(lambda x, m: F.group_norm(x, 3, m.w, m.c)),
        weights=NORM_PARAMETERS,
        exact=(3,),
        coupled=(4,),
    ),
    Case(name="group_norm", apply=channelwise(lambda x, _: F.group_norm(x, 3)), exact=(3,), coupled=(4,)),
    *(resampled(f"max_pool{count}d", lambda places: [2, *[1] * (places - 1)]) for count in (1, 2, 3)),
    *(resampled(f"avg_pool{count}d", lambda places: [2, *[1] * (places - 1)]) for count in (1, 2, 3)),
    *(
        resampled(f"adaptive_{kind}_pool{count}d", lambda places: [2, *[1] * (places - 1)])
        for kind in ("avg", "max")
        for count in (1, 2, 3)
    ),
    *(resampled(f"upsample_nearest{count}d", None, lambda places: [2.0] * places) for count in (1, 2, 3)),
    resampled("upsample_linear1d", [7], False, None),
    resampled("upsample_bilinear2d", [7, 2], False, None),
    resampled("upsample_bicubic2d", [7, 2], False, None),
    Case(name="prelu", apply=channelwise(lambda x, m: F.prelu(x, m.w)), weights={"w": (12,)}),
    Case(name="prelu", apply=channelwise(lambda x, m: F.prelu(x, m.w)), weights={"w": (1,)}),
    Case(name="glu", apply=unary(lambda x: F.glu(x, -1)), exact=(6,), reads=6),
    Case(name="feature_dropout", apply=unary(lambda x: aten.feature_dropout(x, 0.5, False))),
    Case(
        name="conv2d",
        apply=lambda x, m: F.conv2d(x.transpose(1, 2)[..., None], m.w)[..., 0].transpose(1, 2),
        weights={"w": (9, 12, 1, 1)},
        exact=(9, 12),
        reads=9,
    ),
    Case(
        name="conv3d",
        apply=lambda x, m: F.conv3d(x.transpose(1, 2)[..., None, None], m.w)[..., 0, 0].transpose(1, 2),
        weights={"w": (9, 12, 1, 1, 1)},
        exact=(9, 12),
        reads=9,
    ),
    Case(name="scaled_dot_product_attention", apply=attended, exact=(3, 4)),
    # One KV head for both query heads: of the rows of `a`, the first four are keys, the rest queries.
    Case(name="scaled_dot_product_attention", apply=grouped_attention, weights={"w": (4, 4)}, exact=(2, 4, 4), reads=8),
    # Operations that see all units together.
    *(
        Case(
            name=name, apply=unary(lambda x, name=name: x * getattr(aten, name)(x, [-1], True)), exact=(), coupled=(12,)
        )
        for name in ("mean", "amax", "amin", "logsumexp")
    ),
    *(
        Case(
            name=name,
            apply=unary(lambda x, name=name: x * getattr(aten, name)(x, -1, True)[0]),
            exact=(),
            coupled=(12,),
        )
        for name in ("max", "min")
    ),
    *(
        Case(
            name=name,
            apply=unary(lambda x, name=name: x * getattr(aten, name)(x > 0, -1, True)),
            exact=(),
            coupled=(12,),
        )
        for name in ("any", "all")
    ),
    Case(name="var", apply=unary(lambda x: x * x.var(-1, keepdim=True)), exact=(), coupled=(12,)),
    Case(name="std", apply=unary(lambda x: x * x.std(-1, keepdim=True)), exact=(), coupled=(12,)),
    *(
        Case(name=name, **weighed(lambda x, w, name=name: summed(x, getattr(torch, name)(x, w))))
        for name in ("max", "min")
    ),
    Case(name="prod", apply=unary(lambda x: x * x.prod(-1, keepdim=True)), exact=(), coupled=(12,)),
    Case(
        name="linalg_vector_norm",
        apply=unary(lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
        exact=(),
        coupled=(12,),
    ),
    Case(name="norm", apply=unary(lambda x: x * aten.norm(x, 2, [-1], True)), exact=(), coupled=(12,)),
    Case(name="sum", apply=unary(lambda x: x * x.sum(-1, keepdim=True))),
    Case(name="sum", apply=unary(lambda x: x * x.exp().sum(-1, keepdim=True)), exact=(), coupled=(12,)),
    Case(name="softmax", apply=unary(lambda x: x.softmax(-1)), exact=(), coupled=(12,)),
    Case(name="_softmax", apply=unary(lambda x: aten._softmax(x, -1, False)), exact=(), coupled=(12,)),
    Case(name="log_softmax", apply=unary(lambda x: x.log_softmax(1))),
    Case(name="cumsum", apply=unary(lambda x: x.cumsum(1))),
    Case(name="cumsum", apply=unary(lambda x: x.cumsum(-1)), exact=(), coupled=(12,)),
    Case(
        name="layer_norm",
        apply=lambda x, m: F.layer_norm(x, (12,), m.w, m.c),
        weights={"w": (12,), "c": (12,)},
        exact=(),
        coupled=(12,),
    ),
    Case(name="rms_norm", apply=lambda x, m: F.rms_norm(x, (12,), m.w), weights={"w": (12,)}, exact=(), coupled=(12,)),
    Case(name="topk", apply=unary(lambda x: x.topk(3, -1).values), exact=(), coupled=(12,), reads=3),
    Case(name="sort", apply=unary(lambda x: x.sort(-1).values), exact=()),
    Case(name="index", apply=chosen_experts, weights={"router": (7, 12), "bank": (7, 12)}, coupled=(7,)),
    Case(name="index", apply=unary(lambda x: x[..., [4, 5, 6]]), exact=(3, 4, 5), reads=3),
    Case(name="index", apply=unary(lambda x: x[..., [4, 6, 5]]), exact=(3,), reads=3),
    Case(name="index_select", apply=unary(lambda x: x.index_select(1, torch.tensor([0, 2, 2, 1, 3])))),
    Case(
        name="embedding", apply=lambda x, m: x * F.embedding(torch.tensor([0, 2, 2, 1, 3]), m.w), weights={"w": (6, 12)}
    ),
    Case(name="gather", apply=unary(lambda x: x.gather(1, torch.zeros(2, 5, 12, dtype=torch.long)))),
    Case(name="scatter", apply=unary(lambda x: x.scatter(1, torch.zeros(2, 5, 12, dtype=torch.long), x))),
    Case(
        name="one_hot",
        apply=unary(lambda x: x * (aten.one_hot(x.topk(1, -1).indices[..., 0], 12) + 1).to(x.dtype)),
        exact=(),
        coupled=(12,),
    ),
)


def traced_case(case: Case) -> tuple[Around, Traced, Example]:
    torch.manual_seed(0)
    module = Around(case).double().eval()
    example = Example(args=(torch.randn(BATCH, POSITIONS, WIDTH, dtype=torch.float64),), kwargs={})
    return module, trace(module, example.args), example


def without(family: Family) -> list[int]:
    """Every third unit goes, the first one among them."""
    return [unit for unit in range(family.num_units) if unit % 3]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_units_that_may_go_are_as_good_as_zeros(case: Case) -> None:
    module, traced, example = traced_case(case)
    state = state_of(traced.program)
    assert any(is_entry(node, case.name) for node in traced.program.graph.nodes), "the case does not have its operation"
    assert not traced.unknown
    torch.testing.assert_close(replay(traced, state, example)[0], module(*example.args), rtol=0, atol=0, equal_nan=True)
    exact = [family for family in traced.families if family.is_exact]
    assert sorted(family.num_units for family in exact) == sorted(case.exact)
    assert sorted(family.num_units for family in traced.families if not family.is_exact) == sorted(case.coupled)
    for family in exact:
        assert check_removal(traced, state, example, {family: without(family)}).difference < 1e-12
    if exact:
        every = {family: without(family) for family in exact}
        assert check_removal(traced, state, example, every).difference < 1e-12


def is_entry(node: Any, name: str) -> bool:
    return node.op == "call_function" and operation(operation_name(node)) is operation(name)


def test_every_operation_of_the_table_has_a_case() -> None:
    assert set(OPERATIONS) == {case.name for case in CASES}
