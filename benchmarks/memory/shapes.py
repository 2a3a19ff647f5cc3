"""True shapes of published models, from their configs: what a run's memory depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One decoder-only model by its sizes."""

    name: str
    family: Literal["opt", "llama"]
    hidden: int
    channels: int
    num_heads: int
    num_kv_heads: int
    num_blocks: int
    vocab: int

    def config(self, num_blocks: int | None = None) -> dict[str, Any]:
        """config.json, with fewer blocks where asked; float16 for OPT and bfloat16 for LLaMA, as published."""
        common = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": num_blocks or self.num_blocks,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        if self.family == "opt":
            return common | {
                "model_type": "opt",
                "architectures": ["OPTForCausalLM"],
                "ffn_dim": self.channels,
                "word_embed_proj_dim": self.hidden,
                "pad_token_id": 1,
                "dtype": "float16",
            }
        return common | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "intermediate_size": self.channels,
            "num_key_value_heads": self.num_kv_heads,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


def _opt(name: str, hidden: int, num_heads: int, num_blocks: int) -> Shape:
    return Shape(
        name=f"opt-{name}",
        family="opt",
        hidden=hidden,
        channels=4 * hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        num_blocks=num_blocks,
        vocab=50272,
    )


def _llama(
    name: str, hidden: int, channels: int, num_heads: int, num_kv_heads: int, num_blocks: int, vocab: int
) -> Shape:
    return Shape(
        name=f"llama-{name}",
        family="llama",
        hidden=hidden,
        channels=channels,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_blocks=num_blocks,
        vocab=vocab,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        _opt("125m", 768, 12, 12),
        _opt("1.3b", 2048, 32, 24),
        _opt("2.7b", 2560, 32, 32),
        _opt("6.7b", 4096, 32, 32),
        _opt("13b", 5120, 40, 40),
        _opt("30b", 7168, 56, 48),
        _opt("66b", 9216, 72, 64),
        _llama("3.2-1b", 2048, 8192, 32, 8, 16, 128256),
        _llama("2-7b", 4096, 11008, 32, 32, 32, 32000),
        _llama("2-13b", 5120, 13824, 40, 40, 40, 32000),
        _llama("2-70b", 8192, 28672, 64, 8, 80, 32000),
        _llama("3-8b", 4096, 14336, 32, 8, 32, 128256),
        _llama("3-70b", 8192, 28672, 64, 8, 80, 128256),
    )
}
"""OPT 350m is left out: its blocks are normed after the sum, which no method here prunes."""
