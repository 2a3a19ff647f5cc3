"""Per-layer checkpoints whose blocks lack their attention, their MLP or both: they load, generate and reload."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_per_layer import FIXED_HEADS, IDS_BS, check_exports, load, logits, streamed_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from structprune.architectures.modeling.per_layer import MODELING_NAME, accepted_sources
from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel, output_tensor
from structprune.architectures.units import compact, remove_sublayer
from structprune.checkpoint.folder import write_companions
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.writer import CheckpointWriter
from structprune.engine.pipelines.units_settings import unit_settings
from structprune.errors import CheckpointError, UnsupportedError
from structprune.exporters.per_layer import per_layer_config, write_modeling_file
from structprune.exporters.uniform import uniform_config
from structprune.methods import METHODS
from structprune.recipe import Recipe
from structprune.types import UNIT_KINDS
from support.models import save_tiny

NUM_BLOCKS = 4
# Blocks with and without a window in one model cannot lose their attention.
KINDS = (
    "llama",
    "llama-untied-biased",
    "mistral",
    "opt",
    "gemma3_text-biased",
    "gpt2",
    "gpt_neox",
    "phi3",
    "qwen3",
)
REMOVED: dict[str, list[str]] = {"0": ["attention"], "1": ["mlp"], "2": ["attention", "mlp"]}
KEPT = {"mlp": [16, 0, 0, 27], "attention": [0, 2, 0, 1]}
# Stock classes whose heads derive from the hidden size have all or none.
KEPT_FIXED = {"mlp": [16, 0, 0, 27], "attention": [0, 4, 0, 4]}


def write_per_layer(source: Path, target: Path, kept: dict[str, list[int]]) -> Path:
    """Prune `source` without calibration: keep the last units of each block, or none."""
    target.mkdir()
    stock = StockModel(CheckpointReader(source))
    reader = stock.reader
    shards = target / "shards"
    shards.mkdir()
    writer = CheckpointWriter(shards, NUM_BLOCKS + 1)
    for block in stock.layout.blocks:
        tensors = reader.read(block.shapes, block.prefix)
        for group in block.groups:
            count = kept[group.kind][block.index] if group.kind in kept else group.num_units
            if count == 0:
                tensors = remove_sublayer(tensors, block, group.kind)
            else:
                tensors = compact(tensors, group, torch.arange(group.num_units - count, group.num_units))
        writer.write(block.index + 1, {block.prefix + name: tensor for name, tensor in tensors.items()})
    writer.write(writer.num_shards, reader.read(stock.layout.outer_tensors))
    config = per_layer_config(reader.config, stock, kept)
    write_modeling_file(target, stock.family, config)
    write_companions(source, target, config)
    writer.weight_files(10**9).write(target)
    return target


@torch.no_grad()
def masked_dense_logits(source: Path, attention: str) -> Tensor:
    """The dense stock model with zeros where a consumer would read removed units; a whole sublayer loses its bias."""
    stock = StockModel(CheckpointReader(source))
    model: Any = AutoModelForCausalLM.from_pretrained(source, attn_implementation=attention).eval()
    kept = KEPT_FIXED if stock.family.name in FIXED_HEADS else KEPT
    for block in stock.layout.blocks:
        layer = model.get_submodule(f"{stock.family.blocks_module}.{block.index}")
        for group in block.groups:
            num_removed = group.num_units - kept[group.kind][block.index]
            consumer = layer.get_submodule(group.consumer_module)
            consumer.weight.movedim(group.consumer.axis, -1)[:, : num_removed * group.width] = 0
            if num_removed == group.num_units and consumer.bias is not None:
                consumer.bias.zero_()
    return model(input_ids=IDS_BS).logits


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("dense") / request.param, num_blocks=NUM_BLOCKS)


@pytest.fixture(scope="module")
def pruned(source: Path, tmp_path_factory: pytest.TempPathFactory, modules_cache: None) -> Path:
    kept = KEPT_FIXED if source.name in FIXED_HEADS else KEPT
    return write_per_layer(source, tmp_path_factory.mktemp("removed") / f"pruned-{source.name}", kept)


def edited(directory: Path, target: Path, **entries: Any) -> Path:
    """A copy with other entries in config.json; None deletes one."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text()) | entries
    config = {name: value for name, value in config.items() if name not in entries or value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_streamed_blocks_and_the_masked_dense_model(attention: str, source: Path, pruned: Path) -> None:
    actual = logits(load(pruned, attention))
    if attention == "sdpa":
        assert torch.equal(actual, streamed_logits(pruned))
    else:
        switched = load(pruned, "sdpa")
        switched.set_attn_implementation("eager")
        assert torch.equal(logits(switched), actual)
        with torch.no_grad():
            assert len(switched(input_ids=IDS_BS, output_attentions=True).attentions) == 2
    expected = masked_dense_logits(source, attention)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(source).eval()), atol=1e-2)


def test_layout_knows_what_is_gone(source: Path, pruned: Path) -> None:
    reader = CheckpointReader(pruned)
    assert reader.config[REMOVED_ENTRY] == REMOVED
    stock, dense = StockModel(reader), StockModel(CheckpointReader(source))
    assert stock.layout.num_parameters == sum(torch.Size(shape).numel() for shape in reader.shapes.values())
    assert stock.groups == dense.groups
    for block, whole in zip(stock.layout.blocks, dense.layout.blocks, strict=True):
        gone = REMOVED.get(str(block.index), [])
        assert [kind for kind in UNIT_KINDS if not block.has(kind)] == gone
        assert [group.kind for group in block.groups] == [g.kind for g in whole.groups if g.kind not in gone]
        lost = {name for kind in gone for name in whole.sublayer_tensors(kind)}
        assert set(block.shapes) == set(whole.shapes) - lost
        for kind in gone:
            group = whole.group(kind)
            assert whole.sublayer_parameters(kind) > group.num_units * whole.unit_parameters(group), "the norm goes too"
    assert not stock.layout.blocks[2].shapes
    model = load(pruned)
    assert stock.layout.num_parameters == sum(p.numel() for p in model.parameters())
    layers = model.get_submodule(stock.family.blocks_module)
    assert [layers[i].get_submodule(stock.family.attention_module).layer_idx for i in (1, 3)] == [0, 1]


@pytest.mark.parametrize("kind", UNIT_KINDS)
def test_a_removed_half_is_the_residual_stream(kind: str, source: Path, pruned: Path) -> None:
    """Of the checkpoint's own removed sublayers and of one that `block` is told to leave out."""
    stock, dense = StockModel(CheckpointReader(pruned)), StockModel(CheckpointReader(source))
    reader, dense_reader = stock.reader, dense.reader
    hidden_BSD, inputs = stock.embed(IDS_BS, reader.read(stock.embedding_tensors()))
    other = "mlp" if kind == "attention" else "attention"
    index = 0 if kind == "attention" else 1
    block, whole = stock.layout.blocks[index], dense.layout.blocks[index]
    tensors = dense_reader.read(whole.shapes, whole.prefix)
    modules = [
        stock.block(index, reader.read(block.shapes, block.prefix)),
        dense.block(index, remove_sublayer(tensors, whole, kind), removed=[kind]),
        stock.block(2, {}),
        dense.block(2, {}, removed=UNIT_KINDS),
    ]
    for module in modules:
        with torch.no_grad(), stock.stage(module, index, (kind,)):
            assert torch.equal(output_tensor(module(hidden_BSD, **inputs.kwargs[index])), hidden_BSD)
    with torch.no_grad():
        whole_module = dense.block(index, tensors)
        with dense.stage(whole_module, index, (other,)):
            expected = output_tensor(whole_module(hidden_BSD, **inputs.kwargs[index]))
        assert torch.equal(output_tensor(modules[1](hidden_BSD, **inputs.kwargs[index])), expected)
        with dense.stage(modules[1], index, (other,)):
            assert torch.equal(output_tensor(modules[1](hidden_BSD, **inputs.kwargs[index])), expected)
    assert not torch.allclose(expected, hidden_BSD)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_with_both_caches_equals_recomputing(num_beams: int, pruned: Path) -> None:
    model = load(pruned)
    options = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "num_beams": num_beams,
        "attention_mask": torch.ones_like(IDS_BS),
    }
    expected = model.generate(IDS_BS, use_cache=False, **options)
    assert expected.shape[1] == IDS_BS.shape[1] + 12
    # Chunks make `generate` size a static cache before the first pass.
    static = {"cache_implementation": "static"}
    for cache in ({"cache_implementation": "dynamic"}, static, static | {"prefill_chunk_size": 8}):
        assert torch.equal(model.generate(IDS_BS, **options, **cache), expected), cache


@torch.no_grad()
def test_a_cache_that_grows_by_itself_has_no_hole(pruned: Path) -> None:
    """Without a config the cache makes its entries on demand, and entry 0 tells the position."""
    model = load(pruned)
    cache = DynamicCache()
    steps = [model(input_ids=IDS_BS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(24)]
    assert len(cache.layers) == 2
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model), rtol=1e-4, atol=1e-4)


def test_save_pretrained_keeps_the_model(pruned: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    expected = logits(load(pruned))
    load(pruned).save_pretrained(again)
    assert json.loads((again / "config.json").read_text())[REMOVED_ENTRY] == REMOVED
    assert (again / MODELING_NAME).read_bytes() == (pruned / MODELING_NAME).read_bytes()
    assert torch.equal(logits(load(again)), expected)
    assert torch.equal(logits(load_model(again, torch.device("cpu"), torch.float32)), expected)
    assert torch.equal(streamed_logits(again), expected)


@pytest.mark.parametrize(
    "source",
    [pytest.param(kind, marks=() if kind in ("llama", "opt", "gpt2") else pytest.mark.slow) for kind in KINDS],
    indirect=True,
)
def test_exports(pruned: Path) -> None:
    check_exports(pruned)


def test_load_model_wants_the_modelling_file(pruned: Path, tmp_path: Path) -> None:
    copy = edited(pruned, tmp_path / "copy", per_layer_config=None)
    (copy / MODELING_NAME).unlink()
    with pytest.raises(CheckpointError, match="lacks its modelling file"):
        load_model(copy, torch.device("cpu"), torch.float32)
    (copy / MODELING_NAME).write_text((pruned / MODELING_NAME).read_text() + "\n")
    with pytest.raises(CheckpointError, match="not one that structprune writes"):
        load_model(copy, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("llama", "900c92e04df0dfc7b750bb3d296be305ad984891ff21b02b3bc28ca7ddba4f6f"),
        ("mistral", "900c92e04df0dfc7b750bb3d296be305ad984891ff21b02b3bc28ca7ddba4f6f"),
        ("opt", "66a1a6525e1c88c2be2a46434e5ee935a3a570834b3b1ef5598445531affeaa5"),
    ],
)
def test_the_first_version_of_the_text_still_loads(kind: str, digest: str, tmp_path: Path, modules_cache: None) -> None:
    source = save_tiny(kind, tmp_path / "dense", num_blocks=NUM_BLOCKS)
    text = accepted_sources(StockModel(CheckpointReader(source)).family)[-1]
    assert hashlib.sha256(text.encode()).hexdigest() == digest, "a released text has changed"
    old = write_per_layer(source, tmp_path / "old", {"mlp": [16, 40, 27, 48]})
    assert REMOVED_ENTRY not in json.loads((old / "config.json").read_text())
    (old / MODELING_NAME).write_text(text)
    model = load_model(old, torch.device("cpu"), torch.float32)
    assert torch.equal(logits(model), streamed_logits(old))
    assert torch.equal(logits(load(old)), streamed_logits(old))


def test_pruned_again_stays_removed(pruned: Path, tmp_path: Path) -> None:
    twice = write_per_layer(pruned, tmp_path / "twice", {"mlp": [0, 0, 0, 8]})
    stock = StockModel(CheckpointReader(twice))
    assert json.loads((twice / "config.json").read_text())[REMOVED_ENTRY] == REMOVED | {"0": ["attention", "mlp"]}
    assert [block.has("mlp") for block in stock.layout.blocks] == [False, False, False, True]
    assert stock.layout.blocks[3].group("mlp").num_units == 8
    assert torch.equal(logits(load(twice)), streamed_logits(twice))


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (["attention"], "not an object"),
        ("attention", "not an object"),
        ({"4": ["attention"]}, "names a block that is none"),
        ({"-1": ["attention"]}, "names a block that is none"),
        ({"00": ["attention"]}, "names a block that is none"),
        ({"0.0": ["attention"]}, "names a block that is none"),
        ({"\u0661": ["mlp"]}, "names a block that is none"),
        ({"0": "attention"}, "names sublayers that are none"),
        ({"0": []}, "names sublayers that are none"),
        ({"0": ["norm"]}, "names sublayers that are none"),
        ({"0": [["mlp"]]}, "names sublayers that are none"),
        ({"0": {"mlp": 1}}, "names sublayers that are none"),
        ({"0": ["mlp", "mlp"]}, "names a sublayer twice"),
        # Well formed, but not what the tensors say.
        ({"0": ["attention"]}, "the checkpoint lacks"),
        (REMOVED | {"3": ["mlp"]}, "that the configuration does not"),
    ],
)
def test_malformed_entries_are_refused(entry: Any, match: str, pruned: Path, tmp_path: Path) -> None:
    copy = edited(pruned, tmp_path / "copy", **{REMOVED_ENTRY: entry})
    with pytest.raises(CheckpointError, match=match):
        StockModel(CheckpointReader(copy))


def test_some_attention_must_stay(source: Path, pruned: Path, tmp_path: Path) -> None:
    stock = StockModel(CheckpointReader(source))
    with pytest.raises(UnsupportedError, match="attention of every block is removed"):
        per_layer_config(stock.layout.config, stock, {"attention": [0] * NUM_BLOCKS})
    every = {str(i): ["attention"] for i in range(NUM_BLOCKS)}
    with pytest.raises(UnsupportedError, match="attention of every block is removed"):
        StockModel(CheckpointReader(edited(pruned, tmp_path / "copy", **{REMOVED_ENTRY: every})))


def test_the_uniform_format_refuses_removed_sublayers(source: Path, pruned: Path) -> None:
    stock = StockModel(CheckpointReader(source))
    for kind in UNIT_KINDS:
        with pytest.raises(UnsupportedError, match="uniform format cannot leave out"):
            uniform_config(stock.layout.config, [(stock.layout.blocks[0].group(kind), 0)], stock.family)
        with pytest.raises(UnsupportedError, match="one config cannot describe"):
            stock.resized_config({kind: 0})
        assert stock.resized_config({kind: 0}, 1).to_dict() == stock.config.to_dict()
    with pytest.raises(UnsupportedError, match="uniform format cannot leave out"):
        uniform_config(CheckpointReader(pruned).config, [], stock.family)


def test_nothing_removed_leaves_no_entry(source: Path) -> None:
    stock = StockModel(CheckpointReader(source))
    whole = {group.kind: [group.num_units] * NUM_BLOCKS for group in stock.groups}
    assert REMOVED_ENTRY not in per_layer_config(stock.layout.config, stock, whole)


def test_blocks_with_and_without_a_window_keep_their_attention(tmp_path: Path, modules_cache: None) -> None:
    source = save_tiny("qwen2", tmp_path / "dense", num_blocks=NUM_BLOCKS)
    with pytest.raises(UnsupportedError, match="cannot lose their attention; got layer_types full_attention, sliding"):
        unit_settings(
            Recipe(method="structprune", scope="all", allow_block_removal=True),
            METHODS.get("structprune"),
            StockModel(CheckpointReader(source)),
        )
    pruned = write_per_layer(source, tmp_path / "pruned", {"mlp": KEPT["mlp"]})
    model = load(pruned)
    assert torch.equal(logits(model), streamed_logits(pruned))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(IDS_BS, use_cache=False, **options)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(IDS_BS, cache_implementation=cache, **options), expected), cache
    broken = edited(pruned, tmp_path / "broken", **{REMOVED_ENTRY: {"0": ["attention"]}})
    with pytest.raises(UnsupportedError, match="cannot lose their attention"):
        StockModel(CheckpointReader(broken))
