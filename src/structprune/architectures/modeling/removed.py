"""The entry of config.json that names the sublayers which blocks of a per-layer checkpoint no longer have.

`"structprune_removed": {"7": ["attention"], "9": ["attention", "mlp"]}`: block 7 is `h += mlp(h)`, block 9 passes the
residual stream on. A block that is not named is whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from structprune.architectures.family import Family
from structprune.errors import CheckpointError, UnsupportedError
from structprune.types import UNIT_KINDS, UnitKind

REMOVED_ENTRY = "structprune_removed"

RemovedSublayers = tuple[frozenset[UnitKind], ...]
"""The kinds of the sublayers that each block lacks."""


def removed_sublayers(config: Mapping[str, Any], num_blocks: int, where: str) -> RemovedSublayers:
    """Read from the content of config.json which sublayers of each block are removed.

    Raises CheckpointError for an entry of another form, UnsupportedError if no block has attention.
    """
    entry: Any = config.get(REMOVED_ENTRY, {})
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{REMOVED_ENTRY} is not an object",
            where=where,
            got=repr(entry),
            wanted='block number -> kinds, e.g. {"7": ["attention"]}',
        )
    removed: list[frozenset[UnitKind]] = [frozenset()] * num_blocks
    for key, kinds in entry.items():
        # "07" beside "7" would name a block twice, and the modelling file looks for "7" only.
        if key not in map(str, range(num_blocks)):
            raise CheckpointError(
                f"{REMOVED_ENTRY} names a block that is none",
                where=where,
                got=repr(key),
                wanted=f'"0" to "{num_blocks - 1}"',
            )
        if not isinstance(kinds, list) or not kinds or any(kind not in UNIT_KINDS for kind in kinds):
            raise CheckpointError(
                f"{REMOVED_ENTRY} names sublayers that are none",
                where=f"{where}, block {key}",
                got=repr(kinds),
                wanted=f"a list of {', '.join(UNIT_KINDS)} or both",
            )
        if len(set(kinds)) != len(kinds):
            raise CheckpointError(
                f"{REMOVED_ENTRY} names a sublayer twice",
                where=f"{where}, block {key}",
                got=repr(kinds),
                wanted="each once",
            )
        removed[int(key)] = frozenset(kinds)
    check_attention_is_left(removed)
    return tuple(removed)


def removed_entry(removed: Sequence[frozenset[UnitKind]]) -> dict[str, list[UnitKind]]:
    """Build the entry that says `removed`, in the order of a block's forward pass; empty if every block is whole."""
    return {str(i): [kind for kind in UNIT_KINDS if kind in kinds] for i, kinds in enumerate(removed) if kinds}


def check_can_go(config: Any, family: Family, kinds: Collection[UnitKind]) -> None:
    """Raise UnsupportedError if blocks without some of `kinds` cannot be written; `config` is the stock config object.

    Attention that differs between blocks cannot go: caches have one entry per attention that is left, and take each
    entry's kind from the block of that number.
    """
    if different := [kind for kind in kinds if not family.is_alike(kind)]:
        raise UnsupportedError(
            f"blocks of {family.name} differ in how they call their {different[0]}, and cannot lose it",
            wanted="a method that leaves some units in every block",
        )
    if "attention" not in kinds:
        return
    if not family.attends_everywhere:
        raise UnsupportedError(
            "attention cannot be removed from a model whose blocks do not all have it",
            got=family.name,
            wanted="attention in all blocks",
            do="remove whole sublayers with --scope mlp only",
        )
    types = getattr(config, "layer_types", None) or []
    if len(set(types)) > 1:
        raise UnsupportedError(
            "blocks with and without an attention window cannot lose their attention",
            got=f"layer_types {', '.join(sorted(set(types)))}",
            wanted="one type in all blocks",
            do="remove whole sublayers with --scope mlp only",
        )
    # Attention that is left is numbered without gaps, and would take the entry of another block.
    for name, values in config.to_dict().items():
        listed = isinstance(values, list) and len(values) == config.num_hidden_layers
        if listed and any(value != values[0] for value in values):
            raise UnsupportedError(
                "blocks that differ by their number cannot lose their attention",
                got=f"{name} {values}",
                wanted="one value for all blocks",
                do="remove whole sublayers with --scope mlp only",
            )


def check_attention_is_left(removed: Sequence[frozenset[UnitKind]]) -> None:
    """Raise UnsupportedError if every block lacks its attention: tokens would not see each other, nor caches fill."""
    if removed and all("attention" in kinds for kinds in removed):
        raise UnsupportedError(
            "the attention of every block is removed",
            got=f"{len(removed)} of {len(removed)} blocks",
            wanted="attention in at least one block",
            do="lower --sparsity, or protect a block from pruning",
        )
