"""SmolLM2 with fewer tokens: stock transformers and llama.cpp read texts alike and predict alike."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoTokenizer

from structprune import Recipe, prune
from structprune.api import export
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.loading import load_model
from structprune.vocabulary.kept import KEPT_NAME, read_kept
from support.llama_runtime import run_llama

pytestmark = [pytest.mark.realmodel, pytest.mark.slow]

SIZE = 32_000
# Without digits, which the tokenizer that transformers made of the GGUF cuts otherwise than llama.cpp does.
PROMPTS = (
    "The capital of France is",
    "She opened the door and saw that the room was",
    "def parse(self, text):\n    return text.split(",
    "Wikipedia says that Reykjavik and Ljubljana are",
    "\u00e9t\u00e9, stra\u00dfe, \u4f60\u597d and \u0434\u0430",
)
CHAT = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "An ordered collection."}]


@pytest.fixture(scope="module")
def trimmed(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trimmed")
    text = folder / "manual.txt"
    text.write_text("\n\n".join(topics.values()), encoding="utf-8")
    settings = {"calibration": str(text), "num_samples": 2, "seq_len": 64, "dtype": "float32", "reload_check": False}
    recipe = Recipe.build(scope="vocabulary", vocabulary=SIZE, output_dtype="float32", held_out=0, **settings)
    prune("smollm2", recipe, folder / "out")
    return folder / "out"


def test_transformers_and_llama_cpp_agree(trimmed: Path, tmp_path: Path) -> None:
    """The ids of texts, with tokens that are gone among them, and the five likeliest next tokens."""
    result = export(trimmed, tmp_path / "small.gguf", dtype="float32")
    assert result.architecture == "llama"
    tokenizer = AutoTokenizer.from_pretrained(trimmed)
    assert len(tokenizer) == SIZE
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    answers = run_llama(tmp_path / "small.gguf", prompts, SIZE, likeliest=5, texts=PROMPTS)
    assert answers.tokens == prompts
    model = load_model(trimmed, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected_NV = torch.stack(
            [model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
        )
    top_N5 = expected_NV.topk(5)
    assert torch.equal(answers.logprobs_NV.topk(5).indices, top_N5.indices)
    torch.testing.assert_close(answers.logprobs_NV.topk(5).values, top_N5.values, rtol=0, atol=2e-3)


def test_texts_and_chats_come_back(trimmed: Path) -> None:
    """A chat renders as the source's does; every byte and a line of many scripts are decoded to what they were."""
    source = AutoTokenizer.from_pretrained(open_model("smollm2").directory)
    tokenizer = AutoTokenizer.from_pretrained(trimmed)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == source.apply_chat_template(CHAT, tokenize=False)
    for text in (*PROMPTS, *(chr(code) for code in range(256)), "".join(map(chr, range(0x370, 0x6F0, 7)))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == source.decode(source(text, add_special_tokens=False)["input_ids"])
    kept = read_kept(trimmed / KEPT_NAME)
    config = json.loads((trimmed / "config.json").read_text(encoding="utf-8"))
    for name in ("bos_token", "eos_token"):
        old, new = (getattr(each, f"{name}_id") for each in (source, tokenizer))
        assert getattr(source, name) == getattr(tokenizer, name)
        assert kept.new_ids[old] == new
    assert config["vocab_size"] == SIZE
