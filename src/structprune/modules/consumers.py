"""Maps that read units, by what they are in the graph: linear maps, and convolutions as linear maps of patches.

Shape suffixes: O outputs, I inputs of the map (input channels times places of a kernel, and one for the bias).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from structprune.modules.layout import ModuleLayout, Use
from structprune.tracing.terms import Term
from structprune.tracing.values import arguments_of

_PATCH_NUMBERS = 1 << 22
"""Numbers of patches that are made at a time: 16 MiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How an operation is a linear map of rows of inputs."""

    weight: str
    """Argument that is the weight."""
    axis: int
    """Axis of the weight along which its inputs lie."""
    matrix: Callable[[Tensor], Tensor]
    """Weight -> (O, I)."""
    weight_of: Callable[[Tensor, Tensor], Tensor]
    """(O, I) and the old weight -> weight."""
    rows: Callable[[Mapping[str, Any]], Iterable[Tensor]]
    """Arguments -> inputs (tokens, I), a few samples at a time."""
    outputs: Callable[[Tensor], Tensor]
    """Result -> (tokens, O), in the order of the rows."""
    inputs: str
    """Argument that the weight is multiplied with."""


def _linear_rows(arguments: Mapping[str, Any]) -> Iterable[Tensor]:
    value = arguments["input"]
    yield value.reshape(-1, value.shape[-1])


def _addmm_rows(arguments: Mapping[str, Any]) -> Iterable[Tensor]:
    yield arguments["mat1"]


def _patches(arguments: Mapping[str, Any]) -> Iterable[Tensor]:
    """Yield the patches that each output of a convolution reads, (places, channels times places of the kernel)."""
    value, kernel = arguments["input"], arguments["weight"].shape[2:]
    spatial = len(kernel)
    stride, padding, dilation = (_pair(arguments[name], spatial) for name in ("stride", "padding", "dilation"))
    if spatial == 1:
        value, kernel = value[..., None, :], (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    each = max(value[0].numel() * kernel[0] * kernel[1] // (stride[0] * stride[1]), 1)
    for part in value.split(max(_PATCH_NUMBERS // each, 1)):
        found = F.unfold(part, tuple(kernel), dilation=dilation, padding=padding, stride=stride)
        yield found.transpose(1, 2).flatten(0, 1)


def _pair(given: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(given) * count if len(given) == 1 else tuple(given)


_LINEAR = Form(
    weight="weight",
    axis=1,
    matrix=lambda weight: weight,
    weight_of=lambda matrix_OI, _: matrix_OI,
    rows=_linear_rows,
    outputs=lambda result: result.reshape(-1, result.shape[-1]),
    inputs="input",
)
_ADDMM = Form(
    weight="mat2",
    axis=0,
    matrix=lambda weight: weight.T,
    weight_of=lambda matrix_OI, _: matrix_OI.T.contiguous(),
    rows=_addmm_rows,
    outputs=lambda result: result,
    inputs="mat1",
)
_CONVOLUTION = Form(
    weight="weight",
    axis=1,
    matrix=lambda weight: weight.flatten(1),
    weight_of=lambda matrix_OI, old: matrix_OI.reshape(old.shape),
    rows=_patches,
    outputs=lambda result: result.transpose(0, 1).flatten(1).T,
    inputs="input",
)
FORMS: Mapping[str, Form] = {"linear": _LINEAR, "addmm": _ADDMM, "conv1d": _CONVOLUTION, "conv2d": _CONVOLUTION}
"""Operations whose weights are solved again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """One weight that reads units, and is read nowhere else."""

    weight: str
    bias: str | None
    form: Form
    node: Node
    term: Term
    """Axis of its inputs."""
    outputs: Term
    """Axis of its outputs."""


def consumers(layout: ModuleLayout) -> list[Consumer]:
    """List the maps whose weights can be solved, in the order of the graph."""
    found: list[Consumer] = []
    order = {node: number for number, node in enumerate(layout.traced.program.graph.nodes)}
    for name, uses in layout.uses.items():
        form = FORMS.get(uses[0].operation)
        if name not in layout.parameters or form is None or len(uses) != 1 or uses[0].argument != form.weight:
            continue
        arguments = arguments_of(uses[0].node)
        if arguments.get("groups", 1) != 1 or isinstance(arguments.get("padding"), str):
            continue
        dims = layout.traced.parameters[name]
        found.append(
            Consumer(
                weight=name,
                bias=_bias(layout, uses[0]),
                form=form,
                node=uses[0].node,
                term=dims[form.axis],
                outputs=dims[1 - form.axis],
            )
        )
    return sorted(found, key=lambda consumer: order[consumer.node])


def _bias(layout: ModuleLayout, use: Use) -> str | None:
    """Name the bias of an operation that no other one reads."""
    for name, uses in layout.uses.items():
        if len(uses) == 1 and uses[0].node is use.node and uses[0].is_bias:
            return name
    return None


def whole_weight(consumer: Consumer, state: Mapping[str, Tensor]) -> Tensor:
    """Return the weight as a matrix (O, I), with the bias as its last column where there is one."""
    whole_OI = consumer.form.matrix(state[consumer.weight])
    return whole_OI if consumer.bias is None else torch.cat([whole_OI, state[consumer.bias][:, None]], 1)
