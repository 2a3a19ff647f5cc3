"""What is best for several calibration texts: the mean of them, or the one that fares worst."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import Recipe, prune
from structprune.api import plan, resume
from structprune.engine.layerwise import solve
from structprune.engine.run.context import stretches
from structprune.errors import UnsupportedError
from structprune.linalg.gram_products import in_float64
from structprune.observer import SilentObserver
from structprune.phases import SublayerPhase
from structprune.results.summary import summary_rows
from structprune.types import LayerProblem
from support.command_line import CommandLine

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN = 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three texts of other letters each."""
    folder = tmp_path_factory.mktemp("texts")
    found: list[str] = []
    for name, letters in (("vowels", "aeiou "), ("digits", "0123456789"), ("marks", ".,;:!?-")):
        drawn = torch.randint(len(letters), (8000,), generator=torch.Generator().manual_seed(len(name)))
        (folder / f"{name}.txt").write_text("".join(letters[i] for i in drawn))
        found.append(str(folder / f"{name}.txt"))
    return found


def recipe(calibration: Sequence[str], **changes: Any) -> Recipe:
    settings = {"num_samples": 24, "seq_len": SEQ_LEN, "held_out": 3, "dtype": "float32", "multiple_of": 1}
    return Recipe.build(**{**settings, "calibration": list(calibration), "reload_check": False, **changes})


def weights(output: Path) -> bytes:
    (path,) = output.glob("*.safetensors")
    return path.read_bytes()


def problems(monkeypatch: pytest.MonkeyPatch) -> list[LayerProblem]:
    """Collect every problem that is solved from now on."""
    found: list[LayerProblem] = []
    build = solve.layer_problem

    def kept(*arguments: Any) -> LayerProblem:
        found.append(build(*arguments))
        return found[-1]

    monkeypatch.setattr(solve, "layer_problem", kept)
    return found


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [([], []), ([3], [(3, 4)]), ([0, 1, 2], [(0, 3)]), ([1, 3, 4, 7], [(1, 2), (3, 5), (7, 8)])],
)
def test_stretches(numbers: list[int], wanted: list[tuple[int, int]]) -> None:
    assert stretches(numbers) == wanted


@pytest.mark.parametrize("changes", [{}, {"repair": "scales"}, {"solver": "admm", "target": "local"}])
def test_of_one_text_the_worst_is_the_mean(
    changes: dict[str, Any], texts: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    for objective in ("mean", "worst"):
        prune(tiny_llama, recipe(texts[:1], objective=objective, **changes), tmp_path / objective)
    assert weights(tmp_path / "mean") == weights(tmp_path / "worst")


def test_the_mean_is_the_default(texts: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    prune(tiny_llama, recipe(texts), tmp_path / "default")
    prune(tiny_llama, recipe(texts, objective="mean"), tmp_path / "mean")
    assert weights(tmp_path / "default") == weights(tmp_path / "mean")


@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_sums_of_each_text(
    scope: str, texts: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of the text's windows among the last quarter, and together those of all texts.

    Of 24 windows twelve are the first text's, at 0.5/12, 1.5/12 and so on of the way, and six each of the others': the
    last six are of the third, the first, the first, the second, the third and the first text.
    """
    found = problems(monkeypatch)
    asked = [f"{texts[0]}:2", *texts[1:]]
    for objective in ("mean", "worst"):
        prune(tiny_llama, recipe(asked, scope=scope, objective=objective), tmp_path / objective)
    # Up to the first block nothing is pruned yet.
    mean, worst = found[0], found[len(found) // 2]
    assert mean.held_out_by_text == ()
    assert [part.num_tokens for part in worst.held_out_by_text] == [3 * SEQ_LEN, SEQ_LEN, 2 * SEQ_LEN]
    assert mean.held_out is not None
    assert worst.held_out is not None
    assert mean.held_out.num_tokens == worst.held_out.num_tokens == 6 * SEQ_LEN
    together = sum(in_float64(part.gram_II) for part in worst.held_out_by_text)
    assert isinstance(together, torch.Tensor)
    torch.testing.assert_close(together, in_float64(mean.held_out.gram_II), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_float64(worst.fit.gram_II), in_float64(mean.fit.gram_II))
    # Letters of their own: the texts' sums differ.
    first, second, _ = (in_float64(part.gram_II) / part.num_tokens for part in worst.held_out_by_text)
    assert float((first - second).norm() / first.norm()) > 0.1


class Stop(BaseException):
    """The process is gone."""


class Stopper(SilentObserver):
    """Ends the process behind the first block of the pass that prunes."""

    def start(self, name: str, total: int) -> None:
        self.name = name

    def advance(self, text: str = "") -> None:
        if self.name == "prune":
            raise Stop


@pytest.mark.parametrize("changes", [{}, {"scope": "all", "method": "fasp", "damping": "auto", "memory": "1GiB"}])
def test_a_resumed_run_is_the_same(changes: dict[str, Any], texts: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    asked = recipe(texts, objective="worst", **changes)
    prune(tiny_llama, asked, tmp_path / "whole")
    with pytest.raises(Stop):
        prune(tiny_llama, asked, tmp_path / "out", Stopper())
    resume(tmp_path / "out")
    assert weights(tmp_path / "whole") == weights(tmp_path / "out")


def test_the_plan_counts_the_sums_of_each_text(texts: list[str], tiny_llama: Path) -> None:
    def statistics(calibration: list[str], **changes: Any) -> int:
        return plan(tiny_llama, recipe(calibration, **changes)).plan.phases[SublayerPhase.STATISTICS.of("mlp")]

    # 48 channels, 32 dimensions: a Gram and a sum of targets times inputs, in float32, for two texts more.
    layer = 4 * (48 * 48 + 48 * 32)
    assert statistics(texts, objective="worst") - statistics(texts) == 2 * layer
    assert statistics(texts[:1], objective="worst") == statistics(texts[:1])


def test_a_repair_says_which_text_it_went_by(texts: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    said: dict[str, str] = {}
    for objective in ("mean", "worst"):
        asked = recipe(texts, method="wanda-sp", repair="scales", objective=objective)
        report = prune(tiny_llama, asked, tmp_path / objective)
        assert report.repair is not None
        said[objective] = dict(summary_rows(report))["repair by scales"]
    assert ", of the text that is furthest from it, " not in said["mean"]
    assert ", of the text that is furthest from it, " in said["worst"]


def test_where_nothing_is_chosen_it_is_refused(
    texts: list[str], tiny_llama: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    with pytest.raises(UnsupportedError, match="nothing is chosen on windows kept apart"):
        prune(tiny_llama, recipe(texts, method="wanda-sp", objective="worst"), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="--objective has no meaning for method 'slicegpt'"):
        Recipe.build(method="slicegpt", objective="worst")
    flags = ["--calibration", texts[0], "--calibration", texts[1], "--seq-len", SEQ_LEN, "--num-samples", 8]
    code, _, err = command_line(
        "prune", tiny_llama, "-o", tmp_path / "out", *flags, "--method", "wanda-sp", "--objective", "worst"
    )
    assert (code, "--damping auto" in err) == (2, True)
    code, _, err = command_line("prune", tiny_llama, "-o", tmp_path / "out", *flags, "--objective", "best")
    assert (code, "--objective" in err) == (2, True)
    assert not (tmp_path / "out").exists()
