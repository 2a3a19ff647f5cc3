"""Blocks of different widths for vLLM's own class of them: a config with an entry per block, the weights as they are.

vLLM's class DeciLMForCausalLM (`model_type` nemotron-nas) builds LLaMA's block with an MLP of its own width, KV heads
of its own number, or without one of its sublayers. It reads the numbers of a block as attributes, and writes the config
as JSON again, so a configuration file comes with the weights, which vLLM runs where it is told to trust the directory.
What the class computes was read in its source, and tests/e2e/test_vllm.py compares it with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from structprune.architectures.families.common import head_size
from structprune.architectures.modeling.value_channels import has_narrow_values
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.folder import carry_over, sort_files
from structprune.checkpoint.weight_files import StoredTensor, WeightFiles
from structprune.errors import UnsupportedError
from structprune.exporters.export import EXPORT_DTYPES, Exporter, ExportRequest, ExportResult
from structprune.exporters.vllm_classes import NAS_ARCHITECTURE, NAS_MODEL_TYPES
from structprune.files import DEFAULT_SHARD_BYTES, make_folder, whole_folder, write_json, write_text
from structprune.runs.directory import check_free_disk
from structprune.types import UNIT_KINDS

CONFIG_MODULE = "configuration_structprune"

_CONFIG_SOURCE = '''"""Blocks of different widths, written by structprune: their numbers as attributes, for vLLM."""

from transformers import PretrainedConfig


class _Numbers(dict):
    """A dict, which is written to JSON, with its entries as attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class StructPruneNasConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **entries):
        self.block_configs = [
            _Numbers({part: _Numbers(numbers) for part, numbers in block.items()}) for block in block_configs
        ]
        super().__init__(**entries)
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rope:
    """One type of rotary positions that vLLM computes as transformers does."""

    entries: tuple[str, ...] = ()
    """Parameters beside `rope_theta`."""
    refused: tuple[str, ...] = ()
    """Parameters that vLLM reads otherwise."""


_ROPES: Mapping[str, _Rope] = {
    "default": _Rope(),
    "linear": _Rope(entries=("factor",)),
    "llama3": _Rope(entries=("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": _Rope(
        entries=("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        refused=("attention_factor", "mscale", "mscale_all_dim"),
    ),
}
# Entries of the stock config that mean the same there.
_CARRIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
)


def export_vllm(request: ExportRequest) -> ExportResult:
    """Write weights, config, configuration file and the tokenizer's files into the new directory `request.output`.

    Nothing but headers is read before all is resolved; in memory at any time is one tensor. Raises UnsupportedError
    for what the class does not compute, CheckpointError for tensors that do not fit together, NumericalError for a
    value that is not finite or that the dtype cannot hold.
    """
    source = request.reader
    if request.dtype != "stored":
        source = source.in_width(EXPORT_DTYPES[request.dtype])
    stock = StockModel(source)
    _check(stock, request)
    config = _config(stock)
    names = [*stock.layout.outer_tensors, *(b.prefix + name for b in stock.layout.blocks for name in b.shapes)]
    reader = stock.reader
    tensors = [StoredTensor.planned(name, reader.shapes[name], reader.dtypes[name]) for name in names]
    files = WeightFiles.of(tensors, DEFAULT_SHARD_BYTES)
    output = request.output
    check_free_disk(output, files.num_bytes)
    make_folder(output.parent, "the export")
    request.start(len(tensors))

    def put(tensor: StoredTensor, target: BinaryIO) -> None:
        value = reader.read([tensor.name])[tensor.name]
        target.write(value.contiguous().view(torch.uint8).numpy().data)
        request.advance(tensor.name)

    with whole_folder(output) as staging:
        companions = sort_files(request.reader.directory, request.reader.weight_files)
        carry_over(request.reader.directory, staging, companions)
        for name, reason in companions.left_out.items():
            request.note(f"{name} is left out: {reason}")
        write_text(staging / f"{CONFIG_MODULE}.py", _CONFIG_SOURCE)
        write_json(staging / "config.json", config | {"dtype": files.dtype_names[0]})
        files.write(staging, put=put)
    request.note(f"for vLLM alone: vllm serve {output} --trust-remote-code, which runs {CONFIG_MODULE}.py in it")
    return ExportResult(
        format="vllm",
        path=str(output),
        architecture=NAS_ARCHITECTURE,
        dtype=files.dtype_names[0],
        num_tensors=len(tensors),
        bytes=sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        tokenizer=str(request.reader.directory),
    )


def _check(stock: StockModel, request: ExportRequest) -> None:
    """Raise UnsupportedError for what vLLM's class does not compute."""
    config: Any = stock.config
    where = str(request.reader.directory / "config.json")
    if config.model_type not in NAS_MODEL_TYPES:
        raise UnsupportedError(
            "vLLM's class for uneven blocks does not compute this model family",
            where=where,
            got=f"model_type {config.model_type!r}",
            wanted=", ".join(NAS_MODEL_TYPES),
            do="serve the directory itself: with uneven widths vLLM loads it by --trust-remote-code",
        )
    if stock.sliced:
        raise UnsupportedError(
            "the residual sums pass through matrices, which no class of vLLM has",
            where=where,
            do="slice with --structure uniform, whose output vLLM loads as it is",
        )
    if has_narrow_values(request.reader.config):
        raise UnsupportedError(
            "heads have fewer value channels than key channels, which no class of vLLM has",
            where=where,
            got="v_head_dim in per_layer_config",
            do="prune attention with --head-units kv-group, or the MLP only",
        )
    if config.hidden_act != "silu":
        raise UnsupportedError(
            "vLLM's class for uneven blocks has one activation", where=where, got=config.hidden_act, wanted="silu"
        )
    stored = set(stock.reader.dtypes.values())
    if not stored <= set(EXPORT_DTYPES.values()):
        raise UnsupportedError(
            "vLLM computes in no dtype of this checkpoint",
            where=str(request.reader.directory),
            got=", ".join(stock.reader.dtype_names(stock.reader.shapes)),
            do="pass --dtype float32",
        )
    _check_attention(stock, where)


def _check_attention(stock: StockModel, where: str) -> None:
    """Raise UnsupportedError where query heads differ between blocks, or where the first block has no attention."""
    heads = {index: _query_heads(stock, index) for index in _with_attention(stock)}
    if len(set(heads.values())) > 1:
        first, last = min(heads, key=lambda i: heads[i]), max(heads, key=lambda i: heads[i])
        raise UnsupportedError(
            "vLLM's class for uneven blocks has as many query heads in each",
            where=where,
            got=f"{heads[first]} in block {first}, {heads[last]} in block {last}",
            do="serve the directory itself with --trust-remote-code, or prune with --scope mlp",
        )
    # Its MLP takes the residual stream as an attention, or an earlier block, has left it.
    begin = next(index for index, kinds in enumerate(stock.removed) if not kinds.issuperset(UNIT_KINDS))
    if "attention" in stock.removed[begin]:
        raise UnsupportedError(
            "vLLM's class for uneven blocks cannot begin with a block without attention",
            where=where,
            got=f"no attention in block {begin}",
            do="prune again with --protect-first 1",
        )


def _with_attention(stock: StockModel) -> list[int]:
    return [index for index, kinds in enumerate(stock.removed) if "attention" not in kinds]


def _query_heads(stock: StockModel, index: int) -> int:
    block: Any = stock.block_configs[index]
    return block.num_attention_heads


def _config(stock: StockModel) -> dict[str, Any]:
    """Build config.json, from what the stock config class makes of the source's."""
    config: Any = stock.config
    first = stock.layout.blocks[_with_attention(stock)[0]].shapes
    result = {name: getattr(config, name) for name in _CARRIED if getattr(config, name, None) is not None}
    result |= {
        "architectures": [NAS_ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{CONFIG_MODULE}.StructPruneNasConfig"},
        "model_type": "nemotron-nas",
        "num_attention_heads": _query_heads(stock, _with_attention(stock)[0]),
        "head_dim": head_size(config),
        "rope_parameters": _rope(config, str(stock.reader.directory / "config.json")),
        "tie_word_embeddings": stock.layout.tied_embeddings,
        # Of o_proj where the next entry is there, which is of q, k and v.
        "attention_bias": "self_attn.o_proj.bias" in first,
        "qkv_bias": "self_attn.q_proj.bias" in first,
        "mlp_bias": any("mlp.down_proj.bias" in block.shapes for block in stock.layout.blocks),
        "block_configs": [_block(stock, index) for index in range(len(stock.layout.blocks))],
    }
    if stock.layout.attention_window is not None:
        count = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
        result |= {"sliding_window": stock.layout.attention_window, "layer_types": list(kinds)}
    return result


def _block(stock: StockModel, index: int) -> dict[str, dict[str, Any]]:
    config: Any = stock.block_configs[index]
    removed = stock.removed[index]
    attention: dict[str, Any] = {"no_op": "attention" in removed}
    if not attention["no_op"]:
        attention["n_heads_in_group"] = config.num_attention_heads // config.num_key_value_heads
    mlp: dict[str, Any] = {"no_op": "mlp" in removed}
    if not mlp["no_op"]:
        mlp["intermediate_size"] = config.intermediate_size
    return {"attention": attention, "ffn": mlp}


def _rope(config: Any, where: str) -> dict[str, Any]:
    """Return the rotary parameters that vLLM reads. Raises UnsupportedError for a type that it computes otherwise."""
    parameters: Mapping[str, Any] = config.rope_parameters
    kind = parameters["rope_type"]
    form = _ROPES.get(kind)
    refused = [name for name in form.refused if parameters.get(name) is not None] if form else []
    if form is None or refused:
        raise UnsupportedError(
            "vLLM computes these rotary positions otherwise than transformers",
            where=where,
            got=f"rope_type {kind}" + (f" with {', '.join(refused)}" if refused else ""),
            wanted=", ".join(_ROPES),
            do="serve the directory itself with --trust-remote-code, whose rotary positions are those of transformers",
        )
    names = [name for name in form.entries if parameters.get(name) is not None]
    return {"rope_type": kind, "rope_theta": parameters["rope_theta"], **{name: parameters[name] for name in names}}


VLLM = Exporter(export=export_vllm, packages=(), extra="structprune")
