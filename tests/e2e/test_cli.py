"""The command line: what each verb prints, where, and with which exit code; a few runs in a process of their own."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from structprune.cli import main
from structprune.methods import METHODS
from structprune.recipe import Recipe, all_fields
from structprune.recipe.limits import TARGETS
from structprune.recipe.units import UnitsRecipe

pytestmark = pytest.mark.usefixtures("one_thread")


class Result(NamedTuple):
    code: object
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process, on a wide terminal so that no cell is wrapped."""
    monkeypatch.setenv("COLUMNS", "240")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return Result(caught.value.code, *capsys.readouterr())

    return run


def in_a_process(*arguments: object) -> Result:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "240"}
    done = subprocess.run(
        [sys.executable, "-m", "structprune", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def calibrated_on(text_file: Path) -> list[object]:
    return [
        "--method",
        "fasp",
        "--calibration",
        text_file,
        "--num-samples",
        4,
        "--seq-len",
        32,
        "--dtype",
        "float32",
        "--multiple-of",
        1,
    ]


def strict_json(text: str) -> Any:
    """One JSON document by the standard, which knows no NaN and no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def plain(text: str) -> str:
    """Without colours and with single spaces, whatever the terminal made of it."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def test_prune_json_in_a_process(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = in_a_process("prune", tiny_llama, "-o", output, "--json", *calibrated_on(text_file))
    assert result.code == 0, result.err
    report = strict_json(result.out)
    assert report == json.loads((output / "pruning_report.json").read_text())
    assert [(block["block"], block["kept_units"]) for block in report["blocks"]] == [(0, 33), (1, 33)]
    # Not a terminal: what is expected, then one plain line per block, no escape sequences, no carriage returns.
    lines = result.err.splitlines()
    assert len(lines) == 9
    # Both models of two blocks.
    for number, block in ((4, 1), (3, 0), (2, 1), (1, 0)):
        assert re.fullmatch(rf"held-out windows {number}/4  block {block}  \d+ s left", lines.pop())
    assert re.fullmatch(r"reload check 1/1  whole, relative difference \d\.\de[-+]\d\d  0 s left", lines.pop())
    assert re.fullmatch(r"write files 1/1  model\.safetensors  0 s left", lines.pop())
    assert re.fullmatch(r"expected to take about .+ on this machine", lines.pop(0))
    for number, line in enumerate(lines, start=1):
        assert re.fullmatch(
            rf"prune {number}/2  block {number - 1} mlp 33/48  error 0\.\d{{4}}  memory \d+\.\d [KM]iB  \d+ s left",
            line,
        )
    assert AutoModelForCausalLM.from_pretrained(output).config.intermediate_size == 33


def test_bad_input_in_a_process(tmp_path: Path) -> None:
    """Not a number: refused before anything slow is imported. test_bad_input.py has the rest, in this process."""
    result = in_a_process("prune", "model", "-o", tmp_path / "out", "--sparsity", "abc")
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    assert "--sparsity" in result.err
    assert list(tmp_path.iterdir()) == []


def test_bad_input_as_json(cli: Run, tiny_llama: Path, tmp_path: Path) -> None:
    result = cli("prune", tiny_llama, "-o", tmp_path / "out", "--method", "fsap", "--json")
    assert result.code == 2
    assert result.err.startswith("structprune: unknown method 'fsap'")
    assert len(result.err.splitlines()) == 1
    error = strict_json(result.out)
    assert set(error) == {"error", "what", "where", "got", "wanted", "do"}
    assert (error["error"], error["what"]) == ("InputError", "unknown method 'fsap'")
    assert "fasp" in error["do"]


def test_methods_in_a_process() -> None:
    result = in_a_process("methods", "--json")
    assert (result.code, result.err) == (0, "")
    assert [entry["name"] for entry in strict_json(result.out)] == list(METHODS)


def test_prune_table(cli: Run, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    result = cli("prune", tiny_llama, "-o", tmp_path / "out", *calibrated_on(text_file))
    assert result.code == 0
    size = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["size"]
    out = plain(result.out)
    # 15 of 48 channels, 96 parameters each, in two blocks.
    assert "removed of mlp \u2502 31.25% of its parameters (asked 30.00%)" in out
    assert f"removed of the blocks \u2502 {size['removed_share_of_blocks']:.2%}" in out
    assert f"removed of the model \u2502 {size['removed_share_of_model']:.2%}" in out
    assert "parameters \u2502 23,840 -> 20,960" in out
    assert "words.txt: 4 windows of 32 tokens" in out
    assert "peak memory \u2502 planned" in out


def test_quiet(cli: Run, tiny_opt: Path, text_file: Path, tmp_path: Path) -> None:
    result = cli("prune", tiny_opt, "-o", tmp_path / "out", "--quiet", "--json", *calibrated_on(text_file))
    assert (result.code, result.err) == (0, "")
    assert strict_json(result.out)["family"] == "opt"
    result = cli("prune", tiny_opt, "-o", tmp_path / "short", "-q", *calibrated_on(text_file))
    # No progress; what is wrong with the result is said all the same.
    assert (result.code, result.err.count("\n")) == (0, 1)
    assert result.err.startswith("Only 128 calibration tokens")
    assert "removed of mlp" in result.out


def test_progress_goes_to_stderr(cli: Run, tiny_opt: Path, text_file: Path, tmp_path: Path) -> None:
    result = cli("prune", tiny_opt, "-o", tmp_path / "out", *calibrated_on(text_file), "--method", "magnitude")
    assert result.code == 0
    lines = result.err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        [lines[0]],
        ["prune 1/2", "block 0 mlp 33/48"],
        ["prune 2/2", "block 1 mlp 33/48"],
        ["write files 1/1", "model.safetensors"],
        ["reload check 1/1", lines[4].split("  ")[1]],
        *([f"held-out windows {number}/4", f"block {(number - 1) % 2}"] for number in range(1, 5)),
    ]
    assert lines[0].startswith("expected to take about ")
    # No data, no error figure.
    assert "error" not in result.err
    assert "prune 1/2" not in result.out


def test_every_flag_reaches_the_recipe(cli: Run, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    given = {
        "method": "wanda-sp",
        "sparsity": 0.25,
        "scope": "all",
        "head_units": "query-head",
        "calibration": str(text_file),
        "num_samples": 3,
        "seq_len": 40,
        "held_out": 2,
        "memory": 2 * 2**30,
        "device": "cpu",
        "dtype": "bfloat16",
        "seed": 9,
        "multiple_of": 4,
        "damping": 0.01,
        "shrinkage": 0.0,
        "score": "l2",
        "allocator": "uniform",
        "search": "none",
        "search_generations": 0,
        "search_children": 0,
        "search_anchors": False,
        "solver": "least-squares",
        "target": "local",
        "structure": "uniform",
        "temperature": 0.0,
        "min_retention": 0.2,
        "max_retention": 0.9,
        "outer_iterations": 0,
        "allow_block_removal": False,
        "protect_first": 0,
        "protect_last": 0,
        "sensitivity_samples": 3,
        "sensitivity_scale": "given",
        "gates": "none",
        "gates_steps": 128,
        "gates_loss": "divergence",
        "repair": "scales",
        "repair_samples": 2,
        "repair_epochs": 2,
        "objective": "worst",
        "tensor_parallel": 1,
        "max_shard_size": 2 * 10**9,
        "output_dtype": "bfloat16",
        "bos": "yes",
        "merge_adapter": "none",
        "reload_check": False,
    }
    flags = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value)]
    place = flags.index("--allow-block-removal")
    flags[place : place + 2] = ["--no-block-removal"]
    place = flags.index("--reload-check")
    flags[place : place + 2] = ["--no-reload-check"]
    place = flags.index("--search-anchors")
    flags[place : place + 2] = ["--no-search-anchors"]
    result = cli("prune", tiny_llama, "--output", tmp_path / "out", "--json", *flags)
    assert result.code == 0
    unset = {
        "device_memory": None,
        "widths": None,
        "latency_table": None,
        "vocabulary": None,
        "vocabulary_text": [],
        "drop_reserve": False,
        "merge_rows": False,
        "time_budget": 0,
        **dict.fromkeys(TARGETS),
    }
    assert strict_json(result.out)["recipe"] == {**given, **unset}
    # Memory of a device is refused here, a time, widths and limits decide what other flags do, and rows are merged
    # where tokens go: test_device_memory.py, test_expected_time.py, test_widths.py, test_limits.py and
    # test_merged_rows.py.
    assert {*given, *unset} == set(UnitsRecipe.model_fields)


@pytest.mark.parametrize(
    "given",
    [
        {"gates": "graspprune", "gates_steps": 3, "gates_loss": "text"},
        {"search": "evopress", "search_generations": 2, "search_children": 3, "search_anchors": True},
        {"allocator": "fermi-dirac", "temperature": 0.5},
    ],
)
def test_flags_beside_others_reach_the_recipe(
    given: dict[str, Any], cli: Run, tiny_llama: Path, text_file: Path
) -> None:
    flags = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value)]
    flags = [part for part in flags if part is not True]
    asked = (*calibrated_on(text_file), "--method", "structprune", "--num-samples", 16)
    result = cli("plan", tiny_llama, *asked, "--json", *flags)
    assert result.code == 0
    assert given.items() <= strict_json(result.out)["recipe"].items()


def test_flags_win_over_the_recipe_file(cli: Run, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"method: fasp\nsparsity: 0.5\nseed: 4\nmemory: 3GiB\ncalibration: {text_file}\n"
        "num_samples: 4\nseq_len: 32\ndtype: float32\nmultiple_of: 1\n"
    )
    alone = cli("prune", tiny_llama, "-o", tmp_path / "alone", "--json", "--recipe", path)
    both = cli("prune", tiny_llama, "-o", tmp_path / "both", "--json", "--recipe", path, "--sparsity", 0.1, "--seed", 0)
    assert (alone.code, both.code) == (0, 0)
    first, second = strict_json(alone.out), strict_json(both.out)
    assert (first["recipe"]["sparsity"], second["recipe"]["sparsity"]) == (0.5, 0.1)
    # Zero is a value, not the absence of one.
    assert (first["recipe"]["seed"], second["recipe"]["seed"]) == (4, 0)
    assert first["recipe"]["memory"] == second["recipe"]["memory"] == 3 * 2**30
    assert [report["blocks"][0]["kept_units"] for report in (first, second)] == [24, 43]


def test_recipe_file_is_the_same_as_flags(cli: Run, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"calibration: {text_file}\nnum_samples: 4\nseq_len: 32\ndtype: float32\nmultiple_of: 1\nmethod: wanda-sp\n"
    )
    cli("prune", tiny_llama, "-o", tmp_path / "file", "--recipe", path)
    cli("prune", tiny_llama, "-o", tmp_path / "flags", *calibrated_on(text_file), "--method", "wanda-sp")
    (weights,) = (tmp_path / "flags").glob("*.safetensors")
    assert weights.read_bytes() == (tmp_path / "file" / weights.name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_inspect(family: str, cli: Run, tiny_llama: Path, tiny_opt: Path) -> None:
    directory = {"llama": tiny_llama, "opt": tiny_opt}[family]
    tensors = load_file(directory / "model.safetensors")
    total = sum(tensor.numel() for tensor in tensors.values())
    in_blocks = sum(tensor.numel() for name, tensor in tensors.items() if ".layers." in name)
    mlp = sum(t.numel() for name, t in tensors.items() if ".mlp." in name or ".fc1." in name or ".fc2." in name)
    attention = sum(tensor.numel() for name, tensor in tensors.items() if ".self_attn." in name)

    result = cli("inspect", directory, "--json")
    assert (result.code, result.err) == (0, "")
    facts = strict_json(result.out)
    groups = {group.pop("kind"): group for group in facts.pop("groups")}
    runtimes = facts.pop("runtimes")
    assert facts.pop("notes") == []
    assert facts == {
        "model": str(directory),
        "family": family,
        "parameters": total,
        "blocks": 2,
        "hidden_size": 32,
        "vocab_size": 260,
        "max_positions": 256,
        "tied_embeddings": True,
        "share_of_blocks": in_blocks / total,
    }
    assert [(r["runtime"], r["loads"]) for r in runtimes] == [
        ("transformers", "yes"),
        ("vLLM, native", "yes"),
        ("vLLM, Transformers backend", "yes"),
        ("SGLang", {"llama": "yes", "opt": "unverified"}[family]),
        ("llama.cpp", {"llama": "yes", "opt": "no"}[family]),
    ]
    assert groups["mlp"]["units_per_block"] == 48
    assert groups["mlp"]["parameters_per_unit"] == {"llama": 3 * 32, "opt": 2 * 32 + 1}[family]
    assert groups["attention"]["units_per_block"] == {"llama": 2, "opt": 4}[family]
    assert groups["mlp"]["share_of_block"] == pytest.approx(mlp / in_blocks)
    assert groups["mlp"]["share_of_model"] == pytest.approx(mlp / total)
    assert groups["attention"]["share_of_model"] == pytest.approx(attention / total)

    table = cli("inspect", directory)
    assert (table.code, table.err) == (0, "")
    out = plain(table.out)
    assert f"family \u2502 {family}" in out
    assert f"parameters \u2502 {total:,}" in out
    assert "tied embeddings \u2502 yes" in out
    assert "mlp units \u2502 48 per block" in out


def test_methods_table_names_every_paper(cli: Run) -> None:
    table, listing = cli("methods"), cli("methods", "--json")
    assert (table.code, table.err, listing.code, listing.err) == (0, "", 0, "")
    out = plain(table.out)
    entries = strict_json(listing.out)
    assert [entry["name"] for entry in entries] == list(METHODS)
    for entry in entries:
        assert entry["paper"]
        for field in ("name", "summary", "title", "paper", "provenance"):
            assert entry[field] in out


@pytest.mark.parametrize("max_windows", [None, 3])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_eval_is_the_stock_perplexity(
    family: str, max_windows: int | None, cli: Run, tiny_llama: Path, tiny_opt: Path, text_file: Path, tmp_path: Path
) -> None:
    directory = {"llama": tiny_llama, "opt": tiny_opt}[family]
    seq_len, text = 48, tmp_path / "part.txt"
    text.write_bytes(text_file.read_bytes()[:500])
    limit = [] if max_windows is None else ["--max-windows", max_windows]
    flags = ["--text", text, "--seq-len", seq_len, "--dtype", "float32", *limit]
    result = cli("eval", directory, "--json", *flags)
    assert (result.code, result.err) == (0, "")
    document = strict_json(result.out)
    assert (document["kind"], document["model"], document["streamed"]) == ("evaluation", str(directory), False)
    (measured,) = document["texts"]

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    assert len(ids) % seq_len != 0
    num_windows = min(len(ids) // seq_len, max_windows or len(ids))
    windows = ids[: num_windows * seq_len].reshape(num_windows, seq_len)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        # Stock loss: the mean over the seq_len - 1 shifted predictions of each window.
        mean = sum(model(input_ids=row[None], labels=row[None]).loss.item() for row in windows) / num_windows
    assert measured == {
        "perplexity": pytest.approx(math.exp(mean), rel=1e-5),
        "mean_nll": pytest.approx(mean, rel=1e-5),
        "kl_to_reference": None,
        "top1_agreement": None,
        "reference_perplexity": None,
        "start": "",
        "seq_len": seq_len,
        "stride": seq_len,
        "num_windows": num_windows,
        "num_predicted_tokens": num_windows * (seq_len - 1),
        # A token of this tokenizer is a byte.
        "num_bytes": num_windows * (seq_len - 1),
        "bits_per_byte": pytest.approx(mean / math.log(2), rel=1e-5),
        "text": str(text),
    }

    table = cli("eval", directory, *flags)
    assert table.code == 0
    assert f"perplexity \u2502 {measured['perplexity']:.4f}" in plain(table.out)
    assert f"window \u2502 {seq_len} tokens, stride {seq_len}, {num_windows} windows" in plain(table.out)


def test_eval_reads_jsonl(cli: Run, tiny_llama: Path, tmp_path: Path) -> None:
    rows = ["abc " * 20, "bcd " * 20]
    jsonl, text = tmp_path / "rows.jsonl", tmp_path / "rows.txt"
    jsonl.write_text("\n".join(json.dumps({"text": row, "id": 1}) for row in rows) + "\n\n")
    text.write_text("\n\n".join(rows))
    results = [
        strict_json(cli("eval", tiny_llama, "--text", path, "--seq-len", 40, "--json").out)["texts"][0]
        for path in (jsonl, text)
    ]
    assert results[0]["num_windows"] == 4
    assert results[0]["perplexity"] == results[1]["perplexity"]


def test_eval_of_a_pruned_model(cli: Run, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    cli("prune", tiny_llama, "-o", tmp_path / "out", "--sparsity", 0.8, *calibrated_on(text_file))
    figures = [
        strict_json(
            cli(
                *("eval", directory, "--text", text_file, "--seq-len", 64, "--max-windows", 4),
                *("--dtype", "float32", "--json"),
            ).out
        )["texts"][0]
        for directory in (tiny_llama, tmp_path / "out")
    ]
    assert figures[0]["perplexity"] != figures[1]["perplexity"]
    assert figures[0]["num_windows"] == figures[1]["num_windows"] == 4


def test_infinite_perplexity_is_still_json(cli: Run, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Finite logits, but so large that the perplexity has no float: a null or an error, but always JSON."""
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] *= 1e20
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    flags = ["--text", text_file, "--seq-len", 32, "--max-windows", 1]
    for command in (
        ["prune", source, "-o", tmp_path / "out", *calibrated_on(text_file)],
        ["eval", source, *flags, "--dtype", "float32"],
    ):
        result = cli(*command, "--json")
        assert result.code in (0, 2)
        document = strict_json(result.out)
        assert ("error" in document) == (result.code == 2)


RECIPE_OPTIONS = [*("--" + name.replace("_", "-") for name in all_fields()), "--recipe", "--json"]
OPTIONS = {
    "prune": ["--output", *RECIPE_OPTIONS],
    "plan": RECIPE_OPTIONS,
    "push": ["--private", "--revision", "--json"],
    "export": ["--output", "--format", "--dtype", "--tokenizer-gguf", "--json"],
    "inspect": ["--json"],
    "methods": ["--json"],
    "eval": ["--text", "--against", "--seq-len", "--max-windows", "--stream", "--memory", "--tasks", "--tasks-dir"],
    "bench": ["--against", "--batch", "--prompt", "--decode", "--repeats", "--json"],
}


@pytest.mark.parametrize("verb", list(OPTIONS))
def test_help(verb: str, cli: Run) -> None:
    result = cli(verb, "--help")
    assert (result.code, result.err) == (0, "")
    out = plain(result.out)
    assert f"structprune {verb}" in out
    for option in OPTIONS[verb]:
        assert option in out, option


def test_help_lists_the_verbs_without_loading_torch() -> None:
    program = "import sys; from structprune.cli import main\ntry:\n    main(['--help'])\nfinally:\n    "
    program += "assert not {'torch', 'transformers'} & set(sys.modules), 'slow imports'"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for verb in OPTIONS:
        assert re.search(rf"\b{verb}\b", done.stdout)


def test_one_process_loads_nothing_of_shared_runs() -> None:
    """The package alone does not load it; torch and transformers have reasons of their own to import parts of it."""
    code = (
        "import sys, structprune.api, structprune.engine.pipelines.registry\n"
        "print('structprune.engine.ranks.group' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_states_the_real_defaults(cli: Run) -> None:
    out = plain(cli("prune", "--help").out)
    for name in ("sparsity", "scope", "method", "seq_len", "device", "dtype", "seed"):
        assert f"[default: {Recipe.model_fields[name].default}]" in out, name


def test_names_with_brackets_are_shown_as_they_are(cli: Run, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Square brackets are markup to the table's library; in a path they are characters."""
    output = tmp_path / "out[" / "b]"
    result = cli("prune", tiny_llama, "-o", output, *calibrated_on(text_file))
    assert result.code == 0
    assert str(output) in plain(result.out)


@pytest.mark.parametrize("verb", [[], ["frobnicate"], ["prune"], ["eval"], ["prune", "--bogus"]])
def test_usage_errors(verb: list[str], cli: Run) -> None:
    result = cli(*verb)
    assert result.code == 2
    assert "Usage: structprune" in plain(result.out + result.err)
    assert "Traceback" not in result.err
