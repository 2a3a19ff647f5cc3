"""Mode blocks: each block alone learns to give the teacher's stream at its boundary, from the recovered student's
stream.

The loss is the mean over tokens of |output - wanted|^2 / |wanted|^2: a few tokens' states are a thousand times longer
than the others', and a plain sum would be theirs alone.

Shape suffixes: B windows, S positions, D hidden size, P parameters of the block.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.architectures.stock.model import StockModel, output_tensor
from structprune.calibration.store import HiddenStore
from structprune.engine.run.finalize import MANIFEST_NAME
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.embed import embed, open_store
from structprune.engine.streaming.propagate import Propagator
from structprune.errors import InputError
from structprune.files import write_text
from structprune.memory import format_bytes, release_free_memory
from structprune.recipe.training import RecoverySettings
from structprune.results.recovery import RecoveredBlock
from structprune.training.adam import adam_step, check_gradient, course
from structprune.training.context import Mode, ModeBytes, Recovered, RecoveryContext, Workplace
from structprune.training.parameters import BlockParameters, parameters_of
from structprune.training.snapshots import load_tensors, load_text, save_tensors
from structprune.types import BlockLayout

# Passes in a row without a new least error after which a block's training ends; one alone may be the learning rate's
# fault, which falls to the last.
_PATIENCE = 2


def _check(targets: tuple[int, ...], student: StockModel) -> None:
    """Raise InputError if it is not known which of the teacher's blocks are left."""
    if not targets:
        raise InputError(
            "which of the teacher's blocks the student still has is not known",
            where=str(student.reader.directory / MANIFEST_NAME),
            wanted="the manifest of a run that removed blocks from this very teacher",
            do="use --mode stream, or give that teacher",
        )


def _bytes(student: StockModel, settings: RecoverySettings, item: int) -> ModeBytes:
    stored = sum(student.reader.num_bytes(block.prefix + n for n in block.shapes) for block in student.layout.blocks)
    numbers = max(block.num_parameters for block in student.layout.blocks)
    return ModeBytes(held=0, numbers=numbers, resident=0, disk=stored)


def _recover(context: RecoveryContext, place: Workplace) -> Recovered:
    """Go over the student's blocks in order.

    A block whose file and report are there already, from a run that was cut, is only run again.
    """
    blocks = context.student.stock.layout.blocks
    num_windows = len(context.texts.windows.ids_NS)
    reports: list[RecoveredBlock] = []
    started, limit = time.perf_counter(), context.settings.limit_s
    with contextlib.ExitStack() as stack:
        stores: list[HiddenStore] = []
        for name, streamed in (("student", context.student), ("teacher", context.teacher)):
            store = open_store(streamed, place.scratch / f"{name}.bin", num_windows)
            stack.callback(store.close)
            stores.append(store)
        student, teacher = stores
        propagator = embed(context.student, {student: num_windows})
        dense = embed(context.teacher, {teacher: num_windows})
        passed = 0
        context.observer.start("recover", len(blocks))
        for block, target in zip(blocks, context.targets, strict=True):
            for other in context.teacher.stock.layout.blocks[passed:target]:
                dense.run(load_block(context.teacher, other)[1], other.index, teacher)
                release_free_memory()
            passed = target
            report = _saved_report(place.folder, block.index)
            if report is None:
                left = None if limit is None else limit - (time.perf_counter() - started)
                share = None if left is None else left / (len(blocks) - block.index)
                trainer = BlockTrainer(context, block, propagator, student, teacher)
                tensors, report = trainer.train(target, share)
                save_tensors(_path(place.folder, block.index), tensors)
                write_text(_path(place.folder, block.index, ".json"), report.model_dump_json())
                del trainer
            else:
                tensors = load_tensors(_path(place.folder, block.index))
            reports.append(report)
            cast = {n: t.to(context.student.device, context.student.dtype) for n, t in tensors.items()}
            del tensors
            propagator.run(context.student.stock.block(block.index, cast), block.index, student)
            del cast
            release_free_memory()
            context.observer.advance(
                f"block {block.index}  held-out error {report.error_before:.5f} -> {report.error_after:.5f}  "
                f"memory {format_bytes(context.student.meter.peak_so_far())}"
            )

    def read(block: BlockLayout) -> Mapping[str, Tensor]:
        return load_tensors(_path(place.folder, block.index))

    return Recovered(
        tensors=read,
        blocks=reports,
        trace=[],
        evaluations=[],
        tokens=sum(entry.tokens for entry in reports) // len(blocks),
        drawn=[],
        train_seconds=sum(entry.seconds for entry in reports),
    )


def token_error(output_BSD: Tensor, wanted_BSD: Tensor) -> Tensor:
    """Sum over tokens of |output - wanted|^2 / |wanted|^2, float32, differentiable by the output."""
    wanted = wanted_BSD.float()
    scale = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output_BSD.float() - wanted).square().sum(-1) / scale).sum()


@dataclass(slots=True)
class BlockTrainer:
    """One block, its two streams and its optimiser."""

    context: RecoveryContext
    block: BlockLayout
    propagator: Propagator
    student: HiddenStore
    """The block's input, all windows."""
    teacher: HiddenStore
    """The wanted output."""

    def train(self, target: int, share_s: float | None) -> tuple[dict[str, Tensor], RecoveredBlock]:
        """Train the block for at most `share_s` seconds; return its tensors as stored, and how they came about.

        They are the original ones unless the held-out windows are met better. Raises NumericalError.
        """
        started = time.perf_counter()
        settings, streamed = self.context.settings, self.context.student
        original = streamed.reader.read(self.block.shapes, self.block.prefix)
        parameters = parameters_of(streamed, self.block)
        fixed = {n: t for n, t in original.items() if n not in parameters.shapes}
        state_3P = torch.zeros((3, parameters.size), device=streamed.device)
        state_3P[0] = parameters.packed(original, streamed.device)
        module = parameters.module(streamed, self.block, state_3P[0], fixed)
        before = best = self.error(module)
        best_P: Tensor | None = None
        windows = self.context.texts.all_train
        per_pass = -(-len(windows) // settings.batch)
        step = epochs = seen = in_vain = 0
        while epochs < settings.epochs and parameters.size and (share_s is None or share_s > 0):
            order = torch.randperm(
                len(windows),
                generator=torch.Generator().manual_seed((settings.seed * 1009 + self.block.index) * 1009 + epochs),
            )
            late = False
            for start in range(0, len(windows), settings.batch):
                done = step / (settings.epochs * per_pass)
                if share_s is not None:
                    elapsed = (time.perf_counter() - started) / share_s
                    done, late = max(done, elapsed), elapsed >= 1
                    if late:
                        break
                chosen = [windows[i] for i in order[start : start + settings.batch]]
                gradient_P = self._gradient(module, parameters, chosen)
                step += 1
                seen += len(chosen)
                rate = settings.learning_rate * course(step - 1, settings.warmup, done)
                adam_step(state_3P, gradient_P, rate=rate, number=step)
                with torch.no_grad():
                    for name, view in parameters.views(state_3P[0]).items():
                        module.get_parameter(name).copy_(view)
            epochs += 1
            error = self.error(module)
            in_vain = 0 if error < best else in_vain + 1
            if error < best:
                best, best_P = error, state_3P[0].clone()
            if late or in_vain == _PATIENCE:
                break
        tensors = original if best_P is None else parameters.stored(original, best_P)
        return tensors, RecoveredBlock(
            block=self.block.index,
            target=target,
            error_before=before,
            error_after=best,
            epochs=epochs,
            tokens=seen * self.student.shape[1],
            changed=best_P is not None,
            seconds=time.perf_counter() - started,
        )

    @torch.no_grad()
    def error(self, module: nn.Module) -> float:
        """Compute the mean error of the held-out tokens."""
        held_out = self.context.texts.all_held_out
        total = sum(float(self._loss(module, number)) for number in held_out)
        return total / (len(held_out) * self.student.shape[1])

    def _loss(self, module: nn.Module, number: int) -> Tensor:
        hidden_BSD = self.student.read(number, number + 1).to(self.context.student.device)
        output_BSD = output_tensor(module(hidden_BSD, **self.propagator.kwargs(1, self.block.index)))
        return token_error(output_BSD, self.teacher.read(number, number + 1).to(self.context.student.device))

    def _gradient(self, module: nn.Module, parameters: BlockParameters, windows: list[int]) -> Tensor:
        """Compute the gradient of the mean error of these windows' tokens."""
        gradient_P = parameters.gradient_P(self.context.student.device)
        sums = parameters.views(gradient_P)
        weights = [module.get_parameter(name) for name in parameters.shapes]
        for number in windows:
            with torch.enable_grad():
                loss = self._loss(module, number)
                # Zeros for an expert that no token of the window is sent to.
                found = torch.autograd.grad(loss, weights, materialize_grads=True)
            for into, grad in zip(sums.values(), found, strict=True):
                into.add_(grad)
            del found, loss
        check_gradient(gradient_P, f"block {self.block.index}")
        return gradient_P.div_(len(windows) * self.student.shape[1])


def _path(folder: Path, index: int, suffix: str = ".safetensors") -> Path:
    return folder / f"block-{index:05d}{suffix}"


def _saved_report(folder: Path, index: int) -> RecoveredBlock | None:
    """Load the report of a block that an earlier run had finished; its tensors were written before."""
    path = _path(folder, index, ".json")
    return load_text(path, RecoveredBlock) if path.is_file() else None


BLOCKS = Mode(check=_check, bytes=_bytes, run=_recover)
