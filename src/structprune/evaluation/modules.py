"""Whole models of any stock type, and example inputs for them from files; nothing that a folder brings along is run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from structprune.architectures.stock.classes import stock_class
from structprune.checkpoint.folder import check_folder, check_names_no_code
from structprune.errors import CheckpointError, InputError, MemoryBudgetError, UnsupportedError, first_line
from structprune.files import check_regular, read_json
from structprune.memory import available_bytes, format_budget, format_bytes
from structprune.modules.exported import ExportedModule, load_exported

LABELS = "labels"
"""Argument that makes transformers' models give a loss."""
Batch = Mapping[str, Any]
_COPIES = 4
"""The model itself, tensors that are solved again, those of the smaller module as they are cut, and that module."""


def check_fits(path: Path, budget: int | None, *, with_gradients: bool) -> None:
    """Raise MemoryBudgetError where the copies of the weights that a run makes are more than `budget` bytes.

    None: 80% of what is free. Activations come on top, and are not known before the model runs.
    """
    budget = available_bytes() * 8 // 10 if budget is None else budget
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    try:
        weights = sum(map(_float32_bytes, files)) if files else path.stat().st_size
    except (OSError, SafetensorError):
        # Whoever loads it says what is wrong with it.
        return
    copies = _COPIES + with_gradients
    if weights * copies > budget:
        raise MemoryBudgetError(
            "this model is pruned whole in memory, and does not fit the budget",
            where=str(path),
            got=format_bytes(budget),
            wanted=f"at least {format_budget(weights * copies)}: {copies} times its weights in float32",
            do="raise --memory where there is more; `structprune prune` holds one block of a causal language model",
        )


def _float32_bytes(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return 4 * sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def load_module(path: Path) -> nn.Module:
    """Load a model in evaluation mode: a .pt2 file of torch.export.save, or a folder of a stock class.

    Raises what `load_exported` and `load_stock_module` raise.
    """
    return load_exported(path) if path.suffix == ".pt2" else load_stock_module(path)


def load_stock_module(directory: Path) -> nn.Module:
    """Load a model by the stock class that its config names, in float32 and evaluation mode.

    Raises CheckpointError for a folder that is none or does not load, UnsupportedError for a class that transformers
    does not have.
    """
    if not directory.is_dir():
        raise CheckpointError("there is no such folder", where=str(directory), wanted="a Hugging Face directory")
    check_folder(directory)
    config = read_json(directory / "config.json")
    check_names_no_code(config, str(directory / "config.json"))
    kind = stock_class(config)
    if kind is None:
        raise UnsupportedError(
            "no class of stock transformers has this name",
            where=str(directory / "config.json"),
            got=f"architectures: {config.get('architectures')}",
            wanted="the name of one model class, such as BertModel",
        )
    transformers_logging.disable_progress_bar()
    loading: Any = kind
    try:
        # Weights in other formats than safetensors are programs for an unpickler.
        model = loading.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # transformers raises whatever its parts raise.
        raise CheckpointError(
            "the folder does not load", where=str(directory), got=f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return model.eval()


def read_examples(path: Path, model: Any, directory: Path, *, batch_size: int, seq_len: int) -> list[dict[str, Any]]:
    """Read example inputs as batches of one size; what is left over at the end is left out.

    A .safetensors file has a tensor for each argument by its name, examples along the first axis; a .npy file is the
    model's main input; any other file is a text, which the folder's tokenizer cuts into windows of `seq_len` tokens,
    special ones among them. Raises InputError for a file that cannot be read or has no batch.
    """
    try:
        check_regular(path)
    except OSError as error:
        raise InputError("there is no such file", where=str(path), got=error.strerror) from error
    readers = {".safetensors": _tensors, ".npy": _array}
    reader = readers.get(path.suffix)
    tensors = reader(path, model) if reader is not None else _windows(path, directory, seq_len)
    sizes = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if not sizes or len(set(sizes.values())) != 1 or min(sizes.values()) < batch_size:
        raise InputError(
            "there is no batch of examples in this file",
            where=str(path),
            got=", ".join(f"{name}: {size}" for name, size in sizes.items()) or "no tensor",
            wanted=f"as many examples of every argument, {batch_size} or more",
            do="give more examples, or a smaller --batch-size",
        )
    constants = {"use_cache": False} if _has_cache(model) else {}
    count = min(sizes.values()) // batch_size
    if isinstance(model, ExportedModule):
        _check_exported({name: (batch_size, *each.shape[1:]) for name, each in tensors.items()}, model, path)
    return [
        {**{name: each[n * batch_size : (n + 1) * batch_size] for name, each in tensors.items()}, **constants}
        for n in range(count)
    ]


def _has_cache(model: Any) -> bool:
    """Whether a stock model returns a cache unless it is told not to; a graph cannot have such an output."""
    return isinstance(model, transformers.PreTrainedModel) and (
        model.can_generate() or bool(getattr(model.config, "is_encoder_decoder", False))
    )


def _check_exported(sizes: Mapping[str, tuple[int, ...]], model: ExportedModule, path: Path) -> None:
    """Raise InputError for examples of other names or sizes than those that the program was exported with."""
    if sizes != model.sizes:
        first = next(iter(model.sizes.values()), ())
        raise InputError(
            "an exported program takes inputs of the names and sizes that it was exported with",
            where=str(path),
            got=str(dict(sizes)),
            wanted=str(model.sizes),
            do=f"give such examples, with --batch-size {first[0]}" if first else None,
        )


def losses_of(batches: list[dict[str, Any]], model: Any) -> Iterator[Tensor]:
    """Yield the loss that the model itself gives of each batch with labels. Raises InputError where it gives none."""
    for batch in batches:
        loss = getattr(model(**batch), "loss", None) if LABELS in batch else None
        if loss is None:
            raise InputError(
                "this importance reads gradients of a loss, and there is none",
                wanted=f"a tensor called {LABELS} among the examples, and a model that makes a loss of it",
                do="take --importance magnitude, or give labels in a .safetensors file",
            )
        yield loss


def _tensors(path: Path, _: Any) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError("this is no safetensors file", where=str(path), got=first_line(error)) from error


def _array(path: Path, model: Any) -> dict[str, Tensor]:
    try:
        return {model.main_input_name: torch.from_numpy(numpy.load(path, allow_pickle=False))}
    except (ValueError, TypeError, EOFError) as error:
        raise InputError("this array cannot be read", where=str(path), got=first_line(error)) from error


def _windows(path: Path, directory: Path, seq_len: int) -> dict[str, Tensor]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("this text is not UTF-8", where=str(path), got=first_line(error)) from error
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # transformers raises whatever its parts raise.
        raise InputError(
            "a text needs a tokenizer in the model's folder",
            where=str(directory),
            got=first_line(error),
            do="give the arguments themselves in a .safetensors file",
        ) from error
    found = tokenizer(
        text, truncation=True, max_length=seq_len, return_overflowing_tokens=True, return_attention_mask=True
    )
    whole = [n for n, ids in enumerate(found["input_ids"]) if len(ids) == seq_len]
    return {
        name: torch.tensor([found[name][n] for n in whole], dtype=torch.long)
        for name in ("input_ids", "attention_mask")
    }
