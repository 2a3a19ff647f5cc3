"""Small tokenizers of every kind whose tokens can be taken out, trained on invented words."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

RANDOM = random.Random(0)
SYLLABLES = ["".join(pair) for pair in itertools.product("bcdfglmnprst", "aeiou")]
WORDS = ["".join(RANDOM.choices(SYLLABLES, k=RANDOM.randint(1, 4))) for _ in range(300)]
TEXT = [" ".join(RANDOM.choices(WORDS[: 20 + line], k=6)) for line in range(280)] + ["été naïve straße", "x = 3.14 #"]
SPECIAL = ["<s>", "</s>", "<unused0>", "<unused1>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=560, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("</s>"), pad_token="</s>")
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Merges over characters with bytes for those that are no tokens, as LLaMA 2 and Gemma have them."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=240, special_tokens=["<unk>", *SPECIAL]))
    content = json.loads(trained.to_str())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    places = [f"<0x{byte:02X}>" for byte in range(256)]
    ordered = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    content["model"] |= {
        "vocab": {token: number for number, token in enumerate([*ordered[:5], *places, *ordered[5:]])},
        "byte_fallback": True,
        "unk_token": "<unk>",
        "fuse_unk": True,
    }
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(sep=("</s>", 2), cls_token=("<s>", 1))
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=260, special_tokens=["[UNK]", *SPECIAL]))
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "BPE with bytes": byte_fallback,
    "Unigram": unigram,
    "WordPiece": wordpiece,
}
