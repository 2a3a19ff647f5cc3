"""The blocks of one kind of a traced model, as graphs: what they consist of, and which units can leave."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from structprune.architectures.families.common import CHANNELS_ENTRY
from structprune.architectures.family import Experts, MlpMaps
from structprune.architectures.modeling.narrow_mlp import narrow_mlp
from structprune.architectures.stock.placeholders import STAND_INS, give_buffers
from structprune.architectures.traced.mixture import Mixture, find_mixture, joined_units
from structprune.architectures.traced.small_block import SmallBlock, own_config
from structprune.architectures.traced.surroundings import Surroundings, set_attention, to_meta
from structprune.architectures.traced.widths import BiasEntry, WidthEntries, bias_entry, width_entries
from structprune.errors import UnsupportedError, first_line
from structprune.kinds import SUBLAYER_KINDS
from structprune.tracing.graph import Traced, trace
from structprune.tracing.groups import attention_groups, common_prefix, held_group, mlp_groups
from structprune.tracing.sublayers import Sublayer, find_stream, find_sublayers, stages, stream_scales
from structprune.types import HeadUnits, Stage, SublayerKind, UnitGroup, UnitKind

_KEPT = 4
"""Graphs of blocks that are kept. What is read from them is small, and kept for every width."""

Sublayers = Mapping[SublayerKind, tuple[Sublayer, ...]]
"""The sublayers of a block; an MLP has several parts where it is a mixture."""


class TracedBlock:
    """The blocks of one kind, that of block `index`, as graphs: one for each width that is asked for."""

    def __init__(self, config: PretrainedConfig, around: Surroundings, index: int) -> None:
        self._around, self.index = around, index
        self._layer_class: Any = type(around.blocks[index])
        self._config = own_config(copy.deepcopy(config), index)
        # Some blocks look their attention up by its name, which only a whole model decides.
        set_attention(self._config, around.attention_implementation)
        self._check_built_by_number()
        self.given = around.given_buffers(index)
        self.channel_maps: MlpMaps | None = None
        """Maps of an MLP whose channels no config entry says, once that is known."""
        self._configs: dict[tuple[Any, ...], PretrainedConfig] = {}
        self.mixture: Mixture | None = find_mixture(self._config, self._stock)
        self._mixers: dict[str, type[nn.Module]] = {}
        self._own_key = self._key(self._config)
        self._whole = self._traced(self._own_key)
        self._mixers = self._mixer_stand_ins()
        self._sublayers = functools.lru_cache(_KEPT)(self._traced)
        self._traced_groups: dict[tuple[Any, HeadUnits], tuple[UnitGroup, ...]] = {}
        self.stages: tuple[Stage, ...] = self._ordered_stages()
        self._entries: dict[tuple[UnitKind, HeadUnits], tuple[WidthEntries, BiasEntry | None]] = {}
        self._num_tied = 0
        """How many experts for all tokens are as wide as the others, by the same entry."""
        self.activation = _activation(config)
        self.output_scales: dict[UnitKind, float] = {}
        """Kind -> what its consumer's output is multiplied by before the stream's sum, once that is known."""

    def _check_built_by_number(self) -> None:
        """Raise UnsupportedError unless blocks are built from a config and their number."""
        if "layer_idx" not in inspect.signature(self._layer_class.__init__).parameters:
            raise refused(self._config, "its blocks are not built by number", got=self._layer_class.__name__)

    def _stock(self, config: PretrainedConfig) -> nn.Module:
        """Build the block on `meta` as stock code does."""
        with torch.device("meta"):
            block: nn.Module = self._layer_class(config, layer_idx=self.index)
        narrow_mlp(block, config, self.channel_maps)
        give_buffers(block, self.given, torch.device("meta"))
        return block.eval().requires_grad_(False)

    def build(self, config: PretrainedConfig) -> nn.Module:
        """Build the block on `meta` as it is traced: of a mixture's experts the first one, for all tokens."""
        block = self._stock(config)
        if self.mixture is None:
            return block
        with torch.device("meta"):
            return self.mixture.split(block, traced=True).eval().requires_grad_(False)

    def unstack(self, layer: nn.Module, _: PretrainedConfig) -> None:
        """Give a stock layer's experts modules of their own."""
        if self.mixture is not None:
            self.mixture.split(layer, traced=False)

    def _key(self, config: PretrainedConfig) -> tuple[Any, ...]:
        # Blocks differ by numbers alone; heads of twice the size have the shapes of twice the heads.
        numbers = {**config.to_dict(), "head_dim": getattr(config, "head_dim", None)}
        key = tuple(sorted((name, value) for name, value in numbers.items() if type(value) is int))
        self._configs.setdefault(key, config)
        return key

    def _traced(self, key: tuple[Any, ...]) -> tuple[Traced, Sublayers]:
        config = self._configs[key]
        hidden, kwargs = to_meta((self._around.hidden_BSD, self._around.plain_kwargs(self.index)))
        block = self.build(config)
        for name, stand_in in self._mixers.items():
            block.set_submodule(name, stand_in())
        try:
            with torch.no_grad():
                block(hidden, **kwargs)
        except Exception as error:
            # Before torch.export logs the same at length.
            raise refused(config, "a block of it does not run by itself", got=first_line(error)) from error
        traced = trace(block, (hidden,), kwargs, num_outputs=1)
        found: dict[SublayerKind, tuple[Sublayer, ...]] = {}
        for part in find_sublayers(traced, find_stream(traced)):
            parts = (*found.get(part.kind, ()), part)
            # A mixture's parts are one sublayer: they read and add to the stream together.
            together = part.kind == "mlp" and {(each.reads, each.adds) for each in parts} == {(part.reads, part.adds)}
            if len(parts) > 1 and not together:
                names = ", ".join(part.tensors[:3])
                raise refused(config, f"has blocks with several sublayers of kind {part.kind}", got=names)
            found[part.kind] = parts
        return traced, found

    def _graph(self, config: PretrainedConfig) -> tuple[Traced, Sublayers]:
        """Return the graph of the block, and its sublayers; without mixers for another config than the model's."""
        key = self._key(config)
        return self._whole if key == self._own_key else self._sublayers(key)

    def _mixer_stand_ins(self) -> dict[str, type[nn.Module]]:
        """Choose what stands for mixers where other widths are traced: their graphs are long, and always the same."""
        modules = self.modules("mixer")
        if not modules:
            return {}
        outputs: list[Any] = []
        block = self.build(self._config)
        block.get_submodule(modules[-1]).register_forward_hook(lambda *args: outputs.append(args[2]))
        hidden, kwargs = to_meta((self._around.hidden_BSD, self._around.plain_kwargs(self.index)))
        with torch.no_grad():
            block(hidden, **kwargs)
        return dict.fromkeys(modules, STAND_INS["mixer"]["pair" if isinstance(outputs[0], tuple) else "nothing"])

    def stream_scales(self) -> tuple[str, ...]:
        """List the tensors that the stream is multiplied by behind the last stage.

        Raises UnsupportedError where it is multiplied elsewhere, or sublayers are not normed.
        """
        traced, sublayers = self._whole
        scales = stream_scales(traced, find_stream(traced))
        last = max(part.adds for parts in sublayers.values() for part in parts)
        groups = self.groups(self._config, "kv-group")
        if any(state < last for _, state in scales) or (scales and any(not group.output_normed for group in groups)):
            raise refused(self._config, "its stream is multiplied between sublayers", got=scales[0][0])
        return tuple(name for name, _ in scales)

    def modules(self, kind: SublayerKind) -> tuple[str, ...]:
        """Return the modules that are a sublayer: the one around all its tensors, or the maps themselves."""
        if kind not in self.sublayers:
            return ()
        prefix = self.prefix(kind)
        if prefix.endswith("."):
            return (prefix.removesuffix("."),)
        maps = {name.rpartition(".")[0] for part in self.sublayers[kind] for name in part.tensors}
        return tuple(name for name, _ in self._around.blocks[self.index].named_modules() if name in maps)

    @property
    def sublayers(self) -> Sublayers:
        """The sublayers of the block."""
        return self._whole[1]

    def _ordered_stages(self) -> tuple[Stage, ...]:
        parts = [part for several in self.sublayers.values() for part in several]
        return tuple(tuple(kind for kind in SUBLAYER_KINDS if kind in stage) for stage in stages(parts))

    def prefix(self, kind: SublayerKind) -> str:
        """Return what the names of a sublayer's tensors begin with."""
        return common_prefix(name for part in self.sublayers[kind] for name in part.tensors)

    def consumers(self, kind: SublayerKind) -> list[str]:
        """Return the weights and biases whose products are added to the stream."""
        products = [part.consumer for part in self.sublayers[kind]]
        return [name for each in products for name in (*each.origins, each.bias) if name is not None]

    def small(self) -> SmallBlock:
        """Build the block with few units."""
        groups = self.groups(self._config, "kv-group")
        return SmallBlock(self._around, groups, self.index, self.experts, self.channel_maps)

    @property
    def experts(self) -> Experts | None:
        """The experts of a mixture, by their names in files; None where the block is none."""
        return None if self.mixture is None else self.mixture.experts

    def norms(self, kind: SublayerKind) -> tuple[str, ...]:
        """Return the norms that only this sublayer has."""
        names = [name for part in self.sublayers.get(kind, ()) for name in part.norms]
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))

    def groups(self, config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
        """Build the groups of a block. Raises UnsupportedError where attention has no such units."""
        if head_units == "value-channel":
            raise UnsupportedError(
                f"no layer of {config.model_type} with fewer value channels is described",
                got="--head-units value-channel",
                wanted="--head-units kv-group or query-head",
            )
        config = own_config(config, self.index)
        key = self._key(config), head_units
        if key not in self._traced_groups:
            self._traced_groups[key] = self._read_groups(config, head_units)
        found = self._traced_groups[key]
        entries = {group.kind: self._entries_of(group, head_units) for group in found}
        groups = [self._with_entries(config, group, *entries[group.kind]) for group in found]
        if self.mixture is None:
            return tuple(groups)
        expert, *shared = [group for group in groups if group.kind == "mlp"]
        count = getattr(config, self.mixture.experts.count_field, self.mixture.num_experts)
        output_module = self.sublayers["mlp"][0].output_module
        parts = replace(self.mixture, num_experts=count).of_all(expert, shared[: self._num_tied], output_module)
        return (*parts, *(group for group in groups if group.kind != "mlp"))

    def has_whole_parts(self, config: PretrainedConfig) -> bool:
        """Whether a mixture has experts for all tokens that keep their channels."""
        return self.mixture is not None and len(self._mlp(config)) > 1 + self._num_tied

    def _read_groups(self, config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
        """Read the groups of a block from its graph, without what its config says: a mixture's experts first."""
        return (*self._mlp(config), *self._attention(config, head_units))

    def _mlp(self, config: PretrainedConfig) -> tuple[UnitGroup, ...]:
        traced, sublayers = self._graph(config)
        if "mlp" not in sublayers:
            return ()
        found = [self._as_whole(group) for group in mlp_groups(traced)]
        experts = [group for group in found if self.mixture is not None and self.mixture.is_expert(group)]
        if self.mixture is not None and len(experts) == 1 and experts[0].output_norm_eps is None:
            num_units = experts[0].num_units
            return (*experts, *(joined_units(group, num_units) for group in found if group not in experts))
        if self.mixture is None and len(found) == 1:
            return tuple(found)
        several = f"{len(found)} groups: {', '.join(group.name for group in found[:3])}"
        got = several if found else f"{sublayers['mlp'][0].consumer.term.size} inputs held"
        raise refused(config, "has no one set of MLP channels that can leave", got=got)

    def _attention(self, config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
        traced, sublayers = self._graph(config)
        if "attention" not in sublayers:
            return ()
        try:
            return (self._as_whole(attention_groups(traced, head_units)[0]),)
        except UnsupportedError as error:
            if head_units != "kv-group":
                raise
            return (replace(self._as_whole(held_group(traced, sublayers["attention"][0])), held=str(error)),)

    def _as_whole(self, group: UnitGroup) -> UnitGroup:
        """Name what belongs to the whole sublayer: all parts of a mixture, and norms that no mixer reads."""
        return replace(group, module_prefix=self.prefix(group.kind), norm_modules=self.norms(group.kind))

    def _entries_of(self, group: UnitGroup, head_units: HeadUnits) -> tuple[WidthEntries, BiasEntry | None]:
        """Find what the config says of the groups of a kind: entries of its width, and of biases."""
        key = group.kind, head_units
        if key not in self._entries:
            own = self._of_kind(self._config, *key)
            widths, bias = WidthEntries(per_unit={}, fixed={}), None
            if own[0].held is None:
                widths = self._widths_of(own, key)
                bias = bias_entry(self._config, self.build, own[0]) if len(own) == 1 else None
                if group.kind == "mlp" and not widths.per_unit:
                    self.channel_maps = self._plain_maps(own)
                    if self.channel_maps is not None:
                        entry = {CHANNELS_ENTRY: own[0].num_units}
                        widths = WidthEntries(per_unit={CHANNELS_ENTRY: 1}, fixed=entry)
            self._entries[key] = widths, bias
        return self._entries[key]

    def _plain_maps(self, own: Sequence[UnitGroup]) -> MlpMaps | None:
        """Return the maps of an MLP that others of any width can stand for; None where it has more than linear maps."""
        if self.mixture is not None:
            return None
        group, block = own[0], self._around.blocks[self.index]
        plain = all(part.axis == 0 and part.width == part.repeat == 1 and part.offset == 0 for part in group.producers)
        if len(own) > 1 or not plain:
            return None
        parts = {part.tensor.rpartition(".")[0]: part for part in group.producers}
        modules = [block.get_submodule(name) for name in (*parts, group.consumer_module)]
        if not all(type(module) is nn.Linear for module in modules):
            return None
        return MlpMaps(first=tuple(parts), last=group.consumer_module)

    def _widths_of(self, own: Sequence[UnitGroup], key: tuple[UnitKind, HeadUnits]) -> WidthEntries:
        """Find the entries of the first group, and how many shared experts are as wide because they say so."""
        found = WidthEntries(per_unit={}, fixed={})
        for together in range(len(own), 0, -1):
            if all(each.num_units == own[0].num_units for each in own[:together]):
                found = width_entries(self._config, self.build, functools.partial(self._count, *key), own[:together])
            if found.per_unit:
                if len(own) > 1:
                    self._num_tied = together - 1
                break
        return found

    def _with_entries(
        self, config: PretrainedConfig, group: UnitGroup, widths: WidthEntries, bias: BiasEntry | None
    ) -> UnitGroup:
        """Add what the config says of a group: entries of its width and of biases, and the activation."""
        group = replace(group, output_scale=self.output_scales.get(group.kind, 1.0))
        if group.held is not None:
            return group
        return replace(
            group,
            config_fields={name: _value(config, name, group) // group.num_units for name in widths.per_unit},
            fixed_fields=widths.fixed,
            bias_field=None if bias is None or group.consumer_bias else bias.name,
            bias_modules=() if bias is None else bias.modules,
            activation=self.activation if group.kind == "mlp" and self.mixture is None else None,
        )

    def _of_kind(self, config: PretrainedConfig, kind: UnitKind, head_units: HeadUnits) -> Sequence[UnitGroup]:
        """Return the groups of a kind without what its config says."""
        return self._mlp(config) if kind == "mlp" else self._attention(config, head_units)

    def _count(self, kind: UnitKind, head_units: HeadUnits, config: PretrainedConfig) -> int:
        return self._of_kind(config, kind, head_units)[0].num_units


def _value(config: PretrainedConfig, name: str, group: UnitGroup) -> int:
    """Return the value of a width's entry; left out, it is the number of units."""
    value = getattr(config, name, None)
    return group.num_units if value is None else value


def _activation(config: PretrainedConfig) -> str | None:
    """Return the name of the activation, if all entries that name one agree."""
    found = {value for value in config.to_dict().values() if isinstance(value, str) and value in ACT2FN}
    return found.pop() if len(found) == 1 else None


def refused(config: PretrainedConfig, what: str, got: str) -> UnsupportedError:
    """Say why a model is not described."""
    return UnsupportedError(
        f"{config.model_type} has no family file, and {what}",
        got=got,
        wanted="blocks of attention, or of what else mixes positions, and an MLP, each with weights of its own",
    )
