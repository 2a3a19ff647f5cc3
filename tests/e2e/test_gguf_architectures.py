"""GGUF architectures of types without a family file: written, loaded by a stock llama.cpp, and read again.

Each model gives llama.cpp the log-probabilities that it has in transformers, and comes back from its file as the
weights and the config that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf import PROMPTS, assert_same, pruned, stock_checkpoint
from transformers import CONFIG_MAPPING, AutoTokenizer

from structprune.api import export
from structprune.architectures.gguf.table import GGUF_FAMILIES
from structprune.architectures.sources.gguf import open_gguf
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel
from structprune.errors import StructPruneError, UnsupportedError
from support.gguf_files import copy_gguf
from support.gguf_models import GELU, MODELS, SIZES, UNDESCRIBED, VOCAB, WRITTEN_AS_ANOTHER, config_of, rope
from support.llama_runtime import run_llama
from support.streamed import streamed_logits

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

# Streamed in every run of the tests; the rest are slow, for each is traced first.
STREAMED = ("granite", "phi", "mixtral", "falcon_h1")


def atol_of(name: str) -> float:
    return 5e-3 if MODELS[name][0] in GELU else 1e-4


def written(name: str, folder: Path) -> tuple[Path, Any]:
    """The model's file, and the model."""
    source, model = stock_checkpoint(config_of(name), folder / "model")
    result = export(source, folder / "model.gguf", dtype="float32")
    assert result.architecture == MODELS[name][2]
    return folder / "model.gguf", model


@pytest.mark.parametrize(
    # One model of each type in every run of the tests.
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "," in name else ()) for name in MODELS],
)
def test_written_and_read(name: str, tmp_path: Path) -> None:
    path, model = written(name, tmp_path)
    assert_same(path, model, atol=atol_of(name))
    whole = load_model(open_gguf(path), torch.device("cpu"), torch.float32)
    if not has_factors(model.config):
        assert_same_config(whole.config, config_of(name))
        wanted = dict(model.state_dict())
        for tensor, value in whole.state_dict().items():
            # Norms that are stored as 1 + weight come back rounded, and so do logarithms.
            rounded = "norm" in tensor or tensor.endswith("A_log")
            torch.testing.assert_close(value, wanted[tensor], rtol=0, atol=2.4e-7 if rounded else 0)
    for ids in PROMPTS:
        ids_BS = torch.tensor([ids])
        logits = model(input_ids=ids_BS).logits
        torch.testing.assert_close(whole(input_ids=ids_BS).logits, logits, rtol=0, atol=2e-5)


def has_factors(config: Any) -> bool:
    """Whether the file has weights that the config's factors were multiplied into."""
    return config.model_type == "falcon_h1" and config.lm_head_multiplier != 1.0


# What no file says, and what is said otherwise: where the file has a head of its own, it is one.
SILENT = {
    *("dtype", "architectures", "transformers_version", "initializer_range", "tie_word_embeddings", "_name_or_path")
}


def assert_same_config(found: Any, wanted: Any) -> None:
    first, second = found.to_dict(), wanted.to_dict()
    for name, value in second.items():
        if isinstance(value, dict) and "model_type" in value:
            assert_same_config(getattr(found, name), getattr(wanted, name))
        elif name not in SILENT and "drop" not in name:
            assert first.get(name) == value, name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in STREAMED else pytest.mark.slow)
        for name in MODELS
        if MODELS[name][0] not in UNDESCRIBED
    ],
)
def test_streamed_block_by_block(name: str, tmp_path: Path) -> None:
    path, model = written(name, tmp_path)
    stock = StockModel(open_gguf(path))
    for ids in PROMPTS:
        ids_BS = torch.tensor([ids])
        wanted = model(input_ids=ids_BS).logits
        torch.testing.assert_close(streamed_logits(stock, ids_BS), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", WRITTEN_AS_ANOTHER)
def test_written_as_another(model_type: str, tmp_path: Path) -> None:
    read_as, own = WRITTEN_AS_ANOTHER[model_type]
    source, model = stock_checkpoint(CONFIG_MAPPING[model_type](**{**SIZES, **own}), tmp_path / "model")
    result = export(source, tmp_path / "model.gguf", dtype="float32")
    assert result.architecture == GGUF_FAMILIES[read_as].uniform.architecture
    assert_same(tmp_path / "model.gguf", model)
    read = load_model(open_gguf(tmp_path / "model.gguf"), torch.device("cpu"), torch.float32)
    assert read.config.model_type == read_as
    ids_BS = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(read(ids_BS).logits, model(ids_BS).logits, rtol=0, atol=2e-5)


def without(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a file's tensors: names with a double underscore for a dot -> a tensor, or None to take it away."""

    def change(tensors: dict[str, Any]) -> None:
        for name, value in changes.items():
            plain = name.replace("__", ".")
            if value is None:
                del tensors[plain]
            else:
                tensors[plain] = value

    return change


U32 = gguf.GGUFValueType.UINT32
ONES = np.ones(64, dtype=np.float32)
# What was added to or taken from the file of a model -> what is said of it.
UNREADABLE: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "no rotary positions": (
        "granite",
        {"keys": {"granite.rope.scaling.finetuned": False}},
        r"something that the stock model does not; got granite\.rope\.scaling\.finetuned False",
    ),
    "a scale of attention": ("phi", {"keys": {"phi2.attention.scale": 0.5}}, "'phi2.attention.scale' has no reader"),
    "a bias that stock code lacks": (
        "smollm3",
        {"change": without(blk__0__attn_output__bias=ONES)},
        "tensor 'blk.0.attn_output.bias' has no reader",
    ),
    "another bias of distances": (
        "mpt",
        {"keys": {"mpt.attention.max_alibi_bias": 4.0}},
        r"got mpt\.attention\.max_alibi_bias 4\.0, wanted 8\.0",
    ),
    "a window that llama.cpp has not": (
        "exaone4",
        {"keys": {"exaone4.attention.sliding_window": (8, U32)}},
        "has attention windows with 64 blocks, and with no other number; got 3 blocks with windows",
    ),
    "one base for each kind of attention": (
        "cohere2",
        {"keys": {"cohere2.rope.freq_base_swa": 500.0}},
        "the blocks of this model turn with one base",
    ),
    "keys and values in one tensor, as older converters wrote them": (
        "deepseek_v3",
        {"change": without(blk__0__attn_k_b__weight=None, blk__0__attn_kv_b__weight=np.ones((112, 32)))},
        r"'blk\.0\.attn_k_b\.weight' is missing in the GGUF file",
    ),
    "blocks that predict more tokens": (
        "glm4_moe",
        {"keys": {"glm4moe.nextn_predict_layers": (1, U32)}},
        "'glm4moe.nextn_predict_layers' has no reader",
    ),
    "attention in blocks that no two numbers say": (
        "jamba",
        {"change": lambda tensors: tensors.update({"blk.2.attn_q.weight": tensors["blk.1.attn_q.weight"]})},
        r"stock code has attention in equally spaced blocks; got blocks \[1, 2, 4\] of 5",
    ),
    "MLPs of another width": (
        "bloom",
        {"keys": {"bloom.feed_forward_length": (128, U32)}},
        "MLPs of this architecture have a fixed width in transformers; got 128 channels",
    ),
    "a mixture of another kind": (
        "arcee",
        {"keys": {"arcee.expert_count": (4, U32)}},
        r"a variant of its architecture that cannot be read; got architecture arcee with 4 experts",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_would_be_lost_is_named(case: str, tmp_path: Path) -> None:
    name, changes, message = UNREADABLE[case]
    path, _ = written(name, tmp_path)
    with pytest.raises(StructPruneError, match=message):
        open_gguf(copy_gguf(path, tmp_path / "changed.gguf", **changes))


# A config that llama.cpp computes otherwise -> what is said of it.
UNWRITABLE: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "positions in other blocks": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0, 1]},
        "turns no head in every block number divisible by 4, and in no other",
    ),
    "windows in other blocks": (
        "olmo3",
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "full attention in every block number divisible by 4",
    ),
    "windows in a model of other size": (
        "exaone4",
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3},
        "has attention windows with 64 blocks",
    ),
    "two norms of queries and keys": ("cohere", {"use_qk_norm": True}, "otherwise; got use_qk_norm True, wanted False"),
    "biases that it does not read": ("cohere", {"attention_bias": True}, "has no place for 12 tensor"),
    "a bias of distances": ("falcon", {"alibi": True}, "otherwise; got alibi True, wanted False"),
    "a part of each head": ("granite", rope("default", partial_rotary_factor=0.5), "turns whole heads; got 8 of 16"),
    "scores of another scale": ("mpt", {"attn_config": {"softmax_scale": 0.3}}, "scales scores by the size of heads"),
    "two factors of one matrix": (
        "falcon_h1",
        {"tie_word_embeddings": True},
        "has one embedding and head, and no factors of either",
    ),
    "a clamp of another gate": ("gpt_oss", {"swiglu_limit": 5.0}, "otherwise; got swiglu_limit 5.0, wanted 7.0"),
    "frequencies that are not cut": (
        "gpt_oss",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False),
        "does not have this scaling of the rotary positions",
    ),
    "groups of heads": ("olmoe", {"num_key_value_heads": 2}, "has keys and values for every head; got 2 KV heads"),
    "a narrower recurrence": ("jamba", {"mamba_expand": 1}, "recurrences of twice the hidden size"),
    "queries without latents": (
        "deepseek_v3",
        {"q_lora_rank": None},
        "has queries without latents with 26 or 27 blocks",
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_refused(case: str, tmp_path: Path) -> None:
    name, changes, message = UNWRITABLE[case]
    source, _ = stock_checkpoint(config_of(name, **changes), tmp_path / "model")
    with pytest.raises(UnsupportedError, match=message):
        export(source, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


# No config says the widths of these types' MLPs.
OWN_MLP = ("bloom", "mpt")
USUAL: Mapping[str, Any] = {"method": "fasp", "structure": "uniform", "sparsity": 0.25, "multiple_of": 8}
PRUNED: Mapping[str, Mapping[str, Any]] = {
    **{name: USUAL for name in MODELS if "," not in name and MODELS[name][0] not in (*UNDESCRIBED, *OWN_MLP)},
    "granite": {**USUAL, "scope": "all", "head_units": "kv-group", "multiple_of": 1},
    "olmo2": {"method": "depth", "sparsity": 0.3},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in STREAMED else pytest.mark.slow) for name in PRUNED]
)
@pytest.mark.usefixtures("modules_cache")
def test_a_file_is_pruned_and_written_again(name: str, text_file: Path, tmp_path: Path) -> None:
    """From one GGUF file to the next, which llama.cpp loads; the tokenizer is the first one's."""
    path, _ = written(name, tmp_path)
    output = pruned(path, text_file, tmp_path / "out", **PRUNED[name])
    result = export(output, tmp_path / "small.gguf")
    assert (result.architecture, result.tokenizer) == (MODELS[name][2], str(path))
    assert (tmp_path / "small.gguf").stat().st_size < path.stat().st_size
    assert_same(tmp_path / "small.gguf", load_model(output, torch.device("cpu"), torch.float32), atol=atol_of(name))


def test_a_split_file(tmp_path: Path) -> None:
    """Stacked experts in several files."""
    path, model = written("granitemoe", tmp_path)
    first = copy_gguf(path, tmp_path / "parts.gguf", tensors_per_file=11)
    assert first.name == "parts-00001-of-00003.gguf"
    whole = load_model(open_gguf(first), torch.device("cpu"), torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name
    first.with_name("parts-00003-of-00003.gguf").unlink()
    with pytest.raises(StructPruneError, match=r"part 1 of 3 .* missing; got no parts-00003-of-00003\.gguf"):
        open_gguf(first)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "falcon_h1, plain"])
def test_quantised_weights(name: str, tmp_path: Path) -> None:
    """Matrices in eight bits, stacked ones too: what is read is what ggml's own dequantisation makes of them."""
    path, _ = written(name, tmp_path)
    exact = copy_gguf(path, tmp_path / "exact.gguf", rounded=gguf.GGMLQuantizationType.Q8_0)
    small = copy_gguf(path, tmp_path / "small.gguf", quantise=gguf.GGMLQuantizationType.Q8_0)
    found, wanted = open_gguf(small, torch.float32), open_gguf(exact, torch.float32)
    for tensor in wanted.shapes:
        assert torch.equal(found.read([tensor])[tensor], wanted.read([tensor])[tensor]), tensor


def test_the_tokenizer_is_the_files(tmp_path: Path) -> None:
    """The same ids in the checkpoint, in what its file is read as, and in llama.cpp."""
    path, _ = written("granite", tmp_path)
    texts = ["12 345  x1", "  ab  caf\u00e9 \u00e0 la cr\u00e8me\n\n1234567", "na\u00efve 3,14 \u2014 ab"]
    folders = (tmp_path / "model", open_gguf(path).directory)
    ids = [[AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in texts] for folder in folders]
    assert ids[0] == ids[1] == run_llama(path, PROMPTS[:1], VOCAB, texts=texts).tokens
