"""The survey: what each removal would cost the loss, measured on the dense model before anything is pruned.

The streamed backward pass (`engine/walk.py`) recomputes each block and brings the exact gradient of the loss to every
consumer's output. From the two come the Gram matrix of the consumer's inputs and the output sensitivity F = E[g g^T]
(labels sampled from the model: the true Fisher), and from those the removal costs that allocators read.

Shape suffixes: B windows, S positions, D hidden size, T tokens, U units, I consumer inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structprune.calibration.store import HiddenStore
from structprune.engine.embed import embed, open_store
from structprune.engine.job import Job
from structprune.engine.observer import Observer
from structprune.engine.problem import layer_problem
from structprune.engine.propagate import Propagator, observed
from structprune.engine.walk import Costs, differentiate, load_block, walk
from structprune.memory import release_free_memory
from structprune.scores import SCORES
from structprune.scores.selection import removal_path
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, Moments, Surveyed


def survey(job: Job, folder: Path, observer: Observer) -> Costs:
    """Measure every block; sensitivities stay in `folder` for the pruning pass (`load_sensitivity`)."""
    folder.mkdir()
    costs: Costs = {kind: [] for kind in job.kinds}

    def price(block: BlockLayout, propagator: Propagator, border: HiddenStore, gradient: HiddenStore) -> None:
        measured = backward(job, block, propagator, border, gradient)
        sensitivities = {kind: part.sensitivity_OO for kind, part in measured.items()}
        save_file(sensitivities, str(folder / f"sensitivity-{block.index}.safetensors"))
        found = _costs(job, block, measured)
        for kind in job.kinds:
            costs[kind].insert(0, found.get(kind, torch.empty(0)))

    walk(job, folder, observer, labels="sampled", backward=price)
    return costs


def survey_scores(job: Job, folder: Path, observer: Observer) -> Costs:
    """Score every unit on the dense model, in one forward pass; ascending, as the lowest go first."""
    folder.mkdir()
    costs: Costs = {kind: [] for kind in job.kinds}
    num_windows = job.windows.ids_NS.shape[0]
    with contextlib.ExitStack() as stack:
        store = open_store(job, folder / "hidden.bin", num_windows)
        stack.callback(store.close)
        propagator = embed(job, {store: num_windows})
        observer.start("survey: scores", len(job.stock.layout.blocks))
        for block in job.stock.layout.blocks:
            tensors, module = load_block(job, block)
            moments = _measure(job, block, module, propagator, store)
            found: dict[str, Tensor] = {}
            for group in job.groups(block):
                problem = layer_problem(job, block, group, tensors, [moments.pop(group.kind)])
                found[group.kind] = SCORES.get(job.score)(problem).sort().values
            for kind in job.kinds:
                costs[kind].append(found.get(kind, torch.empty(0)))
            release_free_memory()
            observer.advance(f"block {block.index}")
    return costs


def load_sensitivity(folder: Path, block: int) -> dict[str, Tensor]:
    """Kind -> F (O, O) of one block, as `survey` left it."""
    return load_file(str(folder / f"sensitivity-{block}.safetensors"))


def _measure(
    job: Job, block: BlockLayout, module: nn.Module, propagator: Propagator, store: HiddenStore
) -> dict[str, Moments]:
    """Dense forward of all windows: kind -> sums of each consumer's inputs. The store moves on to the next block."""
    accumulators = {g.kind: GramAccumulator(g.num_units * g.width, job.device) for g in job.groups(block)}
    with contextlib.ExitStack() as stack:
        for group in job.groups(block):
            stack.enter_context(observed(module, group.consumer_module, accumulators[group.kind].update))
        propagator.run(module, block.index, store, write=True)
    return {kind: _moments(a, f"block {block.index} {kind}") for kind, a in accumulators.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one block's recomputation and its gradient leave of one consumer."""

    moments: Moments
    sensitivity_OO: Tensor
    """E[g g^T], g the gradient of the summed loss by the consumer's output at one token."""


def backward(
    job: Job, block: BlockLayout, propagator: Propagator, border: HiddenStore, gradient: HiddenStore
) -> dict[str, Measured]:
    """Move `gradient` from the block's output to its input; kind -> sums of the consumer's inputs and gradients."""
    _, module = load_block(job, block)
    groups = job.groups(block)
    hidden_size = job.stock.layout.hidden_size
    inputs = {group.kind: GramAccumulator(group.num_units * group.width, job.device) for group in groups}
    gradients = {group.kind: GramAccumulator(hidden_size, job.device) for group in groups}
    outputs: dict[str, Tensor] = {}

    def keep(kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[kind].update(args[0].detach().reshape(-1, args[0].shape[-1]))
            outputs[kind] = output

        return hook

    for group in groups:
        module.get_submodule(group.consumer_module).register_forward_hook(keep(group.kind))

    def update(found: Sequence[Tensor]) -> None:
        for group, grad_BSD in zip(groups, found, strict=True):
            gradients[group.kind].update(grad_BSD.reshape(-1, hidden_size))
        outputs.clear()

    def wanted() -> list[Tensor]:
        return [outputs[group.kind] for group in groups]

    differentiate(job, block, module, propagator, border, gradient, wanted=wanted, receive=update)
    return {
        kind: Measured(
            moments=_moments(inputs[kind], f"block {block.index} {kind}"),
            sensitivity_OO=(a.finalize(f"gradient of block {block.index} {kind}") / a.num_tokens).cpu(),
        )
        for kind, a in gradients.items()
    }


def _moments(accumulator: GramAccumulator, where: str) -> Moments:
    return Moments(
        sum_I=accumulator.sum_I.cpu(), num_tokens=accumulator.num_tokens, gram_II=accumulator.finalize(where).cpu()
    )


def _costs(job: Job, block: BlockLayout, measured: dict[str, Measured]) -> dict[str, Tensor]:
    """Kind -> loss added by each removal, by greedy removal on the dense statistics, which are used up."""
    tensors = job.reader.read(block.shapes, block.prefix)
    result: dict[str, Tensor] = {}
    for group in job.groups(block):
        part = measured.pop(group.kind)
        surveyed = Surveyed(sensitivity_OO=part.sensitivity_OO)
        problem = layer_problem(job, block, group, tensors, [part.moments], surveyed)
        del part
        # Prices are what this text says: shrinkage is for the choice of units, and makes the allocation worse.
        result[group.kind] = removal_path(replace(problem, shrinkage=0.0), group.num_units).cost
    return result
