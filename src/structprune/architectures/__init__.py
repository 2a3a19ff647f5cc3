"""Model families as data. A family is one file and one line here; see docs/add-an-architecture.md."""

from structprune.architectures.family import Family
from structprune.registry import Registry

FAMILIES: Registry[Family] = Registry(
    "model family (config.model_type)",
    {
        "gemma2": "structprune.architectures.gemma:GEMMA2",
        "gemma3_text": "structprune.architectures.gemma:GEMMA3",
        "gpt2": "structprune.architectures.gpt2:GPT2",
        "gpt_neox": "structprune.architectures.gpt_neox:GPT_NEOX",
        "llama": "structprune.architectures.llama:LLAMA",
        "mistral": "structprune.architectures.llama:LLAMA",
        "opt": "structprune.architectures.opt:OPT",
        "phi3": "structprune.architectures.phi3:PHI3",
        "qwen2": "structprune.architectures.qwen:QWEN2",
        "qwen3": "structprune.architectures.qwen:QWEN3",
        "qwen3_moe": "structprune.architectures.qwen_moe:QWEN3_MOE",
    },
)
