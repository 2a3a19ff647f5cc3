"""What a piece of stock code holds as it runs, counted on `meta`: every result of an operation, until it is freed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from structprune.architectures.stock.model import StockModel, block_arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBytes:
    """Bytes beside inputs and weights."""

    peak: int = 0
    """What is there at once, at most."""
    total: int = 0
    """What all operations give together: no more than what a backward pass keeps of them."""


class _Counter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations give, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.total = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            # A view has the storage of what it is a view of.
            key = _key(storage)
            if key not in given and key not in self._known:
                self._known.add(key)
                self.now += storage.nbytes()
                self.total += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def _key(storage: torch.UntypedStorage) -> int:
    return storage._cdata  # pyright: ignore[reportPrivateUsage]


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]


def forward_bytes(run: Callable[[], object]) -> ForwardBytes:
    """Count what `run` holds beside what is there before; its tensors are on `meta`."""
    counter = _Counter()
    with torch.no_grad(), counter:
        run()
    return ForwardBytes(peak=counter.peak, total=counter.total)


def mixer_memory(stock: StockModel, seq_len: int, dtype: torch.dtype) -> dict[frozenset[str], ForwardBytes]:
    """Count what one window holds where blocks mix positions without attention, for each sort of such blocks.

    A sort is named by its tensors. Nothing has storage but what the stock model hands its blocks.
    """
    sorts = {
        frozenset(block.shapes): block for block in stock.layout.blocks if stock.has_sublayer(block.index, "mixer")
    }
    if not sorts:
        return {}
    arguments = block_arguments(stock, seq_len, dtype, torch.device("cpu"))
    found: dict[frozenset[str], ForwardBytes] = {}
    for sort, block in sorts.items():
        tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in block.shapes.items()}
        module = stock.block(block.index, tensors).to("meta")
        kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments[block.index])
        hidden_BSD = torch.empty(1, seq_len, stock.layout.hidden_size, dtype=dtype, device="meta")
        with stock.stage(module, block.index, stock.stage_of(block.index, "mixer")):
            found[sort] = forward_bytes(functools.partial(module, hidden_BSD, **kwargs))
    return found
