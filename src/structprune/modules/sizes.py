"""Sizes that modules keep beside their tensors, such as `in_features`: written anew where tensors are smaller.

torch's own modules are in a table. Of any other module a number that is the size of something that shrank is taken for
that size, and what is meant is found by running the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from torch import nn

from structprune.modules.costs import Counts, size_of
from structprune.modules.layout import ModuleLayout
from structprune.tracing.terms import Atom, Product, Sum, Term, resolve, split
from structprune.tracing.values import Value, arguments_of

_MAX_GUESSES = 4
"""Numbers of unclear meaning that are tried in all combinations."""
Numbers = Callable[[Any, int], dict[str, Any]]
"""Module with its new tensors, its new number of groups -> attributes by name."""


def _linear(module: Any, _: int) -> dict[str, Any]:
    return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}


def _convolution(module: Any, groups: int) -> dict[str, Any]:
    return {"out_channels": module.weight.shape[0], "in_channels": module.weight.shape[1] * groups, "groups": groups}


def _transposed(module: Any, groups: int) -> dict[str, Any]:
    return {"in_channels": module.weight.shape[0], "out_channels": module.weight.shape[1] * groups, "groups": groups}


def _features(module: Any, _: int) -> dict[str, Any]:
    given = [each for each in (module.weight, module.running_mean) if each is not None]
    return {"num_features": given[0].shape[0]} if given else {}


def _groups(module: Any, groups: int) -> dict[str, Any]:
    return {"num_channels": module.weight.shape[0], "num_groups": groups} if module.weight is not None else {}


def _normalised(module: Any, _: int) -> dict[str, Any]:
    return {"normalized_shape": tuple(module.weight.shape)} if module.weight is not None else {}


def _embedding(module: Any, _: int) -> dict[str, Any]:
    return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}


_TABLE: Sequence[tuple[tuple[type[nn.Module], ...], Numbers]] = (
    ((nn.Linear,), _linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _features),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _features),
    ((nn.GroupNorm,), _groups),
    ((nn.LayerNorm, nn.RMSNorm), _normalised),
    ((nn.Embedding,), _embedding),
    ((nn.PReLU,), lambda module, _: {"num_parameters": module.weight.shape[0]}),
)
"""torch's modules -> the numbers that follow from their tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A number of a module that may be the size of something that shrank."""

    kind: type[nn.Module]
    attribute: str
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """Numbers of modules that torch does not define."""

    clear: Mapping[str, Mapping[str, int]]
    """Path of a module -> its numbers that equal only sizes that shrank, with what those are now."""
    unclear: tuple[Guess, ...]
    """Numbers that equal both a size that shrank and one that did not, or several."""


def table_numbers(layout: ModuleLayout, counts: Counts) -> Callable[[str, nn.Module], dict[str, Any]]:
    """Return the function that gives the numbers of one of torch's modules by its path and its new tensors."""

    def numbers(path: str, module: nn.Module) -> dict[str, Any]:
        for kinds, find in _TABLE:
            if isinstance(module, kinds):
                return find(module, _num_groups(layout, f"{path}.weight" if path else "weight", counts))
        return {}

    return numbers


def has_numbers(module: nn.Module) -> bool:
    """Whether the module is in the table of torch's own."""
    return any(isinstance(module, kinds) for kinds, _ in _TABLE)


def _num_groups(layout: ModuleLayout, weight: str, counts: Counts) -> int:
    """Count the groups that the operation with this weight has left; 1 where it has none."""
    for use in layout.uses.get(weight, ()):
        arguments = arguments_of(use.node)
        groups = arguments.get("groups", arguments.get("num_groups"))
        value = layout.traced.values.get(arguments.get("input"))  # pyright: ignore[reportArgumentType]
        if isinstance(groups, int) and isinstance(value, Value):
            return size_of(split(value.dims[1], groups, weight)[0], counts) if groups > 1 else 1
    return 1


def guess(layout: ModuleLayout, counts: Counts) -> Guesses:
    """Compare the numbers of all other modules with the sizes of what is inside them."""
    clear: dict[str, dict[str, int]] = {}
    unclear: dict[Guess, None] = {}
    for path, module in layout.model.named_modules():
        own = {name: value for name, value in vars(module).items() if type(value) is int and value > 1}
        if has_numbers(module) or not own:
            continue
        inside = f"{path}." if path else ""
        sizes: dict[int, set[int]] = {}
        for name, dims in layout.traced.parameters.items():
            if name.startswith(inside):
                for before, after in chain.from_iterable(_sizes(term, counts) for term in dims):
                    sizes.setdefault(before, set()).add(after)
        for name, value in own.items():
            changed = sorted(sizes.get(value, {value}) - {value})
            if len(changed) == 1 and value not in sizes[value]:
                clear.setdefault(path, {})[name] = changed[0]
            else:
                for after in changed:
                    unclear[Guess(kind=type(module), attribute=name, before=value, after=after)] = None
    return Guesses(clear=clear, unclear=tuple(unclear))


def _sizes(term: Term, counts: Counts) -> Iterator[tuple[int, int]]:
    """Yield the size of an axis and of every part that a view of it may have: (before, after)."""
    term = resolve(term)
    yield term.size, size_of(term, counts)
    if isinstance(term, Atom):
        return
    if isinstance(term, Product):
        for start in range(len(term.factors)):
            for end in range(start + 1, len(term.factors) + (start > 0)):
                part = Product(term.factors[start:end])
                yield part.size, size_of(part, counts)
    assert isinstance(term, Product | Sum)
    for part in term.factors if isinstance(term, Product) else term.parts:
        yield from _sizes(part, counts)


def attempts(guesses: Guesses) -> Iterator[tuple[bool, tuple[Guess, ...]]]:
    """Yield what to try, the likeliest first: (whether to write the clear numbers, unclear ones to write)."""
    unclear = guesses.unclear[:_MAX_GUESSES]
    yield True, ()
    if guesses.clear:
        yield False, ()
    for count in range(1, len(unclear) + 1):
        for chosen in combinations(unclear, count):
            yield True, chosen


def write_guesses(model: nn.Module, guesses: Guesses, clear: bool, chosen: Sequence[Guess]) -> None:
    """Write numbers into the modules of `model`."""
    for path, module in model.named_modules():
        if clear:
            for name, value in guesses.clear.get(path, {}).items():
                setattr(module, name, value)
        for each in chosen:
            if type(module) is each.kind and vars(module).get(each.attribute) == each.before:
                setattr(module, each.attribute, each.after)
