"""The survey: what each removal would cost the loss, measured on the dense model before anything is pruned.

Pass 1 runs the dense blocks forward over all windows and keeps one Gram matrix per block on disk. Pass 2 walks the
blocks in reverse with the hidden states of some windows: each block is recomputed and differentiated, so the exact
gradient of the loss reaches every block border while one block is in memory. From it comes the output sensitivity
F = E[g g^T] (labels sampled from the model: the true Fisher), and with it the removal costs that allocators read.

Shape suffixes: B windows, S positions, D hidden size, T tokens, V vocabulary, U units, I consumer inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structprune.architectures.sampler import draw_tokens
from structprune.architectures.stock import output_tensor
from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.engine.embed import embed, open_store
from structprune.engine.job import Job
from structprune.engine.observer import Observer
from structprune.engine.planner import LOGIT_TOKENS
from structprune.engine.problem import layer_problem
from structprune.engine.propagate import Propagator, observed
from structprune.memory import release_free_memory
from structprune.scores import SCORES
from structprune.scores.selection import removal_path
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, Moments

Costs = dict[str, list[Tensor]]
"""Kind -> per block, the loss that each removal adds, in the order of removal, shape (units,); empty without units."""


def survey(job: Job, folder: Path, observer: Observer) -> Costs:
    """Measure every block; sensitivities stay in `folder` for the pruning pass (`load_sensitivity`)."""
    folder.mkdir()
    num_windows, seq_len = job.windows.ids_NS.shape
    hidden = job.stock.layout.hidden_size
    store = open_store(job, folder / "hidden.bin", num_windows)
    num_blocks = len(job.stock.layout.blocks)
    num_sensitivity = min(job.recipe.sensitivity_samples, num_windows)
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        propagator = embed(job, {store: num_windows})
        observer.start("survey: forward", num_blocks)
        borders: list[FileStore] = []
        for block in job.stock.layout.blocks:
            border = FileStore(folder / f"border-{block.index}.bin", (num_sensitivity, seq_len, hidden), job.dtype)
            stack.callback(border.close)
            borders.append(border)
            for start in range(num_sensitivity):
                border.write(start, store.read(start, start + 1))
            moments = _measure(job, block, _module(job, block)[1], propagator, store)
            save_file({k: m.gram_II for k, m in moments.items()}, str(folder / f"gram-{block.index}.safetensors"))
            del moments
            release_free_memory()
            observer.advance(f"block {block.index}")
        gradient = MemoryStore((num_sensitivity, seq_len, hidden), torch.float32)
        loss_gradient(job, store, gradient)
        store.close()
        release_free_memory()
        observer.start("survey: backward", num_blocks)
        costs: Costs = {kind: [] for kind in job.kinds}
        for block in reversed(job.stock.layout.blocks):
            sensitivities = backward(job, block, propagator, borders[block.index], gradient)
            save_file(sensitivities, str(folder / f"sensitivity-{block.index}.safetensors"))
            found = _costs(job, block, folder, sensitivities)
            for kind in job.kinds:
                costs[kind].insert(0, found.get(kind, torch.empty(0)))
            release_free_memory()
            observer.advance(f"block {block.index}")
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
            tensors, module = _module(job, block)
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


def _module(job: Job, block: BlockLayout) -> tuple[dict[str, Tensor], nn.Module]:
    tensors = job.reader.read(block.shapes, block.prefix)
    return tensors, job.stock.block(block.index, {n: t.to(job.device, job.dtype) for n, t in tensors.items()})


def _measure(
    job: Job, block: BlockLayout, module: nn.Module, propagator: Propagator, store: HiddenStore
) -> dict[str, Moments]:
    """Dense forward of all windows: kind -> sums of each consumer's inputs. The store moves on to the next block."""
    accumulators = {g.kind: GramAccumulator(g.num_units * g.width, job.device) for g in job.groups(block)}
    with contextlib.ExitStack() as stack:
        for group in job.groups(block):
            stack.enter_context(observed(module, group.consumer_module, accumulators[group.kind].update))
        propagator.run(module, block.index, store, write=True)
    return {
        kind: Moments(
            sum_I=a.sum_I.cpu(), num_tokens=a.num_tokens, gram_II=a.finalize(f"block {block.index} {kind}").cpu()
        )
        for kind, a in accumulators.items()
    }


def loss_gradient(job: Job, final: HiddenStore, gradient: HiddenStore) -> None:
    """Fill `gradient` with the derivative of the summed loss by the last hidden states of its windows.

    Labels are drawn from the model's own prediction at each position, so E[g g^T] is the true Fisher information.
    """
    tensors = job.reader.read(job.stock.head_tensors())
    head = job.stock.head({n: t.to(job.device, job.dtype) for n, t in tensors.items()})
    generator = torch.Generator(device=job.device).manual_seed(job.recipe.seed)
    num_windows, seq_len, hidden = gradient.shape
    for window in range(num_windows):
        hidden_SD = final.read(window, window + 1)[0].to(job.device)
        gradient_SD = torch.zeros(seq_len, hidden, device=job.device)
        # The last position predicts a token outside the window and takes no part, as in the perplexity.
        for start in range(0, seq_len - 1, LOGIT_TOKENS):
            stop = min(start + LOGIT_TOKENS, seq_len - 1)
            part_TD = hidden_SD[start:stop].detach().requires_grad_(True)
            logits_TV = head(part_TD).float()
            labels_T = draw_tokens(logits_TV.detach(), generator)[:, 0]
            loss = nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
            gradient_SD[start:stop] = torch.autograd.grad(loss, part_TD)[0].float()
        gradient.write(window, gradient_SD[None].cpu())


def backward(
    job: Job, block: BlockLayout, propagator: Propagator, border: HiddenStore, gradient: HiddenStore
) -> dict[str, Tensor]:
    """Move `gradient` from the block's output to its input; return F of each group's consumer output, (O, O).

    One window at a time: the block is recomputed from its stored input and differentiated.
    """
    _, module = _module(job, block)
    hidden_size = job.stock.layout.hidden_size
    accumulators = {group.kind: GramAccumulator(hidden_size, job.device) for group in job.groups(block)}
    outputs: dict[str, Tensor] = {}

    def keep(kind: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            outputs[kind] = output

        return hook

    handles = [module.get_submodule(g.consumer_module).register_forward_hook(keep(g.kind)) for g in job.groups(block)]
    for window in range(gradient.shape[0]):
        hidden_BSD = border.read(window, window + 1).to(job.device).requires_grad_(True)
        gradient_BSD = gradient.read(window, window + 1).to(job.device, job.dtype)
        with torch.enable_grad():
            output_BSD = output_tensor(module(hidden_BSD, **propagator.kwargs(1, block.index)))
            wanted = [hidden_BSD, *(outputs[group.kind] for group in job.groups(block))]
            found = torch.autograd.grad(output_BSD, wanted, gradient_BSD)
        # Sensitivities first: an additive consumer's gradient is the block's own, a view of what is overwritten.
        for group, grad_BSD in zip(job.groups(block), found[1:], strict=True):
            accumulators[group.kind].update(grad_BSD.reshape(-1, hidden_size))
        gradient.write(window, found[0].float().cpu())
        outputs.clear()
    for handle in handles:
        handle.remove()
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
        moments = Moments(gram_II=grams.pop(group.kind), num_tokens=job.windows.ids_NS.numel())
        problem = layer_problem(job, block, group, tensors, [moments], sensitivities[group.kind])
        result[group.kind] = removal_path(problem, group.num_units).cost
    return result
