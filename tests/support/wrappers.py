"""Tiny random image-text models, made from their configs alone, with what belongs to them in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from support.decoders import DELTA
from support.models import COMMON, byte_tokenizer, spread_weights

IMAGE_TOKEN, START_TOKEN, END_TOKEN, VIDEO_TOKEN = 250, 251, 252, 253
TEXT: dict[str, Any] = {**COMMON, "num_hidden_layers": 3, "pad_token_id": None}
SIZED: dict[str, Any] = {**TEXT, "head_dim": 8}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
SIGLIP: dict[str, Any] = {**CLIP, "model_type": "siglip_vision_model"}
PIXTRAL: dict[str, Any] = {**CLIP, "model_type": "pixtral", "head_dim": 8, "image_size": 16}
PATCHES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
PLACES: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": START_TOKEN,
    "vision_end_token_id": END_TOKEN,
}
_DELTA: dict[str, Any] = {**DELTA, "num_hidden_layers": 4}

TINY_WRAPPERS: Mapping[str, dict[str, Any]] = {
    # Windows in some blocks, a tied head, norms behind the sublayers.
    "gemma3": {
        "text_config": {
            **SIZED,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": START_TOKEN,
        "eoi_token_index": END_TOKEN,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
    },
    "mistral3": {
        "text_config": {**SIZED, "model_type": "mistral"},
        "vision_config": PIXTRAL,
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
        "spatial_merge_size": 2,
    },
    # Three positions of each token; biases of queries, keys and values.
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": SECTIONS},
        "vision_config": {**PATCHES, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        **PLACES,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": SECTIONS, "tie_word_embeddings": True},
        "vision_config": {**PATCHES, "embed_dim": 16, "hidden_size": 32},
        "tie_word_embeddings": True,
        **PLACES,
    },
    # What the vision tower found is added behind the first blocks too.
    "qwen3_vl": {
        "text_config": {**SIZED, "rope_parameters": SECTIONS},
        "vision_config": {
            **PATCHES,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **PLACES,
    },
    "llama4": {
        "text_config": {**SIZED, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2},
        "vision_config": {
            **CLIP,
            "model_type": "llama4_vision_model",
            "image_size": 16,
            "intermediate_size": 64,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
        "image_token_index": IMAGE_TOKEN,
    },
    "qwen3_5": {
        "text_config": {
            **SIZED,
            **_DELTA,
            "rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
        },
        "vision_config": {**PATCHES, "out_hidden_size": 32, "num_position_embeddings": 16},
        **PLACES,
    },
}
"""`model_type` -> what its config is given."""
OTHERS: Mapping[str, dict[str, Any]] = {
    "cohere2_vision": {"text_config": {**TEXT, "logit_scale": 0.3}, "vision_config": SIGLIP},
    "paligemma": {"text_config": {**SIZED, "model_type": "gemma"}, "vision_config": SIGLIP, "projection_dim": 32},
}
"""Types whose text model computes something else inside."""


def tiny_wrapper_config(model_type: str, **changes: Any) -> Any:
    """A config of this type with few and small blocks; `changes` are entries of its text config."""
    own = dict({**TINY_WRAPPERS, **OTHERS}[model_type])
    own["text_config"] = {**own["text_config"], **changes}
    return CONFIG_MAPPING[model_type](**own)


def tiny_wrapper(model_type: str, **changes: Any) -> Any:
    """A random model of this type. Weights are scaled up so that channels differ."""
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(tiny_wrapper_config(model_type, **changes)).eval()
    spread_weights(model)
    return model


def save_wrapper(model_type: str, directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random model of this type with a byte tokenizer and the settings of an image processor."""
    model = tiny_wrapper(model_type, **changes)
    (model if model.dtype == dtype else model.to(dtype)).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (directory / name).write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return directory


def image_inputs(model_type: str) -> dict[str, Any]:
    """One image in a text, as the processor of this type would give it: four tokens stand for the image."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 200, (12,), generator=generator).tolist()
    ids_BS = torch.tensor([[*text[:3], START_TOKEN, *[IMAGE_TOKEN] * 4, END_TOKEN, *text[3:]]])
    here_BS = (ids_BS == IMAGE_TOKEN).long()
    inputs: dict[str, Any] = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    if "qwen" in model_type:
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 4, 4]])
        return {**inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": here_BS}
    size: int = TINY_WRAPPERS[model_type]["vision_config"]["image_size"]
    inputs["pixel_values"] = torch.randn(1, 3, size, size, generator=generator)
    more: dict[str, dict[str, Any]] = {
        "gemma3": {"token_type_ids": here_BS},
        "mistral3": {"image_sizes": torch.tensor([[size, size]])},
    }
    return inputs | more.get(model_type, {})
