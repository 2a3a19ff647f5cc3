"""Modules that stand where parts of a stock model would, for a while or for good.

Shape suffixes: B sequences, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from structprune.architectures.family import StandIn
from structprune.types import SublayerKind


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Ends the stock model's forward once the last block has been reached."""


class Recorder(nn.Module):
    """Stands where a block would: keeps the arguments by name and passes the hidden states on, in the block's form."""

    def __init__(self, names: Sequence[str], is_last: bool, returns_tuple: bool = False) -> None:
        super().__init__()
        self.names = names
        self.is_last = is_last
        self.returns_tuple = returns_tuple

    def forward(self, hidden_BSD: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden_BSD = hidden_BSD
        self.kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        if self.is_last:
            raise StopForward
        return (hidden_BSD,) if self.returns_tuple else hidden_BSD


class _NoAttention(nn.Module):
    """Stand-in for the attention, for a while or where it is removed: adds nothing."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


class _NoMlp(nn.Module):
    """Stand-in for each module of the MLP: the last one adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class _NoMixer(nn.Module):
    """Stand-in for what mixes positions otherwise than attention does: adds nothing."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.new_zeros(())


class _ZeroMlp(nn.Module):
    """Stand-in for an MLP to whose output others are added in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape)


class _ZeroPair(nn.Module):
    """Stand-in for an MLP that gives more than its output, to which others are added in place."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.new_zeros(x.shape), None


class _StreamAttention(nn.Module):
    """Stand-in for attention that is given the stream and adds to it itself."""

    def forward(self, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return residual, None


class _StreamMlp(nn.Module):
    """Stand-in for an MLP that is given the stream and adds to it itself."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual


STAND_INS: Mapping[SublayerKind, Mapping[StandIn, type[nn.Module]]] = {
    "attention": {"nothing": _NoAttention, "stream": _StreamAttention},
    "mlp": {
        "nothing": _NoMlp,
        "zeros": _ZeroMlp,
        "stream": _StreamMlp,
        "pair": _NoAttention,
        "zeros-pair": _ZeroPair,
    },
    "mixer": {"nothing": _NoMixer, "pair": _NoAttention},
}


@contextmanager
def parameters_on_meta() -> Generator[None]:
    """Create parameters without storage, inside the context; buffers have it: they are computed and not read."""
    original: Any = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is on meta already may be tied, so it stays the same object.
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def give_buffers(layer: nn.Module, given: Mapping[str, Tensor], device: torch.device) -> None:
    """Give `layer` what a whole stock model computes for its blocks, and no checkpoint has."""
    for name, tensor in given.items():
        module, _, attribute = name.rpartition(".")
        layer.get_submodule(module).register_buffer(attribute, tensor.to(device), persistent=False)


def compute_buffers(layer: nn.Module, index: int, config: PretrainedConfig, device: torch.device) -> None:
    """Give `layer` what stock code computes as it builds a layer, and no checkpoint has."""
    layer_class: Any = type(layer)
    with parameters_on_meta():
        built: nn.Module = layer_class(config, layer_idx=index)
    stored = layer.state_dict()
    for name, buffer in built.named_buffers():
        if name not in stored:
            module, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(module), attribute, buffer.to(device))
