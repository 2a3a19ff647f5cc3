"""Hyperparameters of a GGUF file, from the parsed config and from the widths that the tensors have."""

from __future__ import annotations

from structprune.architectures.gguf.description import GgufModel, Value
from structprune.architectures.gguf.read import entry_name, is_mixture
from structprune.errors import UnsupportedError


def hyperparameters(model: GgufModel) -> dict[str, Value]:
    """Return the entries without the architecture's name in front. Raises UnsupportedError for what cannot be said."""
    config, target = model.config, model.target
    whole = next(block for block in model.blocks if block.heads)
    if target.no_groups and whole.heads != whole.kv_heads:
        raise UnsupportedError(
            f"llama.cpp's {target.architecture} has keys and values for every head",
            got=f"{whole.kv_heads} KV heads, {whole.heads} heads",
        )
    widths = {
        target.width_key: [block.channels for block in model.blocks],
        "attention.head_count": [block.heads for block in model.blocks],
        "attention.head_count_kv": [block.kv_heads for block in model.blocks],
    }
    values: dict[str, Value] = {
        "block_count": len(model.blocks),
        "context_length": _context_length(model),
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        **{name: value if target.lists_widths else value[0] for name, value in widths.items()},
    }
    if is_mixture(target):
        values["expert_count"] = int(getattr(config, entry_name(config.model_type, model.family, "num_experts")))
    for entry in target.entries:
        values |= entry.write(model)
    return values


def _context_length(model: GgufModel) -> int:
    """Return the number of positions; no more than the sliding window where the architecture attends to everything."""
    name = entry_name(model.config.model_type, model.family, "max_position_embeddings")
    # Where no entry limits positions, because a bias of the distances is all there is of them, this is a usual length.
    length: int = getattr(model.config, name) if name else 2048
    if model.family.window == "caps-context" and "sliding_attention" in model.layer_types():
        length = min(length, model.config.sliding_window)
    return length
