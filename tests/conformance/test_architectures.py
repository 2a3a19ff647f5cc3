"""Every family: streamed forward = stock forward; compacted block = masked dense block; the layout's sums are right."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from structprune.architectures.stock.model import StockModel, output_tensor
from structprune.architectures.units import compact
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.streaming.propagate import tapped
from structprune.errors import UnsupportedError
from structprune.types import UNIT_KINDS, HeadUnits, UnitKind
from support.models import TINY_MODELS, save_tiny

# Norms of queries and keys over the dimensions of a head; the router of a mixture.
SHARED = ("self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.gate.weight")


@pytest.fixture(scope="module", params=list(TINY_MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("conformance") / request.param)


@functools.cache
def stock_of(directory: Path, head_units: HeadUnits = "kv-group") -> StockModel:
    """The model of a run, which makes a new module of each block; the tests share it as the steps of a run do."""
    return StockModel(CheckpointReader(directory), head_units)


def streamed_logits(stock: StockModel, reader: CheckpointReader, ids_BS: torch.Tensor) -> torch.Tensor:
    hidden_BSD, inputs = stock.embed(ids_BS, reader.read(stock.embedding_tensors()))
    for block in stock.layout.blocks:
        module = stock.block(block.index, reader.read(block.shapes, block.prefix))
        hidden_BSD = output_tensor(module(hidden_BSD, **inputs.kwargs[block.index]))
    return stock.head(reader.read(stock.head_tensors()))(hidden_BSD)


def test_streamed_forward_equals_stock_forward(tiny: Path) -> None:
    stock = stock_of(tiny)
    ids_BS = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    with torch.no_grad():
        expected = model(input_ids=ids_BS).logits
        actual = streamed_logits(stock, stock.reader, ids_BS)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_embedding_twice_gives_the_same(tiny: Path) -> None:
    stock = stock_of(tiny)
    reader = stock.reader
    tensors = reader.read(stock.embedding_tensors())
    ids_BS = torch.arange(30).reshape(2, 15)
    first, _ = stock.embed(ids_BS, tensors)
    second, _ = stock.embed(ids_BS, tensors)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_layout_counts_every_parameter_once(tiny: Path) -> None:
    layout = stock_of(tiny).layout
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert layout.num_parameters == sum(p.numel() for p in model.parameters())
    for block in layout.blocks:
        for kind in UNIT_KINDS:
            group = block.group(kind)
            removable = sum(part.num_units * block.unit_parameters(part) for part in block.groups_of(kind))
            # A module is its units, and what belongs to none: the consumer's bias, norms that heads share, a router.
            owned = {piece.tensor for part in block.groups_of(kind) for piece in part.slices}
            others = [n for n in block.shapes if n.startswith(group.module_prefix) and n not in owned]
            shared = sum(torch.Size(block.shapes[name]).numel() for name in others)
            assert removable + shared == block.module_parameters(group)
            assert set(others) <= {group.consumer_bias, *SHARED}


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_compacted_equals_masked_dense(tiny: Path, kind: str) -> None:
    stock = stock_of(tiny)
    reader = stock.reader
    block = stock.layout.blocks[1]
    group = block.group(kind)
    if not group.config_fields:
        pytest.skip(f"stock {stock.family.name} has no config entry for fewer {kind} units")
    tensors = reader.read(block.shapes, block.prefix)
    masked, cut = dict(tensors), dict(tensors)
    num_keep = group.num_units // 2
    for part in block.groups_of(kind):
        # Another choice in each.
        keep_units = torch.randperm(part.num_units, generator=torch.Generator().manual_seed(part.expert or 0))
        keep_units = keep_units[:num_keep].sort().values
        removed = torch.ones(part.num_units, dtype=torch.bool).index_fill(0, keep_units, False)
        consumer = tensors[part.consumer.tensor].clone().movedim(part.consumer.axis, -1)
        consumer[:, removed.repeat_interleave(part.width)] = 0
        masked[part.consumer.tensor] = consumer.movedim(-1, part.consumer.axis)
        cut = compact(cut, part, keep_units)
    hidden_BSD, inputs = stock.embed(torch.arange(60).reshape(2, 30), reader.read(stock.embedding_tensors()))
    smaller = stock.block(1, cut, stock.resized_config({kind: num_keep}))
    with torch.no_grad():
        expected = output_tensor(stock.block(1, masked)(hidden_BSD, **inputs.kwargs[1]))
        actual = output_tensor(smaller(hidden_BSD, **inputs.kwargs[1]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    after = sum(p.numel() for p in smaller.parameters())
    unit_parameters = sum(block.unit_parameters(part) for part in block.groups_of(kind))
    assert after == block.num_parameters - (group.num_units - num_keep) * unit_parameters


def test_query_heads_compacted_equal_masked_dense(tiny: Path) -> None:
    try:
        stock = stock_of(tiny, "query-head")
    except UnsupportedError as error:
        pytest.skip(error.what)
    block = stock.layout.blocks[1]
    group = block.group("attention")
    tensors = stock.reader.read(block.shapes, block.prefix)
    keep_units = torch.tensor([1])
    masked = dict(tensors)
    masked[group.consumer.tensor] = torch.zeros_like(tensors[group.consumer.tensor])
    kept_K = group.consumer.indices(keep_units)
    masked[group.consumer.tensor][:, kept_K] = tensors[group.consumer.tensor][:, kept_K]
    ids_BS = torch.arange(60).reshape(2, 30)
    hidden_BSD, inputs = stock.embed(ids_BS, stock.reader.read(stock.embedding_tensors()))
    smaller = stock.block(1, compact(tensors, group, keep_units), stock.resized_config({"attention": 1}))
    with torch.no_grad():
        expected = output_tensor(stock.block(1, masked)(hidden_BSD, **inputs.kwargs[1]))
        actual = output_tensor(smaller(hidden_BSD, **inputs.kwargs[1]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def with_value_channels(tiny: Path) -> StockModel:
    try:
        return stock_of(tiny, "value-channel")
    except UnsupportedError as error:
        pytest.skip(error.what)


def test_value_channels_compacted_equal_masked_dense(tiny: Path) -> None:
    """Other channels of each KV head stay, as many in all."""
    stock = with_value_channels(tiny)
    block = stock.layout.blocks[1]
    group = block.group("attention")
    tensors = stock.reader.read(block.shapes, block.prefix)
    heads, size = group.partitions, group.num_units // group.partitions
    assert (heads, group.width) == (2, 2)
    order = torch.rand(heads, size, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    keep_units = (torch.arange(heads)[:, None] * size + order[:, :3].sort(dim=1).values).flatten()
    assert not torch.equal(keep_units[:3], keep_units[3:] - size)
    masked = dict(tensors)
    masked[group.consumer.tensor] = torch.zeros_like(tensors[group.consumer.tensor])
    kept_K = group.consumer.indices(keep_units)
    masked[group.consumer.tensor][:, kept_K] = tensors[group.consumer.tensor][:, kept_K]
    cut = compact(tensors, group, keep_units)
    assert cut["self_attn.v_proj.weight"].shape == (2 * 3, 32)
    assert cut["self_attn.o_proj.weight"].shape == (32, 4 * 3)
    config = stock.resized_config({"attention": len(keep_units)}, index=1)
    ids_BS = torch.arange(60).reshape(2, 30)
    hidden_BSD, inputs = stock.embed(ids_BS, stock.reader.read(stock.embedding_tensors()))
    with torch.no_grad():
        expected = output_tensor(stock.block(1, masked)(hidden_BSD, **inputs.kwargs[1]))
        actual = output_tensor(stock.block(1, cut, config)(hidden_BSD, **inputs.kwargs[1]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    after = sum(tensor.numel() for tensor in cut.values())
    assert after == block.num_parameters - (group.num_units - len(keep_units)) * block.unit_parameters(group)


def test_value_channels_of_a_head_may_change_places(tiny: Path) -> None:
    """Their order within a KV head means nothing: rows of v_proj and columns of o_proj move together."""
    stock = with_value_channels(tiny)
    block = stock.layout.blocks[1]
    group = block.group("attention")
    tensors = stock.reader.read(block.shapes, block.prefix)
    size = group.num_units // group.partitions
    order = torch.cat([torch.randperm(size) + first for first in range(0, group.num_units, size)])
    moved = dict(tensors)
    for piece in group.slices:
        moved[piece.tensor] = moved[piece.tensor].clone()
        source = tensors[piece.tensor].movedim(piece.axis, 0)[piece.indices(order)]
        moved[piece.tensor].movedim(piece.axis, 0)[piece.indices(torch.arange(group.num_units))] = source
    assert not torch.equal(moved[group.consumer.tensor], tensors[group.consumer.tensor])
    hidden_BSD, inputs = stock.embed(torch.arange(60).reshape(2, 30), stock.reader.read(stock.embedding_tensors()))
    with torch.no_grad():
        expected = output_tensor(stock.block(1, tensors)(hidden_BSD, **inputs.kwargs[1]))
        actual = output_tensor(stock.block(1, moved)(hidden_BSD, **inputs.kwargs[1]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "head_units"), [("mlp", "kv-group"), ("attention", "kv-group"), ("attention", "value-channel")]
)
def test_without_its_producers_a_unit_is_silent(tiny: Path, kind: UnitKind, head_units: HeadUnits) -> None:
    """Zeros in all that a unit owns of its producers are zeros in what the consumer reads of it, and nothing else."""
    stock = with_value_channels(tiny) if head_units == "value-channel" else stock_of(tiny)
    reader = stock.reader
    block = stock.layout.blocks[1]
    tensors = reader.read(block.shapes, block.prefix)
    silent, masked = dict(tensors), dict(tensors)
    for group in block.groups_of(kind):
        units = torch.arange(group.num_units)[::2]
        for cut, pieces in ((silent, group.producers), (masked, (group.consumer,))):
            for piece in pieces:
                cut[piece.tensor] = cut[piece.tensor].clone()
                cut[piece.tensor].movedim(piece.axis, 0)[piece.indices(units)] = 0
    hidden_BSD, inputs = stock.embed(torch.arange(60).reshape(2, 30), reader.read(stock.embedding_tensors()))
    with torch.no_grad():
        expected = output_tensor(stock.block(1, masked)(hidden_BSD, **inputs.kwargs[1]))
        actual = output_tensor(stock.block(1, silent)(hidden_BSD, **inputs.kwargs[1]))
        dense = output_tensor(stock.block(1, tensors)(hidden_BSD, **inputs.kwargs[1]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dense, expected, atol=1e-3)


def test_one_stage_after_the_other_is_the_block(tiny: Path) -> None:
    stock = stock_of(tiny)
    reader = stock.reader
    block = stock.layout.blocks[0]
    module = stock.block(0, reader.read(block.shapes, block.prefix))
    hidden_BSD, inputs = stock.embed(torch.arange(60).reshape(2, 30), reader.read(stock.embedding_tensors()))
    with torch.no_grad():
        whole = output_tensor(module(hidden_BSD, **inputs.kwargs[0]))
        stages = hidden_BSD
        for stage in stock.stages_of(0):
            with stock.stage(module, 0, stage):
                before, stages = stages, output_tensor(module(stages, **inputs.kwargs[0]))
            assert not torch.allclose(before, stages)
        unchanged = output_tensor(module(hidden_BSD, **inputs.kwargs[0]))
    torch.testing.assert_close(stages, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unchanged, whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", UNIT_KINDS)
def test_a_stage_without_a_consumer_leaves_the_residual(tiny: Path, kind: UnitKind) -> None:
    stock = stock_of(tiny)
    reader = stock.reader
    block = stock.layout.blocks[0]
    module = stock.block(0, reader.read(block.shapes, block.prefix))
    hidden_BSD, inputs = stock.embed(torch.arange(60).reshape(2, 30), reader.read(stock.embedding_tensors()))
    seen: list[torch.Tensor] = []
    stage = stock.stage_of(0, kind)
    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(stock.stage(module, 0, stage))
        for group in block.groups_of(kind):
            stack.enter_context(tapped(module, group.consumer_module, seen.append))
        residual = output_tensor(module(hidden_BSD, **inputs.kwargs[0]))
    others = tuple(other for other in stage if other != kind)
    with torch.no_grad(), stock.stage(module, 0, others):
        expected = output_tensor(module(hidden_BSD, **inputs.kwargs[0]))
    torch.testing.assert_close(residual, expected, rtol=0, atol=0)
    assert torch.equal(expected, hidden_BSD) is (not others)
    group = block.group(kind)
    assert all(x_TI.shape[1] == group.num_units * group.width for x_TI in seen)
    # Each token once, or of a mixture twice: it is sent to two experts.
    assert sum(map(len, seen)) == 60 * (1 if group.expert is None else 2)
