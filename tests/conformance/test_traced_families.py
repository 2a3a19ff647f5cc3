"""Families without a file: the description is the one of the family files where there is one, and the model's own."""

from __future__ import annotations

import functools
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from structprune.architectures import FAMILIES
from structprune.architectures.stock.model import StockModel, output_tensor
from structprune.architectures.traced import family as traced_module
from structprune.architectures.traced import lookup
from structprune.architectures.traced.family import traced_family
from structprune.architectures.traced.mixture import joined_units
from structprune.architectures.units import compact
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, UnsupportedError
from structprune.types import UNIT_KINDS, AxisSlice, HeadUnits, UnitGroup, UnitKind
from support.models import TINY_MODELS
from support.streamed import streamed_logits
from support.traced import DESCRIBED, HELD_HEADS, save_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

WRITTEN = [kind for kind in TINY_MODELS if kind != "qwen3_moe"]
SAME_FIELDS = (
    *("blocks_module", "embedding_modules", "rotary_module", "final_norm_module", "head_module", "attention_module"),
    *("mlp_modules", "norms", "stand_ins", "attention_implementation", "tiled_attention", "inputs_first"),
    "registers_names",
)
# A file names the entry of biases that are there already, or leaves out one that stock code has.
BIASES = ("bias_field", "bias_modules")


@functools.cache
def config_of(kind: str) -> Any:
    torch.manual_seed(0)
    return TINY_MODELS[kind]().config


@functools.cache
def described(kind: str) -> Any:
    return traced_family(config_of(kind))


def comparable(group: UnitGroup) -> dict[str, Any]:
    found = {each.name: getattr(group, each.name) for each in fields(group) if each.name not in BIASES}
    found["producers"] = sorted(group.producers, key=lambda part: (part.tensor, part.axis, part.offset))
    found["norm_modules"] = sorted(group.norm_modules)
    return found


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_description_is_that_of_the_family_file(kind: str) -> None:
    """Modules, norms, order, classes, factors and buffers, of models that are described twice."""
    config, found = config_of(kind), described(kind)
    written = FAMILIES.get(config.model_type)
    for name in SAME_FIELDS:
        assert getattr(found, name) == getattr(written, name), name
    assert found.classes[config.model_type] == written.classes[config.model_type]
    assert found.stages(config) == written.stages(config)
    assert found.embedding_buffers(config) == pytest.approx(written.embedding_buffers(config))
    # Entries that are null change nothing.
    in_use = [name for name in written.logit_entries if getattr(config, name) is not None]
    assert list(found.logit_entries) == in_use


@pytest.mark.parametrize("head_units", ["kv-group", "query-head"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_the_groups_are_those_of_the_family_file(kind: str, head_units: HeadUnits) -> None:
    """Slices, config entries of widths with their values per unit, the activation, epsilons of output norms."""
    config = config_of(kind)
    try:
        written = FAMILIES.get(config.model_type).groups(config, head_units)
    except UnsupportedError:
        with pytest.raises(UnsupportedError, match="this attention has no"):
            described(kind).groups(config, head_units)
        return
    found = described(kind).groups(config, head_units)
    assert [comparable(group) for group in found] == [comparable(group) for group in written]


def test_entries_of_biases_are_found() -> None:
    """Where biases are not there yet, as in a LLaMA that is not biased."""
    written = FAMILIES.get("llama").groups(config_of("llama"), "kv-group")
    for group, other in zip(described("llama").groups(config_of("llama"), "kv-group"), written, strict=True):
        assert group.bias_field == other.bias_field
        assert set(group.bias_modules) == set(other.bias_modules)


# Graphs of recurrences are long; of the others there is one like them.
LONG = ("deepseek_v3", "falcon_h1", "llama4_text", "mpt", "qwen3_5_text")
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind in LONG else ()) for kind in DESCRIBED]


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(request.param, tmp_path_factory.mktemp("traced") / request.param)


@functools.cache
def stock_of(directory: Path) -> StockModel:
    return StockModel(CheckpointReader(directory))


@torch.no_grad()
def test_streamed_forward_equals_stock_forward(source: Path) -> None:
    ids_BS = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(source).eval()(input_ids=ids_BS).logits
    torch.testing.assert_close(streamed_logits(stock_of(source), ids_BS), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_counts_every_parameter_once(source: Path) -> None:
    stock = stock_of(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    # With the buffers that files have: numbers that routers add, factors on the stream.
    stored = {id(tensor): tensor for _, tensor in model.state_dict(keep_vars=True).items()}
    assert stock.layout.num_parameters == sum(tensor.numel() for tensor in stored.values())
    assert any("found by tracing" in note for note in stock.notes)


@pytest.mark.parametrize("kind", UNIT_KINDS)
@torch.no_grad()
def test_compacted_equals_masked_dense(source: Path, kind: UnitKind) -> None:
    stock = stock_of(source)
    block = next(block for block in reversed(stock.layout.blocks) if block.has(kind))
    group, index = block.group(kind), block.index
    if not group.config_fields or group.num_units == 1:
        assert kind == "attention"
        assert source.name in HELD_HEADS or group.num_units == 1
        pytest.skip(f"stock {source.name} keeps its heads")
    tensors = stock.reader.read(block.shapes, block.prefix)
    generator = torch.Generator().manual_seed(0)
    masked, cut = dict(tensors), dict(tensors)
    for part in block.groups_of(kind):
        order = torch.randperm(part.num_units, generator=generator)
        keep_units, gone = (half.sort().values for half in order.split([part.num_units // 2, -(-part.num_units // 2)]))
        slice_ = part.consumer
        masked[slice_.tensor] = masked[slice_.tensor].index_fill(slice_.axis, slice_.indices(gone), 0)
        cut = compact(cut, part, keep_units)
    hidden_BSD, inputs = stock.embed(torch.arange(60).reshape(2, 30), stock.reader.read(stock.embedding_tensors()))
    smaller = stock.block(index, cut, stock.resized_config({kind: group.num_units // 2}, index))
    expected = output_tensor(stock.block(index, masked)(hidden_BSD, **inputs.kwargs[index]))
    actual = output_tensor(smaller(hidden_BSD, **inputs.kwargs[index]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    dense = output_tensor(stock.block(index, tensors)(hidden_BSD, **inputs.kwargs[index]))
    assert (dense - expected).abs().max() > 1e-2


def test_what_a_consumer_is_multiplied_by_is_the_configs_number(source: Path) -> None:
    expected = 0.4 if source.name == "granite" else 1.0
    assert {group.output_scale for group in stock_of(source).groups} == {expected}


REFUSED = {
    "mamba2": "mamba2 has no family file, and has blocks without attention and without an MLP; got mixer",
    # What a token adds by itself to each block.
    "gemma4_text": "has blocks with several sublayers of kind mlp",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_described_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    changes = {"hidden_size_per_layer_input": 4} if model_type == "gemma4_text" else {}
    source = save_decoder(model_type, tmp_path / model_type, **changes)
    with pytest.raises(UnsupportedError, match=REFUSED[model_type]):
        StockModel(CheckpointReader(source))


def test_a_config_of_larger_tensors_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    source = save_decoder("granite", tmp_path / "granite")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": 2**20}))
    with pytest.raises(CheckpointError, match="larger than any of the checkpoint"):
        StockModel(CheckpointReader(source))


def wrong(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Describe every type with these fields instead of those that were found."""
    lookup.traced.cache_clear()
    monkeypatch.setattr(lookup, "traced_family", lambda config: replace(traced_module.traced_family(config), **changes))


@pytest.fixture
def _forgotten() -> Any:
    yield
    lookup.traced.cache_clear()


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("granite", {"logit_entries": ()}, "computes other logits than its embedding, blocks and head"),
        ("gemma", {"embedding_buffers": lambda _: {}}, "does not run piece by piece|other logits"),
        ("phi", {"stages": lambda _: (("attention",), ("mlp",))}, "is not one sublayer after the other"),
        ("falcon", {"stand_ins": {}}, "does not run piece by piece"),
    ],
)
def test_a_wrong_description_is_refused(
    model_type: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is checked before a run does not depend on how the description was found."""
    wrong(monkeypatch, **changes)
    with pytest.raises(UnsupportedError, match=message):
        StockModel(CheckpointReader(save_decoder(model_type, tmp_path / model_type)))


@pytest.mark.usefixtures("_forgotten")
def test_units_that_are_not_the_models_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Channels whose gate stays where it is: the block without some computes something else."""

    def crossed(config: Any) -> Any:
        found = traced_module.traced_family(config)

        def groups(of: Any, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
            mlp, attention = found.groups(of, head_units)
            gate, up = mlp.producers
            half = mlp.num_units // 2
            moved = replace(gate, offset=0, run=half, gap=-half) if half else gate
            return (replace(mlp, producers=(moved, up)), attention)

        return replace(found, groups=groups)

    lookup.traced.cache_clear()
    monkeypatch.setattr(lookup, "traced_family", crossed)
    with pytest.raises(UnsupportedError, match=r"without mlp units|does not run piece by piece"):
        StockModel(CheckpointReader(save_decoder("smollm3", tmp_path / "smollm3")))


def test_an_expert_that_is_twice_as_wide_loses_two_channels_for_one(tmp_path: Path) -> None:
    stock = stock_of(save_decoder("ernie4_5_moe", tmp_path / "model"))
    *experts, shared = stock.layout.blocks[1].groups_of("mlp")
    assert {(group.num_units, group.width) for group in experts} == {(24, 1)}
    assert (shared.num_units, shared.width) == (24, 2)
    assert shared.consumer.indices(torch.tensor([3, 5])).tolist() == [6, 7, 10, 11]
    assert {part.width for part in shared.producers} == {2}


def test_units_that_cannot_be_joined_stay_as_they_are() -> None:
    part = AxisSlice(tensor="up.weight", axis=0)
    consumer = replace(part, tensor="down.weight", axis=1)
    group = UnitGroup(kind="mlp", num_units=48, width=1, producers=(part,), consumer=consumer, consumer_module="down")
    assert joined_units(group, 24).num_units == 24
    assert joined_units(group, 36) is group
    assert joined_units(group, 48) is group
    apart = replace(group, producers=(replace(part, repeat=2, stride=48),))
    assert joined_units(apart, 24) is apart
