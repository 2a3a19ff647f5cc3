"""`prune --repair`: what it may change, that it helps, what it leaves alone, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from structprune import Recipe, prune
from structprune.api import plan, resume
from structprune.errors import InputError, NumericalError, UnsupportedError
from structprune.observer import SilentObserver
from structprune.phases import Phase
from structprune.recipe.training import divided
from structprune.results.report import PruneReport
from structprune.results.summary import summary_rows
from structprune.training import loop
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CONSUMERS = ("down_proj.weight", "o_proj.weight")


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings = {"method": "wanda-sp", "scope": "all", "sparsity": 0.3, "num_samples": 40, "seq_len": 32}
    common = {"calibration": str(text_file), "dtype": "float32", "multiple_of": 1, "repair": "scales"}
    return Recipe.build(**{**settings, **common, **changes})


def weights(output: Path) -> Mapping[str, Tensor]:
    return load_file(output / "model.safetensors")


def save_sharp(family: str, directory: Path, num_blocks: int | None = None) -> Path:
    """Save a model whose predictions depend on its blocks: what is removed from them is missed."""
    source = save_tiny(family, directory, num_blocks=num_blocks)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.mul_(4 if "layers" in name or ".h." in name else 2)
    model.save_pretrained(source)
    return source


@pytest.fixture(scope="module")
def sharp_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of that kind. Do not modify."""
    return save_sharp("llama", tmp_path_factory.mktemp("sharp") / "llama")


@pytest.fixture(scope="module")
def both(
    sharp_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PruneReport, PruneReport]:
    """The reports of a run without a repair and with one."""
    folder = tmp_path_factory.mktemp("both")
    without = prune(sharp_llama, recipe(text_file, repair="none", reload_check=False), folder / "without")
    return without, prune(sharp_llama, recipe(text_file), folder / "repaired")


def test_only_vectors_and_scales_of_consumers_change(both: tuple[PruneReport, PruneReport]) -> None:
    without, repaired = (weights(Path(report.output)) for report in both)
    assert without.keys() == repaired.keys()
    for name, old in without.items():
        new = repaired[name]
        if name.endswith(CONSUMERS):
            ratio = new / old
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
            assert not torch.equal(new, old)
        elif old.dim() == 1 and "layers" in name:
            assert not torch.equal(new, old), name
        else:
            assert torch.equal(new, old), name


def test_it_is_nearer_to_the_dense_model_on_windows_that_it_has_not_seen(
    both: tuple[PruneReport, PruneReport],
) -> None:
    without, repaired = both
    found = repaired.repair
    assert without.repair is None
    assert found is not None
    assert found.changed
    assert found.divergence_after < 0.99 * found.divergence_before
    assert (found.num_windows, found.num_measured, found.steps) == (35, 5, 35)
    assert without.held_out is not None
    assert repaired.held_out is not None
    assert repaired.held_out.fingerprint == without.held_out.fingerprint
    assert repaired.held_out.dense_perplexity == without.held_out.dense_perplexity
    # In-sample: the windows that are learned from are among those of the perplexity.
    assert repaired.calibration.dense_perplexity == without.calibration.dense_perplexity
    assert repaired.calibration.pruned_perplexity != without.calibration.pruned_perplexity


def test_what_is_reported_is_what_was_written(both: tuple[PruneReport, PruneReport]) -> None:
    report = both[1]
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-4
    assert report.repair is not None
    blocks = weights(Path(report.output))
    learned = [tensor for name, tensor in blocks.items() if "layers" in name and tensor.dim() == 1]
    inputs = sum(tensor.shape[1] for name, tensor in blocks.items() if name.endswith(CONSUMERS))
    assert report.repair.num_learned == sum(len(tensor) for tensor in learned) + inputs
    assert dict(summary_rows(report))["repair by scales"].startswith("KL from the dense model ")
    assert not any("repair" in name for name, _ in summary_rows(both[0]))
    pages = [(Path(one.output) / "pruning_report.html").read_text(encoding="utf-8") for one in both]
    assert ["Repair by scales: KL from the dense model " in page for page in pages] == [False, True]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"method": "depth", "sparsity": 0.5}),
        ("qwen3_moe", {"method": "reap", "sparsity": 0.5}),
        ("gpt2", {"method": "flap", "scope": "mlp"}),
        ("llama", {"method": "fasp", "structure": "per-layer", "head_units": "value-channel"}),
    ],
    ids=["depth", "experts", "biases", "per-layer"],
)
def test_other_results_can_be_repaired(family: str, changes: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    settings = dict(recipe(text_file).model_dump(exclude_unset=True)) | changes
    if changes["method"] in ("depth", "reap"):
        del settings["multiple_of"], settings["scope"]
    source = save_tiny(family, tmp_path / "model", num_blocks=4)
    report = prune(source, Recipe.build(**settings), tmp_path / "out")
    assert report.repair is not None
    assert report.repair.divergence_after <= report.repair.divergence_before
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-4


def test_a_result_that_predicts_as_the_dense_model_stays_as_it_is(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = prune(tiny_llama, recipe(text_file, sparsity=0.0, reload_check=False), tmp_path / "out")
    assert report.repair is not None
    assert not report.repair.changed
    assert report.repair.divergence_after == report.repair.divergence_before
    dense, kept = weights(tiny_llama), weights(tmp_path / "out")
    assert all(torch.equal(kept[name], tensor) for name, tensor in dense.items())
    assert "nothing was changed" in dict(summary_rows(report))["repair by scales"]


def config_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def biased(sharp_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PruneReport:
    """The report of a run whose repair adds biases."""
    output = tmp_path_factory.mktemp("biased") / "out"
    return prune(sharp_llama, recipe(text_file, repair="scales+biases"), output)


def test_biases_are_added(both: tuple[PruneReport, PruneReport], biased: PruneReport) -> None:
    without, scaled, found = both[0], both[1].repair, biased.repair
    assert scaled is not None
    assert found is not None
    plain, result = weights(Path(without.output)), weights(Path(biased.output))
    added = {name: tensor for name, tensor in result.items() if name not in plain}
    assert set(added) == {f"{name[:-6]}bias" for name in plain if name.endswith("proj.weight")}
    # The other maps have some because the config gives a sublayer biases all or none.
    ends = tuple(f"{name[:-6]}bias" for name in CONSUMERS)
    assert {name: int(tensor.count_nonzero()) for name, tensor in added.items()} == {
        name: len(tensor) if name.endswith(ends) else 0 for name, tensor in added.items()
    }
    own = sum(len(tensor) for name, tensor in added.items() if name.endswith(ends))
    assert found.num_learned == scaled.num_learned + own
    assert (found.new_biases, found.no_biases, found.mode) == (["attention", "mlp"], [], "scales+biases")
    assert found.divergence_before == scaled.divergence_before
    assert found.divergence_after < found.divergence_before
    config, source = config_of(Path(biased.output)), config_of(Path(without.output))
    assert config == source | {"attention_bias": True, "mlp_bias": True}
    assert not source.get("mlp_bias")
    # Matrices but for the consumers' columns stay.
    for name, tensor in plain.items():
        if name.endswith(CONSUMERS):
            ratio = result[name] / tensor
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
        elif tensor.dim() == 2:
            assert torch.equal(result[name], tensor), name
    assert biased.size.parameters_after == without.size.parameters_after + sum(map(len, added.values()))
    assert biased.reload.relative_difference is not None
    assert biased.reload.relative_difference < 2e-6
    line = dict(summary_rows(biased))["repair by scales+biases"]
    assert line.endswith("; new biases in attention and mlp")


def removed_sublayer(text_file: Path) -> dict[str, Any]:
    """Settings by which a block loses its MLP: what is not there gets no bias."""
    widths = {"blocks": {"0": {"mlp": 0, "attention": 1}, **{str(i): {"mlp": 20, "attention": 2} for i in (1, 2, 3)}}}
    return {"method": "wanda-sp", "allow_block_removal": True, "widths": widths, "sparsity": 0.3}


@pytest.mark.parametrize(
    ("family", "changes", "new", "none"),
    [
        ("llama", {"method": "depth", "sparsity": 0.5}, ["attention", "mlp"], []),
        pytest.param("llama", {"structure": "per-layer"}, ["attention", "mlp"], [], marks=pytest.mark.slow),
        pytest.param(
            "llama", {"method": "fasp", "head_units": "value-channel"}, ["attention", "mlp"], [], marks=pytest.mark.slow
        ),
        pytest.param("llama-untied-biased", {}, [], [], marks=pytest.mark.slow),
        ("gpt2", {"scope": "mlp"}, [], []),
        ("gemma2", {"scope": "mlp", "sparsity": 0.6}, ["attention"], ["mlp"]),
        pytest.param("qwen3", {"structure": "per-layer"}, ["attention"], ["mlp"], marks=pytest.mark.slow),
        ("qwen3_moe", {"method": "reap", "sparsity": 0.5}, ["attention"], ["mlp"]),
        pytest.param("qwen2", {"scope": "mlp"}, [], ["attention", "mlp"], marks=pytest.mark.slow),
        pytest.param("mistral", {"scope": "mlp"}, [], ["attention", "mlp"], marks=pytest.mark.slow),
        ("opt-without-bias", {"scope": "mlp"}, [], ["attention", "mlp"]),
    ],
)
def test_biases_where_the_format_can_hold_them(
    family: str, changes: dict[str, Any], new: list[str], none: list[str], text_file: Path, tmp_path: Path
) -> None:
    asked = recipe(text_file, repair="scales+biases", repair_epochs=3, sparsity=0.4)
    settings = dict(asked.model_dump(exclude_unset=True)) | changes
    if changes.get("method") in ("depth", "reap"):
        del settings["multiple_of"], settings["scope"]
    source = save_sharp(family, tmp_path / "model", num_blocks=4)
    report = prune(source, Recipe.build(**settings), tmp_path / "out")
    found = report.repair
    assert found is not None
    assert found.changed
    assert (found.new_biases, found.no_biases) == (new, none)
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-5
    names = {name for name in weights(tmp_path / "out") if name.endswith("proj.bias")}
    before = {name for name in weights(source) if name.endswith("proj.bias")}
    assert bool(names - before) == bool(new)
    row = dict(summary_rows(report))["repair by scales+biases"]
    assert row.endswith(f"; none in {' and '.join(none)}, for which the config has no entry") == bool(none)


def test_without_a_place_for_biases_scales_are_what_is_learned(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("mistral", tmp_path / "model")
    for repair in ("scales", "scales+biases"):
        prune(source, recipe(text_file, scope="mlp", repair=repair, reload_check=False), tmp_path / repair)
    scaled, biased = weights(tmp_path / "scales"), weights(tmp_path / "scales+biases")
    assert scaled.keys() == biased.keys()
    assert all(torch.equal(biased[name], tensor) for name, tensor in scaled.items())


def test_no_bias_stays_where_nothing_helps(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = recipe(text_file, sparsity=0.0, repair="scales+biases", reload_check=False)
    report = prune(tiny_llama, asked, tmp_path / "out")
    assert report.repair is not None
    assert (report.repair.changed, report.repair.new_biases) == (False, [])
    assert weights(tmp_path / "out").keys() == weights(tiny_llama).keys()
    assert not config_of(tmp_path / "out").get("mlp_bias")


def test_several_passes(
    sharp_llama: Path, both: tuple[PruneReport, PruneReport], text_file: Path, tmp_path: Path
) -> None:
    report = prune(sharp_llama, recipe(text_file, repair_epochs=3, reload_check=False), tmp_path / "out")
    once, found = both[1].repair, report.repair
    assert once is not None
    assert found is not None
    assert (found.num_windows, found.num_measured, found.steps) == (35, 5, 105)
    assert found.divergence_before == once.divergence_before
    assert found.divergence_after < once.divergence_after


class Stop(BaseException):
    """The process is gone."""


class Stopper(SilentObserver):
    """Ends the process at a step of the repair."""

    def __init__(self, at: int) -> None:
        self.at, self.name, self.count = at, "", 0
        self.notes: list[str] = []

    def start(self, name: str, total: int) -> None:
        self.name, self.count = name, 0

    def advance(self, text: str = "") -> None:
        self.count += 1
        if self.name == "repair" and self.count == self.at:
            raise Stop

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("repair", "damaged"), [("scales", False), ("scales", True), ("scales+biases", False)], ids=str
)
def test_it_goes_on_from_its_own_snapshot(
    repair: str,
    damaged: bool,
    sharp_llama: Path,
    both: tuple[PruneReport, PruneReport],
    biased: PruneReport,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "_LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(loop, "_SNAPSHOT_SHARE", float("inf"))
    output = tmp_path / "out"
    with pytest.raises(Stop):
        prune(sharp_llama, recipe(text_file, repair=repair), output, Stopper(5))
    snapshots = list((tmp_path / "out.partial" / "repair" / "state").glob("snapshot-*"))
    assert len(snapshots) == 1
    assert not output.exists()
    if damaged:
        next(snapshots[0].glob("block-*.safetensors")).write_bytes(b"")
    listener = Stopper(0)
    resume(output, listener)
    went_on = [note for note in listener.notes if note.startswith("going on after step")]
    assert went_on == ([] if damaged else ["going on after step 4 of an earlier run"])
    assert any("the repair begins anew" in note for note in listener.notes) == damaged
    expected = weights(Path((both[1] if repair == "scales" else biased).output))
    assert weights(output).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())


def test_it_is_planned(tiny_llama: Path, text_file: Path) -> None:
    with_repair = plan(tiny_llama, recipe(text_file)).plan
    without = plan(tiny_llama, recipe(text_file, repair="none")).plan
    assert Phase.REPAIR in with_repair.phases
    assert Phase.REPAIR not in without.phases
    assert with_repair.disk_bytes > without.disk_bytes


def test_its_own_windows(sharp_llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = recipe(text_file, repair_samples=5, reload_check=False)
    report = prune(sharp_llama, asked, tmp_path / "out")
    assert report.repair is not None
    assert (report.repair.num_windows, report.repair.num_measured) == (4, 1)
    assert report.repair.num_apart == 5
    assert "; nothing else was fitted on 5 of them" in dict(summary_rows(report))["repair by scales"]


def test_a_short_text_has_few_windows_apart(sharp_llama: Path, tmp_path: Path) -> None:
    """It learns from others too, and is measured on those that nothing was fitted on."""
    text = tmp_path / "short.txt"
    text.write_text("abcdefghijklmnopqrstuvwxyz 0123 " * 45, encoding="utf-8")
    notes: list[str] = []
    observer = SilentObserver()
    observer.note = notes.append
    asked = recipe(text, held_out=1, reload_check=False)
    report = prune(sharp_llama, asked, tmp_path / "out", observer=observer)
    assert (report.calibration.num_windows, report.repair and report.repair.num_apart) == (40, 4)
    assert report.repair is not None
    assert (report.repair.num_windows, report.repair.num_measured) == (35, 5)
    assert any("has 4 windows for the repair beside those that are fitted on, not 40" in note for note in notes)


@pytest.mark.parametrize(
    ("texts", "train", "measured"),
    [
        ([[0, 1, 2]], (0, 1), ((2,),)),
        ([list(range(100))], tuple(range(92)), (tuple(range(92, 100)),)),
        ([[0, 2], [1, 3]], (0, 1), ((2,), (3,))),
        ([[0, 2, 3], [1]], (0, 1, 2), ((3,),)),
        ([[0], [1]], (0,), ((1,),)),
    ],
)
def test_windows_that_teach_and_windows_that_measure(
    texts: list[list[int]], train: tuple[int, ...], measured: tuple[tuple[int, ...], ...]
) -> None:
    assert divided(texts) == (train, measured)


@pytest.mark.parametrize("changes", [{"num_samples": 1}, {"repair_samples": 1}, {"calibration": "short.txt"}])
def test_one_window_is_too_few(
    changes: dict[str, Any], tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the text has no more of them."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("a" * 60)
    with pytest.raises(InputError, match="one window cannot both teach the repair and measure it"):
        prune(tiny_llama, recipe(text_file, **changes), tmp_path / "out")
    Path("short.txt").unlink()
    assert not list(tmp_path.iterdir())


def test_a_sliced_model_has_none(text_file: Path) -> None:
    with pytest.raises(UnsupportedError, match="--repair has no meaning for method 'slicegpt'"):
        Recipe.build(method="slicegpt", calibration=str(text_file), repair="scales")


def test_numbers_that_are_not_finite_end_the_run(
    sharp_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, **__: Any) -> float:
        raise NumericalError("the gradient is NaN or infinite", where="block 1")

    monkeypatch.setattr("structprune.training.stream.adam_step", nothing)
    with pytest.raises(NumericalError):
        prune(sharp_llama, recipe(text_file), tmp_path / "out")
    assert not list(tmp_path.iterdir())
