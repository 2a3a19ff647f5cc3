"""Damaged and hostile input, 2,000 cases: each ends in one of our errors or in success, soon and in little memory."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from structprune.api import check, inspect
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from structprune.errors import StructPruneError
from structprune.memory import PeakMeter
from structprune.recipe import Recipe, all_fields

pytestmark = pytest.mark.usefixtures("one_thread")

# The same cases on every machine; a case that hangs fails by its deadline, generous because cores may be shared.
FUZZ = settings(
    max_examples=500,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**31, 2**63 - 1, 2**64, -(2**63), 10**12, 10**400])
    | st.floats()
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5), "c": torch.ones(2, 2)}


@pytest.fixture(autouse=True)
def little_memory() -> Generator[None]:
    with PeakMeter() as meter:
        yield
    assert meter.peak_bytes < 2**29


@contextlib.contextmanager
def refusals_only() -> Generator[None]:
    """Inside the context one of our errors may be raised, whose text is neither empty nor endless."""
    message = None
    try:
        yield
    except StructPruneError as error:
        message = str(error)
    assert message is None or 0 < len(message) < 5000, message


def read_all(directory: Path) -> None:
    """Everything that a checkpoint's reader does, or one of our errors."""
    with refusals_only():
        reader = CheckpointReader(directory)
        for name, tensor in reader.read(reader.shapes).items():
            assert tuple(tensor.shape) == reader.shapes[name]
        reader.fingerprint()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file(TENSORS, tmp_path / SINGLE_NAME)
    return tmp_path


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "U8"]) | JSON,
        "shape": st.lists(st.integers(-1, 6) | st.sampled_from([2**32, 2**63, 2**64]), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-4, 90) | st.sampled_from([2**40, 2**64 - 1]), min_size=2, max_size=2)
        | JSON,
    },
)
HEADERS = st.dictionaries(st.sampled_from([*TENSORS, "d", ""]) | st.text(max_size=5), ENTRY | JSON, max_size=4)


@FUZZ
@given(
    header=HEADERS,
    keep=st.booleans(),
    length=st.none() | st.integers(-20, 40) | st.sampled_from([2**31, 2**63, 2**64 - 1]),
    cut=st.integers(0, 120),
)
@example(header={}, keep=True, length=2**63, cut=0)
@example(
    header={"a.weight": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}},
    keep=True,
    length=None,
    cut=0,
)
def test_safetensors_headers(header: Any, keep: bool, length: int | None, cut: int, weights: Path) -> None:
    """Entries of the header exchanged, its stated length wrong, the file cut short."""
    whole = save_and_split(weights)
    text = json.dumps(({**whole[0], **header}) if keep else header).encode()
    stated = len(text)
    if length is not None:
        stated = length % 2**64 if abs(length) > 100 else max(0, stated + length)
    content = struct.pack("<Q", stated) + text + whole[1]
    (weights / SINGLE_NAME).write_bytes(content[: len(content) - cut])
    read_all(weights)


def save_and_split(directory: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of the file that the tensors make."""
    save_file(TENSORS, directory / SINGLE_NAME)
    content = (directory / SINGLE_NAME).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


NAMES = st.sampled_from(
    ["one.safetensors", "../one.safetensors", "/etc/passwd", "a/b", ".", "..", "", "~", "config.json"]
)


@FUZZ
@given(
    index=st.fixed_dictionaries(
        {
            "weight_map": st.dictionaries(
                st.sampled_from(list(TENSORS)) | st.text(max_size=5), NAMES | JSON, max_size=4
            )
            | JSON
        }
    )
    | JSON,
    raw=st.none() | st.binary(max_size=20),
)
@example(index={"weight_map": dict.fromkeys(TENSORS, "one.safetensors")}, raw=None)
def test_index_files(index: Any, raw: bytes | None, weights: Path) -> None:
    if (weights / SINGLE_NAME).exists():
        (weights / SINGLE_NAME).rename(weights / "one.safetensors")
    (weights / INDEX_NAME).write_bytes(json.dumps(index).encode() if raw is None else raw)
    read_all(weights)


@pytest.fixture
def copy_of_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "llama")
    return tmp_path / "llama"


FIELDS = [
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "rope_parameters",
    "rope_theta",
    "tie_word_embeddings",
    "attention_bias",
    "per_layer_config",
    "dtype",
    "architectures",
    "auto_map",
    "quantization_config",
    "layer_types",
    "num_experts",
    "sliding_window",
]
MODEL_TYPES = st.sampled_from(["llama", "mistral", "opt", "gpt2", "gpt_neox", "phi3", "qwen2", "qwen3", "qwen3_moe"])
CHANGES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON, min_size=1, max_size=3) | st.builds(
    lambda kind, rest: rest | {"model_type": kind},
    MODEL_TYPES,
    st.dictionaries(st.sampled_from(FIELDS), SCALARS, max_size=2),
)


@FUZZ
@given(changes=CHANGES, without=st.lists(st.sampled_from(FIELDS), max_size=2))
@example(changes={"num_hidden_layers": 10**12}, without=[])
@example(changes={"model_type": "gpt2", "n_layer": 10**9}, without=[])
@example(changes={"model_type": "qwen3_moe", "num_experts": 10**9}, without=[])
@example(changes={"model_type": "qwen2", "num_hidden_layers": 10**9, "layer_types": None}, without=[])
def test_configs(changes: dict[str, Any], without: list[str], copy_of_llama: Path, tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text()) | changes
    content = json.dumps({name: value for name, value in config.items() if name not in without})
    (copy_of_llama / "config.json").write_text(content)
    with refusals_only():
        inspect(copy_of_llama)


CHOICES: dict[str, list[Any]] = {
    "method": ["fasp", "structprune", "slicegpt", "depth", "flap", "llm-pruner", "osscar", "spap"],
    "sparsity": [0.0, 0.3, 0.999999, 1, "0.5", 1e-300],
    "scope": ["mlp", "attention", "all"],
    "score": ["wanda", "loss", "greedy", "taylor-first", "angular"],
    "allocator": ["uniform", "closed-form", "energy", "standardised"],
    "solver": ["mask-only", "bias", "least-squares", "admm", "alternating"],
    "structure": ["uniform", "per-layer"],
    "target": ["local", "dense-path"],
    "damping": ["auto", 0.01, 1],
    "memory": ["4GiB", "1e9", 10**18, "1" * 400],
    "device": ["cpu", "cuda", "cuda:99", "meta", "cpu:1"],
    "multiple_of": [1, 8, 2**62],
    "head_units": ["kv-group", "query-head"],
    "num_samples": [1, 2, 2**62],
    "seq_len": [2, 2**62],
    "tensor_parallel": [1, 2, 2**62],
    "protect_first": [0, 1, 2**62],
}
VALUES = st.one_of(*[st.tuples(st.just(name), st.sampled_from(values)) for name, values in CHOICES.items()])
RECIPES = st.lists(VALUES, max_size=4).map(dict) | st.dictionaries(
    st.sampled_from(list(all_fields())) | st.text(max_size=6), JSON, max_size=3
)
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(9)
)


@FUZZ
@given(content=RECIPES.map(yaml.safe_dump) | st.text(max_size=60))
@example(content=BOMB + "sparsity: *j\n")
@example(content="method: !!python/object/apply:os.system ['touch owned']\n")
@example(content="? [a]\n: b\n")
@example(content="memory: 0x7fffffffffffffffffffffff\n")
def test_recipes(content: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Read as YAML, and where it makes a recipe, checked against a model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8", errors="replace")
    with refusals_only():
        recipe = Recipe.from_yaml(path)
        check(tiny_llama, recipe.model_copy(update={"dtype": "float32"}))
    assert sorted(tmp_path.iterdir()) == [path]
