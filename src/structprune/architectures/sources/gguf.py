"""A GGUF file as a checkpoint: its tensors by their names in transformers, read one at a time, and nothing converted.

What transformers needs as files (config, tokenizer, licence) is written into a directory of this process, which goes
with it; weights stay where they are. Raises before any weight is read where something of the file would be lost.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from structprune.architectures.sources.gguf_config import GgufSizes, read_config
from structprune.architectures.sources.gguf_families import GGUF_FAMILIES, GgufFamily, Rule
from structprune.architectures.sources.gguf_fields import GgufFields
from structprune.architectures.sources.gguf_tokenizer import write_tokenizer
from structprune.checkpoint.gguf_file import GgufHeader, read_gguf
from structprune.checkpoint.gguf_weights import GgufEntry, GgufRows, GgufWeights, RowOrder
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.readme import README_NAME
from structprune.errors import CheckpointError
from structprune.files import write_json, write_text

# Widths that a file can have in common with a checkpoint.
_WIDTHS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ORDERS: Mapping[str, RowOrder] = {"interleave": "halves", "ungroup": "grouped"}
# Architectures whose queries, keys and values may be one tensor, or three: the names in the file, in its order.
_FUSED = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True, slots=True, kw_only=True)
class _GgufSource:
    """One file, read as far as it can be without its weights."""

    stamp: tuple[tuple[int, int], ...]
    """Size and time of each of its files."""
    header: GgufHeader
    config: Mapping[str, Any]
    entries: Mapping[str, GgufEntry]
    directory: Path
    tokenizer: str | None
    """What its tokenizer was made of."""


_opened: dict[Path, _GgufSource] = {}


def open_gguf(path: Path, dtype: torch.dtype | None = None) -> CheckpointReader:
    """Open the checkpoint in the file `path`, every tensor in `dtype`, by default in the width that the file has.

    Raises CheckpointError for a file that is damaged or incomplete, UnsupportedError for what cannot be read of it.
    """
    path = path.resolve()
    source = _opened.get(path)
    if source is None or source.stamp != _stamp(source.header.paths):
        source = _opened[path] = _read(path)
    stored = stored_width(source.header)
    reader = CheckpointReader(source.directory, GgufWeights(source.header, source.entries, stored))
    reader.notes = _notes(source, dtype or stored)
    return reader if dtype is None else reader.in_width(dtype)


def _notes(source: _GgufSource, width: torch.dtype) -> tuple[str, ...]:
    """Say what a person should know of the weights and the tokenizer."""
    kinds = sorted({info.kind_name for info in source.header.tensors.values()} - _WIDTHS.keys())
    found = [f"weights are dequantised from {', '.join(kinds)} to {str(width).removeprefix('torch.')}"] if kinds else []
    return (*found, f"the tokenizer is {source.tokenizer}") if source.tokenizer else tuple(found)


def stored_width(header: GgufHeader) -> torch.dtype:
    """Return bfloat16 where any matrix is quantised, else the width that most numbers of the matrices have.

    What such a file holds in float32 beside quantised weights is not worth four bytes for each of them.
    """
    counts: Counter[torch.dtype] = Counter()
    for info in header.tensors.values():
        if len(info.shape) > 1:
            if info.kind_name not in _WIDTHS:
                return torch.bfloat16
            counts[_WIDTHS[info.kind_name]] += info.num_rows * info.shape[-1]
    return counts.most_common(1)[0][0] if counts else torch.bfloat16


def _stamp(paths: tuple[Path, ...]) -> tuple[tuple[int, int], ...]:
    stats = [path.stat() for path in paths if path.exists()]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def _read(path: Path) -> _GgufSource:
    header = read_gguf(path)
    fields = GgufFields(header)
    config, sizes = read_config(fields)
    vocab_size = _vocab_size(fields)
    config["vocab_size"] = vocab_size
    family = GGUF_FAMILIES[config["model_type"]]
    entries = dict(_Entries(fields, family, sizes, vocab_size, config).all())
    config["tie_word_embeddings"] = "lm_head.weight" not in entries
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        # One beyond the vocabulary is none, as in llama.cpp.
        config[f"{ours}_token_id"] = token if isinstance(token, int) and 0 <= token < vocab_size else None
    config["dtype"] = str(stored_width(header)).removeprefix("torch.")
    fields.check_all_taken()
    directory = Path(tempfile.mkdtemp(prefix="structprune-")) / path.name
    atexit.register(shutil.rmtree, directory.parent, ignore_errors=True)
    directory.mkdir()
    write_json(directory / "config.json", config)
    origin = write_tokenizer(header, vocab_size, directory)
    _write_origin(header, directory / README_NAME, path.name)
    return _GgufSource(
        stamp=_stamp(header.paths), header=header, config=config, entries=entries, directory=directory, tokenizer=origin
    )


def _vocab_size(fields: GgufFields) -> int:
    """Return the embedding's rows. Raises CheckpointError if the file says another number."""
    info = fields.header.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise CheckpointError("the GGUF file has no token embedding", where=fields.where, wanted="token_embd.weight")
    said = fields.integer("vocab_size", info.shape[0])
    if said != info.shape[0]:
        raise CheckpointError(
            "the GGUF file says another vocabulary than its embedding has rows",
            where=fields.where,
            got=f"{fields.architecture}.vocab_size {said}",
            wanted=info.shape[0],
        )
    return said


class _Entries:
    """The tensors of a checkpoint by the rules of its family (gguf_families.py), read backwards."""

    def __init__(
        self, fields: GgufFields, family: GgufFamily, sizes: GgufSizes, vocab_size: int, config: dict[str, Any]
    ) -> None:
        self._fields, self._family, self._sizes, self._config = fields, family, sizes, config
        q, k, f = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size, sizes.channels
        self._dims = {
            "d": sizes.hidden,
            "v": vocab_size,
            "p": sizes.positions,
            "h": sizes.head_size,
            "q": q,
            "k": k,
            "f": f,
            "e": sizes.experts,
            "2f": 2 * f,
            "q+2k": q + 2 * k,
        }

    def all(self) -> Iterator[tuple[str, GgufEntry]]:
        """Yield (name in the checkpoint, how it is made). Raises CheckpointError for a missing one or another shape."""
        target, family = self._family.uniform, self._family
        for rule in target.outer:
            yield from self._tensor(rule, rule.source, rule.target)
        together = {bias: entry for entry, biases in family.biases.items() for bias in biases}
        for entry in family.biases:
            if entry:
                self._config[entry] = any(
                    self._fields.has_tensor(f"blk.{block}.{rule.target}")
                    for rule in target.block
                    if together.get(rule.source) == entry
                    for block in range(self._sizes.blocks)
                )
        for block in range(self._sizes.blocks):
            for rule in target.block:
                name = f"{family.blocks}{block}.{rule.source}"
                if not rule.optional:
                    yield from self._tensor(rule, name, f"blk.{block}.{rule.target}")
                elif rule.source in together and self._config.get(together[rule.source], True):
                    # Stock code has these biases all or none: one that the file lacks is zero.
                    found = list(self._tensor(rule, name, f"blk.{block}.{rule.target}"))
                    yield from found or [(name, GgufEntry(shape=self._shape(rule), parts=()))]

    def _shape(self, rule: Rule) -> tuple[int, ...]:
        return tuple(self._dims[dim] for dim in rule.dims)

    def _tensor(self, rule: Rule, name: str, target: str) -> Iterator[tuple[str, GgufEntry]]:
        shape = self._shape(rule)
        if rule.stacked:
            experts = self._sizes.experts
            if self._taken(target, (experts, *shape), rule):
                for number in range(experts):
                    rows = GgufRows(source=target, first=number * shape[0], count=shape[0])
                    yield name.format(number), GgufEntry(shape=shape, parts=(rows,))
            return
        transposed = rule.transform == "transpose"
        parts = self._parts(rule, target, shape[::-1] if transposed else shape)
        if parts:
            shift = -1.0 if rule.transform == "plus-one" else 0.0
            yield name, GgufEntry(shape=shape, parts=parts, shift=shift, transposed=transposed)

    def _parts(self, rule: Rule, target: str, shape: tuple[int, ...]) -> tuple[GgufRows, ...]:
        """Return the file's rows that make the tensor; none for an optional one that is not there."""
        sizes, order = self._sizes, _ORDERS.get(rule.transform, "stored")
        heads = sizes.kv_heads if rule.dims[0] == "k" else sizes.heads
        *block, stem, ending = target.split(".")
        beginning = "".join(f"{part}." for part in block)
        widths = {"attn_q": self._dims["q"], "attn_k": self._dims["k"], "attn_v": self._dims["k"]}
        fused = f"{beginning}attn_qkv.{ending}"
        if stem in _FUSED and not self._fields.has_tensor(target) and self._fields.has_tensor(fused):
            first = sum(widths[other] for other in _FUSED[: _FUSED.index(stem)])
            self._taken(fused, (self._dims["q+2k"], *shape[1:]), rule)
            return (GgufRows(source=fused, first=first, count=shape[0], order=order, heads=heads),)
        apart = [f"{beginning}{other}.{ending}" for other in _FUSED]
        if stem == "attn_qkv" and not self._fields.has_tensor(target) and self._fields.has_tensor(apart[0]):
            for other, width in zip(apart, widths.values(), strict=True):
                self._taken(other, (width, *shape[1:]), rule)
            return tuple(
                GgufRows(source=other, first=0, count=width)
                for other, width in zip(apart, widths.values(), strict=True)
            )
        if not self._taken(target, shape, rule):
            return ()
        return (GgufRows(source=target, first=0, count=shape[0], order=order, heads=heads),)

    def _taken(self, target: str, shape: tuple[int, ...], rule: Rule) -> bool:
        """Whether the file has it. Raises CheckpointError for a missing one that must be there, or another shape."""
        there = self._fields.take_tensor(target)
        if not there and rule.optional:
            return False
        found = self._fields.header.tensors[target].shape if there else None
        if found != shape:
            raise CheckpointError(
                f"tensor {target!r} is missing in the GGUF file, or has another shape than its metadata says",
                where=self._fields.where,
                got="none" if found is None else list(found),
                wanted=list(shape),
                do="the file is incomplete, or of a variant of this architecture that cannot be read",
            )
        return True


def _write_origin(header: GgufHeader, path: Path, name: str) -> None:
    """Write the file's licence and origin as the front matter of a README; nothing if it says nothing of them."""
    entries = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
        "language": "general.languages",
        "base_model": "general.base_model.0.repo_url",
    }
    found = {entry: header.metadata[key] for entry, key in entries.items() if key in header.metadata}
    if isinstance(found.get("base_model"), str):
        # The model's name on the hub is the end of its address.
        found["base_model"] = "/".join(found["base_model"].rstrip("/").split("/")[-2:])
    if found:
        write_text(path, f"---\n{yaml.safe_dump(found, sort_keys=False)}---\n\nRead from `{name}`.\n")
