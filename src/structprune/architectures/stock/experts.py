"""Experts of a mixture one by one, where stock code holds the weights of all of them in a few tensors.

transformers 5 multiplies stacked weights; most checkpoints have one tensor for each map of each expert. Blocks here
have modules with these names, so that an expert can lose its own units. The router's weight comes before an expert's
last map, whose output is what is added then.

Shape suffixes: T tokens, D hidden size, E experts, K experts that a token is sent to, R tokens of one expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.family import Experts

_FIRST, _LAST = ("gate_up_proj", "up_proj"), "down_proj"
"""Stock names of the stacked tensors of what experts compute first, and of their last maps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedExperts:
    """A stock module that holds all experts, and how its tensors are laid out."""

    module: str
    """Name of the module in the block."""
    first: str
    """Tensor of the maps that read the hidden states."""
    transposed: bool
    """Whether rows of its weights belong to inputs."""
    biased: bool
    concatenated: bool
    """Whether gates come first and ups behind them, and not in turns."""
    routed: bool
    """Whether it is told where tokens go, and does not get them sorted by experts."""


def find_stacked(block: nn.Module) -> StackedExperts | None:
    """Find the stock module that holds the experts of a block; None where there is none whose layout is known."""
    for name, module in block.named_modules():
        stock: Any = module
        first = next((each for each in _FIRST if _is_stacked(getattr(stock, each, None))), None)
        if first is None or not _is_stacked(getattr(stock, _LAST, None)):
            continue
        if getattr(stock, "has_post_expert_norm", False):
            return None
        biased = hasattr(stock, f"{_LAST}_bias")
        known = {first, _LAST} | ({f"{first}_bias", f"{_LAST}_bias"} if biased else set())
        if {each for each, _ in stock.named_parameters()} != known:
            return None
        hidden = stock.down_proj.shape[1:]
        return StackedExperts(
            module=name,
            first=first,
            # A module without the switches of transformers' interface of experts has its shapes only.
            transposed=getattr(stock, "is_transposed", getattr(stock, first).shape[1] == hidden[1]),
            biased=biased,
            concatenated=getattr(stock, "is_concatenated", True),
            routed=len(inspect.signature(type(stock).forward).parameters) > 2,
        )
    return None


def _is_stacked(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.ndim == 3


def stacked_maps(layout: StackedExperts, first: Sequence[str], last: str) -> dict[str, tuple[str, ...]]:
    """Return stacked tensor -> tensors of one expert that lie there in turn, `first` and `last` its maps."""
    found = {layout.first: tuple(f"{each}.weight" for each in first), _LAST: (f"{last}.weight",)}
    if layout.biased:
        found |= {f"{layout.first}_bias": tuple(f"{each}.bias" for each in first), f"{_LAST}_bias": (f"{last}_bias",)}
    return found


class _Expert(nn.Module):
    """One expert, with its maps under the checkpoint's names."""

    def __init__(self, stock: Any, maps: Mapping[str, tuple[int, int]], biased: bool) -> None:
        super().__init__()
        for name, (inputs, outputs) in maps.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=biased and name != list(maps)[-1]))
        *self._first, self._last = maps
        if biased:
            self.register_parameter(f"{self._last}_bias", nn.Parameter(torch.empty(maps[self._last][1])))
        self._biased = biased
        # Its way of gating has no tensors, and is no part of the expert.
        object.__setattr__(self, "_stock", stock)

    def forward(self, x_RD: Tensor, weights_R1: Tensor | None) -> Tensor:
        """Compute what the expert adds for tokens, each times its weight."""
        stock: Any = self._stock
        wide = [self.get_submodule(name)(x_RD) for name in self._first]
        joined = wide[0] if len(wide) == 1 else torch.cat(wide, dim=-1)
        if hasattr(stock, "_apply_gate") and getattr(stock, "has_gate", True):
            inner = stock._apply_gate(joined)
        elif getattr(stock, "has_gate", True):
            gate, up = joined.chunk(2, dim=-1)
            inner = stock.act_fn(gate) * up
        else:
            inner = stock.act_fn(joined)
        inner = inner if weights_R1 is None else inner * weights_R1
        added_RD = self.get_submodule(self._last)(inner)
        if self._biased:
            bias_D = self.get_parameter(f"{self._last}_bias")
            added_RD = added_RD + (bias_D if weights_R1 is None else weights_R1 * bias_D)
        return added_RD


class SplitExperts(nn.Module):
    """The experts as modules with their numbers for names, in the place of a stock module.

    With `traced` there is the first one only, and it gets all tokens: a graph that does not depend on the data.
    """

    def __init__(self, stock: Any, experts: Experts, layout: StackedExperts, *, traced: bool = False) -> None:
        super().__init__()
        weight, down = getattr(stock, layout.first), getattr(stock, _LAST)
        rows, columns = weight.shape[2:0:-1] if layout.transposed else weight.shape[1:]
        last = down.shape[2:0:-1] if layout.transposed else down.shape[1:]
        first = [name.removesuffix(".weight") for name in experts.stacked[layout.first]]
        maps = {name: (columns, rows // len(first)) for name in first}
        maps[experts.writer] = (last[1], last[0])
        self.num_experts = len(weight)
        for number in range(1 if traced else self.num_experts):
            self.add_module(str(number), _Expert(stock, maps, layout.biased))
        for name in experts.stacked:
            delattr(stock, name)
        self._traced, self._routed = traced, layout.routed

    def forward(self, hidden_TD: Tensor, experts_TK: Tensor | None = None, weights_TK: Tensor | None = None) -> Tensor:
        """Compute the weighted sum of the outputs of every token's K experts, (T, D).

        Of tokens that come sorted, (E T, D) with zeros where a token is not sent, all outputs are returned.
        """
        if not self._routed:
            return self._sorted(hidden_TD)
        assert experts_TK is not None
        assert weights_TK is not None
        if self._traced:
            sent_T1 = (weights_TK * (experts_TK == 0)).sum(dim=-1, keepdim=True)
            return self.get_submodule("0")(hidden_TD, sent_T1)
        total_TD = hidden_TD.new_zeros(hidden_TD.shape)
        for number in range(self.num_experts):
            rows, places = (experts_TK == number).nonzero(as_tuple=True)
            if len(rows):
                added_RD = self.get_submodule(str(number))(hidden_TD[rows], weights_TK[rows, places, None])
                # No token is sent to an expert twice.
                total_TD[rows] = total_TD[rows] + added_RD
        return total_TD

    def _sorted(self, hidden_TD: Tensor) -> Tensor:
        by_expert_ETD = hidden_TD.view(self.num_experts, -1, hidden_TD.shape[-1])
        if self._traced:
            return self.get_submodule("0")(by_expert_ETD, None).view(hidden_TD.shape)
        added_ETD = torch.zeros_like(by_expert_ETD)
        for number, x_TD in enumerate(by_expert_ETD):
            rows = x_TD.any(dim=-1).nonzero().flatten()
            if len(rows):
                added_ETD[number, rows] = self.get_submodule(str(number))(x_TD[rows], None)
        return added_ETD.view(hidden_TD.shape)


def split_experts(block: nn.Module, experts: Experts, *, traced: bool = False) -> None:
    """Put modules of single experts in the place of the stock module that holds all of a block, if it has one."""
    layout = find_stacked(block)
    if layout is not None:
        stock = block.get_submodule(layout.module)
        block.set_submodule(layout.module, SplitExperts(stock, experts, layout, traced=traced))
