"""Image-text models through whole runs: stock code loads what was written, with and without an image.

Shape suffixes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from structprune import prune
from structprune.api import export, inspect, plan, recover, resume
from structprune.architectures.stock.loading import load_model
from structprune.assess.quality import EvaluationRequest, evaluate_all
from structprune.assess.speed import SpeedRequest, bench
from structprune.errors import UnsupportedError
from structprune.evaluation.reload import ReloadSpec, reload_here
from structprune.recipe import Recipe
from structprune.recipe.training import RecoverySettings
from structprune.results.report import PruneReport
from support.checkpoints import change_config
from support.command_line import CommandLine
from support.llama_runtime import run_llama
from support.wrappers import image_inputs, save_wrapper

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

# A family file with a tied head; one that is traced, and adds what it finds in images between blocks.
USUAL = ("gemma3", "qwen3_vl")
OTHERS = ("llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5")
KINDS = [*USUAL, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
# Their configs have no entry for the size of a head.
HELD_HEADS = ("qwen2_5_vl", "qwen2_vl")
IDS_BS = torch.randint(1, 200, (2, 24), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wrapper(request.param, tmp_path_factory.mktemp("wrappers") / request.param)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wrapper("llava", tmp_path_factory.mktemp("wrappers") / "llava")


def settings(text_file: Path, **changes: Any) -> Recipe:
    return Recipe.build(
        **{
            "sparsity": 0.25,
            "calibration": str(text_file),
            "num_samples": 8,
            "seq_len": 32,
            "multiple_of": 1,
            "memory": 2**31,
            "dtype": "float32",
            **changes,
        }
    )


def run(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    return prune(source, settings(text_file, **changes), output)


def loaded(directory: Path) -> Any:
    found: Any = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    model, info = found
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def check_the_rest(source: Path, output: Path, changed: str = "mlp") -> None:
    """Tensors of other modules, files beside the weights, and entries of the config that say nothing of widths."""
    before, after = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not (f".{changed}." in name and "visual" not in name and "vision" not in name):
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor), name
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_the_text_model_is_pruned_and_the_rest_stays(source: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run(source, output, text_file)
    assert report.reload.mode == "whole"
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-5
    check_the_rest(source, output)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, output))
    assert new["text_config"].pop("intermediate_size") == 36
    assert old["text_config"].pop("intermediate_size") == 48
    assert old == new
    # Stock code's model of the whole, and the text model alone.
    model = loaded(output)
    text = load_model(output, CPU, torch.float32)
    torch.testing.assert_close(logits(model, input_ids=IDS_BS), logits(text, input_ids=IDS_BS), rtol=1e-5, atol=1e-5)
    # What is what: of the whole, and of the text model.
    size, dense = report.size, loaded(source)
    whole = [sum(parameter.numel() for parameter in each.parameters()) for each in (dense, model)]
    assert [size.parameters_before, size.parameters_after] == whole
    inside = sum(parameter.numel() for parameter in text.parameters())
    assert size.parameters_after - inside == size.parameters_around
    assert size.removed_share_of_text_model > size.removed_share_of_model > 0
    card = (output / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert f"{size.parameters_around:,}, copied as they are" in card


@pytest.mark.slow
def test_a_mixture_inside(text_file: Path, tmp_path: Path) -> None:
    """Llama 4: experts that files have stacked, beside blocks without any."""
    source, output = save_wrapper("llama4", tmp_path / "llama4"), tmp_path / "out"
    report = run(source, output, text_file, multiple_of=8)
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-5
    old, new = (load_file(folder / "model.safetensors") for folder in (source, output))
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name].shape != new[name].shape}
    assert any("experts" in name for name in changed)
    assert all("feed_forward" in name for name in changed)
    around = [name for name in old if not name.startswith("language_model.")]
    assert around
    assert all(torch.equal(old[name], new[name]) for name in around)
    assert torch.isfinite(logits(loaded(output), **image_inputs("llama4"))).all()


def masked(dense: Any, kept: Mapping[str, Mapping[str, list[int]]]) -> Any:
    """The dense model with zeros for the channels that went."""
    for index, kinds in kept.items():
        down = dense.get_submodule(f"model.language_model.layers.{index}.mlp.down_proj")
        gone = torch.ones(down.in_features, dtype=torch.bool)
        gone[kinds["mlp"]] = False
        with torch.no_grad():
            down.weight[:, gone] = 0
    return dense


def test_an_image_passes_as_through_the_masked_model(source: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(source, output, text_file, method="magnitude")
    kept = json.loads((output / "pruning_manifest.json").read_text())["kept_indices"]
    inputs = image_inputs(source.name)
    found_BSV = logits(loaded(output), **inputs)
    assert torch.isfinite(found_BSV).all()
    dense = loaded(source)
    before_BSV = logits(dense, **inputs)
    torch.testing.assert_close(found_BSV, logits(masked(dense, kept), **inputs), rtol=1e-4, atol=1e-5)
    # It says something of images, and of what went.
    assert (found_BSV - before_BSV).abs().max() > 1e-2
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    assert (logits(dense, **other) - logits(dense, **inputs)).abs().max() > 1e-2


def test_heads_go_too(source: Path, text_file: Path, tmp_path: Path) -> None:
    """By a method whose units of attention are value channels elsewhere, which need a modelling file."""
    output = tmp_path / "out"
    if source.name in HELD_HEADS:
        with pytest.raises(UnsupportedError, match="cannot express fewer attention units"):
            run(source, output, text_file, method="fasp", scope="all", sparsity=0.3)
        return
    report = run(source, output, text_file, method="fasp", scope="all", sparsity=0.3)
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-5
    text = json.loads((output / "config.json").read_text())["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"]) == (2, 1)
    assert torch.isfinite(logits(loaded(output), **image_inputs(source.name))).all()


def test_blocks_go_where_nothing_enters_between_them(source: Path, text_file: Path, tmp_path: Path) -> None:
    refused = {
        "qwen3_vl": "added behind blocks by their number",
        "qwen3_5": "are of different kinds, so none of them can be removed",
    }
    if source.name in refused:
        with pytest.raises(UnsupportedError, match=refused[source.name]):
            run(source, tmp_path / "out", text_file, method="depth", sparsity=0.3)
        return
    report = run(source, tmp_path / "out", text_file, method="depth", sparsity=0.3)
    assert report.reload.relative_difference is not None
    model = loaded(tmp_path / "out")
    assert len(model.model.language_model.layers) == 2
    assert torch.isfinite(logits(model, **image_inputs(source.name))).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"structure": "per-layer"}, "--structure per-layer"),
        ({"allocator": "closed-form"}, "--allocator closed-form"),
        ({"protect_first": 1}, "--protect-first 1"),
        ({"scope": "all", "head_units": "value-channel"}, "--head-units value-channel"),
        ({"allow_block_removal": True}, "--allow-block-removal"),
    ],
)
def test_uneven_blocks_are_refused(
    llava: Path, changes: dict[str, Any], said: str, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="one width for all blocks") as caught:
        run(llava, tmp_path / "out", text_file, **changes)
    assert said in str(caught.value)
    assert "--structure uniform" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_else_is_refused(llava: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="images enter the residual stream"):
        run(llava, tmp_path / "out", text_file, method="slicegpt", scope="all")
    with pytest.raises(UnsupportedError, match="adapters are merged into causal models only"):
        run(llava, tmp_path / "out", text_file, merge_adapter=str(tmp_path))


def test_heads_that_only_another_class_takes(text_file: Path, tmp_path: Path) -> None:
    """Three heads of a width of 32: Mistral's class inside, with every entry that LLaMA's had by default."""
    source = save_wrapper("llava", tmp_path / "llava", num_key_value_heads=4)
    report = run(source, tmp_path / "out", text_file, method="fasp", scope="attention", sparsity=0.25)
    assert report.reload.relative_difference is not None
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["num_attention_heads"]) == ("mistral", 3)
    assert torch.isfinite(logits(loaded(tmp_path / "out"), **image_inputs("llava"))).all()


def test_several_files_and_another_dtype(text_file: Path, tmp_path: Path) -> None:
    """The text model is written as asked, what is around it as it was."""
    source = save_wrapper("qwen2_5_vl", tmp_path / "model")
    run(source, tmp_path / "out", text_file, output_dtype="bfloat16", max_shard_size=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = [load_file(tmp_path / "out" / file) for file in set(index["weight_map"].values())]
    assert len(files) > 1
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert {tensor.dtype for name, tensor in tensors.items() if "visual" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if "visual" not in name} == {torch.bfloat16}
    assert torch.isfinite(logits(loaded(tmp_path / "out"), **image_inputs("qwen2_5_vl"))).all()


def test_a_plan_says_what_the_result_has(llava: Path, text_file: Path, tmp_path: Path) -> None:
    found = plan(llava, settings(text_file))
    report = run(llava, tmp_path / "out", text_file)
    assert found.forecast.num_parameters == report.size.parameters_after
    assert found.size.exact
    assert (found.size.bytes_before, found.size.bytes_after) == (report.size.bytes_before, report.size.bytes_after)
    assert found.plan.reload_bytes >= (report.reload.planned_bytes or 0) > 0
    assert inspect(llava).around.parameters == report.size.parameters_around


def test_loading_module_by_module(source: Path, tmp_path: Path) -> None:
    """The reload check of a result that does not fit: modules around the text model are not read."""
    expected_SV = logits(loaded(source), input_ids=IDS_BS[:1])[0]
    save_file({"ids_S": IDS_BS[0].clone(), "logits_SV": expected_SV.contiguous()}, tmp_path / "probe.safetensors")
    result = reload_here(
        ReloadSpec(directory=source, probe=tmp_path / "probe.safetensors", mode="streamed", dtype="float32")
    )
    assert (result.error, result.impossible) == (None, None)
    assert result.relative_difference < 1e-5


@pytest.fixture(scope="module")
def pruned(llava: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "out"
    run(llava, output, text_file)
    return output


@pytest.mark.parametrize("stream", [False, True])
def test_evaluation_is_of_the_text_model(llava: Path, pruned: Path, stream: bool, text_file: Path) -> None:
    request = EvaluationRequest(
        texts=[text_file], against=llava, seq_len=32, max_windows=2, stream=stream, dtype="float32"
    )
    found = evaluate_all(pruned, request)
    assert found.texts[0].perplexity > 1


def test_bench(llava: Path, pruned: Path) -> None:
    found = bench(pruned, SpeedRequest(prompts=(16,), decode_tokens=2, repeats=1, dtype="float32"), against=llava)
    assert found.models[0].parameters < found.models[1].parameters


@pytest.mark.parametrize("mode", ["stream", "lora"])
def test_recovery_writes_the_whole(llava: Path, pruned: Path, mode: str, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    asked = RecoverySettings(
        calibration=(str(text_file),),
        minutes=0.05,
        memory=2**31,
        num_samples=16,
        seq_len=32,
        dtype="float32",
        mode=mode,
    )
    recover(pruned, llava, asked, tmp_path / "better")
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "better"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "language" not in name)
    assert torch.isfinite(logits(loaded(tmp_path / "better"), **image_inputs("llava"))).all()
    assert (tmp_path / "better" / "config.json").read_bytes() == (pruned / "config.json").read_bytes()


@pytest.mark.parametrize("repair", ["scales", "scales+biases"])
def test_a_repaired_one(llava: Path, repair: str, text_file: Path, tmp_path: Path) -> None:
    report = run(llava, tmp_path / "out", text_file, repair=repair, num_samples=16)
    assert report.repair is not None
    assert report.reload.relative_difference is not None
    assert torch.isfinite(logits(loaded(tmp_path / "out"), **image_inputs("llava"))).all()


def test_pruned_twice(llava: Path, pruned: Path, text_file: Path, tmp_path: Path) -> None:
    report = run(pruned, tmp_path / "again", text_file)
    assert report.size.parameters_around == inspect(llava).around.parameters
    assert json.loads((tmp_path / "again" / "config.json").read_text())["text_config"]["intermediate_size"] == 27
    check_the_rest(llava, tmp_path / "again")


def test_resumed(llava: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends before its files are written goes on, to the same bytes."""
    from structprune.engine.run import finalize

    run(llava, tmp_path / "whole", text_file)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finalize, "copy_outer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(llava, tmp_path / "out", text_file)
    resume(tmp_path / "out")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert first == second


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and one merge, which is the least that llama.cpp takes for a vocabulary."""
    vocab = {token: index for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    vocab["ab"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def test_llama_cpp_loads_the_text_model(pruned: Path, command_line: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tmp_path / "model"
    shutil.copytree(pruned, model)
    merging_tokenizer().save_pretrained(model)
    code, _, error = command_line("export", model, "--format", "gguf", "-o", tmp_path / "a.gguf")
    assert code == 0, error
    assert "the text model alone is exported" in error
    prompts = [IDS_BS[0].tolist(), IDS_BS[1, :5].tolist()]
    found_NV = run_llama(tmp_path / "a.gguf", prompts, 260).logprobs_NV
    whole = loaded(model)
    for prompt, found_V in zip(prompts, found_NV, strict=True):
        expected_V = logits(whole, input_ids=torch.tensor([prompt]))[0, -1].log_softmax(dim=-1)
        torch.testing.assert_close(found_V, expected_V, rtol=0, atol=1e-3)


def test_no_gguf_form_is_said(tmp_path: Path) -> None:
    traced = save_wrapper("qwen2_vl", tmp_path / "traced")
    with pytest.raises(UnsupportedError, match="no GGUF form is known for this model family"):
        export(traced, tmp_path / "b.gguf")


def test_every_verb_ends_well(llava: Path, command_line: CommandLine, tmp_path: Path) -> None:
    """On the command line too: facts of the whole are told apart from those of the text model."""
    code, out, error = command_line("inspect", llava, "--json")
    assert code == 0, error
    assert json.loads(out)["parameters_around_the_text_model"] > 0
    code, out, error = command_line("plan", llava, "--sparsity", "0.25", "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found["parameters_before"] > found["parameters_after"] > found["parameters_around"] > 0


def test_the_class_comes_from_the_config_alone(llava: Path, text_file: Path, tmp_path: Path) -> None:
    """Entries of code, inside too, are not written."""
    source = save_wrapper("llava", tmp_path / "model")
    change_config(source, auto_map={"AutoModelForImageTextToText": "evil.Model"})
    run(source, tmp_path / "out", text_file)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
