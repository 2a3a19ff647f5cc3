"""Sliced models: rotation alone changes nothing, what is written is what was measured, and every part is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from structprune import prune
from structprune.api import evaluate, inspect
from structprune.architectures.modeling.per_layer import MODELING_NAME
from structprune.architectures.modeling.sliced import SLICED_ENTRY
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.reader import CheckpointReader
from structprune.cli import main
from structprune.engine.pipelines import slice as slice_pipeline
from structprune.engine.run.context import RunContext
from structprune.errors import CheckpointError, InputError, UnsupportedError
from structprune.recipe import Recipe
from structprune.results.report import PruneReport
from support.models import TINY_MODELS, llama_config, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

HIDDEN = 32
IDS_BS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(3))
STRUCTURES = ["per-layer", "uniform"]
MODELS: dict[str, Callable[[], Any]] = {
    "llama": TINY_MODELS["llama"],
    "llama-untied": lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=False)),
    "llama-untied-biased": TINY_MODELS["llama-untied-biased"],
    "llama-wide-heads": lambda: LlamaForCausalLM(llama_config(head_dim=16)),
    "mistral": TINY_MODELS["mistral"],
    "qwen2": TINY_MODELS["qwen2"],
}


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"method": "slicegpt", "sparsity": 0.2, "calibration": str(text_file), "num_samples": 8}
    settings |= {"seq_len": 32, "dtype": "float32", "device": "cpu", "multiple_of": 4}
    return Recipe.build(**settings | changes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("dense")

    def source(kind: str) -> Path:
        if not (root / kind).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(TINY_MODELS, kind, MODELS[kind])
                save_tiny(kind, root / kind)
            # Large enough to matter beside the tiny activations, so that its rescaling is seen.
            config = json.loads((root / kind / "config.json").read_text())
            (root / kind / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.05}))
        return root / kind

    return source


def load(directory: Path, attention: str = "sdpa", auto_class: Any = AutoModelForCausalLM) -> Any:
    return auto_class.from_pretrained(
        directory, trust_remote_code=True, attn_implementation=attention, dtype=torch.float32
    ).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS_BS).logits


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def prune_to_width(patch: pytest.MonkeyPatch, width: int) -> None:
    patch.setattr(slice_pipeline, "kept_width", lambda *_: width)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", list(MODELS))
def test_rotation_alone_leaves_the_logits(
    kind: str,
    structure: str,
    sources: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = sources(kind)
    prune_to_width(monkeypatch, HIDDEN)
    report = prune(source, recipe(text_file, structure=structure), tmp_path / "out")
    dense, turned = load(source), load(tmp_path / "out")
    torch.testing.assert_close(logits(turned), logits(dense), rtol=1e-4, atol=1e-4)
    # The basis is no permutation: the weights are others.
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert before[name].shape == after[name].shape
    assert (before[name].abs().sort().values - after[name].abs().sort().values).abs().max() > 1e-2
    assert report.calibration.pruned_perplexity == pytest.approx(report.calibration.dense_perplexity, rel=1e-4)
    assert all(block.error is not None and block.error < 1e-10 for block in report.blocks)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rotation_in_float64_is_exact_to_its_digits(
    structure: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("llama", tmp_path / "source", dtype=torch.float64)
    prune_to_width(monkeypatch, HIDDEN)
    prune(source, recipe(text_file, structure=structure), tmp_path / "out")
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float64}
    dense, turned = (load_model(d, torch.device("cpu"), torch.float64) for d in (source, tmp_path / "out"))
    # The norms and rotary positions of the stock classes go through float32 whatever the weights are.
    torch.testing.assert_close(logits(turned), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_pass_measures_what_the_output_computes(
    kind: str,
    structure: str,
    sources: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last hidden states of the streamed pass, in the last basis, are those of the model that is loaded back."""
    seen: dict[str, Any] = {}
    inner = slice_pipeline._slice_blocks  # pyright: ignore[reportPrivateUsage]

    def spy(context: RunContext, *arguments: Any) -> Any:
        seen["ids"], seen["result"] = context.windows.ids_NS[: context.num_probe], inner(context, *arguments)
        return seen["result"]

    monkeypatch.setattr(slice_pipeline, "_slice_blocks", spy)
    report = prune(sources(kind), recipe(text_file, structure=structure), tmp_path / "out")
    width = report.blocks[0].kept_units
    assert width < HIDDEN
    model = load(tmp_path / "out")
    caught: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        loss = model(input_ids=seen["ids"], labels=seen["ids"]).loss
    expected = seen["result"].outcome.pruned_NSD.double() @ seen["result"].last_DK
    assert caught[0].shape[-1] == width == model.config.hidden_size
    torch.testing.assert_close(caught[0], expected.float(), rtol=1e-3, atol=1e-3)
    assert report.calibration.pruned_perplexity == pytest.approx(loss.exp().item(), rel=1e-3)
    assert report.calibration.pruned_perplexity != pytest.approx(report.calibration.dense_perplexity, rel=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased"])
def test_every_parameter_is_counted(
    kind: str, structure: str, sources: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    asked = recipe(text_file, structure=structure, sparsity=0.15)
    report = prune(sources(kind), asked, tmp_path / "out")
    width, size = report.blocks[0].kept_units, report.size
    before, after = tensors_of(sources(kind)), tensors_of(tmp_path / "out")

    def in_blocks(tensors: dict[str, Tensor]) -> int:
        return sum(t.numel() for name, t in tensors.items() if name.startswith("model.layers."))

    assert size.parameters_before == sum(t.numel() for t in before.values())
    assert size.parameters_after == sum(t.numel() for t in after.values())
    assert size.parameters_after == sum(p.numel() for p in load(tmp_path / "out").parameters())
    assert size.parameters_after == StockModel(CheckpointReader(tmp_path / "out")).layout.num_parameters
    assert size.bytes_after == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    share = 1 - in_blocks(after) / in_blocks(before)
    assert size.removed_share_of_scope == size.removed_share_of_blocks == pytest.approx(share, rel=1e-12)
    assert size.removed_share_of_model == pytest.approx(1 - size.parameters_after / size.parameters_before, rel=1e-12)
    assert share >= asked.sparsity
    # One step wider would have removed too little, its shortcuts counted.
    shortcuts = 2 if structure == "per-layer" else 0
    heads = 32 + 2 * 16 + 32 + 3 * 48 + 2

    def removed(kept: int) -> int:
        bias = 2 if "biased" in kind else 0
        return 2 * ((HIDDEN - kept) * (heads + bias) - shortcuts * kept**2)

    assert removed(width) == in_blocks(before) - in_blocks(after)
    assert removed(width + 4) < asked.sparsity * in_blocks(before)


def test_untying_costs_what_it_costs(sources: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    report = prune(sources("llama"), recipe(text_file, structure="uniform", sparsity=0.05), tmp_path / "out")
    assert report.size.removed_share_of_blocks > 0.05
    assert report.size.removed_share_of_model < 0
    assert report.size.parameters_after > report.size.parameters_before
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = load(tmp_path / "out")
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_uniform_is_stock(sources: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    prune(sources("llama"), recipe(text_file, structure="uniform"), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model) is LlamaForCausalLM
    assert model.config.hidden_size < HIDDEN
    assert model.config.head_dim == 8
    assert not (tmp_path / "out" / MODELING_NAME).exists()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(p, torch.ones_like(p)) for p in norms), "folded into the maps behind them"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_width_that_the_heads_do_not_divide(
    structure: str, sources: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    settings = recipe(text_file, structure=structure, multiple_of=2, sparsity=0.02 if structure == "uniform" else 0.15)
    report = prune(sources("llama"), settings, tmp_path / "out")
    assert report.blocks[0].kept_units == (30 if structure == "uniform" else 22), "four heads"
    model = load(tmp_path / "out")
    assert model.config.model_type == "mistral"
    assert logits(model).isfinite().all()
    with pytest.raises(UnsupportedError, match="--multiple-of 8"):
        prune(sources("llama-untied-biased"), settings, tmp_path / "biased")
    assert not (tmp_path / "biased").exists()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_deterministic(structure: str, sources: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        prune(sources("llama"), recipe(text_file, structure=structure), tmp_path / name)
    prune(sources("llama"), recipe(text_file, structure=structure, seed=1), tmp_path / "other")
    assert shard_bytes(tmp_path / "first") == shard_bytes(tmp_path / "second")
    assert shard_bytes(tmp_path / "first") != shard_bytes(tmp_path / "other")


def test_each_cut_is_measured_behind_the_cuts_before_it(
    sources: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """The first basis is that of the embeddings; the second is that of the sublayer which saw the first cut."""
    source = sources("llama-untied")
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes()[: 8 * 32])
    # Narrower than the rank of the embeddings of so few letters: beyond it any direction is as good.
    report = prune(source, recipe(text, sparsity=0.6, held_out=0), tmp_path / "out")
    width = report.blocks[0].kept_units
    dense = load(source)
    ids_T = torch.tensor([int(i) for i in _encode(source, text)])
    x_TD = dense.get_input_embeddings().weight.detach()[ids_T].double()
    basis_DK = torch.linalg.svd(x_TD, full_matrices=False).Vh[:width].T
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    projection = basis_DK @ basis_DK.T
    written = after["model.embed_tokens.weight"].double()
    expected = before["model.embed_tokens.weight"].double() @ basis_DK
    torch.testing.assert_close(written @ written.T, expected @ expected.T, rtol=1e-3, atol=1e-3)
    cut_NSD = (x_TD @ projection).float().reshape(8, 32, HIDDEN)
    layer = dense.model.layers[0]
    with torch.no_grad():
        position = dense.model.rotary_emb(cut_NSD, torch.arange(32)[None])
        attended, _ = layer.self_attn(layer.input_layernorm(cut_NSD), position_embeddings=position, attention_mask=None)
    y_TD = (cut_NSD + attended).reshape(-1, HIDDEN).double()
    next_DK = torch.linalg.svd(y_TD, full_matrices=False).Vh[:width].T
    lost = (y_TD - y_TD @ next_DK @ next_DK.T).square().sum() / y_TD.square().sum()
    assert report.blocks[1].error == pytest.approx(float(lost), rel=1e-2)
    shortcut = after["model.layers.0.attention_shortcut.weight"].double()
    # Signs and order are the pipeline's own; singular values are those of the two subspaces.
    torch.testing.assert_close(
        torch.linalg.svdvals(shortcut), torch.linalg.svdvals(next_DK.T @ basis_DK), rtol=1e-3, atol=1e-3
    )


def test_the_one_basis_weighs_every_position_and_token_alike(
    sources: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Second moments of the directions of the dense stream before each norm, summed."""
    source = sources("llama-untied")
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes()[: 8 * 32])
    report = prune(source, recipe(text, structure="uniform", sparsity=0.4, held_out=0), tmp_path / "out")
    dense = load(source)
    seen: list[Tensor] = []
    for name, module in dense.named_modules():
        if name.endswith("norm"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, HIDDEN).double()))
    with torch.no_grad():
        dense(input_ids=torch.tensor(_encode(source, text)).reshape(8, 32))
    assert len(seen) == 5
    before, after = (tensors_of(d)["model.embed_tokens.weight"].double() for d in (source, tmp_path / "out"))

    def embedded(vectors: list[Tensor]) -> Tensor:
        x_TD = torch.cat(vectors)
        basis_DK = torch.linalg.eigh(x_TD.T @ x_TD).eigenvectors[:, -report.blocks[0].kept_units :]
        return before @ basis_DK @ basis_DK.T @ before.T

    expected = embedded([x_TD / x_TD.norm(dim=1, keepdim=True) for x_TD in seen])
    torch.testing.assert_close(after @ after.T, expected, rtol=1e-3, atol=1e-3)
    for other in (seen, [x_TD / x_TD.norm() for x_TD in seen]):
        assert (after @ after.T - embedded(other)).abs().max() > 1e-2, "the division matters here"


def _encode(source: Path, text: Path) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)(text.read_text(), add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module", params=["llama", "llama-untied-biased", "mistral"])
def sliced(
    request: pytest.FixtureRequest,
    sources: Callable[[str], Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    modules_cache: None,
) -> Path:
    directory = tmp_path_factory.mktemp("sliced") / request.param
    prune(sources(request.param), recipe(text_file), directory)
    return directory


def test_eager_and_sdpa_agree(sliced: Path) -> None:
    eager, expected = load(sliced, "eager"), logits(load(sliced))
    torch.testing.assert_close(logits(eager), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        # Only eager attention returns weights, so this fails where one layer runs another implementation.
        output = eager(input_ids=IDS_BS, output_attentions=True, output_hidden_states=True)
    assert all(weights is not None for weights in output.attentions)
    assert (len(output.attentions), len(output.hidden_states)) == (2, 3)
    eager.set_attn_implementation("sdpa")
    assert torch.equal(logits(eager), expected)


def test_generation_with_both_caches_equals_recomputing(sliced: Path) -> None:
    model = load(sliced)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask_BS = torch.ones_like(IDS_BS)
    runs = [
        model.generate(IDS_BS, attention_mask=mask_BS, **options, **cache)
        for cache in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"})
    ]
    assert runs[0].shape[1] == IDS_BS.shape[1] + 12
    assert torch.equal(runs[1], runs[0])
    assert torch.equal(runs[2], runs[0])


def test_auto_model_export_and_save_keep_the_model(sliced: Path, tmp_path: Path) -> None:
    model = load(sliced)
    expected = logits(model)
    with torch.no_grad():
        base = load(sliced, auto_class=AutoModel)(input_ids=IDS_BS).last_hidden_state
        assert torch.equal(model.lm_head(base), expected)
    program = torch.export.export(model, (), {"input_ids": IDS_BS, "use_cache": False}, strict=False)
    actual = program.module()(input_ids=IDS_BS, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MODELING_NAME).read_bytes() == (sliced / MODELING_NAME).read_bytes()
    assert torch.equal(logits(load_model(tmp_path / "again", torch.device("cpu"), torch.float32)), expected)


def test_load_model_accepts_our_file_only(sliced: Path, tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sliced, tmp_path / "copy")
    assert torch.equal(logits(load_model(copy, torch.device("cpu"), torch.float32)), logits(load(sliced)))
    marker = tmp_path / "ran"
    with (copy / MODELING_NAME).open("a") as handle:
        handle.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    with pytest.raises(CheckpointError, match="not one that structprune writes"):
        load_model(copy, torch.device("cpu"), torch.float32)
    (copy / MODELING_NAME).unlink()
    with pytest.raises(CheckpointError, match="sliced checkpoint lacks its modelling file"):
        load_model(copy, torch.device("cpu"), torch.float32)
    assert not marker.exists()


def test_sliced_again(sliced: Path, text_file: Path, tmp_path: Path) -> None:
    for method in ("slicegpt", "fasp"):
        with pytest.raises(UnsupportedError, match="sliced model with shortcut matrices"):
            prune(sliced, recipe(text_file, method=method), tmp_path / "again")
    assert not list(tmp_path.iterdir())
    layout = inspect(sliced)
    assert layout.hidden_size < HIDDEN
    assert "attention_shortcut.weight" in layout.blocks[1].shapes


@pytest.mark.parametrize("method", ["slicegpt", "fasp"])
def test_uniform_output_can_be_pruned_again(
    method: str, sources: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    prune(sources("llama"), recipe(text_file, structure="uniform"), tmp_path / "once")
    report = prune(tmp_path / "once", recipe(text_file, method=method, structure="uniform"), tmp_path / "twice")
    assert report.size.removed_share_of_scope >= 0.2
    assert load(tmp_path / "twice").config.rms_norm_eps >= load(tmp_path / "once").config.rms_norm_eps


def test_file_store_gives_the_same_bytes(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (source / "config.json").write_text(json.dumps(config))
    settings = recipe(text_file, num_samples=5, seq_len=2048)
    roomy = prune(source, settings, tmp_path / "memory")
    assert roomy.memory.store == "memory"
    budget = roomy.memory.planned_peak_bytes - 5 * 2048 * HIDDEN * 4 // 2
    tight = prune(source, settings.model_copy(update={"memory": budget}), tmp_path / "file")
    assert tight.memory.store == "file"
    assert shard_bytes(tmp_path / "file") == shard_bytes(tmp_path / "memory")
    for report in (roomy, tight):
        assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes


def test_bfloat16_stays_bfloat16(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    report = prune(source, recipe(text_file, dtype="bfloat16"), tmp_path / "out")
    assert report.compute_dtype == "bfloat16"
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert load_model(tmp_path / "out", torch.device("cpu"), torch.bfloat16)(input_ids=IDS_BS).logits.isfinite().all()


# Settings


def refused(source: Path, text_file: Path, tmp_path: Path, **changes: Any) -> str:
    with pytest.raises((UnsupportedError, InputError)) as caught:
        prune(source, recipe(text_file, **changes), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"score": "wanda"},
        {"allocator": "uniform"},
        {"solver": "least-squares"},
        {"target": "local"},
        {"temperature": 1.0},
        {"head_units": "query-head"},
        {"min_retention": 0.2},
        {"outer_iterations": 1},
        {"allow_block_removal": True},
        {"protect_first": 1},
        {"protect_last": 1},
        {"sensitivity_samples": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_units_are_refused(
    changes: dict[str, Any], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    message = refused(tiny_llama, text_file, tmp_path, **changes)
    flag = "--" + next(iter(changes)).replace("_", "-")
    assert message.startswith(
        f"{flag} has no meaning for method 'slicegpt', which removes directions of the residual stream; got "
    )


def test_scope_damping_and_family(tiny_llama: Path, tiny_opt: Path, text_file: Path, tmp_path: Path) -> None:
    for scope in ("mlp", "attention"):
        message = refused(tiny_llama, text_file, tmp_path, scope=scope)
        assert message.endswith(f"got --scope {scope}, wanted --scope all.")
    assert refused(tiny_llama, text_file, tmp_path, damping="auto").startswith("--damping is not usable; got 'auto'")
    assert "needs RMSNorm" in refused(tiny_opt, text_file, tmp_path)


def test_uneven_source(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    uneven = recipe(text_file, method="fasp", protect_first=1)
    prune(tiny_llama, uneven, tmp_path / "uneven")
    assert "different widths" in refused(tmp_path / "uneven", text_file, tmp_path)


def test_resolved_recipe(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(tiny_llama, recipe(text_file, multiple_of=None, scope="all"), tmp_path / "out")
    resolved = report.recipe
    assert (resolved.scope, resolved.structure, resolved.multiple_of, resolved.damping) == ("all", "per-layer", 8, 0.01)
    assert report.blocks[0].kept_units % 8 == 0
    # As a recipe file it asks for the same run again.
    again = prune(tiny_llama, Recipe.build(**resolved.model_dump()), tmp_path / "again")
    assert shard_bytes(tmp_path / "again") == shard_bytes(tmp_path / "out")
    assert again.blocks[0].kept_units == report.blocks[0].kept_units


def test_the_largest_reachable_share_is_named(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    message = refused(tiny_llama, text_file, tmp_path, sparsity=0.95)
    assert message.startswith("no width of the residual stream removes as much; got --sparsity 0.95")
    wanted = float(message.split("wanted at most ")[1].split(". ")[0])
    report = prune(tiny_llama, recipe(text_file, sparsity=wanted), tmp_path / "reached")
    assert report.blocks[0].kept_units == 4
    assert report.size.removed_share_of_scope == pytest.approx(wanted, abs=1e-4)
    assert "wider than the residual stream" in refused(tiny_llama, text_file, tmp_path, multiple_of=64)


# Command line


@pytest.mark.parametrize("structure", STRUCTURES)
def test_command_line(
    structure: str, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cli(*arguments: object) -> tuple[object, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return caught.value.code, *capsys.readouterr()

    common = ["--method", "slicegpt", "--calibration", text_file, "--num-samples", 4, "--seq-len", 32]
    common += ["--dtype", "float32", "--sparsity", 0.25, "--structure", structure]
    code, out, err = cli("prune", tiny_llama, "-o", tmp_path / "out", "--json", *common)
    assert code == 0, err
    report = PruneReport.model_validate(json.loads(out))
    assert report.size.removed_share_of_scope >= 0.25
    code, out, _ = cli(
        "eval",
        tmp_path / "out",
        "--text",
        text_file,
        "--seq-len",
        32,
        "--max-windows",
        4,
        "--json",
        "--dtype",
        "float32",
    )
    assert code == 0
    direct = evaluate(tmp_path / "out", text_file, seq_len=32, max_windows=4, dtype="float32")
    assert json.loads(out)["texts"][0]["perplexity"] == direct.perplexity
    code, out, _ = cli("inspect", tmp_path / "out", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["hidden_size"], facts["parameters"]) == (report.blocks[0].kept_units, report.size.parameters_after)
    assert (SLICED_ENTRY in json.loads((tmp_path / "out" / "config.json").read_text())) == (structure == "per-layer")
    code, out, err = cli("prune", tiny_llama, "-o", tmp_path / "no", *common, "--solver", "admm")
    assert (code, out) == (2, "")
    assert err.startswith("structprune: --solver has no meaning for method 'slicegpt'")
    assert not (tmp_path / "no").exists()
