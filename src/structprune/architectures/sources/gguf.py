"""A GGUF file as a checkpoint: its tensors by their names in transformers, read one at a time, and nothing converted.

What transformers needs as files (config, tokenizer, licence) is written into a directory of this process, which goes
with it; weights stay where they are. Raises before any weight is read where something of the file would be lost.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from structprune.architectures.gguf.fields import GgufFields
from structprune.architectures.gguf.read import read_config
from structprune.architectures.gguf.tensors import GgufTensors
from structprune.architectures.sources.gguf_tokenizer import write_tokenizer
from structprune.checkpoint.gguf_file import GgufHeader, read_gguf
from structprune.checkpoint.gguf_weights import GgufEntry, GgufWeights
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.readme import README_NAME
from structprune.errors import CheckpointError
from structprune.files import write_json, write_text

# Widths that a file can have in common with a checkpoint.
_WIDTHS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    config, reading = read_config(fields)
    vocab_size = _vocab_size(fields)
    config["vocab_size"] = vocab_size
    entries = dict(GgufTensors(reading, vocab_size, config).all())
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
