"""Image-text models: the text model inside one as a checkpoint of its own, by what stock code builds of the config.

`text_view` finds three things: the entry of the config that is the text model's, the module that is built of it, and
the names that its tensors have in the files, by the translation that stock code loads them with. Where stock code has
no causal model of such a text config, one is put together of its text model and a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PretrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_outputs import CausalLMOutputWithPast

from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.architectures.modeling.sliced import SLICED_ENTRY
from structprune.architectures.stock.config import with_few_tokens
from structprune.architectures.stock.counts import check_counts
from structprune.architectures.stock.placeholders import parameters_on_meta
from structprune.architectures.stock.without_images import NUM_TOKENS, difference
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.wrapper import Wrapper
from structprune.errors import CheckpointError, StructPruneError, UnsupportedError, first_line

_TIED = "tie_word_embeddings"
# Entries of the whole that say something of all its weights.
_OF_ALL = ("quantization_config", "compression_config")
_OWN_BLOCKS = {"per_layer_config", REMOVED_ENTRY, SLICED_ENTRY}
# What the text model of a causal model is called with; one that takes more is given something of the images in between.
_USUAL_ARGUMENTS = {
    *("self", "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"),
    *("cache_position", "output_attentions", "output_hidden_states", "return_dict", "kwargs"),
}


def is_wrapper_type(model_type: Any) -> bool:
    """Whether stock transformers has an image-text model of this type, with a config for the text model inside."""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return False
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and "text_config" in config_class.sub_configs


def auto_class(model_type: Any) -> Any:
    """Return the class by which stock code loads checkpoints of this type: of image-text models, or causal ones."""
    return AutoModelForImageTextToText if is_wrapper_type(model_type) else AutoModelForCausalLM


def module_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return the names of tensors in files with those of the parameters that stock code loads them into."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    there = model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, there)[0]
        for name in sorted(stored)
    }


def text_view(reader: CheckpointReader) -> CheckpointReader:
    """Return the text model of an image-text checkpoint; any other checkpoint, and one that is a view, as it is.

    Raises CheckpointError for a config that makes no model or has no weights of a text model, UnsupportedError for a
    text model that is no causal model of its own.
    """
    if reader.wrapper is not None or not is_wrapper_type(reader.config.get("model_type")):
        return reader
    where = str(reader.directory / "config.json")
    _check_parts(reader, reader.config)
    try:
        config: Any = AutoConfig.from_pretrained(str(reader.directory), local_files_only=True, trust_remote_code=False)
        return _TextModel(reader, config).view()
    except StructPruneError:
        raise
    except Exception as error:
        # transformers raises many types for a config that makes no model; all of them are the input's fault.
        raise CheckpointError(
            "transformers cannot build this configuration", where=where, got=first_line(error)
        ) from error


def _check_parts(reader: CheckpointReader, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for counts and sizes that are none, UnsupportedError for blocks with configs of their own.

    In all configs of a config, before stock code reads them.
    """
    if left := sorted(_OWN_BLOCKS & config.keys()):
        raise UnsupportedError(
            "blocks of different widths inside an image-text model, which no stock class builds",
            where=str(reader.directory / "config.json"),
            got=", ".join(left),
        )
    for inner in config.values():
        if isinstance(inner, dict):
            check_counts(reader.with_config(inner))
            _check_parts(reader, inner)


class _TextModel:
    """The text model of an image-text model, which is built here with few tokens and without weights."""

    def __init__(self, reader: CheckpointReader, config: Any) -> None:
        self._reader, self._config = reader, config
        self._where = str(reader.directory / "config.json")
        self._text: Any = config.get_text_config()
        self._key = self._entry()
        with parameters_on_meta():
            self._model: Any = AutoModelForImageTextToText.from_config(
                with_few_tokens(config, NUM_TOKENS), trust_remote_code=False
            ).eval()
        self._path, self._module = self._found_module()
        self._head = self._name_of(self._model.get_output_embeddings())

    def view(self) -> CheckpointReader:
        """Return the text model as a checkpoint. Raises as `text_view` does."""
        causal = self._causal()
        inner = "" if isinstance(self._module, type(causal)) else f"{causal.base_model_prefix}."
        own_head = next(name for name, each in causal.named_modules() if each is causal.get_output_embeddings())
        names = self._names({f"{self._path}.": inner, f"{self._head}.": f"{own_head}."})
        different = difference(self._model, causal, {f"{own_head}.": f"{self._head}.", inner: f"{self._path}."})
        if different is not None:
            wanted = "what its text model computes as a causal model"
            raise self._unsupported("without an image it computes something else", got=different, wanted=wanted)
        text_config = self._text.to_dict() | {_TIED: self._tied(), "architectures": [type(causal).__name__]}
        text_config |= {name: self._reader.config[name] for name in _OF_ALL if name in self._reader.config}
        given = self._reader.config.get(self._key)
        arguments = set(inspect.signature(type(causal.base_model).forward).parameters)
        wrapper = Wrapper(
            whole=self._reader.as_stored(),
            key=self._key,
            # A config from before such configs were nested is written as stock code would write it.
            config=self._reader.config if isinstance(given, dict) else self._config.to_dict(),
            text_config=text_config,
            inside=frozenset(names),
            enters_between_blocks=not arguments <= _USUAL_ARGUMENTS,
        )
        pairs = _prefixes(names)
        view = self._reader.part(wrapper, pairs)
        wrong = [name for name, own in names.items() if own not in view.shapes or view.stored_name(own) != name]
        if wrong:
            raise self._unsupported("the names of its text model have no common start", got=wrong[0])
        return view

    def _entry(self) -> str:
        """Name the config entry that is the text model's."""
        found = [name for name in self._config.sub_configs if getattr(self._config, name, None) is self._text]
        if len(found) != 1:
            raise self._unsupported("its config has no one entry for a text model", got=", ".join(found) or "none")
        if self._config.is_encoder_decoder:
            raise self._unsupported("it is an encoder and a decoder", got=type(self._config).__name__)
        return found[0]

    def _found_module(self) -> tuple[str, nn.Module]:
        """Find the module that is built of the text config, the outermost."""
        wanted = type(self._text)
        for name, module in self._model.named_modules():
            if name and isinstance(getattr(module, "config", None), wanted) and hasattr(module, "get_input_embeddings"):
                return name, module
        raise self._unsupported("no module of it is built of its text config", got=wanted.__name__)

    def _name_of(self, wanted: nn.Module | None) -> str:
        for name, module in self._model.named_modules():
            if module is wanted:
                return name
        raise self._unsupported("it has no output head", got=type(self._model).__name__)

    def _causal(self) -> Any:
        """Build the causal model of the text config, without weights."""
        if type(self._text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            head: Any = self._model.get_submodule(self._head)
            causal_class = _with_head(self._module, type(self._text), biased=head.bias is not None)
            AutoModelForCausalLM.register(type(self._text), causal_class, exist_ok=True)
        text = with_few_tokens(self._text, NUM_TOKENS)
        setattr(text, _TIED, self._tied())
        with parameters_on_meta():
            causal: Any = AutoModelForCausalLM.from_config(text, trust_remote_code=False).eval()
        if type(self._module) not in (type(causal), type(causal.base_model)):
            raise self._unsupported(
                "its text model is another one than the causal model of its config",
                got=type(self._module).__name__,
                wanted=type(causal.base_model).__name__,
            )
        return causal

    def _tied(self) -> bool:
        """Say whether the head is the embedding: by the config of the module that has both."""
        config = self._text if self._head.startswith(f"{self._path}.") else self._config
        return bool(getattr(config, _TIED, False))

    def _names(self, starts: Mapping[str, str]) -> dict[str, str]:
        """Return the names of the text model's tensors in the files, with those that a causal model's files have.

        `starts`: start of a name of a module -> in the causal model. Raises CheckpointError where there are none.
        """
        names: dict[str, str] = {}
        for stored, module_name in module_names(self._model, self._reader.shapes).items():
            for start, own in starts.items():
                if module_name.startswith(start):
                    names[stored] = _translated(stored, module_name, start, own)
                    break
        if not names:
            raise CheckpointError(
                "the checkpoint has no weights of the text model that its config describes",
                where=str(self._reader.directory),
                got=f"{len(self._reader.shapes)} tensors, none below {self._path}",
                do="check that config.json belongs to it, and that all of it was fetched",
            )
        return names

    def _unsupported(self, what: str, *, got: str, wanted: str | None = None) -> UnsupportedError:
        return UnsupportedError(
            f"{self._config.model_type} wraps a text model, and {what}", where=self._where, got=got, wanted=wanted
        )


def _translated(stored: str, module_name: str, start: str, own: str) -> str:
    """Exchange the start of a stored name so that it is that of a causal model's file.

    The rest of a name may be an older one, which the causal model's own translation knows: it stays.
    """
    rest = module_name.removeprefix(start)
    parts, first = stored.split("."), rest.partition(".")[0]
    older = not stored.endswith(rest) and first in parts
    return own + (".".join(parts[parts.index(first) :]) if older else rest)


def _prefixes(names: Mapping[str, str]) -> dict[str, str]:
    """Return the starts of stored names with those of the names that they are exchanged for, the longest first."""
    pairs: dict[str, str] = {}
    for stored, own in names.items():
        old, new = stored.split("."), own.split(".")
        same = 0
        while same < min(len(old), len(new)) and old[-1 - same] == new[-1 - same]:
            same += 1
        starts = (f"{'.'.join(parts[: len(parts) - same])}." if len(parts) > same else "" for parts in (old, new))
        pairs.setdefault(next(starts), next(starts))
    return dict(sorted(pairs.items(), key=lambda pair: (-len(pair[0]), -len(pair[1]))))


def _with_head(text: Any, config_class: type[PretrainedConfig], *, biased: bool) -> Any:
    """Make a causal model class of a text model's class and a head, as stock code would write it."""
    text_class: Any = type(text)
    embedding = next(name for name, each in text.named_modules() if each is text.get_input_embeddings())

    class TextForCausalLM(text_class.__bases__[0], GenerationMixin):
        _tied_weights_keys: Mapping[str, str] = {"lm_head.weight": f"model.{embedding}.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = text_class(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=biased)
            self.post_init()

        def forward(self, input_ids: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> CausalLMOutputWithPast:
            found = self.model(input_ids=input_ids, **kwargs)
            logits = self.lm_head(found.last_hidden_state[:, -logits_to_keep:])
            return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)

    TextForCausalLM.config_class = config_class
    TextForCausalLM.base_model_prefix = "model"
    TextForCausalLM.__name__ = TextForCausalLM.__qualname__ = f"{text_class.__name__.removesuffix('Model')}ForCausalLM"
    # Where stock code looks for the file of the classes, and takes a class of another package for a foreign one.
    TextForCausalLM.__module__ = text_class.__module__
    return TextForCausalLM
