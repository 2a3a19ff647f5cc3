"""Turns a GGUF file into a Hugging Face directory, tensor by tensor (dequantised to float32).

Names, permutations and the config come from transformers' own GGUF support; only the loop is ours, because the
stock loader holds the whole model, and its result refuses `save_pretrained` while `quantization_config` is set.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as stock_gguf

from structprune.checkpoint.readme import README_NAME
from structprune.checkpoint.writer import CheckpointWriter
from structprune.errors import CheckpointError, UnsupportedError
from structprune.files import DEFAULT_SHARD_BYTES, write_text

# Families whose stock conversion is one tensor to one tensor.
_ARCHITECTURES = ("llama", "gemma3")


def convert_gguf(source: Path, directory: Path) -> None:
    """Write `source` as config, tokenizer and float32 safetensors shards into the empty `directory`.

    Raises CheckpointError for an unreadable file, UnsupportedError for a family without a one-to-one conversion.
    """
    try:
        import gguf
    except ImportError:
        raise UnsupportedError(
            "reading GGUF needs the gguf package", where=str(source), do="pip install 'structprune[gguf]'"
        ) from None
    try:
        reader: Any = gguf.GGUFReader(str(source))
        architecture = stock_gguf.read_field(reader, "general.architecture")[0]
    except Exception as error:
        raise CheckpointError("the file is truncated or not GGUF", where=str(source), got=str(error)) from error
    if architecture not in _ARCHITECTURES:
        raise UnsupportedError(
            "this GGUF architecture cannot be converted",
            where=str(source),
            got=architecture,
            wanted=", ".join(_ARCHITECTURES),
            do="start from the model's Hugging Face checkpoint",
        )
    try:
        _convert(source, directory, reader, architecture, gguf.dequantize)
    except OSError:
        raise  # a full disk is not the file's fault
    except Exception as error:
        raise CheckpointError(
            "the GGUF file cannot be converted; metadata or tensors are missing or damaged",
            where=str(source),
            got=f"{type(error).__name__}: {error}",
        ) from error


def _convert(source: Path, directory: Path, reader: Any, architecture: str, dequantize: Any) -> None:
    # transformers warns that it dequantises; that is what is asked for here.
    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
    config: Any = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    config.architectures = [type(skeleton).__name__]
    processor = stock_gguf.TENSOR_PROCESSORS.get(architecture, stock_gguf.TensorProcessor)(config=config.to_dict())
    names = stock_gguf.get_gguf_hf_weights_map(skeleton, processor)
    by_block: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        if tensor.name in names:
            block = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else ""
            by_block.setdefault(block, []).append(tensor)
    shards = directory / "shards"
    shards.mkdir()
    writer = CheckpointWriter(shards, len(by_block))
    for number, tensors in enumerate(by_block.values(), start=1):
        shard: dict[str, torch.Tensor] = {}
        for tensor in tensors:
            weights = processor.process(weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name).weights
            shard[names[tensor.name]] = torch.from_numpy(weights.copy()).float()
        writer.write(number, shard)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, trust_remote_code=False).save_pretrained(
        str(directory)
    )
    config.save_pretrained(str(directory))
    _write_origin(reader, directory / README_NAME, source.name)
    writer.weight_files(DEFAULT_SHARD_BYTES).write(directory)
    writer.remove()
    shards.rmdir()


def _write_origin(reader: Any, path: Path, name: str) -> None:
    """What the file says of its licence and origin, as the front matter of a README; nothing if it says nothing."""
    entries = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
        "language": "general.languages",
        "base_model": "general.base_model.0.repo_url",
    }
    found = {entry: reader.fields[key].contents() for entry, key in entries.items() if key in reader.fields}
    if "base_model" in found:
        # The model's name on the hub is the end of its address.
        found["base_model"] = "/".join(found["base_model"].rstrip("/").split("/")[-2:])
    if found:
        write_text(path, f"---\n{yaml.safe_dump(found, sort_keys=False)}---\n\nRead from `{name}`.\n")
