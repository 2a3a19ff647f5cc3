"""The bundled SmolLM2-135M, pruned unevenly, in a stock llama.cpp; and what the export holds in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from structprune import Recipe, prune
from structprune.api import export
from structprune.architectures.sources.resolve import bundled_gguf
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.loading import load_model
from support.llama_runtime import run_llama

pytestmark = pytest.mark.realmodel

# Without digits, which the tokenizer that transformers made of the GGUF cuts otherwise than llama.cpp does.
_PROMPTS = (
    "The capital of France is",
    "Water boils when it is heated, and ice",
    "She opened the door and saw that the room was",
    "In computer science, a list is",
    "The most important thing about a good night of sleep is that",
)
_VOCAB = 49152
_MEASURED = """
import json, sys
from structprune.api import export
from structprune.memory import PeakMeter

with PeakMeter() as meter:
    export(sys.argv[1], sys.argv[2], dtype="float32")
    print(json.dumps(meter.peak_so_far()))
"""


# Of wanda-sp all blocks lose as much, so that the protected ones make the widths uneven.
_RUNS: dict[str, dict[str, Any]] = {
    "wanda-sp": {"scope": "all", "num_samples": 2, "seq_len": 64, "protect_first": 3, "protect_last": 1},
    "structprune": {"scope": "mlp", "num_samples": 4, "seq_len": 128},
}


@pytest.fixture(scope="module", params=["wanda-sp", pytest.param("structprune", marks=pytest.mark.slow)])
def uneven(
    request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory, modules_cache: None
) -> Path:
    """Channels pruned, of wanda-sp heads too, of other numbers in other blocks."""
    output = tmp_path_factory.mktemp("uneven") / "out"
    text = output.parent / "text.txt"
    text.write_text("\n".join(_PROMPTS) * 40, encoding="utf-8")
    settings = {"sparsity": 0.2, "calibration": str(text), "dtype": "float32"} | _RUNS[request.param]
    prune("smollm2", Recipe.build(method=request.param, **settings), output)
    widths = json.loads((output / "config.json").read_text(encoding="utf-8"))["per_layer_config"].values()
    assert len({tuple(block.items()) for block in widths}) > 1
    return output


def test_uneven_smollm2_predicts_the_same_tokens(uneven: Path, tmp_path: Path) -> None:
    """Shown with `-rP`: the five likeliest next tokens in transformers and in llama.cpp."""
    # The bundled file is quantised, so the output is bfloat16, which llama.cpp multiplies in another order.
    result = export(uneven, tmp_path / "small.gguf", dtype="float32")
    assert (result.architecture, result.dtype) == ("deci", "float32")
    assert result.tokenizer == str(bundled_gguf())
    encoder = TextEncoder(uneven)
    prompts = [encoder.encode(text).tolist() for text in _PROMPTS]
    answers = run_llama(tmp_path / "small.gguf", prompts, _VOCAB, likeliest=5, texts=_PROMPTS)
    model = load_model(uneven, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected_NV = torch.stack(
            [model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
        )
    tokenizer = AutoTokenizer.from_pretrained(uneven)
    for text, ours_V, theirs_V in zip(_PROMPTS, expected_NV, answers.logprobs_NV, strict=True):
        print(text)
        for name, logprobs_V in (("transformers", ours_V), ("llama.cpp", theirs_V)):
            top = logprobs_V.topk(5)
            tokens = [repr(tokenizer.decode(token)) for token in top.indices]
            pairs = zip(tokens, top.values.tolist(), strict=True)
            print(f"  {name:12}", "  ".join(f"{token} {value:.4f}" for token, value in pairs))
    top_N5 = expected_NV.topk(5)
    assert torch.equal(answers.logprobs_NV.topk(5).indices, top_N5.indices)
    torch.testing.assert_close(answers.logprobs_NV.topk(5).values, top_N5.values, rtol=0, atol=1e-3)
    assert answers.tokens == prompts


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
