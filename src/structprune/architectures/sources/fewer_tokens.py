"""A checkpoint of which some tokens stay: rows of embedding and head, the tokenizer's files and all ids that are named.

What transformers needs as files is written into a directory of this process, which goes with it.
"""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from structprune.architectures.sources.tokenizer import TextEncoder, tokenizer_bytes
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.fewer_rows import FewerRows
from structprune.checkpoint.folder import write_companions
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.weight_source import FewerTokens
from structprune.errors import InputError, UnsupportedError
from structprune.files import read_json
from structprune.vocabulary.files import TOKENIZER_NAME, write_files
from structprune.vocabulary.ids import with_new_ids
from structprune.vocabulary.kept import KeptTokens
from structprune.vocabulary.tokenizer_json import identity, needed_ids


def open_with_tokens(
    base: CheckpointReader, kept: KeptTokens, rows: CheckpointReader | None = None
) -> CheckpointReader:
    """Open `base` with the tokens of `kept` alone; headers and the tokenizer only.

    Their rows are those of the checkpoint `rows`, if one is named: one that has the kept rows alone already.

    Raises InputError for a list that was made of another tokenizer or lacks what every text needs, UnsupportedError for
    a tokenizer or tensors that cannot be cut, CheckpointError where a setting names a token that is gone.
    """
    num_rows, sliced = rows_by_token(base)
    tokenizer = read_tokenizer(base.directory)
    if (kept.num_rows, kept.tokenizer) != (num_rows, identity(tokenizer)):
        raise InputError(
            "--vocabulary is a list of another model's tokens",
            where=str(base.directory),
            got=f"{kept.num_rows:,} rows of {kept.source}",
            wanted=f"a list of this tokenizer's, {num_rows:,} rows",
            do="make it: structprune vocabulary MODEL -o FILE --size NUMBER --text TEXT",
        )
    new = kept.new_ids
    needed = {number for number in needed_ids(tokenizer, str(base.directory)) if number < num_rows}
    if missing := needed - new.keys():
        raise InputError(
            "--vocabulary leaves out tokens without which some text cannot be encoded",
            where=str(base.directory),
            got=f"{len(missing):,} of them are missing, such as {min(missing)}",
            do="make the list: structprune vocabulary MODEL -o FILE --size NUMBER --text TEXT",
        )
    directory = Path(tempfile.mkdtemp(prefix="structprune-")) / base.directory.name
    atexit.register(shutil.rmtree, directory.parent, ignore_errors=True)
    directory.mkdir()
    config = with_new_ids(base.config, new, num_rows, str(base.directory / "config.json"))
    write_companions(base.directory, directory, config, base.weight_files)
    left_out = write_files(directory, tokenizer, new, num_rows)
    reader = CheckpointReader(directory, FewerRows(base, sliced, kept.ids, rows))
    reader.adapter = base.adapter
    reader.fewer_tokens = FewerTokens(
        before=num_rows,
        after=len(kept.ids),
        parameters=sum((num_rows - len(kept.ids)) * math.prod(base.shapes[name][1:]) for name in sliced),
        parameters_before=sum(math.prod(base.shapes[name]) for name in sliced),
        covered=kept.covered,
        texts=kept.texts,
        num_tokens=kept.num_tokens,
    )
    reader.notes = (
        *base.notes,
        f"{len(kept.ids):,} of {num_rows:,} tokens stay",
        *(f"not written for fewer tokens: {name}; {TOKENIZER_NAME} says the same" for name in left_out),
    )
    return reader


def rows_by_token(base: CheckpointReader) -> tuple[int, tuple[str, ...]]:
    """Return the number of rows of the embedding, and the tensors, by their names in `base`, that have one per token.

    Raises UnsupportedError where another tensor has one too.
    """
    stock = StockModel(base)
    rows = stock.layout.vocab_size
    embedding = f"{stock.family.embedding_modules[0]}.weight"
    head = f"{stock.family.head_module}."
    sliced: list[str] = []
    for name, shape in stock.layout.outer_tensors.items():
        if not shape or shape[0] != rows:
            continue
        if name != embedding and not name.startswith(head):
            raise UnsupportedError(
                "a tensor beside embedding and head has a row for each token",
                where=str(base.directory),
                got=f"{name} of {shape[0]:,} rows",
                wanted="a model without --vocabulary",
            )
        sliced.append(stock.reader.stored_name(name))
    # The names of a whole model's files may be older ones than those of the text model's view.
    return rows, tuple(name for name in base.shapes if base.stored_name(name) in sliced)


def missing_tokens(reader: CheckpointReader) -> int:
    """Count the tokens that were taken out of a checkpoint's vocabulary."""
    gone = reader.fewer_tokens
    return 0 if gone is None else gone.before - gone.after


def source_tokenizer_bytes(reader: CheckpointReader) -> int:
    """Return the bytes of the tokenizer's files before tokens were taken out."""
    return tokenizer_bytes(reader.weights.base.directory) if isinstance(reader.weights, FewerRows) else 0


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """Return the content of tokenizer.json, or what stands for it where a folder has older forms alone.

    Raises UnsupportedError for a tokenizer that has no such form.
    """
    path = directory / TOKENIZER_NAME
    return dict(read_json(path) if path.is_file() else _converted(directory))


@cache
def _converted(directory: Path) -> Mapping[str, Any]:
    backend = getattr(TextEncoder(directory).tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError("this tokenizer has no tokenizer.json, and none can be made of it", where=str(directory))
    return json.loads(backend.to_str())
