"""Whether a checkpoint holds the tensors of its configuration, one to one; headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.shards import INDEX_NAME
from structprune.errors import CheckpointError

# Kept in old checkpoints beside the weights: what the stock class computes, and a format's number.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"attn\.bias$", r"attn\.masked_bias$", r"decoder\.version$")
_MAX_NAMES = 10

# A pattern of names that a program leaves behind, what that program is, and the way back to a model's own names.
_ORIGINS = (
    (r"(^|\.)_orig_mod\.", "a model that torch.compile wrapped", "save `model._orig_mod` with save_pretrained"),
    (r"(^|\.)_fsdp_wrapped_module\.", "a model that FSDP wrapped", "save its full state dict under the inner names"),
    (r"^module\.", "a model that DataParallel or DistributedDataParallel wrapped", "save `model.module` instead"),
    (r"\.lora_[AB]\b|\.base_layer\.", "a model with an adapter that is not merged", "call merge_and_unload() first"),
    (r"^base_model\.model\.", "a PEFT model", "call merge_and_unload() and save the result"),
    (r"^(v_head|value_head)\.", "a model with a value head (reinforcement learning)", "save its `pretrained_model`"),
    (r"^(score|classifier|qa_outputs)\.", "a classifier or reward model", "prune the causal language model instead"),
    (r"(^|\.)(language_model|text_model)\.", "a wrapper around a text model", "save the text model by itself"),
    (
        r"\.(qweight|qzeros|scales|weight_scale|weight_scale_inv|weight_packed)$",
        "a quantised model",
        "prune the unquantised checkpoint, then quantise the result",
    ),
)


def check_tensors(
    reader: CheckpointReader, expected: Mapping[str, tuple[int, ...]], head: str, computed: Sequence[str] = ()
) -> None:
    """Raise CheckpointError, with the names as they are stored, for tensors that are missing, left over or misshapen.

    `expected` is name -> shape, `head` the name of the head's weight. Left over but harmless is what matches one of the
    patterns `computed`.
    """
    where = str(reader.directory)
    missing = [name for name in expected if name not in reader.shapes]
    harmless = re.compile("|".join((*_COMPUTED, *computed)))
    extra = [name for name in reader.shapes if name not in expected and not harmless.search(name)]
    unknown = f"{len(extra)} tensor(s) that the configuration does not have: {_listed(reader, extra)}"
    origin, way_back = _origin([reader.stored_name(name) for name in extra])
    if missing == [head] and not extra:
        raise without_head(where, reader.stored_name(head))
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensor(s): {_listed(reader, missing)}",
            where=where,
            got="; ".join((*((unknown,) if extra else ()), *((origin,) if origin else ()), *reader.notes)) or None,
            do=way_back or advice_on_missing(reader),
        )
    if extra:
        # Dropped, they would be lost without a word.
        raise CheckpointError(
            f"the checkpoint has {unknown}",
            where=where,
            got=origin,
            do="check that config.json belongs to it; to leave them out, load it with AutoModelForCausalLM and save "
            "it with save_pretrained",
        )
    for name, shape in expected.items():
        if reader.shapes[name] != shape:
            raise CheckpointError(
                f"tensor {reader.stored_name(name)!r} has another shape than the configuration says",
                where=where,
                got=reader.shapes[name],
                wanted=shape,
            )


def without_head(where: str, name: str) -> CheckpointError:
    """Describe a checkpoint that lacks nothing but the head, as embedding models do; stock code would draw one."""
    return CheckpointError(
        "the checkpoint has no head, so it predicts no tokens: it is a base model, as those for embeddings are",
        where=where,
        got=f"no tensor {name!r}, and tie_word_embeddings is false",
        wanted="a causal language model",
        do="take the language model that it was made from; if its head is the embedding, set tie_word_embeddings to "
        "true in config.json",
    )


def _origin(stored: Sequence[str]) -> tuple[str | None, str | None]:
    """Find what left such names behind, and what to do; None where that is not known."""
    for pattern, what, do in _ORIGINS:
        if any(re.search(pattern, name) for name in stored):
            return f"names of {what}", do
    return None, None


def advice_on_missing(reader: CheckpointReader) -> str:
    """Say what to do where tensors are missing and no name says why."""
    files, announced = reader.num_files
    if announced > files:
        return f"it is a part of a split checkpoint: fetch all {announced} files and {INDEX_NAME}"
    return "check that config.json belongs to the checkpoint, and that all of it was fetched"


def _listed(reader: CheckpointReader, names: Sequence[str]) -> str:
    """List the first of the names as stored, sorted, and how many more there are."""
    stored = sorted(reader.stored_name(name) for name in names)
    more = f" and {len(stored) - _MAX_NAMES} more" if len(stored) > _MAX_NAMES else ""
    return ", ".join(map(repr, stored[:_MAX_NAMES])) + more
