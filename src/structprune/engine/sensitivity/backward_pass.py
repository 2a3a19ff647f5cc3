"""The streamed backward pass: the gradient of the loss at every block boundary, one block in memory at a time.

Forward, the hidden states of some windows are kept on disk at every boundary. Then the blocks are visited in reverse:
each is recomputed from its stored input and differentiated, so the exact gradient moves on by one boundary. What is
measured on the way back is the caller's.

Shape suffixes: B windows, S positions, D hidden size, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from structprune.architectures.stock.sampler import draw_tokens, skip_tokens
from structprune.calibration.snapshots import Snapshots
from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.engine.planning.shapes import LOGIT_TOKENS
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.store import Costs, SensitivityStore
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.embed import embed
from structprune.engine.streaming.propagate import Propagator
from structprune.memory import release_free_memory
from structprune.phases import Phase
from structprune.ranks import Task
from structprune.types import BlockLayout

Labels = Literal["sampled", "text"]
"""The loss is that of labels drawn from the model's own prediction, or of the calibration text's next tokens."""
Found = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""What the pruning pass will read of the block, and kind -> cost of each removal."""
Backward = Callable[[BlockLayout, Propagator, HiddenStore, HiddenStore, int], Callable[[], Found]]
"""(block, micro-batch loop, the block's stored input, gradient, owner): moves the gradient to the block's input.

All ranks give their sums to the owner. Returns what makes the sensitivities of them; it is called there only.
"""


def backward_pass(context: RunContext, folder: Path, *, labels: Labels, backward: Backward) -> Costs:
    """Visit every block forward, then in reverse with the gradient of the loss.

    Of the calibration windows only the first `sensitivity_samples` take part. What `backward` returns stays in `folder`
    (`store.py`); the hidden states at the boundaries are gone at the end. An interrupted pass resumes where it was:
    forward behind the boundaries that are there, in reverse at the newest gradient that was kept.
    """
    blocks = context.stock.layout.blocks
    with SensitivityStore(folder, context.observer.note, context.ranks) as sensitivities:
        if not _all_found(sensitivities, blocks):
            _visit(context, sensitivities, labels, backward)
        if context.ranks.is_first:
            for index in range(len(blocks) + 1):
                _boundary_path(folder, index).unlink(missing_ok=True)
        return sensitivities.costs(blocks, context.kinds)


def _all_found(sensitivities: SensitivityStore, blocks: Sequence[BlockLayout]) -> bool:
    # Every rank asks for each.
    found = [sensitivities.has(block) for block in blocks]
    return all(found)


def _visit(context: RunContext, sensitivities: SensitivityStore, labels: Labels, backward: Backward) -> None:
    blocks = context.stock.layout.blocks
    shape = (
        context.ranks.num_local(context.num_backward),
        context.windows.ids_NS.shape[1],
        context.stock.layout.hidden_size,
    )
    with contextlib.ExitStack() as stack:
        boundaries: list[FileStore] = []
        for index in range(len(blocks) + 1):
            path = _boundary_path(sensitivities.folder, index)
            boundaries.append(FileStore(path, shape, context.dtype, lasting=True, ranks=context.ranks))
            stack.callback(boundaries[-1].close)
        propagator = embed(context, {boundaries[0]: context.num_backward})
        context.observer.start("sensitivity: forward", len(blocks))
        for block, before, after in zip(blocks, boundaries[:-1], boundaries[1:], strict=True):
            step = f"border {block.index + 1}"
            if sensitivities.journal.find(step) is None:
                propagator.carry(load_block(context, block)[1], block.index, before, after)
                after.flush()
                sensitivities.journal.record(step, [after.path])
                release_free_memory()
            context.observer.advance(f"block {block.index}")
        gradient = MemoryStore(shape, torch.float32)
        snapshots = Snapshots(sensitivities.folder / "gradient", context.observer.note, context.ranks)
        kept = snapshots.load()
        if kept is not None and _all_found(sensitivities, blocks[kept.position :]):
            kept.restore({"gradient": gradient})
            left = blocks[: kept.position]
        else:
            snapshots.discard()
            with context.meter.phase(Phase.SENSITIVITY_LOSS):
                loss_gradient(context, boundaries[-1], gradient, labels)
            left = blocks
        release_free_memory()
        context.observer.start("sensitivity: backward", len(left))
        behind_first = list(reversed(left))
        # What follows from a block's sums does not hold the gradient up: each rank does it for one of so many blocks.
        for first in range(0, len(behind_first), context.ranks.size):
            tasks: dict[int, Task[Found]] = {}
            turn = behind_first[first : first + context.ranks.size]
            for owner, block in enumerate(turn):
                find = backward(block, propagator, boundaries[block.index], gradient, owner)
                tasks[block.index] = owner, partial(_on_host, find)
                del find
            found = context.ranks.all_gather(tasks)
            # The closures hold the sums.
            del tasks
            for block in turn:
                sensitivities.save(block, *found.pop(block.index))
            snapshots.keep(turn[-1].index, {"gradient": gradient})
            release_free_memory()
            for block in turn:
                context.observer.advance(f"block {block.index}")
        snapshots.discard()


def _on_host(find: Callable[[], Found]) -> Found:
    """Compute what is sent to other ranks and written to files, and move it to the host."""
    found, costs = find()
    return on_host(found), on_host(costs)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _boundary_path(folder: Path, index: int) -> Path:
    """Return the path of the hidden states in front of block `index`."""
    return folder / f"border-{index}.bin"


def loss_gradient(context: RunContext, final: HiddenStore, gradient: HiddenStore, labels: Labels) -> None:
    """Fill `gradient` with the derivative of the summed loss by the last hidden states of its windows.

    With labels drawn from the model's own prediction at each position E[g g^T] is the true Fisher information.
    """
    head = context.stock.load_head(context.device, context.dtype)
    generator = torch.Generator().manual_seed(context.recipe.seed)
    _, seq_len, hidden = gradient.shape
    drawn = labels == "sampled"
    # The last position predicts a token outside the window and takes no part, as in the perplexity.
    parts = [(start, min(start + LOGIT_TOKENS, seq_len - 1)) for start in range(0, seq_len - 1, LOGIT_TOKENS)]
    for number in range(context.num_backward):
        own, last = context.ranks.local_range(number, number + 1)
        if own == last:
            # Another rank's: labels are the same on any number of ranks.
            for start, stop in parts if drawn else ():
                skip_tokens(stop - start, generator)
            continue
        hidden_SD = final.read(own, last)[0].to(context.device)
        ids_S = context.windows.ids_NS[number].to(context.device)
        gradient_SD = torch.zeros(seq_len, hidden, device=context.device)
        for start, stop in parts:
            part_TD = hidden_SD[start:stop].detach().requires_grad_(True)
            logits_TV = head(part_TD)
            # The derivative of the cross entropy by the logits: probabilities, less one at the label.
            by_logits_TV = logits_TV.detach().float().softmax(dim=-1)
            labels_T1 = draw_tokens(by_logits_TV, generator) if drawn else ids_S[start + 1 : stop + 1, None]
            by_logits_TV.scatter_add_(1, labels_T1, by_logits_TV.new_full(labels_T1.shape, -1.0))
            found_TD = torch.autograd.grad(logits_TV, part_TD, by_logits_TV.to(logits_TV.dtype))[0]
            gradient_SD[start:stop] = found_TD.float()
        gradient.write(own, gradient_SD[None].cpu())
