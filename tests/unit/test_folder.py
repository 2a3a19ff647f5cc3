"""What becomes of each file of a model's folder: nothing is lost without a word, nothing comes from elsewhere."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from structprune.checkpoint.folder import check_folder, check_needed, sort_files, without_code, write_companions
from structprune.errors import CheckpointError

WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# The files of a Mistral, of a Gemma, of an embedding model and of a folder that training left, by name.
CARRIED = (
    *("tekken.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "qwen.tiktoken", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "generation_config.json", "SYSTEM_PROMPT.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE", "LICENSE.txt", "license.md", "Notice.txt", "NOTICE", "USE_POLICY.md", "COPYING", "figures/a.png"),
    *("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    *("config_sentence_transformers.json", "sentence_bert_config.json", "a/b/c/deep.txt"),
)
LEFT_OUT = {
    "consolidated.safetensors": "weights that were not read",
    "consolidated.00.pth": "weights that were not read",
    "pytorch_model.BIN": "weights that were not read",
    "tf_model.h5": "weights that were not read",
    "model.ckpt-7.data-00000-of-00001": "weights that were not read",
    "small-q4.gguf": "weights that were not read",
    "params.json": "describes weights that were not read",
    "pytorch_model.bin.index.json": "describes weights that were not read",
    "original/": "a folder of weights that were not read",
    "onnx/": "a folder of weights that were not read",
    "checkpoint-500/": "left there by training",
    "optimizer.pt": "left there by training",
    "training_args.bin": "left there by training",
    "trainer_state.json": "left there by training",
    "modeling_other.py": "code, which no output needs",
    ".gitattributes": "hidden",
    ".git/": "hidden",
}
INSIDE = {
    "original/": "original/consolidated.00.pth",
    "onnx/": "onnx/model.onnx",
    "checkpoint-500/": "checkpoint-500/config.json",
    ".git/": ".git/HEAD",
}
MODULES = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all of these files, each with its name as content."""
    source = tmp_path / "source"
    for name in (*WEIGHTS, "config.json", "README.md", *CARRIED, *(INSIDE.get(name, name) for name in LEFT_OUT)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "modules.json").write_text(json.dumps(MODULES))
    return source


def test_every_file_is_carried_rewritten_or_named(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    files = write_companions(folder, target, {"model_type": "llama"}, WEIGHTS)
    assert sorted(files.carried) == sorted(CARRIED)
    assert sorted(files.rewritten) == ["README.md", "config.json"]
    assert dict(files.left_out) == LEFT_OUT
    written = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert written == {"config.json", *CARRIED}
    for name in CARRIED:
        assert (target / name).read_bytes() == (folder / name).read_bytes()


def test_modules_behind_a_narrower_stream_stay(folder: Path) -> None:
    """A projection of the old hidden size would not fit, so none of the modules pretends to."""
    files = sort_files(folder, WEIGHTS, same_width=False)
    gone = {name for name, reason in files.left_out.items() if reason.endswith("for another hidden size")}
    assert gone == {
        *("modules.json", "config_sentence_transformers.json"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    }


def test_entries_that_name_code_go(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    ours = {"AutoModelForCausalLM": "modeling_structprune.Some"}
    foreign = {"AutoConfig": "someone/else--evil.Config", "AutoModel": "evil.modeling_structprune"}
    (source / "tokenizer_config.json").write_text(json.dumps({"a": 1, "auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    (source / "config.json").write_text("{}")
    config = {"b": 2, "auto_map": ours | foreign, "custom_pipelines": {"p": {"impl": "x.P"}}}
    files = write_companions(source, target, config)
    assert files.rewritten == ("config.json", "tokenizer_config.json")
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"a": 1}
    assert json.loads((target / "config.json").read_text()) == {"b": 2}
    (target / "modeling_structprune.py").write_text("")
    write_companions(source, target, config)
    assert json.loads((target / "config.json").read_text()) == {"b": 2, "auto_map": ours}
    assert without_code({"auto_map": 3, "c": 4}, ours=True) == {"c": 4}


def test_links_lead_no_further_than_the_folder(tmp_path: Path) -> None:
    """A hub cache's own blobs are the exception: there every file is such a link."""
    source, secret = tmp_path / "source", tmp_path / "secret"
    (source / "inner").mkdir(parents=True)
    secret.mkdir()
    (secret / "key").write_text("private")
    (source / "inner" / "real.txt").write_text("text")
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    blob.write_text("blob")
    for name, place in {
        "NOTICE": secret / "key",
        "folder": secret,
        "gone": secret / "nothing",
        "LICENSE": source / "inner" / "real.txt",
        "vocab.json": blob,
    }.items():
        (source / name).symlink_to(place)
    files = sort_files(source, ())
    assert set(files.carried) == {"LICENSE", "inner/real.txt", "vocab.json"}
    assert files.left_out == {
        "NOTICE": "a link to a file outside of the folder",
        "folder/": "a link to a folder",
        "gone": "a link to nothing",
    }
    check_needed(source, files)
    (source / "tokenizer.json").symlink_to(secret / "key")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a file of the tokenizer cannot be carried over"):
        check_needed(source, sort_files(source, ()))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"weights\xff.bin")
    (tmp_path / name).write_text("")
    assert sort_files(tmp_path, ()).left_out == {"weights\\xff.bin": "weights that were not read"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_never_ignored(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"an adapter and no model; got {name}"):
        check_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"an adapter lies beside the weights.*; got {name}"):
        check_folder(tmp_path)


def test_pipes_and_sockets_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: .* no size.*; got a pipe"):
        check_folder(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(CheckpointError, match="got a socket"):
            check_folder(tmp_path)
    (tmp_path / "s").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="got a device"):
        check_folder(tmp_path)
