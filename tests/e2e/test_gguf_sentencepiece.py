"""SentencePiece's tokenizers as GGUF: a stock llama.cpp gives the ids that the checkpoint's tokenizer gives."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import PROMPTS, SIZES, logprobs, randomised
from test_gguf_tokenizer import SPM_TEXTS, TEXTS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from structprune.api import export
from structprune.architectures.sources.gguf import open_gguf
from structprune.cli import main
from structprune.errors import StructPruneError, UnsupportedError
from structprune.exporters.gguf import sentencepiece
from structprune.exporters.gguf.entries import TokenTable
from structprune.exporters.gguf.spm_encoder import SpmEncoder
from structprune.exporters.gguf.unigram_encoder import UnigramEncoder
from structprune.observer import SilentObserver
from support.gguf_files import copy_gguf
from support.llama_runtime import run_llama

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 900
SPACE = "\u2581"
BYTES = [f"<0x{value:02X}>" for value in range(256)]
LLAMA_SPECIAL = ["<unk>", "<s>", "</s>"]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


LEARNT = (random.__doc__ or "").splitlines() + (json.__doc__ or "").splitlines()


def pieces(special: list[str]) -> models.BPE:
    """A BPE that learnt its pieces here and has a merge for each way to make one, as converters of SentencePiece do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    # Scripts that no piece is learnt of are spelled in bytes.
    learnt = [*LEARNT, *(text for text in TEXTS if text.isascii()), "\u00e9t\u00e9 na\u00efve \u4f60\u597d"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 40, special_tokens=[*special, *BYTES], min_frequency=1)
    tokenizer.train_from_iterator(learnt, trainer)
    vocabulary = tokenizer.get_vocab()
    for gap in (2, 3, 4):
        vocabulary[SPACE * gap] = len(vocabulary)
    pairs = [
        (token[:cut], token[cut:])
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        if token not in special
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    # Some can be made in more ways than the one that was learnt.
    assert len(pairs) > sum(len(token) > 1 for token in vocabulary if token not in BYTES)
    return models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def llama_like(special: list[str] = LLAMA_SPECIAL, **changes: Any) -> Tokenizer:
    """LLaMA 2's as it lies on the hub: a space in front of each piece of text between special tokens."""
    tokenizer = Tokenizer(pieces(special))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(tokenizer, special, "<s>", changes)


def gemma_like() -> Tokenizer:
    """Gemma's: no space in front; line ends and gaps are words that are marked in a text."""
    tokenizer = Tokenizer(pieces(GEMMA_SPECIAL))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    words = ["\n\n", "\n\n\n", "<h1>"]
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    return finished(tokenizer, GEMMA_SPECIAL, "<bos>", {})


def finished(tokenizer: Tokenizer, special: list[str], start: str, changes: dict[str, Any]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    index = tokenizer.token_to_id(start)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, index)]
    )
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class Case:
    tokenizer: Callable[[], Tokenizer]
    config: Callable[[], Any]
    settings: dict[str, Any]
    """Of tokenizer_config.json."""
    prefix: bool
    special: tuple[str, str]
    """Two marked tokens."""


LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}


def llama_config() -> Any:
    return LlamaConfig(**SIZES | {"vocab_size": VOCAB} | LLAMA_IDS)


CASES = {
    "LLaMA 2": Case(tokenizer=llama_like, config=llama_config, settings=LLAMA, prefix=True, special=("<s>", "</s>")),
    "Gemma 3": Case(
        tokenizer=gemma_like,
        config=lambda: Gemma3TextConfig(
            **SIZES | {"vocab_size": VOCAB, "num_hidden_layers": 6} | GEMMA_IDS,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
        ),
        settings=GEMMA,
        prefix=False,
        special=("<start_of_turn>", "<h1>"),
    ),
}
# As in test_gguf_tokenizer, and what no vocabulary here has.
PLAIN = [*TEXTS, *SPM_TEXTS, " a text behind a space", "\x01\x7f\ue000\U0010fffd", "\n\n\n\n a"]


class Notes(SilentObserver):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def checkpoint(folder: Path, tokenizer: Tokenizer, config: Any, **settings: Any) -> tuple[Path, Any]:
    model = randomised(config)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    return folder, model


def ids(folder: Path, texts: list[str], *, ends: bool = False) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, add_special_tokens=ends)["input_ids"] for text in texts]


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "tokenizer" in name}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_gives_the_tokenizers_ids(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source, model = checkpoint(tmp_path / "model", case.tokenizer(), case.config(), **case.settings)
    (source / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    observer = Notes()
    result = export(source, tmp_path / "a.gguf", dtype="float32", observer=observer)
    assert result.tokenizer == str(source / "tokenizer.json")
    assert observer.notes == []
    answers = run_llama(tmp_path / "a.gguf", PROMPTS, VOCAB, texts=PLAIN, add_special=True)
    for text, found, right in zip(PLAIN, answers.tokens, ids(source, PLAIN, ends=True), strict=True):
        assert found == right, text
    # Some are spelled in bytes.
    assert any(260 > token > 6 for token in answers.tokens[5])
    torch.testing.assert_close(
        answers.logprobs_NV, logprobs(model), rtol=0, atol=5e-3 if name.startswith("Gemma") else 1e-4
    )
    first, second = case.special
    marked = [f"{first}ab {first} hello{second}", f"a{first}b", f"{second}{first} a\n\nb", f"ab {second}"]
    found = run_llama(tmp_path / "a.gguf", PROMPTS[:1], VOCAB, texts=marked, parse_special=True).tokens
    assert found == ids(source, marked)


def test_what_the_file_says(tmp_path: Path) -> None:
    case = CASES["LLaMA 2"]
    tokenizer = case.tokenizer()
    tokenizer.add_tokens([AddedToken("[word]", normalized=False)])
    source, _ = checkpoint(tmp_path / "model", tokenizer, case.config(), **case.settings)
    (source / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    export(source, tmp_path / "a.gguf")
    found = {name.removeprefix("tokenizer.ggml."): value for name, value in fields(tmp_path / "a.gguf").items()}
    wanted = {"model": "llama", "pre": "default", "add_space_prefix": True, "remove_extra_whitespaces": False}
    wanted |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 0}
    wanted |= {"add_bos_token": True, "add_eos_token": False, "tokenizer.chat_template": "{{ messages }}"}
    assert {name: found.get(name) for name in wanted} == wanted
    vocabulary = tokenizer.get_vocab()
    tokens, kinds, scores = found["tokens"], found["token_type"], found["scores"]
    assert [tokens[index] for index in vocabulary.values()] == list(vocabulary)
    # Unknown, control, bytes, normal ones, the word, unused ones.
    assert kinds == [2, 3, 3, *[6] * 256, *[1] * (len(vocabulary) - 260), 4, *[5] * (VOCAB - len(vocabulary))]
    assert tokens[-1] == f"[PAD{VOCAB - 1}]"
    # The trainer numbers pieces in the order of their merges, behind the characters.
    merged = [index for index in range(259, len(vocabulary) - 1) if len(tokens[index]) > 1]
    assert [scores[index] for index in merged] == sorted({scores[index] for index in merged}, reverse=True)
    assert scores[merged[0]] == 0.0


def test_texts_that_llama_cpp_has_one_way_for(tmp_path: Path) -> None:
    """A space in front only where there is none, and not behind a special token: that is said, with an example."""
    special = [*LLAMA_SPECIAL, "[INST]"]
    tokenizer = llama_like(
        special, normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    )
    case = CASES["LLaMA 2"]
    source, _ = checkpoint(tmp_path / "model", tokenizer, case.config(), **case.settings)
    observer = Notes()
    export(source, tmp_path / "a.gguf", observer=observer)
    plain = [text for text in PLAIN if not text.startswith(" ")]
    assert run_llama(tmp_path / "a.gguf", PROMPTS[:1], VOCAB, texts=plain).tokens == ids(source, plain)
    texts = [" a", "a[INST]a"]
    found = run_llama(tmp_path / "a.gguf", PROMPTS[:1], VOCAB, texts=texts, parse_special=True).tokens
    right = ids(source, texts)
    assert [a == b for a, b in zip(found, right, strict=True)] == [False, False]
    assert len(observer.notes) == 1
    assert "of 15 texts that begin with a space, or hold marked tokens" in observer.notes[0]
    assert observer.notes[0].endswith(f"' a' gives ids {found[0]} instead of {right[0]}")


TINY = ["<unk>", "<s>", "</s>", *BYTES, "a", "b", "c", SPACE, "ab", "bc", "abc"]


def tiny(merges: list[tuple[str, str]], **changes: Any) -> Tokenizer:
    model = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True, **changes.pop("model", {})}
    tokens = changes.pop("tokens", TINY)
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, **model)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    return finished(tokenizer, LLAMA_SPECIAL, "<s>", changes)


ALL = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]


def test_merges_that_scores_cannot_say(tmp_path: Path) -> None:
    """Without a merge for `a bc` the tokenizer leaves the two apart; llama.cpp makes every token that it can."""
    case = CASES["LLaMA 2"]
    source, _ = checkpoint(tmp_path / "model", tiny(ALL[:3]), case.config(), **case.settings)
    with pytest.raises(UnsupportedError, match=r"llama\.cpp would cut a text otherwise") as caught:
        export(source, tmp_path / "a.gguf")
    message = str(caught.value)
    assert "for '\\nabc', wanted ids [13, 259, 264]. Pass --tokenizer-gguf" in message
    assert not (tmp_path / "a.gguf").exists()
    tiny(ALL).save(str(source / "tokenizer.json"))
    export(source, tmp_path / "b.gguf")
    assert run_llama(tmp_path / "b.gguf", PROMPTS[:1], VOCAB, texts=["abc"]).tokens == [[265]]


def with_model(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["model"] |= changes
    return Tokenizer.from_str(json.dumps(content))


REFUSED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "bytes": (lambda: tiny(ALL, tokens=[token for token in TINY if token != "<0xE2>"]), "no token for byte <0xE2>"),
    "merges": (lambda: tiny([]), "a BPE without merges"),
    "lower case": (
        lambda: tiny(ALL, normalizer=normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", SPACE)])),
        'normalizer and pre-tokenizer .*"Lowercase"',
    ),
    "unmarked spaces": (lambda: tiny(ALL, normalizer=None), r"normalizer and pre-tokenizer \[null, null\]"),
    "words": (
        lambda: tiny(ALL, pre_tokenizer=pre_tokenizers.Whitespace()),
        'normalizer and pre-tokenizer .*"Whitespace"',
    ),
    "ends of words": (lambda: tiny(ALL, model={"end_of_word_suffix": "</w>"}), "marks at parts of words"),
    "ends": (
        lambda: tiny(
            ALL,
            post_processor=processors.TemplateProcessing(
                single="<unk> $A", pair="<unk> $A $B", special_tokens=[("<unk>", 0)]
            ),
        ),
        r"no other tokens around a text .* got ids \[0\] for bos_token_id 1",
    ),
    "Unigram with bytes": (
        lambda: with_model(unigram(), byte_fallback=True),
        "a Unigram model with byte fallback, which llama.cpp's has not",
    ),
    "Unigram without unknown": (lambda: with_model(unigram(), unk_id=None), "a Unigram model without an unknown token"),
    "normal forms": (lambda: unigram(normalizer=normalizers.NFKC()), 'normalizer and pre-tokenizer .*"NFKC"'),
    "rows": (
        lambda: tiny(ALL, tokens=[*TINY, *(f"x{number}" for number in range(VOCAB))]),
        f"more tokens than the model's embedding has rows; got {len(TINY) + VOCAB}, wanted at most {VOCAB}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizers_without_a_form_are_refused(name: str, tmp_path: Path) -> None:
    tokenizer, message = REFUSED[name]
    case = CASES["LLaMA 2"]
    source, _ = checkpoint(tmp_path / "model", tokenizer(), case.config(), **case.settings)
    with pytest.raises(StructPruneError, match=f"{message}.*Pass --tokenizer-gguf"):
        export(source, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_folder_with_the_librarys_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tokenizer.model is what transformers makes of it; without the library the command says what to install."""
    source, _ = checkpoint(tmp_path / "model", llama_like(), llama_config(), **LLAMA)
    (source / "tokenizer.model").write_bytes(library_file(llama_like()))
    (source / "tokenizer.json").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if importlib.util.find_spec("sentencepiece") is not None:
        result = export(source, tmp_path / "a.gguf")
        assert result.tokenizer == str(source / "tokenizer.model")
        plain = [text for text in PLAIN if not text.startswith(" ")]
        assert run_llama(tmp_path / "a.gguf", PROMPTS[:1], VOCAB, texts=plain).tokens == ids(source, plain)
    monkeypatch.setattr(sentencepiece, "_SPM_PACKAGES", ("not_there", "google.not_there", "json"))
    with pytest.raises(SystemExit) as caught:
        main(["export", str(source), "-o", str(tmp_path / "b.gguf")])
    assert caught.value.code == 2
    assert (
        "tokenizer.model: tokenizer.model is read with further packages; got no not_there, no google.not_there. "
        "Pip install sentencepiece protobuf, or pass --tokenizer-gguf"
    ) in capsys.readouterr().err


def library_file(tokenizer: Tokenizer) -> bytes:
    # The library's own messages where it is installed: two of one name do not go together.
    proto: Any = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    for name, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        kind = 2 if name == "<unk>" else 3 if name in LLAMA_SPECIAL else 6 if name in BYTES else 1
        proto.pieces.add(piece=name, score=-float(index), type=kind)
    return proto.SerializeToString()


def check_encoder(
    kind: type[SpmEncoder] | type[UnigramEncoder], table: TokenTable, scores: list[float], texts: list[str], path: Path
) -> None:
    """The encoder gives llama.cpp's own ids, of the file with these tokens in the place of its own."""
    for prefix in (True, False):
        keys = {"tokens": list(table.tokens), "scores": scores, "token_type": list(table.types)}
        changed = copy_gguf(
            path,
            path.with_name(f"{prefix}.gguf"),
            keys={f"tokenizer.ggml.{name}": value for name, value in {**keys, "add_space_prefix": prefix}.items()},
        )
        wanted = run_llama(changed, PROMPTS[:1], VOCAB, texts=texts, parse_special=True).tokens
        encoder = kind(table, scores, add_space_prefix=prefix)
        for text, right in zip(texts, wanted, strict=True):
            assert encoder.encode(text) == right, text


def test_the_encoder_is_llama_cpps(tmp_path: Path) -> None:
    """On a vocabulary with scores in no order, overlapping marked words and random texts."""
    generator = random.Random(3)
    words = {"".join(generator.choices(f"ab{SPACE}\u00e9", k=generator.randint(2, 4))) for _ in range(120)}
    normal = ["a", "b", SPACE, *sorted(words)]
    marked = ["[x]", "[x][y]", "[y]", "b[x"]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *normal, *marked]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(normal), *[4] * len(marked)]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), VOCAB)]
    kinds += [5] * (VOCAB - len(kinds))
    # Few different ones: of equal scores the leftmost pair is merged.
    scores = [-float(generator.randrange(12)) for _ in tokens]
    case = CASES["LLaMA 2"]
    source, _ = checkpoint(tmp_path / "model", case.tokenizer(), case.config(), **case.settings)
    export(source, tmp_path / "a.gguf")
    texts = ["".join(generator.choices(["a", "b", " ", "\u00e9", "\U0001f642"], k=30)) for _ in range(40)]
    parts = ["a", " ", "[x]", "[y]", "b", "<s>", "</s>"]
    texts += ["".join(generator.choices(parts, k=12)) for _ in range(40)]
    table = TokenTable(tokens=tuple(tokens), types=tuple(kinds))
    check_encoder(SpmEncoder, table, scores, texts, tmp_path / "a.gguf")


def unigram(**changes: Any) -> Tokenizer:
    """The likeliest pieces of words, a space in front of each piece of text, as T5 has them."""
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=LLAMA_SPECIAL, unk_token="<unk>")
    model.train_from_iterator([*LEARNT, *(text for text in TEXTS if text.isascii())], trainer)
    # SentencePiece's scores are float32, by which sums of equal pieces in another order are equal.
    vocabulary = json.loads(model.to_str())["model"]["vocab"]
    rounded = torch.tensor([score for _, score in vocabulary]).tolist()
    pairs = [(token, score) for (token, _), score in zip(vocabulary, rounded, strict=True)]
    tokenizer = Tokenizer(models.Unigram(pairs, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return finished(tokenizer, LLAMA_SPECIAL, "<s>", changes)


def test_the_likeliest_pieces(tmp_path: Path) -> None:
    tokenizer = unigram()
    source, model = checkpoint(tmp_path / "model", tokenizer, llama_config(), **LLAMA)
    export(source, tmp_path / "a.gguf", dtype="float32")
    found = {name.removeprefix("tokenizer.ggml."): value for name, value in fields(tmp_path / "a.gguf").items()}
    assert (found["model"], found["unknown_token_id"], found["add_bos_token"]) == ("t5", 0, True)
    own = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    assert [scores[token] for token in own] == list(own.values())
    plain = [text for text in PLAIN if not text.startswith(" ")]
    answers = run_llama(tmp_path / "a.gguf", PROMPTS, VOCAB, texts=plain, add_special=True)
    for text, ran, right in zip(plain, answers.tokens, ids(source, plain, ends=True), strict=True):
        assert ran == right, text
    torch.testing.assert_close(answers.logprobs_NV, logprobs(model), rtol=0, atol=1e-4)
    marked = ["<s>ab <s>hello</s>", "a<s>b", "</s><s>a"]
    ran = run_llama(tmp_path / "a.gguf", PROMPTS[:1], VOCAB, texts=marked, parse_special=True).tokens
    assert ran == ids(source, marked)


def test_the_other_encoder_is_llama_cpps(tmp_path: Path) -> None:
    """On pieces with scores by chance, marked words among them, and texts with characters that are none."""
    generator = random.Random(5)
    words = {"".join(generator.choices(f"ab{SPACE}\u00e9", k=generator.randint(2, 4))) for _ in range(120)}
    normal = ["a", "b", SPACE, *sorted(words)]
    tokens = ["<unk>", "<s>", "</s>", *normal, "[x]", "[x]b"]
    kinds = [2, 3, 3, *[1] * len(normal), 4, 4]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), VOCAB)]
    kinds += [5] * (VOCAB - len(kinds))
    scores = [-generator.uniform(1, 12) * (2 if len(token) == 1 else 1) for token in tokens]
    source, _ = checkpoint(tmp_path / "model", unigram(), llama_config(), **LLAMA)
    export(source, tmp_path / "a.gguf")
    parts = ["a", "b", " ", "\u00e9", "\U0001f642", "[x]", "<s>"]
    texts = ["".join(generator.choices(parts[:5], k=30)) for _ in range(40)]
    texts += ["".join(generator.choices(parts, k=12)) for _ in range(40)]
    table = TokenTable(tokens=tuple(tokens), types=tuple(kinds))
    check_encoder(UnigramEncoder, table, scores, texts, tmp_path / "a.gguf")


def test_a_tokenizer_that_was_read_from_a_gguf(tmp_path: Path) -> None:
    """GGUF to checkpoint to GGUF: the same tokens, types, tasks and ids."""
    case = CASES["Gemma 3"]
    source, _ = checkpoint(tmp_path / "model", case.tokenizer(), case.config(), **case.settings)
    export(source, tmp_path / "a.gguf")
    read = open_gguf(tmp_path / "a.gguf").directory
    found = sentencepiece.sentencepiece_tokenizer(read, VOCAB, None)
    assert found.notes == ()
    first = fields(tmp_path / "a.gguf")
    second = {entry.key: entry.value for entry in found.entries}
    assert list(second["tokenizer.ggml.tokens"]) == first["tokenizer.ggml.tokens"]
    # A checkpoint does not tell unused tokens, which fill the rows up, from normal ones that nothing makes.
    kinds = [1 if kind == 5 else kind for kind in first["tokenizer.ggml.token_type"]]
    assert list(second["tokenizer.ggml.token_type"]) == kinds
    tasks = {name for name in first if name.endswith("_id") or ".add_" in name}
    assert {name: second.get(name) for name in tasks} == {name: first[name] for name in tasks}
    keys = {name: second[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")}
    path = copy_gguf(
        tmp_path / "a.gguf",
        tmp_path / "b.gguf",
        keys={f"tokenizer.ggml.{name}": list(value) for name, value in keys.items()},
    )
    assert run_llama(path, PROMPTS[:1], VOCAB, texts=PLAIN).tokens == ids(source, PLAIN)
