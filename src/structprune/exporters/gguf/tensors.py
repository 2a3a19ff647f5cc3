"""The tensors of a GGUF file that is written: of which tensors of the checkpoint each is made, by the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from structprune.architectures.gguf.description import GgufModel, Rows, Rule, Transform
from structprune.architectures.gguf.read import entry_name
from structprune.architectures.gguf.rope_writing import rope_factors
from structprune.architectures.gguf.tensors import block_dimensions, dimensions
from structprune.architectures.modeling.removed import RemovedSublayers
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, UnsupportedError

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Computed by the stock model, and in old checkpoints all the same.
_COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPart:
    """A tensor of the checkpoint, and what happens to it."""

    name: str
    transform: Transform = "copy"
    heads: int = 1
    """Heads of the tensor; KV heads where rows are to be ungrouped."""
    queries: int = 1
    """Queries of one KV head."""
    rows: Rows = "all"
    tiled: str = ""
    """Whether rows or columns of value heads are put apart; `heads` are key heads then."""
    skipped: int = 0
    """Rows in front that stay."""
    factor: Any = None
    """A number, or one for each row, (rows, 1); None: nothing is multiplied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[GgufPart, ...] = ()
    """What it is joined of; none: zeros or `values`."""
    values: Tensor | None = None
    float32: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One block of checkpoint and file, or what is outside the blocks."""

    source_prefix: str = ""
    """What names of the checkpoint's tensors start with."""
    target_prefix: str = ""
    """What names in the file start with."""
    dims: Mapping[str, int]
    """Dimension of a rule -> its size here."""
    heads: tuple[int, int] = (1, 1)
    """Query heads and KV heads."""
    config: Any = None
    """What factors are made of."""
    gone: frozenset[str] = frozenset()
    """Sublayers that the block lost, whose tensors are zeros."""

    def part(self, rule: Rule, name: str) -> GgufPart:
        """Return the part that a rule makes of this tensor."""
        heads, kv_heads = self.heads
        grouped = rule.transform == "ungroup"
        if rule.transform in ("delta-states", "delta-gates"):
            return GgufPart(name=name, transform=rule.transform, heads=self.dims["groups"])
        if rule.tiled:
            return GgufPart(
                name=name,
                transform=rule.transform,
                tiled=rule.tiled,
                heads=self.dims["groups"],
                queries=self.dims["t"] // self.dims["groups"],
                skipped=self.dims["states"] if rule.dims[0] == "qkv" else 0,
            )
        return GgufPart(
            name=name,
            transform=rule.transform,
            heads=kv_heads if grouped or rule.dims[0] == "k" else heads,
            queries=heads // kv_heads if grouped else 1,
            rows=rule.rows,
            factor=None if rule.factor is None else rule.factor(self.config),
        )


def list_tensors(reader: CheckpointReader, model: GgufModel, removed: RemovedSublayers) -> list[GgufTensor]:
    """List the file's tensors, in order. Raises CheckpointError if checkpoint and rules do not match one to one."""
    target, config, family = model.target, model.config, model.family
    experts = entry_name(config.model_type, family, "num_experts")
    positions = entry_name(config.model_type, family, "max_position_embeddings")
    common = dimensions(
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        positions=getattr(config, positions) if positions else 0,
        head_size=model.head_size,
        experts=(getattr(config, experts) or 0) if experts else 0,
    )
    common |= family.dims(config)
    kinds = family.kinds(config) if family.kinds is not None else None
    used: set[str] = set()
    result = _joined(reader, _Place(dims=common, config=config), target.outer, used)
    if target.needs_head and all(tensor.name != _HEAD for tensor in result):
        result.append(replace(next(tensor for tensor in result if tensor.name == _EMBEDDING), name=_HEAD))
    for name, factors in rope_factors(model).items():
        result.append(GgufTensor(name=name, shape=tuple(factors.shape), values=factors))
    for number, block in enumerate(model.blocks):
        dims = common | block_dimensions(
            heads=block.heads, kv_heads=block.kv_heads, head_size=model.head_size, channels=block.channels
        )
        own = kinds[block.index] if kinds is not None else frozenset[str]()
        rules = [
            rule
            for rule in target.block
            if (rule.sublayer != "attention" or block.heads) and (not rule.kinds or rule.kinds & own)
        ]
        place = _Place(
            source_prefix=f"{family.blocks}{block.index}.",
            target_prefix=f"blk.{number}.",
            dims=dims,
            config=config,
            heads=(block.heads, block.kv_heads),
            gone=removed[block.index],
        )
        result += _joined(reader, place, rules, used)
    left = [name for name in reader.shapes if name not in used and not name.endswith(_COMPUTED)]
    if left:
        raise UnsupportedError(
            f"llama.cpp's {target.architecture} has no place for {len(left)} tensor(s), first {sorted(left)[0]!r}",
            where=str(reader.directory),
        )
    return result


def _joined(reader: CheckpointReader, place: _Place, rules: Sequence[Rule], used: set[str]) -> list[GgufTensor]:
    """Build the tensors that `rules` make in one place; what they read of the checkpoint is added to `used`."""
    result: dict[str, GgufTensor] = {}
    for rule in rules:
        if rule.stacked:
            result |= _stacked(reader, place, rule, used)
            continue
        name = place.source_prefix + rule.source
        zeros = rule.sublayer in place.gone
        if rule.optional and (zeros or name not in reader.shapes):
            continue
        shape = tuple(place.dims[dim] for dim in rule.dims)
        if not zeros:
            _check_shape(reader, name, shape)
            used.add(name)
        shape = rule.stored(place.dims)
        full = place.target_prefix + rule.target
        before = result.get(full)
        result[full] = GgufTensor(
            name=full,
            shape=shape if before is None else (before.shape[0] + shape[0], *shape[1:]),
            sources=(
                *(() if before is None else before.sources),
                *(() if zeros else (place.part(rule, name),)),
            ),
            float32=rule.float32,
        )
    return list(result.values())


def _stacked(reader: CheckpointReader, place: _Place, rule: Rule, used: set[str]) -> dict[str, GgufTensor]:
    """Make one tensor of the file for all experts of a block, or for the norms of its heads."""
    parts: list[GgufPart] = []
    shape, count = tuple(place.dims[dim] for dim in rule.dims), place.dims[rule.stacked]
    names = [place.source_prefix + rule.source.format(number) for number in range(count)]
    if rule.optional and names[0] not in reader.shapes:
        return {}
    if rule.sublayer not in place.gone:
        for name in names:
            _check_shape(reader, name, shape)
        used.update(names)
        parts = [place.part(rule, name) for name in names]
    full = place.target_prefix + rule.target
    shape = rule.stored(place.dims)
    return {full: GgufTensor(name=full, shape=(count, *shape), sources=tuple(parts), float32=rule.float32)}


def _check_shape(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> None:
    if reader.shapes.get(name) != shape:
        raise CheckpointError(
            f"tensor {name!r} is missing or has another shape than the rest of the checkpoint says",
            where=str(reader.directory),
            got=reader.shapes.get(name, "none"),
            wanted=shape,
        )
