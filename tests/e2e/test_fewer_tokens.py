"""Models with fewer tokens: the same predictions among those that stay, and files that stock code loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import structprune
from structprune.api import export, inspect, plan, recover, resume
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.assess import EvaluationRequest, VocabularyRequest, choose_vocabulary, evaluate_all
from structprune.assess.counting import TokenSource, count_texts
from structprune.assess.sizes import Priced, SizesRequest, SizesTable, ladder, price_sizes
from structprune.assess.split import decided_for_a_check
from structprune.errors import StructPruneError
from structprune.observer import SilentObserver
from structprune.recipe import Recipe
from structprune.recipe.training import RecoverySettings
from structprune.results.comparison import Comparison
from structprune.results.report import PruneReport
from structprune.texts import weighted_texts
from structprune.training.run import open_teacher
from structprune.vocabulary.kept import ALL_TOKENS, KEPT_NAME, KeptTokens
from support.command_line import CommandLine
from support.models import TINY_MODELS
from support.spare_rows import ROWS, save_with_spare_rows
from support.vocabularies import TEXT

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 1}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("\n".join(TEXT[:120] * 6), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_spare_rows("llama", tmp_path_factory.mktemp("vocabulary") / "llama")


@pytest.fixture(scope="module")
def kept(source: Path, texts: Path) -> KeptTokens:
    return choose_vocabulary(source, VocabularyRequest(size=384, texts=[str(texts)])).kept


def pruned(source: Path, output: Path, texts: Path, kept: KeptTokens | None = None, **changes: Any) -> PruneReport:
    settings = {"method": "fasp", "calibration": str(texts), "vocabulary": kept, **SETTINGS, **changes}
    return structprune.prune(source, Recipe.build(**settings), output)


def logits(directory: Path, ids: list[int], loader: Any = AutoModelForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return loader.from_pretrained(directory)(input_ids=torch.tensor([ids])).logits[0]


KINDS = ["llama", "llama-untied-biased", "opt", "gemma2", "gpt2", "gemma3"]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_among_the_tokens_that_stay(kind: str, texts: Path, tmp_path: Path) -> None:
    """Nothing else is removed: the logits of kept tokens are the source's own."""
    source = save_with_spare_rows(kind, tmp_path / "source")
    kept = choose_vocabulary(source, VocabularyRequest(size=384, texts=[str(texts)])).kept
    report = pruned(source, tmp_path / "out", texts, kept, sparsity=0.0, method="magnitude")
    loader = AutoModelForCausalLM if kind in TINY_MODELS else AutoModelForImageTextToText
    ids = list(kept.ids[5:60:3])
    new = kept.new_ids
    wanted = logits(source, ids, loader)[:, list(kept.ids)]
    found = logits(tmp_path / "out", [new[number] for number in ids], loader)
    assert found.shape == (len(ids), 384)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert report.vocabulary is not None
    assert (report.vocabulary.before, report.vocabulary.after) == (ROWS, 384)
    assert report.reload.relative_difference is not None


def test_what_is_written(source: Path, texts: Path, kept: KeptTokens, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = pruned(source, output, texts, kept, sparsity=0.3)
    config, generation = (json.loads((output / name).read_text()) for name in ("config.json", "generation_config.json"))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert config["vocab_size"] == 384 == len(tokenizer)
    assert config["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("</s>")
    assert generation["eos_token_id"] == [tokenizer.eos_token_id]
    for text in [TEXT[0], "\u00e9\u4f60 \U0001f600"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    # The source's embedding, tied, is in the parameters before.
    before = sum(t.numel() for t in load_file(source / "model.safetensors").values())
    after = sum(t.numel() for t in load_file(output / "model.safetensors").values())
    assert (report.size.parameters_before, report.size.parameters_after) == (before, after)
    assert report.vocabulary is not None
    assert report.vocabulary.parameters == (ROWS - 384) * 32
    assert KeptTokens.model_validate_json((output / KEPT_NAME).read_text()) == kept
    for name in ("pruning_report.html", "README.md"):
        text = (output / name).read_text()
        assert "384 of 576" in text or KEPT_NAME in text
        # Not every id, in a page that a person reads.
        assert str(list(kept.ids[:30]))[1:-1] not in text


def test_an_earlier_output_is_trimmed_again(source: Path, texts: Path, kept: KeptTokens, tmp_path: Path) -> None:
    pruned(source, tmp_path / "first", texts, kept, sparsity=0.2)
    again = choose_vocabulary(tmp_path / "first", VocabularyRequest(size=320, texts=[str(texts)])).kept
    report = pruned(tmp_path / "first", tmp_path / "second", texts, again, sparsity=0.0, method="magnitude")
    assert report.vocabulary is not None
    assert (report.vocabulary.before, report.vocabulary.after) == (384, 320)


def test_a_limit_counts_the_rows_that_stay(source: Path, texts: Path, kept: KeptTokens, tmp_path: Path) -> None:
    before = sum(t.numel() for t in load_file(source / "model.safetensors").values())
    most = before - (ROWS - 384) * 32 - 1500
    pruned(source, tmp_path / "out", texts, kept, target_parameters=most)
    after = sum(t.numel() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert most - 2 * 96 < after <= most


def test_bits_per_byte_compare_the_two(source: Path, texts: Path, kept: KeptTokens, tmp_path: Path) -> None:
    pruned(source, tmp_path / "out", texts, kept, sparsity=0.0, method="magnitude")
    request = EvaluationRequest(texts=[texts], seq_len=64, max_windows=4, dtype="float32", bos="no")
    (whole,) = evaluate_all(source, request).texts
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(texts.read_text(), add_special_tokens=False)["input_ids"]
    written = sum(len(tokenizer.decode(ids[64 * n + 1 : 64 * n + 64]).encode()) for n in range(4))
    assert whole.num_bytes == written
    assert whole.bits_per_byte == pytest.approx(whole.mean_nll * 4 * 63 / math.log(2) / written)
    streamed = evaluate_all(source, EvaluationRequest(**{**vars_of(request), "stream": True})).texts[0]
    assert streamed.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-4)
    (smaller,) = evaluate_all(tmp_path / "out", request).texts
    assert smaller.bits_per_byte is not None


def vars_of(request: EvaluationRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in EvaluationRequest.__dataclass_fields__}


def test_a_smaller_model_learns_from_the_source(source: Path, texts: Path, kept: KeptTokens, tmp_path: Path) -> None:
    """The teacher is the source with the tokens that the student has kept."""
    pruned(source, tmp_path / "out", texts, kept, sparsity=0.3)
    settings = RecoverySettings(
        mode="scales", calibration=(str(texts),), num_samples=6, seq_len=32, dtype="float32", epochs=1, memory="1GiB"
    )
    report = recover(tmp_path / "out", source, settings, tmp_path / "recovered")
    assert report.tokens > 0
    assert (tmp_path / "recovered" / KEPT_NAME).is_file()
    # What is pruned again has the first run's list beside it: its own source has lost the tokens already.
    student = StockModel(open_model(str(tmp_path / "out")))
    for teacher in (source, tmp_path / "out"):
        assert open_teacher(str(teacher), "none", student).layout.vocab_size == 384


def test_a_gguf_file_of_fewer_tokens(source: Path, texts: Path, kept: KeptTokens, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pruned(source, tmp_path / "out", texts, kept, method="flap", structure="uniform", sparsity=0.3)
    export(tmp_path / "out", tmp_path / "out.gguf", format="gguf")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT[0], add_special_tokens=False)["input_ids"]
    again = inspect(tmp_path / "out.gguf")
    assert again.vocab_size == 384
    assert max(ids) < 384


def test_the_command_line(command_line: CommandLine, source: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    code, out, err = command_line("vocabulary", source, "-o", path, "--size", "400", "--text", texts, "--drop-reserve")
    assert code == 0, err
    assert "384 of" in out
    assert "--vocabulary" in out
    code, _, err = command_line("vocabulary", source, "-o", path, "--size", "400", "--text", texts, "--measure", texts)
    assert (code, "one size is chosen without being measured; got --measure" in err) == (2, True)
    settings = ("--calibration", texts, "--num-samples", 4, "--seq-len", 32, "--dtype", "float32", "--method", "fasp")
    code, out, err = command_line("prune", source, "-o", tmp_path / "out", "--vocabulary", path, *settings)
    assert code == 0, err
    assert "384 of 576 tokens stay" in " ".join(out.split())


@pytest.mark.slow
def test_a_comparison_of_fewer_tokens(
    command_line: CommandLine, source: Path, texts: Path, kept: KeptTokens, tmp_path: Path
) -> None:
    """A cell's bits per byte are those of its own evaluation, and the loss is counted in them."""
    settings = ("--calibration", texts, "--num-samples", 4, "--seq-len", 32, "--max-windows", 3, "--no-speed")
    methods = ("--methods", "fasp", "fasp:vocabulary=384", "--sparsities", 0.25, "--set", "dtype=float32")
    code, out, err = command_line(
        "compare", source, "-o", tmp_path / "table", "--text", texts, *settings, *methods, "multiple_of=1"
    )
    assert code == 0, err
    found = Comparison.model_validate_json((tmp_path / "table" / "comparison.json").read_text())
    assert not found.failures
    (smaller,) = (cell for cell in found.cells if cell.tokens is not None)
    assert smaller.tokens == 384
    pruned(source, tmp_path / "alone", texts, kept, sparsity=0.25)
    request = EvaluationRequest(texts=[texts], seq_len=32, max_windows=3, dtype="float32")
    alone, dense = (evaluate_all(model, request).texts[0] for model in (tmp_path / "alone", source))
    assert smaller.texts[0].bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)
    assert smaller.texts[0].kl_to_dense is None
    assert alone.bits_per_byte is not None
    assert dense.bits_per_byte is not None
    wanted = dense.mean_nll * (alone.bits_per_byte / dense.bits_per_byte - 1)
    assert found.excess(smaller)[texts.name] == pytest.approx(wanted, rel=1e-4)
    assert "bits/byte" in out
    assert "bits per byte words.txt" in (tmp_path / "table" / "comparison.csv").read_text()
    assert "does not compare" in (tmp_path / "table" / "comparison.html").read_text()


def priced(price: float) -> Priced:
    return Priced(name="", parameters=1, bits_per_byte=1.0, price=price)


@pytest.mark.parametrize(
    ("prices", "best"), [([0.1, 0.2, 0.4], 1), ([0.5, 0.1], None), ([0.1, 0.5, 0.2], 0), ([0.3], 0)]
)
def test_the_size_that_channels_speak_for(prices: list[float], best: int | None) -> None:
    """From the largest on, up to where a step costs more than the channels do."""
    sizes = tuple(map(priced, prices))
    table = SizesTable(dense_bits=1.0, sizes=sizes, lists=(ALL_TOKENS,) * len(sizes), channels=priced(0.3))
    assert table.best == best


@pytest.mark.slow
def test_what_sizes_cost(source: Path, texts: Path, command_line: CommandLine, tmp_path: Path) -> None:
    """Bits per byte of a size are those of the model that is written with it."""
    other = tmp_path / "other.txt"
    other.write_text("\n".join(TEXT[100:] * 4), encoding="utf-8")
    output = tmp_path / "kept.json"
    measured = ("--measure", other, "--seq-len", 32, "--max-windows", 2, "--dtype", "float32", "--json")
    code, out, err = command_line("vocabulary", source, "-o", output, "--sizes", "384,512", "--text", texts, *measured)
    assert code == 0, err
    found = json.loads(out)
    kept = choose_vocabulary(source, VocabularyRequest(size=384, texts=[str(texts)])).kept
    pruned(source, tmp_path / "out", texts, kept, sparsity=0.0, method="magnitude")
    request = EvaluationRequest(texts=[other], seq_len=32, max_windows=2, dtype="float32")
    dense, smaller = (evaluate_all(model, request).texts[0].bits_per_byte for model in (source, tmp_path / "out"))
    assert found["dense_bits_per_byte"] == pytest.approx(dense, rel=1e-4)
    assert [size["parameters"] for size in found["sizes"]] == [64 * 32, 192 * 32]
    assert found["sizes"][1]["bits_per_byte"] == pytest.approx(smaller, rel=1e-4)
    step = found["sizes"][1]["bits_per_byte"] - found["sizes"][0]["bits_per_byte"]
    assert found["sizes"][1]["price"] == pytest.approx(step / (128 * 32 / 1e6))
    assert found["channels"]["parameters"] > 0
    assert output.is_file() == (found["best"] is not None)


def test_sizes_are_measured_on_other_text(source: Path, texts: Path) -> None:
    for measured, message in (([], "text that is not counted"), ([str(texts)], "cannot say what the others lose")):
        request = SizesRequest(sizes=[384], texts=[str(texts)], measured_on=measured)
        with pytest.raises(StructPruneError, match=message):
            price_sizes(source, request, SilentObserver(), structprune.prune)


def test_sizes_that_are_tried() -> None:
    assert ladder(300, 1000) == [704, 512, 384]
    assert ladder(960, 1000) == [960]
    assert len(ladder(64, 262_144)) == 9


def bits_by_size(num_rows: int, least_worth: int) -> Any:
    """Bits per byte that rise slowly down to a size, and steeply below; a model without channels loses in between."""

    def bits(self: Any, of: str | Path, adapter: str, tokens: KeptTokens) -> float:
        if Path(of).name == "channels":
            return 1.0 + 1e-5
        gone = num_rows - (len(tokens.ids) or num_rows)
        return 1.0 + 1e-9 * gone + 1e-3 * max(0, least_worth - (num_rows - gone))

    return bits


@pytest.mark.parametrize(("least_worth", "stay"), [(350, 384), (576, None)])
def test_a_run_decides_how_many_tokens_stay(
    least_worth: int, stay: int | None, source: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Down to where a step costs more than channels do; the whole texts say which ones they are."""
    large = tmp_path / "large.txt"
    large.write_text("\n".join(TEXT * 6), encoding="utf-8")
    num_rows = inspect(source).vocab_size
    monkeypatch.setattr("structprune.assess.sizes._Scales.bits", bits_by_size(num_rows, least_worth))
    asked = {"vocabulary": "auto", "sparsity": 0.25, "method": "fasp"}
    report = pruned(source, tmp_path / "out", large, **asked)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == (stay or num_rows)
    assert len(report.recipe.tokens.ids) == (stay or 0)
    if stay:
        kept = choose_vocabulary(source, VocabularyRequest(size=stay, texts=[str(large)])).kept
        assert report.recipe.tokens.ids == kept.ids
    else:
        alone = Recipe.build(vocabulary="auto", scope="vocabulary", calibration=str(large), seq_len=32)
        with pytest.raises(StructPruneError, match="no token is worth to go"):
            structprune.prune(source, alone, tmp_path / "alone")
    found = plan(source, Recipe.build(calibration=str(large), **asked))
    assert "decided by the run" in found.notes[0]
    with pytest.raises(StructPruneError, match="too short to say"):
        pruned(source, tmp_path / "short", texts, vocabulary="auto", sparsity=0.25)


LIMITS = [
    # Rows are cheaper than channels, and 128 of them are the fewest that meet the limit.
    (0, 100 * 32, 448, True),
    # They are down to the smallest size that is measured; channels take the rest.
    (0, 8000, 384, False),
    # Channels are cheaper, and can give 8,256 parameters.
    (ROWS, 9000, 512, False),
    (ROWS, 8000, 0, False),
]


@pytest.mark.parametrize(("least_worth", "removal", "stay", "alone"), LIMITS)
def test_a_limit_is_shared_out(
    least_worth: int,
    removal: int,
    stay: int,
    alone: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To tokens up to where more of them cost more than channels, the rest to units; a run that was cut goes on so."""
    large = tmp_path / "large.txt"
    large.write_text("\n".join(TEXT * 6), encoding="utf-8")
    before = inspect(source).all_parameters
    channels = priced(1.0)
    monkeypatch.setattr("structprune.assess.sizes._Scales.channels", lambda *_: channels)
    monkeypatch.setattr("structprune.assess.sizes._Scales.bits", bits_by_size(ROWS, least_worth))
    asked: dict[str, Any] = {"vocabulary": "auto", "target_parameters": before - removal, "reload_check": False}
    with monkeypatch.context() as patch:
        patch.setattr("structprune.engine.pipelines.units.finalize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruned(source, tmp_path / "out", large, **asked)
    monkeypatch.setattr("structprune.assess.sizes.possible_sizes", None)
    report = resume(tmp_path / "out")
    assert isinstance(report, PruneReport)
    assert len(report.recipe.tokens.ids) == stay
    assert (report.recipe.scope == "vocabulary") is alone
    gone = before - report.size.parameters_after
    assert removal <= gone < removal + (32 * 64 if alone else 96 * 2)


def test_limits_that_tokens_and_units_cannot_meet(source: Path, texts: Path) -> None:
    recipe = Recipe.build(vocabulary="auto", target_parameters=1000, calibration=str(texts), method="fasp")
    with pytest.raises(StructPruneError, match="--target-parameters cannot be reached"):
        plan(source, recipe)


def test_checks_of_a_size_that_each_run_decides(source: Path, texts: Path) -> None:
    """By what stays at most: nothing is counted before the first run."""
    asked: dict[str, Any] = {"vocabulary": "auto", "calibration": str(texts)}
    assert not decided_for_a_check(source, Recipe.build(method="fasp", **asked)).tokens
    alone = Recipe.build(scope="vocabulary", **asked)
    assert len(decided_for_a_check(source, alone).tokens.ids) == 512
    assert "512, the most with which some go" in plan(source, alone).notes[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_rows": 577}, "a list of another model's tokens"),
    ({"tokenizer": "0" * 64}, "a list of another model's tokens"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_lists_of_other_models(
    changes: dict[str, Any], message: str, source: Path, texts: Path, kept: KeptTokens
) -> None:
    other = kept.model_copy(update=changes)
    with pytest.raises(StructPruneError, match=message):
        plan(source, Recipe.build(method="fasp", calibration=str(texts), vocabulary=other))


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    for content, message in (
        ('{"ids": [2, 1], "num_rows": 5}', "ids do not ascend"),
        ('{"ids": [5], "num_rows": 5}', "no row of the embedding"),
        ("{}", "names no tokens"),
        ('{"ids": "all"}', "--vocabulary is not usable"),
        ('{"ids": [1], "num_rows": 5, "covered": NaN}', "--vocabulary is not usable"),
        ('{"ids": [1], "num_rows": 5, "num_tokens": -1}', "--vocabulary is not usable"),
    ):
        path.write_text(content)
        with pytest.raises(StructPruneError, match=message):
            Recipe.build(method="fasp", vocabulary=str(path))
    with pytest.raises(StructPruneError, match="there is no list of tokens here"):
        Recipe.build(method="fasp", vocabulary=str(tmp_path / "nothing.json"))


def files_of(output: Path) -> dict[str, bytes]:
    """What a run has written, without what says when and how."""
    said = {"pruning_report.json", "pruning_report.html", "README.md", "pruning_manifest.json"}
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.name not in said}


def test_one_command_is_the_same_as_two(source: Path, texts: Path, tmp_path: Path) -> None:
    """The texts that are counted are those of the windows, with their weights, and more."""
    more = tmp_path / "more.txt"
    more.write_text("\n".join(TEXT[100:] * 4), encoding="utf-8")
    request = VocabularyRequest(size=400, texts=[f"{texts}:2", str(more)], drop_reserve=True)
    kept = choose_vocabulary(source, request).kept
    settings = {"sparsity": 0.3, "calibration": f"{texts}:2", "reload_check": False}
    pruned(source, tmp_path / "two", texts, kept, **settings)
    asked: dict[str, Any] = {"vocabulary": "400", "vocabulary_text": str(more), "drop_reserve": True}
    report = pruned(source, tmp_path / "one", texts, **{**settings, **asked})
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert report.recipe.vocabulary == kept
    assert report.held_out is not None
    assert report.held_out.bits_per_byte is not None
    assert "| tokens | 576 | 384 |" in (tmp_path / "one" / "README.md").read_text()
    planned = plan(source, Recipe.build(method="fasp", **{**SETTINGS, **settings, **asked}))
    assert planned.forecast.num_parameters == report.size.parameters_after
    assert planned.parameters_before == report.size.parameters_before
    assert planned.tokens is not None
    assert (planned.tokens.before, planned.tokens.after) == (ROWS, 384)
    assert any("which 384 tokens stay is decided by the run" in note for note in planned.notes)


def test_tokens_alone(source: Path, texts: Path, kept: KeptTokens, tmp_path: Path) -> None:
    """No unit goes, and no method has to be named for that."""
    settings = {**SETTINGS, "calibration": str(texts), "scope": "vocabulary", "reload_check": False}
    del settings["multiple_of"]
    report = structprune.prune(source, Recipe.build(vocabulary=384, **settings), tmp_path / "out")
    other = {"sparsity": 0.0, "method": "magnitude", "reload_check": False}
    pruned(source, tmp_path / "other", texts, kept, **other)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert report.blocks == []
    assert "tokens alone removed" in (tmp_path / "out" / "pruning_report.html").read_text()
    assert report.title.startswith("tokens alone: ")


NOT_TOKENS_ALONE: list[tuple[dict[str, Any], str]] = [
    ({"vocabulary": 384, "sparsity": 0.3}, "tokens alone go"),
    ({"vocabulary": 384, "method": "fasp"}, "tokens alone go"),
    ({"vocabulary": 384, "target_parameters": 1000}, "tokens alone go"),
    ({}, "no tokens are to go"),
]


@pytest.mark.parametrize(("changes", "message"), NOT_TOKENS_ALONE)
def test_what_tokens_alone_exclude(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StructPruneError, match=message):
        Recipe.build(**{"scope": "vocabulary", **changes})


@pytest.mark.parametrize("size", [64, 576, 10_000])
def test_sizes_that_are_not_possible(size: int, source: Path, texts: Path) -> None:
    recipe = Recipe.build(method="fasp", calibration=str(texts), vocabulary=size)
    with pytest.raises(StructPruneError, match="the vocabulary cannot have this size"):
        plan(source, recipe)
    # Before anything is counted.
    steps = Steps()
    with pytest.raises(StructPruneError, match="the vocabulary cannot have this size"):
        choose_vocabulary(source, VocabularyRequest(size=size, texts=[str(texts)]), steps)
    assert steps.total == 0


# A mark longer than the tokens is a panic of the Rust library.
PANIC = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "continuing_subword_prefix": "##"}


@pytest.mark.parametrize("damage", [{"model": None}, {"model": []}, {"added_tokens": ["<s>"]}, {"model": PANIC}])
def test_damaged_tokenizers(damage: dict[str, Any], source: Path, texts: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(StructPruneError, match="the tokenizer cannot be loaded"):
        choose_vocabulary(tmp_path / "source", VocabularyRequest(size=384, texts=[str(texts)]))


def test_a_token_without_a_row_goes(source: Path, texts: Path, kept: KeptTokens, tmp_path: Path) -> None:
    """As of a padding token that was added to the tokenizer alone."""
    shutil.copytree(source, tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": ROWS, "content": "[PAD]"})
    path.write_text(json.dumps(tokenizer))
    found = choose_vocabulary(tmp_path / "source", VocabularyRequest(size=384, texts=[str(texts)])).kept
    assert found.ids == kept.ids
    planned = plan(tmp_path / "source", Recipe.build(method="fasp", vocabulary=found, calibration=str(texts)))
    assert planned.tokens is not None
    assert planned.tokens.after == 384


@pytest.mark.parametrize("changes", [{"vocabulary_text": "a.txt"}, {"drop_reserve": True}])
def test_nothing_is_counted_without_a_number(
    changes: dict[str, Any], source: Path, texts: Path, kept: KeptTokens, tmp_path: Path
) -> None:
    with pytest.raises(StructPruneError, match="decides which tokens stay, and no number of them"):
        pruned(source, tmp_path / "out", texts, kept, **changes)
    assert not list(tmp_path.iterdir())


class Steps(SilentObserver):
    """Counts the steps that are announced and those that are made."""

    def __init__(self) -> None:
        self.total, self.made = 0, 0

    def start(self, phase: str, total: int) -> None:
        self.total += total

    def advance(self, detail: str) -> None:
        self.made += 1


def test_all_of_a_text_is_counted(source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts and in pieces of them, several at once; progress goes by the bytes that were read."""
    rows = tmp_path / "rows.jsonl"
    lines = texts.read_text(encoding="utf-8").splitlines()
    rows.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    tokens = TokenSource.open(source, "none")
    for name, size in (("parts.PART_CHARACTERS", 700), ("file.PART_CHARACTERS", 700)):
        monkeypatch.setattr(f"structprune.calibration.sources.{name}", size)
    monkeypatch.setattr("structprune.architectures.sources.tokenizer._CHUNK", 80)
    monkeypatch.setattr("structprune.architectures.sources.tokenizer._AT_ONCE", 3)
    monkeypatch.setattr("structprune.assess.counting._STEP_BYTES", 500)
    steps = Steps()
    named = weighted_texts((str(texts), f"{rows}:2"))
    counted, samples = count_texts(named, tokens, steps)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for text, whole in zip(counted, ("\n".join(lines), "\n\n".join(lines)), strict=True):
        ids = torch.tensor(tokenizer(whole, add_special_tokens=False)["input_ids"])
        # Between two parts of rows there is no blank line.
        missing = torch.bincount(ids, minlength=ROWS) - text.counts_V
        assert not missing.count_nonzero() or tokenizer.decode(missing.nonzero().flatten()).strip() == ""
        assert missing.abs().sum() < len(ids) / 50
    assert samples[0] == texts.read_text(encoding="utf-8")
    assert steps.made == steps.total == sum(-(-path.stat().st_size // 500) for path in (texts, rows))


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["a.txt:0"], "weight of a.txt must be positive"), (["a.txt", "a.txt:2"], "a.txt is named twice")],
)
def test_texts_that_cannot_be_counted(texts: list[str], message: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(StructPruneError, match=r"empty.txt: the text has no token"):
        choose_vocabulary(source, VocabularyRequest(size=384, texts=[str(tmp_path / "empty.txt")]))
    with pytest.raises(StructPruneError, match=message):
        choose_vocabulary(source, VocabularyRequest(size=384, texts=texts))
    request = SizesRequest(sizes=[384], texts=["b.txt"], measured_on=texts)
    with pytest.raises(StructPruneError, match=message):
        price_sizes(source, request, SilentObserver(), structprune.prune)
    twice = Recipe.build(method="fasp", vocabulary=384, calibration="a.txt", vocabulary_text="a.txt:2")
    with pytest.raises(StructPruneError, match=r"a\.txt is named twice"):
        structprune.prune(source, twice, source.parent / "out")


def test_text_of_the_model_itself_is_not_counted(source: Path) -> None:
    with pytest.raises(StructPruneError, match="does not say which tokens are worth a row"):
        choose_vocabulary(source, VocabularyRequest(size=384, texts=["self"]))


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_was_cut_does_not_count_again(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = tmp_path / "more.txt"
    more.write_text("\n".join(TEXT[100:] * 4), encoding="utf-8")
    asked: dict[str, Any] = {"vocabulary": 384, "vocabulary_text": str(more), "reload_check": False}
    whole = pruned(source, tmp_path / "whole", texts, **asked)
    with monkeypatch.context() as patch:
        patch.setattr("structprune.engine.pipelines.units.finalize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruned(source, tmp_path / "out", texts, **asked)
    content = more.read_text()
    more.write_text(content + "x", encoding="utf-8")
    with pytest.raises(StructPruneError, match="on another calibration text"):
        resume(tmp_path / "out")
    with pytest.raises(StructPruneError, match="with other settings"):
        pruned(source, tmp_path / "out", texts, **{**asked, "vocabulary": 448})
    more.write_text(content, encoding="utf-8")
    monkeypatch.setattr("structprune.assess.vocabulary.choose_vocabulary", None)
    report = resume(tmp_path / "out")
    assert report.recipe.vocabulary == whole.recipe.vocabulary
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_list_without_what_every_text_needs(source: Path, texts: Path, kept: KeptTokens) -> None:
    byte = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("!")
    without = KeptTokens(**{**kept.model_dump(), "ids": tuple(i for i in kept.ids if i != byte)})
    with pytest.raises(StructPruneError, match=f"cannot be encoded; got 1 of them are missing, such as {byte}"):
        plan(source, Recipe.build(method="fasp", calibration=str(texts), vocabulary=without))


def test_tokens_that_settings_name_stay(source: Path, texts: Path, kept: KeptTokens) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    without = KeptTokens(**{**kept.model_dump(), "ids": tuple(i for i in kept.ids if i != tokenizer.eos_token_id)})
    with pytest.raises(StructPruneError, match="settings name is not among those that stay"):
        plan(source, Recipe.build(method="fasp", calibration=str(texts), vocabulary=without))
