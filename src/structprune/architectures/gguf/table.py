"""All descriptions: by the type of the config, and by the architecture of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from structprune.architectures.gguf.description import GgufFamily
from structprune.architectures.gguf.families.deepseek import DEEPSEEK
from structprune.architectures.gguf.families.delta import DELTA
from structprune.architectures.gguf.families.fused import FUSED
from structprune.architectures.gguf.families.gated import GATED_FAMILIES
from structprune.architectures.gguf.families.gemma import GEMMA
from structprune.architectures.gguf.families.gpt import GPT_LIKE
from structprune.architectures.gguf.families.hybrids import HYBRIDS
from structprune.architectures.gguf.families.latent import LATENTS
from structprune.architectures.gguf.families.layer_norm import LAYER_NORM
from structprune.architectures.gguf.families.llama import LLAMA_LIKE
from structprune.architectures.gguf.families.mixtures import MIXTURES
from structprune.architectures.gguf.families.routed import ROUTED
from structprune.architectures.gguf.families.turns import TURNS

GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    **LLAMA_LIKE,
    **GATED_FAMILIES,
    **GEMMA,
    **FUSED,
    **GPT_LIKE,
    **LAYER_NORM,
    **MIXTURES,
    **DEEPSEEK,
    **HYBRIDS,
    **DELTA,
    **LATENTS,
    **ROUTED,
    **TURNS,
}
"""`config.model_type` -> its description."""


def _by_architecture() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for model_type, family in GGUF_FAMILIES.items():
        name = family.uniform.architecture
        found[name] = (*found.get(name, ()), model_type)
    return found


READ_AS: Mapping[str, Sequence[str]] = _by_architecture()
"""`general.architecture` -> types that a file of it may be; the first whose `read_if` says so is taken."""
