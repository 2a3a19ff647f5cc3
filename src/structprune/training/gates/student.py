"""The dense model with gates, as a model that learns: its blocks are streamed, and only the gates take gradients.

A step runs one window through the model with the gates that the learner asks for, and gives it the loss, the KL
divergence from the dense model or that of the text, and its derivative by every gate. What is measured is always the
model with the units that would stay.

Shape suffixes: P gates of a block, U units of all sublayers in scope.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from structprune.allocation import BlockBudget
from structprune.allocation.gates import GateLearner, GateProblem, Gates
from structprune.calibration.store import HiddenStore
from structprune.engine.streaming.divergence import text_loss
from structprune.engine.streaming.gated import add_gate
from structprune.engine.streaming.model import StreamedModel
from structprune.training.adam import check_gradient
from structprune.training.context import RecoveryContext
from structprune.training.gates.start import Place, Start
from structprune.training.parameters import BlockParameters
from structprune.training.snapshots import load_tensors, save_tensors
from structprune.training.stream import StreamedStudent
from structprune.types import BlockLayout, UnitGroup, UnitKind

GateLoss = Literal["divergence", "text"]
"""What gates lower: the divergence from the dense model, or the loss of the text's own next tokens."""
_GATE = "structprune_gate"
_LEARNER, _CHOICE = "learner.safetensors", "choice.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateParameters(BlockParameters):
    """One gate for each unit of a block's sublayers in scope, in order of unit numbers; nothing else learns."""

    groups: Mapping[str, UnitGroup]
    """Name of the parameter -> the units it gates."""
    start: Start

    def fixed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def packed(self, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
        return torch.ones(self.size, device=device)

    def module(
        self, streamed: StreamedModel, block: BlockLayout, flat_P: Tensor, fixed: Mapping[str, Tensor]
    ) -> nn.Module:
        tensors = streamed.reader.read(block.shapes, block.prefix)
        put = partial(Tensor.to, device=streamed.device, dtype=streamed.dtype)
        layer = streamed.stock.block(block.index, {name: put(tensor) for name, tensor in tensors.items()})
        for name, gate_U in self.views(flat_P).items():
            group = self.groups[name]
            stand_ins = self.start.stand_ins(block.index, group.kind)
            placed = None if stand_ins is None else stand_ins.to(streamed.device, streamed.dtype)
            add_gate(layer, group, _GATE, gate_U.clone(), placed)
        return layer


def gates_of(streamed: StreamedModel, block: BlockLayout, kinds: Sequence[UnitKind], start: Start) -> GateParameters:
    """Return the gates of a block: one for each unit of its sublayers of these kinds."""
    groups = {f"{group.consumer_module}.{_GATE}": group for kind in kinds for group in block.groups_of(kind)}
    shapes = {name: (group.num_units,) for name, group in groups.items()}
    return GateParameters(shapes=shapes, groups=groups, start=start)


class GatedStudent(StreamedStudent):
    """The dense model with gates (`training.loop.Student`)."""

    def __init__(
        self,
        context: RecoveryContext,
        folder: Path,
        kinds: Sequence[UnitKind],
        start: Start,
        problem: GateProblem,
        gates: Gates,
        loss: GateLoss = "divergence",
    ) -> None:
        # Few enough to stay in memory wherever the states of the blocks are.
        self._flat: dict[int, Tensor] = {}
        super().__init__(context, folder, partial(gates_of, kinds=kinds, start=start))
        self._problem = problem
        self._gates = gates
        self._by_text = loss == "text"
        self._learner: GateLearner = gates.start(problem)
        self._chosen: Tensor | None = None
        self._orders = {place(b): start.order_U(*place(b)) for b in problem.budgets}
        self._found: dict[int, Tensor] = {}

    def choice(self) -> Tensor:
        """Return the units that stay, in order of removal: those that were loaded, or by what was learned so far."""
        return self._learner.keep() if self._chosen is None else self._chosen

    def step(self, windows: Sequence[int], rate: float, number: int) -> float:
        losses: list[float] = []
        for gate_U in self._learner.masks():
            self._put(gate_U)
            losses.append(super().step(windows, rate, number) if self._gates.uses_gradient else self._loss(windows))
        self._learner.step(self._gradient_U() if self._gates.uses_gradient else None, losses, rate)
        return sum(losses) / len(losses)

    def measure(self, windows: Sequence[int]) -> list[float]:
        self._put(self.choice().double())
        return super().measure(windows)

    def save(self, folder: Path, *, moments: bool) -> None:
        if moments:
            save_tensors(folder / _LEARNER, self._learner.state)
        else:
            save_tensors(folder / _CHOICE, {"keep": self.choice()})

    def load(self, folder: Path, *, moments: bool) -> None:
        if moments:
            self._learner.state = load_tensors(folder / _LEARNER)
        else:
            self._chosen = load_tensors(folder / _CHOICE)["keep"]

    def _loss(self, windows: Sequence[int]) -> float:
        """Measure the mean loss per token with the gates as they are put."""
        if not self._by_text:
            found = super().measure(windows)
            return sum(found) / len(found)
        final = self._forward(windows, None)
        return sum(self._text_losses(windows, final)) / (len(windows) * final.shape[1])

    def _head_gradient(self, windows: Sequence[int], final: HiddenStore, gradient: HiddenStore) -> float:
        if not self._by_text:
            return super()._head_gradient(windows, final, gradient)
        return sum(self._text_losses(windows, final, gradient))

    def _text_losses(
        self, windows: Sequence[int], final: HiddenStore, gradient: HiddenStore | None = None
    ) -> Iterator[float]:
        """Yield each window's summed loss of its next tokens; the derivatives go to `gradient`."""
        for place, number in enumerate(windows):
            hidden_SD = self._state(final, place)
            ids_S = self._streamed.windows.ids_NS[number].to(hidden_SD.device)
            gradient_SD = None if gradient is None else torch.empty(hidden_SD.shape, device=hidden_SD.device)
            yield text_loss(self._heads.student, hidden_SD, ids_S, gradient_SD)
            if gradient is not None and gradient_SD is not None:
                gradient.write(place, gradient_SD[None].cpu())

    def _update(self, index: int, gradient_P: Tensor, rate: float, number: int) -> None:
        check_gradient(gradient_P, f"block {index}")
        self._found[index] = gradient_P.cpu().double()

    def _reset(self, index: int, weights_P: Tensor) -> None:
        self._flat[index] = weights_P

    def _weights_P(self, index: int) -> Tensor:
        return self._flat[index]

    def _put(self, gate_U: Tensor) -> None:
        """Set every block's gates, which lie by unit number there."""
        by_place = {place(b): part for b, part in zip(self._problem.budgets, self._problem.parts(gate_U), strict=True)}
        for block in self._blocks:
            parameters = self._parameters[block.index]
            assert isinstance(parameters, GateParameters)
            flat_P = torch.ones(parameters.size)
            for name, view_U in parameters.views(flat_P).items():
                here = block.index, parameters.groups[name].kind
                view_U[self._orders[here]] = by_place[here].float()
            self._reset(block.index, flat_P.to(self._streamed.device))

    def _gradient_U(self) -> Tensor:
        """Return the derivative of the loss by every gate, in order of removal."""
        parts: dict[Place, Tensor] = {}
        for block in self._blocks:
            parameters = self._parameters[block.index]
            assert isinstance(parameters, GateParameters)
            for name, view_U in parameters.views(self._found[block.index]).items():
                here = block.index, parameters.groups[name].kind
                parts[here] = view_U[self._orders[here]]
        return torch.cat([parts[place(budget)] for budget in self._problem.budgets])


def place(budget: BlockBudget) -> Place:
    """Return the block and the kind of a sublayer."""
    return budget.block, budget.kind
