"""The tensors of a checkpoint as rows of those of a GGUF file: the rules of a description, read backwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from structprune.architectures.gguf.description import GgufFamily, GgufReading, Rule, Transform
from structprune.architectures.gguf.read import parsed_config
from structprune.checkpoint.gguf_weights import GgufEntry, GgufRows, RowOrder
from structprune.errors import CheckpointError

_ORDERS: Mapping[Transform, RowOrder] = {"interleave": "halves", "ungroup": "grouped"}
# Two tensors of the file share the rows that each head has in one of the checkpoint.
_BY_HEADS = ("latent-keys", "latent-values", "delta-states", "delta-gates")
# Architectures whose queries, keys and values may be one tensor, or three: the names in the file, in its order.
_FUSED = ("attn_q", "attn_k", "attn_v")


def dimensions(*, hidden: int, vocab: int, positions: int, head_size: int, experts: int) -> dict[str, int]:
    """Return the dimensions that are the same everywhere, by the letters of description.py."""
    return {"d": hidden, "v": vocab, "p": positions, "h": head_size, "e": experts}


def block_dimensions(*, heads: int, kv_heads: int, head_size: int, channels: int) -> dict[str, int]:
    """Return the dimensions of one block, by the letters of description.py."""
    q, k, f = heads * head_size, kv_heads * head_size, channels
    return {"q": q, "k": k, "f": f, "2f": 2 * f, "q+2k": q + 2 * k, "n": heads, "m": kv_heads}


class GgufTensors:
    """The tensors of a checkpoint of which the config is known but for its biases, which are set here."""

    def __init__(self, reading: GgufReading, vocab_size: int, config: dict[str, Any]) -> None:
        self._fields, self._family, self._sizes = reading.fields, reading.family, reading.sizes
        self._config = config
        sizes = reading.sizes
        parsed = parsed_config(config, reading.fields.where)
        self._dims = {
            **dimensions(
                hidden=sizes.hidden,
                vocab=vocab_size,
                positions=sizes.positions,
                head_size=sizes.head_size,
                experts=sizes.experts,
            ),
            **block_dimensions(
                heads=sizes.heads, kv_heads=sizes.kv_heads, head_size=sizes.head_size, channels=sizes.channels
            ),
            **self._family.dims(parsed),
        }
        kinds = self._family.kinds
        self._kinds = kinds(parsed) if kinds is not None else [frozenset[str]()] * sizes.blocks

    def all(self) -> Iterator[tuple[str, GgufEntry]]:
        """Yield (name in the checkpoint, how it is made). Raises CheckpointError for a missing one or another shape."""
        target, family = self._family.uniform, self._family
        for rule in target.outer:
            yield from self._tensor(rule, rule.source, rule.target)
        together = {bias: entry for entry, biases in family.biases.items() for bias in biases}
        for entry in family.biases:
            if entry:
                self._config[entry] = any(
                    self._fields.has_tensor(f"blk.{block}.{rule.target}")
                    for rule in target.block
                    if together.get(rule.source) == entry
                    for block in range(self._sizes.blocks)
                )
        for block, kinds in enumerate(self._kinds):
            rules = [rule for rule in target.block if not rule.kinds or rule.kinds & kinds]
            pieces = list(self._block(rules, block, together))
            yield from _stacked_anew(_whole(pieces), family)

    def _block(
        self, rules: Sequence[Rule], block: int, together: Mapping[str, str]
    ) -> Iterator[tuple[Rule, str, GgufEntry]]:
        """Yield what each rule says of one block."""
        for rule in rules:
            name = f"{self._family.blocks}{block}.{rule.source}"
            if rule.optional and not (rule.source in together and self._config.get(together[rule.source], True)):
                continue
            found = list(self._tensor(rule, name, f"blk.{block}.{rule.target}"))
            if rule.optional and not found:
                # Stock code has these biases all or none: one that the file lacks is zero.
                found = [(name, GgufEntry(shape=self._shape(rule), parts=()))]
            for each, entry in found:
                yield rule, each, entry

    def _shape(self, rule: Rule) -> tuple[int, ...]:
        return tuple(self._dims[dim] for dim in rule.dims)

    def _tensor(self, rule: Rule, name: str, target: str) -> Iterator[tuple[str, GgufEntry]]:
        shape, stored = self._shape(rule), rule.stored(self._dims)
        if rule.stacked:
            yield from self._stacked(rule, name, target, shape)
            return
        if rule.transform in _BY_HEADS:
            self._taken(target, stored, rule)
            yield name, GgufEntry(shape=shape, parts=(), items=self._items(rule, target, stored), joined=True)
            return
        parts = self._parts(rule, target, stored)
        if parts:
            shift = -1.0 if rule.transform == "plus-one" else 0.0
            transposed, logged = rule.transform == "transpose", rule.transform == "minus-exp"
            # A vector may be a matrix of one column or of several rows in the file.
            flat = len(stored) > len(shape)
            columns = self._tiled("", shape[-1], 0) if rule.tiled == "columns" else None
            yield (
                name,
                GgufEntry(
                    shape=shape,
                    parts=parts,
                    shift=shift,
                    transposed=transposed,
                    logged=logged,
                    flat=flat,
                    columns=columns,
                ),
            )

    def _items(self, rule: Rule, target: str, stored: tuple[int, ...]) -> tuple[GgufEntry, ...]:
        """Return the rows that each head has in a map to all of them, as far as this tensor of the file holds them."""
        dims, columns = self._dims, stored[-1]
        if rule.transform in ("latent-keys", "latent-values"):
            rows, turned = stored[1], rule.transform == "latent-keys"
            shape = (columns, rows) if turned else (rows, columns)
            places = [[(head * rows, rows)] for head in range(stored[0])]
        else:
            groups, turned = dims["groups"], False
            keys, values = groups * dims["hk"], dims["values"] // groups
            states = ((0, dims["hk"]), (keys, dims["hk"]), (2 * keys, values))
            own = states if rule.transform == "delta-states" else ((0, values),)
            places = [[(first + head * count, count) for first, count in own] for head in range(groups)]
            shape = (sum(count for _, count in own), columns)
        return tuple(
            GgufEntry(
                shape=shape,
                parts=tuple(GgufRows(source=target, first=first, count=count) for first, count in place),
                transposed=turned,
            )
            for place in places
        )

    def _stacked(self, rule: Rule, name: str, target: str, shape: tuple[int, ...]) -> Iterator[tuple[str, GgufEntry]]:
        count, stored = self._dims[rule.stacked], rule.stored(self._dims)
        if not self._taken(target, (count, *stored), rule):
            return
        row = len(shape) == 1
        step = 1 if row else stored[0]
        for number in range(count):
            rows = GgufRows(source=target, first=number * step, count=step)
            yield name.format(number), GgufEntry(shape=shape, parts=(rows,), row=row)

    def _parts(self, rule: Rule, target: str, shape: tuple[int, ...]) -> tuple[GgufRows, ...]:
        """Return the file's rows that make the tensor; none for an optional one that is not there."""
        sizes, order = self._sizes, _ORDERS.get(rule.transform, "stored")
        heads = sizes.kv_heads if rule.dims[0] == "k" or order == "grouped" else sizes.heads
        *block, stem, ending = target.split(".")
        beginning = "".join(f"{part}." for part in block)
        widths = {"attn_q": self._dims["q"], "attn_k": self._dims["k"], "attn_v": self._dims["k"]}
        fused = f"{beginning}attn_qkv.{ending}"
        if stem in _FUSED and not self._fields.has_tensor(target) and self._fields.has_tensor(fused):
            first = sum(widths[other] for other in _FUSED[: _FUSED.index(stem)])
            self._taken(fused, (self._dims["q+2k"], *shape[1:]), rule)
            return (GgufRows(source=fused, first=first, count=shape[0], order=order, heads=heads),)
        apart = [f"{beginning}{other}.{ending}" for other in _FUSED]
        whole = stem == "attn_qkv" and order == "stored"
        if whole and not self._fields.has_tensor(target) and self._fields.has_tensor(apart[0]):
            for other, width in zip(apart, widths.values(), strict=True):
                self._taken(other, (width, *shape[1:]), rule)
            return tuple(
                GgufRows(source=other, first=0, count=width)
                for other, width in zip(apart, widths.values(), strict=True)
            )
        if not self._taken(target, shape, rule):
            return ()
        # What has another shape in the file is read whole.
        count = math.prod(shape[:-1]) if rule.stored_dims else shape[0]
        if rule.tiled == "rows":
            return (self._tiled(target, count, self._dims.get("states", 0) if rule.dims[0] == "qkv" else 0),)
        queries = sizes.heads // sizes.kv_heads
        return (GgufRows(source=target, first=0, count=count, order=order, heads=heads, queries=queries),)

    def _tiled(self, source: str, count: int, skipped: int) -> GgufRows:
        keys = self._dims["groups"]
        return GgufRows(
            source=source,
            first=0,
            count=count,
            order="tiled",
            heads=keys,
            queries=self._dims["t"] // keys,
            skipped=skipped,
        )

    def _taken(self, target: str, shape: tuple[int, ...], rule: Rule) -> bool:
        """Whether the file has it. Raises CheckpointError for a missing one that must be there, or another shape."""
        there = self._fields.take_tensor(target)
        if not there and rule.optional:
            return False
        found = self._fields.header.tensors[target].shape if there else None
        if found != shape:
            raise CheckpointError(
                f"tensor {target!r} is missing in the GGUF file, or has another shape than its metadata says",
                where=self._fields.where,
                got="none" if found is None else list(found),
                wanted=list(shape),
                do="the file is incomplete, or of a variant of this architecture that cannot be read",
            )
        return True


def _whole(pieces: Iterable[tuple[Rule, str, GgufEntry]]) -> Iterator[tuple[str, GgufEntry]]:
    """Join the rows of those tensors of which the file's tensors have some each."""
    waiting: dict[str, GgufEntry] = {}
    for rule, name, entry in pieces:
        if rule.rows == "all":
            yield name, entry
        elif name not in waiting:
            waiting[name] = entry
        else:
            first = waiting.pop(name)
            if entry.items:
                # Of each head in turn.
                items = tuple(item for pair in zip(first.items, entry.items, strict=True) for item in pair)
                yield name, replace(first, items=items)
                continue
            yield name, replace(first, parts=(*first.parts, *entry.parts), alternating=rule.rows == "odd")


def _stacked_anew(entries: Iterable[tuple[str, GgufEntry]], family: GgufFamily) -> Iterator[tuple[str, GgufEntry]]:
    """Stack the tensors of single experts where stock code knows no other way."""
    if family.stacking is None or not family.written_stacked:
        yield from entries
        return
    items: dict[str, list[GgufEntry]] = {}
    for name, entry in entries:
        place = family.stacking.place(name)
        if place is None:
            yield name, entry
            continue
        turned = family.stacking.transposed and len(entry.shape) == 2
        items.setdefault(place.stacked, []).append(
            replace(entry, shape=entry.shape[::-1], transposed=True) if turned else entry
        )
    for name, own in items.items():
        yield name, GgufEntry(shape=(len(own), *own[0].shape), parts=(), items=tuple(own))
