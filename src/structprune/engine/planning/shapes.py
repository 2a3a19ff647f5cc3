"""Bytes of what several phases hold, from shapes: the planner adds them up for host and device.

`one_each` is one number per token of a micro-batch, in bytes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from structprune.architectures.stock.forward_bytes import ForwardBytes
from structprune.architectures.units import missing_biases
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.workspace import GroupProblem
from structprune.types import BlockLayout, ModelLayout, UnitGroup, UnitKind

# Each piece reads the whole output projection: with 32 tokens that took as long as the products.
LOGIT_TOKENS = 64
DIVERGENCE_TOKENS = 128
"""Tokens whose logits of two models are compared at once: more make the head's products no faster on a CPU."""
LEARNED_VECTORS, FLAT_VECTORS = 3, 6
"""What is kept of each number that learns: its value and two moments; and of a block's numbers, while they learn: all
of those, a copy of the value, the gradient and its square root."""
NUM_STAGED = 4
"""Micro-batches that lie in page-locked memory at once, on the way to a device and back."""
# Beside each logit: in float32 it, its log-softmax and a temporary of the loss, or its probability and the gradient.
_LOSS_BYTES = 3 * 4
# Of attention that holds its scores: forward the scores, capped, masked or as float32 probabilities, two at once and
# one more inside a kernel; backward what each of these operations keeps, and their gradients.
SCORE_BYTES = 3 * 4
_SCORE_BYTES_BACKWARD = 8 * 4
# Activations that make no other tensor than their result.
_ONE_KERNEL = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")
# Tokens that an iterative solver holds at once with its split variables.
_SOLVER_TOKENS = 8192


def logit_bytes(vocab_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of the logits that are there at once, with what a loss or its gradient makes of them."""
    return LOGIT_TOKENS * vocab_size * (dtype.itemsize + _LOSS_BYTES)


def divergence_bytes(vocab_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of two models' logits that are compared at once: two in `dtype`, four in float32."""
    return DIVERGENCE_TOKENS * vocab_size * (2 * dtype.itemsize + 4 * 4)


def solver_windows(num_windows: int, seq_len: int) -> int:
    """Return how many of the fitted windows an iterative solver gets."""
    return max(1, min(num_windows, _SOLVER_TOKENS // seq_len))


def widest_block(request: PlanRequest) -> BlockLayout:
    """Return the block with the most parameters."""
    return request.block or max(request.layout.blocks, key=lambda block: block.num_parameters)


def one_of_each(request: PlanRequest) -> list[PlanRequest]:
    """Return a request for the widest block of each sort, with its groups in scope: blocks of one sort have tensors of
    the same names.
    """
    kinds = by_kind(request.groups)
    sorts: dict[frozenset[str], BlockLayout] = {}
    for block in sorted(request.layout.blocks, key=lambda block: block.num_parameters):
        sorts[frozenset(block.shapes)] = block
    return [
        replace(request, block=block, groups=tuple(group for kind in kinds for group in block.groups_of(kind)))
        for block in sorts.values()
    ]


def num_scores(request: PlanRequest) -> int:
    """Count the attention scores of one window, where attention holds them."""
    return request.layout.num_score_heads * request.seq_len**2


def embedding_names(request: PlanRequest) -> list[str]:
    """List the tensors of the embeddings: those outside the blocks that come before them."""
    modules = tuple(f"{module}." for module in request.layout.embedding_modules)
    return [name for name in request.layout.outer_tensors if name.startswith(modules)]


def activation_bytes(
    block: BlockLayout, hidden: int, one_each: int, tiles: int = 0, *, differentiated: bool = False
) -> int:
    """Return the bytes that a block's forward holds at its peak, in the MLP or in attention.

    MLP: what `_wide_tensors` counts, or all of it where it is differentiated; attention: q, k, v, turned and with
    repeated heads, the output, `tiles`.
    """
    wide = max((4 if differentiated else _wide_tensors(g)) * g.num_units * g.width for g in block.groups)
    return max((wide + 4 * hidden) * one_each, 10 * hidden * one_each + tiles)


def _wide_tensors(group: UnitGroup) -> int:
    """Count the tensors as wide as the MLP that are there at once: gate, activated gate, up and product.

    Where gate and up are separate maps and the activation has one kernel they are three: gate is gone when up is
    computed.
    """
    apart = group.gate_module is not None and group.gate_module != group.up_module
    return 3 if apart and group.activation in _ONE_KERNEL else 4


def kept_for_backward(request: PlanRequest, block: BlockLayout) -> int:
    """Return the bytes that backward keeps of one window: activations, their gradients, and the products' inputs."""
    one_each = request.seq_len * request.compute_dtype.itemsize
    activations = activation_bytes(block, request.layout.hidden_size, one_each, differentiated=True)
    attention = 3 * activations + num_scores(request) * _SCORE_BYTES_BACKWARD
    # Beside what is kept, gradients of it.
    return max(attention, 2 * mixer_bytes(request, block).total)


def mixer_bytes(request: PlanRequest, block: BlockLayout) -> ForwardBytes:
    """Return what one window holds where the block mixes positions without attention."""
    return request.mixers.get(frozenset(block.shapes), ForwardBytes())


def statistics_bytes(request: PlanRequest, group: UnitGroup, micro_batch: int) -> int:
    """Return the bytes that a micro-batch adds to its forward pass where sums are taken.

    For each token these are the consumer's input, in float32 too; where a target is taken residual, output, target and
    their pieces; before a norm both streams' inputs and scaled ones.
    """
    item, inputs = request.compute_dtype.itemsize, group.num_units * group.width
    token = inputs * (item + (0 if item == 4 else 4))
    token += 6 * request.layout.hidden_size * 4 if request.follows_dense else 0
    token += 3 * inputs * 4 if group.output_normed else 0
    return micro_batch * request.seq_len * token


def left_bytes(request: PlanRequest, group: UnitGroup, micro_batch: int) -> int:
    """Return what stays of a micro-batch whose sums are taken until the next ones are: inputs, and where a target is
    taken this, the residual and the output.
    """
    token = group.num_units * group.width * request.compute_dtype.itemsize
    token += 3 * request.layout.hidden_size * 4 if request.follows_dense else 0
    return micro_batch * request.seq_len * token


def mask_bytes(request: PlanRequest, micro_batch: int) -> int:
    """Return the bytes of the attention masks, which stay while blocks run: one for each of up to three batch sizes."""
    layout, item = request.layout, request.compute_dtype.itemsize
    square = request.seq_len**2
    windowed = layout.attention_window is not None and layout.attention_window < request.seq_len
    if layout.num_score_heads:
        # As numbers, for every window of the batch; with and without attention's own window.
        return (2 if windowed else 1) * (2 * micro_batch + 1) * square * item
    # As bytes, and as numbers while SDPA uses it.
    return (3 + micro_batch * item) * square if windowed else 0


def group_problem(request: PlanRequest, block: BlockLayout, group: UnitGroup) -> GroupProblem:
    """Describe the group's problem by its sizes."""
    name = group.consumer.tensor
    return GroupProblem(
        inputs=group.num_units * group.width,
        outputs=request.layout.hidden_size,
        kept=request.kept[group.kind] * group.width if group.kind in request.kept else None,
        stored_item=request.stored_bytes[block.prefix + name] // torch.Size(block.shapes[name]).numel(),
        score=request.score,
        solves=request.solves,
        held_out_sums=request.held_out_texts if request.chooses_ridge else 0,
        judged=group.kind == "mlp" and request.num_latents > 0,
        follows_dense=request.follows_dense,
        costed=request.needs_sensitivity,
        reordered=group.consumer.repeat > 1,
    )


def repair_numbers(request: PlanRequest) -> list[int]:
    """Count the numbers of every block that a repair lets learn, with the biases that it gives consumers."""
    numbers: list[int] = []
    for block in request.layout.blocks:
        new = missing_biases(block) if request.repair_adds_biases else {}
        learned = {group.bias_name for group in block.groups} & set(new)
        numbers.append(scale_numbers(block) + sum(new[name][0] for name in learned))
    return numbers


def new_bias_numbers(request: PlanRequest) -> int:
    """Count the numbers of the biases that a repair adds, those of maps other than consumers too."""
    blocks = request.layout.blocks if request.repair_adds_biases else ()
    return sum(shape[0] for block in blocks for shape in missing_biases(block).values())


def scale_numbers(block: BlockLayout) -> int:
    """Count the block's vectors and one scale for each input of its consumers, those of single experts left out."""
    vectors = sum(shape[0] for shape in block.shapes.values() if len(shape) == 1)
    alone = [group.consumer for group in block.groups if len(block.groups_of(group.kind)) == 1]
    return vectors + sum(block.shapes[consumer.tensor][consumer.axis] for consumer in alone)


def numel(block: BlockLayout, name: str) -> int:
    """Count the elements of one of the block's tensors, by its name with or without the block's prefix."""
    return torch.Size(block.shapes[name.removeprefix(block.prefix)]).numel()


def most_inputs(layout: ModelLayout, kinds: Collection[UnitKind]) -> int:
    """Return the most inputs of any consumer of these sublayers in any block; 0 where there is none."""
    groups = [group for block in layout.blocks for kind in kinds for group in block.groups_of(kind)]
    return max((group.num_units * group.width for group in groups), default=0)


def gram_bytes(group: UnitGroup) -> int:
    """Return the bytes of the group's Gram in float32."""
    return (group.num_units * group.width) ** 2 * 4


def by_kind(groups: tuple[UnitGroup, ...]) -> dict[UnitKind, list[UnitGroup]]:
    """Group the parts by their sublayer."""
    parts: dict[UnitKind, list[UnitGroup]] = {}
    for group in groups:
        parts.setdefault(group.kind, []).append(group)
    return parts


def weight_gradient_bytes(request: PlanRequest, block: BlockLayout) -> int:
    """Return the bytes beside the weights that shrink with units: one window's gradients and two sums in float32.

    One weight with its products is counted too, for when they are added up.
    """
    names = {part.tensor for group in request.groups for part in group.slices}
    sizes = [torch.Size(block.shapes[name]).numel() for name in sorted(names) if len(block.shapes[name]) > 1]
    return sum(sizes) * (request.compute_dtype.itemsize + 2 * 4) + max(sizes) * 3 * 4
