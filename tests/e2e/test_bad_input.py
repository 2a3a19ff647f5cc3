"""Input that cannot work: one clear message on standard error, exit code 2, nothing written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from structprune.api import inspect
from structprune.architectures import FAMILIES
from structprune.cli import main
from structprune.memory import parse_bytes
from structprune.methods import METHODS
from structprune.runs.directory import RunDirectory
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path) -> Refused:
    """Run `prune MODEL -o OUT ARGUMENTS`, check all that every refusal must do, and return its message."""

    def run(model: object, *arguments: object, calibration: object = text_file, verb: str = "prune") -> str:
        command = [verb, str(model)]
        if verb == "prune":
            command += [
                "-o",
                str(tmp_path / "out"),
                "--quiet",
                "--method",
                "fasp",
                "--num-samples",
                "4",
                "--seq-len",
                "32",
            ]
            command += ["--dtype", "float32", "--multiple-of", "1", "--calibration", str(calibration)]
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*command, *map(str, arguments)])
        printed = capsys.readouterr()
        assert caught.value.code == 2, printed
        assert printed.out == ""
        assert "Traceback" not in printed.err
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("structprune: ")
        assert not (tmp_path / "out.partial").exists()
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0].removeprefix("structprune: ")

    return run


def with_config(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def with_tensor(source: Path, target: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def one_nan(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[tensor.numel() // 2] = float("nan")
    return changed


@pytest.fixture
def many_shards(tmp_path: Path) -> Path:
    directory = save_tiny("llama", tmp_path / "many", max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


# Settings


@pytest.mark.parametrize("value", ["-0.1", "100", "nan", "inf"])
def test_sparsity_out_of_range(value: str, refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--sparsity", value)
    assert message.startswith(f"--sparsity is not usable; got {float(value)}, wanted")
    assert re.search(r"(greater than or equal to 0|less than 1|finite number)\.$", message)


@pytest.mark.parametrize(("value", "meant"), [("30", "0.3"), ("1.0", "0.01"), ("12.5", "0.125")])
def test_sparsity_that_was_meant_as_a_percentage(value: str, meant: str, refused: Refused, tiny_llama: Path) -> None:
    assert refused(tiny_llama, "--sparsity", value) == (
        f"--sparsity is not usable; got {value}, wanted a share, at least 0 and less than 1. Did you mean {meant}?"
    )


def test_sparsity_that_is_no_number(refused: Refused, tiny_llama: Path) -> None:
    assert refused(tiny_llama, "--sparsity", "abc").startswith("--sparsity is not usable; got 'abc', wanted input")


def test_a_flag_that_is_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    """Found while the flags are read: the usage comes with it."""
    monkeypatch.setenv("COLUMNS", "240")
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(tiny_llama), "-o", str(tmp_path / "out"), "--seed", "abc"])
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.count("Invalid value") == 1
    assert "--seed" in printed.err
    assert "integer" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_sparsity_that_leaves_nothing(refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--sparsity", "0.999")
    assert "no mlp units would be left" in message
    assert "Lower --sparsity" in message


def test_multiple_wider_than_the_model(refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--multiple-of", 64)
    assert "multiples of 64" in message
    assert "--multiple-of" in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--num-samples", "0"),
        ("--seq-len", "1"),
        ("--seed", "-1"),
        ("--multiple-of", "0"),
        ("--damping", "0"),
        ("--dtype", "int8"),
        ("--scope", "heads"),
        ("--device", "abacus"),
    ],
)
def test_other_settings_out_of_range(flag: str, value: str, refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, flag, value)
    assert message.startswith(f"{flag} is not usable; got")
    assert value in message


@pytest.mark.parametrize(("given", "meant"), [("fassp", "fasp"), ("wandaa", "wanda"), ("magnitud", "magnitude")])
def test_unknown_method(given: str, meant: str, refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--method", given)
    assert f"unknown method '{given}'" in message
    assert f"id you mean '{meant}'?" in message
    for name in METHODS:
        assert name in message


def test_unknown_method_unlike_any(refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--method", "xyzzy")
    assert "did you mean" not in message.lower()
    assert "fasp" in message


@pytest.mark.parametrize("scope", ["attention", "all"])
@pytest.mark.parametrize("method", list(METHODS))
def test_unsupported_scope(method: str, scope: str, refused: Refused, tiny_llama: Path) -> None:
    if METHODS.get(method).kinds != ("mlp",) or METHODS.get(method).pipeline != "units":
        pytest.skip(f"{method} prunes more than the MLP, or no units")
    message = refused(tiny_llama, "--method", method, "--scope", scope)
    assert message == f"method '{method}' does not prune attention; got --scope {scope}, wanted --scope mlp."


def test_scores_that_a_method_cannot_feed(refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--score", "wander")
    assert message.startswith("unknown score 'wander'. Did you mean 'wanda'? known: magnitude, ")
    assert message.endswith("greedy, penalty, greedy-swap.")
    assert "needs the output sensitivity" in refused(tiny_llama, "--score", "loss")
    assert "measures nothing that a score could read" in refused(tiny_llama, "--method", "magnitude", "--score", "l2")


def test_taylor_scores_need_a_method_that_measures_gradients(refused: Refused, tiny_llama: Path) -> None:
    for method in ("fasp", "structprune", "flap", "magnitude"):
        message = refused(tiny_llama, "--method", method, "--score", "taylor-first")
        assert message == (
            f"score 'taylor-first' needs gradients by the weights, which '{method}' does not measure; "
            "wanted another --score, or --method llm-pruner."
        )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--score", "wanda"), "measures gradients by the weights, which score 'wanda' does not read"),
        (("--score", "magnitude"), "wanted --score taylor-vector, taylor-first, taylor-second, taylor-mix"),
        (("--score", "greedy"), "measures gradients by the weights, which score 'greedy' does not read"),
        (("--solver", "least-squares"), "measures nothing that a solver could use; wanted --solver mask-only"),
        (("--solver", "bias"), "measures nothing that a solver could use; wanted --solver mask-only"),
        (("--target", "dense-path"), "solves nothing, so it has no target; wanted --target local"),
        (("--allocator", "closed-form", "--structure", "uniform"), "gives every block its own width"),
        (("--allocator", "closed-form", "--outer-iterations", "1"), "in another unit than 'llm-pruner' does"),
        (("--allow-block-removal",), "takes the same share of every block"),
        (("--protect-first", "1", "--structure", "uniform"), "protected blocks keep another width than the others"),
        (("--protect-first", "2"), "every block is protected; got --protect-first 2, --protect-last 0"),
    ],
    ids=str,
)
def test_what_llm_pruner_cannot_do(flags: tuple[str, ...], expected: str, refused: Refused, tiny_llama: Path) -> None:
    assert expected in refused(tiny_llama, "--method", "llm-pruner", *flags)


def test_prices_of_another_unit_have_no_outer_iterations(refused: Refused, tiny_llama: Path) -> None:
    assert "in another unit than 'flap' does" in refused(tiny_llama, "--method", "flap", "--outer-iterations", 1)


def test_protection_of_every_block(refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--protect-first", 1, "--protect-last", 1)
    assert message == (
        "every block is protected; got --protect-first 1, --protect-last 1, wanted fewer than 2 together."
    )


def test_protected_blocks_are_uneven(refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--protect-first", 1, "--structure", "uniform")
    assert message == "protected blocks keep another width than the others; wanted --structure per-layer."


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--temperature", "0.5"),
            "the closed-form allocator has no temperature; got --temperature 0.5, wanted --allocator fermi-dirac, "
            "softmax.",
        ),
        (
            ("--head-units", "query-head"),
            "heads stay as they are where attention is not in scope; got --head-units query-head, --scope mlp, wanted "
            "--scope attention or all, or --head-units left out.",
        ),
        (
            ("--repair-epochs", "3"),
            "--repair-epochs says how --repair is done, which asks for nothing; got --repair-epochs 3, --repair none, "
            "wanted a value for --repair, or --repair-epochs left out.",
        ),
    ],
)
def test_settings_of_what_is_not_done(
    flags: tuple[str, ...], expected: str, refused: Refused, tiny_llama: Path
) -> None:
    assert refused(tiny_llama, "--method", "structprune", *flags) == expected


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--solver", "least-squares"),
        ("--solver", "bias"),
        ("--allocator", "closed-form"),
        ("--target", "dense-path"),
        ("--structure", "per-layer"),
        ("--head-units", "query-head"),
        ("--damping", "auto"),
        ("--temperature", "0.5"),
        ("--min-retention", "0.2"),
        ("--outer-iterations", "1"),
        ("--allow-block-removal", None),
        ("--multiple-of", "8"),
        ("--sensitivity-samples", "3"),
    ],
)
def test_settings_without_a_meaning_for_whole_blocks(
    flag: str, value: str | None, refused: Refused, tiny_llama: Path
) -> None:
    given = [flag] if value is None else [flag, value]
    message = refused(tiny_llama, "--method", "depth", *given)
    if flag == "--sensitivity-samples":
        assert message == f"{flag} has no meaning for whole blocks chosen by 'angular'; got {value}, wanted no {flag}."
    else:
        having = [name for name in METHODS if METHODS.get(name).pipeline == "units"]
        prefix = f"{flag} has no meaning for method 'depth', which removes whole blocks; got {value or 'true'}, wanted "
        assert message.startswith(prefix)
        # Single weights have a solver, a target and a ridge too.
        assert set(having) <= set(message.removeprefix(f"{prefix}--method ").removesuffix(".").split(", "))


def test_several_settings_without_a_meaning_are_one_error(refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--method", "reap", "--solver", "bias", "--damping", 0.1)
    assert message.startswith("--damping, --solver have no meaning for method 'reap', which removes whole experts")


@pytest.mark.parametrize("scope", ["mlp", "attention"])
def test_whole_blocks_have_one_scope(scope: str, refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--method", "depth", "--scope", scope)
    assert message == f"method 'depth' removes whole blocks; got --scope {scope}, wanted --scope all."


def test_score_that_is_none_of_whole_blocks(refused: Refused, tiny_llama: Path) -> None:
    assert refused(tiny_llama, "--method", "depth", "--score", "angle") == (
        "unknown block score 'angle'. Did you mean 'angular'? known: angular, measured-loss."
    )
    assert "unknown score 'angular'" in refused(tiny_llama, "--method", "fasp", "--score", "angular")


def test_more_blocks_than_there_are(refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, "--method", "depth", "--sparsity", 0.6)
    assert message.startswith("no block would be left; got sparsity 0.6, which is 2 of 2 blocks, wanted at most 1.")
    message = refused(tiny_llama, "--method", "depth", "--protect-first", 1, "--protect-last", 1)
    assert message.startswith("every block is protected; got --protect-first 1, --protect-last 1")


def test_blocks_of_different_widths_stay(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    """One config cannot describe what would be left of them."""
    layers = {"per_layer_config": {"0": {"intermediate_size": 48}, "1": {"intermediate_size": 48}}}
    entries = layers | {"allow_global_per_layer_attribute_access": True}
    message = refused(with_config(tiny_llama, tmp_path / "same", **entries), "--method", "depth")
    assert message.startswith("the source's blocks have configs of their own")
    assert "Remove blocks first and units afterwards" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sparsty: 0.3\n", "unknown recipe field 'sparsty'"),
        ("sparsity: high\n", "--sparsity is not usable; got 'high'"),
        ("sparsity: 1.5\n", "--sparsity is not usable; got 1.5"),
        ("memory: lots\n", "a size in bytes cannot be read; got 'lots'"),
        ("sparsity: [0.3\n", "cannot be read as YAML"),
        ("- sparsity\n", "a recipe must be a mapping"),
        ("1: 2\n", "a recipe must be a mapping"),
    ],
)
def test_bad_recipe(content: str, expected: str, refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert expected in refused(tiny_llama, "--recipe", path)


def test_unknown_recipe_field_names_the_known_ones(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("sparsty: 0.3\n")
    message = refused(tiny_llama, "--recipe", path)
    assert str(path) in message
    assert "sparsity" in message.split("nown:")[1]


def test_recipe_file_missing(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    message = refused(tiny_llama, "--recipe", tmp_path / "none.yaml")
    assert message == f"{tmp_path / 'none.yaml'}: the recipe file does not exist."


# Output


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_output_exists(kind: str, refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "directory":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
    else:
        output.write_text("mine")
    message = refused(tiny_llama)
    assert message == f"{output}: the output directory exists. Choose another -o, or remove it first."
    assert (output / "mine.txt" if kind == "directory" else output).read_text() == "mine"


def test_working_directory_of_somebody_else(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    staging = tmp_path / "out.partial"
    staging.mkdir()
    (staging / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(tiny_llama), "-o", str(tmp_path / "out"), "--calibration", str(text_file)])
    assert caught.value.code == 2
    assert f"{staging}: the working directory exists and is not a run's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out.partial", "mine.txt"]
    assert (staging / "mine.txt").read_text() == "mine"


def test_output_that_another_run_is_writing(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """The second run is refused and takes nothing from the first."""
    command = ["prune", str(tiny_llama), "-o", str(tmp_path / "out"), "--calibration", str(text_file), "--quiet"]
    with RunDirectory(tmp_path / "out") as first:
        first.begin()
        journal = (first.staging / "journal.jsonl").read_text()
        (first.staging / "work").write_text("mine")
        with pytest.raises(SystemExit) as caught:
            main([*command, "--num-samples", "2", "--seq-len", "32"])
        assert caught.value.code == 2
        assert "another process is writing this output" in capsys.readouterr().err
        assert (first.staging / "work").read_text() == "mine"
        assert (first.staging / "journal.jsonl").read_text() == journal
    assert not (tmp_path / "out").exists()


def test_working_directory_is_a_file(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(tiny_llama), "-o", str(tmp_path / "out"), "--calibration", str(text_file)])
    assert caught.value.code == 2
    assert "the working directory exists and is not a run's" in capsys.readouterr().err
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_output_below_a_file(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = refused(tiny_llama, "-o", tmp_path / "file" / "out")
    assert str(tmp_path / "file") in message


def test_no_parent_directory_stays_behind(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_tensor(tiny_llama, tmp_path / "source", "model.layers.1.mlp.down_proj.weight", one_nan)
    refused(source, "-o", tmp_path / "new" / "deeper" / "out")


# The model


def test_model_directory_missing(refused: Refused, tmp_path: Path) -> None:
    for verb in ("prune", "inspect"):
        message = refused(tmp_path / "nowhere", verb=verb)
        assert message == f"{tmp_path / 'nowhere'}: the model directory does not exist. Check the path."


@pytest.mark.parametrize("name", ["no-such-organisation/no-such-model", "no-such-model"])
def test_hub_that_cannot_be_reached(name: str, refused: Refused) -> None:
    message = refused(name)
    assert f"'{name}' is no local directory and the hub cannot be reached" in message
    assert "Check the path or the network" in message


def test_name_that_is_no_hub_id(refused: Refused) -> None:
    assert refused("what?ever") == "'what?ever' is neither a directory nor a hub id. Check the path."


def test_model_is_another_file(refused: Refused, text_file: Path) -> None:
    assert "not a .gguf" in refused(text_file)


def test_empty_directory(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty")
    assert message.startswith(f"{tmp_path / 'empty' / 'config.json'}: the file is missing")


def test_pickled_weights_are_not_opened(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    message = refused(source)
    assert "no safetensors weights found; got pytorch_model.bin" in message
    assert "pickles are never loaded" in message


def test_missing_shard(refused: Refused, many_shards: Path) -> None:
    shard = sorted(many_shards.glob("*.safetensors"))[2]
    shard.unlink()
    message = refused(many_shards)
    assert message.startswith(f"{shard}: a shard that the index names is missing.")
    assert "ownload" in message


@pytest.mark.parametrize("keep", [0, 5, 200, -10])
def test_truncated_shard(keep: int, refused: Refused, many_shards: Path) -> None:
    shard = sorted(many_shards.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refused(many_shards)
    assert message.startswith(f"{shard}: the shard is truncated or not safetensors")
    assert "Download this file again" in message


@pytest.mark.parametrize("keep", [0, 5, -10])
def test_truncated_single_file(keep: int, refused: Refused, tiny_opt: Path, tmp_path: Path) -> None:
    source = with_config(tiny_opt, tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(source).startswith(f"{path}: the shard is truncated or not safetensors")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "", 3])
def test_index_that_points_elsewhere(name: object, refused: Refused, many_shards: Path) -> None:
    path = many_shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    assert refused(many_shards) == f"{path}: the index names a shard outside its directory; got {name!r}."


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": {}}'])
def test_index_that_is_no_index(content: str, refused: Refused, many_shards: Path) -> None:
    path = many_shards / "model.safetensors.index.json"
    path.write_text(content)
    assert refused(many_shards).startswith(f"{path}: ")


def test_tensor_in_the_wrong_shard(refused: Refused, many_shards: Path) -> None:
    path = many_shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    right = index["weight_map"]["model.norm.weight"]
    wrong = next(shard for shard in index["weight_map"].values() if shard != right)
    # No entry names the shard that holds it any more.
    index["weight_map"] = {name: wrong if shard == right else shard for name, shard in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    message = refused(many_shards)
    assert "the checkpoint lacks" in message
    assert "that no shard holds" in message


def test_missing_tensor(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source", num_hidden_layers=3)
    message = refused(source)
    names = ["input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"]
    names += [f"self_attn.{name}_proj" for name in "koqv"]
    listed = ", ".join(f"'model.layers.2.{name}.weight'" for name in names)
    assert f"the checkpoint lacks 9 tensor(s): {listed}. Check that config.json belongs to the checkpoint" in message


def test_many_missing_tensors(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source", num_hidden_layers=4)
    message = refused(source)
    assert "the checkpoint lacks 18 tensor(s): 'model.layers.2.input_layernorm.weight', " in message
    assert "'model.layers.3.input_layernorm.weight' and 8 more. Check that config.json belongs to" in message


def with_extra(tiny: Path, target: Path, *names: str) -> Path:
    """A copy of the checkpoint with further tensors."""
    source = with_config(tiny, target)
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: torch.ones(2) for name in names}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize(
    "names",
    [("model.layers.0.mlp.gate_proj.scale",), ("score.weight",), ("model.layers.2.mlp.up_proj.weight", "v_head.bias")],
    ids=["in a block", "around the blocks", "both"],
)
def test_extra_tensors(names: tuple[str, ...], refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_extra(tiny_llama, tmp_path / "source", *names)
    listed = ", ".join(map(repr, names))
    for verb in ("prune", "inspect"):
        message = refused(source, verb=verb)
        assert message.startswith(
            f"{source}: the checkpoint has {len(names)} tensor(s) that the configuration does not have: {listed}"
        )
        assert message.endswith(
            "Check that config.json belongs to it; to leave them out, load it with AutoModelForCausalLM and save it "
            "with save_pretrained."
        )
    # What the message advises.
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
    inspect(tmp_path / "saved")


def test_a_renamed_tensor_is_named_under_both_names(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_extra(tiny_llama, tmp_path / "source", "model.final_norm.weight")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = refused(source)
    assert "the checkpoint lacks 1 tensor(s): 'model.norm.weight'; got 1 tensor(s) that the configuration" in message
    assert "does not have: 'model.final_norm.weight'" in message


def test_computed_buffers_of_old_checkpoints_are_no_extra_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    names = [f"model.{place}rotary_emb.inv_freq" for place in ("", "layers.0.self_attn.")]
    source = with_extra(tiny_llama, tmp_path / "source", *names)
    assert inspect(source).num_parameters == inspect(tiny_llama).num_parameters


def test_tensor_of_another_shape(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source", intermediate_size=40)
    message = refused(source)
    assert "has another shape than the configuration says; got (48, 32), wanted (40, 32)" in message


@pytest.mark.parametrize("model_type", ["t5", "no-such-family", None, 3])
def test_unknown_family(model_type: object, refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source", model_type=model_type)
    for verb in ("prune", "inspect"):
        message = refused(source, verb=verb)
        assert message == (
            f"{source / 'config.json'}: unknown model family; got model_type {model_type!r}, wanted "
            f"{', '.join(FAMILIES)}. See docs/add-an-architecture.md: a family is one file of data."
        )
    assert (Path(__file__).parents[2] / "docs" / "add-an-architecture.md").is_file()


def test_opt_with_projections(refused: Refused, tiny_opt: Path, tmp_path: Path) -> None:
    message = refused(with_config(tiny_opt, tmp_path / "source", word_embed_proj_dim=16))
    assert "project_in/project_out is not supported; got word_embed_proj_dim 16, hidden_size 32" in message


def test_opt_with_norm_after_the_sum(refused: Refused, tiny_opt: Path, tmp_path: Path) -> None:
    message = refused(with_config(tiny_opt, tmp_path / "source", do_layer_norm_before=False))
    assert "layer norm after the sum is not supported" in message


def test_quantised_config(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source", quantization_config={"quant_method": "gptq", "bits": 4})
    message = refused(source)
    assert "config.json announces a quantisation that the weights do not have" in message
    assert "quant_method 'gptq' beside weights in float32" in message


def test_quantised_tensor(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = with_tensor(tiny_llama, tmp_path / "source", name, lambda tensor: tensor.to(torch.int8))
    message = refused(source)
    assert f"tensor '{name}' is stored quantised or as integers" in message
    assert "got I8" in message


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_config_that_is_no_json_object(content: str, refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source")
    (source / "config.json").write_text(content)
    assert refused(source).startswith(f"{source / 'config.json'}: the file ")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"hidden_size": -4},
        {"intermediate_size": 0},
        {"hidden_act": "no-such-function"},
        {"hidden_size": "x"},
        {"num_hidden_layers": 0},
    ],
    ids=str,
)
def test_config_that_makes_no_model(
    changes: dict[str, Any], refused: Refused, tiny_llama: Path, tmp_path: Path
) -> None:
    message = refused(with_config(tiny_llama, tmp_path / "source", **changes))
    assert str(tmp_path / "source") in message


def test_tokenizer_missing(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    message = refused(source)
    assert message.startswith(f"{source}: the tokenizer cannot be loaded")


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF", b"GGUF" + b"\x00" * 40, b"GGUF\x03" + b"\xff" * 60])
def test_corrupt_gguf(content: bytes, refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}: the file is truncated or not GGUF")


def test_truncated_gguf(refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from support.gguf_files import plain_gguf

    path = tmp_path / "model.gguf"
    plain_gguf(path, "llama")
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(path).startswith(f"{path}: the file is truncated or not GGUF")


def test_gguf_of_another_architecture(refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from support.gguf_files import plain_gguf

    path = tmp_path / "model.gguf"
    plain_gguf(path, "gptj")
    assert refused(path).startswith(f"{path}: this GGUF architecture cannot be read; got gptj, wanted an architecture")


def test_gguf_without_its_metadata(refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from support.gguf_files import plain_gguf

    path = tmp_path / "model.gguf"
    plain_gguf(path, "llama")
    message = refused(path)
    assert message.startswith(f"{path}: the GGUF file's llama.embedding_length is not usable; got nothing")


def test_gguf_missing(refused: Refused, tmp_path: Path) -> None:
    assert refused(tmp_path / "none.gguf") == f"{tmp_path / 'none.gguf'}: the GGUF file does not exist."


# Values


@pytest.mark.parametrize("method", ["fasp", "magnitude"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_nan_in_weights(name: str, method: str, refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_tensor(tiny_llama, tmp_path / "source", name, one_nan)
    message = refused(source, "--method", method)
    assert message.startswith(f"{source / 'model.safetensors'}: tensor '{name}' holds NaN or infinity.")


def test_infinity_in_weights(refused: Refused, tiny_opt: Path, tmp_path: Path) -> None:
    name = "model.decoder.layers.1.fc1.bias"
    source = with_tensor(
        tiny_opt, tmp_path / "source", name, lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("inf"))
    )
    assert f"tensor '{name}' holds NaN or infinity" in refused(source)


@pytest.mark.parametrize("method", ["fasp", "wanda-sp"])
@pytest.mark.parametrize("index", [0, 1])
def test_activations_that_overflow(method: str, index: int, refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    name = f"model.layers.{index}.mlp.up_proj.weight"
    source = with_tensor(tiny_llama, tmp_path / "source", name, lambda tensor: tensor * 1e30)
    message = refused(source, "--method", method)
    assert message.startswith(f"block {index} mlp: 48 of 48 activations are NaN or infinite")
    assert "--dtype float32" in message


def test_activations_that_overflow_in_half_precision(refused: Refused, tiny_opt: Path, tmp_path: Path) -> None:
    """Fine in float32, infinite in float16: the message's advice is the cure."""
    name = "model.decoder.layers.0.fc1.weight"
    source = with_tensor(tiny_opt, tmp_path / "source", name, lambda tensor: tensor * 1e5)
    message = refused(source, "--dtype", "float16")
    assert message.startswith("block 0")
    assert "Use --dtype float32" in message


def test_weight_too_large_to_score(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = with_tensor(tiny_llama, tmp_path / "source", name, lambda tensor: tensor * 1e30)
    assert refused(source, "--method", "magnitude").startswith("block 0 mlp: a score is not finite")


@pytest.mark.parametrize("index", [0, 1])
def test_activations_that_overflow_without_statistics(
    index: int, refused: Refused, tiny_llama: Path, tmp_path: Path
) -> None:
    name = f"model.layers.{index}.self_attn.v_proj.weight"
    source = with_tensor(tiny_llama, tmp_path / "source", name, lambda tensor: tensor * 1e38)
    assert f"block {index}" in refused(source, "--method", "magnitude")


def test_activations_that_overflow_after_the_last_gram(refused: Refused, tiny_opt: Path, tmp_path: Path) -> None:
    name = "model.decoder.layers.1.fc2.bias"
    source = with_tensor(tiny_opt, tmp_path / "source", name, lambda tensor: torch.full_like(tensor, 3e38))
    refused(source, "--method", "fasp")


def test_logits_that_overflow(refused: Refused, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The blocks are fine, the last norm is not."""
    source = with_tensor(tiny_llama, tmp_path / "source", "model.norm.weight", lambda tensor: tensor * 1e38)
    refused(source)


def test_eval_of_nan(refused: Refused, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    source = with_tensor(tiny_llama, tmp_path / "source", "model.layers.1.mlp.down_proj.weight", one_nan)
    refused(source, "--text", text_file, "--seq-len", 32, "--max-windows", 2, verb="eval")


# Calibration text


@pytest.mark.parametrize("name", ["wikitext", "selfie"])
def test_unknown_calibration(name: str, refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, calibration=name)
    assert message.startswith(
        f"unknown calibration '{name}'; wanted wikitext2, c4, boolq, python, self, mix, or the path"
    )


@pytest.mark.parametrize("name", ["none.txt", "no/such/file"])
def test_text_file_missing(name: str, refused: Refused, tiny_llama: Path) -> None:
    assert refused(tiny_llama, calibration=name) == f"{name}: the text file does not exist."


def test_text_shorter_than_one_window(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a" * 31)
    message = refused(tiny_llama, calibration=path)
    assert "the calibration text is shorter than one window; got 31 tokens, wanted at least 32" in message
    assert "--seq-len" in message
    assert "shorter than one window; got 31 tokens" in refused(tiny_llama, "--text", path, "--seq-len", 32, verb="eval")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("latin.txt", b"caf\xe9 " * 50, "is not UTF-8"),
        ("rows.jsonl", b'{"text": "a"}\n{"text"\n', "rows.jsonl:2: the line is not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n\n{"comment": "b"}\n', "rows.jsonl:3: the row has no text"),
        ("empty.txt", b"", "got 0 tokens"),
    ],
)
def test_text_that_cannot_be_used(
    name: str, content: bytes, expected: str, refused: Refused, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in refused(tiny_llama, calibration=tmp_path / name)


def test_text_is_a_directory(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    assert "the text file cannot be read" in refused(tiny_llama, calibration=tmp_path / "texts")


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_hub_text_that_cannot_be_had(name: str, refused: Refused, tiny_llama: Path) -> None:
    message = refused(tiny_llama, calibration=name)
    if importlib.util.find_spec("datasets") is None:
        assert message.startswith(f"calibration source '{name}' needs the datasets package")
    else:
        assert message.startswith(f"calibration source '{name}' cannot be fetched")
    assert "Pip install" in message or "--calibration boolq or self" in message


def test_self_sampling_without_start_token(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    source = with_config(tiny_llama, tmp_path / "source")
    path = source / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("bos_token", "eos_token")}
    path.write_text(json.dumps(settings))
    assert "needs a start token" in refused(source, calibration="self")


# Memory


@pytest.mark.parametrize("value", ["lots", "-1", "4 parsecs", ""])
def test_memory_that_is_no_size(value: str, refused: Refused, tiny_llama: Path) -> None:
    assert f"a size in bytes cannot be read; got {value!r}" in refused(tiny_llama, "--memory", value)


@pytest.mark.parametrize(
    ("check", "where", "advice"),
    [
        (["--no-reload-check"], r"phase '[a-z ()]+'", "Raise --memory or lower --seq-len"),
        # Beside a model of this size, what loads the result needs most.
        (
            [],
            "the process that loads the result to check it",
            "Raise --memory, or leave the check out with --no-reload-check",
        ),
    ],
)
def test_budget_that_cannot_hold_one_block(
    check: list[str],
    where: str,
    advice: str,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    # The plan depends on the dtype, and `auto` on what else the machine is doing.
    message = refused(tiny_llama, "--memory", "10MiB", "--dtype", "float32", *check)
    match = re.fullmatch(
        rf"{where}: does not fit in the memory budget; got 10\.0 MiB, wanted at least (\d+ MiB)\. {advice}\.",
        message,
    )
    assert match is not None
    # The budget that the message names would do.
    command = [
        "prune",
        "--method",
        "fasp",
        str(tiny_llama),
        "-o",
        str(tmp_path / "out"),
        "--calibration",
        str(text_file),
        "--quiet",
        *check,
    ]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--num-samples", "4", "--seq-len", "32", "--dtype", "float32", "--memory", match[1], "--json"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["memory"] == parse_bytes(match[1])


def test_large_budget_that_is_named_would_do(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    """Very long windows, of which only the plan is made: there is no such text."""
    source = with_config(tiny_llama, tmp_path / "source", max_position_embeddings=2**21)
    for seq_len in (900_000, 920_000, 940_000, 960_000, 980_000):
        message = refused(source, "--seq-len", seq_len, "--memory", "100MiB")
        match = re.search(r"wanted at least (\d+ MiB)\.", message)
        assert match is not None, message
        message = refused(source, "--seq-len", seq_len, "--memory", match[1])
        assert "shorter than one window" in message, match[1]
