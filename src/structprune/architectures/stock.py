"""Stock transformers classes, one piece at a time: everything is built on `meta` and gets its weights assigned.

Shape suffixes: B sequences, S positions, D hidden size, V vocabulary, N tokens.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from structprune.architectures import FAMILIES
from structprune.architectures.family import Family
from structprune.architectures.per_layer_source import ACCEPTED_SOURCES, CLASS_STEMS, MODELING_MODULE, MODELING_NAME
from structprune.architectures.removed import REMOVED_ENTRY, RemovedHalves, removed_halves
from structprune.architectures.sliced_source import (
    ACCEPTED_SLICED_SOURCES,
    SHORTCUTS,
    SLICED_ENTRY,
    SLICED_STEMS,
)
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, StructPruneError, UnsupportedError
from structprune.types import AxisSlice, BlockLayout, HeadUnits, ModelLayout, UnitGroup, UnitKind


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInputs:
    """What the stock model passes to each block beside the hidden states, for one batch shape."""

    kwargs: tuple[dict[str, Any], ...]


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Ends the stock model's forward once the last block has been reached."""


class _Recorder(nn.Module):
    """Stands where a block would: keeps the keyword arguments and passes the hidden states on."""

    def __init__(self, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last

    def forward(self, hidden_BSD: Tensor, **kwargs: Any) -> Tensor:
        self.hidden_BSD = hidden_BSD
        self.kwargs = kwargs
        if self.is_last:
            raise _StopForward
        return hidden_BSD


class _NoAttention(nn.Module):
    """In the place of the attention, for a while or where it is removed: adds nothing."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()), None


class _NoMlp(nn.Module):
    """In the place of each module of the MLP: the last one adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


_STAND_INS: Mapping[UnitKind, type[nn.Module]] = {"attention": _NoAttention, "mlp": _NoMlp}


@contextmanager
def without_global_width_warnings() -> Generator[None]:
    """transformers warns of readers that take a per-layer config's global width for every layer's.

    Inside the context the reader is transformers itself, when it checks the config that it has just read.
    """
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class StockModel:
    """The stock architecture of a checkpoint without its weights.

    `config` and `groups` are those of the global config; in a per-layer checkpoint each block has its own
    (`block_configs`, `layout.blocks[i].groups`), and a block may lack a half (`removed`). A sliced checkpoint
    (`sliced`) can be described but not run: its sums pass through matrices that stock layers lack. Code that lies in
    the checkpoint is never run here.
    Raises UnsupportedError for an unknown family or variant, CheckpointError when tensors are missing or of
    another shape than the configuration says.
    """

    def __init__(self, reader: CheckpointReader, head_units: HeadUnits = "kv-group") -> None:
        self._head_units: HeadUnits = head_units
        model_type = reader.config.get("model_type")
        if "quantization_config" in reader.config:
            raise UnsupportedError(
                "the checkpoint is quantised",
                where=str(reader.directory),
                do="prune the unquantised checkpoint, then quantise",
            )
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UnsupportedError(
                "unknown model family",
                where=str(reader.directory / "config.json"),
                got=f"model_type {model_type!r}",
                wanted=", ".join(FAMILIES),
                do="see docs/add-an-architecture.md: a family is one file of data",
            )
        self.family: Family = FAMILIES.get(model_type)
        try:
            with without_global_width_warnings():
                self.config: PretrainedConfig = AutoConfig.from_pretrained(
                    str(reader.directory), local_files_only=True, attn_implementation="sdpa"
                )
            self.block_configs: tuple[PretrainedConfig, ...] = self._split_config(reader)
            self.family.check(self.config)
            self.groups = self.family.groups(self.config, self._head_units)
            self.removed: RemovedHalves = self._read_removed(reader)
            self.sliced = SLICED_ENTRY in reader.config
            with torch.device("meta"):
                self.skeleton: nn.Module = AutoModelForCausalLM.from_config(self.config).eval()
            if self.config.num_hidden_layers < 1:
                raise CheckpointError("the model has no blocks", where=str(reader.directory / "config.json"))
            self._fit_skeleton()
        except StructPruneError:
            raise
        except Exception as error:
            # transformers raises many types for a config that makes no model; all of them are the input's fault.
            raise CheckpointError(
                "transformers cannot build this configuration",
                where=str(reader.directory / "config.json"),
                got=str(error),
            ) from error
        self.layout = self._layout(reader)

    def _split_config(self, reader: CheckpointReader) -> tuple[PretrainedConfig, ...]:
        """Each block's config. A per-layer config is replaced by its global part, which stock code can build."""
        config: Any = self.config
        if not config.is_heterogeneous:
            return (config,) * config.num_hidden_layers
        per_block: tuple[PretrainedConfig, ...] = tuple(config.per_layer_config)
        self.config = copy.deepcopy(config)
        self.config.per_layer_config = None
        known = {name for group in self.family.groups(self.config, self._head_units) for name in group.config_fields}
        found = {name for fields in reader.config["per_layer_config"].values() for name in fields}
        if found - known:
            raise UnsupportedError(
                "per_layer_config changes more than the widths",
                where=str(reader.directory / "config.json"),
                got=", ".join(sorted(found - known)),
                wanted=", ".join(sorted(known)),
            )
        return per_block

    def _read_removed(self, reader: CheckpointReader) -> RemovedHalves:
        where = str(reader.directory / "config.json")
        removed = removed_halves(reader.config, self.config.num_hidden_layers, where)
        if any(removed) and self.family.attention_module is None:
            raise UnsupportedError(f"{self.family.name} blocks have no halves that can be removed", where=where)
        return removed

    def _fit_skeleton(self) -> None:
        """Rebuild the skeleton's layers where a block's widths are its own or a half is gone."""
        layers: Any = self.skeleton.get_submodule(self.family.blocks_module)
        for index, config in enumerate(self.block_configs):
            if config is not self.config or self.removed[index] or self.sliced:
                layers[index] = self._empty_layer(index, config, ())

    def _empty_layer(self, index: int, config: PretrainedConfig, removed: Collection[UnitKind]) -> nn.Module:
        """Layer `index` on `meta`, with modules that add nothing for the halves that are gone."""
        layer_class: Any = type(self.skeleton.get_submodule(f"{self.family.blocks_module}.{index}"))
        with torch.device("meta"):
            layer: nn.Module = layer_class(config, layer_idx=index)
        for group in self.groups:
            if group.kind in self.removed[index] or group.kind in removed:
                for name in self.family.half_modules(group.kind):
                    layer.set_submodule(name, _STAND_INS[group.kind]())
                if group.norm_module is not None:
                    layer.set_submodule(group.norm_module, nn.Identity())
        if self.sliced:
            for name in SHORTCUTS.values():
                layer.add_module(name, nn.Linear(config.hidden_size, config.hidden_size, bias=False, device="meta"))
        return layer.eval()

    def _layout(self, reader: CheckpointReader) -> ModelLayout:
        family = self.family
        expected = {name: tuple(p.shape) for name, p in self.skeleton.named_parameters(remove_duplicate=False)}
        expected |= {name: tuple(b.shape) for name, b in self.skeleton.state_dict().items()}
        head_weight = f"{family.head_module}.weight"
        tied = bool(getattr(self.config, "tie_word_embeddings", False)) and head_weight not in reader.shapes
        missing = sorted(n for n in expected if n not in reader.shapes and not (tied and n == head_weight))
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensor(s), first {missing[0]!r}",
                where=str(reader.directory),
                do="download it again, or check that config.json belongs to it",
            )
        extra = sorted(n for n in reader.shapes if n.startswith(f"{family.blocks_module}.") and n not in expected)
        # Old checkpoints carry computed buffers; a weight that the stock model lacks would be lost without a word.
        extra = [name for name in extra if not name.endswith(("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias"))]
        if extra:
            raise CheckpointError(
                f"the checkpoint has {len(extra)} block tensor(s) that the configuration does not, first {extra[0]!r}",
                where=str(reader.directory),
                do="check that config.json belongs to it",
            )
        for name, shape in expected.items():
            if name in reader.shapes and reader.shapes[name] != shape:
                raise CheckpointError(
                    f"tensor {name!r} has another shape than the configuration says",
                    where=str(reader.directory),
                    got=reader.shapes[name],
                    wanted=shape,
                )
        blocks: list[BlockLayout] = []
        for index in range(self.config.num_hidden_layers):
            prefix = f"{family.blocks_module}.{index}."
            shapes = {n.removeprefix(prefix): s for n, s in expected.items() if n.startswith(prefix)}
            groups = tuple(
                group
                for group in self.family.groups(self.block_configs[index], self._head_units)
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
            max_positions=self.config.max_position_embeddings,
            blocks=tuple(blocks),
            blocks_module=family.blocks_module,
            embedding_modules=family.embedding_modules,
            rotary_module=family.rotary_module,
            final_norm_module=family.final_norm_module,
            head_module=family.head_module,
            tied_embeddings=tied,
            outer_tensors=outer,
        )

    def resized_config(
        self, kept: Mapping[str, int], index: int | None = None, biased: Collection[UnitKind] = ()
    ) -> PretrainedConfig:
        """The config of block `index`, or of every block, with `kept` units per kind; the halves `biased` get biases.

        For one block, a kind of which nothing is kept keeps its numbers: stock classes divide by some of them, and
        what is gone is said to `block`. Raises UnsupportedError if the config cannot say so, or for every block if
        the source's blocks differ or a half would go.
        """
        if index is None and any(block.groups != self.groups for block in self.layout.blocks):
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
            for name, factor in group.config_fields.items():
                setattr(config, name, kept[group.kind] * factor)
            if heads_per_unit := group.config_fields.get("num_attention_heads"):
                config.head_dim = group.width // heads_per_unit
        return config

    def block(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        config: PretrainedConfig | None = None,
        removed: Collection[UnitKind] = (),
    ) -> nn.Module:
        """The stock layer `index` with `tensors` (relative names) assigned; their dtype and device are the layer's.

        `config` is the block's own unless given. The halves in `removed`, and those that the checkpoint lacks, add
        nothing and take no tensors.
        """
        assert not self.sliced, "the stock layer would ignore the shortcuts"
        layer = self._empty_layer(index, config or self.block_configs[index], removed)
        layer.load_state_dict(dict(tensors), strict=True, assign=True)
        return layer.requires_grad_(False)

    @contextmanager
    def half(self, block: nn.Module, kind: UnitKind) -> Generator[None]:
        """Inside the context `block(h)` is `h + attention(h)` or `h + mlp(h)`; the one after the other is the block.

        A half that is removed from the block is `h`.
        """
        assert self.family.attention_module is not None
        other: UnitKind = "mlp" if kind == "attention" else "attention"
        outside = {name: block.get_submodule(name) for name in self.family.half_modules(other)}
        for name in outside:
            block.set_submodule(name, _STAND_INS[other]())
        try:
            yield
        finally:
            for name, module in outside.items():
                block.set_submodule(name, module)

    def embedding_tensors(self) -> list[str]:
        """Names of the tensors that `embed` needs."""
        prefixes = tuple(f"{module}." for module in self.family.embedding_modules)
        return [name for name in self.layout.outer_tensors if name.startswith(prefixes)]

    def embed(self, ids_BS: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, BlockInputs]:
        """Token ids -> the first block's input (B, S, D) and the arguments that the stock model gives each block."""
        recorders = [_Recorder(is_last=i + 1 == len(self.layout.blocks)) for i in range(len(self.layout.blocks))]
        model = self.skeleton
        dense_blocks = model.get_submodule(self.family.blocks_module)
        if self.family.rotary_module is not None:
            rotary: Any = type(model.get_submodule(self.family.rotary_module))
            model.set_submodule(self.family.rotary_module, rotary(self.config).to(ids_BS.device))
        model.set_submodule(self.family.blocks_module, nn.ModuleList(recorders))
        for module in self.family.embedding_modules:
            local = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
            model.get_submodule(module).load_state_dict(local, strict=True, assign=True)
        try:
            with torch.no_grad():
                model(input_ids=ids_BS, use_cache=False)
        except _StopForward:
            pass
        finally:
            model.set_submodule(self.family.blocks_module, dense_blocks)
            for module in self.family.embedding_modules:
                model.get_submodule(module).to("meta")
        return recorders[0].hidden_BSD, BlockInputs(kwargs=tuple(r.kwargs for r in recorders))

    def head_tensors(self) -> list[str]:
        """Names of the tensors that `head` needs: final norm, and the output projection or the tied embedding."""
        names = [n for n in self.layout.outer_tensors if n.startswith(f"{self.family.final_norm_module}.")]
        return [*names, self.head_weight]

    @property
    def head_weight(self) -> str:
        """Checkpoint name of the output projection: the input embedding where the two are tied."""
        tied = f"{self.family.embedding_modules[0]}.weight"
        return tied if self.layout.tied_embeddings else f"{self.family.head_module}.weight"

    def head(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Final norm and output projection as one module: (N, D) -> (N, V)."""
        parts: list[nn.Module] = []
        norm_name = self.family.final_norm_module
        if norm_name is not None:
            norm = self.skeleton.get_submodule(norm_name)
            local = {n.removeprefix(f"{norm_name}."): t for n, t in tensors.items() if n.startswith(f"{norm_name}.")}
            norm.load_state_dict(local, strict=True, assign=True)
            parts.append(norm)
        projection = nn.Linear(self.layout.hidden_size, self.layout.vocab_size, bias=False, device="meta")
        projection.load_state_dict({"weight": tensors[self.head_weight]}, assign=True)
        return nn.Sequential(*parts, projection).eval().requires_grad_(False)


def load_model(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The whole checkpoint as stock transformers loads it; a per-layer or sliced one through our own modelling file.

    Raises CheckpointError with its reason if it does not load, or if its modelling file is not ours.
    """
    transformers_logging.disable_progress_bar()
    try:
        loader: Any = _per_layer_class(directory) or AutoModelForCausalLM
        with without_global_width_warnings():
            model: Any = loader.from_pretrained(str(directory), dtype=dtype, local_files_only=True)
        return model.to(device).eval()
    except StructPruneError:
        raise
    except Exception as error:
        # Any failure of the stock loader means the same to the user: this directory does not load.
        raise CheckpointError(
            "stock transformers cannot load the checkpoint", where=str(directory), got=str(error)
        ) from error


def has_own_modeling_file(directory: Path) -> bool:
    """Whether the checkpoint loads through a modelling file of ours. Raises CheckpointError for any other file."""
    return _per_layer_class(directory) is not None


def _per_layer_class(directory: Path) -> Any:
    """The model class in the modelling file of a per-layer or sliced checkpoint, or None for one without such a file.

    `trust_remote_code` would also trust whatever else config.json names and lies in the directory, so it stays off:
    only the one file is imported, and only if it is byte for byte a text of ours.
    """
    path = directory / MODELING_NAME
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if not path.exists() and not config.keys() & {"per_layer_config", REMOVED_ENTRY, SLICED_ENTRY}:
        return None
    model_type = config.get("model_type")
    form, stems = ("sliced", SLICED_STEMS) if SLICED_ENTRY in config else ("per-layer", CLASS_STEMS)
    if model_type not in stems:
        raise CheckpointError(
            f"the model family has no {form} format",
            where=str(directory / "config.json"),
            got=f"model_type {model_type!r}",
            wanted=", ".join(stems),
        )
    if not path.is_file():
        raise CheckpointError(f"the {form} checkpoint lacks its modelling file", where=str(path), do="copy it there")
    accepted = ACCEPTED_SLICED_SOURCES if form == "sliced" else ACCEPTED_SOURCES[FAMILIES.get(model_type).name]
    if path.read_bytes() not in [text.encode() for text in accepted]:
        raise CheckpointError(
            "the modelling file is not one that structprune writes, so it is not run",
            where=str(path),
            got="other bytes",
            wanted=f"an unchanged file for {model_type}",
            do="write the checkpoint again, or load it yourself with trust_remote_code=True if you trust it",
        )
    return get_class_from_dynamic_module(
        f"{MODELING_MODULE}.{stems[model_type]}ForCausalLM", str(directory), local_files_only=True
    )


def output_tensor(output: Any) -> Tensor:
    """A block's hidden states, whether the layer returns them bare or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def compact(tensors: Mapping[str, Tensor], group: UnitGroup, keep_units: Tensor) -> dict[str, Tensor]:
    """Cut every axis of `group` down to the units in `keep_units` (ascending). Other tensors are passed through.

    Indices of an axis that no unit owns stay (fused tensors hold several groups), and what stays keeps its order.
    """
    result = dict(tensors)
    by_axis: dict[tuple[str, int], list[AxisSlice]] = {}
    for part in group.slices:
        by_axis.setdefault((part.tensor, part.axis), []).append(part)
    for (name, axis), parts in by_axis.items():
        mask = torch.ones(result[name].shape[axis], dtype=torch.bool)
        for part in parts:
            mask[part.indices(torch.arange(group.num_units))] = False
            mask[part.indices(keep_units)] = True
        result[name] = result[name].index_select(axis, torch.nonzero(mask).flatten().to(result[name].device))
    return result


def add_bias(tensors: Mapping[str, Tensor], group: UnitGroup, bias_O: Tensor) -> dict[str, Tensor]:
    """`tensors` with `bias_O` added to the consumer's bias; where there is none, the half's other maps get zeros too.

    Raises UnsupportedError if the family has no config entry for such biases.
    """
    result = dict(tensors)
    name = group.consumer_bias
    if name is None:
        check_bias(group)
        for module in group.bias_modules:
            weight = tensors[f"{module}.weight"]
            result[f"{module}.bias"] = weight.new_zeros(weight.shape[0])
        name = f"{group.consumer_module}.bias"
    result[name] = (result[name] + bias_O.to(result[name].dtype)).contiguous()
    return result


def check_bias(group: UnitGroup) -> None:
    """Raise UnsupportedError if the group's consumer has no bias and cannot get one."""
    if group.consumer_bias is None and group.bias_field is None:
        raise UnsupportedError(
            f"the stock class has no bias in its {group.kind}, which this method adds",
            wanted="a llama or opt model",
            do="use another --solver",
        )


def remove_half(tensors: Mapping[str, Tensor], block: BlockLayout, kind: UnitKind) -> dict[str, Tensor]:
    """`tensors` of `block` (relative names) without those of one half and its norm."""
    gone = set(block.half_tensors(kind))
    return {name: tensor for name, tensor in tensors.items() if name not in gone}


def producer_norms(tensors: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
    """Product over the producers' weight tensors of each unit's L2 norm, shape (units,), float32."""
    norms = torch.ones(group.num_units)
    for part in group.producers:
        weight = tensors[part.tensor]
        if weight.ndim < 2:
            continue  # a bias moves with its row but is no weight of its own
        rows = weight.float().movedim(part.axis, 0)[part.indices(torch.arange(group.num_units))]
        norms = norms * rows.reshape(group.num_units, -1).norm(dim=1).cpu()
    return norms
