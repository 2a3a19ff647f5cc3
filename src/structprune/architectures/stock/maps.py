"""The linear maps of one block that can have zeros: in the order of the forward pass, those with one input together.

Which maps read one tensor is seen on `meta`, where the stock block runs without numbers. Experts get tokens by what a
router computes, which has no numbers there: the first maps of an expert read one tensor by construction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from structprune.architectures.family import Experts
from structprune.architectures.stock.model import StockModel, block_arguments
from structprune.types import UNIT_KINDS, BlockLayout, Stage, UnitKind

_PROBE_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroup:
    """Maps of a block that read one tensor."""

    maps: tuple[str, ...]
    """Names of the modules in the block, in the order in which they run."""
    expert: int | None = None
    """Whose maps they are, where a token does not pass all of the block's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapStep:
    """Groups that are measured in one pass: one of them, or those of all experts."""

    stage: Stage
    kind: UnitKind
    groups: tuple[InputGroup, ...]


def map_steps(stock: StockModel, kinds: Collection[UnitKind]) -> tuple[tuple[MapStep, ...], ...]:
    """Find the steps of every block in which the maps of the sublayers `kinds` are pruned, later ones behind earlier.

    Routers and maps with a single output, which are gates, stay as they are.
    """
    arguments = block_arguments(stock, _PROBE_TOKENS, torch.float32, torch.device("cpu"))
    found: dict[tuple[object, ...], tuple[MapStep, ...]] = {}
    steps: list[tuple[MapStep, ...]] = []
    for block in stock.layout.blocks:
        sort = (*sorted(block.shapes.items()), stock.stages_of(block.index))
        if sort not in found:
            found[sort] = _steps(stock, block, kinds, arguments[block.index])
        steps.append(found[sort])
    return tuple(steps)


def _steps(
    stock: StockModel, block: BlockLayout, kinds: Collection[UnitKind], arguments: dict[str, Any]
) -> tuple[MapStep, ...]:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in block.shapes.items()}
    module = stock.block(block.index, tensors).to("meta")
    kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments)
    experts = stock.family.at(block.index).experts
    steps: list[MapStep] = []
    for stage in stock.stages_of(block.index):
        wanted: list[UnitKind] = [kind for kind in UNIT_KINDS if kind in stage and kind in kinds and block.has(kind)]
        own = {kind: _maps(module, block, kind, () if experts is None else experts.routers) for kind in wanted}
        mixed: list[UnitKind] = [kind for kind in wanted if experts is not None and _in(own[kind], experts.module)]
        plain: dict[str, UnitKind] = {}
        for kind in wanted:
            plain |= {} if kind in mixed else dict.fromkeys(own[kind], kind)
        if plain and not mixed:
            hidden_BSD = torch.empty(1, _PROBE_TOKENS, stock.layout.hidden_size, device="meta")
            with stock.stage(module, block.index, stage):
                together = _observed(module, list(plain), partial(module, hidden_BSD, **kwargs))
        else:
            together = [(name,) for name in plain]
        steps += [MapStep(stage=stage, kind=plain[g[0]], groups=(InputGroup(maps=g),)) for g in together]
        for kind in mixed:
            assert experts is not None
            parts = _by_expert(own[kind], experts)
            steps += [MapStep(stage=stage, kind=kind, groups=groups) for groups in parts if groups]
    return tuple(steps)


def _maps(module: nn.Module, block: BlockLayout, kind: UnitKind, routers: Sequence[str]) -> list[str]:
    """List the linear maps of a sublayer that can have zeros."""
    prefixes = tuple(group.module_prefix for group in block.groups_of(kind))
    return [
        name
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear | Conv1D)
        and name.startswith(prefixes)
        and f"{name}.weight" not in routers
        and min(block.shapes[f"{name}.weight"]) > 1
    ]


def _in(names: Sequence[str], module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in names)


def _observed(module: nn.Module, names: Sequence[str], run: partial[Any]) -> list[tuple[str, ...]]:
    """Run the module, and put together the maps that were called with the same tensor, in the order of their calls."""
    inputs: list[Tensor] = []
    together: list[list[str]] = []

    def called(_: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        place = next((place for place, tensor in enumerate(inputs) if tensor is args[0]), len(inputs))
        if place == len(inputs):
            # Kept, so that no later tensor has the same identity.
            inputs.append(args[0])
            together.append([])
        together[place].append(name)

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(partial(called, name=name))  # pyright: ignore[reportArgumentType]
        for name in names
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(group) for group in together]


def _by_expert(names: Sequence[str], experts: Experts) -> tuple[tuple[InputGroup, ...], tuple[InputGroup, ...]]:
    """Split a mixture's maps into what experts compute first, and their last maps; others are by themselves."""
    first: dict[int, list[str]] = {}
    last: list[InputGroup] = []
    alone: list[InputGroup] = []
    for name in names:
        if not name.startswith(f"{experts.module}."):
            alone.append(InputGroup(maps=(name,)))
            continue
        number, _, rest = name.removeprefix(f"{experts.module}.").partition(".")
        if rest == experts.writer:
            last.append(InputGroup(maps=(name,), expert=int(number)))
        else:
            first.setdefault(int(number), []).append(name)
    groups = tuple(InputGroup(maps=tuple(maps), expert=number) for number, maps in first.items())
    return (*groups, *alone), tuple(last)
