"""Folders as the hub has them, every verb: nothing of them is lost without a word, and the output reads texts alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.activations import ACT2FN

from support.command_line import CommandLine
from support.llama_runtime import run_llama
from support.local_hub import Hub, local_hub, upload_handler
from support.public_folders import LIKENESSES, VOCAB

pytestmark = [
    pytest.mark.usefixtures("one_thread", "modules_cache"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

TAKEN = [name for name, likeness in LIKENESSES.items() if likeness.refused is None]
REFUSED = [name for name in LIKENESSES if name not in TAKEN]
RUN = ("--num-samples", 8, "--seq-len", 32, "--dtype", "float32", "-q")
TEXTS = ["In 1984, 12345 of 9,876 it's we'll\n\n  def f(x): # \u00e9t\u00e9 \u4f60\u597d", "the cat sat on the mat"]
CHAT = [{"role": "user", "content": "Who sat on the mat?"}, {"role": "assistant", "content": "The cat."}]
EMBEDDING = "Qwen3-Embedding-0.6B"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every likeness. Do not modify."""
    top = tmp_path_factory.mktemp("hub")
    return {name: likeness.build(top / name) for name, likeness in LIKENESSES.items()}


@pytest.fixture
def verb(command_line: CommandLine) -> Any:
    """Run a verb that has to succeed, without a word of another library: what it prints, as JSON."""

    def done(*arguments: object) -> Any:
        code, out, error = command_line(*arguments, "--json")
        assert code == 0, error
        assert "Traceback" not in error
        assert "[transformers]" not in error
        return json.loads(out)

    return done


@pytest.fixture
def pruned(verb: Any, text_file: Path, tmp_path: Path) -> Any:
    """Prune a folder into `out`."""

    def done(source: Path, *more: object) -> tuple[Path, Any]:
        report = verb("prune", source, "-o", tmp_path / "out", "--calibration", text_file, *RUN, *more)
        return tmp_path / "out", report

    return done


FASP = ("--method", "fasp", "--sparsity", 0.3, "--multiple-of", 8)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check_files(source: Path, output: Path, files: dict[str, Any], name: str) -> None:
    """Each file of the source is a weight that was read, carried, rewritten, or left out for a reason."""
    likeness = LIKENESSES[name]
    assert sorted(files["carried"]) == sorted(likeness.carried)
    assert files["left_out"] == likeness.left_out
    left = tuple(files["left_out"])
    named = {*files["carried"], *files["rewritten"]}
    read = {path.name for path in source.glob("model*.safetensors")}
    lost = {file for file in files_of(source) - named - read if not file.startswith(left)}
    assert lost == set()
    for file in files["carried"]:
        assert (output / file).read_bytes() == (source / file).read_bytes(), file
    for file in files["rewritten"]:
        # The index of a model that fits into one file now is no longer needed.
        assert (output / file).is_file() or file == "model.safetensors.index.json", file
    assert not [file for file in files_of(output) if file.startswith(left)]


def check_reads_alike(source: Path, output: Path) -> None:
    """Stock transformers gives the source's ids, special tokens and chats, and generates by the same settings."""
    wanted, found = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    for text in TEXTS:
        ids = found(text)["input_ids"]
        assert ids == wanted(text)["input_ids"]
        assert max(ids) < VOCAB
    assert found.special_tokens_map == wanted.special_tokens_map
    chats = [t.apply_chat_template(CHAT, tokenize=False) for t in (wanted, found)]
    assert chats[0] == chats[1]
    assert "Who sat on the mat?" in chats[1]
    settings = [GenerationConfig.from_pretrained(folder).to_diff_dict() for folder in (source, output)]
    assert settings[0] == settings[1]
    said = json.loads((source / "generation_config.json").read_text())
    assert settings[1]["eos_token_id"] == said["eos_token_id"]


@pytest.mark.parametrize("name", TAKEN)
def test_nothing_is_lost(name: str, folders: dict[str, Path], pruned: Any) -> None:
    source = folders[name]
    output, report = pruned(source, *FASP)
    check_files(source, output, report["files"], name)
    check_reads_alike(source, output)
    loader: Any = AutoModelForCausalLM
    stock, info = loader.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert stock.config.intermediate_size == 40
    assert stock.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in stock.parameters()) == report["size"]["parameters_after"]
    card = ModelCard.load(output / "README.md").data.to_dict()
    assert card["license"] == LIKENESSES[name].license
    tied = stock.config.tie_word_embeddings
    assert ("lm_head.weight" in stock.state_dict()) or tied


@pytest.mark.parametrize("name", TAKEN)
def test_uneven_widths_read_alike_too(name: str, folders: dict[str, Path], pruned: Any) -> None:
    source = folders[name]
    output, report = pruned(source, "--method", "structprune", "--scope", "all", "--multiple-of", 8, "--sparsity", 0.3)
    check_files(source, output, report["files"], name)
    check_reads_alike(source, output)
    stock = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert sum(parameter.numel() for parameter in stock.parameters()) == report["size"]["parameters_after"]


@pytest.mark.parametrize("name", TAKEN)
def test_measuring_verbs(name: str, folders: dict[str, Path], pruned: Any, verb: Any, text_file: Path) -> None:
    source = folders[name]
    output, report = pruned(source, *FASP)
    found = verb("inspect", source)
    assert found["parameters"] == report["size"]["parameters_before"]
    assert verb("plan", source, *RUN[:-1], *FASP)["parameters_after"] == report["size"]["parameters_after"]
    small = ("--text", text_file, "--seq-len", 32, "--max-windows", 3, "--dtype", "float32")
    for model in (source, output):
        whole, streamed = verb("eval", model, *small), verb("eval", model, *small, "--stream")
        perplexities = [result["texts"][0]["perplexity"] for result in (whole, streamed)]
        assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)
        assert 1 < perplexities[0] < 10 * VOCAB
    timed = verb("bench", source, "--against", output, "--prompt", 8, "--repeats", 1, "--decode", 2)
    assert [model["parameters"] for model in timed["models"]] == [
        report["size"][when] for when in ("parameters_before", "parameters_after")
    ]


@pytest.mark.parametrize("name", TAKEN)
def test_recovery_loses_nothing_either(
    name: str,
    folders: dict[str, Path],
    pruned: Any,
    verb: Any,
    command_line: CommandLine,
    text_file: Path,
    tmp_path: Path,
) -> None:
    source = folders[name]
    student, _ = pruned(source, *FASP)
    files_before = files_of(student)
    out = tmp_path / "recovered"
    report = verb("recover", student, "--teacher", source, "-o", out, "--calibration", text_file, *RUN)
    files = report["files"]
    read = {path.name for path in student.glob("model*.safetensors")}
    assert files_before - read == {*files["carried"], *files["rewritten"], *files["left_out"]}
    # The first page is of the pruning alone.
    assert files["left_out"] == {}
    check_reads_alike(source, out)
    assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size == 40
    (student / "pruning_report.html").unlink()
    code, _, error = command_line("report", student)
    assert code == 0, error
    assert name in (student / "pruning_report.html").read_text()


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp has it: a table of half-precision values by half-precision inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def with_table_gelu(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "act_fn", None), type(ACT2FN["gelu_pytorch_tanh"])):
            module.act_fn = TableGelu()
    return model


@pytest.mark.parametrize("name", TAKEN)
def test_llama_cpp_reads_alike(name: str, folders: dict[str, Path], pruned: Any, verb: Any, tmp_path: Path) -> None:
    """Ids with the tokens at a text's ends, and log-probabilities."""
    pytest.importorskip("gguf")
    output, _ = pruned(folders[name], *FASP)
    target = tmp_path / "small.gguf"
    verb("export", output, "-o", target, "--dtype", "float32", "-q")
    prompts = [list(range(5, 25))]
    ran = run_llama(target, prompts, VOCAB, texts=TEXTS, add_special=True)
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    assert ran.tokens == [tokenizer(text)["input_ids"] for text in TEXTS]
    model = with_table_gelu(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32))
    with torch.no_grad():
        wanted_V = model(torch.tensor(prompts)).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(ran.logprobs_NV[-1], wanted_V, rtol=0, atol=1e-3)


def test_a_tokenizer_without_a_gguf_form(folders: dict[str, Path], command_line: CommandLine, tmp_path: Path) -> None:
    """The table of runtimes says beforehand what the export asks for."""
    pytest.importorskip("gguf")
    folder = tmp_path / "folder"
    shutil.copytree(folders["Mistral-7B-Instruct-v0.3"], folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    # A cut into the likeliest pieces, which llama.cpp has only without bytes.
    vocabulary = [[token, -float(index)] for token, index in content["model"]["vocab"].items()]
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    code, out, _ = command_line("inspect", folder)
    assert code == 0
    assert "tokenizers other than BPE and Unigram are copied from a GGUF file (--tokenizer-gguf)" in " ".join(
        out.split()
    )
    code, out, error = command_line("export", folder, "-o", tmp_path / "new" / "small.gguf", "-q")
    assert (code, out) == (2, "")
    assert "got a Unigram model with byte fallback, which llama.cpp's has not" in error
    assert "Pass --tokenizer-gguf" in error
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_head_is_refused_by_all(
    name: str, folders: dict[str, Path], command_line: CommandLine, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    source, out = folders[name], tmp_path / "out"
    calibration, text = ("--calibration", text_file), ("--text", text_file)
    before = files_of(source)
    for arguments in (
        ("inspect", source),
        ("plan", source),
        ("prune", source, "-o", out, *calibration, *RUN),
        ("eval", source, *text, "--seq-len", 32),
        ("eval", source, *text, "--seq-len", 32, "--stream"),
        ("bench", source, "--prompt", 8),
        ("recover", tiny_llama, "--teacher", source, "-o", out, *calibration, *RUN),
        ("export", source, "-o", tmp_path / "out.gguf"),
        ("export", source, "-o", out, "--format", "onnx", "--dtype", "float32"),
        ("compare", source, "-o", out, "--methods", "fasp", "--sparsities", 0.3, *calibration, *text),
    ):
        code, _, error = command_line(*arguments)
        assert code == 2, (arguments, error)
        assert str(LIKENESSES[name].refused) in " ".join(error.split()), arguments
        assert list(tmp_path.iterdir()) == []
    assert files_of(source) == before


def test_an_embedding_model_stays_one(folders: dict[str, Path], pruned: Any) -> None:
    """What sentence-transformers loads: the base model, and the modules by the folders that modules.json names."""
    output, _ = pruned(folders[EMBEDDING], *FASP)
    modules = json.loads((output / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    pooling = json.loads((output / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_lasttoken"]
    config = json.loads((output / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == config["hidden_size"]
    ids = AutoTokenizer.from_pretrained(output)(TEXTS[0], return_tensors="pt")["input_ids"]
    assert int(ids[0, -1]) == config["eos_token_id"]
    base, whole = AutoModel.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        found, wanted = base(ids).last_hidden_state, whole(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, wanted)
    data = ModelCard.load(output / "README.md").data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("sentence-transformers", "feature-extraction")
    assert "sentence-transformers" in data["tags"]
    assert 'SentenceTransformer("out")' in (output / "README.md").read_text()


@pytest.mark.usefixtures("cells_in_this_process")
def test_comparison(folders: dict[str, Path], verb: Any, text_file: Path, tmp_path: Path) -> None:
    source = folders["Mistral-7B-Instruct-v0.3"]
    settings = [f"{name}={value}" for name, value in (("num_samples", 4), ("seq_len", 32), ("dtype", "float32"))]
    cells = ("--methods", "fasp", "--sparsities", 0.3, "--calibration", text_file, "--text", text_file)
    small = ("--max-windows", 2, "--no-speed", "--no-plots", "--keep", "-q")
    flags = [part for setting in (*settings, "multiple_of=8") for part in ("--set", setting)]
    result = verb("compare", source, "-o", tmp_path / "table", *cells, *small, *flags)
    assert [cell["method"] for cell in result["cells"]] == ["fasp"]
    assert list((tmp_path / "table").rglob("params.json")) == []
    (output,) = [path.parent for path in (tmp_path / "table").rglob("tokenizer.model.v3")]
    check_reads_alike(source, output)


def test_upload(
    folders: dict[str, Path], pruned: Any, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of the output arrives, those in folders too, and none that the source had beside them."""
    output, _ = pruned(folders[EMBEDDING], *FASP)
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with local_hub(upload_handler(hub), monkeypatch) as hub.address:
        code, _, error = command_line("push", output, "me/small")
    assert code == 0, error
    assert hub.files() == {name: (output / name).read_bytes() for name in files_of(output)}
    assert "1_Pooling/config.json" in hub.files()
    assert not [name for name in hub.files() if name.startswith(("onnx", ".git"))]
