"""Prune tiny random models through the Python entry point and compare every output with stock transformers."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import structprune
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.planning import host as host_plan
from structprune.errors import MemoryBudgetError
from structprune.memory import parse_bytes
from structprune.methods import METHODS
from structprune.recipe import Recipe, ResolvedRecipe
from structprune.recipe.limits import TARGETS
from structprune.solvers import SOLVERS
from support.combinations import by_pairs
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

# What the tests need to know about a family, stated independently of the package's own layout.
WIDTH_FIELD = {"llama": "intermediate_size", "opt": "ffn_dim"}
BLOCKS = {"llama": "model.layers", "opt": "model.decoder.layers"}
PRODUCERS = {
    "llama": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "opt": ("fc1.weight", "fc1.bias"),
}
CONSUMER = {"llama": "mlp.down_proj.weight", "opt": "fc2.weight"}
MLP_PARAMETERS = {"llama": 3 * 48 * 32, "opt": 2 * 48 * 32 + 48 + 32}
UNIT_PARAMETERS = {"llama": 3 * 32, "opt": 2 * 32 + 1}
NUM_BLOCKS = 2
NUM_CHANNELS = 48

UNASKED = {"device_memory", "widths", "latency_table", "vocabulary", *TARGETS}
"""Fields of a resolved recipe that may stay empty."""

SINGLE = "5GB"
MANY = "20KB"


def recipe(text_file: Path, **changes: Any) -> Recipe:
    return Recipe.build(
        **{
            "method": "fasp",
            "calibration": str(text_file),
            "num_samples": 8,
            "seq_len": 32,
            "dtype": "float32",
            "device": "cpu",
            "multiple_of": 1,
            **changes,
        }
    )


def tensors_of(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        loaded = load_file(path)
        assert not set(loaded) & set(tensors)
        tensors |= loaded
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def logits(model: Any, ids_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids_BS).logits


def stock_perplexity(model: Any, windows_NS: Tensor) -> float:
    labels_T = windows_NS[:, 1:].reshape(-1)
    logits_TV = logits(model, windows_NS)[:, :-1].reshape(len(labels_T), -1)
    return math.exp(torch.nn.functional.cross_entropy(logits_TV, labels_T).item())


def copy_with(source: Path, target: Path, **config: Any) -> Path:
    """A copy of the model directory with other config entries."""
    shutil.copytree(source, target)
    merged = read_json(target / "config.json") | config
    (target / "config.json").write_text(json.dumps(merged), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def sources(tiny_llama: Path, tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(family, shard size) -> model directory."""
    root = tmp_path_factory.mktemp("sources")
    return {
        ("llama", SINGLE): tiny_llama,
        ("opt", SINGLE): tiny_opt,
        ("llama", MANY): save_tiny("llama", root / "llama", max_shard_size=MANY),
        ("opt", MANY): save_tiny("opt", root / "opt", max_shard_size=MANY),
    }


def test_the_sources_have_one_and_many_shards(sources: dict[tuple[str, str], Path]) -> None:
    for (_, size), directory in sources.items():
        num_shards = len(list(directory.glob("*.safetensors")))
        assert num_shards == 1 if size == SINGLE else num_shards > 2


# `flap` adds biases, which the dense model of the comparison has no place for; see test_attention.py.
UNIT_METHODS = [name for name in METHODS if METHODS.get(name).pipeline == "units"]
UNBIASED = [name for name in UNIT_METHODS if METHODS.get(name).solver != "bias"]


@pytest.mark.parametrize(("method", "family", "size"), by_pairs(UNBIASED, ["llama", "opt"], [SINGLE, MANY]))
def test_result_is_the_masked_dense_model(
    method: str, family: str, size: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    source, output = sources[family, size], tmp_path / "out"
    structprune.prune(source, recipe(text_file, method=method, structure="uniform"), output)

    pruned, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    kept_indices = read_json(output / "pruning_manifest.json")["kept_indices"]
    assert list(kept_indices) == [str(index) for index in range(NUM_BLOCKS)]
    before, after = tensors_of(source), tensors_of(output)
    assert set(before) == set(after)

    dense = AutoModelForCausalLM.from_pretrained(source)
    expected = dict(before)
    width = getattr(pruned.config, WIDTH_FIELD[family])
    for index in range(NUM_BLOCKS):
        prefix = f"{BLOCKS[family]}.{index}."
        kept = kept_indices[str(index)]["mlp"]
        assert kept == sorted(set(kept))
        assert len(kept) == width < NUM_CHANNELS
        assert kept[0] >= 0
        assert kept[-1] < NUM_CHANNELS
        for name in PRODUCERS[family]:
            expected[prefix + name] = before[prefix + name][kept]
            if "producers" in SOLVERS.get(METHODS.get(method).solver).changes:
                expected[prefix + name] = after[prefix + name]
                dense.get_parameter(prefix + name).data[kept] = after[prefix + name]
        consumer = prefix + CONSUMER[family]
        if METHODS.get(method).solver == "mask-only":
            expected[consumer] = before[consumer][:, kept]
        else:
            # Solved anew: not the cut weight, whatever it is; the logits below use it as written.
            assert (after[consumer] - before[consumer][:, kept]).abs().max() > 1e-3
            expected[consumer] = after[consumer]
        scattered = torch.zeros_like(before[consumer])
        scattered[:, kept] = after[consumer]
        dense.get_parameter(consumer).data.copy_(scattered)
    for name, tensor in expected.items():
        assert torch.equal(after[name], tensor), name

    ids_BS = torch.randint(0, 250, (2, 48), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(pruned, ids_BS), logits(dense, ids_BS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_methods_decide_differently(
    family: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    source = sources[family, SINGLE]
    kept: dict[str, Any] = {}
    for method in ("fasp", "wanda-sp", "magnitude"):
        structprune.prune(source, recipe(text_file, method=method, structure="uniform"), tmp_path / method)
        kept[method] = read_json(tmp_path / method / "pruning_manifest.json")["kept_indices"]
    # The first block sees the same activations and has the same score in both; magnitude sees no activations.
    assert kept["fasp"]["0"] == kept["wanda-sp"]["0"]
    assert kept["magnitude"]["0"] != kept["fasp"]["0"]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_least_squares_comes_closer_than_the_mask(
    family: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    fasp = structprune.prune(sources[family, SINGLE], recipe(text_file, method="fasp"), tmp_path / "fasp")
    wanda = structprune.prune(sources[family, SINGLE], recipe(text_file, method="wanda-sp"), tmp_path / "wanda")
    for block in fasp.blocks:
        assert block.error is not None
        assert block.error_mask_only is not None
        assert 0 < block.error < 0.9 * block.error_mask_only < 0.9
    for block in wanda.blocks:
        assert block.error == pytest.approx(block.error_mask_only)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_fasp_is_least_squares_block_after_block(
    family: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    """The written consumer solves the ridge problem on the inputs that the model pruned so far gives it."""
    source, text = sources[family, SINGLE], tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes()[: 8 * 32])
    report = structprune.prune(source, recipe(text, damping=1e-3, held_out=0), tmp_path / "out")
    ids_NS = torch.tensor(
        AutoTokenizer.from_pretrained(source)(text.read_text(), add_special_tokens=False)["input_ids"]
    )
    ids_NS = ids_NS.reshape(8, 32)
    kept_indices = read_json(tmp_path / "out" / "pruning_manifest.json")["kept_indices"]
    after = tensors_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source)
    for index in range(NUM_BLOCKS):
        name = f"{BLOCKS[family]}.{index}.{CONSUMER[family]}"
        seen: list[Tensor] = []
        consumer = model.get_submodule(name.removesuffix(".weight"))
        handle = consumer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        logits(model, ids_NS)
        handle.remove()
        x_TI = seen[0].reshape(-1, NUM_CHANNELS).double()
        weight_OI = consumer.weight.detach().double()
        # The lowest scores |W_ij| |x_j| go.
        score_I = weight_OI.abs().sum(dim=0) * x_TI.norm(dim=0)
        kept = kept_indices[str(index)]["mlp"]
        assert kept == sorted(score_I.topk(len(kept)).indices.tolist())
        # Ridge drawn toward the original weight, as ordinary least squares on stacked rows.
        root = (1e-3 * x_TI[:, kept].square().sum(dim=0).mean()).sqrt()
        rows = torch.cat([x_TI[:, kept], root * torch.eye(len(kept), dtype=torch.float64)])
        target = torch.cat([x_TI @ weight_OI.T, root * weight_OI[:, kept].T])
        expected_OK = torch.linalg.lstsq(rows, target).solution.T
        torch.testing.assert_close(after[name], expected_OK.float(), rtol=1e-3, atol=1e-4)
        error = (x_TI @ weight_OI.T - x_TI[:, kept] @ expected_OK.T).square().sum()
        error /= (x_TI @ weight_OI.T).square().sum()
        assert report.blocks[index].error == pytest.approx(error.item(), rel=1e-3)
        scattered = torch.zeros_like(consumer.weight)
        scattered[:, kept] = after[name]
        consumer.weight.data.copy_(scattered)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_companions_travel(family: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path) -> None:
    source = copy_with(sources[family, SINGLE], tmp_path / "source", house_note={"kept": ["as", "it", "is"]})
    (source / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    GenerationConfig(max_new_tokens=7, bos_token_id=0, eos_token_id=0).save_pretrained(source)
    (source / "LICENSE").write_text("do as you like")
    (source / "notes.bin").write_bytes(b"not part of a checkpoint")
    output = tmp_path / "out"
    structprune.prune(source, recipe(text_file), output)

    before, after = read_json(source / "config.json"), read_json(output / "config.json")
    assert before.pop(WIDTH_FIELD[family]) == NUM_CHANNELS
    assert after.pop(WIDTH_FIELD[family]) == 33
    assert after == before
    for name in ("generation_config.json", "chat_template.jinja", "LICENSE", "tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    assert GenerationConfig.from_pretrained(output).max_new_tokens == 7
    assert not (output / "notes.bin").exists()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("two words")["input_ids"] == AutoTokenizer.from_pretrained(source)("two words")["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"


def test_companions_that_the_source_lacks_are_not_invented(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    source = copy_with(tiny_llama, tmp_path / "source")
    (source / "generation_config.json").unlink()
    structprune.prune(source, recipe(text_file), tmp_path / "out")
    present = {path.name for path in (tmp_path / "out").iterdir()}
    assert present == {
        "config.json",
        "pruning_widths.json",
        "model.safetensors",
        "README.md",
        "pruning_manifest.json",
        "pruning_report.html",
        "pruning_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_report_and_manifest(
    family: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    source, output = sources[family, MANY], tmp_path / "out"
    asked = recipe(text_file, seed=3, max_shard_size=MANY)
    report = structprune.prune(source, asked, output)
    manifest, written = read_json(output / "pruning_manifest.json"), read_json(output / "pruning_report.json")
    assert written == report.to_dict()

    dense = AutoModelForCausalLM.from_pretrained(source)
    pruned = AutoModelForCausalLM.from_pretrained(output)
    num_before = sum(p.numel() for p in dense.parameters())
    num_after = sum(p.numel() for p in pruned.parameters())
    in_blocks = sum(p.numel() for p in dense.get_submodule(BLOCKS[family]).parameters())
    removed = num_before - num_after
    size = report.size
    assert (size.parameters_before, size.parameters_after) == (num_before, num_after)
    assert removed == NUM_BLOCKS * 15 * UNIT_PARAMETERS[family]
    assert size.removed_share_of_scope == pytest.approx(removed / (NUM_BLOCKS * MLP_PARAMETERS[family]), rel=1e-12)
    assert size.removed_share_of_blocks == pytest.approx(removed / in_blocks, rel=1e-12)
    assert size.removed_share_of_model == pytest.approx(removed / num_before, rel=1e-12)
    # At least what was asked, and one unit per block less would have been too little.
    assert size.removed_share_of_scope >= asked.sparsity
    assert size.removed_share_of_scope - UNIT_PARAMETERS[family] / MLP_PARAMETERS[family] < asked.sparsity
    assert size.bytes_before == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size.bytes_after == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert size.bytes_before > size.bytes_after

    index = read_json(output / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": 4 * num_after, "total_parameters": num_after}
    for name, shard in index["weight_map"].items():
        assert name in load_file(output / shard)

    assert [(block.block, block.kind, block.num_units, block.kept_units) for block in report.blocks] == [
        (0, "mlp", 48, 33),
        (1, "mlp", 48, 33),
    ]
    assert (report.output, report.source, report.family, report.method) == (str(output), str(source), family, "fasp")
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes <= report.memory.budget_bytes
    assert report.memory.planned_peak_bytes == max(report.memory.phases.values())

    assert set(manifest) == {
        "structprune",
        "recipe",
        "source_fingerprint",
        "held_out",
        "calibration",
        "kept_indices",
        "versions",
    }
    assert ResolvedRecipe.build(**manifest["recipe"]) == report.recipe
    resolved = Recipe.build(**manifest["recipe"])
    assert resolved.memory == report.memory.budget_bytes
    resolvable = ("memory", "damping", "shrinkage", "score", "allocator", "temperature", "solver", "target")
    resolvable += ("structure", "head_units", "protect_first", "protect_last", "sensitivity_samples", "held_out")
    resolvable += ("repair_samples", "time_budget", "search_generations", "search_children")
    settings = dict.fromkeys(resolvable)
    assert resolved.model_copy(update=settings) == asked
    assert {name for name, value in resolved.model_dump().items() if value is None} == UNASKED
    assert manifest["calibration"] == written["calibration"]
    assert manifest["source_fingerprint"] == report.source_fingerprint == CheckpointReader(source).fingerprint()
    assert CheckpointReader(output).fingerprint() != report.source_fingerprint
    assert manifest["structprune"] == structprune.__version__
    assert manifest["versions"] == report.versions
    for package in ("structprune", "transformers", "safetensors"):
        assert report.versions[package] == importlib.metadata.version(package)
    # With the build, which the package's own metadata may lack.
    assert report.versions["torch"] == torch.__version__


def test_auto_settings_are_resolved_in_the_manifest(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = Recipe.build(method="fasp", calibration=str(text_file), num_samples=2, seq_len=4096)
    report = structprune.prune(tiny_llama, asked, tmp_path / "out")
    manifest = read_json(tmp_path / "out" / "pruning_manifest.json")["recipe"]
    # No longer window than the model has positions.
    assert report.calibration.seq_len == manifest["seq_len"] == 256
    assert manifest["multiple_of"] == 32
    assert manifest["device"] == report.device
    assert manifest["device"] != "auto"
    assert manifest["dtype"] == report.compute_dtype
    assert manifest["dtype"] != "auto"
    assert {name for name, value in manifest.items() if value is None} == UNASKED


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_calibration_of_the_report(
    family: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Four windows of text, eight asked: one is held out and said so; the perplexities are those of stock models."""
    source, text = sources[family, SINGLE], tmp_path / "four.txt"
    text.write_bytes(text_file.read_bytes()[: 4 * 32 + 5])
    report = structprune.prune(source, recipe(text), tmp_path / "out")
    calibration = report.calibration
    assert (calibration.num_windows, calibration.seq_len, calibration.perplexity_windows) == (3, 32, 3)
    assert calibration.name == str(text)
    assert "four.txt" in calibration.description
    assert "8 were asked for" in calibration.description
    assert "1 of its 4 windows held out" in calibration.description
    assert report.recipe.num_samples == 3
    ids = AutoTokenizer.from_pretrained(source)(text.read_text(), add_special_tokens=False)["input_ids"]
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    drawn_NS = torch.tensor(ids[: 4 * 32]).reshape(4, 32)[order]
    windows_NS, held_out_NS = drawn_NS[:3], drawn_NS[3:]
    dense = AutoModelForCausalLM.from_pretrained(source)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert calibration.dense_perplexity == pytest.approx(stock_perplexity(dense, windows_NS), rel=1e-4)
    assert calibration.pruned_perplexity == pytest.approx(stock_perplexity(pruned, windows_NS), rel=1e-4)
    assert calibration.dense_perplexity != calibration.pruned_perplexity
    assert report.held_out is not None
    assert report.held_out.dense_perplexity == pytest.approx(stock_perplexity(dense, held_out_NS), rel=1e-4)
    assert report.held_out.pruned_perplexity == pytest.approx(stock_perplexity(pruned, held_out_NS), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_seed_decides(family: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path) -> None:
    source = sources[family, SINGLE]
    first, second, other = (
        structprune.prune(source, recipe(text_file, seed=seed), tmp_path / name)
        for name, seed in (("first", 5), ("second", 5), ("other", 6))
    )
    assert shard_bytes(tmp_path / "first") == shard_bytes(tmp_path / "second")
    assert first.calibration.fingerprint == second.calibration.fingerprint
    assert shard_bytes(tmp_path / "first") != shard_bytes(tmp_path / "other")
    assert first.calibration.fingerprint != other.calibration.fingerprint


def test_sharding_of_the_source_leaves_no_trace(
    sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    for size in (SINGLE, MANY):
        structprune.prune(sources["llama", size], recipe(text_file), tmp_path / size)
    assert shard_bytes(tmp_path / SINGLE) == shard_bytes(tmp_path / MANY)


@pytest.mark.parametrize(("multiple_of", "width"), [(1, 33), (8, 32), (20, 20), (33, 33), (None, 32)])
def test_multiple_of(multiple_of: int | None, width: int, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = structprune.prune(tiny_llama, recipe(text_file, multiple_of=multiple_of), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == width
    assert [block.kept_units for block in report.blocks] == [width, width]
    assert report.size.removed_share_of_scope == pytest.approx((48 - width) / 48)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *((method, "llama") for method in UNIT_METHODS),
        ("structprune", "opt"),
        *(pytest.param(method, "opt", marks=pytest.mark.slow) for method in UNIT_METHODS if method != "structprune"),
    ],
)
def test_sparsity_zero_changes_nothing(
    method: str, family: str, sources: dict[tuple[str, str], Path], text_file: Path, tmp_path: Path
) -> None:
    source = sources[family, MANY]
    report = structprune.prune(
        source, recipe(text_file, method=method, structure="uniform", sparsity=0.0, multiple_of=None), tmp_path / "out"
    )
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].dtype == tensor.dtype
    assert read_json(tmp_path / "out" / "config.json") == read_json(source / "config.json")
    assert report.size.removed_share_of_model == 0
    assert report.calibration.pruned_perplexity == pytest.approx(report.calibration.dense_perplexity, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_bfloat16_stays_bfloat16(compute: str, family: str, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source", dtype=torch.bfloat16)
    report = structprune.prune(source, recipe(text_file, dtype=compute), tmp_path / "out")
    assert report.compute_dtype == compute
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert torch.isfinite(logits(model, torch.arange(40)[None])).all()


def test_file_store_gives_the_same_bytes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tokenizer needs more than all hidden states of a model of this size, and would be the budget.
    monkeypatch.setattr(host_plan, "_TEXT_BYTES", 0)
    # One window per micro-batch whatever the budget, and hidden states of 1.25 MiB, more than the budget's slack.
    source = copy_with(tiny_llama, tmp_path / "source", max_position_embeddings=2048)
    # Beside a model of this size, what loads the result would need most.
    settings = recipe(text_file, num_samples=5, seq_len=2048, reload_check=False)
    roomy = structprune.prune(source, settings, tmp_path / "memory")
    assert roomy.memory.store == "memory"
    assert roomy.memory.micro_batch_windows == 1

    def with_budget(num_bytes: int) -> Recipe:
        return settings.model_copy(update={"memory": num_bytes})

    with pytest.raises(MemoryBudgetError) as caught:
        structprune.prune(source, with_budget(1), tmp_path / "none")
    wanted = parse_bytes(str(caught.value.wanted).removeprefix("at least "))
    tight = structprune.prune(source, with_budget(wanted), tmp_path / "file")
    assert tight.memory.store == "file"
    assert tight.memory.budget_bytes == wanted
    assert shard_bytes(tmp_path / "file") == shard_bytes(tmp_path / "memory")
    assert tight.calibration == roomy.calibration
    assert not (tmp_path / "file.partial").exists()

    # The budget that was named is the smallest one but for rounding.
    assert 0 <= wanted - tight.memory.planned_peak_bytes < 2 * 2**20
    with pytest.raises(MemoryBudgetError):
        structprune.prune(source, with_budget(tight.memory.planned_peak_bytes - 1), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "none.partial").exists()


def test_untied_head_and_biases(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama-untied-biased", tmp_path / "source", max_shard_size=MANY)
    structprune.prune(source, recipe(text_file), tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    kept = read_json(tmp_path / "out" / "pruning_manifest.json")["kept_indices"]["1"]["mlp"]
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    for name in ("mlp.up_proj.bias", "mlp.gate_proj.bias"):
        assert torch.equal(after[f"model.layers.1.{name}"], before[f"model.layers.1.{name}"][kept])
    assert torch.equal(after["model.layers.1.mlp.down_proj.bias"], before["model.layers.1.mlp.down_proj.bias"])
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
