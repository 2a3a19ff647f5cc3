"""Checkpoints with random weights and the true shapes of published models, a few blocks of each.

Weights are one table of random numbers read again and again from another place: as fast as the disk, no two rows alike,
and no Gram of them is singular by itself. For other programs than those beside this file:

    python benchmarks/memory/source.py llama-3.2-1b --blocks 4 -o out/llama-1b
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, Shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# A prime, so that rows of no tensor start at the same place of the table again and again.
_TABLE = 8_388_593
_CHUNK_BYTES = 16 * 2**20


def write_source(shape: Shape, num_blocks: int, directory: Path, *, filled: bool = True) -> Path:
    """Write the checkpoint of `num_blocks` blocks; whole embeddings, a tokenizer of bytes.

    Unless it is `filled`, the file is all holes behind its header: enough for a plan, and it takes no room on the disk.
    """
    directory.mkdir(parents=True)
    config = shape.config(num_blocks)
    (directory / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(directory)
    _write_weights(directory / "model.safetensors", tensor_shapes(config), getattr(torch, config["dtype"]), filled)
    return directory


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the stock model, built without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, filled: bool) -> None:
    """One safetensors file: header, then each tensor's numbers out of the table, or holes."""
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    code = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, start + sizes[name]]}
        start += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(_TABLE, generator=generator)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if not filled:
            file.truncate(file.tell() + start)
            return
        for number, (name, shape) in enumerate(shapes.items()):
            if "norm" in name or name.endswith("bias"):
                values = torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
                file.write(_bytes(values))
                continue
            # As stock code initialises: variance falls with the inputs, so no stream grows from block to block.
            table = _bytes((random * (0.7 * shape[-1] ** -0.5)).to(dtype))
            at = number * 104_729 * dtype.itemsize % len(table)
            left = sizes[name]
            while left:
                part = table[at : at + min(left, _CHUNK_BYTES)]
                file.write(part)
                left -= len(part)
                at = (at + len(part)) % len(table)


def _bytes(values: torch.Tensor) -> memoryview:
    array: Any = values.contiguous().view(torch.uint8).numpy().reshape(-1)
    return memoryview(array)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to create")
    options = parser.parse_args()
    write_source(SHAPES[options.model], options.blocks, options.output)


if __name__ == "__main__":
    main()
