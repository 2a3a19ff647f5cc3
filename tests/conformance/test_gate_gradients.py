"""The streamed derivatives by gates are those of autograd on the whole model, with and without stand-ins.

Shape suffixes: U units of all sublayers in scope, I consumer inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from structprune.allocation.gates import GateProblem, Gates
from structprune.allocation.gates.gate import gate_problem
from structprune.engine.planning.widths import priced_sublayers, sublayers
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.gated import unit_of_input
from structprune.recipe.training import RecoverySettings
from structprune.recipe.units import ResolvedUnits
from structprune.training.calibrated import on_calibration
from structprune.training.gates.start import Start, file_name
from structprune.training.gates.student import GatedStudent, GateLoss
from structprune.types import BlockLayout, UnitGroup
from support.contexts import SEQ_LEN, context_for
from support.models import save_tiny

WINDOW = 1


class _Recorder:
    """Asks for the gates that it is given, and keeps what a step hears."""

    def __init__(self, gate_U: Tensor) -> None:
        self.state = {"gates": gate_U}
        self.heard: list[tuple[Tensor | None, Sequence[float]]] = []

    def masks(self) -> list[Tensor]:
        return [self.state["gates"]]

    def step(self, gradient_U: Tensor | None, losses: Sequence[float], share: float) -> None:
        self.heard.append((gradient_U, losses))

    def keep(self) -> Tensor:
        return self.state["gates"] > 0.5


def problem_of(context: RunContext) -> GateProblem:
    """Costs of no meaning; half of the units of each sublayer go."""
    generator = torch.Generator().manual_seed(3)
    costs: dict[str, list[Tensor]] = {}
    for block, group in sublayers(context.stock, context.kinds):
        costs.setdefault(group.kind, [torch.empty(0)] * len(context.stock.layout.blocks))
        costs[group.kind][block.index] = torch.rand(group.num_units, generator=generator).sort().values
    recipe = context.settings(ResolvedUnits)
    budgets, options = priced_sublayers(context.stock, recipe, context.kinds, costs)
    kept = [budget.num_units // 2 for budget in budgets]
    return gate_problem(budgets, options, kept, keeps_widths=False, num_steps=4, seed=0)


def write_start(context: RunContext, folder: Path, *, stand_ins: bool) -> Start:
    """Any order, and any prediction of the first half of the inputs from the second."""
    generator = torch.Generator().manual_seed(4)
    for block in context.stock.layout.blocks:
        files: dict[str, Tensor] = {}
        for group in context.groups(block):
            inputs = group.num_units * group.width
            half = group.num_units // 2 * group.width
            files[f"{group.kind}.order"] = torch.randperm(group.num_units, generator=generator)
            if stand_ins:
                files[f"{group.kind}.rest"] = torch.arange(half)
                files[f"{group.kind}.core"] = torch.arange(half, inputs)
                files[f"{group.kind}.weight"] = torch.randn(inputs - half, half, generator=generator) / 10
        save_file(files, folder / file_name(block.index))
    return Start(folder=folder)


def whole_model_gradient(
    context: RunContext,
    directory: Path,
    start: Start,
    problem: GateProblem,
    gate_U: Tensor,
    *,
    stand_ins: bool,
    by_text: bool = False,
) -> tuple[Tensor, float]:
    """Autograd on the whole model, the gates by hand: the derivative of the mean loss, and that itself."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation=context.stock.family.attention_implementation, trust_remote_code=False
    )
    model.eval().requires_grad_(False)
    ids_1S = context.windows.ids_NS[WINDOW : WINDOW + 1]
    wanted = model(input_ids=ids_1S).logits[0].log_softmax(dim=-1)
    blocks = list(model.get_submodule(context.stock.family.blocks_module).children())
    gates: list[Tensor] = []
    for budget, part in zip(problem.budgets, problem.parts(gate_U.float()), strict=True):
        gate = part.clone().requires_grad_(True)
        gates.append(gate)
        layout = context.stock.layout.blocks[budget.block]
        add_by_hand(blocks[budget.block], layout, layout.group(budget.kind), gate, start, stand_ins=stand_ins)
    found = model(input_ids=ids_1S).logits[0].log_softmax(dim=-1)
    loss = nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / SEQ_LEN
    if by_text:
        loss = nn.functional.nll_loss(found[:-1], ids_1S[0, 1:], reduction="sum") / SEQ_LEN
    return torch.cat(torch.autograd.grad(loss, gates)), float(loss.detach())


def add_by_hand(
    module: nn.Module, block: BlockLayout, group: UnitGroup, gate: Tensor, start: Start, *, stand_ins: bool
) -> None:
    order = start.order_U(block.index, group.kind)
    gate_by_number = torch.empty_like(gate).index_copy(0, order, gate)
    half = group.num_units // 2 * group.width

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        gate_I = gate_by_number[unit_of_input(group)]
        x = args[0] * gate_I
        if stand_ins:
            found = start.stand_ins(block.index, group.kind)
            assert found is not None
            first = x[..., :half] + (1 - gate_I[:half]) * (args[0][..., half:] @ found.weight_CR)
            x = torch.cat([first, x[..., half:]], dim=-1)
        return (x, *args[1:])

    module.get_submodule(group.consumer_module).register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("family", "stand_ins", "loss"),
    [
        ("llama", False, "divergence"),
        ("llama", True, "divergence"),
        ("llama", True, "text"),
        ("opt", True, "divergence"),
        ("gemma2", False, "divergence"),
        ("gpt_neox", True, "divergence"),
    ],
)
def test_gate_gradients(family: str, stand_ins: bool, loss: GateLoss, tmp_path: Path) -> None:
    directory = save_tiny(family, tmp_path / "model")
    context = context_for(directory)
    problem = problem_of(context)
    start = write_start(context, tmp_path, stand_ins=stand_ins)
    gate_U = torch.rand(len(problem.start_U), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    recorder = _Recorder(gate_U)
    settings = RecoverySettings(mode="scales", seq_len=SEQ_LEN, batch=1, learning_rate=1.0)
    recovery = on_calibration(context, context.stock, settings, context.windows)
    for uses_gradient in (True, False):
        gates = Gates(start=lambda _: recorder, paper="none", uses_gradient=uses_gradient)
        with contextlib.closing(
            GatedStudent(recovery, tmp_path, context.kinds, start, problem, gates, loss)
        ) as student:
            found = student.step([WINDOW], 1.0, 1)
            measured = student.measure([WINDOW])
        expected_U, expected = whole_model_gradient(
            context, directory, start, problem, gate_U, stand_ins=stand_ins, by_text=loss == "text"
        )
        gradient_U, losses = recorder.heard.pop()
        assert losses == [found]
        assert found == pytest.approx(expected, rel=1e-4)
        if not uses_gradient:
            assert gradient_U is None
            continue
        assert gradient_U is not None
        assert float(expected_U.norm()) > 0
        assert float((gradient_U - expected_U).norm() / expected_U.norm()) < 1e-4
        # What is measured is the divergence of the model with the units that stay.
        kept_U = recorder.keep().double()
        wanted = whole_model_gradient(context, directory, start, problem, kept_U, stand_ins=stand_ins)[1]
        assert measured == [pytest.approx(wanted, rel=1e-4)]
