"""Every family file against the tracer: the groups that are written by hand are those that a block's graph has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from structprune.architectures import FAMILIES
from structprune.architectures.family import Family as HandWritten
from structprune.architectures.units import compact
from structprune.errors import UnsupportedError
from structprune.tracing.families import Family
from structprune.tracing.graph import Traced, state_of
from structprune.tracing.groups import StackedNames, expert_families, unit_groups
from structprune.tracing.replay import Example, check_removal, check_states, replay
from structprune.tracing.sublayers import find_stream, find_sublayers, stages
from structprune.types import HeadUnits, UnitGroup
from support.blocks import recorded_blocks
from support.models import TINY_MODELS

FROM_CONFIG: Mapping[str, Any] = {
    "config_fields": {},
    "fixed_fields": {},
    "activation": None,
    "bias_field": None,
    "bias_modules": (),
    "multiple_of": 1,
}
"""What a family file says of config entries and kernels, which no graph has."""

MORE_THAN_WRITTEN: Mapping[tuple[str, HeadUnits], str] = {
    ("gpt2", "value-channel"): "stock GPT-2 derives the size of values from the hidden size",
    ("gpt_neox", "value-channel"): "stock GPT-NeoX derives the size of values from the hidden size",
    ("opt", "value-channel"): "stock OPT derives the size of values from the hidden size",
    ("phi3", "value-channel"): "queries, keys and values are one map, of which no narrower layer is written",
}
"""Groups that the graph has and the family file refuses, with its reason: no stock layer has such widths."""


@functools.cache
def traced_block(kind: str) -> tuple[HandWritten, Any, Traced, Example]:
    torch.manual_seed(0)
    model = TINY_MODELS[kind]()
    block = recorded_blocks(model)[1]
    return FAMILIES.get(model.config.model_type), model.config, block.trace(), block.example


def stacked_names(family: HandWritten) -> StackedNames:
    """The names of a checkpoint's expert tensors, which are names and no structure."""
    experts = family.experts
    if experts is None:
        return {}
    return {
        f"{experts.module}.{stacked}": [f"{experts.module}.{{}}.{name}" for name in names]
        for stacked, names in experts.stacked.items()
    }


def comparable(group: UnitGroup) -> UnitGroup:
    """The group without what only its config says, its producers and norms in one order."""
    return replace(
        group,
        **FROM_CONFIG,
        producers=tuple(sorted(group.producers, key=lambda part: (part.tensor, part.axis, part.offset))),
        norm_modules=tuple(sorted(group.norm_modules)),
    )


@pytest.mark.parametrize("head_units", get_args(HeadUnits))
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_traced_groups_are_those_written_by_hand(kind: str, head_units: HeadUnits) -> None:
    """All fields: slices of every tensor, widths, partitions, biases, norms around, up map and gate, epsilon."""
    family, config, traced, _ = traced_block(kind)
    try:
        written = family.groups(config, head_units)
    except UnsupportedError:
        if (family.name, head_units) in MORE_THAN_WRITTEN:
            assert unit_groups(traced, head_units, stacked_names(family))[-1].kind == "attention"
            return
        with pytest.raises(UnsupportedError, match="this attention has no"):
            unit_groups(traced, head_units, stacked_names(family))
        return
    assert (family.name, head_units) not in MORE_THAN_WRITTEN
    found = unit_groups(traced, head_units, stacked_names(family))
    assert [comparable(group) for group in found] == [comparable(group) for group in written]


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_traced_stages_are_those_written_by_hand(kind: str) -> None:
    family, config, traced, _ = traced_block(kind)
    assert stages(find_sublayers(traced, find_stream(traced))) == family.stages(config)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_the_graph_is_the_module(kind: str) -> None:
    _, _, traced, example = traced_block(kind)
    output = traced.program.module()(*example.args, **example.kwargs)
    expected = output[0] if isinstance(output, tuple) else output
    actual = replay(traced, state_of(traced.program), example)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not traced.unknown


def kept_units(family: Family) -> list[int]:
    return [unit for unit in range(family.num_units) if unit % 4 != 1]


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_without_units_is_with_zeros(kind: str) -> None:
    """Every family that may go, by itself and all together; what was removed had been seen in the output."""
    _, _, traced, example = traced_block(kind)
    state = state_of(traced.program)
    exact = [family for family in traced.families if family.is_exact]
    assert len(exact) >= 3
    for family in exact:
        removal = check_removal(traced, state, example, {family: kept_units(family)})
        assert removal.difference < 1e-12
        assert removal.effect > 1e-2
    together = check_removal(traced, state, example, {family: kept_units(family) for family in exact})
    assert together.difference < 1e-12


def masked(tensors: Mapping[str, Tensor], group: UnitGroup, keep_units: Tensor) -> dict[str, Tensor]:
    """Zeros where the consumer reads what goes, and nothing else: the producers stay as they are."""
    gone = torch.ones(group.num_units, dtype=torch.bool).index_fill(0, keep_units, False).nonzero().flatten()
    part = group.consumer
    return {**tensors, part.tensor: tensors[part.tensor].index_fill(part.axis, part.indices(gone), 0)}


@pytest.mark.parametrize("head_units", get_args(HeadUnits))
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_groups_compacted_are_masked(kind: str, head_units: HeadUnits) -> None:
    """As the pipelines cut a block: other channels of every KV head stay, the consumer alone is masked."""
    _, _, traced, example = traced_block(kind)
    try:
        groups = unit_groups(traced, head_units)
    except UnsupportedError as error:
        pytest.skip(error.what)
    state = state_of(traced.program)
    for group in groups:
        if group.expert is not None:
            continue  # experts of a stack have tensors of their own in a checkpoint only
        each = group.num_units // group.partitions
        generator = torch.Generator().manual_seed(1)
        order = torch.rand(group.partitions, each, generator=generator).argsort(dim=1)[:, : each // 2]
        keep_units = (order.sort(dim=1).values + torch.arange(group.partitions)[:, None] * each).flatten()
        atom = next(family.atom for family in traced.families if counts(family, group, each))
        removal = check_states(
            traced,
            example,
            {atom: range(each // 2)},
            cut=compact(state, group, keep_units),
            masked=masked(state, group, keep_units),
            whole=state,
        )
        assert removal.difference < 1e-12
        assert removal.effect > 1e-2


def counts(family: Family, group: UnitGroup, each: int) -> bool:
    """Whether the family's units are the group's, or those of one of its partitions."""
    if group.partitions == 1:
        return group.consumer in family.members
    return family.num_units == each and {part.tensor for part in family.members} == {p.tensor for p in group.slices}


def test_every_expert_may_keep_channels_of_its_own() -> None:
    """The weights of a mixture lie in stacks; each expert's rows and columns are chosen for it alone."""
    family, _, traced, example = traced_block("qwen3_moe")
    state = state_of(traced.program)
    groups = [group for group in unit_groups(traced, "kv-group", stacked_names(family)) if group.expert is not None]
    assert [group.expert for group in groups] == [0, 1, 2, 3]
    channels = next(each for each in traced.families if each.num_units == groups[0].num_units)
    keep = [torch.randperm(48, generator=torch.Generator().manual_seed(n))[:20].sort().values for n in range(4)]
    assert not torch.equal(keep[0], keep[1])
    stack, down = state["mlp.experts.gate_up_proj"], state["mlp.experts.down_proj"]
    zeroed = torch.zeros_like(down)
    for number, units in enumerate(keep):
        zeroed[number][:, units] = down[number][:, units]
    cut = {
        "mlp.experts.gate_up_proj": torch.stack([stack[n][torch.cat([k, k + 48])] for n, k in enumerate(keep)]),
        "mlp.experts.down_proj": torch.stack([down[n][:, k] for n, k in enumerate(keep)]),
    }
    removal = check_states(
        traced,
        example,
        {channels.atom: range(20)},
        cut={**state, **cut},
        masked={**state, "mlp.experts.down_proj": zeroed},
        whole=state,
    )
    assert removal.difference < 1e-12
    assert removal.effect > 1e-2


def test_the_experts_of_a_router_are_a_family_that_is_not_masked() -> None:
    """A router without an expert chooses others: the check says so, and names where."""
    _, _, traced, example = traced_block("qwen3_moe")
    (experts,) = expert_families(traced)
    assert (experts.num_units, experts.is_exact) == (4, False)
    assert {(part.tensor, part.axis) for part in experts.members} == {
        ("mlp.gate.weight", 0),
        ("mlp.experts.gate_up_proj", 0),
        ("mlp.experts.down_proj", 0),
    }
    assert any(reason.startswith("topk") for reason in experts.couplings)
    with pytest.raises(UnsupportedError, match=r"^softmax \(softmax\): without these units"):
        check_removal(traced, state_of(traced.program), example, {experts: [0, 1, 3]})
