"""What is best for several calibration texts: the mean of them, or the one that fares worst."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from structprune import Recipe, prune
from structprune.api import plan, resume
from structprune.calibration.context import CalibrationWindows, TextWindows
from structprune.calibration.store import HiddenStore, MemoryStore
from structprune.engine.layerwise import solve
from structprune.engine.run.context import RunContext, stretches
from structprune.engine.sensitivity import backward_pass, fisher
from structprune.engine.sensitivity.text_scale import window_factors
from structprune.errors import UnsupportedError
from structprune.linalg.gram_products import in_float64
from structprune.observer import SilentObserver
from structprune.phases import SublayerPhase
from structprune.ranks import Ranks
from structprune.results.summary import summary_rows
from structprune.types import BlockLayout, LayerProblem
from support.command_line import CommandLine
from support.recipes import resolved_units

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


def gradients_of(num_windows: int, factors: Sequence[float]) -> torch.Tensor:
    drawn_NSD = torch.randn(num_windows, 4, 3, generator=torch.Generator().manual_seed(1))
    return drawn_NSD * torch.tensor([factors[number % len(factors)] for number in range(num_windows)])[:, None, None]


def test_gradients_of_every_text_get_one_mean_square() -> None:
    """By hand: windows in turns are of three texts, of which one has none among the first five."""
    given_NSD = gradients_of(5, (1.0, 10.0))
    texts = [
        TextWindows(name=name, description="", weight=1.0, windows=windows, held_out=())
        for name, windows in (("a", (0, 2, 4)), ("b", (1, 3)), ("c", (5,)))
    ]
    squares = given_NSD.double().square().sum(dim=(1, 2))
    wanted = float(squares.sum()) / 5
    outcome = torch.empty_like(given_NSD)
    scaled = resolved_units("structprune", sensitivity_scale="per-text")
    for number, other in enumerate((squares[[1, 3]], squares[[0, 2, 4]])):
        # Of two ranks, each has every other window; here those of the first text, and those of the second.
        class Half(Ranks):
            rank, size, sums = number, 2, other

            def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
                tensor[1 - self.rank] += self.sums.sum()
                return tensor

        rank = number
        store = MemoryStore((len(given_NSD[rank::2]), 4, 3), torch.float32)
        store.write(0, given_NSD[rank::2])
        windows = CalibrationWindows(ids_NS=torch.zeros(6, 4), description="", texts=tuple(texts))
        context: Any = SimpleNamespace(num_backward=5, windows=windows, ranks=Half(), settings=lambda kind: scaled)
        factors = window_factors(context, store)
        outcome[rank::2] = given_NSD[rank::2] * torch.tensor(factors)[:, None, None]
    for numbers in ([0, 2, 4], [1, 3]):
        mean = float(outcome[numbers].double().square().sum()) / len(numbers)
        assert mean == pytest.approx(wanted, rel=1e-5)
        factor = outcome[numbers] / given_NSD[numbers]
        torch.testing.assert_close(factor, factor[0, 0, 0].expand_as(factor))


def test_the_size_of_a_text_s_gradients_does_not_count(
    texts: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times the gradients of the second text: sensitivities change, but not if each text's are of one size."""
    fill, price = backward_pass.loss_gradient, fisher._costs
    times = [1.0]
    found: dict[tuple[str, float], list[torch.Tensor]] = {}

    def larger(context: RunContext, final: HiddenStore, gradient: HiddenStore, labels: backward_pass.Labels) -> None:
        fill(context, final, gradient, labels)
        for number in context.windows.texts[1].windows:
            if number < context.num_backward:
                gradient.write(number, gradient.read(number, number + 1) * times[0])

    def kept(context: RunContext, block: BlockLayout, measured: fisher.Measured) -> dict[str, torch.Tensor]:
        sensitivity_OO = measured.sensitivity["mlp"].clone()
        found.setdefault((scale, times[0]), []).append(sensitivity_OO / sensitivity_OO.diagonal().sum())
        return price(context, block, measured)

    monkeypatch.setattr(backward_pass, "loss_gradient", larger)
    monkeypatch.setattr(fisher, "_costs", kept)
    for scale in ("given", "per-text"):
        for times[0] in (1.0, 8.0):
            asked = recipe(texts, sensitivity_scale=scale, sensitivity_samples=6)
            prune(tiny_llama, asked, tmp_path / f"{scale}-{times[0]}")
    blocks = zip(*(found[scale, factor] for scale in ("given", "per-text") for factor in (1.0, 8.0)), strict=True)
    for given, given_larger, scaled, scaled_larger in blocks:
        assert float((given_larger - given).norm() / given.norm()) > 0.05
        torch.testing.assert_close(scaled_larger, scaled, rtol=1e-4, atol=1e-6)


def test_one_text_has_one_scale(texts: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    for scale in ("given", "per-text"):
        prune(tiny_llama, recipe(texts[:1], sensitivity_scale=scale), tmp_path / scale)
    assert weights(tmp_path / "given") == weights(tmp_path / "per-text")


def test_without_gradients_there_is_no_scale(texts: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="measures no sensitivities that could be scaled"):
        prune(tiny_llama, recipe(texts, method="fasp", sensitivity_scale="per-text"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


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
