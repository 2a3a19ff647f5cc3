"""Modes stream and scales: the student learns from the teacher's predictions, with one block of it in memory.

A step runs a batch of windows forward and keeps their states at every boundary; then the head gives the gradient of the
KL divergence, and block after block is recomputed and differentiated, its weights being updated as the gradient passes
by. Float32 weights and moments lie in memory or in files. In mode stream all parameters of the blocks learn, in mode
scales the gains of norms, biases, and a scale for every input of a consumer.

Shape suffixes: B windows, S positions, D hidden size, P parameters of a block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.architectures.stock.model import StockModel
from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.engine.planning.shapes import LEARNED_VECTORS, scale_numbers
from structprune.engine.streaming.backward import differentiate
from structprune.engine.streaming.divergence import divergence, load_heads
from structprune.engine.streaming.embed import embed, open_store
from structprune.engine.streaming.model import StreamedModel
from structprune.memory import release_free_memory
from structprune.recipe.training import RecoverySettings
from structprune.training.adam import adam_step, check_gradient
from structprune.training.context import Mode, ModeBytes, Recovered, RecoveryContext, Workplace
from structprune.training.loop import distil, recovered_by
from structprune.training.parameters import BlockParameters, States, parameters_of, scales_of
from structprune.training.snapshots import load_tensors, save_tensors
from structprune.training.teacher import Teacher
from structprune.types import BlockLayout


def _check(_: tuple[int, ...], __: StockModel) -> None:
    """Accept any pair of models."""


def _bytes(student: StockModel, settings: RecoverySettings, item: int) -> ModeBytes:
    blocks = student.layout.blocks
    return _of_numbers(student, settings, item, [block.num_parameters for block in blocks])


def _scale_bytes(student: StockModel, settings: RecoverySettings, item: int) -> ModeBytes:
    blocks = student.layout.blocks
    numbers = [scale_numbers(block) for block in blocks]
    # A consumer is scaled in float32 before it is written.
    consumers = [math.prod(block.shapes[group.consumer.tensor]) for block in blocks for group in block.groups]
    found = _of_numbers(student, settings, item, numbers)
    return replace(found, held=4 * max(consumers, default=0), weight_gradients=False)


def _of_numbers(student: StockModel, settings: RecoverySettings, item: int, numbers: Sequence[int]) -> ModeBytes:
    layout = student.layout
    boundaries = len(layout.blocks) * settings.batch * settings.seq_len * layout.hidden_size * item
    vectors = 4 * sum(numbers)
    # Two snapshots for a moment, the best weights of either, and the result.
    disk = (2 * 3 + 2 + 1) * vectors
    return ModeBytes(
        held=0, numbers=max(numbers), distils=True, resident=LEARNED_VECTORS * vectors + boundaries, disk=disk
    )


Learning = Callable[[StreamedModel, BlockLayout], BlockParameters]
"""What of a block learns."""


def _recover(context: RecoveryContext, place: Workplace, *, learning: Learning) -> Recovered:
    """Distil until windows or time are used up."""
    with contextlib.ExitStack() as stack:
        student = StreamedStudent(context, place.scratch, learning)
        stack.callback(student.close)
        history = distil(context, student, place)
        unchanged = history.best.step == 0
        result = place.scratch / "result"
        result.mkdir()
        student.save(result, moments=False)
    release_free_memory()

    def tensors(block: BlockLayout) -> Mapping[str, Tensor]:
        if unchanged:
            return context.student.reader.read(block.shapes, block.prefix)
        return learned(context.student, block, learning, result)

    return recovered_by(history, tensors)


def learned(student: StreamedModel, block: BlockLayout, learning: Learning, folder: Path) -> Mapping[str, Tensor]:
    """Return the student's block with the values that `StreamedStudent.save` left in `folder`."""
    original = student.reader.read(block.shapes, block.prefix)
    return learning(student, block).stored(original, load_tensors(_path(folder, block.index))["weights"])


class StreamedStudent:
    """The student as its blocks are streamed (`recovery.loop.Student`)."""

    def __init__(self, context: RecoveryContext, folder: Path, learning: Learning = parameters_of) -> None:
        self._context = context
        self._streamed = streamed = context.student
        self._folder = folder
        self._blocks = streamed.stock.layout.blocks
        self._parameters = [learning(streamed, block) for block in self._blocks]
        self._fixed: list[dict[str, Tensor]] = []
        sizes = [parameters.size for parameters in self._parameters]
        self._states = States(None if context.resident else folder, sizes, streamed.device)
        for block, parameters in zip(self._blocks, self._parameters, strict=True):
            tensors = streamed.reader.read(block.shapes, block.prefix)
            self._fixed.append(parameters.fixed(tensors))
            self._reset(block.index, parameters.packed(tensors, streamed.device))
            del tensors
            release_free_memory()
        num_windows = len(streamed.windows.ids_NS)
        self._inputs = open_store(streamed, folder / "inputs.bin", num_windows)
        self._propagator = embed(streamed, {self._inputs: num_windows})
        self._teacher = Teacher(context.teacher, folder / "teacher.bin")
        self._heads = load_heads(context.teacher, streamed)

    def close(self) -> None:
        self._states.close()
        self._inputs.close()
        self._teacher.close()

    @property
    def num_parameters(self) -> int:
        """Numbers that learn."""
        return sum(parameters.size for parameters in self._parameters)

    def prepare(self, windows: Sequence[int]) -> None:
        self._teacher.prepare(windows)

    def step(self, windows: Sequence[int], rate: float, number: int) -> float:
        self._teacher.ensure(windows)
        num_tokens = len(windows) * self._inputs.shape[1]
        with contextlib.ExitStack() as stack:
            boundaries = [self._boundary(stack, index, len(windows)) for index in range(len(self._blocks))]
            final = self._forward(windows, boundaries)
            gradient = MemoryStore(final.shape, torch.float32)
            loss = self._head_gradient(windows, final, gradient) / num_tokens
            for block in reversed(self._blocks):
                gradient_P = self._backward(block, boundaries[block.index], gradient)
                # Summed over the batch first: divided before, half precision would lose the small ones.
                self._update(block.index, gradient_P.div_(num_tokens), rate, number)
                del gradient_P
                release_free_memory()
        return loss

    def measure(self, windows: Sequence[int]) -> list[float]:
        self._teacher.ensure(windows)
        final = self._forward(windows, None)
        heads, seq_len = self._heads, final.shape[1]
        return [
            divergence(heads.student, heads.teacher, self._state(final, place), self._teacher.hidden_SD(number))
            / seq_len
            for place, number in enumerate(windows)
        ]

    def save(self, folder: Path, *, moments: bool) -> None:
        for block in self._blocks:
            names = ("weights", "first", "second") if moments else ("weights",)
            state_3P = self._states.read_3P(block.index)
            save_tensors(_path(folder, block.index), {n: state_3P[row].cpu() for row, n in enumerate(names)})
            del state_3P
            release_free_memory()

    def load(self, folder: Path, *, moments: bool) -> None:
        for block in self._blocks:
            found = load_tensors(_path(folder, block.index))
            if moments:
                rows = [found[name].to(self._streamed.device) for name in ("weights", "first", "second")]
                self._states.write(block.index, torch.stack(rows))
            else:
                self._reset(block.index, found["weights"].to(self._streamed.device))

    def _reset(self, index: int, weights_P: Tensor) -> None:
        """Reset the block to these weights, and its moments to zero."""
        state_3P = torch.zeros((3, len(weights_P)), device=weights_P.device)
        state_3P[0] = weights_P
        self._states.write(index, state_3P)

    def _weights_P(self, index: int) -> Tensor:
        return self._states.weights_P(index)

    def _module(self, index: int) -> nn.Module:
        return self._parameters[index].module(
            self._streamed, self._blocks[index], self._weights_P(index), self._fixed[index]
        )

    def _boundary(self, stack: contextlib.ExitStack, index: int, num_windows: int) -> HiddenStore:
        shape = (num_windows, *self._inputs.shape[1:])
        if self._context.resident:
            return MemoryStore(shape, self._streamed.dtype)
        store = FileStore(self._folder / f"border-{index}.bin", shape, self._streamed.dtype)
        stack.callback(store.close)
        return store

    def _state(self, store: HiddenStore, place: int) -> Tensor:
        return store.read(place, place + 1)[0].to(self._streamed.device)

    def _forward(self, windows: Sequence[int], boundaries: Sequence[HiddenStore] | None) -> HiddenStore:
        """Compute the states behind the last block; those in front of each block go to `boundaries`."""
        current = MemoryStore((len(windows), *self._inputs.shape[1:]), self._streamed.dtype)
        for place, number in enumerate(windows):
            current.write(place, self._inputs.read(number, number + 1))
        for block in self._blocks:
            module = self._module(block.index)
            with self._propagator.writing(current) as put:
                for place, hidden_BSD in self._propagator.read_each(current):
                    if boundaries is not None:
                        boundaries[block.index].write(place, hidden_BSD.cpu())
                    put(place, self._propagator.apply(module, block.index, hidden_BSD))
            del module
            # Each block would bring other free pages of the heap back, and none of them goes by itself.
            release_free_memory()
        return current

    def _head_gradient(self, windows: Sequence[int], final: HiddenStore, gradient: HiddenStore) -> float:
        """Fill `gradient` with the derivative of the summed divergence by the last states; that sum."""
        total = 0.0
        for place, number in enumerate(windows):
            hidden_SD = self._state(final, place)
            gradient_SD = torch.empty(hidden_SD.shape, device=hidden_SD.device)
            wanted_SD = self._teacher.hidden_SD(number)
            total += divergence(self._heads.student, self._heads.teacher, hidden_SD, wanted_SD, gradient_SD)
            gradient.write(place, gradient_SD[None].cpu())
        return total

    def _backward(self, block: BlockLayout, boundary: HiddenStore, gradient: HiddenStore) -> Tensor:
        """Move `gradient` from the block's output to its input; the summed gradient by the block's weights (P)."""
        parameters = self._parameters[block.index]
        module = self._module(block.index)
        sum_P = parameters.gradient_P(self._streamed.device)
        sums = parameters.views(sum_P)
        weights = [module.get_parameter(name) for name in parameters.shapes]

        def add(found: Sequence[Tensor]) -> None:
            for into, grad in zip(sums.values(), found, strict=True):
                into.add_(grad)

        differentiate(
            self._streamed, block, module, self._propagator, boundary, gradient, wanted=lambda: weights, receive=add
        )
        return sum_P

    def _update(self, index: int, gradient_P: Tensor, rate: float, number: int) -> None:
        check_gradient(gradient_P, f"block {index}")
        state_3P = self._states.read_3P(index)
        adam_step(state_3P, gradient_P, rate=rate, number=number)
        self._states.write(index, state_3P)


def _path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"


STREAM = Mode(check=_check, bytes=_bytes, run=partial(_recover, learning=parameters_of))
SCALES = Mode(check=_check, bytes=_scale_bytes, run=partial(_recover, learning=scales_of), keeps_zeros=True)
