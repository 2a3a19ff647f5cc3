"""What is claimed about runtimes, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from structprune.architectures.sources.gguf_families import GGUF_FAMILIES
from structprune.exporters.runtimes import ResultShape, result_shape, runtimes
from structprune.kinds import Structure


def answers(**shape: Any) -> dict[str, tuple[str, str | None]]:
    fields = {"model_type": "llama", "structure": Structure.UNIFORM, "tied": False}
    return {r.runtime: (r.loads, r.basis) for r in runtimes(ResultShape(**{**fields, **shape}))}


def reason(runtime: str, **shape: Any) -> str:
    fields = {"model_type": "llama", "structure": Structure.UNIFORM, "tied": False}
    return next(r.reason for r in runtimes(ResultShape(**{**fields, **shape})) if r.runtime == runtime)


YES, READ, UNKNOWN = ("yes", "checked"), ("yes", "by its source"), ("unverified", None)
NO_READ, NO = ("no", "by its source"), ("no", None)
NAMES = ("transformers", "vLLM, native", "vLLM, Transformers backend", "SGLang", "llama.cpp")

CASES: list[tuple[dict[str, Any], tuple[tuple[str, str | None], ...]]] = [
    ({}, (YES, READ, UNKNOWN, READ, YES)),
    ({"model_type": "qwen3"}, (YES, READ, UNKNOWN, READ, YES)),
    # Model files that were not read are not vouched for.
    ({"model_type": "mistral"}, (YES, UNKNOWN, UNKNOWN, UNKNOWN, YES)),
    ({"model_type": "opt"}, (YES, UNKNOWN, UNKNOWN, UNKNOWN, NO)),
    ({"other_heads": True}, (YES, UNKNOWN, UNKNOWN, UNKNOWN, YES)),
    ({"model_type": "qwen2", "other_heads": True}, (YES, UNKNOWN, UNKNOWN, UNKNOWN, YES)),
    ({"model_type": "phi3", "other_heads": True}, (YES, UNKNOWN, UNKNOWN, UNKNOWN, NO_READ)),
    ({"structure": Structure.PER_LAYER}, (YES, NO_READ, READ, NO_READ, YES)),
    ({"structure": Structure.PER_LAYER, "model_type": "opt"}, (YES, NO_READ, READ, NO_READ, NO)),
    ({"structure": Structure.PER_LAYER, "removed_sublayers": True}, (YES, NO_READ, UNKNOWN, NO_READ, YES)),
    ({"structure": Structure.PER_LAYER, "model_type": "qwen3", "tied": True}, (YES, NO_READ, READ, NO_READ, YES)),
    ({"structure": Structure.PER_LAYER, "model_type": "qwen3"}, (YES, NO_READ, READ, NO_READ, NO_READ)),
    ({"structure": Structure.PER_LAYER, "model_type": "gemma2", "tied": True}, (YES, NO_READ, READ, NO_READ, NO)),
    ({"structure": Structure.PER_LAYER, "narrow_values": True}, (YES, NO_READ, NO_READ, NO_READ, NO)),
    ({"sliced": True}, (YES, NO, UNKNOWN, NO_READ, NO_READ)),
    ({"tensor_parallel": 2}, (YES, READ, UNKNOWN, READ, YES)),
    ({"tensor_parallel": 2, "indivisible": "block 3: intermediate_size 33"}, (YES, NO, NO, NO, YES)),
]


@pytest.mark.parametrize(("shape", "expected"), CASES, ids=lambda value: str(value)[:60])
def test_answers(shape: dict[str, Any], expected: tuple[tuple[str, str | None], ...]) -> None:
    assert answers(**shape) == dict(zip(NAMES, expected, strict=True))


def test_llama_cpp_names_the_architecture_that_export_writes() -> None:
    for model_type, family in GGUF_FAMILIES.items():
        assert f"architecture {family.uniform.architecture}," in reason("llama.cpp", model_type=model_type, tied=True)
        if family.uneven is not None:
            text = reason("llama.cpp", model_type=model_type, structure=Structure.PER_LAYER, tied=True)
            assert f"architecture {family.uneven.architecture}," in text


def test_sharing_is_named_in_the_reason() -> None:
    assert reason("SGLang", tensor_parallel=4).endswith("4 divides every block's heads and widths")
    text = reason("vLLM, native", tensor_parallel=4, indivisible="block 3: num_key_value_heads 5")
    assert text == "4 processes cannot share block 3: num_key_value_heads 5"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}, {}),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}, {}),
        (
            {"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 3, "head_dim": 16},
            {"model_type": "mistral", "other_heads": True},
        ),
        (
            {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 2, "head_dim": 16},
            {"model_type": "phi3", "other_heads": True},
        ),
        # Usual there.
        ({"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 3, "head_dim": 32}, {"model_type": "qwen3"}),
        (
            {"model_type": "llama", "per_layer_config": {"0": {"intermediate_size": 8}}},
            {"structure": Structure.PER_LAYER},
        ),
        (
            {"model_type": "llama", "per_layer_config": {"0": {}}, "structprune_removed": {"1": ["attention", "mlp"]}},
            {"structure": Structure.PER_LAYER},
        ),
        (
            {"model_type": "llama", "structprune_removed": {"1": ["mlp"]}},
            {"structure": Structure.PER_LAYER, "removed_sublayers": True},
        ),
        (
            {"model_type": "llama", "v_head_dim": 16, "per_layer_config": {"0": {"v_head_dim": 8}}},
            {"structure": Structure.PER_LAYER, "narrow_values": True},
        ),
        ({"model_type": "llama", "structprune_sliced": {"hidden_size": 64}}, {"sliced": True}),
    ],
)
def test_the_shape_is_read_from_the_config(config: dict[str, Any], expected: dict[str, Any]) -> None:
    fields = {"model_type": "llama", "structure": Structure.UNIFORM, "tied": True, **expected}
    assert result_shape(config, tied=True) == ResultShape(**fields)
