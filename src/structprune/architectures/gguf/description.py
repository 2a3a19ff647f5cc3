"""What the description of one GGUF architecture consists of, and what its entries are read and written with.

Dimensions of tensors: d hidden size, q query heads times head size, k KV heads times head size, f MLP channels (of one
expert in a mixture), h head size, n query heads, m KV heads, e experts, v vocabulary, p positions, 2f and q+2k fused;
a description may have more of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from structprune.architectures.gguf.fields import GgufFields
from structprune.checkpoint.stacked import Stacking
from structprune.types import UnitKind

Transform = Literal[
    "copy",
    "interleave",
    "plus-one",
    "transpose",
    "ungroup",
    "minus-exp",
    "latent-keys",
    "latent-values",
    "delta-states",
    "delta-gates",
]
"""interleave: rows of a head from (first half, second half) to pairs, as llama.cpp's NORM rotary positions want
them; plus-one: norms that stock code applies as 1 + weight; transpose: Conv1D; ungroup: from the queries, key and value
of one KV head after the other to those of all heads; latent-keys, latent-values: the keys' rows of each head,
transposed, and the values', of a map from latents to both; minus-exp: the logarithm of a rate of decay, in the file
the rate itself, below zero; delta-states, delta-gates: queries, keys and values of all key heads, and the gates, of a
map to those of one key head after the other."""

Rows = Literal["all", "front", "back", "even", "odd"]
"""Which rows of a checkpoint's tensor a tensor of the file holds: gate and up are one map in some checkpoints, one
behind the other or in turns."""

Value = int | float | str | bool | list[int] | list[float]
"""A value in a file: int is written as uint32, float as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One checkpoint tensor and its place. Rules with the same target are joined along the rows, in order."""

    source: str
    """Stock name, relative to the block or, outside the blocks, whole."""
    target: str
    """Name in the file, relative to `blk.N.` or whole."""
    dims: tuple[str, ...]
    """Dimensions as stored in the checkpoint."""
    sublayer: UnitKind | None = None
    transform: Transform = "copy"
    optional: bool = False
    """Biases that not every model has."""
    float32: bool = False
    """Not stored in the file's dtype although it has two dimensions."""
    stacked: str = ""
    """A dimension: one tensor of each of so many in the checkpoint, whose number stands for `{}`; stacked in the file.
    """
    rows: Rows = "all"
    tiled: Literal["", "rows", "columns"] = ""
    """Whether value heads of a key head, one after the other in a checkpoint, are apart in the file: first those that
    come first in each key head."""
    factor: Callable[[Any], Any] | None = None
    """Parsed config -> what the tensor is multiplied by as it is written; a config that is read has ones."""
    stored_dims: tuple[str, ...] = ()
    """Dimensions in the file, where they are others; without the stacked one."""
    kinds: frozenset[str] = frozenset()
    """Kinds of blocks that have it; empty: all."""

    def stored(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape in the file, of one of each where they are stacked, by the size of each dimension."""
        if self.stored_dims:
            return tuple(dims[dim] for dim in self.stored_dims)
        shape = tuple(dims[dim] for dim in self.dims)
        if self.transform == "transpose":
            return shape[::-1]
        return shape if self.rows == "all" else (shape[0] // 2, *shape[1:])


def of_kind(kind: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return rules that blocks of one kind alone have."""
    return tuple(replace(rule, kinds=frozenset({kind})) for rule in rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers that every file says."""

    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    channels: int
    """Channels of an MLP, or of one expert."""
    positions: int
    experts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufReading:
    """A file whose entries are read."""

    fields: GgufFields
    sizes: Sizes
    family: GgufFamily

    @property
    def target(self) -> Target:
        """The architecture of the file."""
        return self.family.uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWidths:
    """One block of a file that is written."""

    index: int
    """Number of the block in the checkpoint."""
    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """What the entries of a file are written from."""

    config: Any
    """The parsed config, its per-layer part left out."""
    family: GgufFamily
    target: Target
    head_size: int
    blocks: tuple[BlockWidths, ...]

    def layer_types(self) -> list[str]:
        """List the attention type of every block; Mistral and Phi-3 have one config entry for all."""
        types = getattr(self.config, "layer_types", None)
        if types:
            return [types[block.index] for block in self.blocks]
        window = getattr(self.config, "sliding_window", None)
        return ["sliding_attention" if window else "full_attention"] * len(self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Keys of a file and the config entries that say the same, both ways."""

    read: Callable[[GgufReading], Mapping[str, Any]]
    """Returns config entries. Marks the keys that it reads; raises UnsupportedError for what stock code lacks."""
    write: Callable[[GgufModel], Mapping[str, Value]]
    """Returns keys without the architecture's name in front; raises UnsupportedError for what they cannot say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An architecture of llama.cpp as far as one family uses it."""

    architecture: str
    outer: tuple[Rule, ...]
    block: tuple[Rule, ...]
    entries: tuple[Entry, ...]
    """Beside the sizes, which every file has."""
    width_key: str = "feed_forward_length"
    """Key of the channels of an MLP, or of one expert."""
    lists_widths: bool = False
    """Widths are written as one number per block."""
    skips_attention: bool = False
    """A block other than the first may have no heads."""
    rope_factors: tuple[str, ...] = ()
    """Tensors with factors of the rotary frequencies that it reads: LLaMA 3's, or those for short and long texts."""
    needs_tied: bool = False
    """The head is always the embedding."""
    needs_head: bool = False
    """The file holds a head of its own even where it is the embedding."""
    latent: bool = False
    """Keys and values come from latents: their sizes are entries of their own, and the file has one KV head."""
    even_heads: bool = False
    """Heads times head size is always the hidden size."""
    some_attention: bool = False
    """Blocks without attention say so by no KV heads."""
    no_groups: bool = False
    """Every head has keys and values of its own."""
    unused: tuple[str, ...] = ()
    """Keys that llama.cpp's converter writes and the architecture does not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFamily:
    """One `model_type`."""

    blocks: str
    """Checkpoint prefix of the blocks, with the final dot."""
    activations: tuple[str, ...]
    """The values of the activation's config entry that the architectures compute, the usual one first; all GELUs are
    one to llama.cpp, by tanh. Empty: stock code has one alone."""
    widths: Mapping[str, tuple[str, int]]
    """Dimension -> (tensor of a block, axis) that it is read from; the others follow from the config."""
    uniform: Target
    uneven: Target | None = None
    window: Literal["any", "caps-context"] = "any"
    """Whether a sliding window of the config limits the context, because the architecture has none."""
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Config entry -> biases of a block that stock code has together, by their names in the checkpoint; an entry
    without a name is one that is always on."""
    requires: Mapping[str, object] = field(default_factory=dict[str, object])
    """Config entries that the architectures take for granted -> value."""
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    """Size -> config entry, where neither that name nor the config's own map of names leads to it; empty: no entry."""
    mlp_multiple: int = 0
    """MLPs are so many times the hidden size wide, which no config entry says; 0: one does."""
    dims: Callable[[Any], Mapping[str, int]] = lambda _: {}
    """Parsed config -> dimensions of its own."""
    kv_heads: Callable[[Any], int] = lambda config: (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    """Parsed config -> KV heads of a block that has lost none."""
    kinds: Callable[[Any], list[frozenset[str]]] | None = None
    """Parsed config -> kinds of each block, for `Rule.kinds`."""
    stacking: Stacking | None = None
    """How experts may lie stacked in checkpoints, where no family file says so."""
    written_stacked: bool = False
    """Whether stock code reads experts stacked only."""
    read_if: Callable[[GgufReading], bool] = lambda _: True
    """Whether a file of the architecture is read as this type, rather than as the next one in the table."""
