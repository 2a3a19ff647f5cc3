"""Several calibration texts: shares, the mix, what each lost, resume, budgets and reports."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from structprune import Recipe, prune
from structprune.api import plan, resume
from structprune.calibration.context import SourceContext
from structprune.calibration.select import load_texts, load_windows
from structprune.errors import InputError
from structprune.report.page import prune_page
from structprune.results.report import PruneReport
from structprune.results.summary import summary_rows, warnings
from structprune.results.texts import CalibrationText, HeldOutText
from structprune.runs.directory import RunDirectory
from structprune.texts import shares, weighted_text, weighted_texts
from support.command_line import CommandLine
from support.models import byte_tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three texts whose windows cannot be taken for one another's."""
    folder = tmp_path_factory.mktemp("texts")
    found = {name: folder / f"{name}.txt" for name in ("vowels", "digits", "marks")}
    for (name, path), letters in zip(found.items(), ("aeiou ", "0123456789", ".,;:!?-"), strict=True):
        generator = torch.Generator().manual_seed(len(name))
        path.write_text("".join(letters[i] for i in torch.randint(len(letters), (8000,), generator=generator)))
    return found


@pytest.fixture(scope="module")
def measured(texts: dict[str, Path], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> PruneReport:
    """The report of a run on two texts."""
    asked = recipe(str(texts["vowels"]), str(texts["digits"]), reload_check=False)
    return prune(tiny_llama, asked, tmp_path_factory.mktemp("measured") / "out")


def recipe(*calibration: str, **changes: Any) -> Recipe:
    settings = {"method": "fasp", "num_samples": 12, "seq_len": 32, "held_out": 4, "dtype": "float32"}
    return Recipe.build(**{**settings, "calibration": calibration, **changes})


@pytest.mark.parametrize(
    ("weights", "total", "wanted"),
    [
        ([1, 1, 1], 12, [4, 4, 4]),
        ([2, 1], 12, [8, 4]),
        ([1, 1, 1], 8, [3, 3, 2]),
        ([1000, 1], 5, [4, 1]),
        ([0.5, 0.25, 0.25], 48, [24, 12, 12]),
        ([1], 7, [7]),
    ],
)
def test_shares(weights: list[float], total: int, wanted: list[int]) -> None:
    assert shares(weights, total) == wanted


def test_a_mix_is_prose_and_program_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [(text.name, text.weight) for text in weighted_texts(("mix:0.5", "notes.txt"))]
    assert named == [("auto", 1.0), ("python", 0.5), ("notes.txt", 1.0)]
    with pytest.raises(ValueError, match="python is named twice"):
        weighted_texts(("mix", "python"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mix").touch()
    assert [text.name for text in weighted_texts(("mix",))] == ["mix"]


def test_a_run_on_the_mix(tiny_llama: Path, tmp_path: Path) -> None:
    report = prune(tiny_llama, recipe("mix", reload_check=False), tmp_path / "out")
    found = [(text.name, text.num_windows) for text in report.calibration.texts]
    assert found in ([("boolq", 8), ("python", 4)], [("self", 8), ("python", 4)])
    assert report.held_out is not None
    assert [text.name for text in report.held_out.texts] == [name for name, _ in found]


def test_source_code_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    for name in ("a.py", "b/c.py", "test/t.py", "site-packages/s.py", "idlelib/i.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"{Path(name).stem}" * 20_000)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    drawn: list[str] = []

    def encode(text: str) -> torch.Tensor:
        drawn.append(text)
        return torch.arange(len(text))

    def windows(**changes: Any) -> Any:
        context = SourceContext(encode=encode, sample=lambda *_: torch.empty(0), num_samples=2, seq_len=4000, seed=0)
        return load_windows("python", replace(context, **changes), lambda said: None)[1]

    assert windows().ids_NS.shape == (2, 4000)
    # Both modules are needed, each cut, and none of the folders that are left out.
    assert set(drawn[-1]) == {"a", "c", "\n"}
    assert drawn[-1].count("a") == drawn[-1].count("c") == 12_000
    # One is enough, and the seed says which.
    seen = set()
    for seed in range(8):
        windows(num_samples=1, seq_len=1000, seed=seed)
        seen.add(drawn[-1][0])
    assert seen == {"a", "c"}
    shutil.rmtree(library)
    with pytest.raises(InputError, match="no source code of its library"):
        windows()


def test_names_with_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes:2").write_text("as it is")
    found = [
        (text.name, text.weight) for text in map(weighted_text, ("a.txt:2", "a.txt", "notes:2", "notes:2:3", "a:b"))
    ]
    assert found == [("a.txt", 2), ("a.txt", 1), ("notes:2", 1), ("notes:2", 3), ("a:b", 1)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["a.txt", "a.txt:2"], "a.txt is named twice: give it a weight instead, such as a.txt:2"),
        (["a.txt:0", "b.txt"], "the weight of a.txt must be positive, got 0"),
        ([f"a.txt:{'9' * 400}", "b.txt"], "the weight of a.txt must be at most 1e+12"),
        ([], "no text is named"),
    ],
)
def test_what_is_no_list_of_texts(asked: list[str], said: str) -> None:
    with pytest.raises(InputError, match="calibration") as caught:
        recipe(*asked)
    assert said in str(caught.value)


def test_every_stretch_has_each_text_s_share(texts: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    asked = [f"{texts['vowels']}:2", str(texts["digits"]), str(texts["marks"])]
    prune(tiny_llama, recipe(*asked), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert report["recipe"]["calibration"] == asked
    shown = [(Path(t["name"]).stem, t["weight"], t["num_windows"]) for t in report["calibration"]["texts"]]
    # One window each, and nine by weight.
    assert shown == [("vowels", 2, 6), ("digits", 1, 3), ("marks", 1, 3)]
    held_out = [(Path(t["name"]).stem, t["num_windows"]) for t in report["held_out"]["texts"]]
    assert held_out == [("vowels", 2), ("digits", 1), ("marks", 1)]


def test_the_mix(texts: dict[str, Path]) -> None:
    context = support_context(num_samples=12, num_held_out=4)
    asked = [
        weighted_text(f"{texts['vowels']}:2"),
        weighted_text(str(texts["digits"])),
        weighted_text(str(texts["marks"])),
    ]
    name, windows = load_texts(asked, context, print)
    assert name == ", ".join(str(path) for path in texts.values())
    kinds = ["".join(map(chr, row)) for row in windows.ids_NS.tolist()]
    of = [0 if text.strip(" aeiou") == "" else 1 if text.isdigit() else 2 for text in kinds]
    assert [tuple(i for i, k in enumerate(of) if k == number) for number in range(3)] == [
        t.windows for t in windows.texts
    ]
    for length in (4, 8, 12):
        assert [of[:length].count(k) for k in range(3)] == [length // 2, length // 4, length // 4]
    assert windows.held_out_NS is not None
    fitted = {tuple(row) for row in windows.ids_NS.tolist()}
    assert not fitted & {tuple(row) for row in windows.held_out_NS.tolist()}
    # One text alone is what it was.
    one = load_texts([weighted_text(str(texts["digits"]))], context, print)
    same = load_windows(str(texts["digits"]), context, print)
    assert one[0] == same[0]
    assert torch.equal(one[1].ids_NS, same[1].ids_NS)
    assert one[1].texts == ()


def support_context(**changes: Any) -> SourceContext:
    def encode(text: str) -> torch.Tensor:
        return torch.tensor([ord(character) for character in text])

    def sample(*_: int) -> torch.Tensor:
        raise AssertionError("nothing is sampled")

    return SourceContext(**{"encode": encode, "sample": sample, "seq_len": 16, "seed": 3, **changes})


def test_a_repair_s_windows_are_of_every_text(texts: dict[str, Path]) -> None:
    """By the weights, beside those that are fitted on and those held out."""
    context = SourceContext(
        render=str,
        encode=lambda text: torch.tensor([ord(c) for c in text], dtype=torch.int64),
        sample=lambda *_: torch.empty(0),
        num_samples=12,
        seq_len=32,
        seed=0,
        num_held_out=4,
        num_repair=8,
    )
    asked = weighted_texts((f"{texts['vowels']}:3", str(texts["digits"])))
    _, plain = load_texts(asked, replace(context, num_repair=0), lambda _: None)
    _, found = load_texts(asked, context, lambda _: None)
    assert torch.equal(plain.ids_NS, found.ids_NS)
    assert found.repair_NS is not None
    assert [len(text.repair) for text in found.texts] == [6, 2]
    for text, letters in zip(found.texts, ("aeiou ", "0123456789"), strict=True):
        assert set(found.repair_NS[list(text.repair)].flatten().tolist()) <= set(map(ord, letters))
    rows = [
        tuple(row)
        for part in (found.ids_NS, found.held_out_NS, found.repair_NS)
        if part is not None
        for row in part.tolist()
    ]
    assert len(rows) == len(set(rows)) == 24


def test_fewer_windows_than_texts(texts: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    few = recipe(*map(str, texts.values()), num_samples=2)
    for verb in (lambda: plan(tiny_llama, few), lambda: prune(tiny_llama, few, tmp_path / "out")):
        with pytest.raises(InputError, match="fewer calibration windows than texts"):
            verb()
    assert not (tmp_path / "out").exists()


def test_a_short_text_gives_what_it_has(texts: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a short text. " * 10)
    report = prune(tiny_llama, recipe(str(texts["digits"]), str(short)), tmp_path / "out")
    windows = [text.num_windows for text in report.calibration.texts]
    # 140 characters are four windows, one of which is set apart.
    assert windows == [6, 3]
    assert report.held_out is not None
    assert report.held_out.set_apart
    assert report.calibration.num_windows == 9


def test_perplexities_of_each_text(texts: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    """Against stock code, on windows that are known by their letters."""
    report = prune(tiny_llama, recipe(*map(str, texts.values()), held_out=6), tmp_path / "out")
    held_out = report.held_out
    assert held_out is not None
    context = support_context(num_samples=4, num_held_out=2, seq_len=32, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    tokenizer = byte_tokenizer()
    total = 0.0
    for path, found in zip(texts.values(), held_out.texts, strict=True):
        windows = load_windows(str(path), context, print)[1].held_out_NS
        assert windows is not None
        ids = torch.tensor([tokenizer.encode("".join(map(chr, row))) for row in windows.tolist()])
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=ids).loss)
        assert found.num_windows == 2
        assert found.pruned_perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        total += loss
    assert held_out.pruned_perplexity == pytest.approx(math.exp(total / 3), rel=1e-4)
    rows = dict(summary_rows(report))
    assert rows["perplexity, digits.txt"].endswith("2 held-out windows)")
    page, card = ((tmp_path / "out" / name).read_text() for name in ("pruning_report.html", "README.md"))
    for name in ("vowels.txt", "digits.txt", "marks.txt"):
        assert f"perplexity, {name}" in page
        assert f"the same of {name}" in card
    assert str(texts["digits"].parent) not in page + card


@pytest.mark.parametrize(
    ("perplexities", "said"),
    [
        # Logarithms 0.095 and, a little below or above their sum with 0.1, 0.195: twice the other's comes before.
        ([11.0, 12.15], ""),
        (
            [11.0, 12.17],
            "1.22 times the dense model's, that of the others 1.10 times in the mean (logarithms 0.20 and 0.10)",
        ),
        # 0.2 and 0.4: the double counts.
        ([12.2, 14.8], ""),
        (
            [12.2, 15.0],
            "1.50 times the dense model's, that of the others 1.22 times in the mean (logarithms 0.41 and 0.20)",
        ),
        # The others together: 0.3 and 0.1 are 0.2 in the mean.
        ([13.5, 11.05, 14.8], ""),
        (
            [13.5, 11.05, 15.2],
            "1.52 times the dense model's, that of the others 1.22 times in the mean (logarithms 0.42 and 0.20)",
        ),
        # They may have gained.
        ([9.9, 10.8], ""),
        (
            [9.9, 11.1],
            "1.11 times the dense model's, that of the others 0.99 times in the mean (logarithms 0.10 and -0.01)",
        ),
    ],
)
def test_a_text_that_lost_far_more(perplexities: list[float], said: str, measured: PruneReport) -> None:
    found = told(measured, perplexities)
    advice = (
        "Give it twice the weight (--calibration code.py:6), choose for the text that fares worst (--objective worst), "
        "or remove less."
    )
    assert found == (
        [f"code.py lost far more than the other texts: its perplexity is {said}. {advice}"] if said else []
    )


@pytest.mark.parametrize(
    ("changes", "advised"),
    [
        ({"damping": "auto"}, True),
        ({"damping": 1e-2, "repair": "scales"}, True),
        ({"damping": "auto", "objective": "worst"}, False),
        ({"damping": 1e-2}, False),
    ],
)
def test_another_objective_is_advised_where_there_is_one(
    changes: dict[str, Any], advised: bool, measured: PruneReport
) -> None:
    recipe = measured.recipe.model_copy(update=changes)
    (found,) = told(measured.model_copy(update={"recipe": recipe}), [11.0, 15.0])
    assert (", choose for the text that fares worst (--objective worst), or remove less." in found) == advised


def told(measured: PruneReport, perplexities: list[float]) -> list[str]:
    """The warnings of a text that lost far more, of texts that the dense model has a perplexity of 10 on.

    The last one is `code.py`, with three times the weight of another.
    """
    entries = [
        HeldOutText(name=f"/a/{number}.txt", num_windows=2, dense_perplexity=10.0, pruned_perplexity=after)
        for number, after in enumerate(perplexities[:-1])
    ]
    entries.append(
        HeldOutText(name="/a/code.py", num_windows=2, dense_perplexity=10.0, pruned_perplexity=perplexities[-1])
    )
    assert measured.held_out is not None
    held_out = measured.held_out.model_copy(update={"texts": entries})
    texts = [CalibrationText(name="/a/code.py", description="", weight=3.0, num_windows=9)]
    calibration = measured.calibration.model_copy(update={"texts": texts})
    report = measured.model_copy(update={"held_out": held_out, "calibration": calibration})
    return [warning for warning in warnings(report) if "far more" in warning]


def test_the_page_says_it_too(measured: PruneReport) -> None:
    assert measured.held_out is not None
    first, *others = measured.held_out.texts
    worse = first.model_copy(update={"pruned_perplexity": 10 * first.dense_perplexity})
    held_out = measured.held_out.model_copy(update={"texts": [worse, *others]})
    page = prune_page(measured.model_copy(update={"held_out": held_out}))
    assert f"{worse.label} lost far more than the other texts" in page
    assert "lost far more" not in prune_page(measured)


def test_a_resumed_run_is_the_same(
    texts: dict[str, Path], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(f"{texts['vowels']}:3", str(texts["digits"]))
    whole = prune(tiny_llama, asked, tmp_path / "whole")

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit", cut)
        with pytest.raises(KeyboardInterrupt):
            prune(tiny_llama, asked, tmp_path / "out")
    report = resume(tmp_path / "out")
    assert report.held_out == whole.held_out
    assert report.calibration == whole.calibration
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_resumed_run_notices_another_text(
    texts: dict[str, Path], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (shutil.copy(texts[name], tmp_path) for name in ("vowels", "digits"))

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit", cut)
        with pytest.raises(KeyboardInterrupt):
            prune(tiny_llama, recipe(str(first), str(second)), tmp_path / "out")
    Path(second).write_text("9" * 8000)
    with pytest.raises(InputError, match="another calibration text") as caught:
        resume(tmp_path / "out")
    assert "digits.txt" in str(caught.value)


def test_the_plan_counts_the_largest_text(texts: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    large.write_text("a longer text " * 200_000)

    def reading(*names: str) -> int:
        return next(
            size for phase, size in plan(tiny_llama, recipe(*names)).plan.phases.items() if phase == "calibration text"
        )

    assert reading(str(large), str(texts["digits"])) == reading(str(large))
    assert reading(str(large)) - reading(str(texts["digits"])) == 8 * (large.stat().st_size - 8000)
    # A built-in text's reader stays in memory beside.
    assert reading(str(large), "boolq") > reading(str(large))


def test_the_command_line(texts: dict[str, Path], tiny_llama: Path, tmp_path: Path, command_line: CommandLine) -> None:
    flags = ["--num-samples", 8, "--seq-len", 32, "--method", "fasp", "--dtype", "float32"]
    several = ["--calibration", f"{texts['vowels']}:3", "--calibration", texts["marks"]]
    code, out, err = command_line("prune", tiny_llama, "-o", tmp_path / "out", *flags, *several)
    assert code == 0, err
    assert "perplexity, marks.txt" in out
    # The same from a file, as a list.
    (tmp_path / "recipe.yaml").write_text(f"calibration: ['{texts['vowels']}:3', '{texts['marks']}']\n")
    code, _, err = command_line(
        "prune", tiny_llama, "-o", tmp_path / "same", *flags, "--recipe", tmp_path / "recipe.yaml"
    )
    assert code == 0, err
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    code, _, err = command_line("prune", tiny_llama, "-o", tmp_path / "no", "--calibration", "a.txt:0")
    assert (code, "the weight of a.txt must be positive" in err) == (2, True)
