"""Smaller modules: tensors without the units that leave, sizes written anew, and the proof by running both."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structprune.errors import UnsupportedError
from structprune.modules.compare import are_close, tensors_of
from structprune.modules.layout import Given, Keep, ModuleLayout, evaluating
from structprune.modules.layout import layout as find_layout
from structprune.modules.program import GraphModule
from structprune.modules.sizes import attempts, guess, has_numbers, table_numbers, write_guesses
from structprune.tracing.replay import (
    Kept,
    Removal,
    check_states,
    cut_state,
    masked_state,
    replay,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """A smaller module, and how it was found to be right."""

    module: nn.Module
    removal: Removal | None
    """Difference from the module with zeros in place of the units; None where coupled units left, for which zeros are
    no measure: the smaller module was then compared with the graph of the dense one without the units."""
    is_native: bool
    """Whether the model's own code runs with the smaller tensors; else the module is a `GraphModule`."""


def compact(model: nn.Module, keep: Keep, example: Given, *, allow_coupled: bool = False) -> nn.Module:
    """Build a module with only the units of `keep`, {family name: units that stay, ascending}; `model` is left alone.

    Families are those of `layout(model, example)`; all that are not named stay whole. What comes back is a copy of the
    model with smaller tensors where its own code runs with them, else the graph of the example with the tensors. Both
    are compared on the example with the model that has zeros in place of the units (1e-4 of the largest output in
    float32). Raises UnsupportedError that names the operation whose result differs, and for units that a norm or a
    softmax sees together unless `allow_coupled`; InputError for families or units that are not there.
    """
    found = find_layout(model, example)
    return compacted(found, found.state, keep, allow_coupled=allow_coupled).module


def compacted(
    layout: ModuleLayout, state: Mapping[str, Tensor], keep: Keep, *, allow_coupled: bool = False
) -> Compaction:
    """Build the smaller module from the tensors of `state`, which may have been solved again. Raises like `compact`."""
    kept = layout.kept_atoms(keep)
    coupled = [name for name, units in keep.items() if layout.family(name).couplings and _loses(layout, name, units)]
    if coupled and not allow_coupled:
        first = layout.family(coupled[0])
        raise UnsupportedError(
            f"an operation sees all units of {len(coupled)} families at once: without some is not with zeros there",
            where=first.name,
            got=", ".join(first.couplings[:4]),
            do="leave these units in, or give allow_coupled=True and measure the result",
        )
    cut = {name: each.detach() for name, each in cut_state(layout.traced, state, kept).items()}
    removal = None
    if not coupled:
        removal = check_states(
            layout.traced,
            layout.example,
            kept,
            cut=cut,
            masked=masked_state(layout.traced, state, kept),
            whole=layout.state,
        )
    wanted = replay(layout.traced, cut, layout.example, kept)
    module = _native(layout, cut, kept, wanted)
    if module is not None:
        return Compaction(module=module, removal=removal, is_native=True)
    module = GraphModule(layout.traced, cut, kept)
    module.eval()
    if not is_equal(module, layout, wanted):
        raise UnsupportedError(
            "the graph with smaller tensors is not the module without the units", where=type(layout.model).__name__
        )
    return Compaction(module=module, removal=removal, is_native=False)


def _loses(layout: ModuleLayout, name: str, units: Sequence[int]) -> bool:
    return len(units) < layout.family(name).num_units


def _native(layout: ModuleLayout, cut: Mapping[str, Tensor], kept: Kept, wanted: Sequence[Tensor]) -> nn.Module | None:
    """Build a copy of the model that runs with the smaller tensors, None where its code does not."""
    if isinstance(layout.model, GraphModule):
        # Its code is a graph that has its sizes written in it.
        return None
    counts = {atom: len(units) for atom, units in kept.items()}
    guesses = guess(layout, counts)
    numbers = table_numbers(layout, counts)
    for clear, chosen in attempts(guesses):
        # A failed attempt may have left traces in the modules: each begins with the model as it is.
        model = copy.deepcopy(layout.model)
        put_tensors(model, cut)
        for path, module in model.named_modules(remove_duplicate=False):
            if has_numbers(module):
                for name, value in numbers(path, module).items():
                    if getattr(module, name) != value:
                        setattr(module, name, value)
        write_guesses(model, guesses, clear, chosen)
        if is_equal(model, layout, wanted):
            return model
    return None


def put_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers with their names; one that has two names stays one."""
    made: dict[Tensor, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, old in own.items():
            full = f"{path}.{name}" if path else name
            if full not in state or any(old is new for new in made.values()):
                continue
            if old not in made:
                new = state[full].detach().to(old.device, copy=True)
                made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, name, made[old])


def is_equal(module: nn.Module, layout: ModuleLayout, wanted: Sequence[Tensor]) -> bool:
    """Whether the module gives the wanted outputs for the layout's example, in evaluation mode."""
    try:
        with evaluating(module), torch.no_grad():
            found = tensors_of(module(*layout.example.args, **layout.example.kwargs))
    except Exception:
        # Stock code raises whatever it raises for sizes that it does not expect.
        return False
    return are_close(found, wanted)
