"""Limits of parameters, bytes and the KV cache: what is written keeps to them, and could not keep a unit more."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import structprune
from structprune.api import plan, resume
from structprune.errors import StructPruneError, UnsupportedError
from structprune.recipe import Recipe
from structprune.results.report import PruneReport
from structprune.runs.journal import Journal
from support.command_line import CommandLine
from support.models import save_tiny
from support.wrappers import save_wrapper

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="needs the extra milp")
SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 1}


def asked(text_file: Path, **changes: Any) -> Recipe:
    return Recipe.build(**{"method": "structprune", "calibration": str(text_file), **SETTINGS, **changes})


def pruned(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    return structprune.prune(source, asked(text_file, **changes), output)


def written_parameters(output: Path) -> int:
    total = 0
    for path in output.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total


def written_bytes(output: Path) -> int:
    return sum(path.stat().st_size for path in output.glob("*.safetensors"))


def cache_bytes(output: Path, tokens: int) -> int:
    """What stock code keeps of one sequence of so many tokens.

    Between two calls a window lacks the token that the next call brings; it is counted.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    with torch.no_grad():
        cache = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    return sum(
        state.numel() // state.shape[-2] * min(tokens, getattr(layer, "sliding_window", tokens)) * state.element_size()
        for layer in cache.layers
        for state in (layer.keys, layer.values)
    )


# Settings -> the most parameters that one unit takes, or one of each block where all blocks lose as many. A channel of
# tiny models has 32 inputs and outputs; a KV group of theirs 1,536 parameters.
ONE_UNIT: dict[str, tuple[str, dict[str, Any], int]] = {
    "closed-form": ("llama", {}, 96),
    "dp": ("llama", {"allocator": "dp"}, 96),
    "fermi-dirac": ("llama", {"allocator": "fermi-dirac", "temperature": 0.5}, 96),
    "heads too": ("llama", {"scope": "all", "allocator": "dp"}, 96),
    "uniform": ("llama", {"method": "fasp"}, 2 * 96),
    "flap": ("llama", {"method": "flap"}, 98),
    "whole sublayers": ("llama", {"scope": "all", "allow_block_removal": True, "allocator": "dp"}, 96),
    "biased": ("opt", {}, 65),
    "stacked": ("qwen3_moe", {"target": "local", "allocator": "dp", "multiple_of": 8}, 8 * 4 * 96),
    "an earlier output": ("narrow", {}, 96),
}


@pytest.mark.parametrize("name", ONE_UNIT)
def test_parameters_of_the_written_model(name: str, text_file: Path, tmp_path: Path) -> None:
    family, settings, unit = ONE_UNIT[name]
    source = save_tiny("llama" if family == "narrow" else family, tmp_path / "source")
    if family == "narrow":
        pruned(source, tmp_path / "narrow", text_file, sparsity=0.2)
        source = tmp_path / "narrow"
    before = written_parameters(source)
    most = before - 3333
    report = pruned(source, tmp_path / "out", text_file, target_parameters=most, **settings)
    found = written_parameters(tmp_path / "out")
    assert most - unit < found <= most
    (limit,) = report.limits
    assert (limit.at_most, limit.predicted, limit.reached) == (most, found, found)
    assert limit.before == before + (256 if name == "flap" else 0)
    assert report.size.parameters_after == found


BYTES: dict[str, dict[str, Any]] = {
    "one file": {},
    "many files": {"max_shard_size": "20KB"},
    "halves": {"output_dtype": "bfloat16"},
    "dp, heads too": {"scope": "all", "allocator": "dp"},
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_the_written_files(name: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = BYTES[name]
    most = 38_000 if name == "halves" else 80_000
    report = pruned(tiny_llama, tmp_path / "out", text_file, target_bytes=most, **settings)
    item = 2 if name == "halves" else 4
    # Headers are counted as those of all units: a few digits longer.
    assert most - 96 * item - 64 < written_bytes(tmp_path / "out") <= most
    (limit,) = report.limits
    assert limit.reached == written_bytes(tmp_path / "out") <= limit.predicted <= most
    assert limit.predicted - limit.reached < 64


def test_bytes_of_weights_in_two_formats(text_file: Path, tmp_path: Path) -> None:
    """Attention in float32 beside an MLP in bfloat16: what is counted are bytes, so a head counts twice."""
    from safetensors.torch import load_file, save_file

    source = save_tiny("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    mixed = {name: t.bfloat16() if ".mlp." in name else t for name, t in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    before = written_bytes(source)
    settings = {"target_bytes": before - 9000, "scope": "all", "allocator": "dp"}
    report = pruned(source, tmp_path / "out", text_file, **settings)
    assert before - 9000 - 192 - 64 < written_bytes(tmp_path / "out") <= before - 9000
    assert report.limits[0].before - before < 64


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "phi3", "qwen3"])
def test_kv_cache_of_the_written_model(family: str, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source")
    before = cache_bytes(source, 20)
    report = pruned(source, tmp_path / "out", text_file, target_kv_cache=f"20:{before - 1}")
    (limit,) = report.limits
    assert limit.before == before
    assert limit.reached == limit.predicted == cache_bytes(tmp_path / "out", 20) < before
    # Nothing else is asked for: one KV head goes.
    assert {block.kind for block in report.blocks} == {"attention"}
    assert sum(block.num_units - block.kept_units for block in report.blocks) == 1
    assert report.recipe.scope == "attention"


# Settings of `depth` for four blocks of a LLaMA -> blocks that go, by hand: 7,744 of 39,328 parameters are in each, and
# a quarter of the cache.
DEPTH: list[tuple[dict[str, Any], int]] = [
    ({"target_parameters": 39_327}, 1),
    ({"target_parameters": 39_328 - 7_744}, 1),
    ({"target_parameters": 39_328 - 7_745}, 2),
    ({"target_bytes": 4 * (39_328 - 7_744)}, 2),
    ({"target_kv_cache": "100:13KB"}, 3),
    ({"target_kv_cache": "100:40KB", "target_parameters": 24_000}, 2),
    ({"target_bytes": "100KB", "repair": "scales+biases"}, 3),
]


@pytest.mark.parametrize(("settings", "gone"), DEPTH)
def test_whole_blocks(settings: dict[str, Any], gone: int, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", num_blocks=4)
    recipe = Recipe.build(method="depth", calibration=str(text_file), num_samples=4, seq_len=32, **settings)
    forecast = plan(source, recipe).forecast
    report = structprune.prune(source, recipe, tmp_path / "out")
    assert sum(block.kept_units == 0 for block in report.blocks) == gone
    assert report.recipe.sparsity == gone / 4
    measured = {
        "parameters": written_parameters(tmp_path / "out"),
        "bytes of the weight files": written_bytes(tmp_path / "out"),
    }
    for limit in report.limits:
        assert limit.reached <= limit.predicted <= limit.at_most
        assert limit.reached == measured.get(limit.name, cache_bytes(tmp_path / "out", 100))
    assert [limit.name for limit in forecast.limits] == [limit.name for limit in report.limits]


@needs_scipy
def test_parameters_and_the_cache_together(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", num_blocks=3)
    before = cache_bytes(source, 50)
    report = pruned(source, tmp_path / "out", text_file, target_parameters=26_000, target_kv_cache=f"50:{before // 2}")
    assert report.recipe.model_dump()["allocator"] == "milp"
    assert cache_bytes(tmp_path / "out", 50) == before // 2
    assert 26_000 - 96 < written_parameters(tmp_path / "out") <= 26_000
    assert [limit.reached for limit in report.limits] == [written_parameters(tmp_path / "out"), before // 2]


def test_a_limit_that_takes_nothing_needs_no_other_allocator(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = pruned(tiny_llama, tmp_path / "out", text_file, target_parameters=20_000, target_kv_cache="8:1MiB")
    assert report.recipe.model_dump()["allocator"] == "closed-form"
    assert [limit.reached <= limit.at_most for limit in report.limits] == [True, True]
    assert {block.kind for block in report.blocks} == {"attention", "mlp"}


def test_a_repair_has_room_for_its_biases(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Whether they stay is known in the end, so they are counted."""
    report = pruned(tiny_llama, tmp_path / "out", text_file, target_parameters=20_000, repair="scales+biases")
    (limit,) = report.limits
    assert limit.reached == written_parameters(tmp_path / "out") <= limit.predicted <= 20_000
    assert report.repair is not None
    assert (limit.reached == limit.predicted) == bool(report.repair.new_biases)


def test_what_is_planned(tiny_llama: Path, text_file: Path, tmp_path: Path, command_line: CommandLine) -> None:
    recipe = asked(text_file, method="fasp", target_parameters=20_000)
    forecast = plan(tiny_llama, recipe).forecast
    assert forecast.kept is not None
    assert forecast.limits[0].predicted(forecast.kept) == forecast.num_parameters
    flags = ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--multiple-of", 1]
    code, out, _ = command_line("plan", tiny_llama, *flags, "--target-bytes", "80KB")
    assert code == 0
    assert "at most 80,000" in " ".join(out.split())
    code, out, _ = command_line("plan", tiny_llama, *flags, "--target-parameters", "20k", "--json")
    (limit,) = json.loads(out)["limits"]
    assert limit == {
        "name": "parameters",
        "at_most": 20_000,
        "before": written_parameters(tiny_llama),
        "predicted": None,
    }


def test_summary_and_page(tiny_llama: Path, text_file: Path, tmp_path: Path, command_line: CommandLine) -> None:
    flags = ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--multiple-of", 1, "-q"]
    code, out, _ = command_line("prune", tiny_llama, "-o", tmp_path / "out", *flags, "--target-parameters", "20k")
    assert code == 0
    found = f"{written_parameters(tmp_path / 'out'):,}"
    # The table breaks lines between words.
    words = " ".join(out.replace("│", " ").split())
    assert f"asked for at most 20,000, reached {found}, as predicted" in words
    page = (tmp_path / "out" / "pruning_report.html").read_text()
    assert f"Limit of parameters: asked for at most 20,000, reached {found}, as predicted." in page
    assert "as its limits need" in page


def test_the_recipe_of_the_report_asks_for_the_same(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = pruned(tiny_llama, tmp_path / "first", text_file, target_bytes="80KB")
    again = Recipe.build(**{**report.recipe.model_dump(mode="json"), "memory": None})
    structprune.prune(tiny_llama, again, tmp_path / "second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_run_that_was_cut_goes_on(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"target_kv_cache": "50:10KB", "target_parameters": "21.5k", "memory": "1GiB"}
    settings |= {} if importlib.util.find_spec("scipy") else {"target_parameters": "1M"}
    pruned(tiny_llama, tmp_path / "whole", text_file, **settings)

    class Cut(BaseException):
        """The process is gone."""

    record = Journal.record

    def cut(self: Journal, step: str, *values: Any, **named: Any) -> Any:
        if step == "block 1" and self.folder.name == "cut.partial":
            raise Cut
        return record(self, step, *values, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", cut)
        with pytest.raises(Cut):
            pruned(tiny_llama, tmp_path / "cut", text_file, **settings)
    resume(tmp_path / "cut")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target_parameters": 100}, r"--target-parameters cannot be reached; got 100, wanted at least 15,584, what stays"),
    ({"target_bytes": "100"}, r"--target-bytes cannot be reached; got 100 bytes, wanted at least \d+,\d+ bytes"),
    (
        {"target_parameters": "1M"},
        r"within the limit already; got --target-parameters 1,000,000, wanted less than 23,8",
    ),
    ({"target_kv_cache": "8:100", "scope": "mlp"}, r"nothing in scope has a part in the bytes of the KV cache"),
    ({"target_kv_cache": "8:100", "head_units": "query-head"}, r"only whole KV heads .*wanted --head-units kv-group"),
    ({"target_bytes": "q3_x:80KB"}, r"no type of a GGUF file; got q3_x, wanted f32, f16, .*q4_k_m"),
    ({"target_bytes": ":80KB"}, r"a limit of bytes cannot be read; got ':80KB', wanted bytes such as 4GiB"),
    ({"target_bytes": "q8_0:60KB"}, r"quantises rows of a multiple of 32 numbers only"),
    ({"target_bytes": "80KB", "sparsity": 0.2}, r"--target-bytes and --sparsity would decide the same thing"),
    ({"target_bytes": "80KB", "widths": {"0": {"mlp": 3}}}, r"--target-bytes and --widths would decide"),
    ({"target_bytes": "80KB", "method": "reap"}, r"--target-bytes has no meaning for method 'reap'"),
    ({"target_parameters": 9000, "method": "depth"}, r"cannot be reached; got 9,000, wanted at least 16,096"),
    ({"target_bytes": "80KB", "method": "depth", "sparsity": 0.25}, r"--target-bytes and --sparsity would decide"),
    ({"target_bytes": "80KB", "method": "slicegpt"}, r"--target-bytes has no meaning for method 'slicegpt'"),
    (
        {"target_bytes": "90KB", "target_kv_cache": "50:10KB", "allocator": "dp"},
        r"the dp allocator holds one limit; got --target-bytes, --target-kv-cache, wanted --allocator milp",
    ),
    ({"target_kv_cache": "2GiB"}, r"a limit of the KV cache cannot be read; got '2GiB'"),
    ({"target_parameters": "lots"}, r"a number cannot be read; got 'lots'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_held(
    settings: dict[str, Any], message: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    common = {} if settings.get("method") in ("depth", "reap", "slicegpt") else SETTINGS
    values = {"calibration": str(text_file), "num_samples": 4, "seq_len": 32, **common, **settings}
    with pytest.raises(StructPruneError, match=message):
        structprune.prune(tiny_llama, Recipe.build(**values), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_whose_tokenizer_is_not_known(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Nothing is advised that the command does not take."""
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="how large a GGUF file gets is not known") as caught:
        plan(source, asked(text_file, target_bytes="f16:80KB"))
    assert caught.value.do == (
        "use a limit of the weight files without a type; `structprune export` then takes --tokenizer-gguf"
    )


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    """A share or limits decide how much goes: what is on the command line replaces either."""
    path = tmp_path / "recipe.yaml"
    path.write_text("sparsity: 0.2\nseed: 3\n")
    recipe = Recipe.from_yaml(path, target_parameters="1B")
    assert "sparsity" not in recipe.model_fields_set
    path.write_text("target_parameters: 1B\ntarget_kv_cache: 8192:2GiB\n")
    assert Recipe.from_yaml(path, sparsity=0.4) == Recipe(sparsity=0.4)
    assert Recipe.from_yaml(path, target_parameters="2B").model_dump()["target_kv_cache"] == "8192:2147483648"


def test_what_is_around_a_text_model_counts(text_file: Path, tmp_path: Path) -> None:
    """Of an image-text model the whole checkpoint is held to the limit; its blocks keep one width."""
    source = save_wrapper("llava", tmp_path / "source")
    before, size = written_parameters(source), written_bytes(source)
    report = pruned(source, tmp_path / "out", text_file, target_parameters=before - 2000)
    found = written_parameters(tmp_path / "out")
    assert found <= before - 2000
    assert report.limits[0].reached == report.limits[0].predicted == found
    report = pruned(source, tmp_path / "bytes", text_file, target_bytes=size - 8000)
    assert report.limits[0].reached == written_bytes(tmp_path / "bytes") <= size - 8000
