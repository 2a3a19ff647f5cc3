"""Whole blocks: the distances and losses are the stock model's, and the output is that model without the blocks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_per_layer import IDS_BS, logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from structprune import Recipe, prune
from structprune.architectures import FAMILIES
from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import SourceContext, draw_windows
from structprune.checkpoint.reader import CheckpointReader
from structprune.cli import main
from structprune.engine.planning import host as host_plan
from structprune.errors import InputError, MemoryBudgetError, UnsupportedError
from structprune.memory import parse_bytes
from structprune.recipe.limits import TARGETS
from structprune.results.report import PruneReport
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_BLOCKS = 5
NUM_WINDOWS, SEQ_LEN = 7, 32


def save_deep(kind: str, directory: Path, num_blocks: int = NUM_BLOCKS) -> Path:
    """A tiny model of more blocks than the others have."""
    return save_tiny(kind, directory, num_blocks=num_blocks)


# Whole blocks go: what is in them is of no account but for the windows of their attention.
@pytest.fixture(
    scope="module",
    params=[
        *("llama", "mistral", "opt"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama-untied-biased", "opt-without-bias", "qwen2")),
    ],
)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep(request.param, tmp_path_factory.mktemp("deep") / request.param)


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep("llama", tmp_path_factory.mktemp("deep") / "llama")


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"method": "depth", "sparsity": 0.4, "calibration": str(text_file), "dtype": "float32"}
    return Recipe.build(**{**settings, "num_samples": NUM_WINDOWS, "seq_len": SEQ_LEN, "device": "cpu", **changes})


def windows(source: Path, text_file: Path) -> Tensor:
    """The windows that a run draws, by the tokenizer's own call."""
    tokenizer = AutoTokenizer.from_pretrained(source)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    context = SourceContext(
        encode=encode, render=str, sample=lambda *_: IDS_BS, num_samples=NUM_WINDOWS, seq_len=SEQ_LEN, seed=0
    )
    return draw_windows(text_file.read_text(), "text", context).ids_NS


def layers_of(model: Any) -> nn.ModuleList:
    return model.get_submodule(FAMILIES.get(model.config.model_type).blocks_module)


def stock_without(source: Path, removed: Iterable[int]) -> Any:
    """The stock model with layers taken out of its ModuleList."""
    model: Any = AutoModelForCausalLM.from_pretrained(source).eval()
    kept = [index for index in range(model.config.num_hidden_layers) if index not in set(removed)]
    layers = nn.ModuleList(layers_of(model)[index] for index in kept)
    model.set_submodule(FAMILIES.get(model.config.model_type).blocks_module, layers)
    model.config.num_hidden_layers = len(kept)
    if (types := getattr(model.config, "layer_types", None)) is not None:
        model.config.layer_types = [types[index] for index in kept]
    model.config.use_cache = False
    return model


@torch.no_grad()
def stock_loss(model: Any, ids_NS: Tensor) -> float:
    logits_TV = model(input_ids=ids_NS, use_cache=False).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits_TV, ids_NS[:, 1:].flatten()).item()


def removed_blocks(report: PruneReport) -> list[int]:
    assert [block.kind for block in report.blocks] == ["block"] * len(report.blocks)
    assert [block.kept_units for block in report.blocks] == [int(b.status == "ok") for b in report.blocks]
    return [block.block for block in report.blocks if block.kept_units == 0]


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_angular_distances_are_the_stock_models(source: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(source, recipe(text_file), tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(source).eval()
    last: list[Tensor] = []
    layers_of(model)[-1].register_forward_hook(
        lambda _, __, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        stock = model(input_ids=windows(source, text_file), output_hidden_states=True).hidden_states
    # Stock puts the final norm on the last one.
    boundaries = [hidden.double() for hidden in (*stock[:-1], last[0])]
    assert len(boundaries) == NUM_BLOCKS + 1
    expected: dict[int, float] = {}
    for first in range(NUM_BLOCKS - 1):
        cosine_NS = nn.functional.cosine_similarity(boundaries[first], boundaries[first + 2], dim=-1)
        expected[first] = float(cosine_NS.clamp(-1, 1).arccos().mean() / math.pi)
    found = {block.block: block.statistics["angular_distance"] for block in report.blocks if block.statistics}
    assert found == {first: pytest.approx(value, rel=1e-5) for first, value in expected.items()}
    start = min(expected, key=lambda first: expected[first])
    assert removed_blocks(report) == [start, start + 1]
    assert len(set(expected.values())) == len(expected)


@pytest.mark.parametrize("score", ["angular", "measured-loss"])
def test_output_is_the_stock_model_without_the_blocks(
    score: str, source: Path, text_file: Path, tmp_path: Path
) -> None:
    report = prune(source, recipe(text_file, score=score), tmp_path / "out")
    gone = removed_blocks(report)
    assert len(gone) == 2
    pruned: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(pruned) is type(AutoModelForCausalLM.from_pretrained(source))
    assert pruned.config.num_hidden_layers == len(layers_of(pruned)) == NUM_BLOCKS - 2
    expected = logits(stock_without(source, gone))
    assert torch.equal(logits(pruned), expected)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(source).eval()), atol=1e-2)
    # Names are renumbered without a gap, and the caches follow them.
    manifest = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())
    assert manifest["kept_indices"] == {"blocks": [i for i in range(NUM_BLOCKS) if i not in gone]}
    assert [layer.self_attn.layer_idx for layer in layers_of(pruned)] == [0, 1, 2]
    assert pruned.generate(IDS_BS, attention_mask=torch.ones_like(IDS_BS), max_new_tokens=3, pad_token_id=0).shape[1]
    # The perplexities of the report are those of the two stock models on the first windows.
    ids_NS = windows(source, text_file)
    assert report.calibration.perplexity_windows == NUM_WINDOWS
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    assert math.log(report.calibration.dense_perplexity) == pytest.approx(stock_loss(dense, ids_NS), rel=1e-5)
    assert math.log(report.calibration.pruned_perplexity) == pytest.approx(stock_loss(pruned, ids_NS), rel=1e-5)


def test_sizes_are_a_share_of_the_blocks(source: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(source, recipe(text_file, sparsity=0.3), tmp_path / "out")
    before = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    after = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert (report.size.parameters_before, report.size.parameters_after) == (before, after)
    assert report.size.removed_share_of_scope == report.size.removed_share_of_blocks == pytest.approx(0.4)
    assert report.size.removed_share_of_model == pytest.approx((before - after) / before)
    assert report.recipe.scope == "all"
    assert {name for name, value in report.recipe.model_dump().items() if value is None} == {
        "device_memory",
        "latency_table",
        "vocabulary",
        *TARGETS,
    }


@pytest.mark.parametrize(
    ("sparsity", "count"), [(0.0, 0), (0.01, 1), (0.2, 1), (0.21, 2), (0.6, 3), (0.61, 4), (0.8, 4)]
)
def test_the_smallest_number_of_blocks_that_is_enough(
    sparsity: float, count: int, deep_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = prune(deep_llama, recipe(text_file, sparsity=sparsity), tmp_path / "out")
    assert len(removed_blocks(report)) == count
    # A resolved recipe is a recipe: nothing that was filled in is refused.
    again = prune(deep_llama, report.recipe, tmp_path / "again")
    assert removed_blocks(again) == removed_blocks(report)


def test_measured_loss_is_brute_force(source: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(source, recipe(text_file, score="measured-loss", sensitivity_samples=3), tmp_path / "out")
    ids_NS = windows(source, text_file)[:3]
    gone: list[int] = []
    expected: dict[int, dict[str, float]] = {}
    for number in (1.0, 2.0):
        losses = {i: stock_loss(stock_without(source, [*gone, i]), ids_NS) for i in range(NUM_BLOCKS) if i not in gone}
        gone.append(min(losses, key=lambda index: losses[index]))
        expected |= {
            i: {"loss_without": pytest.approx(loss, rel=1e-5), "removal": number} for i, loss in losses.items()
        }
    assert removed_blocks(report) == sorted(gone)
    assert {block.block: block.statistics for block in report.blocks} == expected


@pytest.mark.parametrize("score", ["angular", "measured-loss"])
@pytest.mark.parametrize("index", [0, 3, NUM_BLOCKS - 1])
def test_a_block_that_does_nothing_goes(
    index: int, score: str, deep_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(deep_llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        tensors[f"model.layers.{index}.{name}"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = prune(source, recipe(text_file, sparsity=0.2, score=score), tmp_path / "out")
    if score == "angular":
        assert removed_blocks(report) == [index]
        assert report.blocks[index].statistics["angular_distance"] < 1e-6
    else:
        # Random blocks may hurt, so another one may be the better to lose; but this one costs exactly nothing.
        dense = math.log(report.calibration.dense_perplexity)
        assert report.blocks[index].statistics["loss_without"] == pytest.approx(dense, rel=1e-6)


@pytest.mark.parametrize("score", ["angular", "measured-loss"])
@pytest.mark.parametrize(("first", "last", "free"), [(1, 0, [1, 2, 3, 4]), (2, 1, [2, 3]), (0, 3, [0, 1])])
def test_protected_blocks_stay(
    first: int, last: int, free: list[int], score: str, deep_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = recipe(text_file, score=score, protect_first=first, protect_last=last)
    report = prune(deep_llama, settings, tmp_path / "out")
    gone = removed_blocks(report)
    assert len(gone) == 2
    assert set(gone) <= set(free)
    measured = [block.block for block in report.blocks if block.statistics]
    # A run of two starts one earlier than its last block.
    assert measured == (free[:-1] if score == "angular" else free)
    what = "more blocks would have to go than are unprotected" if len(free) < 4 else "no block would be left"
    with pytest.raises(InputError, match=f"{what}; .*, wanted at most {len(free)}"):
        prune(deep_llama, settings.model_copy(update={"sparsity": len(free) / 5 + 0.1}), tmp_path / "none")


@pytest.mark.parametrize("score", ["angular", "measured-loss"])
def test_the_same_recipe_gives_the_same_bytes(score: str, deep_llama: Path, text_file: Path, tmp_path: Path) -> None:
    reports = [prune(deep_llama, recipe(text_file, score=score), tmp_path / name) for name in ("a", "b")]
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    assert len(shards(tmp_path / "a")) == 1
    assert [b.statistics for b in reports[0].blocks] == [b.statistics for b in reports[1].blocks]


@pytest.mark.parametrize(("score", "num_stores"), [("angular", 3), ("measured-loss", NUM_BLOCKS)])
def test_budget(score: str, num_stores: int, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores move to files where the budget is tight, with the same result; what is measured stays below."""
    # The tokenizer needs more than all hidden states of a model of this size, and would be the budget.
    monkeypatch.setattr(host_plan, "_TEXT_BYTES", 0)
    source = save_deep("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (source / "config.json").write_text(json.dumps(config))
    settings = recipe(text_file, score=score, num_samples=3, sparsity=0.4 if score == "angular" else 0.2)
    # Beside a model of this size, what loads the result would need most.
    settings = settings.model_copy(update={"seq_len": 2048, "reload_check": False})
    roomy = prune(source, settings, tmp_path / "memory")
    assert roomy.memory.store == "memory"
    with pytest.raises(MemoryBudgetError) as caught:
        prune(source, settings.model_copy(update={"memory": 1}), tmp_path / "none")
    wanted = parse_bytes(str(caught.value.wanted).removeprefix("at least "))
    tight = prune(source, settings.model_copy(update={"memory": wanted}), tmp_path / "file")
    assert tight.memory.store == "file"
    assert shards(tmp_path / "file") == shards(tmp_path / "memory")
    assert [b.statistics for b in tight.blocks] == [b.statistics for b in roomy.blocks]
    window_bytes = 2048 * 32 * 4
    # The reported windows' last states, dense and pruned, lie where the stores do.
    moved = num_stores * 3 * window_bytes + 2 * roomy.calibration.perplexity_windows * window_bytes
    assert roomy.memory.phases["propagate"] - tight.memory.phases["propagate"] == moved
    assert tight.memory.planned_peak_bytes < roomy.memory.planned_peak_bytes
    for report in (roomy, tight):
        assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes <= report.memory.budget_bytes
    assert not list(tmp_path.glob("*.partial"))


def test_bfloat16_stays_bfloat16(text_file: Path, tmp_path: Path) -> None:
    source = save_deep("llama", tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / "source" / name)
    report = prune(tmp_path / "source", recipe(text_file, dtype="bfloat16"), tmp_path / "out")
    assert report.compute_dtype == "bfloat16"
    dtypes = {t.dtype for path in (tmp_path / "out").glob("*.safetensors") for t in load_file(path).values()}
    assert dtypes == {torch.bfloat16}
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(pruned), logits(stock_without(tmp_path / "source", removed_blocks(report))))


def test_lists_of_layers_are_cut(deep_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Stock configs check the length of these lists: an output with the old one would not load."""
    source = shutil.copytree(deep_llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    entries = {"layer_types": ["full_attention"] * NUM_BLOCKS, "max_window_layers": 4}
    (source / "config.json").write_text(json.dumps(config | entries))
    report = prune(source, recipe(text_file), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["layer_types"] == ["full_attention"] * 3
    assert written["max_window_layers"] == sum(b.kept_units for b in report.blocks if b.block < 4)
    expected = config | {name: written[name] for name in entries} | {"num_hidden_layers": 3}
    assert written == expected
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_pruned_again_by_units(deep_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Blocks first, channels afterwards: the output is a source like any other."""
    prune(deep_llama, recipe(text_file), tmp_path / "shallow")
    settings = recipe(text_file, method="fasp", multiple_of=1)
    report = prune(tmp_path / "shallow", settings, tmp_path / "narrow")
    assert [block.kept_units for block in report.blocks] == [28] * 3
    layout = StockModel(CheckpointReader(tmp_path / "narrow")).layout
    assert len(layout.blocks) == 3


def test_source_with_uneven_blocks_is_refused(deep_llama: Path, text_file: Path, tmp_path: Path) -> None:
    prune(deep_llama, recipe(text_file, method="fasp", multiple_of=1, protect_first=1), tmp_path / "uneven")
    with pytest.raises(UnsupportedError, match=r"blocks have different widths.*Remove blocks first"):
        prune(tmp_path / "uneven", recipe(text_file), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_command_line(capsys: pytest.CaptureFixture[str], deep_llama: Path, text_file: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert caught.value.code == 0, printed.err
        return json.loads(printed.out), printed.err

    flags = ["--calibration", text_file, "--num-samples", 4, "--seq-len", SEQ_LEN, "--dtype", "float32", "--json"]
    report, progress = run(
        *("prune", deep_llama, "-o", tmp_path / "out", "--method", "depth", "--score", "measured-loss"),
        *("--sparsity", 0.4, "--sensitivity-samples", 2, *flags),
    )
    assert report["method"] == "depth"
    assert report["size"]["removed_share_of_blocks"] == pytest.approx(0.4)
    # Five blocks, then the four that are left, then the copies.
    first, *lines = progress.splitlines()
    assert first.startswith("expected to take about ")
    assert [line.split("  ")[0] for line in lines] == [
        *(f"measured loss, removal 1 of 2 {i}/5" for i in range(1, 6)),
        *(f"measured loss, removal 2 of 2 {i}/4" for i in range(1, 5)),
        *(f"write {i}/5" for i in range(1, 6)),
        "write files 1/1",
        "reload check 1/1",
        *(f"held-out windows {i}/8" for i in range(1, 9)),
    ]
    evaluated, _ = run(
        *("eval", tmp_path / "out", "--text", text_file, "--seq-len", SEQ_LEN, "--max-windows", 4),
        *("--dtype", "float32", "--json"),
    )
    ids = AutoTokenizer.from_pretrained(deep_llama)(text_file.read_text())["input_ids"][: 4 * SEQ_LEN]
    gone = [block["block"] for block in report["blocks"] if block["status"] == "removed"]
    expected = stock_loss(stock_without(deep_llama, gone), torch.tensor(ids).reshape(4, SEQ_LEN))
    assert evaluated["texts"][0]["mean_nll"] == pytest.approx(expected, rel=1e-5)
