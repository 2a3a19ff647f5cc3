"""ONNX graphs: ONNX Runtime computes the model's logits for any batch and length; nothing half-written stays."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import SIZES, configured, pruned, rope, stock_checkpoint
from test_per_layer import KINDS, kept_units, write_per_layer
from torch import Tensor
from transformers import LlamaConfig

from structprune.api import export
from structprune.architectures.stock.loading import load_model
from structprune.cli import main
from structprune.errors import InputError, NumericalError, StructPruneError, UnsupportedError
from structprune.exporters import onnx_export
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra [onnx] is not installed",
)


@torch.no_grad()
def assert_same(graph: Path, model: Any) -> None:
    """Shapes other than those that the export looked at, and a padded text."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    for shape in ((1, 1), (2, 8), (4, 40)):
        ids_BS = torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(5))
        mask_BS = torch.ones_like(ids_BS)
        mask_BS[0, : shape[1] // 2] = 0
        found = session.run(None, {"input_ids": ids_BS.numpy(), "attention_mask": mask_BS.numpy()})
        expected_BSV = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
        seen = mask_BS.bool()
        actual_BSV: Tensor = torch.from_numpy(found[0])
        torch.testing.assert_close(actual_BSV[seen], expected_BSV[seen], rtol=1e-4, atol=1e-4)


@needs_onnx
def test_an_uneven_model_without_some_halves(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    settings = {"method": "structprune", "scope": "all", "sparsity": 0.7, "allow_block_removal": True}
    output = pruned(source, text_file, tmp_path / "out", **settings)
    assert "structprune_removed" in json.loads((output / "config.json").read_text())
    (output / "original").mkdir()
    (output / "original" / "consolidated.00.pth").write_bytes(b"PK")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["export", str(output), "--format", "onnx", "-o", str(tmp_path / "files" / "graph"), "--json"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    graph = tmp_path / "files" / "graph"
    assert (result["format"], result["dtype"]) == ("onnx", "float32")
    assert result["bytes"] == sum(path.stat().st_size for path in graph.iterdir())
    # One line per step, and what is no part of the output.
    assert [line.split("  ")[:2] for line in err.splitlines()] == [
        ["write 1/3", "load"],
        ["write 2/3", "trace"],
        ["write 3/3", "compare"],
        ["original/ is left out: a folder of weights that were not read"],
        ["pruning_path.json is left out: says something of the source only"],
    ]
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= {p.name for p in graph.iterdir()}
    assert [path.name for path in graph.parent.iterdir()] == ["graph"]
    assert_same(graph, load_model(output, torch.device("cpu"), torch.float32))


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind: str, tmp_path: Path) -> None:
    """Also through OpenVINO, which reads the same file; by itself it may compute in bfloat16."""
    source = save_tiny(kind, tmp_path / "dense", num_blocks=3)
    output = write_per_layer(source, tmp_path / "pruned", kept_units(kind))
    export(output, tmp_path / "graph", format="onnx")
    model = load_model(output, torch.device("cpu"), torch.float32)
    assert_same(tmp_path / "graph", model)
    openvino = pytest.importorskip("openvino")
    path = str(tmp_path / "graph" / "model.onnx")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ids_BS = torch.randint(0, 250, (3, 21), generator=torch.Generator().manual_seed(6))
    inputs = {"input_ids": ids_BS.numpy(), "attention_mask": torch.ones_like(ids_BS).numpy()}
    with torch.no_grad():
        expected_BSV = model(input_ids=ids_BS, use_cache=False).logits
    actual_BSV = torch.from_numpy(compiled(inputs)["logits"])
    torch.testing.assert_close(actual_BSV, expected_BSV, rtol=1e-4, atol=1e-4)


@needs_onnx
def test_other_logits_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    # What is compared is not what was traced.
    monkeypatch.setattr(onnx_export, "_trace", traced_with_another_head(onnx_export._trace))
    (tmp_path / "files").mkdir()
    with pytest.raises(NumericalError, match=r"other logits from the graph than transformers.*at most 0\.001"):
        export(source, tmp_path / "files" / "graph", format="onnx")
    assert list((tmp_path / "files").iterdir()) == []


def traced_with_another_head(trace: Any) -> Any:
    def run(model: Any, directory: Path) -> None:
        trace(model, directory)
        model.lm_head.weight.data.mul_(1.01)

    return run


BAD: dict[str, tuple[dict[str, Any], type[StructPruneError], str, dict[str, Any]]] = {
    "half precision": ({}, UnsupportedError, r"ONNX files are written in float32; got float16", {"dtype": "float16"}),
    "tokenizer": ({}, InputError, "--format onnx takes no tokenizer from a GGUF file", {"tokenizer_gguf": "a.gguf"}),
    "family": ({"model_type": "t5"}, UnsupportedError, "unknown model family", {}),
    "rope": (rope("dynamic", factor=2.0), UnsupportedError, "positions that change with the length.*rope_type dyn", {}),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        UnsupportedError,
        "announces a quantisation that the weights do not have",
        {},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, error, message, options = BAD[case]
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    configured(**changes)(source)
    monkeypatch.setattr(onnx_export, "ONNX", replace(onnx_export.ONNX, packages=()))
    (tmp_path / "files").mkdir()
    with pytest.raises(error, match=message):
        export(source, tmp_path / "files" / "graph", format="onnx", **options)
    assert list((tmp_path / "files").iterdir()) == []


def test_a_checkpoint_in_half_precision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
    monkeypatch.setattr(onnx_export, "ONNX", replace(onnx_export.ONNX, packages=()))
    with pytest.raises(UnsupportedError, match=r"written in float32; got bfloat16\. Pass --dtype float32"):
        export(source, tmp_path / "graph", format="onnx")


@pytest.mark.parametrize("kind", ["phi3-longrope", "gemma3_text"])
def test_positions_of_every_layer_are_looked_at(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(kind, tmp_path / "model")
    monkeypatch.setattr(onnx_export, "ONNX", replace(onnx_export.ONNX, packages=()))
    if kind == "gemma3_text":
        path = source / "config.json"
        config = json.loads(path.read_text())
        config["rope_parameters"]["full_attention"] |= {"rope_type": "dynamic", "factor": 2.0}
        path.write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match=r"config\.json: one graph cannot hold.*got rope_type (longrope|dynamic)"
    ):
        export(source, tmp_path / "graph", format="onnx")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    monkeypatch.setattr(onnx_export, "ONNX", replace(onnx_export.ONNX, packages=("onnxx", "json", "scriptt")))
    with pytest.raises(UnsupportedError, match=r"got no onnxx, no scriptt\. Pip install 'structprune\[onnx\]'"):
        export(source, tmp_path / "graph", format="onnx")
    assert not (tmp_path / "graph").exists()
