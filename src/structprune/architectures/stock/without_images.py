"""Whether an image-text model without an image computes what its text model does as a causal model.

Both run with few tokens, random weights around the blocks, and the blocks passed through: they are modules of one
class, so what they are given, and what is made of their output, says whether all is the same.

Shape suffixes: B sequences, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from structprune.architectures.stock.placeholders import Recorder

NUM_TOKENS = 128
"""Size of the vocabulary of both models."""
_SHAPE = 2, 7
_TOLERANCE = 1e-4
# Arguments by which one may say by nothing what the other says by a tensor: positions in order, all earlier ones seen.
_SEVERAL_FORMS = ("attention_mask", "position_ids", "cache_position")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passed:
    """What the blocks of a model were given, by name, and the logits behind them."""

    given: tuple[Mapping[str, Any], ...]
    logits_BSV: Tensor


def difference(whole: Any, causal: Any, places: Mapping[str, str]) -> str | None:
    """Say in what the two models differ, None where in nothing; None too where the causal one cannot be run so.

    Both have `NUM_TOKENS` tokens and parameters on `meta`, which is where they are left. `places`: start of a name in
    `causal` -> in `whole`; the first that fits counts.
    """
    blocks = _blocks(causal)
    if blocks is None:
        return None
    inside = _place(f"{blocks}.", places).removesuffix(".")
    drawn = _draw(causal, f"{blocks}.")
    try:
        _fill(causal, drawn)
        expected = _run(causal, blocks)
        if expected is None:
            return None
        _fill(whole, {_place(name, places): tensor for name, tensor in drawn.items()})
        with _on_cpu():
            found = _run(whole, inside)
    finally:
        for model in (causal, whole):
            model.to("meta")
    if found is None:
        return "it does not run without an image"
    for index, (one, other) in enumerate(zip(found.given, expected.given, strict=True)):
        for name in sorted(one.keys() | other.keys()):
            if not _same_argument(name, one.get(name), other.get(name)):
                return f"{name} of block {index}"
    return None if _same(found.logits_BSV, expected.logits_BSV) else "the logits"


def _place(name: str, places: Mapping[str, str]) -> str:
    start = next(start for start in places if name.startswith(start))
    return places[start] + name.removeprefix(start)


def _blocks(causal: Any) -> str | None:
    """Name the list of as many modules as there are blocks, the one with most parameters."""
    count = getattr(causal.config, "num_hidden_layers", None)
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in causal.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(each) for each in module}) == 1
    }
    return max(lists, key=lambda name: lists[name]) if lists else None


def _draw(causal: Any, blocks: str) -> dict[str, Tensor]:
    """Draw weights for what is around the blocks, the same under all names of a tied one."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, parameter in causal.named_parameters(remove_duplicate=False):
        if not name.startswith(blocks):
            if id(parameter) not in drawn:
                value = torch.randn(parameter.shape, generator=generator)
                drawn[id(parameter)] = value * parameter.shape[-1] ** -0.5 if value.ndim > 1 else value.abs() + 0.5
            found[name] = drawn[id(parameter)]
    return found


def _fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))


@contextmanager
def _on_cpu() -> Generator[None]:
    """Let stock models say that they are on the CPU, inside the context: they go by their first parameter.

    That may be one of a tower that text does not pass, without storage.
    """
    own: Any = vars(PreTrainedModel).get("device")
    stock: Any = PreTrainedModel
    stock.device = property(lambda _: torch.device("cpu"))
    try:
        yield
    finally:
        if own is None:
            del stock.device
        else:
            stock.device = own


def _run(model: Any, blocks: str) -> _Passed | None:
    """Run a model with its blocks passed through, in the form that they return; None where it raises."""
    stock = model.get_submodule(blocks)
    names = list(inspect.signature(type(stock[0]).forward).parameters)[2:]
    ids_BS = torch.randint(3, NUM_TOKENS, _SHAPE, generator=torch.Generator().manual_seed(1))
    for returns_tuple in (False, True):
        recorders = [Recorder(names, is_last=False, returns_tuple=returns_tuple) for _ in stock]
        model.set_submodule(blocks, nn.ModuleList(recorders))
        try:
            with torch.no_grad():
                logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
        except Exception:
            # Stock code that wants the other form, or more of its blocks than a call, raises many types.
            continue
        finally:
            model.set_submodule(blocks, stock)
        given = tuple({"hidden_states": each.hidden_BSD, **each.kwargs} for each in recorders)
        return _Passed(given=given, logits_BSV=logits_BSV)
    return None


def _same_argument(name: str, one: Any, other: Any) -> bool:
    tensors = [any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(each)) for each in (one, other)]
    if name in _SEVERAL_FORMS and not all(tensors):
        return True
    # What is no tensor says how something is returned, or is the layer's own.
    return not any(tensors) or _same(one, other)


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of arguments are as good as equal; of what is no number, whether it is of one type."""
    first, second = (pytree.tree_leaves(each) for each in (one, other))
    return len(first) == len(second) and all(map(_close, first, second))


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)
    return type(one) is type(other)
