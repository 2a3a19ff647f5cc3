"""`--merge-adapter`: a LoRA adapter is merged as peft merges it, tensor by tensor, or refused with a reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf import SIZES, stock_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from structprune import Recipe, prune
from structprune.api import export, inspect, plan, recover
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.loading import load_model
from structprune.assess import EvaluationRequest, SpeedRequest, bench, evaluate, evaluate_all
from structprune.comparison.cell import CellSpec, run_cell
from structprune.errors import CheckpointError, InputError, NumericalError, StructPruneError, UnsupportedError
from structprune.observer import SilentObserver
from structprune.recipe.training import RecoverySettings
from structprune.results.summary import summary_rows
from support.command_line import CommandLine
from support.models import save_tiny

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "all maps": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": ["v_proj", "up_proj"], "use_rslora": True, "r": 4, "lora_alpha": 9},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "rank_pattern": {r"layers\.0\..*q_proj": 2, "k_proj": 5},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 11, "o_proj": 3},
    },
    "one block": {"target_modules": ["gate_proj"], "layers_to_transform": [1]},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head", "embed_tokens"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


def adapter_of(source: Path, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Write a random adapter for `source`, and return the weights that peft merges it into."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(source)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 7, **settings})
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    wrapped.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings = {"method": "fasp", "sparsity": 0.0, "num_samples": 4, "seq_len": 32, "dtype": "float32"}
    return Recipe.build(**{**settings, "calibration": str(text_file), **changes})


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with a head of its own. Do not modify: copy it."""
    return save_tiny("llama-untied-biased", tmp_path_factory.mktemp("untied") / "llama", max_shard_size="30KB")


@pytest.fixture(scope="module")
def adapter(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of it. Do not modify: copy it."""
    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    adapter_of(untied, folder, **SETTINGS["plain"])
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_the_weights_are_those_that_peft_merges(name: str, untied: Path, text_file: Path, tmp_path: Path) -> None:
    wanted = adapter_of(untied, tmp_path / "adapter", **SETTINGS[name])
    dense = weights(untied)
    report = prune(untied, recipe(text_file, merge_adapter=str(tmp_path / "adapter")), tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == dense.keys()
    for tensor, value in found.items():
        torch.testing.assert_close(value, wanted[tensor], rtol=1e-6, atol=1e-6, msg=tensor)
    changed = {tensor for tensor in dense if not torch.equal(dense[tensor], found[tensor])}
    assert report.adapter is not None
    assert len(changed) == report.adapter.num_updated + report.adapter.num_replaced
    assert report.reload.relative_difference is not None
    # What peft itself computes, without a merge.
    text = evaluate(tmp_path / "out", text_file, seq_len=40, max_windows=4, device="cpu", dtype="float32")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), tmp_path / "adapter").eval()
    ids = torch.arange(40)[None] + 60
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert text.perplexity != pytest.approx(
        evaluate(untied, text_file, seq_len=40, max_windows=4, device="cpu", dtype="float32").perplexity, rel=1e-3
    )


FAMILIES: dict[str, list[str]] = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "opt": ["q_proj", "fc1", "fc2"],
    "gemma3_text": ["q_proj", "o_proj", "up_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source")
    adapter_of(source, tmp_path / "adapter", target_modules=FAMILIES[family])
    reader = open_model(str(source), adapter=str(tmp_path / "adapter"))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter").eval()
    loaded = load_model(reader, torch.device("cpu"), torch.float32)
    ids = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=" ".join)
def test_a_part_of_a_tied_pair_that_was_trained_whole(modules: list[str], text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    adapter_of(source, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=modules)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter").eval()
    prune(source, recipe(text_file, merge_adapter=str(tmp_path / "adapter")), tmp_path / "out")
    ids = torch.arange(40)[None] + 60
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_every_verb_sees_the_merged_model(untied: Path, adapter: Path, text_file: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), adapter).merge_and_unload()
    model.save_pretrained(merged)
    for path in untied.glob("token*"):
        shutil.copy(path, merged)
    asked: dict[str, Any] = {"seq_len": 40, "max_windows": 4, "device": "cpu", "dtype": "float32"}
    wanted = evaluate(merged, text_file, **asked).perplexity
    for stream in (False, True):
        request = EvaluationRequest(texts=[text_file], merge_adapter=str(adapter), stream=stream, **asked)
        assert evaluate_all(untied, request).texts[0].perplexity == pytest.approx(wanted, rel=1e-5)
    against = EvaluationRequest(texts=[text_file], merge_adapter=str(adapter), against=untied, stream=True, **asked)
    compared = evaluate_all(untied, against).texts[0]
    assert compared.reference_perplexity == pytest.approx(evaluate(untied, text_file, **asked).perplexity, rel=1e-5)
    assert (compared.kl_to_reference or 0) > 0.01
    assert any("'tuned' is merged" in note for note in inspect(untied, merge_adapter=str(adapter)).notes)
    foreseen = plan(untied, recipe(text_file, merge_adapter=str(adapter)))
    assert any("'tuned' is merged" in note for note in foreseen.layout.notes)
    speed = SpeedRequest(prompts=[8], decode_tokens=1, repeats=1, device="cpu")
    measured = bench(untied, speed, merge_adapter=str(adapter))
    assert measured.models[0].parameters == foreseen.layout.num_parameters
    # A run that measures something: both see the same model from the first block on.
    settings = {"sparsity": 0.3, "multiple_of": 8}
    ours = prune(untied, recipe(text_file, **settings, merge_adapter=str(adapter)), tmp_path / "a")
    theirs = prune(merged, recipe(text_file, **settings), tmp_path / "b")
    assert [b.kept_units for b in ours.blocks] == [b.kept_units for b in theirs.blocks]
    assert ours.calibration.dense_perplexity == pytest.approx(theirs.calibration.dense_perplexity, rel=1e-5)
    assert ours.calibration.pruned_perplexity == pytest.approx(theirs.calibration.pruned_perplexity, rel=1e-3)


def test_a_recovery_s_teacher_is_the_merged_model(
    untied: Path, adapter: Path, text_file: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    merged = tmp_path / "merged"
    prune(untied, recipe(text_file, merge_adapter=str(adapter)), merged)
    student = tmp_path / "student"
    prune(merged, recipe(text_file, sparsity=0.3, multiple_of=8), student)
    asked: dict[str, Any] = {"calibration": (str(text_file),), "num_samples": 8, "seq_len": 32, "dtype": "float32"}
    wanted = recover(student, merged, RecoverySettings.build(**asked), tmp_path / "wanted")
    settings = RecoverySettings.build(**asked, merge_adapter=str(adapter))
    found = recover(student, untied, settings, tmp_path / "found")
    assert (found.dense_perplexity, found.after) == (wanted.dense_perplexity, wanted.after)
    theirs = weights(tmp_path / "wanted")
    assert all(torch.equal(value, theirs[name]) for name, value in weights(tmp_path / "found").items())
    # Against the base alone the student starts elsewhere, and is said to.
    base = recover(student, untied, RecoverySettings.build(**asked), tmp_path / "base")
    assert base.before != found.before
    assert wanted.notes == []
    both = shutil.copytree(untied, tmp_path / "both")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, both)
    flags = ["--teacher", both, "--calibration", text_file, "--num-samples", 8, "--seq-len", 32, "--dtype", "float32"]
    code, _, error = command_line("recover", student, "-o", tmp_path / "new", *flags)
    assert code == 2
    assert "--merge-adapter beside" in " ".join(error.split())
    code, _, error = command_line("recover", student, "-o", tmp_path / "new", *flags, "--merge-adapter", "beside")
    assert code == 0, error
    assert all(torch.equal(value, theirs[name]) for name, value in weights(tmp_path / "new").items())
    # Pruned in one go, the student's report says that there was an adapter.
    prune(untied, recipe(text_file, sparsity=0.3, multiple_of=8, merge_adapter=str(adapter)), tmp_path / "both-at-once")
    lacking = recover(tmp_path / "both-at-once", untied, RecoverySettings.build(**asked), tmp_path / "lacking")
    assert any("pruned with an adapter merged, which the teacher lacks" in note for note in lacking.notes)
    had = recover(tmp_path / "both-at-once", untied, settings, tmp_path / "had")
    assert had.notes == []


def test_an_adapter_beside_the_weights(untied: Path, adapter: Path, text_file: Path, tmp_path: Path) -> None:
    both = shutil.copytree(untied, tmp_path / "both")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, both)
    wanted = prune(untied, recipe(text_file, merge_adapter=str(adapter)), tmp_path / "apart")
    with pytest.raises(CheckpointError, match=r"an adapter lies beside the weights.*--merge-adapter beside"):
        prune(both, recipe(text_file), tmp_path / "refused")
    with pytest.raises(CheckpointError, match="an adapter lies beside the weights"):
        prune(both, recipe(text_file, merge_adapter=str(adapter)), tmp_path / "refused")
    for number, asked in enumerate(("beside", str(both))):
        report = prune(both, recipe(text_file, merge_adapter=asked), tmp_path / f"out{number}")
        found = weights(tmp_path / f"out{number}")
        assert all(torch.equal(found[name], value) for name, value in weights(tmp_path / "apart").items())
        # It is in the weights now; beside them it would be applied twice.
        assert not list((tmp_path / f"out{number}").glob("adapter*"))
        assert report.adapter is not None
        assert wanted.adapter is not None
        assert report.adapter.content == wanted.adapter.content


def test_the_same_flag_without_a_value(
    untied: Path, adapter: Path, text_file: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    both = shutil.copytree(untied, tmp_path / "both")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, both)
    flags = ["--text", text_file, "--seq-len", 40, "--max-windows", 2, "--dtype", "float32", "--json"]
    code, out, _ = command_line("eval", both, *flags, "--merge-adapter")
    wanted = command_line("eval", untied, *flags, "--merge-adapter", adapter)
    assert (code, wanted[0]) == (0, 0)
    assert json.loads(out)["texts"][0]["perplexity"] == json.loads(wanted[1])["texts"][0]["perplexity"]
    code, out, _ = command_line("inspect", both, "--merge-adapter", "--json")
    assert code == 0
    assert any("'both' is merged" in note for note in json.loads(out)["notes"])


def test_widths_and_a_gguf_base(text_file: Path, tmp_path: Path) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "source")
    wanted = adapter_of(source, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    export(source, tmp_path / "model.gguf", dtype="float32")
    for model in (source, tmp_path / "model.gguf"):
        for dtype in ("source", "bfloat16"):
            out = tmp_path / f"{model.name}-{dtype}"
            asked = recipe(text_file, merge_adapter=str(tmp_path / "adapter"), output_dtype=dtype)
            prune(model, asked, out)
            for name, value in weights(out).items():
                assert value.dtype == (torch.float32 if dtype == "source" else torch.bfloat16)
                # Rounded once, from the float32 sum.
                expected = wanted[name] if dtype == "source" else wanted[name].bfloat16().float()
                torch.testing.assert_close(value.float(), expected, rtol=1e-6 if dtype == "source" else 8e-3, atol=1e-6)


def test_a_narrow_base_is_summed_in_float32(tmp_path: Path) -> None:
    source = save_tiny("llama-untied-biased", tmp_path / "source", dtype=torch.bfloat16)
    adapter_of(source, tmp_path / "adapter", target_modules=["o_proj"])
    reader = open_model(str(source), adapter=str(tmp_path / "adapter"))
    name = "model.layers.1.self_attn.o_proj.weight"
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.{name.replace('weight', f'lora_{part}.weight')}"].float() for part in "AB")
    exact = weights(source)[name].float() + 7 / 4 * (up @ down)
    assert torch.equal(reader.read([name])[name], exact.bfloat16())
    torch.testing.assert_close(reader.read([name], dtype=torch.float32)[name], exact.bfloat16().float())


def test_long_tensors_are_merged_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny("llama-untied-biased", tmp_path / "source")
    wanted = adapter_of(source, tmp_path / "adapter", **SETTINGS["embedding"])
    monkeypatch.setattr("structprune.checkpoint.merged_weights._CHUNK_NUMBERS", 100)
    monkeypatch.setattr("structprune.checkpoint.reader._CHUNK_BYTES", 700)
    reader = open_model(str(source), adapter=str(tmp_path / "adapter"))
    for name, value in reader.read(reader.shapes).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


def test_the_content_of_an_adapter_makes_another_run(
    untied: Path, adapter: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "tuned")
    first = open_model(str(untied), adapter=str(folder)).fingerprint()
    assert first == open_model(str(untied), adapter=str(adapter)).fingerprint()
    assert first != open_model(str(untied)).fingerprint()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * 1.5}, path)
    other = open_model(str(untied), adapter=str(folder))
    assert other.fingerprint() != first
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    assert open_model(str(untied), adapter=str(folder)).fingerprint() not in (first, other.fingerprint())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in other.content_files}


def test_report_summary_page_and_card_name_it(untied: Path, adapter: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(untied, recipe(text_file, merge_adapter=str(adapter)), tmp_path / "out")
    assert report.adapter is not None
    assert (report.adapter.path, report.adapter.num_updated, report.adapter.num_replaced) == (str(adapter), 4, 0)
    assert dict(summary_rows(report))["adapter"] == "tuned, merged: 4 tensors changed"
    page, card = ((tmp_path / "out" / name).read_text() for name in ("pruning_report.html", "README.md"))
    assert "adapter tuned merged" in page
    assert "with the adapter `tuned` merged" in card
    # Both are made to be published.
    assert str(adapter.parent) not in page + card


def test_a_tokenizer_beside_an_adapter_is_named(untied: Path, adapter: Path, text_file: Path, tmp_path: Path) -> None:
    """A trainer saves one; that it was given other tokens is nothing to keep quiet about."""
    folder = shutil.copytree(adapter, tmp_path / "tuned")
    shutil.copy(untied / "tokenizer.json", folder)
    shutil.copy(untied / "tokenizer_config.json", folder)
    (folder / "trainer_state.json").write_text("{}")
    assert len(plan(untied, recipe(text_file, merge_adapter=str(folder))).notes) == 1
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text("{}")
    wanted = "not taken from the adapter's folder, the model's own stay: chat_template.jinja, tokenizer_config.json"
    assert plan(untied, recipe(text_file, merge_adapter=str(folder))).notes[1:] == (wanted,)
    report = prune(untied, recipe(text_file, merge_adapter=str(folder)), tmp_path / "out")
    assert wanted in report.notes
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (untied / "tokenizer_config.json").read_bytes()


def changed(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors_changed(work: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(work(load_file(path)), path)

    return change


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _key(layer: int = 0, part: str = "A", module: str = "self_attn.q_proj") -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"


REFUSED: dict[str, tuple[Callable[[Path], Any], type[StructPruneError], str]] = {
    "DoRA": (changed(use_dora=True), UnsupportedError, "use_dora True"),
    "magnitudes": (
        tensors_changed(lambda t: {**t, _key().replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}),
        UnsupportedError,
        "magnitudes .DoRA.",
    ),
    "LoHa": (changed(peft_type="LOHA"), UnsupportedError, "only LoRA adapters.*'LOHA'"),
    "no type": (changed(peft_type=None), UnsupportedError, "only LoRA adapters"),
    "biases": (changed(bias="all"), UnsupportedError, "trains biases"),
    "bias of a product": (changed(lora_bias=True), UnsupportedError, "lora_bias True"),
    "PiSSA": (changed(init_lora_weights="pissa"), UnsupportedError, "init_lora_weights 'pissa'"),
    "activated": (changed(alora_invocation_tokens=[1, 2]), UnsupportedError, "alora_invocation_tokens"),
    "replicated layers": (changed(layer_replication=[[0, 2]]), UnsupportedError, "layer_replication"),
    "parameters": (changed(target_parameters=["mlp.experts.x"]), UnsupportedError, "target_parameters"),
    "tokens": (changed(trainable_token_indices=[3]), UnsupportedError, "trainable_token_indices"),
    "a setting of tomorrow": (changed(use_something=1), UnsupportedError, "use_something 1"),
    "no rank": (changed(r=0), CheckpointError, "no usable rank"),
    "no alpha": (changed(lora_alpha="x"), CheckpointError, "no usable alpha"),
    "no pattern": (changed(rank_pattern={"(": 3}), CheckpointError, "no regular expression"),
    "patterns that are none": (changed(alpha_pattern=[1]), CheckpointError, "alpha_pattern.*no mapping"),
    "another rank": (changed(r=3), CheckpointError, "other factors than the settings say"),
    "one factor": (
        tensors_changed(lambda t: {n: v for n, v in t.items() if n != _key()}),
        CheckpointError,
        "one factor.*without the other",
    ),
    "another model": (
        tensors_changed(lambda t: {n.replace("layers.1.", "layers.7."): v for n, v in t.items()}),
        CheckpointError,
        r"does not have; got model\.layers\.7",
    ),
    "another width": (
        tensors_changed(lambda t: {**t, _key(): torch.ones(4, 31)}),
        CheckpointError,
        r"'model\.layers\.0\.self_attn\.q_proj' has another shape.*got \(32, 31\), wanted \(32, 32\)",
    ),
    "a larger vocabulary": (
        tensors_changed(lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.ones(300, 32)}),
        CheckpointError,
        r"got \(300, 32\), wanted \(260, 32\).*vocabulary that grew",
    ),
    "trained biases": (
        tensors_changed(lambda t: {**t, _key().replace("lora_A.weight", "lora_B.bias"): torch.ones(32)}),
        UnsupportedError,
        "a tensor that a merge does not know.*lora_B.bias",
    ),
    "a module that is missing": (changed(modules_to_save=["norm"]), CheckpointError, "nothing for 'norm'"),
    "a stranger": (tensors_changed(lambda t: {**t, "x.weight": torch.ones(2)}), UnsupportedError, "got x.weight"),
    "integers": (tensors_changed(lambda t: {**t, _key(): t[_key()].char()}), UnsupportedError, "as integers; got I8"),
    "not finite": (
        tensors_changed(lambda t: {**t, _key(): t[_key()] * float("nan")}),
        NumericalError,
        "of the adapter holds NaN",
    ),
    "a pickle": (pickled, UnsupportedError, "adapter_model.bin.*pickles are never loaded"),
    "truncated": (truncated, CheckpointError, "truncated or not safetensors"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), InputError, "no safetensors weights"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), InputError, "there is no adapter"),
    "no folder": (shutil.rmtree, InputError, "--merge-adapter is not usable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_one_error(
    name: str, untied: Path, adapter: Path, text_file: Path, tmp_path: Path
) -> None:
    change, kind, message = REFUSED[name]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change(folder)
    with pytest.raises(kind, match=message):
        prune(untied, recipe(text_file, merge_adapter=str(folder), reload_check=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_product_on_one_of_two_tied_tensors(module: str, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    adapter_of(source, tmp_path / "adapter", target_modules=[module])
    with pytest.raises(UnsupportedError, match="one of two tied tensors"):
        prune(source, recipe(text_file, merge_adapter=str(tmp_path / "adapter")), tmp_path / "out")


def test_an_adapter_taken_for_a_model(adapter: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"an adapter and no model.*--merge-adapter {re.escape(str(adapter))}"):
        prune(adapter, recipe(text_file), tmp_path / "out")


def test_the_command_line(untied: Path, adapter: Path, tmp_path: Path, command_line: CommandLine) -> None:
    flags = ["--method", "fasp", "--seq-len", 32, "--multiple-of", 8]
    code, out, _ = command_line("plan", untied, *flags, "--merge-adapter", adapter)
    assert code == 0
    assert "adapter 'tuned' is merged into the weights: 4 tensors changed" in out
    code, _, error = command_line("plan", untied, *flags, "--merge-adapter", tmp_path / "none")
    assert (code, "--merge-adapter is not usable" in error) == (2, True)


@pytest.mark.parametrize("asked", ["none", "tuned"])
def test_a_comparison_s_dense_model_is_the_merged_one(
    asked: str, untied: Path, adapter: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = str(adapter) if asked == "tuned" else asked
    spec = CellSpec(
        step="test",
        model=str(untied),
        label="dense",
        key="",
        recipe=None,
        sparsity=0.0,
        scope="mlp",
        texts=[("text", text_file)],
        seq_len=40,
        max_windows=4,
        bos="no",
        merge_adapter=folder,
        device="cpu",
        dtype="float32",
        time_it=False,
        output=tmp_path / "out",
        shared=tmp_path / "shared",
        quiet=True,
    )
    found = run_cell(spec, SilentObserver()).dense
    assert found is not None
    options: dict[str, Any] = {"seq_len": 40, "max_windows": 4, "bos": "no", "device": "cpu", "dtype": "float32"}
    request = EvaluationRequest(texts=[text_file], merge_adapter=folder, **options)
    assert found.texts[0].perplexity == pytest.approx(evaluate_all(untied, request).texts[0].perplexity, rel=1e-6)
