"""What a family file states: the names of the stock modules and the unit groups of one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PretrainedConfig

from structprune.architectures.families.common import CHANNELS_ENTRY, VALUES_ENTRY
from structprune.checkpoint.stacked import Stacking
from structprune.types import HeadUnits, Stage, SublayerKind, UnitGroup, UnitKind

StandIn = Literal["nothing", "zeros", "stream", "pair", "zeros-pair"]
"""What stands where a sublayer is removed: a zero of any shape, zeros of the stream's shape where others are added to
them in place, or the stream as the sublayer is given it, where its module adds to the stream itself. A pair has
nothing more behind them, as attention gives no weights."""


def _accept(_: Any) -> None:
    return None


def _no_values(_: Any) -> Mapping[str, float]:
    return {}


def _as_it_is(_: nn.Module, __: PretrainedConfig) -> None:
    return None


def _unchanged(config: dict[str, Any]) -> dict[str, Any]:
    return config


def one_after_the_other(_: Any) -> tuple[Stage, ...]:
    """Return the stages of the usual block: h += attention(h); h += mlp(h)."""
    return (("attention",), ("mlp",))


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSublayer:
    """How one sublayer of a block reads and writes the residual stream: h += writer(... reader(norm(h)) ...)."""

    kind: UnitKind
    norm: str
    """An RMSNorm with a weight and no bias. Names are relative to the block."""
    readers: tuple[str, ...]
    """Linear maps whose input is the norm's output."""
    writer: str
    """Linear map whose output is added to the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The residual stream of a family, where every map that touches it is linear and every norm is an RMSNorm.

    Such a stream can be rotated: an RMSNorm without a weight commutes with orthogonal maps.
    """

    sublayers: tuple[StreamSublayer, ...]
    """Sublayers in the order of the forward pass."""
    eps_field: str
    """Config entry of the norms' epsilon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of a family's mixtures: where they are in a block, and what says how many there are."""

    module: str
    """The list of experts; its modules are called by their numbers."""
    routers: tuple[str, ...]
    """Tensors with one row per expert along axis 0."""
    writer: str
    """Inside an expert: the map whose output is what the expert adds, times the router's weight of it."""
    count_field: str
    """Config entry: how many experts a block has."""
    chosen_field: str
    """Config entry: how many of them a token is sent to."""
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Tensor of all experts that files may have instead -> tensors of one expert whose rows lie there in turn."""
    transposed: bool = False
    """Whether stacked matrices have rows for columns."""
    written_stacked: bool = False
    """Whether stock code reads and writes the experts stacked only."""

    @property
    def stacking(self) -> Stacking:
        """How the experts lie in files that have them stacked."""
        return Stacking(module=self.module, maps=self.stacked, transposed=self.transposed)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpMaps:
    """The linear maps of an MLP whose width no config entry says."""

    first: tuple[str, ...]
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StockClasses:
    """Names of the stock classes of one `model_type`, which the modelling file of uneven widths is made of."""

    module: str
    """Where they are: `llama` stands for transformers.models.llama.modeling_llama."""
    stem: str
    """Our own are called StructPrune<stem>Model and StructPrune<stem>ForCausalLM."""
    layer: str | None
    """The class of the blocks; None where they have several, or get more from the model that builds them."""
    chain: tuple[str, ...]
    """Classes from the one that holds the blocks to the causal model, e.g. `("LlamaModel", "LlamaForCausalLM")`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKind:
    """What a family states of its blocks, or of those of one kind. Module names are paths inside a block."""

    attention_module: str | None
    """The attention: with zeros in its place the MLP sublayer is left; None where such a block has none."""
    mlp_modules: tuple[str, ...]
    """Modules of the MLP; with zeros in their place the attention sublayer is left."""
    mixer_modules: tuple[str, ...] = ()
    """Modules that mix positions otherwise than attention does, such as recurrences. They stay as they are."""
    norms: Mapping[SublayerKind, tuple[str, ...]]
    """The norms of each sublayer, as in its unit group."""
    stand_ins: Mapping[SublayerKind, StandIn] = field(default_factory=dict[SublayerKind, StandIn])
    """Kinds whose modules need another stand-in than `nothing`."""
    groups: Callable[[PretrainedConfig, HeadUnits], tuple[UnitGroup, ...]]
    """Raises UnsupportedError where attention has no such units."""
    stages: Callable[[PretrainedConfig], tuple[Stage, ...]] = one_after_the_other
    """Order in which the sublayers read the stream; `(("attention", "mlp"),)` is `h += attention(h) + mlp(h)`."""
    unstack: Callable[[nn.Module, PretrainedConfig], None] = _as_it_is
    """Exchanges modules of a stock layer that hold several of the checkpoint's tensors as one, in place.

    For modules with the checkpoint's names that compute the same. Called under the device of the layer.
    """
    experts: Experts | None = None
    """None where a block's MLP is no mixture."""
    stream_scales: tuple[str, ...] = ()
    """Tensors of one number that the stream is multiplied by behind the last stage."""
    given: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Buffers that a whole stock model computes for such a block, and no checkpoint has."""

    def stand_in(self, kind: SublayerKind) -> StandIn:
        """Return what stands for the modules of a sublayer that is removed."""
        return self.stand_ins.get(kind, "nothing")

    def sublayer_modules(self, kind: SublayerKind) -> tuple[str, ...]:
        """Return the modules of one sublayer of a block, without its norms; none where it has no such sublayer."""
        attention = () if self.attention_module is None else (self.attention_module,)
        return {"attention": attention, "mlp": self.mlp_modules, "mixer": self.mixer_modules}[kind]

    def stand_in_modules(self, kind: SublayerKind) -> dict[str, StandIn | None]:
        """Return what stands for each module of a sublayer that is removed; None where the stream is passed on."""
        # The sublayer's norms would be computed for nothing: they are half as dear as its products.
        modules: dict[str, StandIn | None] = dict.fromkeys(self.sublayer_modules(kind), self.stand_in(kind))
        return modules | dict.fromkeys(self.norms.get(kind, ()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(BlockKind):
    """Data of one family. Module names are paths inside the stock `AutoModelForCausalLM` class.

    What it states of blocks holds for all of them but the `others`.
    """

    name: str
    others: Mapping[int, BlockKind] = field(default_factory=dict[int, BlockKind])
    """Number of a block -> its kind, where it is another one."""
    blocks_module: str
    embedding_modules: tuple[str, ...]
    """Modules with weights that run before the first block."""
    rotary_module: str | None
    """Module without weights that computes position embeddings; built anew from the config."""
    final_norm_module: str | None
    head_module: str
    logit_entries: tuple[str, ...] = ()
    """Config entries that change the logits, of those in `architectures/stock/head.py`, in the order in which they do.
    """
    embedding_buffers: Callable[[PretrainedConfig], Mapping[str, float]] = _no_values
    """Numbers that embedding modules compute as they are built and keep in no checkpoint: path -> value."""
    classes: Mapping[str, StockClasses]
    """`model_type` -> stock classes."""
    attention_implementation: Literal["sdpa", "eager"] = "sdpa"
    """`eager` where SDPA cannot compute the attention; its scores are then held as matrices."""
    value_maps: tuple[str, str] | None = None
    """v_proj and o_proj inside a block, where value channels can go; None: they cannot."""
    tiled_attention: bool = True
    """Whether stock attention is called by a name, so that another implementation may take its place."""
    channel_maps: MlpMaps | None = None
    """The maps inside a block where channels can go by our own code alone; None: they go by the config, or stay."""
    attention_reads_widths: bool = False
    """Whether stock attention reads numbers of heads from its config as it runs, not only as it is built."""
    returns_tuple: bool = False
    """Whether a stock block returns its hidden states as the first of several."""
    inputs_first: bool = False
    """Whether linear maps of a block store their weights as (inputs, outputs)."""
    registers_names: bool = False
    """Whether stock code loads the checkpoint's names by a translation, which our modelling file must ask for."""
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    """Start of a tensor's name in older checkpoints -> in the stock class."""
    check: Callable[[PretrainedConfig], None] = _accept
    """Raises UnsupportedError for variants that the family file does not describe."""
    stream: Stream | None = None
    """None where the residual stream cannot be rotated, as with LayerNorm, or is not described."""
    resized: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged
    """config.json with smaller numbers -> one that stock code accepts, where the family's own class would refuse it."""
    numbered: bool = False
    """Whether a block computes something else by its number without a list in the config that says so."""
    notes: tuple[str, ...] = ()
    """What a person should know of where this description is from."""

    def per_layer_entries(self, config: PretrainedConfig) -> set[str]:
        """Return the config entries that the config of a single block may change."""
        # Those of KV groups are all that heads have; which units went before says nothing of those that go now.
        groups = [group for kind in self.kinds for group in kind.groups(config, "kv-group")]
        entries = {name for group in groups for name in group.config_fields}
        own = {VALUES_ENTRY: self.value_maps, CHANNELS_ENTRY: self.channel_maps}
        return entries | {name for name, maps in own.items() if maps is not None}

    def at(self, index: int) -> BlockKind:
        """Return the kind of block `index`."""
        return self.others.get(index, self)

    def having(self, kind: SublayerKind) -> BlockKind:
        """Return the first kind of blocks that has this sublayer, its own where none has."""
        return next((blocks for blocks in self.kinds if blocks.sublayer_modules(kind)), self)

    def is_alike(self, kind: UnitKind) -> bool:
        """Whether all blocks that have this sublayer have it under the same names, with the same stand-in."""
        having = [blocks for blocks in self.kinds if blocks.sublayer_modules(kind)]
        return len({tuple(blocks.stand_in_modules(kind).items()) for blocks in having}) <= 1

    @property
    def attends_everywhere(self) -> bool:
        """Whether all blocks have attention."""
        return all(kind.attention_module is not None for kind in self.kinds)

    @property
    def mixture(self) -> Experts | None:
        """The experts of its mixtures, of whatever blocks; None without any."""
        return next((kind.experts for kind in self.kinds if kind.experts is not None), None)

    @property
    def kinds(self) -> tuple[BlockKind, ...]:
        """The kinds of its blocks, each once."""
        return (self, *{id(kind): kind for kind in self.others.values()}.values())
