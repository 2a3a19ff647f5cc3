"""benchmarks/peers/run.py: what it refuses; and, where the peers are installed, what they leave of a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers" / "run.py"
PEERS = [
    ("torch-pruning", "taylor"),
    ("torch-pruning", "magnitude"),
    ("optipfair", "static"),
    ("optipfair", "data"),
]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.mark.parametrize(
    ("peer", "importance", "sparsity", "expected"),
    [
        ("optipfair", "taylor", 0.3, "optipfair has --importance static, data; got taylor"),
        ("optipfair", "static", 1.0, "--sparsity is a share between 0 and 1; got 1"),
        ("optipfare", "static", 0.3, "invalid choice: 'optipfare'"),
    ],
)
def test_refusals(
    peer: str,
    importance: str,
    sparsity: float,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    command = ["--peer", peer, "--importance", importance, "--sparsity", str(sparsity), "--model", str(tiny_llama)]
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT))["main"]([*command, "--calibration", str(text_file), "-o", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_peer_that_is_not_installed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    command = ["--peer", "optipfair", "--importance", "data", "--model", str(tiny_llama)]
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT))["main"]([*command, "--calibration", str(text_file), "-o", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "optipfair is not installed here; make peers-setup" in capsys.readouterr().err


@pytest.mark.parametrize(("peer", "importance"), PEERS)
def test_a_peer_prunes_a_tiny_model(
    peer: str, importance: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec(peer.replace("-", "_")) is None:
        pytest.skip(f"{peer} is not installed here (make peers-setup)")
    done = run(
        *("--peer", peer, "--importance", importance, "--sparsity", 0.3, "--model", tiny_llama),
        *("--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "-o", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    # As many channels as our uniform allocator removes: 15 of 48.
    assert row["kept"] == 33
    assert row["removed"] == pytest.approx(15 / 48)
    assert row["calibration_windows"] == 4
    assert 0 < row["peak_bytes"] < row["peak_rss_bytes"]
    dense, pruned = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny_llama, tmp_path / "out"))
    assert pruned.config.intermediate_size == 33
    before, after = dense.state_dict(), pruned.state_dict()
    for name, tensor in after.items():
        if ".mlp." not in name:
            assert torch.equal(tensor, before[name]), name
    for layer, narrow in zip(dense.model.layers, pruned.model.layers, strict=True):
        # What is left of each matrix are rows, or columns, of the dense one: the same channels everywhere.
        kept = [int((layer.mlp.up_proj.weight == row).all(1).nonzero()) for row in narrow.mlp.up_proj.weight]
        assert len(set(kept)) == 33
        assert torch.equal(narrow.mlp.gate_proj.weight, layer.mlp.gate_proj.weight[kept])
        assert torch.equal(narrow.mlp.down_proj.weight, layer.mlp.down_proj.weight[:, kept])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("two words")["input_ids"]
