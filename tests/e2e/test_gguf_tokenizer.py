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
from structprune.errors import StructPruneError
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


SPACE = "\u2581"
PIECES = [
    *("a", "b", "e", "h", "l", "o", "i", "t", "r", "n", "d", "1", "2", "3", ",", ".", SPACE, "\u00e9", "\u4f60"),
    *("he", "ll", "hell", "hello", f"{SPACE}a", f"{SPACE}h", f"{SPACE}he", f"{SPACE}hello", "ab", "in", "it", "ti"),
    *(f"{SPACE}{SPACE}", f"{SPACE}{SPACE}{SPACE}", "12", "23", "th", "the", f"{SPACE}the", "er", "re", "en", "nd"),
]
SPM_TEXTS = [
    *("hello hello", " hello", "  a  ab\tb", "the 123 23 12 1 3", "her there render", "\u00e9t\u00e9 \u4f60\u597d"),
    *("nothing, it is the end.", "\U0001f642 hello\n\nthe", "   ", "abababab lllll", "tititi iti", "x", "hell o"),
]


@pytest.fixture(scope="module")
def scored(plain: Path) -> Path:
    """The same model with SentencePiece's tokens: special ones, every byte, pieces with scores, a marked word."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "[word]"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4]
    # Longer pieces are not always the better ones.
    scores = [0.0] * 259 + [-float((7 * index) % len(PIECES)) for index in range(len(PIECES))] + [0.0]
    rest = VOCAB - len(tokens)
    tokens += [f"[unused{index}]" for index in range(rest)]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores + [-1000.0] * rest,
        "tokenizer.ggml.token_type": types + [5] * rest,
        "tokenizer.ggml.merges": None,
        **{
            f"tokenizer.ggml.{name}_token_id": (index, gguf.GGUFValueType.UINT32)
            for name, index in (("unknown", 0), ("bos", 1), ("eos", 2))
        },
    }
    return copy_gguf(plain, plain.with_name("scored.gguf"), keys=keys)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_with_scores_merges_as_llama_cpp_does(prefix: bool, scored: Path, tmp_path: Path) -> None:
    path = copy_gguf(scored, tmp_path / "a.gguf", keys={"tokenizer.ggml.add_space_prefix": prefix})
    wanted = run_llama(path, PROMPTS[:1], VOCAB, texts=SPM_TEXTS).tokens
    for text, found, right in zip(SPM_TEXTS, ids(path, SPM_TEXTS), wanted, strict=True):
        assert found == right, text
    marked = ["[word]the", "a[word] b", "the<s>the</s>"]
    special = run_llama(path, PROMPTS[:1], VOCAB, texts=marked, parse_special=True).tokens
    assert ids(path, marked[:2]) == special[:2]


@pytest.mark.parametrize("kind", ["plain", "scored"])
@pytest.mark.parametrize(("bos", "eos"), [(None, None), (True, False), (False, False), (True, True), (False, True)])
def test_tokens_at_the_ends(
    kind: str, bos: bool | None, eos: bool | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What stands before and behind a text, by the file's keys, or by what is usual where it has none."""
    keys = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    path = copy_gguf(request.getfixturevalue(kind), tmp_path / "a.gguf", keys=keys)
    texts = ["hello the", "ab"]
    assert (
        ids(path, texts, add_special_tokens=True)
        == run_llama(path, PROMPTS[:1], VOCAB, texts=texts, add_special=True).tokens
    )


def test_tokenizers_that_cannot_be_read(plain: Path, scored: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (plain, {"tokenizer.ggml.model": "t5"}, "this kind of tokenizer .* got t5, wanted gpt2 or llama"),
        (plain, {"tokenizer.ggml.pre": "nobody's"}, 'no known way to cut text; got tokenizer.ggml.pre "nobody\'s"'),
        (plain, {"tokenizer.ggml.merges": ["zz yy"]}, "a merge of tokens that it lacks; got 'zz yy'"),
        (plain, {"tokenizer.ggml.tokens": ["a", "a"]}, "a token twice; got 'a'"),
        (
            plain,
            {"tokenizer.ggml.tokens": [str(n) for n in range(VOCAB + 1)]},
            f"got {VOCAB + 1}, wanted at most {VOCAB}",
        ),
        (scored, {"tokenizer.ggml.scores": [0.5]}, "tokenizer.ggml.scores is too short; got 1, wanted 900"),
        (scored, {"tokenizer.ggml.scores": None}, "SentencePiece tokenizer has no scores"),
    ]
    for number, (source, keys, message) in enumerate(cases):
        path = copy_gguf(source, tmp_path / f"{number}.gguf", keys=keys)
        with pytest.raises(StructPruneError, match=message):
            open_gguf(path)
