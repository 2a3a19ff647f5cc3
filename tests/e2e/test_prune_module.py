"""`structprune prune-module`: folders of stock encoders and vision models, examples from files, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTForImageClassification,
    WhisperForConditionalGeneration,
)

from support.command_line import CommandLine
from support.models import save_tiny
from support.networks import small_bert, small_vit, small_whisper


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a tokenizer of letters, a causal model, a ViT, a Whisper, and inputs for them."""
    root = tmp_path_factory.mktemp("modules")
    small_bert().save_pretrained(root / "bert")
    letters = {letter: number for number, letter in enumerate("?abcdefghijklmnopqrstuvwxyz .")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(root / "bert")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    save_tiny("llama", root / "llama")
    small_vit().save_pretrained(root / "vit")
    torch.manual_seed(0)
    pictures = torch.randn(17, 3, 16, 16)
    save_file({"pixel_values": pictures, "labels": torch.randint(0, 5, (17,))}, root / "pictures.safetensors")
    numpy.save(root / "pictures.npy", pictures.numpy())
    small_whisper().save_pretrained(root / "whisper")
    save_file(
        {"input_features": torch.randn(4, 10, 40), "decoder_input_ids": torch.randint(3, 60, (4, 6))},
        root / "speech.safetensors",
    )
    return root


def test_text_for_an_encoder(folders: Path, command_line: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, errors = command_line(
        "prune-module", str(folders / "bert"), "-o", str(out), "--examples", str(folders / "text.txt"),
        "--seq-len", "20", "--batch-size", "4", "--sparsity", "10%", "--families", "stock", "--json",
    )  # fmt: skip
    assert code == 0, errors
    report = json.loads(printed)
    assert report["is_stock"]
    assert report["difference_from_masked"] < 1e-4
    assert report["repaired"]
    loaded = BertModel.from_pretrained(out)
    assert loaded.config.intermediate_size < 48
    assert sum(each.numel() for each in loaded.parameters()) == report["costs"]["parameters"]["after"]


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_labels_give_a_loss(importance: str, folders: Path, command_line: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, errors = command_line(
        "prune-module", str(folders / "vit"), "-o", str(out), "--examples", str(folders / "pictures.safetensors"),
        "--importance", importance, "--ranking", "global", "--cost", "macs", "--sparsity", "0.2",
    )  # fmt: skip
    assert code == 0, errors
    assert "macs" in printed
    program = torch.export.load(out / "program.pt2").module()
    assert program(pixel_values=torch.randn(8, 3, 16, 16)).logits.shape == (8, 5)


def test_array_and_speech(folders: Path, command_line: CommandLine, tmp_path: Path) -> None:
    for model, file, size in (("vit", "pictures.npy", "8"), ("whisper", "speech.safetensors", "2")):
        out = tmp_path / model
        code, _, errors = command_line(
            "prune-module", str(folders / model), "-o", str(out), "--examples", str(folders / file),
            "--batch-size", size, "--sparsity", "0.1", "--families", "stock", "--no-repair",
        )  # fmt: skip
        assert code == 0, errors
    assert ViTForImageClassification.from_pretrained(tmp_path / "vit").config.intermediate_size < 48


def test_exported_program(folders: Path, command_line: CommandLine, tmp_path: Path) -> None:
    """What `prune-module` writes is pruned again from its program alone; heads leave by `--families all`."""
    source, examples = folders / "vit", folders / "pictures.npy"
    for number, more in enumerate(((), ("--families", "all"), ())):
        out = tmp_path / str(number)
        code, printed, errors = command_line(
            "prune-module", str(source), "-o", str(out), "--examples", str(examples), "--sparsity", "0.1", "--json",
            *more,
        )  # fmt: skip
        assert code == 0, errors
        report = json.loads(printed)
        assert report["difference_from_masked"] < 1e-4
        assert report["repaired"]
        lost = [name for name, width in report["widths"].items() if width["after"] < width["before"]]
        assert bool(more) == any("attention" in name for name in lost) or source.is_dir()
        source = out / "program.pt2"
    code, _, errors = command_line(
        "prune-module", str(source), "-o", str(tmp_path / "out"), "--examples", str(examples), "--batch-size", "4"
    )
    assert code == 2
    assert "with --batch-size 8" in errors


def masked(dense: Any, smaller: Any) -> Any:
    """The dense model with zeros where the smaller one's matrices lack rows or columns, which their numbers tell."""
    model, there = copy.deepcopy(dense), smaller.state_dict()
    changed = 0
    for name, tensor in model.state_dict().items():
        left = there[name]
        for axis in range(tensor.ndim if tensor.ndim > 1 else 0):
            if left.shape[axis] != tensor.shape[axis]:
                rows, kept = tensor.movedim(axis, 0).flatten(1), left.movedim(axis, 0).flatten(1)
                if rows.shape[1] == kept.shape[1]:
                    is_there = (rows[:, None] == kept[None]).all(-1).any(1)
                    assert int(is_there.sum()) == len(kept)
                    tensor.movedim(axis, 0)[~is_there] = 0
                    changed += 1
    assert changed > 3
    return model


LOADED = {
    "bert": (BertModel, "text.txt", {"input_ids": torch.arange(20).reshape(2, 10) + 1}),
    "llama": (LlamaForCausalLM, "text.txt", {"input_ids": torch.arange(20).reshape(2, 10) + 1}),
    "vit": (ViTForImageClassification, "pictures.npy", {"pixel_values": torch.ones(2, 3, 16, 16)}),
    "whisper": (
        WhisperForConditionalGeneration,
        "speech.safetensors",
        {"input_features": torch.ones(2, 10, 40), "decoder_input_ids": torch.arange(12).reshape(2, 6)},
    ),
}


@pytest.mark.parametrize("name", list(LOADED))
def test_stock_output_is_the_masked_model(name: str, folders: Path, command_line: CommandLine, tmp_path: Path) -> None:
    """What `from_pretrained` loads computes what the dense model computes with zeros in place of what left."""
    kind, examples, inputs = LOADED[name]
    code, _, errors = command_line(
        "prune-module", str(folders / name), "-o", str(tmp_path / "out"), "--examples", str(folders / examples),
        "--families", "stock", "--sparsity", "0.15", "--no-repair", "--seq-len", "10", "--batch-size", "2",
    )  # fmt: skip
    assert code == 0, errors
    dense, smaller = (kind.from_pretrained(folder).eval() for folder in (folders / name, tmp_path / "out"))
    assert smaller.num_parameters() <= 0.85 * dense.num_parameters()
    with torch.no_grad():
        found, wanted = (model(**inputs)[0] for model in (smaller, masked(dense, smaller)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, dense(**inputs)[0], atol=1e-3)


EXAMPLES = {"bert": "text.txt", "vit": "pictures.npy", "whisper": "speech.safetensors"}


@pytest.mark.parametrize("model", list(EXAMPLES))
def test_prune_names_the_command_that_works(
    model: str, folders: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    """What `prune` says of a model of another kind is a command; with names in the place of OUT and FILE it runs."""
    for verb in ("plan", "prune"):
        arguments = ("-o", str(tmp_path / "not")) if verb == "prune" else ()
        code, _, errors = command_line(verb, str(folders / model), *arguments, "--method", "depgraph")
        assert code == 2
        assert "is no causal language model" in errors
    assert [*tmp_path.iterdir()] == []
    program, *named = errors.split("`")[1].split()
    assert program == "structprune"
    filled = {"OUT": str(tmp_path / "out"), "FILE": str(folders / EXAMPLES[model])}
    code, _, errors = command_line(
        *(filled.get(each, each) for each in named), "--batch-size", "2", "--seq-len", "20", "--sparsity", "0.1"
    )
    assert code == 0, errors
    assert (tmp_path / "out" / "module_report.json").is_file()


def test_what_is_refused(folders: Path, command_line: CommandLine, tmp_path: Path) -> None:
    def refused(*arguments: str, model: Path = folders / "vit", examples: str = "pictures.npy") -> str:
        code, _, errors = command_line(
            "prune-module", str(model), "-o", str(tmp_path / "out"), "--examples", str(folders / examples), *arguments
        )
        assert code == 2
        assert not (tmp_path / "out").exists()
        return errors

    assert "labels" in refused("--importance", "taylor")
    assert "no batch" in refused("--batch-size", "100")
    assert "no such file" in refused(examples="gone.npy")
    assert "tokenizer" in refused(examples="text.txt")
    assert "unknown ranking 'everywhere'" in refused("--ranking", "everywhere")
    assert "no such folder" in refused(model=tmp_path / "gone")
    assert "does not fit the budget" in refused("--memory", "100KiB")
    weights = 4 * ViTForImageClassification.from_pretrained(folders / "vit").num_parameters()
    assert ": 5 times its weights" in refused("--memory", str(5 * weights - 1), "--importance", "taylor")
    assert "labels" in refused("--memory", str(5 * weights), "--importance", "taylor")
    # An array that is a pickle, and a class that is none of a model.
    (folders / "pickle.npy").write_bytes(b"\x80\x04N.")
    assert "cannot be read" in refused(examples="pickle.npy")
    for name in ("Trainer", "../../evil", "os.system", 3):
        folder = tmp_path / "other"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"architectures": [name], "model_type": "vit"}))
        assert "no class of stock transformers" in refused(model=folder)
    # Weights that an unpickler would have to run.
    (folder / "config.json").write_text((folders / "vit/config.json").read_text())
    torch.save({}, folder / "pytorch_model.bin")
    assert "does not load" in refused(model=folder)
    (tmp_path / "out").mkdir()
    code, _, errors = command_line(
        "prune-module", str(folders / "vit"), "-o", str(tmp_path / "out"), "--examples", str(folders / "pictures.npy")
    )
    assert code == 2
    assert "there already" in errors
