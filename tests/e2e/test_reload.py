"""The reload check: a fresh process with stock code gets the run's logits from the files, or the run fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from structprune import Recipe, prune
from structprune.architectures.modeling.per_layer import MODELING_NAME
from structprune.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from structprune.checkpoint.weight_files import WeightFiles
from structprune.cli import main
from structprune.engine.planning.reload import ReloadBound
from structprune.errors import CheckpointError, InputError
from structprune.evaluation import reload
from structprune.results.report import PruneReport
from structprune.runs.directory import REJECTED_NAME
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")


def has_weights(directory: Path) -> bool:
    """Whether a loader would find weights there."""
    return (directory / SINGLE_NAME).exists() or (directory / INDEX_NAME).exists()


def run(source: Path, text_file: Path, output: Path, **changes: Any) -> PruneReport:
    settings = {
        "method": "fasp",
        "calibration": str(text_file),
        "num_samples": 4,
        "seq_len": 48,
        "dtype": "float32",
        "multiple_of": 1,
    }
    return prune(source, Recipe.build(**settings | changes), output)


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "pruning_report.json").read_text(encoding="utf-8"))


UNEVEN = {"method": "structprune", "scope": "all", "sparsity": 0.4, "allow_block_removal": True}


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        pytest.param("opt", {"method": "wanda-sp"}, marks=pytest.mark.slow),
        ("llama-untied-biased", UNEVEN),
    ],
)
def test_a_fresh_process_gets_the_same_logits(
    family: str, settings: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "source")
    report = run(source, text_file, tmp_path / "out", **settings)
    check = report.reload
    assert (check.mode, check.reason, check.num_positions, check.same_top1) == ("whole", "", 32, 1.0)
    assert check.relative_difference is not None
    assert check.tolerance == 1e-3
    assert check.relative_difference < 1e-5
    assert check.peak_bytes is not None
    assert check.planned_bytes is not None
    assert 0 < check.peak_bytes < check.planned_bytes
    assert check.seconds > 0
    assert report_of(tmp_path / "out")["reload"] == check.model_dump(mode="json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("opt", {}),
        ("llama-untied-biased", UNEVEN),
        ("llama", {"method": "slicegpt", "sparsity": 0.1, "multiple_of": 4}),
    ],
)
def test_a_tight_budget_has_it_loaded_module_by_module(
    family: str, settings: dict[str, Any], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(family, tmp_path / "source")
    monkeypatch.setattr(ReloadBound, "mode", lambda *_: "streamed")
    loaded: list[str] = []

    def whole(*_: Any) -> None:
        loaded.append("whole")

    monkeypatch.setattr(reload, "_whole", whole)
    check = run(source, text_file, tmp_path / "out", **settings).reload
    assert (check.mode, loaded) == ("streamed", [])
    assert check.reason == "the whole model does not fit in what is left of --memory"
    assert check.relative_difference is not None
    assert check.relative_difference < 1e-5
    assert check.same_top1 == 1.0


def test_the_mode_follows_from_the_budget() -> None:
    bound = ReloadBound(run_bytes=10, casts=True, largest_bytes=100, item_bytes=2, vocab_size=1000)
    whole, streamed = (bound.bytes(mode, 10**9, 4 * 10**9) for mode in ("whole", "streamed"))
    assert 6 * 10**9 < whole < 6.2 * 10**9
    assert streamed < 2 * 10**8
    assert bound.mode(10**9, 4 * 10**9, whole) == "whole"
    assert bound.mode(10**9, 4 * 10**9, whole - 1) == "streamed"


def damage_after_writing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    write = WeightFiles.write

    def damaged(files: WeightFiles, directory: Path, *listeners: Callable[[str], None]) -> None:
        write(files, directory, *listeners)
        change(directory)

    monkeypatch.setattr(WeightFiles, "write", damaged)


def scaled_norm(directory: Path) -> None:
    """Sound by every header and checksum; 2% off."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][::2] *= 1.02
            save_file(tensors, path, metadata={"format": "pt"})


def zeroed_bytes(directory: Path) -> None:
    """A hole in a file's data, as a bad disk leaves it."""
    path = directory / SINGLE_NAME
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)


def other_epsilon(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}), encoding="utf-8")


DAMAGES = {"norm": scaled_norm, "hole": zeroed_bytes, "config": other_epsilon}


@pytest.mark.parametrize("mode", ["whole", "streamed"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_after_writing_fails_the_run(
    damage: str, mode: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_after_writing(monkeypatch, DAMAGES[damage])
    monkeypatch.setattr(ReloadBound, "mode", lambda *_: mode)
    with pytest.raises(
        CheckpointError, match="predicts otherwise than the run did; got a relative difference"
    ) as caught:
        run(tiny_llama, text_file, tmp_path / "out")
    assert caught.value.where == str(tmp_path / "out.rejected")
    assert caught.value.wanted == "at most 0.001"
    # What is left cannot be taken for a finished output, and says why it is there.
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    assert not has_weights(tmp_path / "out.rejected")
    assert (tmp_path / "out.rejected" / f"{SINGLE_NAME}.rejected").is_file()
    assert not (tmp_path / "out.rejected" / "pruning_report.json").exists()
    assert "relative difference" in json.loads((tmp_path / "out.rejected" / REJECTED_NAME).read_text())["got"]
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out.rejected")


def test_a_rejected_output_makes_room(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        damage_after_writing(patch, scaled_norm)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="predicts otherwise"):
                run(tiny_llama, text_file, tmp_path / "out")
        # Not one of ours: left alone, and said before any work.
        shutil.rmtree(tmp_path / "out.rejected")
        (tmp_path / "out.rejected").mkdir()
        with pytest.raises(InputError, match="the directory of rejected output exists and is not a run's"):
            run(tiny_llama, text_file, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.rejected")
    run(tiny_llama, text_file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_in_several_files_is_taken_back_by_its_index(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_after_writing(monkeypatch, scaled_norm)
    with pytest.raises(CheckpointError, match="predicts otherwise than the run did"):
        run(tiny_llama, text_file, tmp_path / "out", max_shard_size="20KB")
    rejected = tmp_path / "out.rejected"
    assert len(list(rejected.glob("model-*.safetensors"))) > 2
    assert not has_weights(rejected)
    assert (rejected / f"{INDEX_NAME}.rejected").is_file()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(rejected)


@pytest.mark.parametrize("mode", ["whole", "streamed"])
def test_weights_that_are_not_finite_fail_the_run(
    mode: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(directory: Path) -> None:
        path = directory / SINGLE_NAME
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})

    damage_after_writing(monkeypatch, poisoned)
    monkeypatch.setattr(ReloadBound, "mode", lambda *_: mode)
    with pytest.raises(CheckpointError, match=r"NaN.*wanted a checkpoint that loads"):
        run(tiny_llama, text_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_modelling_file_is_not_run(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"

    def foreign(directory: Path) -> None:
        with (directory / MODELING_NAME).open("a") as handle:
            handle.write(f"\nopen({str(marker)!r}, 'w').close()\n")

    damage_after_writing(monkeypatch, foreign)
    with pytest.raises(CheckpointError, match="not one that structprune writes"):
        run(tiny_llama, text_file, tmp_path / "out", **UNEVEN)
    assert not marker.exists()


def ends_with(monkeypatch: pytest.MonkeyPatch, *endings: str | None) -> list[str]:
    """The process's ends in turn; None: it answers. Returns the modes that were tried."""
    tried: list[str] = []

    def process(spec: reload.ReloadSpec, _: Path) -> reload.ReloadResult:
        tried.append(spec.mode)
        ending = endings[len(tried) - 1]
        if ending is not None:
            raise reload.ProcessEndedError(ending)
        return reload.reload_here(spec)

    monkeypatch.setattr(reload, "reload_in_a_process", process)
    return tried


def test_a_process_that_was_killed_is_tried_again_in_less_memory(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = ends_with(monkeypatch, "signal 9 (out of memory?)", None)
    check = run(tiny_llama, text_file, tmp_path / "out").reload
    assert tried == ["whole", "streamed"]
    assert check.mode == "streamed"
    assert check.reason == "loading the whole model ended with signal 9 (out of memory?)"


def test_a_process_that_is_killed_twice_fails_the_run(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_with(monkeypatch, "signal 9 (out of memory?)", "signal 9 (out of memory?)")
    with pytest.raises(CheckpointError, match="a process that ended with signal 9"):
        run(tiny_llama, text_file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]


def test_a_model_whose_parameters_have_other_names_is_reported(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReloadBound, "mode", lambda *_: "streamed")
    empty = reload._empty_model

    def fused(*arguments: Any) -> Any:
        model = empty(*arguments)
        model.model.layers[1].mlp.register_module("experts", torch.nn.Linear(2, 2))
        return model

    monkeypatch.setattr(reload, "_empty_model", fused)
    check = run(tiny_llama, text_file, tmp_path / "out").reload
    assert check.mode == "impossible"
    assert check.reason.endswith("no tensor of the checkpoint is model.layers.1.mlp.experts.weight")
    assert check.relative_difference is None


def test_it_can_be_left_out(tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = ends_with(monkeypatch)
    command = [
        "prune",
        "--method",
        "fasp",
        str(tiny_llama),
        "-o",
        str(tmp_path / "out"),
        "--calibration",
        str(text_file),
        "--seq-len",
        "32",
    ]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--num-samples", "4", "--dtype", "float32", "--no-reload-check", "--quiet"])
    assert caught.value.code == 0
    assert tried == []
    found = report_of(tmp_path / "out")
    assert (found["reload"]["mode"], found["reload"]["reason"]) == ("off", "--no-reload-check")
    assert found["recipe"]["reload_check"] is False


@pytest.mark.usefixtures("fresh_process")
def test_a_process_that_fails_says_how(tiny_llama: Path, tmp_path: Path) -> None:
    spec = reload.ReloadSpec(directory=tiny_llama, probe=tmp_path / "none", mode="whole", dtype="float32")
    answer = reload.reload_in_a_process(spec, tmp_path)
    assert answer.error is not None
    assert "none" in answer.error
    # Something is where the answer should go.
    (tmp_path / "nowhere" / "reload-result.json" / "more").mkdir(parents=True)
    with pytest.raises(reload.ProcessEndedError, match="nowhere"):
        reload.reload_in_a_process(spec, tmp_path / "nowhere")


def test_the_check_is_on_by_default() -> None:
    assert Recipe().reload_check is True
