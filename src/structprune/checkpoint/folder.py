"""What becomes of each file of a model's folder: carried over, rewritten, read as weights, or left out for a reason."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structprune.errors import CheckpointError
from structprune.files import check_regular, read_json, write_json

ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MODULES_NAME = "modules.json"
"""sentence-transformers' list of what stands around the model, each with a folder of its own."""

# Suffix -> why such a file stays behind, whatever it is called.
_WEIGHTS = "weights that were not read"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".ot"),
    *(".onnx", ".onnx_data", ".tflite", ".mlmodel", ".npz", ".npy", ".nemo", ".distcp", ".llamafile", ".tensors"),
)
CODE_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".dylib")
_CODE = "code, which no output needs"

# (patterns of the name, reason); the first that fits counts, before the suffix.
_LEFT_OUT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("optimizer*.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "trainer_state.json"),
        "left there by training",
    ),
    (
        ("all_results.json", "train_results.json", "eval_results.json", "events.out.tfevents*", "latest"),
        "left there by training",
    ),
    (("*.ckpt*", "*.data-?????-of-?????"), _WEIGHTS),
    (("*.index.json", "params.json"), "describes weights that were not read"),
    (("quantize_config.json", "quant_config.json", "hf_quant_config.json"), "describes weights that were not read"),
    (
        ("recovery_report.json", "REJECTED.json", "pruning_curves*.png", "pruning_path.json"),
        "says something of the source only",
    ),
)
_LEFT_FOLDERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("checkpoint-*", "global_step*", "runs", "wandb"), "left there by training"),
    (("__pycache__", "custom_generate"), _CODE),
)
# Written by the run itself under the same name.
_REWRITTEN = (
    *("config.json", "README.md", "model.safetensors.index.json"),
    *("pruning_report.json", "pruning_report.html", "pruning_manifest.json"),
    *("pruning_widths.json", "modeling_structprune.py"),
)
TOKENIZER_FILES = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "tekken.json"),
)
"""Patterns of files without which a text is read otherwise."""
CODE_ENTRIES = ("auto_map", "custom_pipelines")
"""Entries of configs that name code, which loaders run if they are told to trust it."""
# Larger than any description; such a file is somebody's data.
_MAX_BYTES = 512 * 2**20
_MAX_CONFIG_BYTES = 16 * 2**20
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFiles:
    """Every file of a model's folder but the weights that were read; names are relative, folders end in a slash."""

    carried: tuple[str, ...] = ()
    """Copied as they are."""
    rewritten: tuple[str, ...] = ()
    """Written anew for the output: its own, or those of the source without entries that name code."""
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name -> reason."""


def check_folder(directory: Path, *, with_adapter: bool = False) -> None:
    """Raise CheckpointError for an adapter beside the weights, and for a pipe or device among the files at the top.

    `with_adapter`: one is expected there.
    """
    for name in ADAPTER_NAMES:
        if os.path.lexists(directory / name) and not with_adapter:
            alone = not (directory / "config.json").exists()
            raise CheckpointError(
                "the folder holds an adapter and no model"
                if alone
                else "an adapter lies beside the weights; the model that is meant is the two together",
                where=str(directory),
                got=name,
                do=f"name the model that it was trained on, and pass --merge-adapter {directory}"
                if alone
                else "pass --merge-adapter beside to merge it, or move the adapter away if the model without it is "
                "meant",
            )
    if directory.is_dir():
        for path in directory.iterdir():
            if path.exists():
                check_regular(path, CheckpointError)


def check_names_no_code(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError where stock code would fetch kernels of another repository because the config says so."""
    for name in _IMPLEMENTATIONS:
        if "/" in str(config.get(name)):
            raise CheckpointError(
                f"{name} names code of another repository, which is not run",
                where=where,
                got=str(config[name])[:100],
                do="remove the entry",
            )
    for inner in config.values():
        if isinstance(inner, Mapping):
            check_names_no_code(inner, where)


def without_code(config: Mapping[str, Any], *, ours: bool = False) -> dict[str, Any]:
    """Return the config without what names code; with `ours` the classes of our own modelling file stay named."""
    result = {name: value for name, value in config.items() if name not in CODE_ENTRIES}
    named = config.get("auto_map")
    kept = {name: place for name, place in named.items() if _is_ours(name, place)} if isinstance(named, dict) else {}
    return result | {"auto_map": kept} if ours and kept else result


def names_only_ours(config: Mapping[str, Any]) -> bool:
    """Whether the config names no code but models in the modelling file that structprune writes beside it."""
    return all(without_code(config, ours=True).get(name) == config[name] for name in CODE_ENTRIES if name in config)


def _is_ours(name: str, place: Any) -> bool:
    named = name in ("AutoModel", "AutoModelForCausalLM")
    return named and isinstance(place, str) and place.startswith("modeling_structprune.")


def sort_files(directory: Path, weights: Collection[str], *, same_width: bool = True) -> FolderFiles:
    """Decide what becomes of the files of `directory`; `weights` are the names of those that were read.

    `same_width`: the hidden size stays, so modules behind the model still fit.
    """
    carried: list[str] = []
    rewritten: list[str] = []
    left_out: dict[str, str] = {}
    modules = module_folders(directory)
    for path, name, reason in _entries(directory, directory, modules):
        if name in weights:
            continue
        found = reason or _reason(path, name, directory, modules, same_width)
        if found:
            left_out[printable(name)] = found
        elif name in _REWRITTEN or _names_code(path):
            rewritten.append(name)
        else:
            carried.append(name)
    return FolderFiles(carried=tuple(carried), rewritten=tuple(rewritten), left_out=left_out)


def check_needed(directory: Path, files: FolderFiles) -> None:
    """Raise CheckpointError if one of the tokenizer's files would be left out."""
    for name, reason in files.left_out.items():
        if "/" not in name and _fits(name, TOKENIZER_FILES):
            raise CheckpointError(
                "a file of the tokenizer cannot be carried over",
                where=str(directory / name),
                got=reason,
                do="copy it into the folder as a regular file",
            )


def read_files(directory: Path) -> list[Path]:
    """List the files at the top of a model's folder that decide what the model is and how it reads a text."""
    names = ("config.json", "generation_config.json", "chat_template*", *TOKENIZER_FILES)
    return sorted(path for path in directory.iterdir() if path.is_file() and _fits(path.name, names))


def carry_over(source: Path, target: Path, files: FolderFiles) -> None:
    """Copy the carried files, and those that are rewritten without entries that name code."""
    for name in files.carried:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    for name in files.rewritten:
        if name not in _REWRITTEN:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(target / name, without_code(read_json(source / name)))


def write_companions(
    source: Path, target: Path, config: Mapping[str, Any], weights: Collection[str] = (), *, same_width: bool = True
) -> FolderFiles:
    """Write config.json, and carry over what else belongs to the model in `source`; see `sort_files`."""
    # The modelling file is written first, and config.json names it where it is.
    write_json(target / "config.json", without_code(config, ours=(target / "modeling_structprune.py").is_file()))
    files = sort_files(source, weights, same_width=same_width)
    carry_over(source, target, files)
    return files


def printable(name: str) -> str:
    """Return the name as text that can be encoded: bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _entries(directory: Path, top: Path, modules: Collection[str]) -> Generator[tuple[Path, str, str | None]]:
    """Yield (path, relative name, reason if it is a folder that stays behind), sorted; such a one is not entered."""
    for path in sorted(directory.iterdir()):
        name = path.relative_to(top).as_posix()
        if path.is_dir() and path.is_symlink():
            yield path, f"{name}/", "a link to a folder"
        elif path.is_dir():
            reason = _folder_reason(path, name, modules)
            if reason:
                yield path, f"{name}/", reason
            else:
                yield from _entries(path, top, modules)
        else:
            yield path, name, None


def _folder_reason(path: Path, name: str, modules: Collection[str]) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    for patterns, reason in _LEFT_FOLDERS:
        if _fits(path.name, patterns):
            return reason
    if name in modules:
        return None
    holds_weights = any(p.suffix.lower() in WEIGHT_SUFFIXES for p in path.rglob("*"))
    return f"a folder of {_WEIGHTS}" if holds_weights else None


def _reason(path: Path, name: str, top: Path, modules: Collection[str], same_width: bool) -> str | None:
    if not path.exists():
        return "a link to nothing"
    if not path.is_file():
        return "not a regular file"
    if path.is_symlink() and not _belongs(path, top):
        return "a link to a file outside of the folder"
    if name in _REWRITTEN:
        return None
    of_module = name.rpartition("/")[0] in modules or name in (MODULES_NAME, "config_sentence_transformers.json")
    if modules and of_module and not same_width:
        return "of a module behind the model, for another hidden size"
    if path.name.startswith("."):
        return "hidden"
    for patterns, reason in _LEFT_OUT:
        if _fits(path.name, patterns):
            return reason
    if of_module and path.suffix == ".safetensors":
        return None
    if path.suffix.lower() in CODE_SUFFIXES:
        return _CODE
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        return _WEIGHTS
    return "larger than 512 MiB, and of no known use" if path.stat().st_size > _MAX_BYTES else None


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _belongs(path: Path, top: Path) -> bool:
    """Whether a link leads to a file of the folder, or to a blob of the hub's cache."""
    target = path.resolve()
    if target.is_relative_to(top.resolve()):
        return True
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")


def _names_code(path: Path) -> bool:
    """Whether it is a config with entries that name code."""
    if path.suffix != ".json" or "config" not in path.name or path.stat().st_size > _MAX_CONFIG_BYTES:
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        # Not read by anybody, so carried over as it is.
        return False
    return isinstance(config, dict) and config != without_code(config)


def module_folders(directory: Path) -> set[str]:
    """List the folders of the modules behind an embedding model: pooling, projections, normalisation."""
    path = directory / MODULES_NAME
    if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
        return set()
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return {str(module["path"]).strip("/") for module in modules if module.get("path")}
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return set()
