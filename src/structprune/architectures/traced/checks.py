"""What has to hold before a model is taken for what running and tracing it said: small runs with random weights.

The blocks have the true hidden size and few units, the vocabulary has few tokens. What is compared is the code that a
run uses, `StockModel`, with the stock model as a whole.

Shape suffixes: B sequences, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
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
from structprune.types import UNIT_KINDS, HeadUnits, ModelLayout, Stage, UnitGroup, UnitKind


class Inputs(Protocol):
    """What the stock model passes to each block beside the hidden states."""

    @property
    def kwargs(self) -> tuple[dict[str, Any], ...]: ...


class Pieces(Protocol):
    """The parts of `StockModel` that are compared with the stock model as a whole."""

    config: PretrainedConfig
    family: Family
    groups: tuple[UnitGroup, ...]
    stages: tuple[Stage, ...]
    removed: RemovedSublayers
    head_units: HeadUnits
    skeleton: nn.Module
    layout: ModelLayout

    def embedding_tensors(self) -> list[str]: ...
    def head_tensors(self) -> list[str]: ...
    def embed(self, ids_BS: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Inputs]: ...
    def head(self, tensors: Mapping[str, Tensor]) -> nn.Module: ...
    def stage(self, block: nn.Module, stage: Stage) -> AbstractContextManager[None]: ...
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
        small.check_stages()
        for group in small.groups:
            if group.config_fields and group.num_units > 1:
                small.check_removal(group)
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
        self._block_of = SmallBlock(self._around, stock.groups)
        self._config, self._tensors = self._block_of.config, self._block_of.tensors
        self.groups = stock.family.groups(self._config, stock.head_units)
        self._hidden_BSD, self._inputs = self._embed(0)

    def _embed(self, number: int) -> tuple[Tensor, Inputs]:
        names = self._stock.embedding_tensors()
        return self._stock.embed(token_ids(number), {name: self._outer[name] for name in names})

    def _run(self, block: nn.Module, hidden_BSD: Tensor, index: int = 0) -> Tensor:
        with torch.no_grad():
            output = block(hidden_BSD, **self._inputs.kwargs[index])
        return output[0] if isinstance(output, tuple) else output

    def _block(
        self, tensors: Mapping[str, Tensor], config: PretrainedConfig | None = None, index: int = 0
    ) -> nn.Module:
        return self._stock.block(index, tensors, self._config if config is None else config)

    def check_logits(self) -> None:
        """Compare the logits piece by piece with those of the stock model, a few of whose blocks are there.

        Raises UnsupportedError where they differ, where blocks read more than the tokens' positions, and where tokens
        see later ones.
        """
        if not _same(self._inputs.kwargs, self._embed(1)[1].kwargs):
            raise _differs(
                self._stock, "hands its blocks more of the tokens than their hidden states", "other arguments"
            )
        there = _some_blocks(self._around.config)
        expected_BSV = self._around.logits({i: self._block_of.build(i, self._tensors) for i in there}, token_ids(0))
        hidden_BSD = self._hidden_BSD
        for index in there:
            hidden_BSD = self._run(self._block(self._tensors, index=index), hidden_BSD, index)
        head = self._stock.head({name: self._outer[name] for name in self._stock.head_tensors()})
        with torch.no_grad():
            self._compare("computes other logits than its embedding, blocks and head", head(hidden_BSD), expected_BSV)
        other_BS = token_ids(0)
        other_BS[:, -1] = (other_BS[:, -1] + 1) % 100 + 3
        later_BSV = self._around.logits({i: self._block_of.build(i, self._tensors) for i in there}, other_BS)
        self._compare("lets tokens see later ones", later_BSV[:, :-1], expected_BSV[:, :-1])

    def check_stages(self) -> None:
        """Compare the stages one after the other with the block, and a removed sublayer with zeros. Raises as above."""
        block = self._block(self._tensors)
        expected_BSD = self._run(block, self._hidden_BSD)
        hidden_BSD = self._hidden_BSD
        for stage in self._stock.stages:
            with self._stock.stage(block, stage):
                hidden_BSD = self._run(block, hidden_BSD)
        self._compare("is not one sublayer after the other", hidden_BSD, expected_BSD)
        for kind in UNIT_KINDS:
            group = next(group for group in self.groups if group.kind == kind)
            without = self._stock.block(0, self._kept_tensors(group), self._config, removed=(kind,))
            self._compare(
                f"is not the same without its {kind} as with zeros there",
                self._run(without, self._hidden_BSD),
                self._run(self._block(self._block_of.zeroed(group)), self._hidden_BSD),
            )

    def _kept_tensors(self, group: UnitGroup) -> dict[str, Tensor]:
        gone = (group.module_prefix, *(f"{module}." for module in group.norm_modules))
        return {name: tensor for name, tensor in self._tensors.items() if not name.startswith(gone)}

    def check_removal(self, group: UnitGroup) -> None:
        """Compare the block without half the units with the block that has zeros for them. Raises as above."""
        keep_units = torch.arange(1, group.num_units, 2)
        gone = torch.arange(0, group.num_units, 2)
        part = group.consumer
        masked = {
            **self._tensors,
            part.tensor: self._tensors[part.tensor].index_fill(part.axis, part.indices(gone), 0),
        }
        config = with_units(self._config, (group,), {group.kind: len(keep_units)})
        smaller = self._block(compact(self._tensors, group, keep_units), config)
        self._compare(
            f"does not compute without {group.kind} units what it computes with zeros for them",
            self._run(smaller, self._hidden_BSD),
            self._run(self._block(masked), self._hidden_BSD),
        )

    def _compare(self, what: str, found: Tensor, expected: Tensor) -> None:
        difference = relative_difference(found, expected)
        # Not `difference > tolerance`: what is not a number is no equality.
        if not difference <= TOLERANCE:
            raise _differs(self._stock, what, f"a difference of {difference:.1e} of the largest value")


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
