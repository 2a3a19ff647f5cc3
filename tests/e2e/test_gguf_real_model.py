"""The bundled SmolLM2-135M, pruned unevenly, in a stock llama.cpp; and what the export holds in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_runtime import run_llama
from structprune import Recipe, prune
from structprune.api import export
from structprune.architectures.loading import load_model
from structprune.architectures.source import bundled_gguf
from structprune.architectures.tokenizer import TextEncoder

pytestmark = pytest.mark.realmodel

_TEXT = "The capital of France is Paris. In 1923 the population of the city"
_VOCAB = 49152
_MEASURED = """
import json, sys
from structprune.api import export
from structprune.memory import PeakMeter

with PeakMeter() as meter:
    export(sys.argv[1], sys.argv[2], dtype="float32")
    print(json.dumps(meter.peak_so_far()))
"""


@pytest.fixture(scope="module")
def uneven(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, modules_cache: None) -> Path:
    """Attention and MLP pruned in all blocks but the first three and the last."""
    output = tmp_path_factory.mktemp("uneven") / "out"
    text = output.parent / "text.txt"
    text.write_text(f"{_TEXT}\n" * 100, encoding="utf-8")
    recipe = Recipe(
        method="wanda-sp",
        scope="all",
        sparsity=0.2,
        protect_first=3,
        protect_last=1,
        calibration=str(text),
        num_samples=2,
        seq_len=64,
        dtype="float32",
    )
    prune("smollm2", recipe, output)
    return output


def test_uneven_smollm2_predicts_the_same_tokens(uneven: Path, tmp_path: Path) -> None:
    result = export(uneven, tmp_path / "small.gguf")
    assert (result.architecture, result.dtype) == ("deci", "float32")
    assert result.tokenizer == str(bundled_gguf())
    ids = TextEncoder(uneven).encode(_TEXT)
    # Prompts without digits, which the tokenizer that transformers made of the GGUF cuts otherwise than llama.cpp does.
    prompts = [ids[:length].tolist() for length in (3, 6, 8, len(ids))]
    answers = run_llama(tmp_path / "small.gguf", prompts, _VOCAB, likeliest=5, texts=[_TEXT[:31]])
    model = load_model(uneven, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected_NV = torch.stack(
            [model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
        )
    top_N5 = expected_NV.topk(5)
    assert torch.equal(answers.logprobs_NV.topk(5).indices, top_N5.indices)
    torch.testing.assert_close(answers.logprobs_NV.topk(5).values, top_N5.values, rtol=0, atol=1e-3)
    assert answers.tokens == [TextEncoder(uneven).encode(_TEXT[:31]).tolist()]


def test_one_tensor_is_in_memory_at_a_time(uneven: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(uneven), str(tmp_path / "small.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    embedding_bytes = _VOCAB * 576 * 4
    file_bytes = (tmp_path / "small.gguf").stat().st_size
    # The largest tensor, the reader's chunk, and what does not grow with the weights: the tokenizer's 98,052 strings.
    bound = embedding_bytes + 16 * 2**20 + 144 * 2**20
    assert json.loads(done.stdout) < bound < 0.7 * file_bytes
