"""The description of a stock causal model that no family file has: the same data, from running and tracing it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from structprune.architectures.family import BlockKind, Family, StandIn, StockClasses
from structprune.architectures.stock.conversions import translates_names
from structprune.architectures.stock.head import LOGIT_ENTRIES
from structprune.architectures.stock.placeholders import STAND_INS
from structprune.architectures.traced.block import TracedBlock, refused
from structprune.architectures.traced.small_block import TOLERANCE, SmallBlock, relative_difference
from structprune.architectures.traced.surroundings import Surroundings, look_around, set_attention
from structprune.architectures.traced.widths import shapes_of
from structprune.errors import UnsupportedError, first_line
from structprune.types import SublayerKind, UnitKind


def traced_family(config: PretrainedConfig) -> Family:
    """Describe a stock causal model from what it does. Raises UnsupportedError, with the reason, where that fails.

    `config` is that of blocks of equal widths.
    """
    around = look_around(config)
    blocks = {index: TracedBlock(config, around, index) for index in dict.fromkeys(around.kind_of)}
    kinds = {index: _kind(config, around, block) for index, block in blocks.items()}
    _check_alike(config, kinds)
    numbered = any(block.small().is_numbered() for block in blocks.values())
    holder = around.model.get_submodule(around.blocks_module.rpartition(".")[0])
    # What was run is not needed again; the description is kept for as long as the process lives.
    around.model.to("meta")
    first = kinds[0]
    return Family(
        name=config.model_type,
        attention_module=first.attention_module,
        mlp_modules=first.mlp_modules,
        mixer_modules=first.mixer_modules,
        norms=first.norms,
        stand_ins=first.stand_ins,
        groups=first.groups,
        stages=first.stages,
        unstack=first.unstack,
        experts=first.experts,
        others={index: kinds[kind] for index, kind in enumerate(around.kind_of) if kind != 0},
        blocks_module=around.blocks_module,
        embedding_modules=around.embedding_modules,
        embedding_buffers=lambda _: around.computed,
        rotary_module=around.position_module,
        final_norm_module=around.final_norm_module,
        head_module=around.head_module,
        logit_entries=tuple(name for name in LOGIT_ENTRIES if getattr(config, name, None) is not None),
        classes={config.model_type: _classes(around, holder)},
        attention_implementation=around.attention_implementation,
        tiled_attention=bool(around.model._supports_attention_backend),
        # Harmless where it reads none.
        attention_reads_widths=True,
        returns_tuple=around.returns_tuple,
        inputs_first=any(isinstance(module, Conv1D) for module in around.blocks.modules()),
        registers_names=translates_names(config.model_type),
        resized=_resized(blocks, around),
        numbered=numbered,
        notes=_notes(config, blocks),
    )


def _kind(config: PretrainedConfig, around: Surroundings, block: TracedBlock) -> BlockKind:
    """Describe the blocks of one kind, by experiments with the first of them."""
    sublayers = block.sublayers(config)
    groups = block.groups(config, "kv-group")
    if not groups:
        raise refused(config, "has blocks without attention and without an MLP", got=", ".join(sublayers) or "none")
    tensors: dict[SublayerKind, list[str]] = {
        kind: [name for part in parts for name in part.tensors] for kind, parts in sublayers.items()
    }
    modules = {kind: _modules(around.blocks[block.index], block.prefix(kind), names) for kind, names in tensors.items()}
    norms: dict[SublayerKind, tuple[str, ...]] = {kind: block.norms(kind) for kind in sublayers}
    small = block.small()
    stand_ins: dict[SublayerKind, StandIn] = {
        kind: _stand_in(small, kind, block.consumers(kind), (modules[kind], norms[kind]), config) for kind in sublayers
    }
    mlp = next((group for group in groups if group.kind == "mlp" and group.up_module is not None), None)
    if mlp is not None and mlp.activation is not None and not small.has_activation(mlp, mlp.activation):
        block.activation = None
    for group in groups:
        # A mixture's parts have no targets on the stream.
        if group.output_norm_eps is not None or group.expert is not None:
            continue
        others: dict[str, type[nn.Module]] = {}
        for kind in sublayers:
            if kind != group.kind:
                others |= dict.fromkeys(modules[kind], STAND_INS[kind][stand_ins[kind]])
                others |= dict.fromkeys(norms[kind], nn.Identity)
        scale = small.output_scale(group, others)
        if scale is None:
            what = f"what its {group.kind} adds is not the output of its last map times a number"
            raise refused(config, what, got=group.consumer_module)
        block.output_scales[group.kind] = scale
    return BlockKind(
        attention_module=_one_module(modules["attention"], config) if "attention" in modules else None,
        mlp_modules=modules.get("mlp", ()),
        mixer_modules=modules.get("mixer", ()),
        norms=norms,
        stand_ins={kind: found for kind, found in stand_ins.items() if found != "nothing"},
        groups=block.groups,
        stages=lambda _: block.stages,
        unstack=block.unstack,
        experts=None if block.mixture is None else block.mixture.experts,
    )


def _check_alike(config: PretrainedConfig, kinds: Mapping[int, BlockKind]) -> None:
    """Raise UnsupportedError where blocks call the same sublayer by other names: our modelling file knows one."""
    said: dict[UnitKind, Any] = {}
    for index, kind in kinds.items():
        for name in ("attention", "mlp"):
            if modules := kind.sublayer_modules(name):
                found = modules, kind.norms.get(name), kind.stand_in(name)
                if said.setdefault(name, found) != found:
                    raise refused(
                        config, f"its blocks have {name} under several names", got=f"block {index}: {modules[0]}"
                    )


def _notes(config: PretrainedConfig, blocks: Mapping[int, TracedBlock]) -> tuple[str, ...]:
    notes = [
        f"no family file describes {config.model_type}: what can be removed was found by tracing its blocks, and "
        "was checked with random weights"
    ]
    mixers = [
        name
        for block in blocks.values()
        for part in block.sublayers(config).get("mixer", ())
        for name in part.tensors[:1]
    ]
    if mixers:
        notes.append(f"what mixes positions without attention stays whole, such as {mixers[0].rpartition('.')[0]}")
    if any(block.has_whole_parts(config) for block in blocks.values()):
        notes.append("experts that all tokens pass, whose width has a config entry of its own, stay whole")
    return tuple(notes)


def _modules(block: nn.Module, prefix: str, tensors: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that are a sublayer: the one around all its tensors, or the maps themselves."""
    if prefix.endswith("."):
        return (prefix.removesuffix("."),)
    maps = {name.rpartition(".")[0] for name in tensors}
    return tuple(name for name, _ in block.named_modules() if name in maps)


def _stand_in(
    small: SmallBlock,
    kind: SublayerKind,
    consumers: Sequence[str],
    there: tuple[Sequence[str], Sequence[str]],
    config: PretrainedConfig,
) -> StandIn:
    """Choose what stands for a removed sublayer: the first with which the block is the one with zeros there.

    `there` are its modules and its norms, `consumers` the tensors that are zero then.
    """
    modules, norms = there
    expected_BSD = small.run(small.build(small.index, small.zeroed(consumers)))
    for name, stand_in in STAND_INS[kind].items():
        block = small.build(small.index, small.tensors)
        for module in modules:
            block.set_submodule(module, stand_in())
        for module in norms:
            block.set_submodule(module, nn.Identity())
        try:
            if relative_difference(small.run(block), expected_BSD) <= TOLERANCE:
                return name
        except (RuntimeError, TypeError):
            # Stock code calls its sublayer otherwise.
            continue
    raise refused(config, f"its {kind} cannot be left out of a block", got=", ".join(modules))


def _one_module(modules: Sequence[str], config: PretrainedConfig) -> str:
    if len(modules) != 1:
        raise refused(config, "has attention that is no module of its own", got=", ".join(modules))
    return modules[0]


def _classes(around: Surroundings, holder: nn.Module) -> StockClasses:
    """Name the stock classes from the one that holds the blocks to the causal model."""
    path = around.blocks_module.split(".")[:-1]
    modules = [around.model.get_submodule(".".join(path[:count])) for count in range(len(path), -1, -1)]
    assert modules[0] is holder
    names = tuple(type(module).__name__ for module in modules)
    layers = list(dict.fromkeys(type(block) for block in around.blocks))
    files = {each.__module__ for each in (*map(type, modules), *layers)}
    file = layers[0].__module__
    package = file.split(".")[-2]
    if len(files) > 1 or file != f"transformers.models.{package}.modeling_{package}":
        raise refused(around.config, "has classes in several files", got=", ".join(sorted(files)))
    layer = layers[0].__name__ if len(layers) == 1 else None
    return StockClasses(
        module=package,
        stem=_common_start(names) or names[-1],
        layer=layer,
        chain=names,
    )


def _common_start(names: Sequence[str]) -> str:
    """Return what all names begin with."""
    first, last = min(names), max(names)
    same = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    return first[:same]


def _resized(blocks: Mapping[int, TracedBlock], around: Surroundings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Build the check that stock code takes a config with smaller numbers, and gives the blocks that it should."""

    def check(config: dict[str, Any]) -> dict[str, Any]:
        try:
            parsed: Any = AutoConfig.for_model(**{name: each for name, each in config.items() if name != "dtype"})
            set_attention(parsed, around.attention_implementation)
            wanted = copy.deepcopy(around.config)
            for name, value in config.items():
                if type(value) is int and name in wanted.to_dict() | {"head_dim": None}:
                    setattr(wanted, name, value)
            same = all(shapes_of(block.build(parsed)) == shapes_of(block.build(wanted)) for block in blocks.values())
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
