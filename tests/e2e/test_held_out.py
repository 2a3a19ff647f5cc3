"""What a run leads with is measured on windows that nothing was fitted on, in every pipeline and in every view.

Shape suffixes: N windows, S positions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import structprune
from structprune import Recipe
from structprune.api import resume
from structprune.errors import InputError
from structprune.phases import Phase
from structprune.report.card import model_card
from structprune.report.page import prune_page
from structprune.report.rebuild import read_report
from structprune.results.report import PruneReport
from structprune.results.summary import summary_rows, warnings
from structprune.results.texts import CalibrationReport, HeldOutReport
from support.command_line import CommandLine
from support.models import save_tiny
from support.pipeline_cases import RUNS, tiny_recipe

SEQ_LEN = 32


@pytest.fixture
def cli(command_line: CommandLine) -> CommandLine:
    return command_line


def drawn_windows(model: Path, text: Path, num: int, seed: int = 0) -> Tensor:
    """The first `num` windows of a run's draw."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows_NS = torch.tensor(ids[: len(ids) // SEQ_LEN * SEQ_LEN]).reshape(-1, SEQ_LEN)
    return windows_NS[torch.randperm(len(windows_NS), generator=torch.Generator().manual_seed(seed))[:num]]


@torch.no_grad()
def stock_perplexity(model: Path, windows_NS: Tensor) -> float:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=True)
    losses = [float(loaded(input_ids=ids_S[None], labels=ids_S[None]).loss) for ids_S in windows_NS]
    return torch.tensor(losses, dtype=torch.float64).mean().exp().item()


# The same pipelines with other scores, solvers and families, whose outputs are read as the others' are.
ALIKE = ("normed", "admm", "fasp", "flap", "measured-loss", "slice")


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in RUNS])
def test_every_pipeline_reports_windows_that_it_did_not_fit(name: str, text_file: Path, tmp_path: Path) -> None:
    """Five windows are fitted; the next three of the draw are what stock transformers says of both models."""
    family, changes = RUNS[name]
    source = save_tiny(family, tmp_path / "source", num_blocks=3)
    report = structprune.prune(source, tiny_recipe(changes, text_file, held_out=3), tmp_path / "out")
    found = report.held_out
    assert found is not None
    assert (found.num_windows, found.seq_len, found.set_apart) == (3, SEQ_LEN, False)
    assert (report.calibration.num_windows, report.recipe.held_out) == (5, 3)
    held_out_NS = drawn_windows(source, text_file, 8)[5:]
    assert found.dense_perplexity == pytest.approx(stock_perplexity(source, held_out_NS), rel=1e-4)
    assert found.pruned_perplexity == pytest.approx(stock_perplexity(tmp_path / "out", held_out_NS), rel=1e-3)
    assert found.pruned_perplexity != pytest.approx(report.calibration.pruned_perplexity, rel=1e-3)
    assert str(Phase.HELD_OUT) in report.memory.measured_phases
    assert report.memory.measured_phases[Phase.HELD_OUT] <= report.memory.phases[Phase.HELD_OUT]


@pytest.mark.parametrize("method", ["fasp", "structprune", "depth", "slicegpt"])
def test_held_out_windows_change_no_weight(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    for held_out in (0, 4):
        recipe = tiny_recipe({"method": method}, text_file, held_out=held_out)
        structprune.prune(tiny_llama, recipe, tmp_path / str(held_out))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "4"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_windows_of_a_short_text_are_set_apart(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Sixteen windows of text, as many as asked: two are missing from those that are fitted, and it is said."""
    text = tmp_path / "sixteen.txt"
    text.write_bytes(text_file.read_bytes()[: 16 * SEQ_LEN])
    recipe = tiny_recipe({"method": "fasp"}, text, num_samples=16)
    report = structprune.prune(tiny_llama, recipe, tmp_path / "out")
    assert report.held_out is not None
    assert (report.calibration.num_windows, report.held_out.num_windows, report.held_out.set_apart) == (14, 2, True)
    assert report.calibration.description == "sixteen.txt (2 of its 16 windows held out)"
    windows_NS = drawn_windows(tiny_llama, text, 16)
    assert report.held_out.dense_perplexity == pytest.approx(stock_perplexity(tiny_llama, windows_NS[14:]), rel=1e-4)
    assert report.calibration.dense_perplexity == pytest.approx(stock_perplexity(tiny_llama, windows_NS[:14]), rel=1e-4)
    assert any("14, and 2 held-out windows set apart" in warning for warning in warnings(report))


@pytest.mark.parametrize("num_windows", [1, 3])
def test_without_a_window_to_spare_it_is_in_sample_only(
    num_windows: int, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """A text of one window, or three of which --held-out 0 keeps none."""
    text = tmp_path / "short.txt"
    text.write_bytes(text_file.read_bytes()[: num_windows * SEQ_LEN])
    changes: dict[str, Any] = {} if num_windows == 1 else {"held_out": 0}
    # One window cannot choose a ridge too.
    recipe = tiny_recipe({"method": "fasp", "damping": 1e-4}, text, **changes)
    report = structprune.prune(tiny_llama, recipe, tmp_path / "out")
    assert report.held_out is None
    assert (report.calibration.num_windows, report.recipe.held_out) == (num_windows, 0)
    assert summary_rows(report)[0][0] == "perplexity, in-sample only"
    assert any(line.startswith("Perplexity is in-sample only") for line in warnings(report))
    assert "perplexity, in-sample only" in prune_page(report)
    assert "held-out" not in model_card(report, {}, None).split("## What was removed")[0]


def test_two_windows_that_fit_and_choose_the_ridge_leave_none(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "two.txt"
    text.write_bytes(text_file.read_bytes()[: 2 * SEQ_LEN])
    recipe = tiny_recipe({"method": "fasp", "damping": "auto"}, text)
    assert structprune.prune(tiny_llama, recipe, tmp_path / "out").held_out is None
    text.write_bytes(text_file.read_bytes()[:SEQ_LEN])
    with pytest.raises(InputError, match=r"one window cannot both fit and choose the ridge; got 1 window of 32 tokens"):
        structprune.prune(tiny_llama, recipe, tmp_path / "one")
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "one.partial").exists()


class CutError(Exception):
    """The end of the process, as far as the run is concerned."""


class CuttingObserver:
    """Ends the run at the first step of a phase that has this name, after so many."""

    def __init__(self, phase: str, steps: int) -> None:
        self._phase, self._steps, self._now = phase, steps, ""

    def note(self, text: str) -> None: ...

    def start(self, phase: str, total: int) -> None:
        self._now = phase

    def advance(self, detail: str) -> None:
        if self._now == self._phase:
            self._steps -= 1
            if self._steps < 0:
                raise CutError


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_run_that_was_cut_there_goes_on(steps: int, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """In the dense model, at its end, and in the written one."""
    recipe = tiny_recipe({"method": "fasp"}, text_file, held_out=3, memory="2GiB")
    whole = structprune.prune(tiny_llama, recipe, tmp_path / "whole")
    with pytest.raises(CutError):
        structprune.prune(tiny_llama, recipe, tmp_path / "out", CuttingObserver("held-out windows", steps))
    report = resume(tmp_path / "out")
    assert isinstance(report, PruneReport)
    assert report.held_out == whole.held_out
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    own = ("pruning_report.json", "pruning_report.html", "README.md")
    for name in names:
        if name not in own:
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_is_held_out_is_part_of_the_run(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe({"method": "fasp"}, text_file, held_out=3)
    with pytest.raises(CutError):
        structprune.prune(tiny_llama, recipe, tmp_path / "out", CuttingObserver("held-out windows", 0))
    with pytest.raises(InputError, match=r"started with other settings; got held_out 2, wanted held_out 3"):
        structprune.prune(tiny_llama, recipe.model_copy(update={"held_out": 2}), tmp_path / "out")
    journal = [json.loads(line) for line in (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()]
    (start,) = (line for line in journal if line["step"] == "start")
    assert len(bytes.fromhex(start["held_out"])) == 32


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    structprune.prune(tiny_llama, tiny_recipe({"method": "fasp"}, text_file, held_out=2), output)
    return output


def test_every_view_leads_with_it(finished: Path, cli: CommandLine) -> None:
    report = read_report(finished)
    found, fitted = report.held_out, report.calibration
    assert found is not None
    figures = f"{found.dense_perplexity:.2f} -> {found.pruned_perplexity:.2f} ({found.ratio:.2f} times"
    in_sample = f"{fitted.dense_perplexity:.2f} -> {fitted.pruned_perplexity:.2f} ({fitted.ratio:.2f} times"
    rows = summary_rows(report)
    assert [name for name, _ in rows[:2]] == ["perplexity", "perplexity, in-sample"]
    assert rows[0][1].startswith(figures)
    assert "2 held-out windows" in rows[0][1]
    assert rows[1][1].startswith(in_sample)
    for name in ("pruning_report.json", "pruning_manifest.json"):
        content = (finished / name).read_text(encoding="utf-8")
        assert 0 < content.index('"held_out": {') < content.index('"calibration": {')
    page, card = (finished / "pruning_report.html").read_text(), (finished / "README.md").read_text()
    shown = f"{found.pruned_perplexity:.2f}"
    assert page.index(shown) < page.index(f"{fitted.pruned_perplexity:.2f}")
    lines = [line for line in card.splitlines() if line.startswith("| perplexity")]
    assert lines == [
        f"| perplexity of held-out windows of the calibration text (2 x 32 tokens) | {found.dense_perplexity:.2f} | "
        f"{shown} |",
        f"| perplexity of the calibration text, in-sample (5 x 32 tokens) | {fitted.dense_perplexity:.2f} | "
        f"{fitted.pruned_perplexity:.2f} |",
    ]
    assert cli("report", finished)[0] == 0


def test_reports_of_earlier_versions_load(finished: Path, tmp_path: Path, cli: CommandLine) -> None:
    """They know nothing of held-out windows: what they say is in-sample only, and their page says so."""
    shutil.copytree(finished, tmp_path / "old")
    path = tmp_path / "old" / "pruning_report.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["held_out"], data["recipe"]["held_out"]
    path.write_text(json.dumps(data), encoding="utf-8")
    report = read_report(tmp_path / "old")
    assert report.held_out is None
    assert report.recipe.held_out == 0
    assert cli("report", tmp_path / "old")[0] == 0
    assert "perplexity, in-sample only" in (tmp_path / "old" / "pruning_report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("in_sample", "held_out", "warned"),
    [((15.77, 16.16), (19.0, 62.3), True), ((10.0, 15.0), (12.0, 20.0), False), ((10.0, 10.0), (12.0, 14.5), True)],
)
def test_a_large_gap_is_a_warning(
    in_sample: tuple[float, float], held_out: tuple[float, float], warned: bool, finished: Path
) -> None:
    report = read_report(finished)
    assert report.held_out is not None

    def measured(part: CalibrationReport | HeldOutReport, values: tuple[float, float]) -> Any:
        return part.model_copy(update=dict(zip(("dense_perplexity", "pruned_perplexity"), values, strict=True)))

    changed = report.model_copy(
        update={
            "calibration": measured(report.calibration, in_sample),
            "held_out": measured(report.held_out, held_out),
        }
    )
    found = [warning for warning in warnings(changed) if "fitted too closely" in warning]
    assert bool(found) == warned
    for warning in found:
        ratios = (held_out[1] / held_out[0], in_sample[1] / in_sample[0])
        assert f"{ratios[0]:.2f} times" in warning
        assert f"{ratios[1]:.2f} times in-sample" in warning
        assert "--num-samples" in warning
        assert "structprune recover" in warning


@pytest.mark.parametrize("store", ["memory", "file"])
def test_hidden_states_in_a_file_give_the_same(
    store: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe({"method": "fasp"}, text_file, held_out=4)
    if store == "file":
        from structprune import api

        inner: Callable[..., Any] = api.plan_run
        monkeypatch.setattr(api, "plan_run", lambda *given: _in_a_file(inner(*given)))
    report = structprune.prune(tiny_llama, recipe, tmp_path / "out")
    assert report.memory.store == store
    held_out_NS = drawn_windows(tiny_llama, text_file, 9)[5:]
    assert report.held_out is not None
    assert report.held_out.dense_perplexity == pytest.approx(stock_perplexity(tiny_llama, held_out_NS), rel=1e-4)


def _in_a_file(plan: Any) -> Any:
    from dataclasses import replace

    return replace(plan, store="file")


def test_a_model_that_samples_its_own_text_is_measured_on_more_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe.build(
        method="fasp", calibration="self", num_samples=4, seq_len=SEQ_LEN, held_out=2, multiple_of=1, dtype="float32"
    )
    report = structprune.prune(tiny_llama, recipe, tmp_path / "out")
    assert report.held_out is not None
    assert (report.held_out.num_windows, report.held_out.set_apart) == (2, False)
    assert report.held_out.fingerprint != report.calibration.fingerprint
