"""What has to hold before a model is taken for what running and tracing it said: small runs with random weights.

The blocks have the true hidden size and few units, the vocabulary has few tokens. What is compared is the code that a
run uses, `StockModel`, with the stock model as a whole.

Shape suffixes: B sequences, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from structprune.architectures.family import Family
from structprune.architectures.modeling.removed import RemovedSublayers
from structprune.architectures.traced.small_block import TOLERANCE, SmallBlock, relative_difference, with_units
from structprune.architectures.traced.surroundings import look_around, token_ids
from structprune.architectures.units import compact
from structprune.errors import StructPruneError, UnsupportedError, first_line
from structprune.types import HeadUnits, ModelLayout, Stage, UnitGroup, UnitKind


class Inputs(Protocol):
    """What the stock model passes to each block beside the hidden states."""

    @property
    def kwargs(self) -> tuple[dict[str, Any], ...]: ...


class Pieces(Protocol):
    """The parts of `StockModel` that are compared with the stock model as a whole."""

    config: PretrainedConfig
    family: Family
    removed: RemovedSublayers
    head_units: HeadUnits
    skeleton: nn.Module
    layout: ModelLayout

    def embedding_tensors(self) -> list[str]: ...
    def head_tensors(self) -> list[str]: ...
    def embed(self, ids_BS: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Inputs]: ...
    def head(self, tensors: Mapping[str, Tensor]) -> nn.Module: ...
    def stages_of(self, index: int) -> tuple[Stage, ...]: ...
    def stage(self, block: nn.Module, index: int, stage: Stage) -> AbstractContextManager[None]: ...
    def block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        config: PretrainedConfig | None = None,
        removed: Collection[UnitKind] = (),
    ) -> nn.Module: ...


_CHECKED: dict[tuple[int, str, HeadUnits], Family] = {}
"""Families that have passed, by what they are and the config; they stay, so that none takes the place of another."""


def check_description(stock: Pieces) -> None:
    """Compare the pieces of a traced model with the whole, once in a process for each config.

    Raises UnsupportedError that names what differs.
    """
    key = id(stock.family), stock.config.to_json_string(use_diff=False), stock.head_units
    if key not in _CHECKED:
        _check(stock)
        _CHECKED[key] = stock.family


def _check(stock: Pieces) -> None:
    try:
        small = _Small(stock)
        small.check_logits()
        for index in small.firsts:
            small.check_stages(index)
            small.check_removal(index)
    except StructPruneError:
        raise
    except Exception as error:
        # Stock code that wants something else than it is given raises many types.
        raise _differs(stock, "does not run piece by piece", f"{type(error).__name__}: {first_line(error)}") from error


class _Small:
    """A copy of the model with few tokens, few units in its blocks, and random weights."""

    def __init__(self, stock: Pieces) -> None:
        self._around = look_around(stock.config)
        self._outer = self._around.outer_tensors()
        self._stock = copy.copy(stock)
        self._stock.config = self._around.config
        self._stock.skeleton = copy.deepcopy(self._around.model).to("meta")
        self._stock.removed = (frozenset[UnitKind](),) * len(self._around.blocks)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._outer.items()}
        self._stock.layout = replace(
            stock.layout,
            vocab_size=self._around.config.vocab_size,
            outer_tensors={name: shapes[name] for name in stock.layout.outer_tensors},
        )
        self.firsts = tuple(dict.fromkeys(self._around.kind_of))
        self._small = {index: self._small_block(stock, index) for index in self.firsts}
        self._hidden_BSD, self._inputs = self._embed(0)

    def _small_block(self, stock: Pieces, index: int) -> SmallBlock:
        groups = stock.family.at(index).groups(self._around.config, "kv-group")
        return SmallBlock(self._around, groups, index, stock.family.at(index).experts, stock.family.channel_maps)

    def _of(self, index: int) -> SmallBlock:
        return self._small[self._around.kind_of[index]]

    def _embed(self, number: int) -> tuple[Tensor, Inputs]:
        names = self._stock.embedding_tensors()
        return self._stock.embed(token_ids(number), {name: self._outer[name] for name in names})

    def _run(self, block: nn.Module, hidden_BSD: Tensor, index: int) -> Tensor:
        with torch.no_grad():
            output = block(hidden_BSD, **self._inputs.kwargs[index])
        return output[0] if isinstance(output, tuple) else output

    def _block(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        small = self._of(index)
        return self._stock.block(index, small.tensors if tensors is None else tensors, small.config)

    def check_logits(self) -> None:
        """Compare the logits piece by piece with those of the stock model, a few of whose blocks are there.

        Raises UnsupportedError where they differ, where blocks read more than the tokens' positions, and where tokens
        see later ones.
        """
        if not _same(self._inputs.kwargs, self._embed(1)[1].kwargs):
            raise _differs(
                self._stock, "hands its blocks more of the tokens than their hidden states", "other arguments"
            )
        there = sorted({*_some_blocks(self._around.config), *self.firsts})
        blocks = {index: self._of(index).build(index, self._of(index).tensors) for index in there}
        expected_BSV = self._around.logits(blocks, token_ids(0))
        hidden_BSD = self._hidden_BSD
        for index in there:
            hidden_BSD = self._run(self._block(index), hidden_BSD, index)
        head = self._stock.head({name: self._outer[name] for name in self._stock.head_tensors()})
        with torch.no_grad():
            self._compare("computes other logits than its embedding, blocks and head", head(hidden_BSD), expected_BSV)
        other_BS = token_ids(0)
        other_BS[:, -1] = (other_BS[:, -1] + 1) % 100 + 3
        later_BSV = self._around.logits(blocks, other_BS)
        self._compare("lets tokens see later ones", later_BSV[:, :-1], expected_BSV[:, :-1])

    def check_stages(self, index: int) -> None:
        """Compare the stages one after the other with the block, and a removed sublayer with zeros. Raises as above."""
        block, small = self._block(index), self._of(index)
        expected_BSD = self._run(block, self._hidden_BSD, index)
        hidden_BSD = self._hidden_BSD
        for stage in self._stock.stages_of(index):
            with self._stock.stage(block, index, stage):
                hidden_BSD = self._run(block, hidden_BSD, index)
        self._compare("is not one sublayer after the other", hidden_BSD, expected_BSD)
        groups = self._stock.family.at(index).groups(small.config, "kv-group")
        for kind in _kinds(groups):
            (group, *_) = own = [each for each in groups if each.kind == kind]
            gone = (group.module_prefix, *(f"{module}." for module in group.norm_modules))
            left = {name: tensor for name, tensor in small.tensors.items() if not name.startswith(gone)}
            zeros = [name for each in own for name in (each.consumer.tensor, each.consumer_bias) if name is not None]
            self._compare(
                f"is not the same without its {kind} as with zeros there",
                self._run(self._stock.block(index, left, small.config, removed=(kind,)), self._hidden_BSD, index),
                self._run(self._block(index, small.zeroed(zeros)), self._hidden_BSD, index),
            )

    def check_removal(self, index: int) -> None:
        """Compare the block without half the units of a kind with that of zeros for them. Raises as above."""
        small = self._of(index)
        groups = self._stock.family.at(index).groups(small.config, self._stock.head_units)
        for kind in _kinds(groups):
            own = [group for group in groups if group.kind == kind]
            count = own[0].num_units
            if not own[0].config_fields or count == 1:
                continue
            masked, cut = dict(small.tensors), dict(small.tensors)
            for group in own:
                part, gone = group.consumer, torch.arange(0, count, 2)
                masked[part.tensor] = masked[part.tensor].index_fill(part.axis, part.indices(gone), 0)
                cut = compact(cut, group, torch.arange(1, count, 2))
            config = with_units(small.config, own[:1], {kind: count // 2})
            self._compare(
                f"does not compute without {kind} units what it computes with zeros for them",
                self._run(self._stock.block(index, cut, config), self._hidden_BSD, index),
                self._run(self._block(index, masked), self._hidden_BSD, index),
            )

    def _compare(self, what: str, found: Tensor, expected: Tensor) -> None:
        difference = relative_difference(found, expected)
        # Not `difference > tolerance`: what is not a number is no equality.
        if not difference <= TOLERANCE:
            raise _differs(self._stock, what, f"a difference of {difference:.1e} of the largest value")


def _kinds(groups: Iterable[UnitGroup]) -> list[UnitKind]:
    return list(dict.fromkeys(group.kind for group in groups))


def _some_blocks(config: PretrainedConfig) -> list[int]:
    """Choose the first and the last block, and one of each kind of attention that the config names."""
    types = getattr(config, "layer_types", None) or []
    firsts = {kind: index for index, kind in reversed(list(enumerate(types)))}
    return sorted({0, config.num_hidden_layers - 1, *firsts.values()})


def _same(first: Any, second: Any) -> bool:
    """Whether two nests of arguments are equal."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))  # pyright: ignore[reportUnknownArgumentType]
    return type(first) is type(second)


def _differs(stock: Pieces, what: str, got: str) -> UnsupportedError:
    return UnsupportedError(
        f"{stock.family.name} has no family file, and the stock model {what}",
        where=type(stock.skeleton).__name__,
        got=got,
        do="see docs/add-an-architecture.md: a family is one file of data",
    )
