"""Tiny random models of every family with a byte-level tokenizer; nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 260


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a start token: a real tokenizer without a vocabulary file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


# What all configs call by the same name.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# A full and a windowed block, the window shorter than the tests' texts.
WINDOWED: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**COMMON, "tie_word_embeddings": True, **changes})


def opt_config(**changes: Any) -> OPTConfig:
    return OPTConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            **changes,
        }
    )


def gpt_neox_config(**changes: Any) -> GPTNeoXConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sizes = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    return GPTNeoXConfig(**sizes, rope_parameters=rope, **changes)


def phi3_config(**changes: Any) -> Phi3Config:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return Phi3Config(**{**COMMON, "pad_token_id": None, "rope_parameters": rope, **changes})


def gemma_config(config_class: type[Any], **changes: Any) -> Any:
    sizes: dict[str, Any] = {**COMMON, "head_dim": 16, "pad_token_id": None, "query_pre_attn_scalar": 16}
    return config_class(**{**sizes, **WINDOWED, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **changes)


# Family -> (config factory, stock class); the conformance tests run over every variant.
TINY_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(llama_config()),
    "llama-untied-biased": lambda: LlamaForCausalLM(
        llama_config(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=8)),
    "opt": lambda: OPTForCausalLM(opt_config()),
    "opt-without-bias": lambda: OPTForCausalLM(opt_config(enable_bias=False)),
    "gemma2": lambda: Gemma2ForCausalLM(gemma_config(Gemma2Config, final_logit_softcapping=2.0)),
    "gemma3_text": lambda: Gemma3ForCausalLM(gemma_config(Gemma3TextConfig)),
    "gemma3_text-biased": lambda: Gemma3ForCausalLM(
        gemma_config(
            Gemma3TextConfig,
            attention_bias=True,
            tie_word_embeddings=False,
            layer_types=["sliding_attention", "sliding_attention"],
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config(n_inner=48)),
    "gpt2-default-width": lambda: GPT2LMHeadModel(gpt2_config(n_inner=None)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(gpt_neox_config()),
    "gpt_neox-sequential": lambda: GPTNeoXForCausalLM(
        gpt_neox_config(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True)
    ),
    "phi3": lambda: Phi3ForCausalLM(phi3_config()),
    # Factors for texts longer than 16 tokens, and a window.
    "phi3-longrope": lambda: Phi3ForCausalLM(
        phi3_config(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 4.0],
            },
            original_max_position_embeddings=16,
            sliding_window=8,
            tie_word_embeddings=True,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, use_sliding_window=True, **WINDOWED)),
    # Heads wider than the hidden size shared out among them, as in the small real ones.
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True)),
    "qwen3-biased-windowed": lambda: Qwen3ForCausalLM(
        Qwen3Config(**COMMON, head_dim=8, attention_bias=True, use_sliding_window=True, **WINDOWED)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
        )
    ),
}


def with_blocks(model: Any, num_blocks: int) -> Any:
    """A random model of the same kind with another number of blocks."""
    config = model.config
    config.num_hidden_layers = num_blocks
    if (types := getattr(config, "layer_types", None)) is not None:
        config.layer_types = (types * num_blocks)[:num_blocks]
    return type(model)(config)


@torch.no_grad()
def spread_weights(model: Any) -> None:
    """Draw the weights anew, so large that channels differ; those of norms are around 1."""
    for name, parameter in model.named_parameters():
        if not re.search(r"norm|\bln_", name):
            parameter.normal_(std=0.15)
        elif name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)


def save_tiny(
    kind: str,
    directory: Path,
    *,
    num_blocks: int | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random model of `kind` with its tokenizer. Weights are scaled up so that channels differ."""
    torch.manual_seed(0)
    model = TINY_MODELS[kind]()
    if num_blocks is not None:
        model = with_blocks(model, num_blocks)
    spread_weights(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(directory)
    return directory
