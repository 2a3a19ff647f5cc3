"""The description of a stock causal model that no family file has: the same data, from running and tracing it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from structprune.architectures.family import Family, StandIn, StockClasses
from structprune.architectures.stock.head import LOGIT_ENTRIES
from structprune.architectures.stock.placeholders import STAND_INS
from structprune.architectures.traced.small_block import TOLERANCE, SmallBlock, relative_difference
from structprune.architectures.traced.surroundings import Surroundings, look_around, set_attention, to_meta
from structprune.architectures.traced.widths import BiasEntry, WidthEntries, bias_entry, shapes_of, width_entries
from structprune.errors import UnsupportedError, first_line
from structprune.tracing.graph import Traced, trace
from structprune.tracing.groups import attention_groups, held_group, mlp_groups
from structprune.tracing.sublayers import Sublayer, find_stream, find_sublayers, stages
from structprune.types import UNIT_KINDS, HeadUnits, Stage, UnitGroup, UnitKind

_KEPT = 4
"""Graphs of blocks that are kept. What is read from them is small, and kept for every width."""


def traced_family(config: PretrainedConfig) -> Family:
    """Describe a stock causal model from what it does. Raises UnsupportedError, with the reason, where that fails.

    `config` is that of blocks of equal widths.
    """
    around = look_around(config)
    block = TracedBlock(config, around)
    sublayers = block.sublayers(config)
    holder = around.model.get_submodule(around.blocks_module.rpartition(".")[0])
    groups = block.groups(config, "kv-group")
    modules = {group.kind: _modules(around.blocks[0], group, sublayers[group.kind]) for group in groups}
    small = SmallBlock(around, groups)
    stand_ins: dict[UnitKind, StandIn] = {
        group.kind: _stand_in(small, group, modules[group.kind], config) for group in groups
    }
    mlp = next(group for group in groups if group.kind == "mlp")
    if mlp.activation is not None and mlp.up_module is not None and not small.has_activation(mlp, mlp.activation):
        block.activation = None
    for group, other in zip(groups, reversed(groups), strict=True):
        if group.output_norm_eps is None:
            names: dict[str, type[nn.Module]] = dict.fromkeys(
                modules[other.kind], STAND_INS[other.kind][stand_ins[other.kind]]
            )
            scale = small.output_scale(group, {**names, **dict.fromkeys(other.norm_modules, nn.Identity)})
            if scale is None:
                what = f"what its {group.kind} adds is not the output of its last map times a number"
                raise _refused(config, what, got=group.consumer_module)
            block.output_scales[group.kind] = scale
    numbered = small.is_numbered()
    # What was run is not needed again; the description is kept for as long as the process lives.
    around.model.to("meta")
    return Family(
        name=config.model_type,
        blocks_module=around.blocks_module,
        embedding_modules=around.embedding_modules,
        embedding_buffers=lambda _: around.computed,
        rotary_module=around.position_module,
        final_norm_module=around.final_norm_module,
        head_module=around.head_module,
        logit_entries=tuple(name for name in LOGIT_ENTRIES if getattr(config, name, None) is not None),
        attention_module=_one_module(modules["attention"], config),
        mlp_modules=modules["mlp"],
        norms={group.kind: group.norm_modules for group in groups},
        stand_ins={kind: found for kind, found in stand_ins.items() if found != "nothing"},
        classes={config.model_type: _classes(around, holder)},
        attention_implementation=around.attention_implementation,
        tiled_attention=bool(around.model._supports_attention_backend),
        # Harmless where it reads none.
        attention_reads_widths=True,
        groups=block.groups,
        stages=lambda _: block.stages,
        returns_tuple=around.returns_tuple,
        inputs_first=any(isinstance(module, Conv1D) for module in around.blocks.modules()),
        registers_names=get_checkpoint_conversion_mapping(config.model_type) is not None,
        resized=_resized(block, around),
        numbered=numbered,
        notes=(
            f"no family file describes {config.model_type}: what can be removed was found by tracing its blocks, and "
            "was checked with random weights",
        ),
    )


class TracedBlock:
    """The blocks of a model, all of one kind, as graphs: one for each width that is asked for."""

    def __init__(self, config: PretrainedConfig, around: Surroundings) -> None:
        self._around = around
        self._layer_class: Any = type(around.blocks[0])
        self._config = copy.deepcopy(config)
        # Some blocks look their attention up by its name, which only a whole model decides.
        set_attention(self._config, around.attention_implementation)
        self._check_built_by_number()
        self._sublayers = functools.lru_cache(_KEPT)(self._traced)
        self._traced_groups: dict[tuple[Any, HeadUnits], tuple[UnitGroup, UnitGroup]] = {}
        self._configs: dict[tuple[Any, ...], PretrainedConfig] = {}
        self.stages: tuple[Stage, ...] = self._checked_stages()
        self._entries: dict[tuple[UnitKind, HeadUnits], tuple[WidthEntries, BiasEntry | None]] = {}
        self.activation = _activation(config)
        self.output_scales: dict[UnitKind, float] = {}
        """Kind -> what its consumer's output is multiplied by before the stream's sum, once that is known."""

    def _check_built_by_number(self) -> None:
        """Raise UnsupportedError unless blocks are built from a config and their number."""
        if "layer_idx" not in inspect.signature(self._layer_class.__init__).parameters:
            raise _refused(self._config, "its blocks are not built by number", got=self._layer_class.__name__)

    def build(self, config: PretrainedConfig) -> nn.Module:
        """Build the first block on `meta`."""
        with torch.device("meta"):
            block: nn.Module = self._layer_class(config, layer_idx=0)
        return block.eval().requires_grad_(False)

    def _key(self, config: PretrainedConfig) -> tuple[Any, ...]:
        # Blocks differ by numbers alone; heads of twice the size have the shapes of twice the heads.
        numbers = {**config.to_dict(), "head_dim": getattr(config, "head_dim", None)}
        key = tuple(sorted((name, value) for name, value in numbers.items() if type(value) is int))
        self._configs.setdefault(key, config)
        return key

    def _traced(self, key: tuple[Any, ...]) -> tuple[Traced, Mapping[UnitKind, Sublayer]]:
        config = self._configs[key]
        hidden, kwargs = to_meta((self._around.hidden_BSD, self._around.plain_kwargs(0)))
        block = self.build(config)
        try:
            with torch.no_grad():
                block(hidden, **kwargs)
        except Exception as error:
            # Before torch.export logs the same at length.
            raise _refused(config, "a block of it does not run by itself", got=first_line(error)) from error
        traced = trace(block, (hidden,), kwargs, num_outputs=1)
        found: dict[UnitKind, Sublayer] = {}
        for sublayer in find_sublayers(traced, find_stream(traced)):
            if sublayer.kind == "mixer" or sublayer.kind in found:
                several = "several sublayers" if sublayer.kind in found else "a sublayer"
                raise _refused(
                    config, f"has blocks with {several} of kind {sublayer.kind}", got=", ".join(sublayer.tensors[:3])
                )
            found[sublayer.kind] = sublayer
        if missing := [kind for kind in UNIT_KINDS if kind not in found]:
            raise _refused(
                config, f"has blocks without {' and without '.join(missing)}", got=", ".join(found) or "none"
            )
        return traced, found

    def sublayers(self, config: PretrainedConfig) -> Mapping[UnitKind, Sublayer]:
        """Return the two sublayers of a block."""
        return self._sublayers(self._key(config))[1]

    def _checked_stages(self) -> tuple[Stage, ...]:
        found = stages(self.sublayers(self._config).values())
        return tuple(tuple(kind for kind in UNIT_KINDS if kind in stage) for stage in found)

    def groups(self, config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
        """Build the groups of a block. Raises UnsupportedError where attention has no such units."""
        if head_units == "value-channel":
            raise UnsupportedError(
                f"no layer of {config.model_type} with fewer value channels is described",
                got="--head-units value-channel",
                wanted="--head-units kv-group or query-head",
            )
        key = self._key(config), head_units
        if key not in self._traced_groups:
            self._traced_groups[key] = self._read_groups(config, head_units)
        return tuple(self._with_entries(config, group, head_units) for group in self._traced_groups[key])

    def _read_groups(self, config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, UnitGroup]:
        """Read the groups of a block from its graph, without what its config says."""
        traced, sublayers = self._sublayers(self._key(config))
        mlp = mlp_groups(traced)
        if len(mlp) != 1:
            held = sublayers["mlp"].consumer.term
            got = (
                f"{len(mlp)} groups: {', '.join(group.name for group in mlp[:3])}"
                if mlp
                else f"{held.size} inputs held"
            )
            raise _refused(config, "has no one set of MLP channels that can leave", got=got)
        return mlp[0], self._attention(traced, sublayers["attention"], head_units)

    def _attention(self, traced: Traced, sublayer: Sublayer, head_units: HeadUnits) -> UnitGroup:
        try:
            return attention_groups(traced, head_units)[0]
        except UnsupportedError as error:
            if head_units != "kv-group":
                raise
            return replace(held_group(traced, sublayer), held=str(error))

    def _with_entries(self, config: PretrainedConfig, group: UnitGroup, head_units: HeadUnits) -> UnitGroup:
        """Add what the config says of a group: entries of its width and of biases, and the activation."""
        group = replace(group, output_scale=self.output_scales.get(group.kind, 1.0))
        if group.held is not None:
            return group
        key = (group.kind, head_units)
        if key not in self._entries:
            own = self._found(self._config, group.kind, head_units)
            self._entries[key] = (
                width_entries(self._config, self.build, functools.partial(self._count, *key), own),
                bias_entry(self._config, self.build, own),
            )
        widths, bias = self._entries[key]
        return replace(
            group,
            config_fields={name: _value(config, name, group) // group.num_units for name in widths.per_unit},
            fixed_fields=widths.fixed,
            bias_field=None if bias is None or group.consumer_bias else bias.name,
            bias_modules=() if bias is None else bias.modules,
            activation=self.activation if group.kind == "mlp" else None,
        )

    def _found(self, config: PretrainedConfig, kind: UnitKind, head_units: HeadUnits) -> UnitGroup:
        """Return a group of a block without what its config says."""
        traced, sublayers = self._sublayers(self._key(config))
        return mlp_groups(traced)[0] if kind == "mlp" else self._attention(traced, sublayers["attention"], head_units)

    def _count(self, kind: UnitKind, head_units: HeadUnits, config: PretrainedConfig) -> int:
        return self._found(config, kind, head_units).num_units


def _value(config: PretrainedConfig, name: str, group: UnitGroup) -> int:
    """Return the value of a width's entry; left out, it is the number of units."""
    value = getattr(config, name, None)
    return group.num_units if value is None else value


def _modules(block: nn.Module, group: UnitGroup, sublayer: Sublayer) -> tuple[str, ...]:
    """Return the modules that are a sublayer: the one around all its tensors, or the maps themselves."""
    if group.module_prefix.endswith("."):
        return (group.module_prefix.removesuffix("."),)
    maps = {name.rpartition(".")[0] for name in sublayer.tensors}
    return tuple(name for name, _ in block.named_modules() if name in maps)


def _stand_in(small: SmallBlock, group: UnitGroup, modules: Sequence[str], config: PretrainedConfig) -> StandIn:
    """Choose what stands for a removed sublayer: the first with which the block is the one with zeros there."""
    expected_BSD = small.run(small.build(0, small.zeroed(group)))
    for name, stand_in in STAND_INS[group.kind].items():
        block = small.build(0, small.tensors)
        for module in modules:
            block.set_submodule(module, stand_in())
        for module in group.norm_modules:
            block.set_submodule(module, nn.Identity())
        try:
            if relative_difference(small.run(block), expected_BSD) <= TOLERANCE:
                return name
        except (RuntimeError, TypeError):
            # Stock code calls its sublayer otherwise.
            continue
    raise _refused(config, f"its {group.kind} cannot be left out of a block", got=", ".join(modules))


def _one_module(modules: Sequence[str], config: PretrainedConfig) -> str:
    if len(modules) != 1:
        raise _refused(config, "has attention that is no module of its own", got=", ".join(modules))
    return modules[0]


def _classes(around: Surroundings, holder: nn.Module) -> StockClasses:
    """Name the stock classes from the one that holds the blocks to the causal model."""
    path = around.blocks_module.split(".")[:-1]
    modules = [around.model.get_submodule(".".join(path[:count])) for count in range(len(path), -1, -1)]
    assert modules[0] is holder
    names = tuple(type(module).__name__ for module in modules)
    layer = type(around.blocks[0])
    files = {type(module).__module__ for module in modules} | {layer.__module__}
    file = layer.__module__
    package = file.split(".")[-2]
    if len(files) > 1 or file != f"transformers.models.{package}.modeling_{package}":
        raise _refused(around.config, "has classes in several files", got=", ".join(sorted(files)))
    return StockClasses(module=package, stem=_common_start(names) or names[-1], layer=layer.__name__, chain=names)


def _common_start(names: Sequence[str]) -> str:
    """Return what all names begin with."""
    first, last = min(names), max(names)
    same = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    return first[:same]


def _activation(config: PretrainedConfig) -> str | None:
    """Return the name of the activation, if all entries that name one agree."""
    found = {value for value in config.to_dict().values() if isinstance(value, str) and value in ACT2FN}
    return found.pop() if len(found) == 1 else None


def _resized(block: TracedBlock, around: Surroundings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build the check that stock code takes a config with smaller numbers, and gives the blocks that it should."""

    def check(config: dict[str, Any]) -> dict[str, Any]:
        try:
            parsed: Any = AutoConfig.for_model(**{name: each for name, each in config.items() if name != "dtype"})
            set_attention(parsed, around.attention_implementation)
            wanted = copy.deepcopy(around.config)
            for name, value in config.items():
                if type(value) is int and name in wanted.to_dict() | {"head_dim": None}:
                    setattr(wanted, name, value)
            same = shapes_of(block.build(parsed)) == shapes_of(block.build(wanted))
            error = None if same else "its blocks have other widths"
        except Exception as failure:
            # Configs refuse numbers by many types.
            error = first_line(failure)
        if error is not None:
            raise UnsupportedError(
                f"stock {config.get('model_type')} does not take these widths in every block",
                got=error,
                do="use --structure per-layer",
            )
        return config

    return check


def _refused(config: PretrainedConfig, what: str, got: str) -> UnsupportedError:
    return UnsupportedError(
        f"{config.model_type} has no family file, and {what}",
        got=got,
        wanted="equal blocks of one attention and one MLP, both with weights of their own",
    )
