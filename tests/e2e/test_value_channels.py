"""V/O pairs: every KV head keeps as many value channels, and what is written loads, runs and can go on being pruned.

The imported tests are those of every per-layer checkpoint; here they run on this file's `pruned`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_per_layer import (
    IDS_BS,
    check_exports,
    load,
    logits,
    test_auto_model_loads_the_same_blocks,  # noqa: F401
    test_eager_and_sdpa_agree_and_reach_every_layer,  # noqa: F401
    test_from_pretrained_equals_the_streamed_blocks,  # noqa: F401
    test_generation_with_both_caches_equals_recomputing,  # noqa: F401
    test_load_model_accepts_our_file_only,  # noqa: F401
    test_save_pretrained_keeps_the_model,  # noqa: F401
    write_per_layer,
)
from torch import Tensor

import structprune
from structprune import Recipe
from structprune.api import check, inspect_with_runtimes, plan
from structprune.architectures.families.common import head_size
from structprune.architectures.modeling.per_layer import MODELING_NAME, modeling_source
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel, output_tensor
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, InputError, UnsupportedError
from structprune.evaluation.reload import ReloadSpec, reload_here
from structprune.results.report import PruneReport
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("llama", "llama-untied-biased", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
# Of two KV heads; block 1 keeps all channels of the smallest heads, which are 8 wide.
KEPT = {"mlp": [16, 40, 27], "attention": [6, 16, 2]}


@pytest.fixture(scope="module", params=KINDS)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, modules_cache: None) -> Path:
    """A checkpoint with other numbers of value channels in every block."""
    root = tmp_path_factory.mktemp("value-channels")
    source = save_tiny(request.param, root / "dense", num_blocks=3)
    return write_per_layer(source, root / f"narrow-{request.param}", KEPT, "value-channel")


@pytest.mark.parametrize(
    "pruned",
    [pytest.param(kind, marks=() if kind in ("llama", "gemma2") else pytest.mark.slow) for kind in KINDS],
    indirect=True,
)
def test_exports(pruned: Path) -> None:
    check_exports(pruned)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, modules_cache: None) -> Path:
    """One of them, where the family does not matter."""
    root = tmp_path_factory.mktemp("narrow")
    return write_per_layer(save_tiny("llama", root / "dense", num_blocks=3), root / "narrow", KEPT, "value-channel")


def run(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    settings: dict[str, Any] = {"method": "fasp", "scope": "all", "sparsity": 0.3, "calibration": str(text_file)}
    settings |= {"num_samples": 8, "seq_len": 32, "dtype": "float32", "multiple_of": 1, **changes}
    return structprune.prune(source, Recipe.build(**settings), output)


def refusal(source: Path, **changes: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        check(
            source, Recipe.build(**{"method": "fasp", "scope": "all", "dtype": "float32", "multiple_of": 1, **changes})
        )
    return str(caught.value)


@torch.no_grad()
def streamed(stock: StockModel) -> Tensor:
    """Logits, the blocks one by one."""
    hidden_BSD, inputs = stock.embed(IDS_BS, stock.reader.read(stock.embedding_tensors()))
    for block in stock.layout.blocks:
        module = stock.block(block.index, stock.reader.read(block.shapes, block.prefix))
        hidden_BSD = output_tensor(module(hidden_BSD, **inputs.kwargs[block.index]))
    return stock.head(stock.reader.read(stock.head_tensors()))(hidden_BSD)


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def kept_of(directory: Path) -> Any:
    return json.loads((directory / "pruning_manifest.json").read_text(encoding="utf-8"))["kept_indices"]


def test_each_kv_head_keeps_as_many(pruned: Path) -> None:
    tensors = tensors_of(pruned)
    stock = StockModel(CheckpointReader(pruned))
    size = head_size(stock.config)
    for block, count in zip(stock.layout.blocks, KEPT["attention"], strict=True):
        assert block.shapes["self_attn.q_proj.weight"][0] == 4 * size
        assert block.shapes["self_attn.v_proj.weight"][0] == count
        assert block.shapes["self_attn.o_proj.weight"][1] == 2 * count
        assert all(tensors[block.prefix + name].shape == shape for name, shape in block.shapes.items())
    config = read_config(pruned)
    assert config["v_head_dim"] == size
    assert [fields["v_head_dim"] for fields in config["per_layer_config"].values()] == [3, 8, 1]
    assert (pruned / MODELING_NAME).read_text(encoding="utf-8") == modeling_source(stock.family, narrow=True)


def test_eager_attention_computes_the_same_bits(pruned: Path) -> None:
    stock = StockModel(CheckpointReader(pruned))
    for config in (stock.config, *stock.block_configs):
        config._attn_implementation = "eager"
    assert torch.equal(logits(load(pruned, "eager")), streamed(stock))


def test_the_layout_of_narrow_heads_counts_every_parameter_once(pruned: Path) -> None:
    stock = StockModel(CheckpointReader(pruned))
    for block in stock.layout.blocks:
        group = block.group("attention")
        owned = {piece.tensor for piece in group.slices}
        others = [n for n in block.shapes if n.startswith(group.module_prefix) and n not in owned]
        rest = sum(torch.Size(block.shapes[name]).numel() for name in others)
        assert group.num_units * block.unit_parameters(group) + rest == block.module_parameters(group)


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_moe"])
def test_fasp_prunes_pairs(kind: str, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny(kind, tmp_path / "model")
    multiple = 8 if kind == "qwen3_moe" else 1
    report = run(source, tmp_path / "out", text_file, multiple_of=multiple)
    assert (report.recipe.head_units, report.recipe.structure) == ("value-channel", "per-layer")
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-5
    layout = StockModel(CheckpointReader(source), "value-channel").layout
    sublayers = {b.kind: b for b in report.blocks}
    owned = {
        kind: sum(p.num_units * layout.blocks[0].unit_parameters(p) for p in layout.blocks[0].groups_of(kind))
        for kind in sublayers
    }
    in_scope = sum(layout.blocks[0].module_parameters(layout.blocks[0].group(kind)) for kind in sublayers)
    share = 0.3 * in_scope / sum(owned.values())
    for sublayer in report.blocks:
        group = layout.blocks[sublayer.block].group(sublayer.kind)
        step = multiple if sublayer.kind == "mlp" else max(2, multiple)
        # The same share of what units own goes of both sublayers, to the next step.
        assert sublayer.kept_units % step == 0
        assert 0 <= (1 - share) * group.num_units - sublayer.kept_units < step
        assert sublayer.error is not None
        assert sublayer.error <= (sublayer.error_mask_only or 0)
    assert report.size.removed_share_of_scope >= 0.3
    kept = kept_of(tmp_path / "out")
    for sublayer in report.blocks:
        if sublayer.kind == "attention":
            size = sublayer.num_units // 2
            first = [unit for unit in kept[str(sublayer.block)]["attention"] if unit < size]
            assert len(first) == sublayer.kept_units // 2


def test_the_kept_channels_are_the_best_of_each_head(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Without a refit the output holds the source's rows and columns, in their order."""
    run(tiny_llama, tmp_path / "out", text_file, scope="attention", sparsity=0.25, solver="mask-only")
    before, after = tensors_of(tiny_llama), tensors_of(tmp_path / "out")
    kept = kept_of(tmp_path / "out")
    for block in ("0", "1"):
        units = kept[block]["attention"]
        assert [unit // 8 for unit in units] == [0] * 4 + [1] * 4
        prefix = f"model.layers.{block}.self_attn."
        assert torch.equal(after[prefix + "v_proj.weight"], before[prefix + "v_proj.weight"][units])
        # Query heads 0 and 1 read KV head 0, heads 2 and 3 KV head 1.
        columns = [head * 8 + unit % 8 for head in range(4) for unit in units if unit // 8 == head // 2]
        assert torch.equal(after[prefix + "o_proj.weight"], before[prefix + "o_proj.weight"][:, columns])
        for module in ("q_proj", "k_proj"):
            assert torch.equal(after[prefix + f"{module}.weight"], before[prefix + f"{module}.weight"])


def test_a_channel_that_adds_nothing_goes_first(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    model: Any = load_model(source, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for head, channel in ((0, 3), (1, 6)):
            model.model.layers[0].self_attn.v_proj.weight[head * 8 + channel] *= 1e-6
            model.model.layers[1].self_attn.o_proj.weight[:, [(2 * head + i) * 8 + channel for i in (0, 1)]] *= 1e-6
    model.save_pretrained(source)
    report = run(source, tmp_path / "out", text_file, scope="attention", sparsity=0.06)
    assert [block.kept_units for block in report.blocks] == [14, 14]
    assert kept_of(tmp_path / "out")["0"]["attention"] == [u for u in range(16) if u not in (3, 14)]
    assert kept_of(tmp_path / "out")["1"]["attention"] == [u for u in range(16) if u not in (3, 14)]
    calibration = report.calibration
    assert calibration.pruned_perplexity == pytest.approx(calibration.dense_perplexity, rel=1e-3)


def test_the_same_run_twice_gives_the_same_bytes(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tiny_llama, tmp_path / name, text_file)
    assert kept_of(tmp_path / "a") == kept_of(tmp_path / "b")
    for path in sorted((tmp_path / "a").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


OTHERS: dict[str, dict[str, Any]] = {
    "structprune": {"method": "structprune"},
    "whole sublayers": {"method": "structprune", "sparsity": 0.4, "allow_block_removal": True},
    "prices for fasp": {"allocator": "closed-form"},
    "scores compared": {"method": "flap"},
    "greedy": {"method": "osscar", "score": "greedy"},
    "penalty": {"score": "penalty"},
    "taylor": {"method": "llm-pruner", "scope": "attention", "sparsity": 0.2},
    "random": {"method": "random"},
    "protected": {"protect_first": 1, "sparsity": 0.2},
    "nothing": {"sparsity": 0.0},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_take_pairs(name: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = run(tiny_llama, tmp_path / "out", text_file, **{"head_units": "value-channel", **OTHERS[name]})
    assert report.recipe.structure == "per-layer"
    # The biases that flap adds count against what it removes.
    assert report.size.removed_share_of_scope >= report.recipe.sparsity - (0.03 if name == "scores compared" else 0)
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-5
    kept = kept_of(tmp_path / "out")
    for sublayer in report.blocks:
        if sublayer.kind == "attention":
            units = kept[str(sublayer.block)]["attention"]
            assert len([unit for unit in units if unit < 8]) * 2 == len(units) == sublayer.kept_units
    if name == "nothing":
        assert report.size.parameters_after == report.size.parameters_before


def test_the_mlp_may_be_pruned_again(narrow: Path, text_file: Path, tmp_path: Path) -> None:
    report = run(narrow, tmp_path / "out", text_file, scope="mlp", sparsity=0.2)
    assert report.recipe.head_units == "kv-group"
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-5
    before, after = read_config(narrow), read_config(tmp_path / "out")
    for index in ("0", "1", "2"):
        assert after["per_layer_config"][index]["v_head_dim"] == before["per_layer_config"][index]["v_head_dim"]
        prefix = f"model.layers.{index}.self_attn.v_proj.weight"
        assert torch.equal(tensors_of(tmp_path / "out")[prefix], tensors_of(narrow)[prefix])


def test_attention_is_not_pruned_again(narrow: Path) -> None:
    for head_units in (None, "kv-group", "query-head"):
        message = refusal(narrow, scope="attention", head_units=head_units)
        assert "heads have lost value channels" in message
        assert "wanted --scope mlp" in message


@pytest.mark.parametrize("first", ["kv-group", "query-head"])
def test_pairs_go_after_whole_heads(first: str, text_file: Path, tmp_path: Path) -> None:
    """Blocks that have lost different numbers of heads lose value channels of those that are left, and query heads."""
    source = save_tiny("llama", tmp_path / "model", num_blocks=3)
    if first == "kv-group":
        write_per_layer(source, tmp_path / "heads", {"attention": [1, 2, 1]})
    else:
        write_per_layer(source, tmp_path / "heads", {"attention": [1, 2, 1]}, "query-head")
    heads = [1, 2, 1] if first == "kv-group" else [2, 2, 2]
    report = run(tmp_path / "heads", tmp_path / "out", text_file)
    assert [b.num_units for b in report.blocks if b.kind == "attention"] == [8 * count for count in heads]
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-5
    if first == "kv-group":
        again = run(tmp_path / "heads", tmp_path / "again", text_file, head_units="query-head", sparsity=0.1)
        layers = read_config(tmp_path / "again")["per_layer_config"]
        kept = [b.kept_units for b in again.blocks if b.kind == "attention"]
        assert [layers[str(i)]["num_attention_heads"] for i in range(3)] == [
            h * k for h, k in zip(heads, kept, strict=True)
        ]


def test_what_is_refused(tiny_llama: Path, tiny_opt: Path, tmp_path: Path) -> None:
    assert "no stock config has heads with fewer value channels" in refusal(tiny_llama, structure="uniform")
    assert "from one KV head to another" in refusal(tiny_llama, score="greedy-swap")
    assert "no layer of OPT with fewer value channels" in refusal(tiny_opt)
    message = refusal(save_tiny("phi3", tmp_path / "phi3"))
    assert "no layer of Phi-3 with fewer value channels" in message
    assert "--head-units kv-group or query-head" in message
    recipe = Recipe.build(method="fasp", scope="attention", sparsity=0.5, dtype="float32", multiple_of=1)
    # Half of the attention is query and key maps, which no value channel owns.
    with pytest.raises(InputError, match="no attention units would be left"):
        check(tiny_llama, recipe)


def test_whole_heads_are_still_there_for_the_asking(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = run(tiny_llama, tmp_path / "out", text_file, head_units="kv-group", sparsity=0.4)
    assert report.recipe.structure == "uniform"
    assert read_config(tmp_path / "out")["num_key_value_heads"] == 1


def test_plan_and_inspect_name_the_runtimes(narrow: Path, tiny_llama: Path) -> None:
    settings: dict[str, Any] = {
        "method": "fasp",
        "scope": "all",
        "sparsity": 0.3,
        "calibration": "self",
        "multiple_of": 1,
    }
    for found in (
        plan(tiny_llama, Recipe.build(**settings)).runtimes,
        plan(tiny_llama, Recipe.build(**settings, allocator="closed-form")).runtimes,
        inspect_with_runtimes(narrow)[1],
    ):
        answers = {support.runtime: support.loads for support in found}
        assert answers.pop("transformers") == "yes"
        assert set(answers.values()) == {"no"}


@pytest.mark.parametrize(("processes", "kept"), [(1, 10), (2, 8)])
def test_processes_share_whole_heads(processes: int, kept: int, tiny_llama: Path) -> None:
    """Widths of values need not divide; with two processes the rows of each are a multiple."""
    recipe = Recipe.build(
        method="fasp", scope="all", sparsity=0.3, multiple_of=2, tensor_parallel=processes, dtype="float32"
    )
    found = check(tiny_llama, recipe).forecast
    assert found.kept is not None
    assert found.kept["attention"] == [kept, kept]
    assert found.shape.indivisible is None


@pytest.mark.parametrize("mode", ["whole", "streamed"])
def test_both_ways_of_the_reload_check(mode: Literal["whole", "streamed"], narrow: Path, tmp_path: Path) -> None:
    found = logits(load(narrow))[0]
    save_file({"ids_S": IDS_BS[0], "logits_SV": found}, tmp_path / "probe.safetensors")
    spec = ReloadSpec(directory=narrow, probe=tmp_path / "probe.safetensors", mode=mode, dtype="float32")
    result = reload_here(spec)
    assert (result.error, result.impossible) == (None, None)
    assert result.relative_difference < 1e-6


def test_gguf_is_refused(narrow: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="fewer value channels than key channels"):
        structprune.api.export(narrow, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("value", [0, -1, 9, 2.5, True, "4"])
def test_a_width_that_is_none_is_named(value: object, narrow: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(narrow, tmp_path / "copy")
    config = read_config(copy)
    size = config["v_head_dim"]
    config["per_layer_config"]["1"]["v_head_dim"] = size + 1 if value == 9 else value
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="block 1: v_head_dim is not usable"):
        StockModel(CheckpointReader(copy))


def test_a_narrow_width_for_all_blocks_is_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(read_config(copy) | {"v_head_dim": 4}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="v_head_dim is not usable"):
        StockModel(CheckpointReader(copy))


def test_the_written_model_is_the_masked_one(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path / "out", text_file, scope="attention", sparsity=0.25, solver="mask-only")
    masked: Any = load_model(tiny_llama, torch.device("cpu"), torch.float32)
    for block, kept in kept_of(tmp_path / "out").items():
        gone = torch.ones(16, dtype=torch.bool).index_fill(0, torch.tensor(kept["attention"]), False)
        with torch.no_grad():
            masked.model.layers[int(block)].self_attn.v_proj.weight[gone] = 0
    expected = logits(masked)
    found = logits(load_model(tmp_path / "out", torch.device("cpu"), torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
