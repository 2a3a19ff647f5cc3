"""The plan before work: what it says comes true; and widths that several processes can share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from structprune import Recipe, prune
from structprune.api import plan
from structprune.cli import main
from structprune.errors import InputError, StructPruneError, UnsupportedError
from support.models import TINY_MODELS, llama_config, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings = {
        "method": "fasp",
        "calibration": str(text_file),
        "num_samples": 4,
        "seq_len": 32,
        "dtype": "float32",
        "multiple_of": 1,
    }
    return Recipe.build(**settings | changes)


RUNS: dict[str, dict[str, Any]] = {
    "fasp": {},
    "per-layer": {"protect_first": 1, "structure": "per-layer"},
    "heads": {"method": "wanda-sp", "scope": "all", "head_units": "query-head", "sparsity": 0.2},
    "flap": {"method": "flap", "structure": "uniform", "scope": "all", "sparsity": 0.5},
    "closed form": {"method": "structprune", "sparsity": 0.3},
    "block removal": {"method": "structprune", "scope": "all", "sparsity": 0.6, "allow_block_removal": True},
    "depth": {"method": "depth", "sparsity": 0.3, "multiple_of": None},
    "shortcuts": {"method": "slicegpt", "sparsity": 0.1, "multiple_of": 4},
    "one basis": {"method": "slicegpt", "sparsity": 0.1, "structure": "uniform", "multiple_of": 4},
    "nothing removed": {"sparsity": 0.0},
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_forecast_comes_true(name: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, **RUNS[name])
    found = plan(tiny_llama, settings)
    report = prune(tiny_llama, settings, tmp_path / "out")
    if found.forecast.num_parameters is not None:
        assert found.forecast.num_parameters == report.size.parameters_after
    assert (found.forecast.num_parameters is None) == (name in ("flap", "closed form", "block removal"))
    for kind, counts in (found.forecast.kept or {}).items():
        assert counts == [block.kept_units for block in report.blocks if block.kind == kind]
    assert found.plan.peak_bytes == report.memory.planned_peak_bytes
    assert found.plan.store == report.memory.store
    assert [runtime.runtime for runtime in found.runtimes] == [runtime.runtime for runtime in report.runtimes]
    if name != "block removal":
        assert [runtime.loads for runtime in found.runtimes] == [runtime.loads for runtime in report.runtimes]
    assert found.recipe == report.recipe.model_copy(
        update={"memory": found.recipe.memory, "calibration": (str(text_file),), "num_samples": 4}
    )
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["runtimes"] == [
        runtime.model_dump() for runtime in report.runtimes
    ]


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code, *capsys.readouterr()


def test_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    flags = [
        "--method",
        "fasp",
        "--sparsity",
        0.5,
        "--multiple-of",
        8,
        "--num-samples",
        4,
        "--seq-len",
        32,
        "--dtype",
        "float32",
    ]
    code, out, err = run_cli(capsys, "plan", tiny_llama, *flags, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["recipe"]["multiple_of"] == 8
    assert found["kept_units"] == {"mlp": [24, 24]}
    assert found["parameters_after"] == found["parameters_before"] - 2 * 24 * 3 * 32
    assert found["memory"]["planned_peak_bytes"] == max(found["memory"]["phases"].values())
    assert found["reload_check"]["mode"] == "whole"
    assert [runtime["runtime"] for runtime in found["runtimes"]][-1] == "llama.cpp"
    code, out, err = run_cli(capsys, "plan", tiny_llama, *flags, "--no-reload-check", "--method", "structprune")
    assert (code, err) == (0, "")
    for text in ("the calibration text decides", "sensitivity: backward", "left out", "architecture deci"):
        assert text in out
    # Nothing was written, and no calibration text was looked for.
    assert list(tmp_path.iterdir()) == []


def test_a_plan_refuses_what_the_run_would_refuse(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
) -> None:
    code, _, err = run_cli(capsys, "plan", tiny_llama, "--method", "fasp", "--sparsity", 0.99, "--multiple-of", 1)
    assert (code, err.splitlines()[-1][:48]) == (2, "structprune: block 0: no mlp units would be left")
    code, _, err = run_cli(capsys, "plan", tiny_llama, "--memory", "1MiB")
    assert code == 2
    assert "does not fit in the memory budget" in err


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight heads on four KV heads."""
    with pytest.MonkeyPatch.context() as patch:
        build = TINY_MODELS["llama"]

        def wider() -> Any:
            model = build()
            return type(model)(llama_config(num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3))

        patch.setitem(TINY_MODELS, "llama", wider)
        return save_tiny("llama", tmp_path_factory.mktemp("wide") / "llama")


SHARED: dict[str, dict[str, Any]] = {
    "mlp": {},
    "kv groups": {"method": "wanda-sp", "scope": "all"},
    "query heads": {"method": "wanda-sp", "scope": "attention", "head_units": "query-head", "sparsity": 0.1},
    "closed form": {"method": "structprune", "scope": "all", "sparsity": 0.4},
    "block removal": {"method": "structprune", "scope": "all", "sparsity": 0.6, "allow_block_removal": True},
    "protected": {"protect_first": 1},
    "depth": {"method": "depth", "multiple_of": None},
    "slicegpt": {"method": "slicegpt", "sparsity": 0.1, "multiple_of": 4},
}


# Of four KV heads for four processes none can go.
@pytest.mark.parametrize(
    ("name", "processes"), [(name, n) for name in SHARED for n in (2, 4) if (name, n) != ("kv groups", 4)]
)
def test_every_width_can_be_shared(name: str, processes: int, wide: Path, text_file: Path, tmp_path: Path) -> None:
    settings = recipe(text_file, tensor_parallel=processes, **{"sparsity": 0.3, **SHARED[name]})
    report = prune(wide, settings, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = list(config.get("per_layer_config", {}).values()) or [{}]
    for index, layer in enumerate(layers):
        fields = config | layer
        for entry in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            assert fields[entry] % processes == 0, (index, entry)
    for runtime in report.runtimes:
        if runtime.runtime.startswith(("vLLM", "SGLang")) and runtime.loads != "no":
            assert runtime.reason.endswith(f"{processes} divides every block's heads and widths")
    if "multiple_of" not in SHARED[name]:
        # The recipe keeps what was asked for, so that the same again gives the same.
        assert report.recipe.multiple_of == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel": 3}, "block 0: num_key_value_heads 4"),
        # Pruned to what divides, but another block keeps its width.
        (
            {"tensor_parallel": 3, "method": "wanda-sp", "scope": "attention", "protect_last": 1, "sparsity": 0.1},
            "block 2: num_key_value_heads 4",
        ),
        ({"tensor_parallel": 8, "method": "depth", "multiple_of": None}, "block 0: num_key_value_heads 4"),
        ({"tensor_parallel": 8, "method": "slicegpt", "multiple_of": 4}, "block 0: num_key_value_heads 4"),
        ({"tensor_parallel": 3, "method": "structprune", "scope": "all"}, "block 0: num_key_value_heads 4"),
    ],
)
def test_widths_that_cannot_be_shared_are_refused_before_work(
    changes: dict[str, Any], message: str, wide: Path, text_file: Path, tmp_path: Path
) -> None:
    for run in (lambda r: plan(wide, r), lambda r: prune(wide, r, tmp_path / "out")):
        with pytest.raises(StructPruneError, match=message) as caught:
            run(recipe(text_file, **{"sparsity": 0.3, **changes}))
        assert isinstance(caught.value, UnsupportedError)
        assert f"--tensor-parallel {changes['tensor_parallel']}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_the_processes_cannot_share_is_pruned_to_what_they_can(
    wide: Path, text_file: Path, tmp_path: Path
) -> None:
    """Four KV heads and three processes: three stay."""
    settings = recipe(text_file, tensor_parallel=3, method="wanda-sp", scope="all", sparsity=0.2)
    prune(wide, settings, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"]) == (3, 6)
    assert config["intermediate_size"] % 3 == 0


def test_too_coarse_a_multiple_is_refused(wide: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no mlp units would be left"):
        prune(wide, recipe(text_file, tensor_parallel=2, multiple_of=32, sparsity=0.3), tmp_path / "out")
