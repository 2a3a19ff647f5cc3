"""Whole models, as stock transformers loads them; nothing that a checkpoint brings along is run unless it is ours."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from structprune.architectures import FAMILIES
from structprune.architectures.family import Family
from structprune.architectures.modeling.per_layer import MODELING_MODULE, MODELING_NAME, accepted_sources, class_name
from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.architectures.modeling.sliced import SLICED_ENTRY, accepted_sliced_sources, sliced_class_name
from structprune.architectures.stock.config import build_config, has_own_layers
from structprune.architectures.stock.head import with_entries
from structprune.architectures.stock.tensor_check import without_head
from structprune.architectures.stock.wrapper import auto_class, text_view
from structprune.architectures.traced.lookup import find_family, is_stock_type
from structprune.checkpoint.folder import check_names_no_code, names_only_ours
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, StructPruneError, first_line
from structprune.files import read_json


@contextmanager
def only_errors(logger_name: str) -> Generator[None]:
    """Suppress what this logger of another library says below an error, inside the context."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def without_global_width_warnings() -> AbstractContextManager[None]:
    """Suppress transformers' warning of readers that take a per-layer config's global width for every layer's.

    Inside the context the reader is transformers itself, when it checks the config that it has just read.
    """
    return only_errors("transformers.integrations.heterogeneity.configuration_utils")


def load_model(source: Path | CheckpointReader, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the whole checkpoint as stock transformers does; a per-layer or sliced one through our own modelling file.

    `source` is its directory, or its reader where the weights may be made of something else. Of an image-text model the
    text model is loaded, as the causal model that it is. Raises CheckpointError with its reason if it does not load, or
    if its modelling file is not ours.
    """
    reader = CheckpointReader(source) if isinstance(source, Path) else source
    directory, view = reader.directory, text_view(reader)
    transformers_logging.disable_progress_bar()
    try:
        own: Any = _per_layer_class(directory)
        with without_global_width_warnings():
            options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
            if view.weights is None and view.wrapper is None:
                loaded: Any = (own or AutoModelForCausalLM).from_pretrained(
                    str(directory), local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
                )
            else:
                # Slices are read one after the other, as those of safetensors are.
                tensors = {name: view.open_slice(name) for name in view.shapes}
                config: Any = build_config(view, view.config)
                stock: Any = own or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
                loaded = stock.from_pretrained(
                    None, config=config, state_dict=tensors, trust_remote_code=False, **options
                )
        model, info = loaded
        _check_complete(model, sorted(info["missing_keys"]), str(directory))
        # A config may say no, with which stock code cannot run its own model.
        model.config.return_dict = True
        return model.to(device).eval()
    except StructPruneError:
        raise
    except Exception as error:
        # Any failure of the stock loader means the same to the user: this directory does not load.
        raise CheckpointError(
            "stock transformers cannot load the checkpoint",
            where=str(directory),
            got=str(error),
            do="code that lies in a checkpoint is never run here" if "custom code" in str(error) else None,
        ) from error


def output_head(model: Any) -> nn.Module:
    """Return what a loaded causal model does to its last hidden states."""
    projection: nn.Module = model.get_output_embeddings()
    family = find_family(model.config)
    return projection if family is None else with_entries(projection, family, model.config)


def check_settings(directory: Path) -> None:
    """Raise CheckpointError for settings beside the weights that stock code would refuse when it loads the result.

    They are copied as they are, so it refuses the source too; it is found here before any work.
    """
    where, attention = directory / "config.json", read_json(directory / "config.json").get("attn_implementation")
    try:
        if (directory / "generation_config.json").is_file():
            where = directory / "generation_config.json"
            GenerationConfig.from_dict(read_json(where))
        if attention is not None:
            where = directory / "config.json"
            with only_errors("transformers"), torch.device("meta"):
                config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
                auto_class(config.model_type).from_config(config, trust_remote_code=False)
    except StructPruneError:
        raise
    except Exception as error:
        # Any type: each means that the settings do not do.
        raise CheckpointError(
            "stock transformers refuses the settings beside the weights",
            where=str(where),
            got=first_line(error),
            do="correct or remove the entry, or install what it needs",
        ) from error


def _check_complete(model: Any, missing: Sequence[str], where: str) -> None:
    """Raise CheckpointError for parameters that the checkpoint lacks: the stock loader has drawn them at random."""
    if not missing:
        return
    family = find_family(model.config)
    if family is not None and list(missing) == [f"{family.head_module}.weight"]:
        raise without_head(where, missing[0])
    raise CheckpointError(
        f"the checkpoint lacks {len(missing)} tensor(s), which stock transformers would draw at random",
        where=where,
        got=f"no {missing[0]!r}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
        do="check that config.json belongs to it, and that all of it was fetched",
    )


def backbone(model: Any) -> Any:
    """Return what is in front of the head: it gives the last hidden states, behind the final norm."""
    base = model.base_model
    # The name that a class has for it may be that of another class.
    return base if base is not model else next(each for each in model.children() if isinstance(each, PreTrainedModel))


def has_own_modeling_file(directory: Path) -> bool:
    """Whether the checkpoint loads through a modelling file of ours. Raises CheckpointError for any other file."""
    return _per_layer_class(directory) is not None


def _per_layer_class(directory: Path) -> Any:
    """Import the model class of a per-layer or sliced checkpoint from its modelling file; None without such a file.

    `trust_remote_code` would also trust whatever else config.json names and lies in the directory, so it stays off:
    only the one file is imported, and only if it is byte for byte a text of ours.
    """
    path = directory / MODELING_NAME
    config = read_json(directory / "config.json")
    check_names_no_code(config, str(directory / "config.json"))
    ours = config.keys() & {REMOVED_ENTRY, SLICED_ENTRY} or has_own_layers(config)
    if not path.exists() and not ours:
        return None
    model_type = str(config.get("model_type"))
    form = "sliced" if SLICED_ENTRY in config else "per-layer"
    family = family_of_checkpoint(directory, model_type)
    if family is None or (form == "sliced" and family.stream is None):
        raise CheckpointError(
            f"the model family has no {form} format",
            where=str(directory / "config.json"),
            got=f"model_type {model_type!r}",
            wanted=", ".join(FAMILIES) if form == "per-layer" else None,
        )
    if not path.is_file():
        raise CheckpointError(f"the {form} checkpoint lacks its modelling file", where=str(path), do="copy it there")
    accepted = (accepted_sliced_sources if form == "sliced" else accepted_sources)(family)
    if path.read_bytes() not in [text.encode() for text in accepted]:
        raise CheckpointError(
            "the modelling file is not one that structprune writes, so it is not run",
            where=str(path),
            got="other bytes",
            wanted=f"an unchanged file for {model_type}",
            do="write the checkpoint again, or load it yourself with trust_remote_code=True if you trust it",
        )
    name = (sliced_class_name if form == "sliced" else class_name)(family.classes[model_type], "ForCausalLM")
    return get_class_from_dynamic_module(f"{MODELING_MODULE}.{name}", str(directory), local_files_only=True)


def family_of_checkpoint(directory: Path, model_type: str) -> Family | None:
    """Return the family of a checkpoint, None for an unknown one; parse its config where no file describes its type."""
    if model_type in FAMILIES or not is_stock_type(model_type):
        return FAMILIES.find(model_type)
    with without_global_width_warnings():
        config: Any = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        return find_family(config)


def check_runs_ours_only(directory: Path) -> None:
    """Raise CheckpointError where a loader that trusts the directory would run more than our modelling file."""
    foreign = not names_only_ours(read_json(directory / "config.json"))
    if foreign or (directory / "custom_generate").exists():
        raise CheckpointError(
            "the checkpoint names code beside structprune's modelling file, and is not loaded with it",
            where=str(directory),
            got="config.json" if foreign else "custom_generate",
            do="remove it",
        )
