"""Runs one block over every calibration window, micro-batch by micro-batch.

Shape suffixes: N windows, S positions, D hidden size, B windows of one micro-batch, T tokens, I consumer inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.stock.model import BlockInputs, output_tensor
from structprune.calibration.store import HiddenStore
from structprune.engine.streaming.transfer import Put, transfer_for
from structprune.errors import NOT_FINITE_ADVICE, NumericalError


class _Tap(nn.Module):
    """Stands where a block's consumer would: hands its input to the statistics and adds nothing to the residual."""

    def __init__(self, receive: Callable[[Tensor], None], num_outputs: int | None) -> None:
        super().__init__()
        self.receive = receive
        self.num_outputs = num_outputs

    def forward(self, x: Tensor) -> Tensor:
        self.receive(x.reshape(-1, x.shape[-1]))
        return x.new_zeros(()) if self.num_outputs is None else x.new_zeros((*x.shape[:-1], self.num_outputs))


@contextmanager
def tapped(block: nn.Module, module: str, receive: Callable[[Tensor], None], *, zeros: bool = False) -> Generator[None]:
    """Leave the consumer `module` out inside the context: its input (tokens, inputs) goes to `receive` instead.

    For an additive consumer the block's output is then its residual stream before the consumer's sum. With `zeros` it
    gives a zero for each of its outputs, as code wants that adds to them in place.
    """
    consumer = block.get_submodule(module)
    num_outputs = block.get_parameter(f"{module}.weight").shape[0] if zeros else None
    block.set_submodule(module, _Tap(receive, num_outputs))
    try:
        yield
    finally:
        block.set_submodule(module, consumer)


@contextmanager
def observed(block: nn.Module, module: str, receive: Callable[[Tensor], None]) -> Generator[None]:
    """Pass the input of `module` (tokens, inputs) to `receive` inside the context; the block computes as usual."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        receive(args[0].reshape(-1, args[0].shape[-1]))

    handle = block.get_submodule(module).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def captured(block: nn.Module, module: str, receive: Callable[[Tensor], None]) -> Generator[None]:
    """Pass the output of `module`, of whatever shape, to `receive` inside the context; the block computes as usual.

    Of several outputs, as where a mixture gives its router's numbers too, it is the first one.
    """

    def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        receive(output[0] if isinstance(output, tuple) else output)

    handle = block.get_submodule(module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_finite(output_BSD: Tensor, index: int) -> None:
    """Raise NumericalError if the hidden states behind block `index` are not finite."""
    # Extremes carry NaN and infinity along, without a temporary of the output's size.
    low, high = output_BSD.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise NumericalError(
            "the hidden states after the block are NaN or infinite",
            where=f"block {index}",
            do=NOT_FINITE_ADVICE,
        )


class Propagator:
    """One model's micro-batch loop: shape, device and the arguments that every block is called with."""

    def __init__(self, inputs: dict[int, BlockInputs], micro_batch: int, device: torch.device) -> None:
        self._inputs = inputs
        self._micro_batch = micro_batch
        self._transfer = transfer_for(device)

    def kwargs(self, num_windows: int, index: int) -> dict[str, Any]:
        """Return what the stock model passes to block `index` for a batch of `num_windows`."""
        return self._inputs[num_windows].kwargs[index]

    def batches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each micro-batch of the windows first..last, of sizes whose arguments are known."""
        start = first
        while start < last:
            size = min(self._micro_batch, last - start)
            stop = start + (size if size in self._inputs else 1)
            yield start, stop
            start = stop

    def read(self, store: HiddenStore, first: int, last: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, hidden states on the device) of each micro-batch of the windows first..last.

        The next one may be on its way already: what the loop writes is behind it, or in another store.
        """
        return self._transfer.read(store, self.batches(first, last))

    def read_each(self, store: HiddenStore, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, Tensor]]:
        """Read one window after the other: its number, among all or `numbers`, and the window by itself, (1, S, D)."""
        chosen = range(store.shape[0]) if numbers is None else numbers
        found = self._transfer.read(store, ((number, number + 1) for number in chosen))
        return ((number, hidden_BSD) for number, _, hidden_BSD in found)

    def writing(self, store: HiddenStore) -> AbstractContextManager[Put]:
        """Store what is put inside the context, by first window and from the device, at the latest at its end."""
        return self._transfer.writing(store)

    def fetch(self, store: HiddenStore, start: int, stop: int) -> Tensor:
        """Fetch some windows to the device, at once."""
        return self._transfer.fetch(store, start, stop)

    @torch.no_grad()
    def apply(self, block: nn.Module, index: int, hidden_BSD: Tensor) -> Tensor:
        """Compute the output of block `index` for a micro-batch that is on the device, and leave it there.

        Raises NumericalError if it is not finite.
        """
        output_BSD = output_tensor(block(hidden_BSD, **self.kwargs(len(hidden_BSD), index)))
        check_finite(output_BSD, index)
        return output_BSD

    def run(self, block: nn.Module, index: int, store: HiddenStore) -> None:
        """Forward every window through `block`; the outputs replace the store's content.

        Raises NumericalError if an output is not finite.
        """
        self.carry(block, index, store, store)

    def carry(self, block: nn.Module, index: int, before: HiddenStore, after: HiddenStore) -> None:
        """Forward every window of `before` through `block` into `after`. Raises NumericalError as `run` does."""
        with self.writing(after) as put:
            for start, _, hidden_BSD in self.read(before, 0, before.shape[0]):
                put(start, self.apply(block, index, hidden_BSD))
