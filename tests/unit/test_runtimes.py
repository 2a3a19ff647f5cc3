"""What is claimed about runtimes, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from structprune.architectures.gguf.table import GGUF_FAMILIES
from structprune.exporters.runtimes import ResultShape, result_shape, runtimes
from structprune.kinds import Structure


def answers(**shape: Any) -> dict[str, tuple[str, str | None]]:
    fields = {"model_type": "llama", "structure": Structure.UNIFORM, "tied": False}
    return {r.runtime: (r.loads, r.basis) for r in runtimes(ResultShape(**{**fields, **shape}))}


def reason(runtime: str, **shape: Any) -> str:
    fields = {"model_type": "llama", "structure": Structure.UNIFORM, "tied": False}
    return next(r.reason for r in runtimes(ResultShape(**{**fields, **shape})) if r.runtime == runtime)


YES, READ, UNKNOWN = ("yes", "checked"), ("yes", "by its source"), ("unverified", None)
NO_RUN, NO_READ, NO = ("no", "checked"), ("no", "by its source"), ("no", None)
# Of a stock config.
NAMES = ("transformers", "vLLM, native", "vLLM, Transformers backend", "SGLang", "llama.cpp")
# Of one with a modelling file, where vLLM is asked for what `export` makes of it too.
UNEVEN_NAMES = ("transformers", "vLLM, native", "vLLM, Transformers backend", "vLLM, exported", "SGLang", "llama.cpp")

CASES: list[tuple[dict[str, Any], tuple[tuple[str, str | None], ...]]] = [
    ({}, (YES, YES, YES, READ, YES)),
    ({"model_type": "qwen3"}, (YES, YES, YES, READ, YES)),
    # What SGLang does with them was not read.
    ({"model_type": "mistral"}, (YES, YES, YES, UNKNOWN, YES)),
    ({"model_type": "opt"}, (YES, YES, YES, UNKNOWN, NO)),
    ({"model_type": "gpt2"}, (YES, YES, NO_RUN, UNKNOWN, YES)),
    # A family that vLLM was not run with is not vouched for.
    ({"model_type": "granite"}, (YES, UNKNOWN, UNKNOWN, UNKNOWN, YES)),
    ({"other_heads": True}, (YES, YES, YES, UNKNOWN, YES)),
    ({"model_type": "qwen2", "other_heads": True}, (YES, NO_RUN, YES, UNKNOWN, YES)),
    ({"model_type": "phi3", "other_heads": True}, (YES, YES, YES, UNKNOWN, NO_READ)),
    ({"tensor_parallel": 2}, (YES, YES, YES, READ, YES)),
    ({"tensor_parallel": 2, "indivisible": "block 3: intermediate_size 33"}, (YES, NO, NO, NO, YES)),
]
UNEVEN_CASES: list[tuple[dict[str, Any], tuple[tuple[str, str | None], ...]]] = [
    ({}, (YES, NO_RUN, YES, YES, NO_READ, YES)),
    ({"model_type": "opt"}, (YES, NO_RUN, YES, NO, NO_READ, NO)),
    ({"model_type": "gpt2"}, (YES, NO_RUN, NO_RUN, NO, NO_READ, NO)),
    ({"model_type": "granite"}, (YES, NO_RUN, UNKNOWN, NO, NO_READ, NO)),
    ({"removed_sublayers": True}, (YES, NO_RUN, YES, YES, NO_READ, YES)),
    ({"removed_sublayers": True, "removed_attention": True}, (YES, NO_RUN, NO_RUN, YES, NO_READ, YES)),
    (
        {"removed_sublayers": True, "removed_attention": True, "starts_without_attention": True},
        (YES, NO_RUN, NO_RUN, NO_READ, NO_READ, YES),
    ),
    ({"query_heads": "uneven"}, (YES, NO_RUN, YES, NO_READ, NO_READ, YES)),
    ({"query_heads": "unknown"}, (YES, NO_RUN, YES, UNKNOWN, NO_READ, YES)),
    ({"model_type": "qwen3", "tied": True}, (YES, NO_RUN, YES, NO, NO_READ, YES)),
    ({"model_type": "qwen3"}, (YES, NO_RUN, YES, NO, NO_READ, NO_READ)),
    ({"model_type": "qwen3_moe", "uneven_experts": True}, (YES, NO_RUN, NO_RUN, NO, NO_READ, NO)),
    ({"model_type": "qwen3_moe"}, (YES, NO_RUN, YES, NO, NO_READ, NO)),
    ({"model_type": "gemma2", "tied": True}, (YES, NO_RUN, YES, NO, NO_READ, NO)),
    ({"narrow_values": True}, (YES, NO_RUN, NO_RUN, NO_READ, NO_READ, NO)),
    ({"structure": Structure.UNIFORM, "sliced": True}, (YES, NO_RUN, YES, NO_READ, NO_READ, NO_READ)),
]


@pytest.mark.parametrize(("shape", "expected"), UNEVEN_CASES, ids=lambda value: str(value)[:60])
def test_answers_for_uneven_blocks(shape: dict[str, Any], expected: tuple[tuple[str, str | None], ...]) -> None:
    found = answers(**{"structure": Structure.PER_LAYER, **shape})
    assert found == dict(zip(UNEVEN_NAMES, expected, strict=True))


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
            {"structure": Structure.PER_LAYER, "removed_attention": True},
        ),
        (
            {"model_type": "llama", "structprune_removed": {"1": ["mlp"]}},
            {"structure": Structure.PER_LAYER, "removed_sublayers": True},
        ),
        (
            {"model_type": "llama", "v_head_dim": 16, "per_layer_config": {"0": {"v_head_dim": 8}}},
            {"structure": Structure.PER_LAYER, "narrow_values": True},
        ),
        (
            # A block that passes the stream on is no beginning.
            {"model_type": "llama", "structprune_removed": {"0": ["attention", "mlp"], "1": ["attention"]}},
            {
                "structure": Structure.PER_LAYER,
                "removed_sublayers": True,
                "removed_attention": True,
                "starts_without_attention": True,
            },
        ),
        (
            {
                "model_type": "llama",
                "num_attention_heads": 4,
                "per_layer_config": {"00": {"num_attention_heads": 2}, "01": {}, "02": {"num_attention_heads": 4}},
                "structprune_removed": {"0": ["attention"]},
            },
            {
                "structure": Structure.PER_LAYER,
                "removed_sublayers": True,
                "removed_attention": True,
                "starts_without_attention": True,
            },
        ),
        (
            {
                "model_type": "llama",
                "num_attention_heads": 4,
                "per_layer_config": {"0": {"num_attention_heads": 2}, "1": {}},
            },
            {"structure": Structure.PER_LAYER, "query_heads": "uneven"},
        ),
        (
            {
                "model_type": "qwen3_moe",
                "moe_intermediate_size": 48,
                "per_layer_config": {"0": {"moe_intermediate_size": 48}, "1": {"moe_intermediate_size": 24}},
            },
            {"model_type": "qwen3_moe", "structure": Structure.PER_LAYER, "uneven_experts": True},
        ),
        ({"model_type": "llama", "structprune_sliced": {"hidden_size": 64}}, {"sliced": True}),
    ],
)
def test_the_shape_is_read_from_the_config(config: dict[str, Any], expected: dict[str, Any]) -> None:
    fields = {"model_type": "llama", "structure": Structure.UNIFORM, "tied": True, **expected}
    assert result_shape(config, tied=True) == ResultShape(**fields)
