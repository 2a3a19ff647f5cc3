"""`structprune recover`: what it lowers, what it leaves alone, how it goes on after a cut, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from structprune.api import prune, recover, resume
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.reader import CheckpointReader
from structprune.cli import main
from structprune.errors import (
    CheckpointError,
    InputError,
    MemoryBudgetError,
    NumericalError,
    StructPruneError,
    UnsupportedError,
)
from structprune.observer import SilentObserver
from structprune.recipe import Recipe
from structprune.recipe.training import RecoverySettings
from structprune.results.recovery import RecoveryReport
from structprune.training import blocks as blocks_mode
from structprune.training import loop, run
from structprune.training.context import target_boundaries
from structprune.training.plan import RecoveryPlan
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

SEQ_LEN = 32


@pytest.fixture(scope="module")
def students(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model pruned to uniform and to uneven widths."""
    folder = tmp_path_factory.mktemp("students")
    common: dict[str, Any] = {"sparsity": 0.4, "calibration": str(text_file), "num_samples": 4, "seq_len": SEQ_LEN}
    common |= {"multiple_of": 1, "dtype": "float32", "reload_check": False}
    prune(tiny_llama, Recipe.build(method="wanda-sp", **common), folder / "uniform")
    prune(tiny_llama, Recipe.build(method="structprune", **common), folder / "uneven")
    return {name: folder / name for name in ("uniform", "uneven")}


def settings(text_file: Path, mode: str, **changes: Any) -> RecoverySettings:
    values: dict[str, Any] = {"mode": mode, "calibration": (str(text_file),), "num_samples": 20, "seq_len": SEQ_LEN}
    values |= {"held_out": 4, "learning_rate": 5e-4, "dtype": "float32", "warmup": 2, "reload_check": False}
    return RecoverySettings.build(**{**values, **changes})


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(directory: Path, ids_NS: Tensor) -> Tensor:
    with torch.no_grad():
        model = load_model(directory, torch.device("cpu"), torch.float32)
        return model(input_ids=ids_NS).logits.log_softmax(-1)


@pytest.mark.parametrize("kind", ["uniform", "uneven"])
@pytest.mark.parametrize("mode", ["stream", "blocks"])
def test_recovers(
    mode: str, kind: str, students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    student, output = students[kind], tmp_path / "out"
    report = recover(student, tiny_llama, settings(text_file, mode, reload_check=True), output)
    assert report.after.divergence < report.before.divergence
    assert report.reload.mode == "whole"
    assert report.reload.relative_difference is not None
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes
    assert report == RecoveryReport.model_validate_json((output / "recovery_report.json").read_text())
    # The format is the student's, and what lies outside the blocks is untouched.
    for name in ("config.json", "pruning_manifest.json", "pruning_report.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (student / name).read_bytes()
    assert (output / "modeling_structprune.py").exists() == (kind == "uneven")
    old, new = weights(student), weights(output)
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in old.items()}
    moved = [f"model.layers.{block.block}." for block in report.blocks if block.changed] or ["model.layers."]
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name]) == (not name.startswith(tuple(moved))), name
    card = (output / "README.md").read_text()
    assert card.startswith((student / "README.md").read_text().rstrip())
    assert f"{report.before.divergence:.4f} to {report.after.divergence:.4f}" in card
    assert not (tmp_path / "out.partial").exists()


def test_the_width_of_the_output(students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    # The students are float32 and learn as they are rounded.
    asked = settings(text_file, "stream", reload_check=True, output_dtype="bfloat16")
    report = recover(students["uniform"], tiny_llama, asked, tmp_path / "out")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.after.divergence < report.before.divergence
    assert report.reload.mode == "whole"


def test_another_teacher_is_named(students: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", num_blocks=3)
    report = recover(students["uniform"], other, settings(text_file, "stream", num_samples=8), tmp_path / "out")
    assert report.notes == ["the teacher is not the model that the student was pruned from"]


def test_steps_that_are_too_long_are_named(
    students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    wild = settings(text_file, "stream", num_samples=8, learning_rate=1e30, warmup=0)
    with pytest.raises(NumericalError, match=r"got step 2. Lower --learning-rate") as caught:
        recover(students["uniform"], tiny_llama, wild, tmp_path / "out")
    assert "--dtype" not in str(caught.value)


@pytest.mark.parametrize("minutes", [float("inf"), float("nan")])
def test_minutes_that_never_end(minutes: float) -> None:
    with pytest.raises(InputError, match=r"--minutes is not usable; .*finite number"):
        RecoverySettings.build(minutes=minutes)


@pytest.mark.parametrize("kind", ["uniform", "uneven"])
def test_scales_leave_the_other_matrices(
    kind: str, students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    student, output = students[kind], tmp_path / "out"
    asked = settings(text_file, "scales", learning_rate=3e-3, batch=1, reload_check=True)
    report = recover(student, tiny_llama, asked, output)
    assert report.after.divergence < report.before.divergence
    assert report.reload.mode == "whole"
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes
    old, new = weights(student), weights(output)
    learned = ("o_proj.weight", "down_proj.weight", "layernorm.weight")
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name]) == (not name.endswith(learned)), name
        if name.endswith(learned[:2]):
            # One number per column.
            ratio = tensor / old[name]
            torch.testing.assert_close(ratio, ratio.median(dim=0).values.expand_as(ratio), rtol=1e-4, atol=1e-4)
    weighty = recover(student, tiny_llama, settings(text_file, "stream", batch=1), tmp_path / "all")
    assert report.memory.planned_peak_bytes < weighty.memory.planned_peak_bytes


def test_the_report_s_figures_are_those_of_stock_code(
    students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = recover(students["uniform"], tiny_llama, settings(text_file, "stream"), tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.intermediate_size < 48
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny_llama)(text_file.read_text())["input_ids"])
    windows = ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[16:20]
    dense = logits(tiny_llama, windows[order])
    for directory, quality in ((students["uniform"], report.before), (tmp_path / "out", report.after)):
        found = logits(directory, windows[order])
        divergence = float((dense.exp() * (dense - found)).sum(-1).mean())
        assert quality.divergence == pytest.approx(divergence, rel=1e-3)
        loss = -found[:, :-1].gather(-1, windows[order][:, 1:, None]).mean()
        assert quality.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert [e.step for e in report.evaluations] == [0, 8]
    assert report.evaluations[-1].divergence == pytest.approx(report.after.divergence, rel=1e-4)
    assert report.tokens == 16 * SEQ_LEN
    assert [entry.step for entry in report.trace] == list(range(1, 9))


@pytest.mark.parametrize("mode", ["stream", "scales", "blocks"])
def test_a_worse_state_is_not_kept(
    mode: str, students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = recover(
        students["uneven"], tiny_llama, settings(text_file, mode, learning_rate=3.0, warmup=0), tmp_path / "out"
    )
    assert report.after == report.before
    assert not any(block.changed for block in report.blocks)
    assert all(block.error_after == block.error_before for block in report.blocks)
    old, new = weights(students["uneven"]), weights(tmp_path / "out")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


class _Stop(SilentObserver):
    """Ctrl-C at the n-th step."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, detail: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    ("mode", "mix"), [("stream", "given"), ("stream", "robust"), ("scales", "given"), ("blocks", "given")]
)
def test_a_cut_run_ends_as_an_uncut_one(
    mode: str,
    mix: str,
    students: dict[str, Path],
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text().upper())
    texts = (str(text_file), str(other))
    wanted = settings(text_file, mode, mix=mix, calibration=texts, num_samples=10, held_out=2, epochs=2)
    recover(students["uneven"], tiny_llama, wanted, tmp_path / "uncut")
    trained: list[int] = []
    train = blocks_mode.BlockTrainer.train
    monkeypatch.setattr(
        blocks_mode.BlockTrainer, "train", lambda self, *a: (trained.append(self.block.index), train(self, *a))[1]
    )
    output = tmp_path / "out"
    for after in (1, 2) if mode == "blocks" else (1, 5):
        with pytest.raises(KeyboardInterrupt):
            recover(students["uneven"], tiny_llama, wanted, output, _Stop(after))
        assert not output.exists()
    last = _Stop(-1)
    recover(students["uneven"], tiny_llama, wanted, output, last)
    if mode != "blocks":
        assert any("going on after step" in note for note in last.notes)
    else:
        assert sorted(trained) == [0, 1]
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "uncut").iterdir())
    for name in names:
        if name not in ("recovery_report.json", "README.md"):
            assert (output / name).read_bytes() == (tmp_path / "uncut" / name).read_bytes(), name
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("what", ["settings", "student"])
def test_another_run_is_refused_and_resume_goes_on(
    what: str, students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    student = shutil.copytree(students["uniform"], tmp_path / "student")
    with pytest.raises(KeyboardInterrupt):
        recover(student, tiny_llama, settings(text_file, "stream"), tmp_path / "out", _Stop(3))
    assert (tmp_path / "out.partial" / "recovery").is_dir()
    path = student / "model.safetensors"
    content, times = path.read_bytes(), path.stat()
    changed = settings(text_file, "stream", learning_rate=1e-3 if what == "settings" else 5e-4)
    if what == "student":
        # Other weights of the same shapes.
        save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    how = {"settings": "with other settings", "student": "from another student"}[what]
    with pytest.raises(InputError, match=f"the unfinished run here was started {how}"):
        recover(student, tiny_llama, changed, tmp_path / "out")
    with pytest.raises(InputError, match="the unfinished run here was started by another command"):
        prune(
            tiny_llama,
            Recipe.build(method="fasp", calibration=str(text_file), num_samples=4, seq_len=SEQ_LEN),
            tmp_path / "out",
        )
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    report = resume(tmp_path / "out")
    assert isinstance(report, RecoveryReport)
    assert len(report.trace) == 8
    # Once more: it is finished.
    assert resume(tmp_path / "out") == report
    recover(students["uniform"], tiny_llama, settings(text_file, "stream"), tmp_path / "fresh")
    old, new = weights(tmp_path / "fresh"), weights(tmp_path / "out")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("mode", ["stream", "scales", "blocks"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_state_is_named_and_made_again(
    damage: str, mode: str, students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    args = (students["uniform"], tiny_llama, settings(text_file, mode), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        recover(*args, _Stop(1 if mode == "blocks" else 3))
    (damaged, *_) = sorted((tmp_path / "out.partial" / "recovery").rglob("block-00000.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content[:-9] if damage == "cut" else content)
    observer = _Stop(-1)
    recover(*args, observer)
    assert any("block-00000.safetensors: the state of an earlier run is damaged" in note for note in observer.notes)
    recover(*args[:-1], tmp_path / "fresh")
    old, new = weights(tmp_path / "fresh"), weights(tmp_path / "out")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize("mode", ["stream", "scales", "blocks"])
def test_the_clock_ends_it(
    mode: str, students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = recover(
        students["uniform"], tiny_llama, settings(text_file, mode, minutes=1e-5, epochs=50), tmp_path / "out"
    )
    assert report.tokens < 16 * SEQ_LEN
    assert report.after.divergence <= report.before.divergence


def test_depth_pruned_students_follow_the_manifest(text_file: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_blocks=4)
    recipe = Recipe.build(method="depth", sparsity=0.5, calibration=str(text_file), num_samples=4, seq_len=SEQ_LEN)
    prune(dense, recipe.model_copy(update={"dtype": "float32", "reload_check": False}), tmp_path / "student")
    kept = json.loads((tmp_path / "student" / "pruning_manifest.json").read_text())["kept_indices"]["blocks"]
    teacher, student = (StockModel(CheckpointReader(tmp_path / name)) for name in ("dense", "student"))
    assert target_boundaries(teacher, student) == (kept[0] + 1, 4)
    report = recover(tmp_path / "student", dense, settings(text_file, "blocks"), tmp_path / "out")
    assert [block.target for block in report.blocks] == [kept[0] + 1, 4]
    assert report.blocks[1].error_after < report.blocks[1].error_before
    # Without the manifest nobody knows which blocks are left; the whole model can learn all the same.
    (tmp_path / "student" / "pruning_manifest.json").unlink()
    with pytest.raises(InputError, match="which of the teacher's blocks"):
        recover(tmp_path / "student", dense, settings(text_file, "blocks"), tmp_path / "again")
    report = recover(tmp_path / "student", dense, settings(text_file, "stream"), tmp_path / "again")
    assert report.after.divergence < report.before.divergence


def test_files_give_the_same_result(
    students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recover(students["uniform"], tiny_llama, settings(text_file, "stream"), tmp_path / "memory")
    plan_recovery = run.plan_recovery

    def in_files(*args: Any) -> RecoveryPlan:
        found = plan_recovery(*args)
        return replace(found, plan=replace(found.plan, store="file"), resident=False)

    monkeypatch.setattr(run, "plan_recovery", in_files)
    report = recover(students["uniform"], tiny_llama, settings(text_file, "stream"), tmp_path / "files")
    assert report.memory.store == "file"
    old, new = weights(tmp_path / "memory"), weights(tmp_path / "files")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


def test_too_little_memory(students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    for mode in ("stream", "blocks"):
        chosen = settings(text_file, mode, memory="1MiB")
        refused(MemoryBudgetError, "at least", students["uniform"], tiny_llama, chosen, tmp_path / "out")


def test_lora_without_peft(
    students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"structprune\[recover\]"):
        recover(students["uniform"], tiny_llama, settings(text_file, "lora"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["uniform", "uneven"])
def test_lora(kind: str, students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    student = students[kind]
    report = recover(student, tiny_llama, settings(text_file, "lora", rank=4, reload_check=True), tmp_path / "out")
    assert report.after.divergence < report.before.divergence
    # What was merged into the files predicts what the updates beside the weights did.
    assert report.evaluations[-1].divergence == pytest.approx(report.after.divergence, rel=1e-3)
    old, new = weights(student), weights(tmp_path / "out")
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed == {name for name in new if name.startswith("model.layers.") and name.endswith("proj.weight")}
    for name in changed:
        assert torch.linalg.matrix_rank((new[name] - old[name]).double(), atol=1e-6) <= 4


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot after every step."""
    monkeypatch.setattr(loop, "_LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(loop, "_SNAPSHOT_SHARE", 1e9)


def refused(cause: type[StructPruneError], match: str, *args: Any) -> None:
    student, teacher, chosen, output = args
    with pytest.raises(cause, match=match):
        recover(student, teacher, chosen, output)
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()


@pytest.mark.parametrize(
    ("changes", "what"), [({"vocab_size": 300}, "vocabulary"), ({"hidden_size": 64}, "hidden size")]
)
def test_models_that_do_not_match(
    changes: dict[str, int], what: str, students: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    from support.models import byte_tokenizer, llama_config

    LlamaForCausalLM(llama_config(**changes)).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    refused(InputError, what, students["uniform"], tmp_path / "other", settings(text_file, "stream"), tmp_path / "out")


def test_formats_that_cannot_learn(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.build(method="slicegpt", sparsity=0.3, calibration=str(text_file), num_samples=4, seq_len=SEQ_LEN)
    prune(tiny_llama, recipe.model_copy(update={"reload_check": False}), tmp_path / "sliced")
    chosen = settings(text_file, "stream")
    refused(UnsupportedError, "sliced", tmp_path / "sliced", tiny_llama, chosen, tmp_path / "out")
    quantised = shutil.copytree(tiny_llama, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    refused(UnsupportedError, "quantised", quantised, tiny_llama, chosen, tmp_path / "out")


def test_texts_and_settings_that_do_not_do(
    students: dict[str, Path], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    student, output = students["uniform"], tmp_path / "out"
    twice = settings(text_file, "stream", calibration=(str(text_file), str(text_file)))
    refused(InputError, "named twice", student, tiny_llama, twice, output)
    refused(
        InputError, "no windows to learn from", student, tiny_llama, settings(text_file, "stream", held_out=20), output
    )
    refused(InputError, "--seq-len is longer", student, tiny_llama, settings(text_file, "stream", seq_len=512), output)
    (tmp_path / "bad").mkdir()
    broken = shutil.copytree(student, tmp_path / "bad" / "student")
    (broken / "pruning_manifest.json").write_text("{")
    refused(CheckpointError, "manifest", broken, tiny_llama, settings(text_file, "stream"), output)
    foreign = shutil.copytree(students["uneven"], tmp_path / "bad" / "foreign")
    (foreign / "modeling_structprune.py").write_text("")
    refused(CheckpointError, "modelling file", foreign, tiny_llama, settings(text_file, "stream"), output)
    for values, flag in (
        ({"mode": "all"}, "--mode"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"minutes": -1}, "--min"),
    ):
        with pytest.raises(InputError, match=flag):
            RecoverySettings.build(**values)


def test_command_line(
    students: dict[str, Path],
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    output = tmp_path / "out"
    command = ["recover", str(students["uniform"]), "--teacher", str(tiny_llama), "-o", str(output)]
    command += ["--calibration", str(text_file), "--num-samples", "20", "--seq-len", "32", "--dtype", "float32"]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--no-reload-check"])
    assert caught.value.code == 0
    captured = capsys.readouterr()
    assert "KL from the teacher" in captured.out
    assert "memory: " in captured.err
    assert "recover 9/9  KL 0." in captured.err
    with pytest.raises(SystemExit) as caught:
        main([*command, "--json"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["what"] == "the output directory exists"
    assert captured.err.count("\n") == 1
