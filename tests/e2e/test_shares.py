"""What goes beside what was asked for: where units allow another share only, plan, summary and page say which."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from structprune import Recipe, prune
from structprune.api import plan
from structprune.errors import InputError
from structprune.results.schema import PruneFacts
from structprune.results.summary import warnings
from support.command_line import CommandLine
from support.models import LlamaConfig, LlamaForCausalLM, byte_tokenizer, save_tiny
from support.pipeline_cases import RUNS, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings = {"method": "fasp", "sparsity": 0.3, "num_samples": 4, "seq_len": 32, "dtype": "float32"}
    return Recipe.build(**{**settings, "calibration": str(text_file), **changes})


# Family, blocks, settings -> (removed, below, above), by hand.
CASES: dict[str, tuple[str, int, dict[str, Any], tuple[float, float, float]]] = {
    # 14.4 of 48 channels; 32 or 40 can be kept.
    "channels": ("llama", 2, {"multiple_of": 8}, (16 / 48, 8 / 48, 16 / 48)),
    "few channels": ("llama", 2, {"multiple_of": 32}, (16 / 48, 0.0, 16 / 48)),
    "all fit": ("llama", 2, {"multiple_of": 1, "sparsity": 0.25}, (0.25, 11 / 48, 0.25)),
    # Two KV heads: one of them, or none.
    "heads": ("llama", 2, {"method": "wanda-sp", "scope": "attention"}, (0.5, 0.0, 0.5)),
    # One of two blocks is protected: the other loses all of it.
    "protected": (
        "llama",
        2,
        {"multiple_of": 8, "protect_first": 1, "structure": "per-layer"},
        (32 / 96, 24 / 96, 32 / 96),
    ),
    "blocks": ("llama", 3, {"method": "depth", "sparsity": 0.4}, (2 / 3, 1 / 3, 2 / 3)),
    "experts": ("qwen3_moe", 2, {"method": "reap"}, (0.5, 0.25, 0.5)),
    # Every removal is of 16 of 96 channels, whichever block it is in.
    "costs": ("llama", 2, {"method": "structprune", "multiple_of": 16}, (32 / 96, 16 / 96, 32 / 96)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_nearest_shares(name: str, text_file: Path, tmp_path: Path) -> None:
    family, blocks, settings, wanted = CASES[name]
    source = save_tiny(family, tmp_path / "source", num_blocks=blocks)
    asked = recipe(text_file, **settings)
    foreseen = plan(source, asked)
    report = prune(source, asked, tmp_path / "out")
    for found in (foreseen.forecast.shares, report.size.reachable):
        assert found is not None
        assert (found.removed, found.below, found.above) == pytest.approx(wanted)
    assert report.size.removed_share_of_scope == pytest.approx(wanted[0])
    said = [text for text in warnings(report) if "were asked for" in text]
    assert bool(said) == (abs(wanted[0] - asked.sparsity) > 0.01)
    assert bool(said) == any("were asked for" in note for note in foreseen.notes)
    for text in said:
        assert f"{wanted[0]:.2%} of the parameters in scope go and {asked.sparsity:.2%} were asked for" in text
        assert f"{wanted[1]:.2%} below and {wanted[2]:.2%} above" in text
        page = (tmp_path / "out" / "pruning_report.html").read_text()
        assert text in page


@pytest.mark.parametrize("run", ["fasp", "angular", "whole-experts", "slice", "slice-uniform"])
def test_the_share_below_can_be_had(run: str, text_file: Path, tmp_path: Path) -> None:
    family, settings = RUNS[run]
    source = save_tiny(family, tmp_path / "source", num_blocks=3)
    asked = tiny_recipe({**settings, "multiple_of": 4} if run[0] in "fs" else settings, text_file, sparsity=0.4)
    shares = plan(source, asked).forecast.shares
    assert shares is not None
    assert shares.below < 0.4 <= shares.above
    lower = plan(source, asked.model_copy(update={"sparsity": shares.below})).forecast.shares
    assert lower is not None
    assert lower.removed == pytest.approx(shares.below)
    # And nothing lies between them.
    between = plan(source, asked.model_copy(update={"sparsity": (shares.below + shares.above) / 2})).forecast.shares
    assert between is not None
    assert between.removed == pytest.approx(shares.above)


# Multiple of channels -> (below, above, most) in parameters, by hand. 32% of two blocks with 48 channels of 96 each and
# two KV groups of 1,536 each, of which one stays, are 4,916 of 15,360.
UNEQUAL = {
    # Steps of 768 and 1,536.
    8: (4608, 5376, 6144),
    # Eight channels may go first, 768, then twenty, 1,920: 768 + 768 + 2 * 1,536, 2,688 + 768 + 1,536, 2,688 + 768 +
    # 2 * 1,536; 2 * 2,688 + 1,536 lies a whole step beyond.
    20: (4608, 4992, 6528),
}


@pytest.mark.parametrize("multiple_of", UNEQUAL)
def test_costs_of_unequal_steps(multiple_of: int, text_file: Path, tmp_path: Path) -> None:
    below, above, most = (parameters / 15360 for parameters in UNEQUAL[multiple_of])
    source = save_tiny("llama", tmp_path / "source")
    asked = recipe(text_file, method="structprune", scope="all", multiple_of=multiple_of, sparsity=0.32)
    planned = plan(source, asked)
    shares = planned.forecast.shares
    assert shares is not None
    assert not shares.decided
    assert (shares.below, shares.above, shares.removed) == pytest.approx((below, above, most))
    (note,) = [note for note in planned.notes if "were asked for" in note]
    assert note.startswith(f"{above:.2%} to {most:.2%} of the parameters in scope go and 32.00% were asked")
    found = prune(source, asked, tmp_path / "out").size
    assert found.reachable is not None
    assert found.reachable.decided
    assert shares.above <= found.removed_share_of_scope <= shares.removed
    assert found.reachable.below < 0.32 <= found.reachable.above == pytest.approx(found.removed_share_of_scope)


def test_a_share_that_costs_cannot_meet_is_refused_by_the_plan(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    with pytest.raises(InputError, match=r"cannot be reached within the groups' bounds; got sparsity 0.95"):
        plan(source, recipe(text_file, method="structprune", sparsity=0.95))


def test_the_attention_of_every_block_cannot_be_asked_for(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    asked = {"method": "structprune", "scope": "all", "multiple_of": 1, "allow_block_removal": True}
    # One of four KV groups is a tenth of the scope.
    with pytest.raises(InputError, match=r"would take the attention of every block; .*wanted at most 0\.9000"):
        plan(source, recipe(text_file, **asked, sparsity=0.95))
    assert plan(source, recipe(text_file, **asked, sparsity=0.9)).forecast.shares is not None


def test_what_goes_is_counted_once_with_whole_sublayers(text_file: Path, tmp_path: Path) -> None:
    """Their norms go too; the note and the summary say the same."""
    source = save_tiny("llama", tmp_path / "source")
    asked = {"method": "structprune", "scope": "all", "multiple_of": 48, "allow_block_removal": True, "sparsity": 0.7}
    size = prune(source, recipe(text_file, **asked), tmp_path / "out").size
    assert size.reachable is not None
    assert size.reachable.removed == pytest.approx(size.removed_share_of_scope)


def test_a_largest_retention_that_asks_for_more_is_named(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", num_blocks=4)
    asked = {"method": "structprune", "scope": "all", "multiple_of": 24, "max_retention": 0.5, "sparsity": 0.2}
    (note,) = [note for note in plan(source, recipe(text_file, **asked)).notes if "were asked for" in note]
    assert note == (
        "50.00% of the parameters in scope go and 20.00% were asked for: --max-retention 0.5 takes as much of every "
        "sublayer, and the widths are to be multiples of 24"
    )


def test_reports_of_earlier_versions_have_none(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    report = prune(source, recipe(text_file, multiple_of=32), tmp_path / "out").to_dict()
    del report["size"]["reachable"]
    assert not any("were asked for" in text for text in warnings(PruneFacts(**report)))


def test_the_command_line_warns(text_file: Path, tmp_path: Path, command_line: CommandLine) -> None:
    source = save_tiny("llama", tmp_path / "source")
    flags = ["--method", "fasp", "--multiple-of", 32, "--num-samples", 4, "--seq-len", 32, "--dtype", "float32"]
    flags += ["--calibration", text_file]
    wanted = "33.33% of the parameters in scope go and 30.00% were asked for"
    code, out, _ = command_line("plan", source, *flags)
    assert code == 0
    assert wanted in out
    code, _, error = command_line("prune", source, "-o", tmp_path / "out", *flags, "-q")
    assert code == 0
    assert wanted in " ".join(error.split())
    assert "a smaller --multiple-of than 32 allows others" in " ".join(error.split())


@pytest.fixture
def eight_heads(tmp_path: Path) -> Path:
    """A LLaMA of an older version, whose config leaves out what its class takes by default."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    for name in ("max_position_embeddings", "num_key_value_heads"):
        del config[name]
    path.write_text(json.dumps({**config, "transformers_version": "4.42.3"}))
    return tmp_path / "source"


def test_a_llama_that_becomes_a_mistral_says_so(
    eight_heads: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe(text_file, method="wanda-sp", scope="attention")
    note = "model_type in config.json is mistral, and llama in the source"
    assert any(note in found for found in plan(eight_heads, asked).notes)
    report = prune(eight_heads, asked, tmp_path / "out")
    assert any(note in found for found in report.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"]) == ("mistral", 5)
    # Mistral's class would take 131,072 and 8.
    assert (config["max_position_embeddings"], config["num_key_value_heads"]) == (2048, 5)
    assert config["transformers_version"] == transformers.__version__
    with caplog.at_level(logging.WARNING, logger="transformers"):
        tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not [record for record in caplog.records if "fix_mistral_regex" in record.getMessage()]
    flagged: Any = AutoTokenizer.from_pretrained(tmp_path / "out", fix_mistral_regex=True)
    assert tokenizer("x 1234")["input_ids"] == flagged("x 1234")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.max_position_embeddings == 2048


def test_a_model_that_keeps_its_type_says_nothing(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    report = prune(source, recipe(text_file, multiple_of=8), tmp_path / "out")
    assert not any("model_type" in note for note in report.notes)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    assert before["transformers_version"] == after["transformers_version"]
