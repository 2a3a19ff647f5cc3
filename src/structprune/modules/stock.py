"""A config that describes the smaller model, so that stock code loads it: found by trying, checked by loading."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import nn

from structprune.modules.costs import Counts, size_of
from structprune.modules.layout import ModuleLayout
from structprune.tracing.terms import Atom, Product, atoms, resolve

_MAX_CHOICES = 64
"""Configs that are tried."""


def stock_model(layout: ModuleLayout, module: nn.Module, counts: Counts) -> nn.Module | None:
    """Build the smaller model from a stock config: (type of the model)(config) with other numbers of units.

    Entries of `model.config` that are sizes of what shrank are tried with what they are now, in all combinations, until
    the model that comes of it has just the tensors of `module`. None where the model has no such config, or none says
    these widths: units of the blocks that differ in number, or heads whose size the code derives.
    """
    config = getattr(layout.model, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)):
        return None
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for changes in _changes(config, layout, counts):
        changed = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(changed, name, value)
        model = _empty(type(layout.model), changed)
        if model is not None and {name: tuple(each.shape) for name, each in model.state_dict().items()} == wanted:
            return _filled(type(layout.model), changed, module)
    return None


def _changes(config: Any, layout: ModuleLayout, counts: Counts) -> Iterator[Mapping[str, int]]:
    """Yield entries to change: at first all that may be, then fewer."""
    sizes = _sizes(layout, counts)
    entries = {name: value for name, value in config.to_dict().items() if type(value) is int and value > 1}
    choices = {name: [*sorted(sizes[value]), value] for name, value in entries.items() if sizes.get(value, set())}
    for number, chosen in enumerate(product(*choices.values())):
        if number == _MAX_CHOICES:
            return
        yield {name: value for name, value in zip(choices, chosen, strict=True) if value != entries[name]}


def _sizes(layout: ModuleLayout, counts: Counts) -> dict[int, set[int]]:
    """Map the sizes of axes and of what they are made of to what these are now, where they shrank."""
    sizes: dict[int, set[int]] = {}
    for dims in layout.traced.parameters.values():
        for term in map(resolve, dims):
            parts = term.factors if isinstance(term, Product) else ()
            for each in (term, *parts, *atoms(term)):
                after = size_of(each, counts)
                if after != each.size and not (isinstance(each, Atom) and each.size == 1):
                    sizes.setdefault(each.size, set()).add(after)
    return sizes


def _empty(kind: type[nn.Module], config: Any) -> nn.Module | None:
    """Build a model without numbers; None where its code refuses the config."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception:
        # Stock code checks its configs in many ways.
        return None


def _filled(kind: type[nn.Module], config: Any, module: nn.Module) -> nn.Module | None:
    model = kind(config)
    model.to(next((each.dtype for each in module.parameters()), None))
    model.load_state_dict(module.state_dict())
    model.train(module.training)
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        # What a model is asked for, and with which numbers, is no part of its config.
        model.generation_config = generation
    return model
