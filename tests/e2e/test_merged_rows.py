"""`--merge-rows`: head rows that carry missing tokens, measured again with stock code, and rows that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import structprune
from structprune.api import check, plan, recover, resume
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.assess import VocabularyRequest, choose_vocabulary
from structprune.engine.resolve import drawn_windows, plan_run
from structprune.engine.run import merged_rows
from structprune.errors import StructPruneError
from structprune.observer import SilentObserver
from structprune.recipe import Recipe
from structprune.recipe.training import RecoverySettings
from structprune.results.report import PruneReport
from structprune.results.schema import MergedRowsReport, VocabularyReport
from structprune.training.run import open_teacher
from structprune.vocabulary.kept import KEPT_NAME, KeptTokens
from support.command_line import CommandLine
from support.spare_rows import save_with_spare_rows
from support.vocabularies import TEXT

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

SIZE = 384
KINDS = ["llama-untied-biased", "opt", "gpt2", "llama", "gemma2", "gemma3"]
# Tied models of random weights meet their own input worse with the new rows.
REFUSED = {"llama", "gemma2", "gemma3"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("\n".join(TEXT[:120] * 6), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_spare_rows("llama-untied-biased", tmp_path_factory.mktemp("source") / "llama")


def kept_of(source: Path, text: Path) -> KeptTokens:
    return choose_vocabulary(source, VocabularyRequest(size=SIZE, texts=[str(text)])).kept


def recipe_of(text: Path, kept: KeptTokens | None, **changes: Any) -> Recipe:
    settings = {"method": "magnitude", "sparsity": 0.0, "num_samples": 16, "seq_len": 32, "dtype": "float32"}
    common = {"calibration": str(text), "vocabulary": kept, "multiple_of": 1, "merge_rows": True}
    return Recipe.build(**{**settings, **common, **changes})


def tensors(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors")


def tokens_of(report: PruneReport) -> VocabularyReport:
    assert report.vocabulary is not None
    return report.vocabulary


def merged_of(report: PruneReport) -> MergedRowsReport:
    merged = tokens_of(report).merged
    assert merged is not None
    return merged


def predictions(directory: Path, ids_NS: Tensor) -> Tensor:
    with torch.no_grad():
        has_images = "vision_config" in json.loads((directory / "config.json").read_text())
        loader: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
        return loader.from_pretrained(directory)(input_ids=ids_NS).logits.log_softmax(-1)


def wanted(source: Path, kept: KeptTokens, ids_NS: Tensor, output: Path) -> Tensor:
    """What the source predicts, every missing token at the first piece that the smaller tokenizer has for it."""
    old_ids, smaller = torch.tensor(kept.ids), PreTrainedTokenizerFast.from_pretrained(output).backend_tokenizer
    dense = PreTrainedTokenizerFast.from_pretrained(source)
    shares = predictions(source, old_ids[ids_NS]).exp()
    # Rows that no token has stand for nothing: they were never among those that could come.
    real = [number for number in range(len(dense)) if number not in dense.added_tokens_decoder]
    found = shares[..., old_ids].clone()
    for number in set(real) - set(kept.ids):
        first = smaller.model.tokenize(dense.convert_ids_to_tokens(number))[0].id
        found[..., first] += shares[..., number]
    return (found / found.sum(-1, keepdim=True)).log()


def divergence(wanted_NSV: Tensor, found_NSV: Tensor) -> float:
    return float(torch.nn.functional.kl_div(found_NSV, wanted_NSV, reduction="none", log_target=True).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergences_are_those_of_stock_code(kind: str, text: Path, tmp_path: Path) -> None:
    source = save_with_spare_rows(kind, tmp_path / "source")
    kept = kept_of(source, text)
    recipe = recipe_of(text, kept)
    resolved = check(source, recipe)
    _, windows = drawn_windows(resolved, plan_run(resolved, 16), lambda note: None)
    structprune.prune(source, recipe.model_copy(update={"merge_rows": False}), tmp_path / "plain")
    report = structprune.prune(source, recipe, tmp_path / "out")
    merged = merged_of(report)
    assert (merged.changed, merged.num_measured, merged.num_positions) == (kind not in REFUSED, 2, 14 * 32)
    judged_NS = windows.ids_NS[-2:]
    goal_NSV = wanted(source, kept, judged_NS, tmp_path / "plain")
    before, after = (divergence(goal_NSV, predictions(tmp_path / name, judged_NS)) for name in ("plain", "out"))
    assert merged.before == pytest.approx(before, rel=1e-3)
    assert merged.after == pytest.approx(after, rel=1e-3)
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert old.keys() == new.keys()
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    if kind in REFUSED:
        assert not changed
        assert after == before
        return
    assert after < 0.2 * before
    assert len(changed) == 1
    rows = (old[changed[0]] != new[changed[0]]).any(1)
    assert 0 < int(rows.sum()) <= merged.num_rows < SIZE
    assert f"{merged.num_rows} head rows carry {merged.num_missing} of the missing tokens" in tokens_of(report).line
    # What is reported of the calibration text is what the files say.
    first_NS = windows.ids_NS[: report.calibration.perplexity_windows]
    found_NSV = predictions(tmp_path / "out", first_NS)[:, :-1]
    loss = -found_NSV.gather(-1, first_NS[:, 1:, None]).mean()
    assert report.calibration.pruned_perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama-untied-biased", "llama"])
def test_text_that_was_not_counted_tells_by_its_loss(kind: str, text: Path, tmp_path: Path) -> None:
    source = save_with_spare_rows(kind, tmp_path / "source")
    kept = kept_of(source, text)
    other, both = tmp_path / "other.txt", tmp_path / "kept.json"
    other.write_text("\n".join(TEXT[150:] * 6), encoding="utf-8")
    both.write_text(kept.model_dump_json(), encoding="utf-8")
    # Of two texts the one that was not counted.
    recipe = recipe_of(text, None, vocabulary=str(both), calibration=(str(text), str(other)))
    resolved = check(source, recipe)
    _, windows = drawn_windows(resolved, plan_run(resolved, 16), lambda note: None)
    structprune.prune(source, recipe.model_copy(update={"merge_rows": False}), tmp_path / "plain")
    merged = merged_of(report := structprune.prune(source, recipe, tmp_path / "out"))
    judged_NS = windows.ids_NS[[windows.texts[1].windows[-1]]]
    losses = [
        -float(predictions(tmp_path / name, judged_NS)[:, :-1].gather(-1, judged_NS[:, 1:, None]).mean())
        for name in ("plain", "out")
    ]
    assert (merged.measure, merged.num_measured) == ("loss", 1)
    assert [merged.before, merged.after] == pytest.approx(losses, rel=1e-4)
    assert merged.changed == (losses[1] < losses[0])
    assert ("loss of text that was not counted" in tokens_of(report).line) == merged.changed


def test_units_and_a_repair_come_first(source: Path, text: Path, tmp_path: Path) -> None:
    kept = kept_of(source, text)
    recipe = recipe_of(text, kept, method="fasp", sparsity=0.3, repair="scales", merge_rows=False)
    plain = structprune.prune(source, recipe, tmp_path / "plain")
    report = structprune.prune(source, recipe.model_copy(update={"merge_rows": True}), tmp_path / "out")
    assert plain.repair is not None
    assert report.repair is not None
    assert report.repair.divergence_after == plain.repair.divergence_after
    assert merged_of(report).changed
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["lm_head.weight"]


@pytest.mark.parametrize("store", ["memory", "file"])
def test_memory_and_disk_hold_what_was_planned(source: Path, text: Path, tmp_path: Path, store: str) -> None:
    recipe = recipe_of(text, kept_of(source, text), num_samples=256, reload_check=False)
    if store == "file":
        recipe = recipe.model_copy(update={"memory": plan(source, recipe).plan.peak_bytes - 1})
    report = structprune.prune(source, recipe, tmp_path / "out")
    assert report.memory.store == store
    assert report.memory.measured_phases["merged rows"] <= report.memory.phases["merged rows"]


class Cut(SilentObserver):
    """Ends the run at a step of merging."""

    def __init__(self, at: str) -> None:
        self._at = at

    def advance(self, text: str = "") -> None:
        if self._at in text:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["states", "fitted on", "KL, missing tokens at their first pieces"])
def test_a_run_that_was_cut_ends_with_the_same_rows(source: Path, text: Path, tmp_path: Path, at: str) -> None:
    recipe = recipe_of(text, kept_of(source, text))
    structprune.prune(source, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        structprune.prune(source, recipe, tmp_path / "out", Cut(at))
    resume(tmp_path / "out")
    whole, again = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_what_is_done_is_not_done_again(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(text, kept_of(source, text), held_out=2)
    whole = structprune.prune(source, recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        structprune.prune(source, recipe, tmp_path / "out", Cut("block 1"))

    class CutBehind(SilentObserver):
        stretch = ""

        def start(self, what: str, total: int) -> None:
            self.stretch = what
            if what == "held-out windows":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        structprune.prune(source, recipe, tmp_path / "out", CutBehind())

    def never(*_: object) -> None:
        raise AssertionError("rows are fitted again")

    monkeypatch.setattr(merged_rows.RowFit, "steps", never)
    report = resume(tmp_path / "out")
    assert isinstance(report, PruneReport)
    assert merged_of(report).after == merged_of(whole).after
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recovery_learns_from_a_teacher_with_the_same_rows(source: Path, text: Path, tmp_path: Path) -> None:
    """Against its own rows the student without anything else removed diverges by nothing."""
    structprune.prune(source, recipe_of(text, kept_of(source, text)), tmp_path / "out")
    student = StockModel(open_model(str(tmp_path / "out")))
    teacher = open_teacher(str(source), "none", student)
    name = teacher.head_weight
    assert torch.equal(teacher.reader.read([name])[name], student.reader.read([name])[name])
    settings = RecoverySettings(mode="scales", calibration=(str(text),), num_samples=4, seq_len=32, dtype="float32")
    report = recover(tmp_path / "out", source, settings, tmp_path / "again")
    assert report.evaluations[0].divergence == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gemma3"])
@pytest.mark.parametrize("merged", [True, False])
def test_whose_rows_the_teacher_has(kind: str, merged: bool, text: Path, tmp_path: Path) -> None:
    """The student's where the list beside it says that they carry missing tokens, else its own; in its own dtype."""
    source = save_with_spare_rows(kind, tmp_path / "source")
    asked = recipe_of(text, kept_of(source, text), merge_rows=False, output_dtype="bfloat16")
    structprune.prune(source, asked, tmp_path / "out")
    path = tmp_path / "out" / KEPT_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "merged_rows": merged}), encoding="utf-8")
    student = StockModel(open_model(str(tmp_path / "out")))
    teacher = open_teacher(str(source), "none", student)
    (own,), (rounded,) = (model.reader.read([model.head_weight]).values() for model in (teacher, student))
    assert own.dtype == torch.float32
    assert torch.equal(own.bfloat16(), rounded)
    assert torch.equal(own, rounded.float()) == merged


def test_where_rows_cannot_be_merged(source: Path, text: Path, tmp_path: Path, command_line: CommandLine) -> None:
    kept = kept_of(source, text)
    for changes, message in (
        ({"vocabulary": None}, "--merge-rows says how --vocabulary is done"),
        ({"method": "slicegpt", "sparsity": 0.25}, "--merge-rows has no meaning for method 'slicegpt'"),
        ({"num_samples": 1}, "one window cannot both fit rows and measure them"),
    ):
        with pytest.raises(StructPruneError, match=message):
            structprune.prune(source, recipe_of(text, **{"kept": kept, **changes}), tmp_path / "out")
    code, _, err = command_line("prune", source, "-o", tmp_path / "out", "--merge-rows")
    assert code == 2, err
    assert "all tokens stay" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["fasp", "depth"])
def test_plans_where_the_run_decides_how_many_stay(method: str, source: Path, text: Path) -> None:
    """Where all tokens are in the figures there is nothing to merge."""
    recipe = recipe_of(text, None, vocabulary="auto", method=method, sparsity=0.5, held_out=0)
    assert "merged rows" not in plan(source, recipe).plan.phases
    if method == "fasp":
        before = sum(tensor.numel() for tensor in tensors(source).values())
        values = recipe.model_dump(exclude_unset=True, exclude={"sparsity"}) | {"target_parameters": int(before * 0.6)}
        limited = Recipe.build(**values)
        assert "merged rows" in plan(source, limited).plan.phases
