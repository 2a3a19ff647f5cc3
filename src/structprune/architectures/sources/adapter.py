"""A PEFT LoRA adapter beside or apart from a checkpoint, read as one checkpoint with the adapter merged.

Settings and tensors that are not understood end the run: what is left out of a merge is another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from structprune.architectures.stock.loading import family_of_checkpoint
from structprune.architectures.stock.wrapper import is_wrapper_type
from structprune.checkpoint.folder import TOKENIZER_FILES
from structprune.checkpoint.merged_weights import AdapterFile, LowRankUpdate, MergedEntry, MergedWeights
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.weight_source import STORED_DTYPES, MergedAdapter
from structprune.errors import CheckpointError, InputError, StructPruneError, UnsupportedError
from structprune.files import check_path, expand_user, file_sum, read_json

BESIDE, NO_ADAPTER = "beside", "none"
"""What stands for the adapter in the model's own folder, and for none."""
SETTINGS_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_MERGE_YOURSELF = "merge it with peft's `merge_and_unload` and `save_pretrained`, and name the result"

# Settings that change what is added, and are read here.
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias")
# Settings of training, of where modules are looked for, and of origin: the tensors say what came of them.
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying", "base_model_class", "parent_library"),
)
# Those that leave the base's weights as they are when they begin.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_KINDS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_embedding_A": "embedding down",
    "lora_embedding_B": "embedding up",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What the adapter's settings say of its products."""

    where: str
    rank: int
    alpha: float
    root: bool
    """Whether alpha is divided by the root of the rank (rsLoRA)."""
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    saved: tuple[str, ...]
    """Modules that were trained in whole."""

    def rank_of(self, module: str) -> int:
        """Return the rank of a module. Raises CheckpointError for one that is no rank."""
        rank = self._of(self.ranks, module, self.rank)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise CheckpointError("the adapter's settings have no usable rank", where=self.where, got=str(rank)[:40])
        return rank

    def scale_of(self, module: str) -> float:
        """Return what the product of a module is multiplied by. Raises CheckpointError for an alpha that is none."""
        alpha = self._of(self.alphas, module, self.alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError("the adapter's settings have no usable alpha", where=self.where, got=str(alpha)[:40])
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.root else rank)

    def _of(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        """Find the entry for a module as peft does: the first pattern that fits the end of its name."""
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error:
                raise CheckpointError(
                    "a pattern of the adapter's settings is no regular expression", where=self.where, got=pattern[:80]
                ) from None
        return default


def open_merged(base: CheckpointReader, folder: Path) -> CheckpointReader:
    """Open `base` with the adapter in `folder` merged; headers only.

    Raises InputError where there is no adapter, UnsupportedError for what cannot be merged, CheckpointError for an
    adapter that is damaged or belongs to another model.
    """
    settings, weights = folder / SETTINGS_NAME, folder / WEIGHTS_NAME
    if is_wrapper_type(base.config.get("model_type")):
        raise UnsupportedError(
            "adapters are merged into causal models only",
            where=str(base.directory),
            got=f"model_type {base.config['model_type']!r}, which wraps a text model",
            do=_MERGE_YOURSELF,
        )
    _check_there(folder)
    read = _read_settings(settings)
    file = AdapterFile(weights)
    entries = _Merge(base, file, read).entries()
    merged = MergedWeights(base, file, entries, settings)
    reader = CheckpointReader(base.directory, merged, beside_adapter=_same(folder, base.directory))
    updated = sum(entry.update is not None for entry in entries.values())
    replaced = sum(entry.saved is not None and entry.update is None for entry in entries.values())
    whole = f", {replaced} replaced" if replaced else ""
    reader.adapter = MergedAdapter(path=str(folder), content=merged.content, num_updated=updated, num_replaced=replaced)
    reader.notes = (
        *base.notes,
        f"adapter {folder.name!r} is merged into the weights: {updated} tensors changed{whole}",
        *_files_not_read(folder, base.directory),
    )
    return reader


def _files_not_read(folder: Path, model: Path) -> Iterable[str]:
    """Name files of an adapter apart from the model that would change its tokens, and are not the model's own."""
    if _same(folder, model):
        return ()
    others = sorted(
        path.name
        for path in folder.iterdir()
        if any(fnmatchcase(path.name, pattern) for pattern in (*TOKENIZER_FILES, "*.jinja"))
        and path.is_file()
        and not ((model / path.name).is_file() and file_sum(model / path.name) == file_sum(path))
    )
    if not others:
        return ()
    return (f"not taken from the adapter's folder, the model's own stay: {', '.join(name[:80] for name in others)}",)


def adapter_folder(asked: str, model: Path) -> Path:
    """Return the folder of the adapter that is asked for: a path, or `beside` for the model's own.

    Raises InputError for a path that is no folder.
    """
    if asked == BESIDE:
        return model
    check_path(asked, "the adapter")
    folder = expand_user(asked)
    if not folder.is_dir():
        raise InputError(
            "--merge-adapter is not usable",
            got=asked,
            wanted=f"a folder with {SETTINGS_NAME}, or `{BESIDE}` for the one beside the weights",
            do="fetch it into a folder first" if not folder.exists() else None,
        )
    return folder


def is_beside(asked: str, model: Path) -> bool:
    """Whether the adapter that is asked for lies in the model's own folder."""
    return asked != NO_ADAPTER and _same(adapter_folder(asked, model), model)


def _same(folder: Path, other: Path) -> bool:
    return folder.resolve() == other.resolve()


def _check_there(folder: Path) -> None:
    """Raise InputError where a file of the adapter is missing, UnsupportedError for one that would run code."""
    if not (folder / SETTINGS_NAME).exists():
        raise InputError("there is no adapter", where=str(folder), wanted=SETTINGS_NAME, do="check the path")
    if not (folder / WEIGHTS_NAME).exists():
        pickled = (folder / _PICKLE_NAME).exists()
        kind = UnsupportedError if pickled else InputError
        raise kind(
            "the adapter has no safetensors weights",
            where=str(folder),
            got=_PICKLE_NAME if pickled else None,
            wanted=WEIGHTS_NAME,
            do="load it with peft and save it again with save_pretrained; pickles are never loaded"
            if pickled
            else "check that all of it was fetched",
        )


def _read_settings(path: Path) -> _Settings:
    """Read `adapter_config.json`. Raises UnsupportedError for a setting that a merge could not follow."""
    config, where = read_json(path), str(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            "only LoRA adapters can be merged",
            where=where,
            got=f"peft_type {kind!r}",
            wanted="LORA",
            do=_MERGE_YOURSELF,
        )
    if config.get("bias") not in (None, "none"):
        raise UnsupportedError(
            "the adapter trains biases, which are not merged",
            where=where,
            got=f"bias {config['bias']!r}",
            do=_MERGE_YOURSELF,
        )
    if config.get("init_lora_weights") not in _INITS:
        raise UnsupportedError(
            "the adapter began by changing the base's weights, so it does not fit the base as it is",
            where=where,
            got=f"init_lora_weights {config['init_lora_weights']!r}",
            do="convert it to plain LoRA with peft (path_initial_model_for_weight_conversion), or " + _MERGE_YOURSELF,
        )
    for name, value in config.items():
        if value and name not in (*_READ, *_WITHOUT_EFFECT):
            raise UnsupportedError(
                "the adapter has a setting that a merge does not follow",
                where=where,
                got=f"{name} {str(value)[:60]}",
                do=_MERGE_YOURSELF,
            )
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, value in patterns.items():
        if not isinstance(value, dict):
            raise CheckpointError(f"{name} of the adapter's settings is no mapping", where=where, got=str(value)[:60])
    return _Settings(
        where=where,
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        root=bool(config.get("use_rslora")),
        ranks=patterns["rank_pattern"],
        alphas=patterns["alpha_pattern"],
        saved=tuple(map(str, config.get("modules_to_save") or ())),
    )


class _Merge:
    """Which tensor of the adapter goes into which one of the base."""

    def __init__(self, base: CheckpointReader, file: AdapterFile, settings: _Settings) -> None:
        self._base, self._file, self._settings = base, file, settings
        self._where = str(file.path)
        model_type = base.config.get("model_type")
        # A family that is not known is refused when the model is read.
        self._family = family_of_checkpoint(base.directory, str(model_type))

    def entries(self) -> dict[str, MergedEntry]:
        """Return how every tensor is made. Raises StructPruneError for one of the adapter's that has no place."""
        if odd := sorted(code for code in set(self._file.codes.values()) if code not in STORED_DTYPES):
            raise UnsupportedError(
                "the adapter is stored quantised or as integers", where=self._where, got=odd[0], do=_MERGE_YOURSELF
            )
        entries = {name: MergedEntry(base=name) for name in self._base.shapes}
        products, saved = self._sorted()
        for module in self._settings.saved:
            if not any(f".{module}." in f".{name}" for name in saved):
                raise CheckpointError(
                    "the adapter lacks a module that it trained",
                    where=self._where,
                    got=f"nothing for {module!r} of modules_to_save",
                    do="check that all of it was fetched",
                )
        for module, stored in saved.items():
            entries |= self._saved(module, stored)
        for module, parts in products.items():
            name, update = self._product(module, parts)
            entries[name] = replace(entries[name], update=update)
        return entries

    def _sorted(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return module -> its factors, and tensor -> what the adapter has in its place."""
        products: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        for stored in sorted(self._file.shapes):
            if not stored.startswith(_PREFIX):
                raise self._unknown(stored)
            name = stored.removeprefix(_PREFIX)
            for ending, part in _KINDS.items():
                if name.endswith(f".{ending}"):
                    products.setdefault(name.removesuffix(f".{ending}"), {})[part] = stored
                    break
            else:
                if "lora_" in name:
                    raise self._unknown(stored)
                saved[name.replace(".base_layer.", ".")] = stored
        return products, saved

    def _unknown(self, stored: str) -> StructPruneError:
        magnitude = "lora_magnitude_vector" in stored
        return UnsupportedError(
            "the adapter has magnitudes (DoRA), which are not merged"
            if magnitude
            else "the adapter has a tensor that a merge does not know",
            where=self._where,
            got=stored,
            do=_MERGE_YOURSELF,
        )

    def _saved(self, name: str, stored: str) -> dict[str, MergedEntry]:
        """Return the entry of a tensor that the adapter has in whole; of a tied pair, of both."""
        shape = self._file.shapes[stored]
        head, embedding = self._tied()
        if head is not None and name == head:
            # The head is untied by it.
            self._check_shape(name, shape, self._base.shapes[embedding or ""])
            return {name: MergedEntry(saved=stored)}
        place = self._placed(name)
        self._check_shape(name, shape, self._base.shapes[place])
        found = {place: MergedEntry(base=place, saved=stored)}
        if head is not None and place == embedding and f"{_PREFIX}{head}" not in self._file.shapes:
            # The embedding alone was trained: the head is what both were before.
            found[head] = MergedEntry(base=place)
        return found

    def _tied(self) -> tuple[str | None, str | None]:
        """Return (head, embedding) where the base stores one tensor for both."""
        if self._family is None:
            return None, None
        head, embedding = f"{self._family.head_module}.weight", f"{self._family.embedding_modules[0]}.weight"
        if self._found(head) or not (place := self._found(embedding)):
            return None, None
        return head, place[0]

    def _product(self, module: str, parts: Mapping[str, str]) -> tuple[str, LowRankUpdate]:
        """Return the tensor that a product is added to, and the product."""
        embedding = "embedding down" in parts or "embedding up" in parts
        wanted = ("embedding down", "embedding up") if embedding else ("down", "up")
        if sorted(parts) != sorted(wanted):
            raise CheckpointError(
                f"the adapter has one factor of the product for {module!r} without the other",
                where=self._where,
                got=", ".join(parts.values()),
                do="check that all of it was fetched",
            )
        down, up = (parts[part] for part in wanted)
        head, tied = self._tied()
        name = f"{module}.weight"
        place = None if name == head else self._placed(name)
        if head is not None and place in (None, tied):
            raise UnsupportedError(
                "the adapter changes one of two tied tensors, embedding and head, and a merge would change both",
                where=self._where,
                got=module,
                do="untie them in the base, or " + _MERGE_YOURSELF,
            )
        assert place is not None, "only the tied head has no place"
        shape, factors = self._base.shapes[place], (self._file.shapes[down], self._file.shapes[up])
        rank = self._settings.rank_of(module)
        if any(len(one) != 2 for one in (shape, *factors)) or factors[0][0] != rank or factors[1][1] != rank:
            raise CheckpointError(
                f"the product for {module!r} has other factors than the settings say",
                where=self._where,
                got=" and ".join(map(str, factors)),
                wanted=f"rank {rank}, for a matrix of {shape}",
                do="check that settings and weights belong together",
            )
        product = (factors[1][0], factors[0][1])
        # Square ones fit either way.
        fits = product == shape and not (product == product[::-1] and self._inputs_first(module))
        turned = embedding or (not fits and product[::-1] == shape)
        self._check_shape(module, product[::-1] if turned else product, shape)
        return place, LowRankUpdate(down=down, up=up, scale=self._settings.scale_of(module), transposed=turned)

    def _inputs_first(self, module: str) -> bool:
        """Whether a map of the base stores its weights as (inputs, outputs)."""
        family = self._family
        return family is not None and family.inputs_first and module != family.head_module

    def _placed(self, name: str) -> str:
        """Return the base's tensor of that name. Raises CheckpointError unless there is just one."""
        found = self._found(name)
        if len(found) != 1:
            raise CheckpointError(
                "the adapter changes a tensor that the model does not have"
                if not found
                else "the adapter changes a tensor, and two of the model's have its name",
                where=self._where,
                got=name,
                wanted=f"a tensor of {self._base.directory.name}, such as {next(iter(self._base.shapes), 'none')}",
                do="check that the adapter was trained on this model",
            )
        return found[0]

    def _found(self, name: str) -> list[str]:
        """List the base's tensors of that name, which files may have with more or less in front."""
        if name in self._base.shapes:
            return [name]
        return [other for other in self._base.shapes if name.endswith(f".{other}") or other.endswith(f".{name}")]

    def _check_shape(self, name: str, got: Iterable[int], wanted: Iterable[int]) -> None:
        if tuple(got) != tuple(wanted):
            raise CheckpointError(
                f"what the adapter has for {name!r} has another shape than the model's",
                where=self._where,
                got=tuple(got),
                wanted=tuple(wanted),
                do="check that the adapter was trained on this model; a vocabulary that grew cannot be merged here, so "
                + _MERGE_YOURSELF,
            )
