"""The modelling files of unevenly pruned checkpoints: one constant text per family, nothing from the input in it.

Stock configs carry `per_layer_config`, but stock models build every layer from the global numbers. These files
subclass the stock classes and hand each layer its own copy of the config; since the second version they also put
modules that add nothing where a sublayer is gone. Checkpoints with fewer value channels get a longer text. A text
that has been released must stay loadable: `load_model` runs a file only if it equals one of `accepted_sources`, so keep
the old text there when one changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from structprune.architectures.families.common import CHANNELS_ENTRY, VALUES_ENTRY
from structprune.architectures.family import BlockKind, Family, StandIn, StockClasses
from structprune.architectures.modeling import narrow_mlp
from structprune.types import UNIT_KINDS, UnitKind

MODELING_MODULE = "modeling_structprune"
MODELING_NAME = f"{MODELING_MODULE}.py"

# Families that the first version of the text was written for.
_FIRST_VERSION = ("llama", "opt")

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

_NO_SUBLAYERS = '''

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

_OTHER_STAND_INS: Mapping[tuple[UnitKind, StandIn], tuple[str, str]] = {
    ("attention", "stream"): (
        "_StreamAttn",
        '''

class _StreamAttn(nn.Module):
    """In the place of a removed attention that is given the residual stream and adds to it itself."""

    def forward(self, hidden_states, residual, *args, **kwargs):
        return residual, None
''',
    ),
    ("mlp", "stream"): (
        "_StreamMlp",
        '''

class _StreamMlp(nn.Module):
    """In the place of a removed MLP that is given the residual stream and adds to it itself."""

    def forward(self, hidden_states, residual):
        return residual
''',
    ),
    ("mlp", "pair"): (
        "_PairMlp",
        '''

class _PairMlp(nn.Module):
    """In the place of a removed MLP that gives more than its output, such as a router's numbers."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(()), None
''',
    ),
    ("mlp", "zeros-pair"): (
        "_ZeroPairMlp",
        '''

class _ZeroPairMlp(nn.Module):
    """In the place of a removed MLP that gives more than its output, of which the shape is read."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(hidden_states.shape), None
''',
    ),
    ("mlp", "zeros"): (
        "_ZeroMlp",
        '''

class _ZeroMlp(nn.Module):
    """In the place of a removed MLP to whose output others are added in place."""

    def forward(self, hidden_states):
        return hidden_states.new_zeros(hidden_states.shape)
''',
    ),
}
"""Stand-ins of the families that need others: the class's name, and its text."""

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

_NARROW_VALUES = '''

class _Values(nn.Linear):
    """v_proj with fewer channels per KV head, and zeros behind them up to the size of a head."""

    def __init__(self, dense, kept, size):
        super().__init__(dense.in_features, dense.out_features // size * kept, bias=dense.bias is not None)
        self.kept = kept
        self.size = size

    def forward(self, hidden_states):
        values = super().forward(hidden_states).unflatten(-1, (-1, self.kept))
        return nn.functional.pad(values, (0, self.size - self.kept)).flatten(-2)


class _Outputs(nn.Linear):
    """o_proj of heads of which the first channels are read."""

    def __init__(self, dense, kept, size):
        super().__init__(dense.in_features // size * kept, dense.out_features, bias=dense.bias is not None)
        self.kept = kept
        self.size = size

    def forward(self, hidden_states):
        heads = hidden_states.unflatten(-1, (-1, self.size))
        return super().forward(heads[..., : self.kept].flatten(-2))


def _narrow_values(layer, kept, size):
    if kept < size:
        for name, narrow in _VALUE_MAPS.items():
            layer.set_submodule(name, narrow(layer.get_submodule(name), kept, size))
'''

_LAYER_CONFIG = '''

class _LayerConfig:
    """A layer's own numbers, and the attention implementation of the shared config, which may change."""

    def __init__(self, own, shared):
        self.own = own
        self.shared = shared

    def __getattr__(self, name):
        return getattr(self.shared if name == "_attn_implementation" else self.own, name)
'''


_WITHOUT = """        with _without_layers(config):
            super().__init__(config)
"""
_GIVEN = '''

def _give(stock, layer):
    """Give a layer what the stock model has computed for it."""
    for name, buffer in stock.named_buffers():
        place, _, attribute = name.rpartition(".")
        module = layer.get_submodule(place)
        if not hasattr(module, attribute):
            module.register_buffer(attribute, buffer, persistent=False)


class _StockInit:
    """Has stock code fill such buffers as for its own classes: all of it looks whether a tensor was loaded."""

    def _initialize_weights(self, module, is_custom_code=False):
        super()._initialize_weights(module)
'''
# Blocks of several classes are told apart by stock code alone.
_WITH = """        super().__init__(config)
"""


def class_name(classes: StockClasses, suffix: str) -> str:
    """Name our class for `suffix` Model or ForCausalLM."""
    return f"StructPrune{classes.stem}{suffix}"


def imports(family: Family) -> str:
    """Write the lines that import the stock classes, and what translates the names in their checkpoints."""
    translation = "from transformers.conversion_mapping import (\n    get_checkpoint_conversion_mapping,\n"
    translation += "    register_checkpoint_conversion_mapping,\n)\n"
    return (translation if family.registers_names else "") + "".join(
        f"from transformers.models.{classes.module}.modeling_{classes.module} import "
        f"{', '.join(sorted((*([classes.layer] if classes.layer else []), *classes.chain)))}\n"
        for classes in family.classes.values()
    )


def _registration(family: Family) -> str:
    """Write the lines that turn on the translation of the checkpoint's names: it is off for foreign files' classes."""
    if not family.registers_names:
        return ""
    return "".join(
        f"""
register_checkpoint_conversion_mapping(
    "{model_type}", get_checkpoint_conversion_mapping("{model_type}"), overwrite=True
)
"""
        for model_type in family.classes
    )


def _sublayers(family: Family) -> str:
    having: dict[UnitKind, BlockKind] = {kind: family.having(kind) for kind in UNIT_KINDS}
    others = {
        kind: _OTHER_STAND_INS[kind, blocks.stand_in(kind)]
        for kind, blocks in having.items()
        if blocks.stand_in(kind) != "nothing"
    }
    text = "".join(each for _, each in others.values()) + "\n\n_HALVES = {\n"
    for kind in UNIT_KINDS:
        stand_in = others[kind][0] if kind in others else "_NoAttn" if kind == "attention" else "_NoMlp"
        names = dict.fromkeys(having[kind].norms.get(kind, ()), "nn.Identity")
        names |= dict.fromkeys(having[kind].sublayer_modules(kind), stand_in)
        text += f'    "{kind}": {{' + ", ".join(f'"{name}": {made}' for name, made in names.items()) + "},\n"
    return text + "}\n"


def _models(family: Family, bases: str) -> str:
    """Write our classes of each model type, from the one that holds the blocks outward; the last one has `bases`."""
    text = ""
    for classes in family.classes.values():
        path = list(reversed(family.blocks_module.split(".")))
        child = f"_layers({classes.layer or f'self.{path[0]}'}, config)"
        for left, (stock, attribute) in enumerate(zip(classes.chain, path, strict=True), start=1 - len(classes.chain)):
            suffix = {0: "ForCausalLM", -1: "Model"}.get(left, stock.removeprefix(classes.stem))
            name = class_name(classes, suffix)
            built = _WITHOUT if classes.layer else _WITH
            text += f"""

class {name}({"" if classes.layer else "_StockInit, "}{bases if left == 0 else ""}{stock}):
    def __init__(self, config):
{built}        self.{attribute} = {child}
        self.post_init()
"""
            child = f"{name}(config)"
    return text


def _text_v1(family: Family) -> str:
    return _HEADER + imports(family) + WITHOUT_LAYERS + _LAYERS_V1 + _models(family, "")


def modeling_source(family: Family, *, narrow: bool = False) -> str:
    """Write the text that is current for `family`; with `narrow` that for checkpoints with fewer value channels."""
    attention = family.having("attention").attention_module or "self_attn"
    layers = _LAYERS.replace("layer.self_attn", f"layer.{attention}")
    if any(classes.layer is None for classes in family.classes.values()):
        layers = layers.replace("(layer_class, config)", "(stock, config)").replace("layer_class(", "type(stock[i])(")
        layers = _GIVEN + layers.replace(
            "        kinds = removed", "        _give(stock[i], layer)\n        kinds = removed"
        )
    if family.channel_maps is not None:
        names = ", ".join(f'"{name}"' for name in (*family.channel_maps.first, family.channel_maps.last))
        told = "        kinds = removed.get"
        assert told in layers
        call = f'        _narrow_mlp(layer, getattr(configs[i], "{CHANNELS_ENTRY}", None))\n'
        layers = f"\n\n_CHANNEL_MAPS = ({names})\n{narrow_mlp.TEXT}{layers.replace(told, call + told)}"
    if any(kind.attention_module is None for kind in family.kinds):
        layers = _with_mixers(layers, f"layer.{attention}")
    if family.attention_reads_widths:
        layers = _LAYER_CONFIG + layers.replace(".config = config", ".config = _LayerConfig(configs[i], config)")
    if narrow:
        layers = _with_narrow_values(family, layers)
    helpers = _registration(family) + WITHOUT_LAYERS + _NO_SUBLAYERS + _sublayers(family) + layers
    return _HEADER + imports(family) + helpers + _models(family, "_LazyStaticCache, ")


def _with_mixers(layers: str, attention: str) -> str:
    """Ask each block whether it has attention; those without it count as well, since caches have their entries."""
    module, _, name = attention.rpartition(".")
    told = f"            {attention}.config ="
    assert told in layers
    # Some classes have no such attribute there, others have None.
    asked = f'            if getattr({module}, "{name}", None) is not None:\n'
    return layers.replace(told, f"{asked}                {attention}.config =")


def _with_narrow_values(family: Family, layers: str) -> str:
    assert family.value_maps is not None
    values, outputs = family.value_maps
    maps = f'\n\n_VALUE_MAPS = {{"{values}": _Values, "{outputs}": _Outputs}}\n'
    built = "        kinds = removed.get(str(i), ())\n"
    assert built in layers
    call = f"        _narrow_values(layer, configs[i].{VALUES_ENTRY}, layer.{family.attention_module}.head_dim)\n"
    return _NARROW_VALUES + maps + layers.replace(built, call + built)


def accepted_sources(family: Family) -> tuple[str, ...]:
    """Return every text that was ever written for `family`."""
    released = (_text_v1(family),) if family.name in _FIRST_VERSION else ()
    narrow = () if family.value_maps is None else (modeling_source(family, narrow=True),)
    return (modeling_source(family), *narrow, *released)
