"""What every width is predicted to cost, saved by a run: the widths for any share are those of `dp`, without a run."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

import structprune
from structprune.engine.pipelines import units
from structprune.engine.planning.widths import block_widths, choose_widths
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.store import Costs
from structprune.errors import StructPruneError
from structprune.recipe import Recipe
from structprune.recipe.path import read_path
from structprune.recipe.units import ResolvedUnits
from structprune.recipe.widths import read_widths
from structprune.results.report import PruneReport
from support.command_line import CommandLine
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    settings = {"method": "structprune", "num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
    return structprune.prune(source, Recipe.build(**{**settings, "calibration": str(text_file), **changes}), output)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scope": "all"},
        {"scope": "all", "multiple_of": 8, "min_retention": 0.3, "max_retention": 0.9, "protect_first": 1},
        {"scope": "all", "allow_block_removal": True},
    ],
)
def test_twenty_shares_have_the_widths_of_dp(
    settings: dict[str, Any], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[RunContext, Costs]] = []
    allocate = units.allocate

    def watched(context: RunContext, costs: Costs | None) -> Any:
        assert costs is not None
        seen.append((context, costs))
        return allocate(context, costs)

    monkeypatch.setattr(units, "allocate", watched)
    source = save_tiny("llama", tmp_path / "source", num_blocks=3)
    pruned(source, tmp_path / "out", text_file, allocator="dp", sparsity=0.2, **settings)
    ((context, costs),) = seen
    path = read_path(tmp_path / "out" / "pruning_path.json")
    assert path.widths(0.2) == read_widths(tmp_path / "out" / "pruning_widths.json")
    for number in range(20):
        share = 0.2 + 0.01 * number
        resolved = context.settings(ResolvedUnits).model_copy(update={"sparsity": share})
        wanted = choose_widths(context.stock, resolved, context.kinds, costs)
        assert path.widths(share) == block_widths(context.stock, wanted)


def test_a_share_from_the_file_is_a_run_of_that_share(
    tiny_llama: Path, text_file: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    """Byte for byte, but that no costs are measured where the method does not read them itself."""
    settings = {"method": "fasp", "allocator": "dp", "scope": "all"}
    first = pruned(tiny_llama, tmp_path / "first", text_file, sparsity=0.1, **settings)
    wanted = pruned(tiny_llama, tmp_path / "wanted", text_file, sparsity=0.3, **settings)
    assert first.predicted_loss is not None
    assert wanted.predicted_loss is not None
    assert 0 < first.predicted_loss < wanted.predicted_loss
    saved = tmp_path / "first" / "pruning_path.json"
    flags = ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--dtype", "float32", "--multiple-of", 1]
    flags += ["--method", "fasp", "--allocation", saved, "--sparsity", "30%"]
    code, _, _ = command_line("prune", tiny_llama, "-o", tmp_path / "found", "-q", *flags)
    assert code == 0
    for name in ("model.safetensors", "pruning_widths.json"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    assert not (tmp_path / "found" / "pruning_path.json").exists()
    code, out, _ = command_line("plan", tiny_llama, *flags, "--json")
    assert code == 0
    planned = json.loads(out)
    assert planned["parameters_after"] == wanted.size.parameters_after
    assert [(point["share"], point["loss"]) for point in planned["curve"]] == [
        (point.share, point.loss) for point in read_path(saved).curve()
    ]
    code, out, _ = command_line("plan", tiny_llama, *flags)
    assert code == 0
    table = out[out.index("Predicted loss against size") :]
    assert table.count("about what is asked") == 1
    last = read_path(saved).curve()[-1]
    assert f"{last.share:.1%}" in table
    assert f"{last.loss:.4f}" in table


def test_the_curve_falls_from_the_dense_model_to_the_smallest(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    report = pruned(tiny_llama, tmp_path / "out", text_file, scope="all", allocator="dp", sparsity=0.3)
    path = read_path(tmp_path / "out" / "pruning_path.json")
    curve = path.curve()
    assert (curve[0].share, curve[0].loss) == (0.0, 0.0)
    assert all(a.removed < b.removed and a.loss <= b.loss for a, b in itertools.pairwise(curve))
    assert report.predicted_loss is not None
    # The exact choice of a size is no dearer than the curve's next smaller one, and no cheaper than its next larger.
    at = next(number for number, point in enumerate(curve) if point.share >= 0.3)
    # Sums of the same numbers in another order.
    assert curve[at - 1].loss * (1 - 1e-12) <= report.predicted_loss <= curve[at].loss * (1 + 1e-12)
    assert curve[-1].removed == path.before - sum(sublayer.parameters[-1] for sublayer in path.sublayers)


def test_widths_that_are_no_widths_of_the_menu(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """From outside, below the least share and of no multiple: their loss is predicted all the same."""
    widths = {"0": {"mlp": 0}, "1": {"mlp": 3}}
    report = pruned(tiny_llama, tmp_path / "out", text_file, widths=widths)
    assert report.predicted_loss is not None
    less = pruned(tiny_llama, tmp_path / "less", text_file, widths={"0": {"mlp": 40}, "1": {"mlp": 3}})
    assert less.predicted_loss is not None
    assert 0 < less.predicted_loss < report.predicted_loss


def test_none_is_saved_where_no_loss_is_measured(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = pruned(tiny_llama, tmp_path / "out", text_file, method="fasp")
    assert report.predicted_loss is None
    assert not (tmp_path / "out" / "pruning_path.json").exists()


@pytest.fixture
def saved(tiny_llama: Path, text_file: Path, tmp_path: Path) -> Path:
    pruned(tiny_llama, tmp_path / "out", text_file)
    return tmp_path / "out" / "pruning_path.json"


def test_what_cannot_be_read_out_of_it(saved: Path, tmp_path: Path, command_line: CommandLine) -> None:
    path = read_path(saved)
    with pytest.raises(
        StructPruneError, match=r"no widths that remove as much; got --sparsity 0.95, wanted at most 0\."
    ):
        path.widths(0.95)
    most = math.floor((1 - sum(s.parameters[-1] for s in path.sublayers) / path.before) * 1e4) / 1e4
    assert path.widths(most)
    values = json.loads(saved.read_text())
    values["sublayers"][0]["loss"][1] = None
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(values))
    with pytest.raises(StructPruneError, match=r"broken.json: sublayers, 0, loss, 1: --allocation is not usable"):
        read_path(broken)
    values["sublayers"][0]["loss"] = [0.0]
    broken.write_text(json.dumps(values))
    with pytest.raises(StructPruneError, match="different lengths"):
        read_path(broken)
    first = json.loads(saved.read_text())["sublayers"][0]
    for changes, message in (
        ({"parameters": [first["parameters"][0]] * len(first["units"])}, "parameters do not descend"),
        ({"before": first["parameters"][0] - 1}, "parameters do not descend"),
        ({"before": 10**400}, "less than or equal to"),
        ({"loss": [1e308] * len(first["units"])}, "less than or equal to"),
        ({"block": 1}, "a sublayer is there twice"),
    ):
        values["sublayers"][0] = {**first, **changes}
        broken.write_text(json.dumps(values))
        with pytest.raises(StructPruneError, match=message):
            read_path(broken)
    for flags, message in (
        (["--target-parameters", "1M"], "--target-parameters and --allocation would decide the same thing"),
        (["--allocator", "dp"], "--allocator and --allocation would decide the same thing"),
        (["--search", "evopress"], "--search and --allocation would decide the same thing"),
        (["--method", "wanda"], "--allocation gives widths, and method 'wanda' removes single weights"),
    ):
        code, _, said = command_line("plan", tmp_path, "--allocation", saved, *flags)
        assert code == 2
        assert message in said
    code, _, said = command_line("plan", tmp_path, "--allocation", tmp_path / "none.json")
    assert code == 2
    assert "there is no file of costs here" in said
