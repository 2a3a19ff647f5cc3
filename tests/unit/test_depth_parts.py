"""Pieces of depth removal: the distance between two hidden states, and the config of fewer blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from structprune.errors import UnsupportedError
from structprune.exporters.depth import shallower_config
from structprune.scores.blocks import angular_distance


@pytest.mark.parametrize("degrees", [0.0, 1e-4, 0.01, 1.0, 45.0, 90.0, 135.0, 179.99, 180.0])
def test_angle_between_two_vectors(degrees: float) -> None:
    """Small angles keep their digits, where the arc cosine of a float32 has none left."""
    angle = math.radians(degrees)
    before_TD = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    turned = [[math.cos(angle), math.sin(angle)], [-math.sin(angle) * 20, math.cos(angle) * 20]]
    distance_T = angular_distance(before_TD, torch.tensor(turned))
    assert distance_T.dtype == torch.float32
    assert distance_T.tolist() == [pytest.approx(degrees / 180, rel=1e-4, abs=1e-12)] * 2


def test_distance_ignores_lengths_and_takes_any_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 16, generator=generator) for _ in range(2))
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).arccos() / math.pi
    torch.testing.assert_close(angular_distance(a * 7, b * 0.01).double(), expected, rtol=1e-5, atol=1e-6)
    assert angular_distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    zero = torch.zeros_like(a)
    assert torch.equal(angular_distance(zero, zero), torch.zeros(3, 5))


def test_nothing_removed_changes_nothing() -> None:
    parsed = Qwen2Config(num_hidden_layers=4)
    assert shallower_config({"num_hidden_layers": 4, "x": 1}, parsed, range(4)) == {"num_hidden_layers": 4, "x": 1}


@pytest.mark.parametrize("written", [True, False])
def test_attention_types_stay_with_their_blocks(written: bool) -> None:
    """Whether config.json lists the types or leaves them to be derived from the block's number."""
    parsed = Qwen2Config(num_hidden_layers=6, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    config: dict[str, Any] = parsed.to_dict()
    if not written:
        del config["layer_types"]
    kept = [0, 2, 4, 5]
    result = shallower_config(config, parsed, kept)
    assert result["max_window_layers"] == 2
    again = Qwen2Config(**result)
    assert again.num_hidden_layers == 4
    assert again.layer_types == [parsed.layer_types[index] for index in kept]
    assert len(set(again.layer_types)) == 2
    unchanged = set(config) - {"num_hidden_layers", "layer_types", "max_window_layers"}
    assert {name: result[name] for name in unchanged} == {name: config[name] for name in unchanged}


def test_the_count_has_the_familys_own_name() -> None:
    parsed = GPT2Config(n_layer=4)
    result = shallower_config({"n_layer": 4}, parsed, [1, 3])
    assert result == {"n_layer": 2}


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"mlp_only_layers": [0, 2]}, "'mlp_only_layers' lists layers"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "configs of their own"),
        ({"structprune_removed": {"0": ["mlp"]}}, "configs of their own"),
    ],
)
def test_what_cannot_be_cut_is_refused(entry: dict[str, Any], match: str) -> None:
    parsed = LlamaConfig(num_hidden_layers=3)
    with pytest.raises(UnsupportedError, match=match):
        shallower_config({"num_hidden_layers": 3, **entry}, parsed, [0, 1])


def test_an_empty_list_of_layers_lists_none() -> None:
    parsed = LlamaConfig(num_hidden_layers=3)
    config = {"num_hidden_layers": 3, "mlp_only_layers": [], "eos_token_id": [1, 2, 3]}
    assert shallower_config(config, parsed, [0]) == config | {"num_hidden_layers": 1}
