"""Decoders without a family file through whole runs: stock code loads what was written, with the logits of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from structprune import prune
from structprune.api import export, inspect, plan, recover
from structprune.architectures.modeling.per_layer import MODELING_NAME
from structprune.architectures.stock.loading import backbone, load_model, output_head
from structprune.errors import UnsupportedError
from structprune.evaluation.reload import ReloadSpec, reload_here
from structprune.recipe import Recipe
from structprune.recipe.training import RecoverySettings
from structprune.results.report import PruneReport
from support.traced import DESCRIBED, HELD_HEADS, OWN_MLP, TRACED, save_decoder

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

# One of each sort: factors on logits, one norm for two sublayers, tables in blocks, held heads, stacked experts, and
# blocks of several classes.
USUAL = ("granite", "cohere2", "gptj", "olmo2", "gpt_oss", "jamba")
KINDS = [pytest.param(kind, marks=() if kind in USUAL else pytest.mark.slow) for kind in (*DESCRIBED, *TRACED)]
IDS_BS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(request.param, tmp_path_factory.mktemp("decoders") / request.param)


def run(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    settings: dict[str, Any] = {
        "sparsity": 0.25,
        "calibration": str(text_file),
        "num_samples": 8,
        "seq_len": 32,
        "multiple_of": 1,
        "memory": 2**31,
        "dtype": "float32",
        **changes,
    }
    return prune(source, Recipe.build(**settings), output)


def check_output(report: PruneReport, output: Path, *, own_code: bool) -> Any:
    """Stock code, in a process of its own, had the run's logits; here it loads too, and tokens have finite logits."""
    assert report.reload.mode == "whole"
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < 1e-4
    assert (output / MODELING_NAME).is_file() == own_code
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=own_code).eval()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=IDS_BS).logits).all()
    return model


def mixture(source: Path) -> bool:
    return any("expert" in name or "_moe." in name for name in stored_names(source))


def stored_names(directory: Path) -> list[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_a_quarter_of_the_channels_in_a_stock_config(source: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    own_code = source.name in OWN_MLP
    report = run(source, output, text_file, method="fasp", multiple_of=8 if mixture(source) else 1)
    assert report.family == source.name
    assert any("found by tracing" in note for note in report.notes)
    dense = AutoModelForCausalLM.from_pretrained(source)
    pruned = check_output(report, output, own_code=own_code)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, pruned))
    # A quarter of the MLP, in whole channels: one of 48 more where the MLP has numbers that stay (Apertus).
    # Experts keep multiples of 8 of their 24 or 48 channels.
    assert 0.2 <= report.size.removed_share_of_scope <= (0.35 if mixture(source) else 0.25 + 1 / 48)
    assert set(stored_names(output)) == set(stored_names(source)), "the names are those of the source"
    assert before - after == report.size.parameters_before - report.size.parameters_after > 0


def test_uneven_channels_and_heads_by_the_default_method(source: Path, text_file: Path, tmp_path: Path) -> None:
    output, scope = tmp_path / "out", "mlp" if source.name in HELD_HEADS else "all"
    step = 8 if mixture(source) else 1
    if source.name == "gemma4_text":
        with pytest.raises(UnsupportedError, match="they keep one width; got --structure per-layer, head_dim"):
            run(source, output, text_file, structure="per-layer")
        return
    report = run(source, output, text_file, scope=scope, structure="per-layer", sparsity=0.4, multiple_of=step)
    layers = json.loads((output / "config.json").read_text())["per_layer_config"].values()
    assert len({json.dumps(fields, sort_keys=True) for fields in layers}) > 1
    model = check_output(report, output, own_code=True)
    # Our own loader takes the file that was written, and its head is that of the model.
    loaded = load_model(output, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected_BSV = model(input_ids=IDS_BS).logits
        torch.testing.assert_close(loaded(input_ids=IDS_BS).logits, expected_BSV)
        hidden_BSD = backbone(loaded)(input_ids=IDS_BS).last_hidden_state
        torch.testing.assert_close(output_head(loaded)(hidden_BSD), expected_BSV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "impossible"),
    [
        # Weights that a module around uses, stored buffers, heads that are told apart by name.
        ("falcon_h1", None),
        pytest.param("qwen3_5_text", None, marks=pytest.mark.slow),
        pytest.param("llama4_text", None, marks=pytest.mark.slow),
        ("gemma4_text", None),
        ("deepseek_v3", "no tensor of the checkpoint is model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_loading_module_by_module(model_type: str, impossible: str | None, tmp_path: Path) -> None:
    """The reload check of a result that does not fit into the memory."""
    source = save_decoder(model_type, tmp_path / model_type)
    with torch.no_grad():
        expected_SV = AutoModelForCausalLM.from_pretrained(source).eval()(input_ids=IDS_BS[:1]).logits[0]
    save_file({"ids_S": IDS_BS[0].clone(), "logits_SV": expected_SV.contiguous()}, tmp_path / "probe.safetensors")
    result = reload_here(
        ReloadSpec(directory=source, probe=tmp_path / "probe.safetensors", mode="streamed", dtype="float32")
    )
    assert (result.error, result.impossible) == (None, impossible)
    assert impossible is not None or result.relative_difference < 1e-5


@pytest.mark.parametrize("model_type", [kind for kind in HELD_HEADS if kind in USUAL])
def test_heads_that_cannot_leave_are_refused_with_the_reason(model_type: str, text_file: Path, tmp_path: Path) -> None:
    source = save_decoder(model_type, tmp_path / model_type)
    with pytest.raises(UnsupportedError, match=HELD_HEADS[model_type]):
        run(source, tmp_path / "out", text_file, scope="all", head_units="kv-group")
    assert not (tmp_path / "out").exists()


def test_plan_and_inspect_say_where_the_description_is_from(text_file: Path, tmp_path: Path) -> None:
    source = save_decoder("granite", tmp_path / "granite")
    assert any("found by tracing" in note for note in inspect(source).notes)
    found = plan(source, Recipe.build(sparsity=0.25, calibration=str(text_file), num_samples=4, seq_len=32))
    assert found is not None


def test_no_gguf_form_is_known(tmp_path: Path) -> None:
    source = save_decoder("gptj", tmp_path / "gptj")
    with pytest.raises(UnsupportedError, match="no GGUF form is known for this model family; got model_type 'gptj'"):
        export(source, tmp_path / "a.gguf", format="gguf")


@pytest.mark.slow
def test_a_pruned_one_recovers_and_is_pruned_again(text_file: Path, tmp_path: Path) -> None:
    source = save_decoder("cohere2", tmp_path / "cohere2")
    run(source, tmp_path / "out", text_file, scope="all", structure="per-layer", head_units="kv-group", sparsity=0.4)
    settings = RecoverySettings(
        calibration=(str(text_file),), minutes=0.1, memory=2**31, num_samples=16, seq_len=32, dtype="float32"
    )
    recover(tmp_path / "out", source, settings, tmp_path / "better")
    assert (tmp_path / "better" / MODELING_NAME).is_file()
    report = run(tmp_path / "better", tmp_path / "again", text_file, method="fasp", structure="per-layer", sparsity=0.2)
    check_output(report, tmp_path / "again", own_code=True)


def test_a_pruned_one_loses_whole_sublayers(text_file: Path, tmp_path: Path) -> None:
    """Blocks go by number, in code that adds to the stream in place."""
    source = save_decoder("falcon", tmp_path / "falcon")
    report = run(source, tmp_path / "out", text_file, method="depth", sparsity=0.25)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.base_model.h) == 3
    assert report.reload.relative_difference is not None


def test_blocks_that_differ_by_their_number_stay(text_file: Path, tmp_path: Path) -> None:
    """What DiffLlama's attention takes away depends on the number of the block, which no entry of the config says."""
    source = save_decoder("diffllama", tmp_path / "diffllama")
    with pytest.raises(UnsupportedError, match="blocks of diffllama compute something else by their number"):
        run(source, tmp_path / "out", text_file, method="depth", sparsity=0.25)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 5e-2), ("float32", 1e-4)])
def test_half_precision(dtype: str, tolerance: float, text_file: Path, tmp_path: Path) -> None:
    """Stored in bfloat16: numbers that stock code computes as it builds the model are those of the forward passes."""
    source = save_decoder("gemma", tmp_path / "gemma", dtype=torch.bfloat16, hidden_size=40)
    report = run(source, tmp_path / "out", text_file, method="fasp", dtype=dtype)
    assert report.reload.relative_difference is not None
    assert report.reload.relative_difference < tolerance
