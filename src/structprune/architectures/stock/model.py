"""Stock transformers classes, one piece at a time: everything is built on `meta` and gets its weights assigned.

Shape suffixes: B sequences, S positions, D hidden size, V vocabulary, N tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from structprune.architectures import FAMILIES
from structprune.architectures.family import Family
from structprune.architectures.modeling.narrow_mlp import narrow_mlp
from structprune.architectures.modeling.removed import RemovedSublayers, check_can_go, removed_sublayers
from structprune.architectures.modeling.sliced import SHORTCUTS, SLICED_ENTRY, SlicedLayer
from structprune.architectures.modeling.value_channels import check_values, narrow_values
from structprune.architectures.stock.config import (
    build_config,
    max_positions,
    stock_layer_entries,
    usable_config,
    without_own_widths,
)
from structprune.architectures.stock.counts import check_counts
from structprune.architectures.stock.family import family_of_checkpoint, unknown_family
from structprune.architectures.stock.head import with_entries
from structprune.architectures.stock.loading import without_global_width_warnings
from structprune.architectures.stock.names import with_stock_names, with_tied_embedding
from structprune.architectures.stock.placeholders import (
    STAND_INS,
    Recorder,
    StopForward,
    compute_buffers,
    give_buffers,
)
from structprune.architectures.stock.tensor_check import check_tensors
from structprune.architectures.stock.tiled_attention import TILED, tiles_gain
from structprune.architectures.stock.wrapper import text_view
from structprune.architectures.traced.checks import check_description
from structprune.architectures.traced.lookup import is_stock_type
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.writer import FileForm
from structprune.errors import CheckpointError, StructPruneError, UnsupportedError
from structprune.kinds import SUBLAYER_KINDS
from structprune.types import BlockLayout, HeadUnits, ModelLayout, Stage, SublayerKind, UnitGroup, UnitKind


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInputs:
    """What the stock model passes to each block beside the hidden states, for one batch shape."""

    kwargs: tuple[dict[str, Any], ...]


class StockModel:
    """The stock architecture of a checkpoint without its weights.

    `reader` gives the checkpoint's tensors the names of the stock modules. `config` and `groups` are those of the
    global config; in a per-layer checkpoint each block has its own (`block_configs`, `layout.blocks[i].groups`), and a
    block may lack a sublayer (`removed`). The sublayers of a block read the stream in `stages`. A sliced checkpoint
    (`sliced`) can be run but not pruned: its sums pass through matrices that stock layers lack. Code that lies in the
    checkpoint is never run here. `notes` say what was found that a person should know. Raises UnsupportedError for an
    unknown family or variant, CheckpointError when tensors are missing or of another shape than the configuration says.
    """

    def __init__(self, reader: CheckpointReader, head_units: HeadUnits = "kv-group") -> None:
        self.head_units: HeadUnits = head_units
        reader = text_view(reader)
        model_type = reader.config.get("model_type")
        if not isinstance(model_type, str) or (model_type not in FAMILIES and not is_stock_type(model_type)):
            raise unknown_family(reader)
        check_counts(reader)
        try:
            with without_global_width_warnings():
                usable, notes = usable_config(reader)
                self.family: Family = family_of_checkpoint(reader, usable)
                self.config: PretrainedConfig = build_config(
                    reader, usable, attn_implementation=self.family.attention_implementation
                )
            self.notes: tuple[str, ...] = (*reader.notes, *notes, *self.family.notes)
            reader = reader.with_config(usable)
            self.block_configs: tuple[PretrainedConfig, ...] = self._split_config(reader)
            self.family.check(self.config)
            self.groups: tuple[UnitGroup, ...] = self._global_groups()
            self.removed: RemovedSublayers = self._read_removed(reader)
            self.sliced = SLICED_ENTRY in reader.config
            with torch.device("meta"):
                self.skeleton: nn.Module = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False).eval()
            if self.config.num_hidden_layers < 1:
                raise CheckpointError("the model has no blocks", where=str(reader.directory / "config.json"))
            self._fit_skeleton()
            self.reader = self._read_tied(self._named_reader(reader))
        except StructPruneError:
            raise
        except Exception as error:
            # transformers raises many types for a config that makes no model; all of them are the input's fault.
            raise CheckpointError(
                "transformers cannot build this configuration",
                where=str(reader.directory / "config.json"),
                got=str(error),
            ) from error
        self.layout = self._layout(self.reader)
        if model_type not in FAMILIES:
            check_description(self)

    def _split_config(self, reader: CheckpointReader) -> tuple[PretrainedConfig, ...]:
        """Return each block's config, and replace a per-layer config by its global part, which stock code can build."""
        config, where = self.config, str(reader.directory / "config.json")
        per_block: tuple[PretrainedConfig, ...] = tuple(config.per_layer_config)
        if config.is_heterogeneous:
            self.config = without_own_widths(config)
        known = self.family.per_layer_entries(self.config) | stock_layer_entries(config.model_type)
        found = {name for fields in (reader.config.get("per_layer_config") or {}).values() for name in fields}
        if found - known:
            raise UnsupportedError(
                "per_layer_config changes more than the widths",
                where=where,
                got=", ".join(sorted(found - known)),
                wanted=", ".join(sorted(known)),
            )
        if self.family.value_maps is not None:
            check_values(self.config, per_block, where)
        return per_block

    def _read_removed(self, reader: CheckpointReader) -> RemovedSublayers:
        where = str(reader.directory / "config.json")
        removed = removed_sublayers(reader.config, self.config.num_hidden_layers, where)
        check_can_go(self.config, self.family, {kind for kinds in removed for kind in kinds})
        return removed

    def _fit_skeleton(self) -> None:
        """Rebuild the skeleton's layers: with each block's own widths, sublayers and names."""
        layers: Any = self.skeleton.get_submodule(self.family.blocks_module)
        for index, config in enumerate(self.block_configs):
            layers[index] = self._empty_layer(index, config, ())

    def _empty_layer(self, index: int, config: PretrainedConfig, removed: Collection[UnitKind]) -> nn.Module:
        """Build layer `index` on `meta`, with modules that add nothing for the removed sublayers."""
        layer_class: Any = type(self.skeleton.get_submodule(f"{self.family.blocks_module}.{index}"))
        with torch.device("meta"):
            layer: nn.Module = layer_class(config, layer_idx=index)
            self.family.at(index).unstack(layer, config)
        narrow_values(layer, config, self.family)
        narrow_mlp(layer, config, self.family.channel_maps)
        gone: set[UnitKind] = {*self.removed[index], *removed}
        for kind in gone:
            for name, module in self.stand_ins(index, kind).items():
                layer.set_submodule(name, module)
        if self.sliced:
            for name in SHORTCUTS.values():
                layer.add_module(name, nn.Linear(config.hidden_size, config.hidden_size, bias=False, device="meta"))
        return layer.eval()

    def _named_reader(self, reader: CheckpointReader) -> CheckpointReader:
        """Give tensors the names of the stock modules, those of experts that are stored stacked too."""
        family = self.family
        base = family.blocks_module.partition(".")[0]
        view = with_stock_names(
            reader, base=base, head=family.head_module, renamed=family.renamed, experts=family.mixture
        )
        stacked = family.mixture is not None and family.mixture.written_stacked
        if len(view.shapes) != len(reader.shapes) and not stacked:
            self.notes += ("experts are stored stacked; the output has one tensor for each map of each expert",)
        return view

    @property
    def tokenizer_config(self) -> PretrainedConfig | None:
        """The config by which the tokenizer's class is chosen; None: the file's, as of an image-text model around."""
        return self.config if self.reader.wrapper is None else None

    def file_form(self, *, per_layer: bool) -> FileForm:
        """Say how tensors lie in an output's files: under the source's names, or as our own modelling file needs them.

        transformers translates old names for its own classes only.
        """
        mixture = self.family.mixture
        stacking = mixture.stacking if mixture is not None and mixture.written_stacked else None
        return FileForm(name=str if per_layer else self.reader.stored_name, stacking=stacking)

    def _read_tied(self, reader: CheckpointReader) -> CheckpointReader:
        """Read a tied embedding and head as stock code does: one tensor where both are equal or one is missing.

        Where both are stored and differ they are not tied, and the config says so from here on: other runtimes go by
        the config alone and would drop the head.
        """
        embedding, head = f"{self.family.embedding_modules[0]}.weight", f"{self.family.head_module}.weight"
        if not getattr(self.config, "tie_word_embeddings", False) or head not in reader.shapes:
            return reader
        stored = reader.stored_name(head)
        if embedding not in reader.shapes:
            self.notes += (f"the tied embedding is stored as {stored} only",)
            return with_tied_embedding(reader, embedding, head)
        if reader.equal(embedding, head):
            self.notes += (f"{stored} equals the embedding that it is tied to: the copy is left out",)
            return reader.without([head])
        self.notes += (f"{stored} differs from the embedding that the config ties it to: kept as it is, untied",)
        self.config.tie_word_embeddings = False
        return reader.with_config({**reader.config, "tie_word_embeddings": False})

    def _layout(self, reader: CheckpointReader) -> ModelLayout:
        family = self.family
        skeleton: Any = self.skeleton
        expected = {name: tuple(p.shape) for name, p in skeleton.named_parameters(remove_duplicate=False)}
        expected |= {name: tuple(b.shape) for name, b in skeleton.state_dict().items()}
        head_weight = f"{family.head_module}.weight"
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        if tied:
            del expected[head_weight]
        check_tensors(reader, expected, head_weight, skeleton._keys_to_ignore_on_load_unexpected or ())
        blocks: list[BlockLayout] = []
        for index in range(self.config.num_hidden_layers):
            prefix = f"{family.blocks_module}.{index}."
            shapes = {n.removeprefix(prefix): s for n, s in expected.items() if n.startswith(prefix)}
            groups = tuple(
                group
                for group in self.family.at(index).groups(self.block_configs[index], self.head_units)
                if group.kind not in self.removed[index]
            )
            blocks.append(BlockLayout(index=index, prefix=prefix, shapes=shapes, groups=groups))
        outer = {
            n: s for n, s in reader.shapes.items() if not n.startswith(f"{family.blocks_module}.") and n in expected
        }
        return ModelLayout(
            family=family.name,
            config=reader.config,
            hidden_size=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
            max_positions=max_positions(self.config),
            attention_window=self._attention_window(),
            num_score_heads=(self.config.num_attention_heads if self.family.attention_implementation == "eager" else 0),
            blocks=tuple(blocks),
            blocks_module=family.blocks_module,
            embedding_modules=family.embedding_modules,
            rotary_module=family.rotary_module,
            final_norm_module=self._final_norm_module,
            head_module=family.head_module,
            tied_embeddings=tied,
            outer_tensors=outer,
            around=reader.around,
            notes=self.notes,
        )

    def _attention_window(self) -> int | None:
        types = getattr(self.config, "layer_types", None)
        windowed = types is None or "sliding_attention" in types
        return getattr(self.config, "sliding_window", None) if windowed else None

    def resized_config(
        self, kept: Mapping[str, int], index: int | None = None, biased: Collection[UnitKind] = ()
    ) -> PretrainedConfig:
        """Return the config of block `index`, or of every block, with `kept` units per kind.

        The sublayers `biased` get biases. For one block, a kind of which nothing is kept keeps its numbers: stock
        classes divide by some of them, and what is removed is said to `block`. Raises UnsupportedError if the config
        cannot say so, or for every block if the source's blocks differ or a sublayer would be removed.
        """
        if index is None and not self.has_even_blocks:
            raise UnsupportedError(
                "the blocks of the source have different widths, so one config cannot describe them",
                do="write the per-layer format",
            )
        config = copy.deepcopy(self.config if index is None else self.block_configs[index])
        for group in self.groups if index is None else self.layout.blocks[index].groups:
            if group.kind in biased and group.consumer_bias is None and group.bias_field is not None:
                setattr(config, group.bias_field, True)
            if group.kind not in kept or kept[group.kind] == group.num_units:
                continue
            if kept[group.kind] == 0:
                if index is not None:
                    continue
                raise UnsupportedError(
                    f"one config cannot describe blocks without {group.kind}", do="write the per-layer format"
                )
            if not group.config_fields:
                raise UnsupportedError(f"stock {self.family.name} cannot express fewer {group.kind} units")
            for name, value in group.config_changes(kept[group.kind]).items():
                setattr(config, name, value)
        return config

    def block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        config: PretrainedConfig | None = None,
        removed: Collection[UnitKind] = (),
    ) -> nn.Module:
        """Build the stock layer `index` from `tensors` (relative names), whose dtype and device it has.

        `config` is the block's own unless given. The sublayers in `removed`, and those that the checkpoint lacks, add
        nothing and take no tensors. A sliced block is one module around the layer, without sublayers of these names.
        """
        own: Any = copy.copy(config or self.block_configs[index])
        if own._attn_implementation == "sdpa" and self.family.tiled_attention and tiles_gain():
            own._attn_implementation = TILED
        layer = self._empty_layer(index, own, removed)
        layer.load_state_dict(dict(tensors), strict=True, assign=True)
        layer.requires_grad_(False)
        if any(buffer.is_meta for buffer in layer.buffers()):
            compute_buffers(layer, index, own, next(iter(tensors.values())).device)
        if given := self.family.at(index).given:
            give_buffers(layer, given, next(iter(tensors.values())).device)
        return SlicedLayer(layer) if self.sliced else layer

    def _global_groups(self) -> tuple[UnitGroup, ...]:
        """Return the groups of every kind of blocks by the global config, each once."""
        groups = [group for kind in self.family.kinds for group in kind.groups(self.config, self.head_units)]
        return tuple(group for place, group in enumerate(groups) if group not in groups[:place])

    @property
    def has_even_blocks(self) -> bool:
        """Whether all blocks have the widths that the global config says, and all of their sublayers."""
        return all(
            block.groups == self.family.at(block.index).groups(self.config, self.head_units)
            for block in self.layout.blocks
        )

    def adds_in_place(self, index: int, kind: UnitKind) -> bool:
        """Whether stock code adds to what a sublayer's consumer has given, in its memory."""
        return self.family.at(index).stand_in(kind).startswith("zeros")

    def stages_of(self, index: int) -> tuple[Stage, ...]:
        """Return the stages of block `index`, with the sublayers that are removed from it."""
        return self.family.at(index).stages(self.config)

    def stage_of(self, index: int, kind: SublayerKind) -> Stage:
        """Return the stage of block `index` that the sublayer belongs to."""
        return next(stage for stage in self.stages_of(index) if kind in stage)

    def has_sublayer(self, index: int, kind: SublayerKind) -> bool:
        """Whether block `index` has this sublayer, with units or without."""
        return kind not in self.removed[index] and any(kind in stage for stage in self.stages_of(index))

    @property
    def num_stages(self) -> Mapping[Stage, int]:
        """Stage -> how many blocks have it."""
        return Counter(stage for index in range(len(self.block_configs)) for stage in self.stages_of(index))

    def stand_ins(self, index: int, kind: SublayerKind) -> dict[str, nn.Module]:
        """Build what stands for each module of a sublayer of block `index` that is not there."""
        modules = self.family.at(index).stand_in_modules(kind)
        return {name: nn.Identity() if each is None else STAND_INS[kind][each]() for name, each in modules.items()}

    @contextmanager
    def stage(self, block: nn.Module, index: int, stage: Stage) -> Generator[None]:
        """Restrict `block`, of number `index`, to the sublayers of `stage` inside the context.

        There `block(h)` is `h` plus what they add. All stages in turn are the block. A sublayer that is removed from
        the block adds nothing.
        """
        outside: dict[str, nn.Module] = {}
        for kind in SUBLAYER_KINDS:
            if kind not in stage:
                for name, stand_in in self.stand_ins(index, kind).items():
                    outside[name] = block.get_submodule(name)
                    block.set_submodule(name, stand_in)
        is_last = stage == self.stages_of(index)[-1]
        scales = {} if is_last else {name: _tensor(block, name) for name in self.family.at(index).stream_scales}
        for name, scale in scales.items():
            _put(block, name, torch.ones_like(scale))
        try:
            yield
        finally:
            for name, scale in scales.items():
                _put(block, name, scale)
            for name, module in outside.items():
                block.set_submodule(name, module)

    def embedding_tensors(self) -> list[str]:
        """List the tensors that `embed` needs."""
        prefixes = tuple(f"{module}." for module in self.family.embedding_modules)
        return [name for name in self.layout.outer_tensors if name.startswith(prefixes)]

    def embed(self, ids_BS: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, BlockInputs]:
        """Embed token ids: return the first block's input (B, S, D) and the arguments that each block is passed."""
        model = self.skeleton
        dense_blocks: Any = model.get_submodule(self.family.blocks_module)
        names = list(inspect.signature(type(dense_blocks[0]).forward).parameters)[2:]
        count, form = len(dense_blocks), self.family.returns_tuple
        recorders = [Recorder(names, is_last=i + 1 == count, returns_tuple=form) for i in range(count)]
        if self.family.rotary_module is not None:
            rotary: Any = type(model.get_submodule(self.family.rotary_module))
            model.set_submodule(self.family.rotary_module, rotary(self.config).to(ids_BS.device))
        model.set_submodule(self.family.blocks_module, nn.ModuleList(recorders))
        for module in self.family.embedding_modules:
            local = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
            model.get_submodule(module).load_state_dict(local, strict=True, assign=True)
        for name, value in self.family.embedding_buffers(self.config).items():
            module, _, buffer = name.rpartition(".")
            setattr(model.get_submodule(module), buffer, torch.tensor(value, device=ids_BS.device))
        try:
            with torch.no_grad():
                model(input_ids=ids_BS, use_cache=False)
        except StopForward:
            pass
        finally:
            model.set_submodule(self.family.blocks_module, dense_blocks)
            for module in self.family.embedding_modules:
                model.get_submodule(module).to("meta")
        return recorders[0].hidden_BSD, BlockInputs(kwargs=tuple(r.kwargs for r in recorders))

    def head_tensors(self) -> list[str]:
        """List the tensors that `head` needs: final norm, and the output projection or the tied embedding."""
        names = [n for n in self.layout.outer_tensors if n.startswith(f"{self._final_norm_module}.")]
        return [*names, self.head_weight, *([self.head_bias] if self.head_bias else [])]

    @property
    def head_bias(self) -> str | None:
        """Checkpoint name of the output projection's bias; None where it has none."""
        name = f"{self.family.head_module}.bias"
        return name if name in self.layout.outer_tensors else None

    @property
    def _final_norm_module(self) -> str | None:
        """The family's, or None where this config leaves it out."""
        name = self.family.final_norm_module
        base, _, attribute = (name or "").rpartition(".")
        return name if name and getattr(self.skeleton.get_submodule(base), attribute) is not None else None

    @property
    def head_weight(self) -> str:
        """Checkpoint name of the output projection: the input embedding where the two are tied."""
        tied = f"{self.family.embedding_modules[0]}.weight"
        return tied if self.layout.tied_embeddings else f"{self.family.head_module}.weight"

    def load_head(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Build `head` from the checkpoint's tensors, cast as they are read."""
        tensors = self.reader.read(self.head_tensors(), dtype=dtype)
        return self.head({name: tensor.to(device) for name, tensor in tensors.items()})

    def head(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Build final norm, output projection and cap of the logits as one module: (N, D) -> (N, V)."""
        parts: list[nn.Module] = []
        norm_name = self._final_norm_module
        if norm_name is not None:
            norm = self.skeleton.get_submodule(norm_name)
            local = {n.removeprefix(f"{norm_name}."): t for n, t in tensors.items() if n.startswith(f"{norm_name}.")}
            norm.load_state_dict(local, strict=True, assign=True)
            parts.append(norm)
        bias = {} if self.head_bias is None else {"bias": tensors[self.head_bias]}
        projection = nn.Linear(self.layout.hidden_size, self.layout.vocab_size, bias=bool(bias), device="meta")
        weights = {"weight": tensors[self.head_weight]} | bias
        projection.load_state_dict(weights, assign=True)
        head = with_entries(projection, self.family, self.config)
        return nn.Sequential(*parts, head).eval().requires_grad_(False)


def _tensor(block: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    return getattr(block.get_submodule(module), attribute)


def _put(block: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or a buffer."""
    module, _, attribute = name.rpartition(".")
    place = block.get_submodule(module)
    is_parameter = isinstance(getattr(place, attribute), nn.Parameter)
    setattr(place, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def block_arguments(
    stock: StockModel, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Any], ...]:
    """Return what the stock model passes to each block for one window; its embeddings are one number, repeated."""
    number = torch.zeros((), device=device, dtype=dtype)
    tensors = {name: number.expand(stock.layout.outer_tensors[name]) for name in stock.embedding_tensors()}
    ids_1S = torch.zeros(1, num_tokens, dtype=torch.int64, device=device)
    return stock.embed(ids_1S, tensors)[1].kwargs


def output_tensor(output: Any) -> Tensor:
    """Return a block's hidden states, whether the layer returns them bare or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output
