"""Mode lora: low-rank updates of every linear map in the blocks, by `peft`, on the whole model in memory.

The loss is that of mode stream, and so are order, learning rate and measurements. At the end the updates are added to
the weights, so the checkpoint is one like any other.

Shape suffixes: S positions, D hidden size, P numbers of all updates, one after the other.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structprune.architectures.stock.linear import linear_maps
from structprune.architectures.stock.loading import backbone, load_model, output_head
from structprune.architectures.stock.model import StockModel
from structprune.engine.streaming.divergence import divergence, load_heads
from structprune.errors import UnsupportedError
from structprune.memory import release_free_memory
from structprune.recipe.training import RecoverySettings
from structprune.training.adam import adam_step, check_gradient
from structprune.training.context import Mode, ModeBytes, Recovered, RecoveryContext, Workplace
from structprune.training.loop import distil, recovered_by
from structprune.training.parameters import BlockParameters
from structprune.training.snapshots import load_tensors, save_tensors
from structprune.training.teacher import Teacher
from structprune.types import BlockLayout

_ADAPTER = "default"


def _check(_: tuple[int, ...], __: StockModel) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UnsupportedError(
            "mode lora needs the package peft, which is not installed",
            do="pip install 'structprune[recover]', or use --mode stream",
        )


def _bytes(student: StockModel, settings: RecoverySettings, item: int) -> ModeBytes:
    layout = student.layout
    widest = max(layout.blocks, key=lambda block: block.num_parameters)
    # What a backward pass keeps of one window: inputs and outputs of the maps, and as much between them.
    width = 2 * sum(sum(shape) for shape in widest.shapes.values())
    updates = settings.rank * sum(
        sum(shape) for block in layout.blocks for shape in block.shapes.values() if len(shape) == 2
    )
    kept = len(layout.blocks) * settings.seq_len * width * item
    # The files are mapped while the model is loaded. Updates: parameters, gradients twice, and the optimiser's three.
    held = layout.num_parameters * item + student.reader.file_bytes + kept + 6 * 4 * updates
    return ModeBytes(held=held, numbers=widest.num_parameters, resident=0, disk=3 * 3 * 4 * updates)


def _recover(context: RecoveryContext, place: Workplace) -> Recovered:
    """Distil until windows or time are used up. Raises NumericalError, CheckpointError."""
    with contextlib.ExitStack() as stack:
        student = LoraStudent(context, place.scratch)
        stack.callback(student.close)
        history = distil(context, student, place)
        deltas = place.scratch / "deltas"
        deltas.mkdir()
        student.save_deltas(deltas)
        del student
    release_free_memory()

    def tensors(block: BlockLayout) -> Mapping[str, Tensor]:
        original = context.student.reader.read(block.shapes, block.prefix)
        if history.best.step == 0:
            return original
        return merged(original, load_tensors(deltas / f"block-{block.index:05d}.safetensors"))

    return recovered_by(history, tensors)


def merged(original: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the updates to the tensors in float32, in the dtypes that they are stored in."""
    return {n: (t.float() + deltas[n]).to(t.dtype) if n in deltas else t for n, t in original.items()}


class LoraStudent:
    """The whole student with its updates (`recovery.loop.Student`)."""

    def __init__(self, context: RecoveryContext, folder: Path) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self._context = context
        self._streamed = streamed = context.student
        self._teacher = Teacher(context.teacher, folder / "teacher.bin")
        self._teacher_head = load_heads(context.teacher, streamed).teacher
        model = load_model(streamed.reader, streamed.device, streamed.dtype).requires_grad_(False)
        maps = linear_maps(model, streamed.stock.layout.blocks_module)
        self._maps = [name for name in maps.names if f"{name}.weight" in streamed.reader.shapes]
        config = LoraConfig(
            r=context.settings.rank,
            lora_alpha=context.settings.rank,
            target_modules=self._maps,
            fan_in_fan_out=maps.transposed,
        )
        with torch.random.fork_rng():
            torch.manual_seed(context.settings.seed)
            self._model: Any = inject_adapter_in_model(config, model, adapter_name=_ADAPTER).eval()
        self._head = output_head(self._model)
        self._updates: dict[str, torch.nn.Parameter] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                # Float32 whatever the model's dtype is: steps are smaller than the spacing of bfloat16.
                parameter.data = parameter.data.float()
                self._updates[name] = parameter
        self._layout = BlockParameters(shapes={name: tuple(p.shape) for name, p in self._updates.items()})
        self._state_3P = torch.zeros((3, self._layout.size), device=streamed.device)
        self._state_3P[0] = self._layout.packed({n: p.detach() for n, p in self._updates.items()}, streamed.device)

    def close(self) -> None:
        self._teacher.close()

    def prepare(self, windows: Sequence[int]) -> None:
        self._teacher.prepare(windows)

    def step(self, windows: Sequence[int], rate: float, number: int) -> float:
        self._teacher.ensure(windows)
        num_tokens = len(windows) * self._streamed.windows.ids_NS.shape[1]
        total = 0.0
        for window in windows:
            with torch.enable_grad():
                hidden_SD = self._hidden_SD(window)
            gradient_SD = torch.empty(hidden_SD.shape, device=hidden_SD.device)
            wanted_SD = self._teacher.hidden_SD(window)
            total += divergence(self._head, self._teacher_head, hidden_SD, wanted_SD, gradient_SD)
            hidden_SD.backward(gradient_SD.to(hidden_SD.dtype))
            del hidden_SD
        gradients = {name: parameter.grad for name, parameter in self._updates.items()}
        gradient_P = self._layout.packed({n: g for n, g in gradients.items() if g is not None}, self._streamed.device)
        for parameter in self._updates.values():
            parameter.grad = None
        check_gradient(gradient_P.div_(num_tokens), "the low-rank updates")
        adam_step(self._state_3P, gradient_P, rate=rate, number=number)
        self._install()
        return total / num_tokens

    @torch.no_grad()
    def measure(self, windows: Sequence[int]) -> list[float]:
        self._teacher.ensure(windows)
        head, seq_len = self._teacher_head, self._streamed.windows.ids_NS.shape[1]
        return [
            divergence(self._head, head, self._hidden_SD(window), self._teacher.hidden_SD(window)) / seq_len
            for window in windows
        ]

    def save(self, folder: Path, *, moments: bool) -> None:
        save_tensors(folder / "updates.safetensors", {"state": self._state_3P[: 3 if moments else 1].cpu()})

    def load(self, folder: Path, *, moments: bool) -> None:
        found = load_tensors(folder / "updates.safetensors")["state"]
        self._state_3P.zero_()
        self._state_3P[: 3 if moments else 1] = found.to(self._streamed.device)
        self._install()

    def save_deltas(self, folder: Path) -> None:
        """Save what is to be added to each map, one file per block with relative names, float32."""
        for block in self._streamed.stock.layout.blocks:
            deltas: dict[str, Tensor] = {}
            for name in self._maps:
                if name.startswith(block.prefix):
                    layer = self._model.get_submodule(name)
                    deltas[f"{name.removeprefix(block.prefix)}.weight"] = (
                        layer.get_delta_weight(_ADAPTER).detach().cpu()
                    )
            save_tensors(folder / f"block-{block.index:05d}.safetensors", deltas)

    def _hidden_SD(self, window: int) -> Tensor:
        """Compute one window's hidden states behind the final norm."""
        ids_1S = self._streamed.windows.ids_NS[window : window + 1].to(self._streamed.device)
        return backbone(self._model)(input_ids=ids_1S, use_cache=False).last_hidden_state[0]

    def _install(self) -> None:
        with torch.no_grad():
            for name, view in self._layout.views(self._state_3P[0]).items():
                self._updates[name].copy_(view)


LORA = Mode(check=_check, bytes=_bytes, run=_recover)
