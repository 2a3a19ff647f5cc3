"""What a GGUF file will hold, planned from headers: architecture, widths, tensors, metadata.

Widths come from the tensors' shapes, so a checkpoint is taken whichever tool made it uneven. Blocks of different widths
go to an architecture with per-block widths; a block that lost both of its sublayers is left out, and a sublayer that
the architecture cannot leave out is written as a few channels or one group of heads of zeros, which add nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from structprune.architectures import FAMILIES
from structprune.architectures.families.common import head_size
from structprune.architectures.gguf.description import BlockWidths, GgufFamily, GgufModel, Target, Value
from structprune.architectures.gguf.read import ACTIVATIONS, parsed_config
from structprune.architectures.gguf.table import GGUF_FAMILIES
from structprune.architectures.gguf.write import hyperparameters
from structprune.architectures.modeling.removed import REMOVED_ENTRY, RemovedSublayers, removed_sublayers
from structprune.architectures.modeling.sliced import SLICED_ENTRY
from structprune.architectures.modeling.value_channels import has_narrow_values
from structprune.architectures.stock.names import with_stock_names, with_tied_embedding
from structprune.architectures.stock.tensor_check import without_head
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, UnsupportedError
from structprune.exporters.export import EXPORT_DTYPES
from structprune.exporters.gguf.entries import GgufTokenizer
from structprune.exporters.gguf.tensors import GgufTensor, list_tensors
from structprune.exporters.gguf.tokenizer import built_tokenizer, copied_tokenizer
from structprune.types import UNIT_KINDS

# Channels of an MLP of zeros: the narrowest row that llama.cpp's quantisation takes.
_ZERO_CHANNELS = 32
# Of every stock class that has rules.
_HEAD_MODULE = "lm_head"
# Entries that say what this module reads from the tensors; without them the config is a stock one.
_NOT_STOCK = ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map", REMOVED_ENTRY)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPlan:
    """Everything about the file but the weights."""

    architecture: str
    dtype: torch.dtype
    tensors: tuple[GgufTensor, ...]
    hyperparameters: Mapping[str, Value]
    tokenizer: GgufTokenizer

    def dtype_of(self, tensor: GgufTensor) -> torch.dtype:
        """Return the tensor's dtype in the file; vectors are always float32, as llama.cpp wants them."""
        return torch.float32 if tensor.float32 or len(tensor.shape) < 2 else self.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, without padding."""
        return sum(torch.Size(t.shape).numel() * self.dtype_of(t).itemsize for t in self.tensors)


def stock_names(reader: CheckpointReader) -> CheckpointReader:
    """Return a view of the checkpoint under the names of the stock model, whatever the files call its tensors.

    Raises UnsupportedError where the family has no GGUF form, CheckpointError for a model without a head.
    """
    rules = _family(reader)
    embedding = next(rule.source for rule in rules.uniform.outer if rule.target == "token_embd.weight")
    known = FAMILIES.find(reader.config["model_type"])
    view = with_stock_names(
        reader,
        base=rules.blocks.partition(".")[0],
        head=_HEAD_MODULE,
        renamed=known.renamed if known else {},
        experts=known.experts if known else None,
    )
    if rules.stacking is not None:
        view = view.unstacked(rules.stacking)
    head = f"{_HEAD_MODULE}.weight"
    if getattr(_parsed_config(reader), "tie_word_embeddings", False):
        return with_tied_embedding(view, embedding, head)
    if head not in view.shapes:
        # llama.cpp would take the embedding for it.
        raise without_head(str(reader.directory), view.stored_name(head))
    return view


def plan_gguf(reader: CheckpointReader, dtype: str, tokenizer_gguf: Path | None) -> GgufPlan:
    """Check that the checkpoint has a GGUF form and say which; reads headers and the tokenizer only.

    `reader` is a view by `stock_names`, `dtype` a name of EXPORT_DTYPES or `stored`. Raises UnsupportedError where no
    architecture of llama.cpp computes the same, CheckpointError for tensors that are missing, left over or of another
    shape.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedError("writing GGUF needs the gguf package", do="pip install 'structprune[gguf]'")
    family = _family(reader)
    config = _parsed_config(reader)
    removed = removed_sublayers(reader.config, config.num_hidden_layers, str(reader.directory / "config.json"))
    widths = _widths(reader, family, config, removed)
    target = _target(reader, family, config, widths, removed)
    model = GgufModel(
        config=config,
        family=family,
        target=target,
        head_size=head_size(config),
        blocks=tuple(_with_stand_ins(widths, removed, target)),
    )
    tensors = list_tensors(reader, model, removed)
    vocab_size: int = config.vocab_size
    tokenizer = (
        built_tokenizer(reader.directory, vocab_size, config)
        if tokenizer_gguf is None
        else copied_tokenizer(tokenizer_gguf, vocab_size)
    )
    return GgufPlan(
        architecture=target.architecture,
        dtype=_dtype(reader, dtype),
        tensors=tuple(tensors),
        hyperparameters=hyperparameters(model),
        tokenizer=tokenizer,
    )


def _dtype(reader: CheckpointReader, name: str) -> torch.dtype:
    if name != "stored":
        return EXPORT_DTYPES[name]
    stored = {reader.dtypes[tensor] for tensor, shape in reader.shapes.items() if len(shape) > 1}
    return next(iter(stored)) if len(stored) == 1 and stored <= set(EXPORT_DTYPES.values()) else torch.float32


def _family(reader: CheckpointReader) -> GgufFamily:
    model_type = reader.config.get("model_type")
    where = str(reader.directory / "config.json")
    if model_type not in GGUF_FAMILIES:
        raise UnsupportedError(
            "no GGUF form is known for this model family",
            where=where,
            got=f"model_type {model_type!r}",
            wanted="a type of the table in docs/gguf.md",
        )
    if SLICED_ENTRY in reader.config:
        raise UnsupportedError(
            "the residual sums pass through matrices, which no architecture of llama.cpp has",
            where=where,
            do="slice with --structure uniform, which needs none",
        )
    if has_narrow_values(reader.config):
        raise UnsupportedError(
            "heads have fewer value channels than key channels, for which no GGUF form is known",
            where=where,
            got="v_head_dim in per_layer_config",
            do="prune attention with --head-units kv-group, or the MLP only",
        )
    if "quantization_config" in reader.config:
        raise UnsupportedError("the checkpoint is quantised", where=where, do="export the unquantised one")
    return GGUF_FAMILIES[str(model_type)]


def _parsed_config(reader: CheckpointReader) -> Any:
    stock = {name: value for name, value in reader.config.items() if name not in _NOT_STOCK}
    config = parsed_config(stock, str(reader.directory / "config.json"))
    family = GGUF_FAMILIES[stock["model_type"]]
    activation = next((getattr(config, name) for name in ACTIVATIONS if getattr(config, name, None)), None)
    wrong = {name: (getattr(config, name), value) for name, value in family.requires.items()}
    wrong = {name: pair for name, pair in wrong.items() if pair[0] != pair[1]}
    if family.activations and activation not in family.activations:
        wrong["activation"] = (activation, " or ".join(family.activations))
    for name, (got, wanted) in wrong.items():
        raise UnsupportedError(
            "llama.cpp computes this family otherwise",
            where=str(reader.directory / "config.json"),
            got=f"{name} {got}",
            wanted=wanted,
        )
    return config


def _widths(reader: CheckpointReader, family: GgufFamily, config: Any, removed: RemovedSublayers) -> list[BlockWidths]:
    """Read each block's widths from its tensors; a removed sublayer has zeros."""
    size_of_head = head_size(config)
    of_config = {"q": config.num_attention_heads * size_of_head, "k": family.kv_heads(config) * size_of_head}
    said: Mapping[str, int] = {**of_config, **family.dims(config)}
    result: list[BlockWidths] = []
    for index, kinds in enumerate(removed):
        size = {
            dim: 0 if (kind := "mlp" if dim == "f" else "attention") in kinds else of_config.get(dim, 0)
            for dim in ("q", "k", "f")
        }
        for dim, (name, axis) in family.widths.items():
            kind = "mlp" if dim == "f" else "attention"
            if kind not in kinds:
                full = f"{family.blocks}{index}.{name}"
                if family.kinds is not None and full not in reader.shapes and dim in said:
                    size[dim] = said[dim]
                    continue
                if full not in reader.shapes:
                    raise CheckpointError(f"the checkpoint lacks tensor {full!r}", where=str(reader.directory))
                size[dim] = reader.shapes[full][axis]
        if size["q"] % size_of_head or size["k"] % size_of_head or (size["k"] and size["q"] % size["k"]):
            raise CheckpointError(
                "the heads of a block do not divide evenly",
                where=f"{reader.directory}, block {index}",
                got=f"{size['q']} query and {size['k']} KV rows, head size {size_of_head}",
            )
        result.append(
            BlockWidths(
                index=index, heads=size["q"] // size_of_head, kv_heads=size["k"] // size_of_head, channels=size["f"]
            )
        )
    return result


def _target(
    reader: CheckpointReader, family: GgufFamily, config: Any, widths: Sequence[BlockWidths], removed: RemovedSublayers
) -> Target:
    """Choose the native architecture for equal blocks, else the one with per-block widths. Raises UnsupportedError."""
    alike = {(block.heads, block.kv_heads, block.channels) for block in widths if len(removed[block.index]) < 2}
    even = len(alike) == 1 and not any(len(kinds) == 1 for kinds in removed)
    shared_out = all(block.heads * head_size(config) in (0, config.hidden_size) for block in widths)
    if even and (shared_out or not family.uniform.even_heads):
        return family.uniform
    model_type = reader.config["model_type"]
    if family.uneven is None:
        kind = "heads that do not share out the hidden size" if even else "blocks of different widths"
        raise UnsupportedError(
            f"no architecture of llama.cpp computes {model_type} with {kind}",
            where=str(reader.directory),
            do="prune with --scope mlp" if even else "prune with --structure uniform",
        )
    if family.uneven.needs_tied and _untied(reader):
        raise UnsupportedError(
            f"llama.cpp's {family.uneven.architecture}, which takes uneven {model_type} blocks, has no head of its own",
            where=str(reader.directory),
            got="a head that is not the embedding",
            do="prune with --structure uniform",
        )
    return family.uneven


def _untied(reader: CheckpointReader) -> bool:
    return f"{_HEAD_MODULE}.weight" in reader.shapes


def _with_stand_ins(widths: Sequence[BlockWidths], removed: RemovedSublayers, target: Target) -> list[BlockWidths]:
    """List the blocks of the file: those with something left, with zeros for a sublayer that cannot be left out."""
    whole = next(block for block in widths if block.heads)
    result: list[BlockWidths] = []
    for block in widths:
        if removed[block.index].issuperset(UNIT_KINDS):
            continue
        if not block.channels:
            # Without channels llama.cpp's deci skips the rest of the block, its attention included.
            block = replace(block, channels=_ZERO_CHANNELS)
        if not block.heads and not (target.skips_attention and result):
            block = replace(block, heads=whole.heads // whole.kv_heads, kv_heads=1)
        result.append(block)
    return result
