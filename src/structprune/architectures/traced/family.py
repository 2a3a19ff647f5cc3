"""The description of a stock causal model that no family file has: the same data, from running and tracing it."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from structprune.architectures.family import BlockKind, Family, StandIn, StockClasses
from structprune.architectures.stock.config import with_infinities
from structprune.architectures.stock.conversions import translates_names
from structprune.architectures.stock.head import LOGIT_ENTRIES
from structprune.architectures.stock.placeholders import STAND_INS
from structprune.architectures.traced.block import TracedBlock, refused
from structprune.architectures.traced.small_block import TOLERANCE, SmallBlock, relative_difference
from structprune.architectures.traced.surroundings import Surroundings, look_around, set_attention
from structprune.architectures.traced.widths import shapes_of
from structprune.errors import UnsupportedError, first_line
from structprune.types import SublayerKind


def traced_family(config: PretrainedConfig) -> Family:
    """Describe a stock causal model from what it does. Raises UnsupportedError, with the reason, where that fails.

    `config` is that of blocks of equal widths.
    """
    around = look_around(config)
    blocks = {index: TracedBlock(config, around, index) for index in dict.fromkeys(around.kind_of)}
    kinds = {index: _kind(config, around, block) for index, block in blocks.items()}
    numbered = any(block.small().is_numbered() for block in blocks.values())
    holder = around.model.get_submodule(around.blocks_module.rpartition(".")[0])
    # What was run is not needed again; the description is kept for as long as the process lives.
    around.model.to("meta")
    first = kinds[0]
    # What all blocks have but the others.
    stated: dict[str, Any] = {each.name: getattr(first, each.name) for each in fields(BlockKind)}
    return Family(
        **stated,
        name=config.model_type,
        others={index: kinds[kind] for index, kind in enumerate(around.kind_of) if kind != 0},
        blocks_module=around.blocks_module,
        embedding_modules=around.embedding_modules,
        embedding_buffers=lambda _: around.computed,
        rotary_module=around.position_module,
        final_norm_module=around.final_norm_module,
        head_module=around.head_module,
        logit_entries=tuple(name for name in LOGIT_ENTRIES if getattr(config, name, None) is not None),
        classes={config.model_type: _classes(around, holder, any(block.given for block in blocks.values()))},
        channel_maps=next((block.channel_maps for block in blocks.values() if block.channel_maps is not None), None),
        attention_implementation=around.attention_implementation,
        tiled_attention=bool(around.model._supports_attention_backend) and not _tells_attention_apart(around.blocks),
        # Harmless where it reads none.
        attention_reads_widths=True,
        returns_tuple=around.returns_tuple,
        inputs_first=any(isinstance(module, Conv1D) for module in around.blocks.modules()),
        registers_names=translates_names(config.model_type),
        resized=_resized(blocks, around),
        numbered=numbered,
        notes=_notes(config, blocks),
    )


def _tells_attention_apart(blocks: nn.Module) -> bool:
    """Whether the code of a block does something for SDPA that it does not for other implementations of attention.

    DeepSeek V3.2 chooses the keys of each query for "eager" and "sdpa" alone, so it is not to see another name.
    """
    forwards = {type(module).forward for module in blocks.modules()}
    return any(re.search(r"""["']sdpa["']""", inspect.getsource(forward)) for forward in forwards)


def _kind(config: PretrainedConfig, around: Surroundings, block: TracedBlock) -> BlockKind:
    """Describe the blocks of one kind, by experiments with the first of them."""
    sublayers = block.sublayers
    groups = block.groups(config, "kv-group")
    if not groups:
        raise refused(config, "has blocks without attention and without an MLP", got=", ".join(sublayers) or "none")
    modules: dict[SublayerKind, tuple[str, ...]] = {kind: block.modules(kind) for kind in sublayers}
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
        experts=block.experts,
        stream_scales=block.stream_scales(),
        given=block.given,
    )


def _notes(config: PretrainedConfig, blocks: Mapping[int, TracedBlock]) -> tuple[str, ...]:
    notes = [
        f"no family file describes {config.model_type}: what can be removed was found by tracing its blocks, and "
        "was checked with random weights"
    ]
    if mixers := [block.prefix("mixer") for block in blocks.values() if "mixer" in block.sublayers]:
        notes.append(f"what mixes positions without attention stays whole: {mixers[0].removesuffix('.')}")
    if any(block.has_whole_parts(config) for block in blocks.values()):
        notes.append("experts that all tokens pass, whose width has a config entry of its own, stay whole")
    return tuple(notes)


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
        except (RuntimeError, TypeError, ValueError):
            # Stock code calls its sublayer otherwise.
            continue
    raise refused(config, f"its {kind} cannot be left out of a block", got=", ".join(modules))


def _one_module(modules: Sequence[str], config: PretrainedConfig) -> str:
    if len(modules) != 1:
        raise refused(config, "has attention that is no module of its own", got=", ".join(modules))
    return modules[0]


def _classes(around: Surroundings, holder: nn.Module, given: bool) -> StockClasses:
    """Name the stock classes from the one that holds the blocks to the causal model.

    `given` says whether the model computes something for its blocks as it builds them.
    """
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
    layer = layers[0].__name__ if len(layers) == 1 and not given else None
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
            entries = {name: with_infinities(each) for name, each in config.items() if name != "dtype"}
            parsed: Any = type(around.config).from_dict(entries)
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
