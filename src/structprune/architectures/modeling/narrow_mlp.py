"""MLPs with fewer channels than stock code gives them, where no config entry says how many there are.

Such stock layers derive the width from the hidden size. Their maps are modules of their own, and what is between them
works on any width, so the maps of a stock layer are exchanged for smaller ones. In a checkpoint it is the entry
`structprune_mlp_channels` of a block in `per_layer_config`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from structprune.architectures.families.common import CHANNELS_ENTRY
from structprune.architectures.family import MlpMaps

TEXT = '''

def _narrow_mlp(layer, kept):
    """Give an MLP fewer channels than the hidden size says."""
    if kept is None:
        return
    for name in _CHANNEL_MAPS:
        old = layer.get_submodule(name)
        inputs, outputs = (kept, old.out_features) if name == _CHANNEL_MAPS[-1] else (old.in_features, kept)
        layer.set_submodule(name, nn.Linear(inputs, outputs, bias=old.bias is not None))
'''
"""The same for the modelling file, which knows the maps as `_CHANNEL_MAPS`."""


def narrow_mlp(layer: nn.Module, config: PretrainedConfig, maps: MlpMaps | None) -> None:
    """Exchange the maps of a stock layer's MLP, on `meta`, where the block's config says its number of channels."""
    kept = getattr(config, CHANNELS_ENTRY, None)
    if maps is None or kept is None:
        return
    with torch.device("meta"):
        for name in (*maps.first, maps.last):
            old: Any = layer.get_submodule(name)
            inputs, outputs = (kept, old.out_features) if name == maps.last else (old.in_features, kept)
            layer.set_submodule(name, nn.Linear(inputs, outputs, bias=old.bias is not None))
