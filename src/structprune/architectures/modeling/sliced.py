"""The modelling file of sliced checkpoints: one constant text per family, nothing from the input in it.

A sliced block is the stock block of a smaller hidden size whose residual stream passes through a square matrix in each
sum: h <- S h + attention(norm(h)), h <- S' h + mlp(norm(h)). Everything else is stock. As with the per-layer files,
a text that has been released must stay loadable: when it changes, keep the old one in `accepted_sliced_sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from structprune.architectures.family import Family, StockClasses
from structprune.architectures.modeling.per_layer import WITHOUT_LAYERS, imports

SLICED_ENTRY = "structprune_sliced"
"""Entry of config.json that marks the format: `{"hidden_size": width of the stream before the cut}`."""

_HEADER = '''"""A narrower residual stream, written by structprune: stock classes with a matrix in each sum."""

from contextlib import contextmanager

from torch import nn
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


def sliced_class_name(classes: StockClasses, suffix: str) -> str:
    """Name our class for `suffix` Model, ForCausalLM or DecoderLayer."""
    return f"StructPruneSliced{classes.stem}{suffix}"


def _models(classes: StockClasses) -> str:
    model, causal = classes.chain
    layer, ours, outer = (sliced_class_name(classes, name) for name in ("DecoderLayer", "Model", "ForCausalLM"))
    return f"""

class {layer}(_Shortcuts, {classes.layer}):
    pass


class {ours}({model}):
    _no_split_modules = ["{layer}"]

    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList(
            {layer}(config, i) for i in range(config.num_hidden_layers)
        )
        self.post_init()


class {outer}({causal}):
    _no_split_modules = ["{layer}"]

    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.model = {ours}(config)
        self.post_init()
"""


def sliced_source(family: Family) -> str:
    """Write the text that is current for `family`, which must describe its stream."""
    assert family.stream is not None
    return _HEADER + imports(family) + WITHOUT_LAYERS + _SHORTCUTS + "".join(map(_models, family.classes.values()))


def accepted_sliced_sources(family: Family) -> tuple[str, ...]:
    """Return every text that was ever written for `family`."""
    return (sliced_source(family),)


class SlicedLayer(nn.Module):
    """A stock layer that has the shortcuts as modules, with the forward pass of the modelling file."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        layer = self.layer
        attention, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        hidden_states = layer.attention_shortcut(hidden_states) + attention
        return layer.mlp_shortcut(hidden_states) + layer.mlp(layer.post_attention_layernorm(hidden_states))


SHORTCUTS: Mapping[str, str] = {"attention": "attention_shortcut", "mlp": "mlp_shortcut"}
"""Kind of a block's sublayer -> the module that its residual sum passes through."""
