"""Per-layer checkpoints: what stock transformers loads equals the compacted blocks; nothing foreign is run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from structprune import prune
from structprune.architectures.modeling.per_layer import MODELING_NAME
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel, output_tensor
from structprune.architectures.units import compact
from structprune.checkpoint.folder import write_companions
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.writer import CheckpointWriter
from structprune.errors import CheckpointError, UnsupportedError
from structprune.exporters.per_layer import per_layer_config, write_modeling_file
from structprune.recipe import Recipe
from structprune.types import BlockLayout, HeadUnits
from support.models import save_tiny

NUM_BLOCKS = 3
KINDS = (
    "llama",
    "llama-untied-biased",
    "mistral",
    "opt",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
# Kind -> units of each block. Block 1 of `attention` keeps all of its KV groups.
KEPT = {"mlp": [16, 40, 27], "attention": [1, 2, 1]}
# Stock kernels of experts want multiples of 8.
KEPT_OF_MIXTURE = {**KEPT, "mlp": [16, 40, 24]}
# Stock classes derive the size of a head from the hidden size.
FIXED_HEADS = ("opt", "gpt2", "gpt_neox")
# Stock classes that have no plan to share the model out among processes or devices.
WITHOUT_PLANS = ("opt", "gpt2")
IDS_BS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(3))


def kept_units(kind: str) -> dict[str, list[int]]:
    """What the checkpoint of `pruned` keeps."""
    if kind in FIXED_HEADS:
        return {"mlp": KEPT["mlp"]}
    return KEPT_OF_MIXTURE if kind == "qwen3_moe" else KEPT


def compacted(stock: StockModel, block: BlockLayout, kept: dict[str, list[int]]) -> dict[str, Tensor]:
    """The block's tensors with the last units only, or the last of each partition."""
    tensors = stock.reader.read(block.shapes, block.prefix)
    for kind, counts in kept.items():
        for group in block.groups_of(kind):
            units = torch.arange(group.num_units).reshape(group.partitions, -1)
            tensors = compact(tensors, group, units[:, -(counts[block.index] // group.partitions) :].flatten())
    return tensors


def write_per_layer(source: Path, target: Path, kept: dict[str, list[int]], head_units: HeadUnits = "kv-group") -> Path:
    """Prune `source` without calibration: keep the last units of each block, or of each partition of its units."""
    target.mkdir()
    stock = StockModel(CheckpointReader(source), head_units)
    reader = stock.reader
    shards = target / "shards"
    shards.mkdir()
    writer = CheckpointWriter(shards, len(stock.layout.blocks) + 1)
    for block in stock.layout.blocks:
        tensors = compacted(stock, block, kept)
        writer.write(block.index + 1, {block.prefix + name: tensor for name, tensor in tensors.items()})
    writer.write(writer.num_shards, reader.read(stock.layout.outer_tensors))
    config = per_layer_config(reader.config, stock, kept)
    write_modeling_file(target, stock.family, config)
    write_companions(source, target, config)
    writer.weight_files(10**9).write(target)
    writer.remove()
    shards.rmdir()
    return target


@pytest.fixture(scope="module", params=KINDS)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, modules_cache: None) -> Path:
    """A per-layer checkpoint of each family, every block of another width."""
    root = tmp_path_factory.mktemp("per-layer")
    source = save_tiny(request.param, root / "dense", num_blocks=NUM_BLOCKS)
    return write_per_layer(source, root / f"pruned-{request.param}", kept_units(request.param))


def kind_of(pruned: Path) -> str:
    """The kind of the fixture's checkpoint."""
    return pruned.name.removeprefix("pruned-")


def load(directory: Path, attention: str | None = None, auto_class: Any = AutoModelForCausalLM) -> Any:
    """Without a name attention is computed as stock code chooses: by SDPA where that can."""
    options = {} if attention is None else {"attn_implementation": attention}
    return auto_class.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32, **options).eval()


def attentions(directory: Path) -> list[str]:
    """The implementations that the stock class has."""
    family = StockModel(CheckpointReader(directory)).family
    return ["eager"] if family.attention_implementation == "eager" else ["eager", "sdpa"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS_BS).logits


@torch.no_grad()
def streamed_logits(directory: Path, attention: str | None = None, kept: dict[str, list[int]] | None = None) -> Tensor:
    """The blocks one by one through StockModel, pruned on the way to `kept` if that is given."""
    stock = StockModel(CheckpointReader(directory))
    reader = stock.reader
    if attention is not None:
        for config in (stock.config, *stock.block_configs):
            config._attn_implementation = attention
    hidden_BSD, inputs = stock.embed(IDS_BS, reader.read(stock.embedding_tensors()))
    for block in stock.layout.blocks:
        tensors = compacted(stock, block, kept or {})
        config = stock.resized_config({kind: counts[block.index] for kind, counts in (kept or {}).items()}, block.index)
        module = stock.block(block.index, tensors, config)
        hidden_BSD = output_tensor(module(hidden_BSD, **inputs.kwargs[block.index]))
    return stock.head(reader.read(stock.head_tensors()))(hidden_BSD)


def test_from_pretrained_equals_the_streamed_blocks(pruned: Path) -> None:
    model = load(pruned)
    assert type(model).__name__.startswith("StructPrune")
    assert_equal(logits(model), streamed_logits(pruned), pruned)


def assert_equal(actual: Tensor, expected: Tensor, pruned: Path) -> None:
    """Bit by bit; of a mixture, where blocks run the experts one by one and stock code together, to rounding."""
    tolerance = 1e-5 if kind_of(pruned) == "qwen3_moe" else 0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_reloaded_equals_what_was_not_saved_yet(attention: str, pruned: Path) -> None:
    if attention not in attentions(pruned):
        pytest.skip("the stock class has no such attention")
    kind = kind_of(pruned)
    before = streamed_logits(pruned.parent / "dense", attention, kept_units(kind))
    model = load(pruned, attention)
    assert model.config._attn_implementation == attention
    after = logits(model)
    assert_equal(after, before, pruned)
    assert not torch.allclose(after, streamed_logits(pruned.parent / "dense", attention), atol=0.01)
    # And after a second saving.
    model.save_pretrained(pruned.parent / f"again-{attention}")
    assert torch.equal(logits(load(pruned.parent / f"again-{attention}", attention)), after)


def test_plans_are_those_of_the_stock_class(pruned: Path) -> None:
    """For several processes (`tp_plan="auto"`) and for several devices in turn."""
    dense = AutoModelForCausalLM.from_pretrained(pruned.parent / "dense")
    model = load(pruned)
    assert model._tp_plan == dense._tp_plan
    assert model._pp_plan == dense._pp_plan
    assert bool(model._tp_plan) is bool(model._pp_plan) is (kind_of(pruned) not in WITHOUT_PLANS)
    base = load(pruned, auto_class=AutoModel)
    assert base._tp_plan == dense.base_model._tp_plan
    assert base._pp_plan == dense.base_model._pp_plan
    # What a plan names in the stock model is there in ours.
    names, dense_names = (
        {re.sub(r"\.\d+\.", ".*.", name) for name, _ in part.named_modules()} for part in (model, dense)
    )
    assert set(model._pp_plan) <= names
    assert dense_names & set(model._tp_plan) == names & set(model._tp_plan)


def test_every_layer_has_its_widths_and_index(pruned: Path) -> None:
    model = load(pruned)
    stock = StockModel(CheckpointReader(pruned))
    layers = model.get_submodule(stock.family.blocks_module)
    attention = stock.family.attention_module
    assert [layer.get_submodule(attention).layer_idx for layer in layers] == list(range(NUM_BLOCKS))
    for block, layer in zip(stock.layout.blocks, layers, strict=True):
        if kind_of(pruned) != "qwen3_moe":  # stacked in memory, so that names differ
            assert block.shapes == {name: tuple(p.shape) for name, p in layer.named_parameters()}
        assert {group.num_units for group in block.groups_of("mlp")} == {
            kept_units(kind_of(pruned))["mlp"][block.index]
        }
        if stock.family.name not in FIXED_HEADS:
            assert block.group("attention").num_units == KEPT["attention"][block.index]
    assert stock.layout.num_parameters == sum(p.numel() for p in model.parameters())
    assert stock.groups[0].num_units == 48, "the groups of the model are those of its dense config"


def test_eager_and_sdpa_agree_and_reach_every_layer(pruned: Path) -> None:
    eager = load(pruned, "eager")
    expected = logits(load(pruned, attentions(pruned)[-1]))
    torch.testing.assert_close(logits(eager), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        # Only eager attention returns weights, so this fails where one layer runs another implementation.
        found = eager(input_ids=IDS_BS, output_attentions=True, output_hidden_states=True)
    assert all(weights is not None for weights in found.attentions)
    assert len(found.attentions) == NUM_BLOCKS
    assert len(found.hidden_states) == NUM_BLOCKS + 1
    eager.set_attn_implementation(attentions(pruned)[-1])
    assert torch.equal(logits(eager), expected)


def test_generation_with_both_caches_equals_recomputing(pruned: Path) -> None:
    model = load(pruned)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask_BS = torch.ones_like(IDS_BS)
    runs = [
        model.generate(IDS_BS, attention_mask=mask_BS, **options, **cache)
        for cache in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"})
    ]
    assert runs[0].shape[1] == IDS_BS.shape[1] + 12
    assert torch.equal(runs[1], runs[0])
    assert torch.equal(runs[2], runs[0])


def test_auto_model_loads_the_same_blocks(pruned: Path) -> None:
    base = load(pruned, auto_class=AutoModel)
    whole = load(pruned)
    with torch.no_grad():
        expected = whole.get_submodule(whole.base_model_prefix)(input_ids=IDS_BS).last_hidden_state
        actual = base(input_ids=IDS_BS).last_hidden_state
    assert torch.equal(actual, expected)


def test_embeddings_are_tied_as_in_the_source(pruned: Path) -> None:
    model = load(pruned)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied is bool(model.config.tie_word_embeddings)


# torch.export of the others is in the slow tests, as is that to ONNX.
EXPORTED = ("llama", "opt", "gemma2", "gpt2", "qwen3_moe")


@pytest.mark.parametrize(
    "pruned", [pytest.param(kind, marks=() if kind in EXPORTED else pytest.mark.slow) for kind in KINDS], indirect=True
)
def test_exports(pruned: Path) -> None:
    check_exports(pruned)


def check_exports(pruned: Path) -> None:
    """The graph of `torch.export` computes what the model does."""
    model = load(pruned)
    program = torch.export.export(model, (), {"input_ids": IDS_BS, "use_cache": False}, strict=False)
    actual = program.module()(input_ids=IDS_BS, use_cache=False).logits
    torch.testing.assert_close(actual, logits(model), rtol=1e-5, atol=1e-5)


def test_save_pretrained_keeps_the_model(pruned: Path, tmp_path: Path) -> None:
    expected = logits(load(pruned))
    load(pruned).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODELING_NAME).read_bytes() == (pruned / MODELING_NAME).read_bytes()
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    assert torch.equal(logits(load_model(tmp_path / "again", torch.device("cpu"), torch.float32)), expected)
    assert_equal(streamed_logits(tmp_path / "again"), expected, pruned)


def test_load_model_accepts_our_file_only(pruned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pruned, tmp_path / "copy")
    assert torch.equal(logits(load_model(copy, torch.device("cpu"), torch.float32)), logits(load(pruned)))
    marker = tmp_path / "ran"
    with (copy / MODELING_NAME).open("a") as handle:
        handle.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    with pytest.raises(CheckpointError, match="not one that structprune writes"):
        load_model(copy, torch.device("cpu"), torch.float32)
    (copy / MODELING_NAME).unlink()
    with pytest.raises(CheckpointError, match="lacks its modelling file"):
        load_model(copy, torch.device("cpu"), torch.float32)
    assert not marker.exists()


def test_load_model_runs_nothing_else_that_the_config_names(pruned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pruned, tmp_path / "copy")
    marker = tmp_path / "ran"
    (copy / "other.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: ...\n")
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef generate(): ...\n")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "other.Config")
    (copy / "config.json").write_text(json.dumps(config))
    load_model(copy, torch.device("cpu"), torch.float32)
    StockModel(CheckpointReader(copy))
    assert not marker.exists()


def test_pruned_again_keeps_the_other_widths(pruned: Path, tmp_path: Path) -> None:
    """A second pruning of the MLP leaves the attention's widths of the first one."""
    kept = [8, 16, kept_units(kind_of(pruned))["mlp"][2]]
    twice = write_per_layer(pruned, tmp_path / "twice", {"mlp": kept})
    stock = StockModel(CheckpointReader(twice))
    first = StockModel(CheckpointReader(pruned))
    for block, before in zip(stock.layout.blocks, first.layout.blocks, strict=True):
        assert block.group("mlp").num_units == kept[block.index]
        assert block.group("attention") == before.group("attention")
        assert first.resized_config({"mlp": 8}, block.index).hidden_size == 32
    with pytest.raises(UnsupportedError, match="different widths"):
        first.resized_config({"mlp": 8})
    assert_equal(logits(load(twice)), streamed_logits(twice), pruned)


def test_stock_model_refuses_other_per_layer_entries(pruned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pruned, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["per_layer_config"]["1"]["skip"] = ["mlp"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="more than the widths"):
        StockModel(CheckpointReader(copy))


def test_opt_heads_have_no_per_layer_form(tiny_opt: Path) -> None:
    stock = StockModel(CheckpointReader(tiny_opt))
    reader = stock.reader
    per_layer_config(reader.config, stock, {"attention": [4, 4]})
    with pytest.raises(UnsupportedError, match="fewer attention units"):
        per_layer_config(reader.config, stock, {"attention": [4, 2]})


def test_head_dim_is_written_when_attention_shrinks(tiny_llama: Path) -> None:
    stock = StockModel(CheckpointReader(tiny_llama))
    reader = stock.reader
    config = {name: value for name, value in reader.config.items() if name != "head_dim"}
    assert per_layer_config(config, stock, {"attention": [1, 2]})["head_dim"] == 8
    assert stock.resized_config({"attention": 1}).to_dict()["head_dim"] == 8


@pytest.mark.parametrize("method", ["fasp", "structprune"])
def test_protected_blocks_keep_their_width(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        method=method,
        sparsity=0.25,
        calibration=str(text_file),
        num_samples=4,
        seq_len=32,
        multiple_of=1,
        protect_first=1,
    )
    report = prune(tiny_llama, recipe, tmp_path / "out")
    assert [b.kept_units for b in report.blocks] == [48, 24]
    assert report.size.removed_share_of_scope == 0.25


def test_outer_iterations_price_the_pruned_model(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> Any:
        settings: dict[str, Any] = {"method": "structprune", "sparsity": 0.4, "calibration": str(text_file)}
        settings |= {"num_samples": 8, "seq_len": 32, "multiple_of": 1, "dtype": "float32", **changes}
        return prune(tiny_llama, Recipe.build(**settings), tmp_path / name)

    once, again = run("once"), run("again", outer_iterations=1)
    repeated = run("repeated", outer_iterations=1)
    assert again.size.removed_share_of_scope >= 0.4
    # The first block sees the same input either way, the second a pruned one: its cost, and so the widths, change.
    assert [b.kept_units for b in again.blocks] != [b.kept_units for b in once.blocks]
    assert [b.kept_units for b in again.blocks] == [b.kept_units for b in repeated.blocks]
    assert again.memory.measured_peak_bytes <= again.memory.planned_peak_bytes
    with pytest.raises(UnsupportedError, match="outer iteration changes nothing"):
        run("uniform", outer_iterations=1, allocator="uniform")


@pytest.mark.parametrize("score", ["magnitude", "wanda", "l2", "obs", "loss", "greedy-swap"])
def test_every_score_by_name(score: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        method="structprune", score=score, sparsity=0.4, calibration=str(text_file), num_samples=8, seq_len=32
    )
    report = prune(tiny_llama, recipe.model_copy(update={"multiple_of": 1}), tmp_path / "out")
    assert report.recipe.score == score
    assert report.size.removed_share_of_scope >= 0.4
