"""The modelling files of unevenly pruned checkpoints: one constant text per family, nothing from the input in it.

Stock configs carry `per_layer_config`, but stock models build every layer from the global numbers. These files
subclass the stock classes and hand each layer its own copy of the config. A text that has been released must stay
loadable: `load_model` runs a file only if it equals one of `ACCEPTED_SOURCES`, so keep the old text there when one
changes.
"""

from __future__ import annotations

from collections.abc import Mapping

MODELING_MODULE = "modeling_structprune"
MODELING_NAME = f"{MODELING_MODULE}.py"

_HEADER = '''"""Layers of different widths, written by structprune: stock classes, one copy of the config per layer."""

from contextlib import contextmanager

from torch import nn
'''

_HELPERS = '''

@contextmanager
def _without_layers(config):
    """The stock constructor builds everything but the layers: its layers would all have the global width."""
    num_layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_layers


def _layers(layer_class, config):
    configs = config.per_layer_config
    layers = nn.ModuleList(layer_class(configs[i], layer_idx=i) for i in range(config.num_hidden_layers))
    for layer in layers:
        # Attention reads its implementation here at run time; the shared config lets a later change reach it.
        layer.self_attn.config = config
    return layers
'''

_LLAMA = (
    _HEADER
    + """from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
"""
    + _HELPERS
    + """

class StructPruneLlamaModel(LlamaModel):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.layers = _layers(LlamaDecoderLayer, config)
        self.post_init()


class StructPruneLlamaForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.model = StructPruneLlamaModel(config)
        self.post_init()


class StructPruneMistralModel(MistralModel):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.layers = _layers(MistralDecoderLayer, config)
        self.post_init()


class StructPruneMistralForCausalLM(MistralForCausalLM):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.model = StructPruneMistralModel(config)
        self.post_init()
"""
)

_OPT = (
    _HEADER
    + """from transformers.models.opt.modeling_opt import OPTDecoder, OPTDecoderLayer, OPTForCausalLM, OPTModel
"""
    + _HELPERS
    + """

class StructPruneOPTDecoder(OPTDecoder):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.layers = _layers(OPTDecoderLayer, config)
        self.post_init()


class StructPruneOPTModel(OPTModel):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.decoder = StructPruneOPTDecoder(config)
        self.post_init()


class StructPruneOPTForCausalLM(OPTForCausalLM):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.model = StructPruneOPTModel(config)
        self.post_init()
"""
)

MODELING_SOURCES: Mapping[str, str] = {"llama": _LLAMA, "opt": _OPT}
"""Family name -> the text that is written now."""

ACCEPTED_SOURCES: Mapping[str, tuple[str, ...]] = {name: (text,) for name, text in MODELING_SOURCES.items()}
"""Family name -> every text that was ever written for it."""

CLASS_STEMS: Mapping[str, str] = {
    "llama": "StructPruneLlama",
    "mistral": "StructPruneMistral",
    "opt": "StructPruneOPT",
}
"""`config.model_type` -> class name without its `Model` or `ForCausalLM`."""
