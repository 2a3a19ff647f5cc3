"""What sublayers are fitted to on the dense path, by hand: in turn, beside each other, normed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sensitivity import NUM_WINDOWS, SEQ_LEN, context_for
from torch import Tensor, nn

from structprune.architectures.stock.model import output_tensor
from structprune.calibration.store import MemoryStore
from structprune.engine.layerwise.statistics import Streams, Sublayer, follow_dense, measure
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.embed import embed
from structprune.types import Moments
from support.models import save_tiny

KINDS = ["llama", "opt", "gpt2", "gpt_neox", "gpt_neox-sequential", "phi3", "gemma2", "gemma3_text-biased"]


def traced(context: RunContext, module: nn.Module, hidden_BSD: Tensor, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The block's output, and of each consumer its input and its output, on a plain forward pass."""
    found: dict[str, Tensor] = {}

    def keep(kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[f"{kind} in"], found[f"{kind} out"] = args[0], output

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for group in context.stock.groups:
            handle = module.get_submodule(group.consumer_module).register_forward_hook(keep(group.kind))
            stack.callback(handle.remove)
        found["block"] = output_tensor(module(hidden_BSD, **kwargs))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_targets(kind: str, tmp_path: Path) -> None:
    context = context_for(save_tiny(kind, tmp_path / "model"), target="dense-path")
    shape = (NUM_WINDOWS, SEQ_LEN, 32)
    dense, pruned = MemoryStore(shape, torch.float32), MemoryStore(shape, torch.float32)
    streams = Streams(propagator=embed(context, {dense: NUM_WINDOWS}), pruned=pruned, dense=dense)
    start = {"dense": dense.read(0, NUM_WINDOWS).clone()}
    start["pruned"] = start["dense"] + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    pruned.write(0, start["pruned"])
    block = context.stock.layout.blocks[0]
    module = context.stock.block(0, context.reader.read(block.shapes, block.prefix))
    kwargs = context.stock.embed(context.windows.ids_NS, context.reader.read(context.stock.embedding_tensors()))[
        1
    ].kwargs[0]
    truth = {name: traced(context, module, hidden, kwargs) for name, hidden in start.items()}

    found: dict[str, Moments] = {}
    for stage in context.stock.stages_of(0):
        groups = [block.group(sublayer) for sublayer in stage]
        reference = follow_dense(context, block, stage, groups, module, streams)
        for group in groups:
            sublayer = Sublayer(block=block, groups=[group], module=module, streams=streams, reference=reference)
            found |= measure(context, sublayer, [(0, NUM_WINDOWS)])
        with context.stock.stage(module, 0, stage):
            streams.propagator.run(module, 0, pruned)
    torch.testing.assert_close(dense.read(0, NUM_WINDOWS), truth["dense"]["block"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pruned.read(0, NUM_WINDOWS), truth["pruned"]["block"], rtol=1e-5, atol=1e-5)

    for group in context.stock.groups:
        own, wanted = truth["pruned"], truth["dense"]
        if group.output_normed:
            target = wanted[f"{group.kind} out"]
        elif len(context.stock.stages_of(0)) == 1:
            target = wanted["block"] - (own["block"] - own[f"{group.kind} out"])
        elif group.kind == "attention":
            target = start["dense"] + wanted["attention out"] - start["pruned"]
        else:
            target = wanted["block"] - (start["pruned"] + own["attention out"])
        if group.consumer_bias is not None:
            target = target - module.get_parameter(group.consumer_bias)
        # OPT's MLP sees all tokens in one row each.
        x_TI, y_TD = own[f"{group.kind} in"].flatten(0, -2), target.flatten(0, -2)
        if group.output_norm_eps is not None:
            scale_T1 = (wanted[f"{group.kind} out"].flatten(0, -2).square().mean(1, keepdim=True) + 1e-6).sqrt()
            x_TI, y_TD = x_TI / scale_T1, y_TD / scale_T1
        moments = found[group.kind]
        if group.output_norm_eps is not None and group.kind == "attention":
            pruned.write(0, start["pruned"])
            sublayer = Sublayer(block=block, groups=[group], module=module, streams=streams)
            local = measure(context, sublayer, [(0, NUM_WINDOWS)])[group.kind]
            z_TD = own["attention out"].flatten(0, -2)
            local_TI = own["attention in"].flatten(0, -2) / (z_TD.square().mean(1, keepdim=True) + 1e-6).sqrt()
            torch.testing.assert_close(local.gram_II, local_TI.T @ local_TI, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(moments.gram_II, x_TI.T @ x_TI, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(moments.target_OI, y_TD.T @ x_TI, rtol=1e-4, atol=1e-3)
        assert moments.target_energy == pytest.approx(float(y_TD.double().square().sum()), rel=1e-4)
        weight_OI = module.get_parameter(group.consumer.tensor).movedim(group.consumer.axis, -1)
        local_OI = weight_OI @ moments.gram_II
        assert not torch.allclose(moments.target_OI, local_OI, rtol=0.01), "the streams are apart"
