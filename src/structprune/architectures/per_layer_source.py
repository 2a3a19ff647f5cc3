"""The modelling files of unevenly pruned checkpoints: one constant text per family, nothing from the input in it.

Stock configs carry `per_layer_config`, but stock models build every layer from the global numbers. These files
subclass the stock classes and hand each layer its own copy of the config; since the second version they also put
modules that add nothing where half of a block is gone. A text that has been released must stay loadable: `load_model`
runs a file only if it equals one of `ACCEPTED_SOURCES`, so keep the old text there when one changes.
"""

from __future__ import annotations

from collections.abc import Mapping

MODELING_MODULE = "modeling_structprune"
MODELING_NAME = f"{MODELING_MODULE}.py"

_HEADER = '''"""Layers of different widths, written by structprune: stock classes, one copy of the config per layer."""

from contextlib import contextmanager

from torch import nn
'''

WITHOUT_LAYERS = '''

@contextmanager
def _without_layers(config):
    """The stock constructor builds everything but the layers: its layers would all have the global width."""
    num_layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = num_layers
'''

_LAYERS_V1 = """

def _layers(layer_class, config):
    configs = config.per_layer_config
    layers = nn.ModuleList(layer_class(configs[i], layer_idx=i) for i in range(config.num_hidden_layers))
    for layer in layers:
        # Attention reads its implementation here at run time; the shared config lets a later change reach it.
        layer.self_attn.config = config
    return layers
"""

_NO_HALVES = '''

# `set_attn_implementation` does nothing in a module whose text has a class of its own named `...Attention`.
class _NoAttn(nn.Module):
    """In the place of a removed attention: the block passes the residual stream on."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.new_zeros(()), None


class _NoMlp(nn.Module):
    """In the place of each module of a removed MLP."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(())


class _LazyStaticCache:
    """Keeps `generate` from sizing a static cache by block number where entries count blocks with attention."""

    def _get_static_cache_init_shape(self):
        return None if getattr(self.config, "structprune_removed", None) else super()._get_static_cache_init_shape()
'''

_HALVES = {
    "llama": """

_HALVES = {
    "attention": {"input_layernorm": nn.Identity, "self_attn": _NoAttn},
    "mlp": {"post_attention_layernorm": nn.Identity, "mlp": _NoMlp},
}
""",
    "opt": """

_HALVES = {
    "attention": {"self_attn_layer_norm": nn.Identity, "self_attn": _NoAttn},
    "mlp": {"final_layer_norm": nn.Identity, "fc1": _NoMlp, "fc2": _NoMlp},
}
""",
}

_LAYERS = """

def _layers(layer_class, config):
    configs = config.per_layer_config
    removed = getattr(config, "structprune_removed", None) or {}
    layers = nn.ModuleList()
    num_attentions = 0
    for i in range(config.num_hidden_layers):
        # Attention is numbered without gaps: masks and positions ask entry 0 of the cache for its length.
        layer = layer_class(configs[i], layer_idx=num_attentions)
        kinds = removed.get(str(i), ())
        for kind in kinds:
            for name, stand_in in _HALVES[kind].items():
                setattr(layer, name, stand_in())
        if "attention" not in kinds:
            # Attention reads its implementation here at run time; the shared config lets a later change reach it.
            layer.self_attn.config = config
            num_attentions += 1
        layers.append(layer)
    return layers
"""

_IMPORTS = {
    "llama": """from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
""",
    "opt": """from transformers.models.opt.modeling_opt import OPTDecoder, OPTDecoderLayer, OPTForCausalLM, OPTModel
""",
}

# `MIXIN` stands for the base classes that a version adds.
_MODELS = {
    "llama": """

class StructPruneLlamaModel(LlamaModel):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.layers = _layers(LlamaDecoderLayer, config)
        self.post_init()


class StructPruneLlamaForCausalLM(MIXINLlamaForCausalLM):
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


class StructPruneMistralForCausalLM(MIXINMistralForCausalLM):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.model = StructPruneMistralModel(config)
        self.post_init()
""",
    "opt": """

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


class StructPruneOPTForCausalLM(MIXINOPTForCausalLM):
    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.model = StructPruneOPTModel(config)
        self.post_init()
""",
}


def _text_v1(family: str) -> str:
    return _HEADER + _IMPORTS[family] + WITHOUT_LAYERS + _LAYERS_V1 + _MODELS[family].replace("MIXIN", "")


def _text(family: str) -> str:
    helpers = WITHOUT_LAYERS + _NO_HALVES + _HALVES[family] + _LAYERS
    return _HEADER + _IMPORTS[family] + helpers + _MODELS[family].replace("MIXIN", "_LazyStaticCache, ")


MODELING_SOURCES: Mapping[str, str] = {family: _text(family) for family in _MODELS}
"""Family name -> the text that is written now."""

ACCEPTED_SOURCES: Mapping[str, tuple[str, ...]] = {family: (_text(family), _text_v1(family)) for family in _MODELS}
"""Family name -> every text that was ever written for it."""

CLASS_STEMS: Mapping[str, str] = {
    "llama": "StructPruneLlama",
    "mistral": "StructPruneMistral",
    "opt": "StructPruneOPT",
}
"""`config.model_type` -> class name without its `Model` or `ForCausalLM`."""
