"""The streamed backward pass gives whole-model autograd's gradients, and the sensitivities and sums that follow.

Shape suffix: U units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from structprune.architectures.stock.sampler import draw_tokens
from structprune.calibration.store import MemoryStore
from structprune.engine.layerwise.problem import layer_problem
from structprune.engine.pipelines.units import allocate
from structprune.engine.planning.shapes import LOGIT_TOKENS
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.backward_pass import loss_gradient
from structprune.engine.sensitivity.fisher import backward, fisher_pass
from structprune.engine.sensitivity.store import load_found
from structprune.engine.sensitivity.taylor import load_taylor, taylor_pass, weight_sums
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.embed import embed
from structprune.errors import NumericalError
from structprune.scores import SCORES
from structprune.types import Sensitivity, TaylorSums
from support.contexts import NUM_WINDOWS, SEQ_LEN, context_for
from support.models import TINY_MODELS, save_tiny


@pytest.fixture(scope="module", params=list(TINY_MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one kind. Do not modify."""
    return save_tiny(request.param, tmp_path_factory.mktemp("sensitivity") / "model")


def test_streamed_gradients_equal_whole_model_autograd(tiny: Path, tmp_path: Path) -> None:
    context = context_for(tiny)
    model = AutoModelForCausalLM.from_pretrained(
        tiny, attn_implementation=context.stock.family.attention_implementation
    ).eval()
    outputs: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[key] = output

        return hook

    blocks = model.get_submodule(context.stock.family.blocks_module)
    for index, block in enumerate(blocks):
        for group in context.stock.groups:
            # The experts of a mixture have one sum.
            consumer = block.get_submodule(group.output_module or group.consumer_module)
            if group.expert in (None, 0):
                consumer.register_forward_hook(keep((index, group.kind)))
    generator = torch.Generator().manual_seed(context.recipe.seed)
    expected = {
        (b.index, g.kind): torch.zeros(32, 32) for b in context.stock.layout.blocks for g in context.stock.groups
    }
    for window in range(NUM_WINDOWS):
        logits_SV = model(input_ids=context.windows.ids_NS[window : window + 1]).logits[0, :-1]
        labels_S = torch.cat(
            [draw_tokens(part.detach().softmax(dim=-1), generator)[:, 0] for part in logits_SV.split(LOGIT_TOKENS)]
        )
        model.zero_grad()
        nn.functional.cross_entropy(logits_SV, labels_S, reduction="sum").backward()
        for key, output in outputs.items():
            assert output.grad is not None
            grad_TO = output.grad.reshape(-1, 32)
            if (eps := context.stock.layout.blocks[0].group(key[1]).output_norm_eps) is not None:
                grad_TO = grad_TO * (output.detach().reshape(-1, 32).square().mean(dim=1, keepdim=True) + eps).sqrt()
            expected[key] += grad_TO.T @ grad_TO / (NUM_WINDOWS * SEQ_LEN)
    fisher_pass(context, tmp_path / "survey")
    for block in context.stock.layout.blocks:
        found = load_found(tmp_path / "survey", block.index)
        for group in context.stock.groups:
            difference = (found[group.kind] - expected[block.index, group.kind]).norm()
            assert float(difference / expected[block.index, group.kind].norm()) < 1e-5


def test_gradient_by_the_embedding_output(tiny: Path) -> None:
    """The last thing that the backward pass reaches: the derivative by the first block's input."""
    context = context_for(tiny)
    store = MemoryStore((NUM_WINDOWS, SEQ_LEN, 32), torch.float32)
    propagator = embed(context, {store: NUM_WINDOWS})
    boundaries: list[MemoryStore] = []
    for block in context.stock.layout.blocks:
        boundaries.append(MemoryStore((NUM_WINDOWS, SEQ_LEN, 32), torch.float32))
        boundaries[-1].write(0, store.read(0, NUM_WINDOWS))
        module = context.stock.block(block.index, context.reader.read(block.shapes, block.prefix))
        propagator.run(module, block.index, store)
    gradient = MemoryStore((NUM_WINDOWS, SEQ_LEN, 32), torch.float32)
    loss_gradient(context, store, gradient, "sampled")
    for block in reversed(context.stock.layout.blocks):
        backward(context, block, propagator, boundaries[block.index], gradient)

    model = AutoModelForCausalLM.from_pretrained(
        tiny, attn_implementation=context.stock.family.attention_implementation
    ).eval()
    embedded: list[torch.Tensor] = []

    def keep(_: nn.Module, __: object, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    generator = torch.Generator().manual_seed(context.recipe.seed)
    for window in range(NUM_WINDOWS):
        logits_SV = model(input_ids=context.windows.ids_NS[window : window + 1]).logits[0, :-1]
        labels_S = draw_tokens(logits_SV.detach().softmax(dim=-1), generator)[:, 0]
        nn.functional.cross_entropy(logits_SV, labels_S, reduction="sum").backward()
        expected = embedded[-1].grad
        assert expected is not None
        assert float((gradient.read(window, window + 1) - expected).norm() / expected.norm()) < 1e-5


def unstacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a mixture under the checkpoint's names: a view of each map of each expert."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if not module.endswith(".experts"):
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            maps = {"down_proj": expert}
            if last == "gate_up_proj":
                maps = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            found |= {f"{module}.{number}.{each}.weight": weight for each, weight in maps.items()}
    return found


SUMS = [field.name for field in fields(TaylorSums)]


def sums_by_autograd(
    context: RunContext, num_windows: int = NUM_WINDOWS
) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """(block, group name) -> the sums of every unit, weight by weight from whole-model gradients of the stock loss."""
    model = (
        AutoModelForCausalLM.from_pretrained(
            context.reader.directory, attn_implementation=context.stock.family.attention_implementation
        )
        .eval()
        .double()
    )
    # The products that stock code fuses over experts have no float64.
    model.config._experts_implementation = "eager"
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for window in range(num_windows):
        ids_BS = context.windows.ids_NS[window : window + 1]
        model.zero_grad()
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            mean[name] += parameter.grad / num_windows
            square[name] += parameter.grad.square() / num_windows
    weights, mean, square = unstacked(dict(model.named_parameters())), unstacked(mean), unstacked(square)
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for block in context.stock.layout.blocks:
        for group in block.groups:
            sums = {name: torch.zeros(group.num_units, dtype=torch.float64) for name in SUMS}
            for unit in range(group.num_units):
                for part in group.slices:
                    name = block.prefix + part.tensor
                    if name.endswith("bias"):
                        continue
                    rows = part.indices(torch.tensor([unit]))
                    w, g, g2 = (
                        t.detach().index_select(part.axis, rows).flatten()
                        for t in (weights[name], mean[name], square[name])
                    )
                    sums["signed_U"][unit] += w @ g
                    sums["first_U"][unit] += (w * g).abs().sum()
                    sums["second_U"][unit] += w.square() @ g2
                    sums["mixed_U"][unit] += (w * g - 0.5 * w * g2 * w).abs().sum()
            found[block.index, group.name] = sums
    return found


def assert_sums_are_those_of_autograd(context: RunContext, folder: Path) -> None:
    taylor_pass(context, folder)
    for (index, group), expected in sums_by_autograd(context, context.recipe.sensitivity_samples).items():
        found = load_taylor(folder, index)[group]
        for name in SUMS:
            difference = (getattr(found, name) - expected[name]).norm()
            assert float(difference / expected[name].norm()) < 1e-4, (index, group, name)


def test_taylor_sums_equal_whole_model_autograd(tiny: Path, tmp_path: Path) -> None:
    assert_sums_are_those_of_autograd(context_for(tiny, "llm-pruner"), tmp_path / "survey")


def test_taylor_sums_of_query_heads(tiny_llama: Path, tmp_path: Path) -> None:
    """One query head of every KV group: its q rows and o columns, not the shared keys and values."""
    assert_sums_are_those_of_autograd(context_for(tiny_llama, "llm-pruner", "query-head"), tmp_path / "survey")


def test_taylor_sums_are_of_the_first_windows(tiny_llama: Path, tmp_path: Path) -> None:
    assert_sums_are_those_of_autograd(context_for(tiny_llama, "llm-pruner", sensitivity_samples=1), tmp_path / "survey")


@pytest.mark.parametrize("score", ["taylor-first", "taylor-mix"])
def test_taylor_costs_are_the_scores_in_ascending_order(score: str, tiny_llama: Path, tmp_path: Path) -> None:
    context = context_for(tiny_llama, "llm-pruner", score=score)
    costs = taylor_pass(context, tmp_path / "survey")
    for block in context.stock.layout.blocks:
        sums = load_taylor(tmp_path / "survey", block.index)
        for group in block.groups:
            tensors, _ = load_block(context, block)
            problem = layer_problem(context, block, group, tensors, [], Sensitivity(taylor=sums[group.kind]))
            score_U = SCORES.get(score).score(problem)
            assert costs[group.kind][block.index].tolist() == sorted(score_U.tolist())


def test_closed_form_is_one_ranking_of_all_blocks(tiny_llama: Path, tmp_path: Path) -> None:
    changes = {"allocator": "closed-form", "temperature": 0.0, "sparsity": 0.25, "min_retention": 0.01}
    context = context_for(tiny_llama, "llm-pruner", score="taylor-first", protect_first=0, protect_last=0, **changes)
    context = replace(context, kinds=("mlp",))
    costs = taylor_pass(context, tmp_path / "survey")
    lowest = torch.cat(costs["mlp"]).sort(stable=True).indices[:24]
    assert allocate(context, costs) == {"mlp": [48 - int((lowest // 48 == block).sum()) for block in range(2)]}


def test_a_problem_without_statistics_holds_no_gram(tiny_llama: Path) -> None:
    context = context_for(tiny_llama, "llm-pruner", "query-head")
    block = context.stock.layout.blocks[0]
    for group in block.groups:
        problem = layer_problem(context, block, group, load_block(context, block)[0], [])
        assert problem.fit.gram_II.shape == (problem.weight_OI.shape[1],) * 2
        assert problem.fit.gram_II.untyped_storage().nbytes() <= 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_gradients_that_are_not_finite_are_an_error(value: float, tiny_llama: Path) -> None:
    """Also those whose square overflows."""
    context = context_for(tiny_llama, "llm-pruner")
    boundary, gradient = (MemoryStore((NUM_WINDOWS, SEQ_LEN, 32), torch.float32) for _ in range(2))
    propagator = embed(context, {boundary: NUM_WINDOWS})
    gradient.write(0, torch.full((NUM_WINDOWS, SEQ_LEN, 32), value))
    block = context.stock.layout.blocks[0]
    with pytest.raises(NumericalError, match=r"block 0: a gradient by '.*weight' is NaN or infinite"):
        weight_sums(context, block, load_block(context, block)[1], propagator, boundary, gradient)
