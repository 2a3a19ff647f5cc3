"""Whether a checkpoint holds the tensors of its configuration, one to one; headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError

# Kept in old checkpoints beside the weights: what the stock class computes, and a format's number.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"attn\.bias$", r"attn\.masked_bias$", r"decoder\.version$")
_MAX_NAMES = 10


def check_tensors(
    reader: CheckpointReader, expected: Mapping[str, tuple[int, ...]], computed: Sequence[str] = ()
) -> None:
    """Raise CheckpointError, with the names as they are stored, for tensors that are missing, left over or misshapen.

    `expected` is name -> shape. Left over but harmless is what matches one of the patterns `computed`.
    """
    where = str(reader.directory)
    missing = [name for name in expected if name not in reader.shapes]
    harmless = re.compile("|".join((*_COMPUTED, *computed)))
    extra = [name for name in reader.shapes if name not in expected and not harmless.search(name)]
    unknown = f"{len(extra)} tensor(s) that the configuration does not have: {_listed(reader, extra)}"
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensor(s): {_listed(reader, missing)}",
            where=where,
            got=unknown if extra else None,
            do="download it again, or check that config.json belongs to it",
        )
    if extra:
        # Dropped, they would be lost without a word.
        raise CheckpointError(
            f"the checkpoint has {unknown}",
            where=where,
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


def _listed(reader: CheckpointReader, names: Sequence[str]) -> str:
    """The first of the names as stored, sorted, and how many more there are."""
    stored = sorted(reader.stored_name(name) for name in names)
    more = f" and {len(stored) - _MAX_NAMES} more" if len(stored) > _MAX_NAMES else ""
    return ", ".join(map(repr, stored[:_MAX_NAMES])) + more
