"""Model families as data: which tensors of a block shrink together, and which stock classes run the block.

A family is one file and one line here (docs/add-an-architecture.md). Read first: `family.py`, what a family states;
then `families/llama.py`, an example; then `units.py`, what a removal does to the tensors.
"""

from structprune.architectures.family import Family
from structprune.registry import Registry

FAMILIES: Registry[Family] = Registry(
    "model family (config.model_type)",
    Family,
    {
        "gemma2": "structprune.architectures.families.gemma:GEMMA2",
        "gemma3_text": "structprune.architectures.families.gemma:GEMMA3",
        "gpt2": "structprune.architectures.families.gpt2:GPT2",
        "gpt_neox": "structprune.architectures.families.gpt_neox:GPT_NEOX",
        "llama": "structprune.architectures.families.llama:LLAMA",
        "mistral": "structprune.architectures.families.llama:LLAMA",
        "opt": "structprune.architectures.families.opt:OPT",
        "phi3": "structprune.architectures.families.phi3:PHI3",
        "qwen2": "structprune.architectures.families.qwen:QWEN2",
        "qwen3": "structprune.architectures.families.qwen:QWEN3",
        "qwen3_moe": "structprune.architectures.families.qwen_moe:QWEN3_MOE",
    },
    group="structprune.families",
)
