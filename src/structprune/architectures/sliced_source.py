"""The modelling file of sliced checkpoints: one constant text, nothing from the input in it.

A sliced block is the stock block of a smaller hidden size whose residual stream passes through a square matrix in each
sum: h <- S h + attention(norm(h)), h <- S' h + mlp(norm(h)). Everything else is stock. As with the per-layer files,
a text that has been released must stay loadable: when it changes, keep the old one in `ACCEPTED_SLICED_SOURCES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from structprune.architectures.per_layer_source import WITHOUT_LAYERS

SLICED_ENTRY = "structprune_sliced"
"""Entry of config.json that marks the format: `{"hidden_size": width of the stream before the cut}`."""

_HEADER = '''"""A narrower residual stream, written by structprune: stock classes with a matrix in each sum."""

from contextlib import contextmanager

from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
'''

_SHORTCUTS = '''

class _Shortcuts:
    """Each position of the stream has its own basis; the shortcuts go from one to the next."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.attention_shortcut = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp_shortcut = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, **kwargs):
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attention_shortcut(hidden_states) + attention
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))
'''

_FAMILY = """

class StructPruneSlicedSTEMDecoderLayer(_Shortcuts, STEMDecoderLayer):
    pass


class StructPruneSlicedSTEMModel(STEMModel):
    _no_split_modules = ["StructPruneSlicedSTEMDecoderLayer"]

    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList(
            StructPruneSlicedSTEMDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.post_init()


class StructPruneSlicedSTEMForCausalLM(STEMForCausalLM):
    _no_split_modules = ["StructPruneSlicedSTEMDecoderLayer"]

    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.model = StructPruneSlicedSTEMModel(config)
        self.post_init()
"""

_STEMS = {"llama": "Llama", "mistral": "Mistral"}

SLICED_SOURCE = _HEADER + WITHOUT_LAYERS + _SHORTCUTS + "".join(_FAMILY.replace("STEM", s) for s in _STEMS.values())
"""The text that is written now."""

ACCEPTED_SLICED_SOURCES: tuple[str, ...] = (SLICED_SOURCE,)
"""Every text that was ever written."""

SLICED_STEMS: Mapping[str, str] = {name: f"StructPruneSliced{stem}" for name, stem in _STEMS.items()}
"""`config.model_type` -> class name without its `Model` or `ForCausalLM`."""

SHORTCUTS: Mapping[str, str] = {"attention": "attention_shortcut", "mlp": "mlp_shortcut"}
"""Kind of a block's half -> the module that its residual sum passes through."""
