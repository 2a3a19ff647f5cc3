"""Bytes of the GGUF file that llama.cpp's quantiser would make of a result, from widths and headers.

Numbers are stored in blocks of a row, so a row's bytes do not grow evenly with its length: where a type's blocks do not
fit in it, llama.cpp takes another type, with more bits. Which tensor has which type was read in llama.cpp
(src/llama-quant.cpp), and agrees to the byte with the files that it makes of SmolLM2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from structprune.architectures.gguf.description import GgufFamily, Rule
from structprune.architectures.gguf.table import GGUF_FAMILIES
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.gguf_weights import GgufWeights
from structprune.errors import InputError, UnsupportedError
from structprune.exporters.gguf.tokenizer import built_tokenizer
from structprune.types import BlockLayout

_ALIGNMENT = 32
# Beside the tokenizer: name and licence, the numbers of the architecture, factors of rotary frequencies.
_OTHER_ENTRIES = 4096
# Of each tensor: lengths, type, place, and up to four dimensions.
_TENSOR_ENTRY = 8 + 4 + 4 * 8 + 4 + 8
_MOE_OF_OTHER_TYPES = 8
"""Mixtures of so many experts have types of their own."""
_BLOCKS_OF_70B = 80
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Stored:
    """How numbers of one type are stored."""

    numbers: int
    """Numbers of a block."""
    bytes: int
    """Bytes of a block."""
    otherwise: str = ""
    """The type of rows that are no multiple of the block; none: llama.cpp refuses them."""


_STORED: Mapping[str, _Stored] = {
    "f32": _Stored(1, 4),
    "f16": _Stored(1, 2),
    "bf16": _Stored(1, 2),
    "q8_0": _Stored(32, 34),
    "q5_1": _Stored(32, 24),
    "q5_0": _Stored(32, 22),
    "q4_0": _Stored(32, 18),
    "q6_k": _Stored(256, 210, "q8_0"),
    "q5_k": _Stored(256, 176, "q5_1"),
    "q4_k": _Stored(256, 144, "q5_0"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufMix:
    """Types of tensors, under one name of llama.cpp's quantiser."""

    usual: str
    more: str = ""
    """Type of values and of the MLP's output maps in the blocks that get more bits."""
    fused: str = ""
    """Type of queries, keys and values in one tensor, in the other blocks."""


GGUF_MIXES: Mapping[str, GgufMix] = {
    "f32": GgufMix(usual="f32"),
    "f16": GgufMix(usual="f16"),
    "bf16": GgufMix(usual="bf16"),
    "q8_0": GgufMix(usual="q8_0"),
    "q6_k": GgufMix(usual="q6_k"),
    "q5_k_m": GgufMix(usual="q5_k", more="q6_k", fused="q6_k"),
    "q4_k_m": GgufMix(usual="q4_k", more="q6_k", fused="q5_k"),
    "q5_0": GgufMix(usual="q5_0"),
    "q4_0": GgufMix(usual="q4_0"),
}
"""Name of a type -> what its tensors have."""


class GgufBytes:
    """Bytes of a GGUF file of a model in one type.

    Raises InputError for a type that is not known, UnsupportedError for a family without a GGUF form and for mixtures
    of experts that have types of their own.
    """

    def __init__(self, stock: StockModel, name: str, *, blocks_go: bool) -> None:
        if name not in GGUF_MIXES:
            raise InputError("--target-bytes names no type of a GGUF file", got=name, wanted=", ".join(GGUF_MIXES))
        model_type = str(stock.config.model_type)
        if model_type not in GGUF_FAMILIES:
            raise UnsupportedError(
                "no GGUF form is known for this model family",
                got=f"--target-bytes {name}:..., model_type {model_type!r}",
                wanted="a type of the table in docs/gguf.md, or a limit of the weight files without a type",
            )
        self._stock, self._mix, self._blocks_go = stock, GGUF_MIXES[name], blocks_go
        self._family: GgufFamily = GGUF_FAMILIES[model_type]
        self._rules = {rule.source: rule for rule in self._family.uniform.block}
        experts = {getattr(stock.config, entry, None) for entry in ("num_local_experts", "num_experts")}
        if self._mix.more and _MOE_OF_OTHER_TYPES in experts:
            raise UnsupportedError(
                "llama.cpp has types of their own for mixtures of eight experts",
                got=f"--target-bytes {name}:...",
                wanted="q8_0, q6_k, q5_0 or q4_0",
            )

    def total(self, blocks: Sequence[BlockLayout], biases: Iterable[Shape]) -> int:
        """Count the bytes of a file of these blocks with all their units; `biases` are those that are new."""
        whole = sum(
            self.tensors(block, block.shapes.items(), number=number, count=len(blocks))
            for number, block in enumerate(blocks)
        )
        entries = sum(_TENSOR_ENTRY + len(name) for block in blocks for name in block.shapes)
        outer = sum(self._outer(name, shape) for name, shape in self._stock.layout.outer_tensors.items())
        new = sum(_aligned(4 * math.prod(shape)) for shape in biases)
        return whole + entries + outer + new + _tokenizer_bytes(self._stock) + _OTHER_ENTRIES

    def tensors(self, block: BlockLayout, shapes: Iterable[tuple[str, Shape]], *, number: int, count: int) -> int:
        """Count the bytes of tensors of the block that is the file's `number`-th of `count`; shapes as in the source.

        Raises UnsupportedError for rows that llama.cpp does not quantise.
        """
        return sum(
            self._bytes(block.prefix + name, shape, self._of_block(name, number, count)) for name, shape in shapes
        )

    def _of_block(self, name: str, number: int, count: int) -> tuple[Rule | None, str]:
        """Return the rule of a tensor, and its type before its shape is looked at."""
        rule = self._rules.get(name) or self._rules.get(re.sub(r"\.\d+\.", ".{}.", name))
        target = "" if rule is None else rule.target
        if not self._mix.more:
            return rule, self._mix.usual
        more = self._blocks_go or number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2
        if "attn_qkv.weight" in target:
            return rule, self._mix.more if more else self._mix.fused
        if "attn_v.weight" in target:
            fewer = "q5_k" if count == _BLOCKS_OF_70B and self._mix.usual == "q4_k" else self._mix.usual
            return rule, self._mix.more if more else fewer
        return rule, self._mix.more if more and "ffn_down" in target else self._mix.usual

    def _outer(self, name: str, shape: Shape) -> int:
        """Count the bytes of a tensor outside the blocks; an embedding that is the head too has the head's type."""
        layout, kind = self._stock.layout, self._mix.usual
        head = layout.tied_embeddings or name.startswith(f"{layout.head_module}.")
        if _STORED[kind].numbers > 1 and head and len(shape) > 1:
            fits = shape[-1] % _STORED[kind].numbers == 0 and self._family.uniform.architecture != "falcon"
            kind = "q6_k" if fits and kind != "q8_0" else "q8_0"
        twice = 2 if self._family.uniform.needs_head and layout.tied_embeddings and len(shape) > 1 else 1
        return twice * self._bytes(name, shape, (None, kind))

    def _bytes(self, name: str, shape: Shape, found: tuple[Rule | None, str]) -> int:
        """Count the bytes of one tensor."""
        rule, kind = found
        if len(shape) < 2 or (rule is not None and (rule.float32 or "_norm.weight" in rule.target)):
            return _aligned(4 * math.prod(shape))
        first, *_, last = shape
        columns = first if rule is not None and rule.transform == "transpose" else last
        stored = _STORED[kind]
        if columns % stored.numbers and stored.otherwise:
            stored = _STORED[stored.otherwise]
            if columns % stored.numbers:
                stored = _STORED["f16"]
        if columns % stored.numbers:
            raise UnsupportedError(
                f"llama.cpp quantises rows of a multiple of {stored.numbers} numbers only",
                where=name,
                got=f"{columns} columns",
                do=f"use --multiple-of {stored.numbers}, or a limit of the weight files without a type",
            )
        return _aligned(math.prod(shape) // stored.numbers * stored.bytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _tokenizer_bytes(stock: StockModel) -> int:
    """Count the bytes of the tokenizer's entries; where tokens are taken out, with those."""
    weights = stock.reader.weights
    if isinstance(weights, GgufWeights):
        entries = [(key, value) for key, value in weights.header.metadata.items() if key.startswith("tokenizer.")]
    else:
        fewer = stock.reader.fewer_tokens
        vocab_size = stock.layout.vocab_size if fewer is None else fewer.before
        try:
            found = built_tokenizer(stock.reader.directory, vocab_size, stock.config)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"how large a GGUF file gets is not known before it has a tokenizer: {error.what}",
                where=error.where,
                got=error.got,
                do="use a limit of the weight files without a type; `structprune export` then takes --tokenizer-gguf",
            ) from None
        entries = [(entry.key, entry.value) for entry in found.entries]
    return sum(8 + len(key) + 4 + _value_bytes(value) for key, value in entries)


def _value_bytes(value: Any) -> int:
    """Count the bytes of an entry's value: a text, an array of values, or a number."""
    if isinstance(value, str | bytes):
        return 8 + len(value.encode() if isinstance(value, str) else value)
    if isinstance(value, np.ndarray):
        return 4 + 8 + value.nbytes
    if isinstance(value, Sequence):
        return 4 + 8 + sum(_value_bytes(each) for each in cast("Sequence[Any]", value))
    return 4
