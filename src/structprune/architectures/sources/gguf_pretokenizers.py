r"""How text is cut before a byte-level BPE merges it, by the names that GGUF files have for it (`tokenizer.ggml.pre`).

A file holds no expressions, only a name, which stands for those of the model's tokenizer.json as llama.cpp applies
them: each in turn cuts the pieces that the last one left, and what it does not match stays a piece. That is what
tokenizers' `Split(..., "isolated")` does one after the other. tests/e2e/test_gguf_tokenizer.py compares every name with
llama.cpp on text of many kinds. Where llama.cpp's expression differs from the model's own (capital letters beyond ASCII
for tekken and gpt-4o), its own is taken: it says what the file's tokens are at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """One way to cut."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    """Whether a piece that is a token is taken as it is."""
    add_bos: bool = False
    """Whether a text starts with the start token, unless the file says otherwise."""


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CODE_MARKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_HAN_TO_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CASED_LETTERS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
_SENTENCE = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_MARKS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CODE_MARKS}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CODE_MARKS}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES
)
_BAILING = rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORDS}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"

DEFAULT = "default"

_LLAMA3_WORDS = PreTokenizer(expressions=(_LLAMA3,), ignore_merges=True, add_bos=True)
_THREE_DIGITS = PreTokenizer(expressions=(_LLAMA3,))
_ONE_DIGIT = PreTokenizer(expressions=(_QWEN2,))
_PLAIN = PreTokenizer(expressions=(_GPT2,))
_DIGITS_FIRST = PreTokenizer(expressions=(r"\p{N}", _GPT2))
_OPENAI = PreTokenizer(expressions=(_GPT4O,))
_DEEPSEEK_V3 = PreTokenizer(expressions=(r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3))
_SENTENCES = PreTokenizer(expressions=(_SENTENCE,))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    # The name that is written where several stand for the same comes first.
    "gpt-2": _PLAIN,
    "smollm": _DIGITS_FIRST,
    "qwen2": _ONE_DIGIT,
    "llama-bpe": _LLAMA3_WORDS,
    "dbrx": _THREE_DIGITS,
    "tekken": PreTokenizer(expressions=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": _OPENAI,
    "deepseek-llm": PreTokenizer(
        expressions=(
            r"[\r\n]",
            _CASED_LETTERS,
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN_TO_HANGUL,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(expressions=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_TO_HANGUL, r"\p{N}")),
    "deepseek-v3": _DEEPSEEK_V3,
    DEFAULT: PreTokenizer(expressions=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": PreTokenizer(expressions=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "qwen35": PreTokenizer(expressions=(_QWEN35,)),
    "bloom": _SENTENCES,
    "viking": PreTokenizer(expressions=(_SENTENCE, r"\p{N}")),
    "bailingmoe": PreTokenizer(expressions=(_BAILING,)),
    "seed-coder": PreTokenizer(expressions=(_SEED,)),
    **dict.fromkeys(
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"), _LLAMA3_WORDS
    ),
    **dict.fromkeys(("smaug-bpe", "glm4", "chatglm-bpe"), _THREE_DIGITS),
    **dict.fromkeys(
        ("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "kormo", "f2llmv2", "solar-open", "grok-2"), _ONE_DIGIT
    ),
    **dict.fromkeys(
        ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "a.x-4.0", "gigachat", "mellum"),
        _PLAIN,
    ),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS_FIRST
    ),
    **dict.fromkeys(("llama4", "kanana2", "minimax-m2"), _OPENAI),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm"), _DEEPSEEK_V3),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), _SENTENCES),
    **dict.fromkeys(("bailingmoe2", "llada-moe"), PreTokenizer(expressions=(_BAILING,))),
}
"""Name -> how it cuts."""
