"""The tokenizer of a GGUF file gives the ids that llama.cpp gives for the same file, whatever its pre-tokenizer is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_gguf import PROMPTS, SIZES, stock_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from structprune.api import export
from structprune.architectures.sources.gguf import open_gguf
from structprune.architectures.sources.gguf_pretokenizers import PRE_TOKENIZERS
from support.gguf_files import copy_gguf
from support.llama_runtime import run_llama

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 900
TEXTS = [
    "in 12345 or 1, 12 123 1234 ab12 ab 3.14",
    "it's AB'S  they'll WE'VE ab,  \n\n ab\t x_y  ",
    "   ab  ab   a\n\n\n  b\r\n\tab   \n",
    "\u00e9t\u00e9 \u00c9COLE na\u00efve \u00dcber \u00df Stra\u00dfe \u0130stanbul",
    "\u4f60\u597d\u4e16\u754c \u65e5\u672c\u8a9e\u3067\u3059 \ud55c\uad6d\uc5b4",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f642\U0001f468\u200d\U0001f469 \u2014 \u201cquoted\u201d \u2026 \u20ac5 $x^2+y<=3|z~`",
    "def f(a,b):\n    return a+b  # (c) {ab: [1]}/ab\n",
    "\u0661\u0662\u0663 \u2167 \u00bd 1\u00b2 \uff11\uff12 x\u0301",
    "hello hellohello ab hello",
    "camelCaseWord HTMLParser's X1Y22Z333 a\n\n\nb",
]
SPECIAL = ["<s>ab <s> hello<s>", "a<s>b"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA in GGUF whose merges were learnt on uncut text, so that every place of a cut shows in the ids."""
    folder = tmp_path_factory.mktemp("plain")
    source, _ = stock_checkpoint(LlamaConfig(**SIZES | {"vocab_size": VOCAB}), folder / "model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1, initial_alphabet=alphabet, special_tokens=["<s>"], min_frequency=1
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens(["hello"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(source)
    export(source, folder / "plain.gguf")
    return folder / "plain.gguf"


def ids(path: Path, texts: list[str], **flags: Any) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(open_gguf(path).directory)
    return [tokenizer(text, **{"add_special_tokens": False} | flags)["input_ids"] for text in texts]


# One name of each way to cut; the others with the slow tests.
FIRST = {pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}.values()
NAMES = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in PRE_TOKENIZERS]


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_level_tokenizer_cuts_text_as_llama_cpp_does(name: str, plain: Path, tmp_path: Path) -> None:
    path = copy_gguf(plain, tmp_path / "a.gguf", keys={"tokenizer.ggml.pre": name})
    wanted = run_llama(path, PROMPTS[:1], VOCAB, texts=TEXTS).tokens
    for text, found, right in zip(TEXTS, ids(path, TEXTS), wanted, strict=True):
        assert found == right, text
    # The exact strings of special tokens in a text.
    marked = run_llama(path, PROMPTS[:1], VOCAB, texts=SPECIAL, parse_special=True).tokens
    assert ids(path, SPECIAL) == marked
