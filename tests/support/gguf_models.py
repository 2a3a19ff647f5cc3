"""Tiny models of the GGUF architectures of types without a family file, and the sizes of those with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

VOCAB = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """The config entry of rotary positions of this kind."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


HEADS = {"head_dim": 16}
PARTIAL = rope("default", partial_rotary_factor=0.5)
WINDOWS = {"num_hidden_layers": 9, "sliding_window": 8}
SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 5.0,
}
OLD = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96}
ALIBI = {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256}
LATER_FALCON = {"new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2}
MINISTRAL = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
DEEPSEEK_YARN = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=0.7,
    mscale_all_dim=0.7,
)
STATES = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_norm_before_gate": False,
}
H1_FACTORS = {
    "embedding_multiplier": 2.0,
    "lm_head_multiplier": 0.5,
    "key_multiplier": 0.5,
    "attention_out_multiplier": 0.8,
    "attention_in_multiplier": 1.2,
    "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.9,
    "mlp_multipliers": [0.9, 0.7],
    "ssm_multipliers": [1.1, 0.9, 0.8, 1.2, 1.05],
}
RULE = {
    "num_hidden_layers": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
GRANITE_4 = {
    **SCALES,
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    # Of experts, of which there are none.
    "intermediate_size": 11008,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Name -> (type, config beside SIZES, architecture of the file).
MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "gemma": ("gemma", HEADS, "gemma"),
    "granite": ("granite", SCALES, "granite"),
    "granite, biased": ("granite", {**SCALES, "attention_bias": True, "mlp_bias": True}, "granite"),
    "granite, fewer heads": ("granite", {**SCALES, "num_attention_heads": 2, "head_dim": 16}, "granite"),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}, "smollm3"),
    "ministral3": ("ministral3", {**HEADS, **MINISTRAL}, "mistral3"),
    "olmo2": ("olmo2", {}, "olmo2"),
    "olmo2, tied": ("olmo2", {"tie_word_embeddings": True}, "olmo2"),
    "olmo3": ("olmo3", WINDOWS, "olmo2"),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}, "exaone4"),
    "glm4": ("glm4", {**HEADS, **PARTIAL}, "glm4"),
    "glm": ("glm", {**HEADS, **PARTIAL}, "chatglm"),
    "starcoder2": ("starcoder2", {}, "starcoder2"),
    "phi": ("phi", PARTIAL, "phi2"),
    "stablelm": ("stablelm", rope("default", partial_rotary_factor=0.25), "stablelm"),
    "stablelm, biased": ("stablelm", {"use_qkv_bias": True}, "stablelm"),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}, "stablelm"),
    "cohere": ("cohere", {"logit_scale": 0.3}, "command-r"),
    "cohere2": ("cohere2", {**WINDOWS, "logit_scale": 0.3}, "cohere2"),
    "falcon": ("falcon", {"multi_query": True, "num_kv_heads": 1}, "falcon"),
    "falcon, later": ("falcon", LATER_FALCON, "falcon"),
    "falcon, one norm": (
        "falcon",
        {**LATER_FALCON, "num_ln_in_parallel_attn": 1},
        "falcon",
    ),
    "nemotron": ("nemotron", {**HEADS, **PARTIAL}, "nemotron"),
    "nemotron, biased": ("nemotron", {**HEADS, "attention_bias": True, "mlp_bias": True}, "nemotron"),
    "bloom": ("bloom", {}, "bloom"),
    "mpt": ("mpt", ALIBI, "mpt"),
    "mpt, clamped": ("mpt", {**ALIBI, "attn_config": {"clip_qkv": 0.5}}, "mpt"),
    "gpt_bigcode": ("gpt_bigcode", OLD, "starcoder"),
    "jais2": ("jais2", HEADS, "jais2"),
    "olmo": ("olmo", {"clip_qkv": 0.8}, "olmo"),
    "olmo3, scaled": (
        "olmo3",
        {
            **WINDOWS,
            "rope_parameters": {
                "full_attention": {
                    **rope("yarn", factor=4.0, original_max_position_embeddings=32)["rope_parameters"],
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                },
                "sliding_attention": rope("default")["rope_parameters"],
            },
        },
        "olmo2",
    ),
    "exaone4, windows": ("exaone4", {"num_hidden_layers": 64, "sliding_window": 8}, "exaone4"),
    "arcee": ("arcee", HEADS, "arcee"),
    "ernie4_5": ("ernie4_5", HEADS, "ernie4_5"),
    "seed_oss": ("seed_oss", HEADS, "seed_oss"),
    "hunyuan": ("hunyuan_v1_dense", HEADS, "hunyuan-dense"),
    "mixtral": ("mixtral", {**LOCAL, **HEADS}, "llama"),
    "olmoe": ("olmoe", {**EXPERTS, "num_key_value_heads": 4}, "olmoe"),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "qwen2moe",
    ),
    "granitemoe": ("granitemoe", {**LOCAL, **SCALES}, "granitemoe"),
    "granitemoeshared": ("granitemoeshared", {**LOCAL, **SCALES, "shared_intermediate_size": 48}, "granitemoe"),
    "gpt_oss": ("gpt_oss", {**LOCAL, **HEADS, "sliding_window": 8, **rope("default")}, "gpt-oss"),
    "deepseek_v3": ("deepseek_v3", {**LATENT, **ROUTED, "n_group": 1, "topk_group": 1}, "deepseek2"),
    "deepseek_v3, groups": (
        "deepseek_v3",
        {**LATENT, **ROUTED, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, **DEEPSEEK_YARN},
        "deepseek2",
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT, **ROUTED, "n_shared_experts": 2, "n_group": None, "topk_group": None, "topk_method": "greedy"},
        "deepseek2",
    ),
    "dots1": (
        "dots1",
        {**HEADS, **ROUTED, "num_key_value_heads": 4, "sliding_window": None, "norm_topk_prob": True},
        "dots1",
    ),
    "glm4_moe": (
        "glm4_moe",
        {**HEADS, **ROUTED, **PARTIAL, "attention_bias": True, "use_qk_norm": True},
        "glm4moe",
    ),
    "falcon_h1": ("falcon_h1", {**STATES, **HEADS, "mamba_rms_norm": True, **H1_FACTORS}, "falcon-h1"),
    "falcon_h1, plain": ("falcon_h1", {**STATES, **HEADS, "mamba_n_groups": 1}, "falcon-h1"),
    "jamba": (
        "jamba",
        {
            **EXPERTS,
            "num_hidden_layers": 5,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
        },
        "jamba",
    ),
    "qwen3_next": (
        "qwen3_next",
        {**EXPERTS, **HEADS, **PARTIAL, **RULE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "qwen3next",
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        {
            **HEADS,
            **RULE,
            **rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
        },
        "qwen35",
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {
            **HEADS,
            **RULE,
            **EXPERTS,
            **rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        "qwen35moe",
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_intermediate_size": 32,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": False,
        },
        "ernie4_5-moe",
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**HEADS, "num_experts": 4, "moe_topk": 2}, "hunyuan-moe"),
    "minimax_m2": ("minimax_m2", {**HEADS, **LOCAL, **PARTIAL}, "minimax-m2"),
    "afmoe": (
        "afmoe",
        {
            **HEADS,
            **EXPERTS,
            **WINDOWS,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "num_shared_experts": 2,
            "route_scale": 1.5,
            "mup_enabled": True,
        },
        "afmoe",
    ),
    "exaone_moe": (
        "exaone_moe",
        {**EXPERTS, **WINDOWS, "moe_intermediate_size": 32, "num_shared_experts": 2, "routed_scaling_factor": 1.5},
        "exaone-moe",
    ),
    "mellum": (
        "mellum",
        {
            **HEADS,
            **EXPERTS,
            **WINDOWS,
            "moe_intermediate_size": 32,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2 + ["sliding_attention"],
            "rope_parameters": {
                kind: rope("default")["rope_parameters"] for kind in ("full_attention", "sliding_attention")
            },
        },
        "mellum",
    ),
    "granitemoehybrid": ("granitemoehybrid", GRANITE_4, "granitehybrid"),
    "granitemoehybrid, turned": (
        "granitemoehybrid",
        {**GRANITE_4, "position_embedding_type": "rope", "mamba_n_groups": 2},
        "granitehybrid",
    ),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        "lfm2",
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {
            **EXPERTS,
            "layer_types": ["conv", "full_attention", "conv"],
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "rope_parameters": rope("default")["rope_parameters"],
        },
        "lfm2moe",
    ),
    "hy_v3": (
        "hy_v3",
        {**HEADS, **EXPERTS, "moe_intermediate_size": 32, "num_shared_experts": 1, "router_scaling_factor": 1.5},
        "hy_v3",
    ),
    "minicpm3": ("minicpm3", {**LATENT, "v_head_dim": 16}, "minicpm3"),
    "llama4_text": (
        "llama4_text",
        {**LOCAL, **HEADS, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2, "num_hidden_layers": 5},
        "llama4",
    ),
}
# What can be read and written, and not pruned: tracing does not describe it.
UNDESCRIBED = ("granitemoeshared", "afmoe")
# Types with the block of another, in files that say nothing else -> what a file is read as, config beside SIZES.
WRITTEN_AS_ANOTHER: Mapping[str, tuple[str, dict[str, Any]]] = {
    "internlm3": ("llama", HEADS),
    "iquestcoder": ("llama", HEADS),
    "glm4_moe_lite": ("deepseek_v3", {**LATENT, **{k: v for k, v in ROUTED.items() if k != "first_k_dense_replace"}}),
}
# Architectures that transformers has too and that have no description -> why.
REFUSED: Mapping[str, str] = {
    "gptj": "llama.cpp has the name, and no code that loads it",
    "mamba": "no MLP and no attention: nothing to prune",
    "mamba2": "no MLP and no attention: nothing to prune",
    "gemma3n": "what a token adds to each block by itself: not pruned here either",
    "gemma4": "sizes of heads per block, which no description says yet",
    "apertus": "the numbers of its activation are lists in the metadata and weights in transformers",
    "bitnet": "weights of three values with scales; not pruned here either",
    "granitehybrid with experts": "experts beside the shared MLP, in blocks of two kinds",
    "phimoe": "transformers chooses experts otherwise (sparse mixer)",
    **dict.fromkeys(
        (
            *("cohere2moe", "dbrx", "glm-dsa", "kimi-linear", "laguna"),
            *("mimo2", "nemotron_h", "nemotron_h_moe", "qwen4exp"),
        ),
        "not described yet",
    ),
    **dict.fromkeys(
        ("hunyuan_vl", "mistral4", "paddleocr", "qwen2vl", "qwen3vl", "qwen3vlmoe"),
        "the text model of an image-text type; not described yet",
    ),
}
# llama.cpp's table of GELU has half precision.
GELU = ("gemma", "starcoder2", "phi", "falcon", "bloom", "mpt", "gpt_bigcode")


def config_of(name: str, **changes: Any) -> Any:
    """The config of one of these models, or one that is a little different."""
    model_type, own, _ = MODELS[name]
    config = CONFIG_MAPPING[model_type]
    known = {*config.attribute_map, *(field.name for field in dataclasses.fields(config))}
    return config(**{**{name: value for name, value in SIZES.items() if name in known}, **own, **changes})
