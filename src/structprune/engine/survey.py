"""The survey: what each removal would cost the loss, measured on the dense model before anything is pruned.

Forward over all windows one Gram matrix per block is kept on disk. The streamed backward pass (`engine/walk.py`) brings
the exact gradient of the loss to every consumer's output. From it comes the output sensitivity F = E[g g^T] (labels
sampled from the model: the true Fisher), and with it the removal costs that allocators read.

Shape suffixes: B windows, S positions, D hidden size, T tokens, U units, I consumer inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structprune.calibration.store import HiddenStore
from structprune.engine.embed import embed, open_store
from structprune.engine.job import Job
from structprune.engine.measure import token_scale
from structprune.engine.observer import Observer
from structprune.engine.problem import layer_problem
from structprune.engine.propagate import Propagator, captured, observed
from structprune.engine.walk import Costs, differentiate, load_block, walk
from structprune.memory import release_free_memory
from structprune.scores import SCORES
from structprune.scores.selection import removal_path
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, Moments, Surveyed, UnitGroup


def survey(job: Job, folder: Path, observer: Observer) -> Costs:
    """Measure every block; sensitivities stay in `folder` for the pruning pass (`load_sensitivity`)."""
    folder.mkdir()
    costs: Costs = {kind: [] for kind in job.kinds}

    def measure(block: BlockLayout, propagator: Propagator, store: HiddenStore) -> None:
        moments = _measure(job, block, load_block(job, block)[1], propagator, store)
        save_file({k: m.gram_II for k, m in moments.items()}, str(folder / f"gram-{block.index}.safetensors"))

    def price(block: BlockLayout, propagator: Propagator, border: HiddenStore, gradient: HiddenStore) -> None:
        sensitivities = backward(job, block, propagator, border, gradient)
        save_file(sensitivities, str(folder / f"sensitivity-{block.index}.safetensors"))
        found = _costs(job, block, folder, sensitivities)
        for kind in job.kinds:
            costs[kind].insert(0, found.get(kind, torch.empty(0)))

    num_windows = len(job.windows.ids_NS)
    walk(job, folder, observer, num_windows=num_windows, labels="sampled", forward=measure, backward=price)
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
                problem = layer_problem(job, block, group, tensors, [moments.pop(group.name)])
                add_cost(found, group, SCORES.get(job.score)(problem).sort().values)
            for kind in job.kinds:
                costs[kind].append(found.get(kind, torch.empty(0)))
            release_free_memory()
            observer.advance(f"block {block.index}")
    return costs


def add_cost(costs: dict[str, Tensor], group: UnitGroup, cost_U: Tensor) -> None:
    """Add what each removal costs to the sum over the half's parts, which lose as many units each."""
    costs[group.kind] = costs[group.kind] + cost_U if group.kind in costs else cost_U


def load_sensitivity(folder: Path, block: int) -> dict[str, Tensor]:
    """Kind -> F (O, O) of one block, as `survey` left it."""
    return load_file(str(folder / f"sensitivity-{block}.safetensors"))


def _measure(
    job: Job, block: BlockLayout, module: nn.Module, propagator: Propagator, store: HiddenStore
) -> dict[str, Moments]:
    """Dense forward of all windows: name -> sums of each consumer's inputs. The store moves on to the next block."""
    accumulators = {g.name: GramAccumulator(g.num_units * g.width, job.device) for g in job.groups(block)}
    with contextlib.ExitStack() as stack:
        for group in job.groups(block):
            stack.enter_context(_consumer_inputs(module, group, accumulators[group.name].update))
        propagator.run(module, block.index, store, write=True)
    return {
        name: Moments(
            sum_I=a.sum_I.cpu(), num_tokens=a.num_tokens, gram_II=a.finalize(f"block {block.index} {name}").cpu()
        )
        for name, a in accumulators.items()
    }


@contextlib.contextmanager
def _consumer_inputs(module: nn.Module, group: UnitGroup, receive: Callable[[Tensor], None]) -> Generator[None]:
    """Inside the context the consumer's inputs go to `receive`, before a norm scaled as the problem wants them."""
    eps = group.output_norm_eps
    if eps is None:
        with observed(module, group.consumer_module, receive):
            yield
        return
    inputs: list[Tensor] = []

    def scaled(output_BSD: Tensor) -> None:
        receive(inputs.pop().float() / token_scale(output_BSD, eps))

    with observed(module, group.consumer_module, inputs.append), captured(module, group.consumer_module, scaled):
        yield


def backward(
    job: Job, block: BlockLayout, propagator: Propagator, border: HiddenStore, gradient: HiddenStore
) -> dict[str, Tensor]:
    """Move `gradient` from the block's output to its input; return F of each kind's consumer output, (O, O).

    The experts of a mixture have one F, that of their sum: each adds to it without a factor between. Before a norm it
    is that of the output over its root mean square.
    """
    _, module = load_block(job, block)
    groups = [block.group(kind) for kind in job.kinds if block.has(kind)]
    hidden_size = job.stock.layout.hidden_size
    accumulators = {group.kind: GramAccumulator(hidden_size, job.device) for group in groups}
    outputs: dict[str, Tensor] = {}

    def keep(kind: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            outputs[kind] = output

        return hook

    for group in groups:
        consumer = group.output_module or group.consumer_module
        module.get_submodule(consumer).register_forward_hook(keep(group.kind))

    def update(found: Sequence[Tensor]) -> None:
        for group, grad_BSD in zip(groups, found, strict=True):
            grad_TD = grad_BSD.reshape(-1, hidden_size)
            if group.output_norm_eps is not None:
                grad_TD = grad_TD.float() * token_scale(outputs[group.kind].detach(), group.output_norm_eps)
            accumulators[group.kind].update(grad_TD)
        outputs.clear()

    def wanted() -> list[Tensor]:
        return [outputs[group.kind] for group in groups]

    differentiate(job, block, module, propagator, border, gradient, wanted=wanted, receive=update)
    return {
        kind: (a.finalize(f"gradient of block {block.index} {kind}") / a.num_tokens).cpu()
        for kind, a in accumulators.items()
    }


def _costs(job: Job, block: BlockLayout, folder: Path, sensitivities: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kind -> loss added by each removal, by greedy removal on the dense statistics."""
    path = folder / f"gram-{block.index}.safetensors"
    grams = load_file(str(path))
    path.unlink()
    tensors = job.reader.read(block.shapes, block.prefix)
    result: dict[str, Tensor] = {}
    for group in job.groups(block):
        moments = Moments(gram_II=grams.pop(group.name), num_tokens=job.windows.ids_NS.numel())
        surveyed = Surveyed(sensitivity_OO=sensitivities[group.kind])
        problem = layer_problem(job, block, group, tensors, [moments], surveyed)
        # Prices are what this text says: shrinkage is for the choice of units, and makes the allocation worse.
        add_cost(result, group, removal_path(replace(problem, shrinkage=0.0), group.num_units).cost)
    return result
